// Numbers, times and words as the operations page shows them.

const NUMBER = new Intl.NumberFormat("en");
const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const NOTHING = "–";

export const number = (value) => (value === null ? NOTHING : NUMBER.format(Math.round(value)));
export const compact = (value) => (value < 10_000 ? NUMBER.format(trim(value)) : COMPACT.format(value));
export const plural = (count, one, many = `${one}s`) => `${number(count)} ${count === 1 ? one : many}`;
export const clock = (moment) => new Date(moment).toLocaleTimeString("en-GB");
export const spoken = (word) => word.replaceAll("_", " ").toLowerCase();
/** The end of an id, which tells two of the same second apart. */
export const brief = (id) => id.slice(-8);

/** A short time, to two or three figures. */
export function timing(seconds) {
  if (seconds === null || seconds === undefined) return NOTHING;
  if (seconds === 0) return "0";
  if (seconds < 1) return `${trim(seconds * 1000)} ms`;
  return seconds < 120 ? `${trim(seconds)} s` : duration(seconds);
}

const trim = (value) => (value < 100 ? Math.round(value * 10) / 10 : Math.round(value));

/** A longer time, to the second. */
export function duration(seconds) {
  if (seconds < 9.95) return `${trim(seconds)} s`;
  const whole = Math.floor(seconds);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (value) => String(value).padStart(2, "0");
  if (hours) return `${hours} h ${two(minutes)} m`;
  return minutes ? `${minutes} m ${two(rest)} s` : `${rest} s`;
}

/** A moment: its time, and its day where that is another. */
export function moment(text) {
  const then = new Date(text);
  const today = then.toDateString() === new Date().toDateString();
  return today ? clock(then) : `${then.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${clock(then)}`;
}

/** Of the parts of a distribution of whole numbers: labels, as short as they can be, and what each is in full. */
export function boundNames(bounds) {
  const labels = bounds.map((bound) => (bound < 1024 ? String(bound) : `${bound / 1024}k`));
  const names = bounds.map((bound, index) => (index ? `${number(bounds[index - 1] + 1)} to ${number(bound)}` : number(bound)));
  return { labels: [...labels, "+"], names: [...names, `above ${number(bounds.at(-1))}`] };
}
