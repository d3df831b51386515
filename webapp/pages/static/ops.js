// The operations page: what is shown follows what the server counts, every two seconds while the page is seen.

import { history, overview, poll, terminate } from "./ops_api.js";
import { Chart } from "./ops_charts.js";
import { LiveFigures } from "./ops_figures.js";
import { endingTable, streamTable, workerTable } from "./ops_tables.js";
import { NOTHING, boundNames, clock, compact, duration, number, plural, spoken, timing } from "./ops_words.js";

const OVERVIEW_MILLISECONDS = 2_000;
const HISTORY_MILLISECONDS = 10_000;
const COMPLETED = new Set(["stop", "length"]);

const element = (id) => document.getElementById(id);
const charts = {
  streams: new Chart("chart-streams", { format: compact, whole: true }),
  tokens: new Chart("chart-tokens", { format: compact }),
  endings: new Chart("chart-endings", { kind: "stacked", format: compact, whole: true }),
  stops: new Chart("chart-stops", { format: timing }),
  first: new Chart("chart-first", { format: timing }),
  lengths: new Chart("chart-lengths", { kind: "bars", format: compact, whole: true }),
};
const showStreams = streamTable(stop);
const showWorkers = workerTable();
const showEndings = endingTable();
const live = new LiveFigures();
const troubles = new Map();

restoreWindow();
const lookNow = poll(look, OVERVIEW_MILLISECONDS, (error) => trouble("overview", `${error.message}, trying again`));
const lookBackNow = poll(lookBack, HISTORY_MILLISECONDS, (error) => trouble("history", `${error.message}, trying again`));

element("window").addEventListener("change", () => {
  globalThis.history.replaceState(null, "", `?minutes=${minutes()}`);
  drawLive();
  lookBackNow();
});

// How things stand

async function look() {
  const now = await overview();
  live.add(now.at, now.figures);
  showStreams(now.streams);
  showWorkers(now.workers, now.workerConcurrency);
  showEndings(now.endings);
  showTiles(now);
  drawLive();
  trouble("overview", "");
  element("beat").dataset.state = "live";
  element("beat").textContent = `Updated ${clock(now.at)}`;
}

function showTiles({ population, streams, workers, workerConcurrency, figures }) {
  const { active, queued } = population;
  const loading = streams.filter((one) => one.phase === "LOADING").length;
  const waiting = streams.filter((one) => one.phase === "QUEUED").map((one) => one.ageSeconds);
  const silent = workers.filter((one) => one.state === "silent").length;
  const unknown = workers.some((one) => one.state === "unknown");
  tile("tile-active", number(active), loading ? `${number(loading)} loading` : "all hosts");
  const longest = waiting.length ? `longest ${duration(Math.max(...waiting))}` : "just now";
  tile("tile-queued", number(queued), queued ? longest : "nobody waits", queued ? "notable" : "");
  tile("tile-readers", figures ? number(figures.readers) : NOTHING, "this host");
  const { tokens, characters } = live.rates;
  tile("tile-tokens", tokens === null ? NOTHING : compact(tokens), characters === null ? "this host" : `${compact(characters)} characters/s`);
  const words = unknown ? "Redis cannot be reached" : silent ? `${number(silent)} silent` : "all heard of";
  const alive = workers.length - silent;
  tile("tile-workers", number(alive), alive || silent ? words : "none is alive", silent || unknown || !alive ? "bad" : "");
  element("streams-note").textContent = active > streams.length ? `the newest ${number(streams.length)} of ${number(active)}` : "";
  element("workers-capacity").textContent = `${number(workerConcurrency)} streams each`;
}

function tile(id, value, note, state = "") {
  element(id).textContent = value;
  element(`${id}-note`).textContent = note;
  element(id).parentElement.dataset.state = state;
}

/** What has no history elsewhere, and begins with this page. */
function drawLive() {
  const range = live.range(minutes());
  const { x, tokens, p50, p99 } = live.series;
  const last = (values) => values.at(-1) ?? null;
  const rest = last(tokens);
  charts.tokens.show({
    x,
    range,
    series: [{ name: "tokens/s", colour: "--chart-tokens", values: tokens, area: true, rest: rest === null ? NOTHING : compact(rest) }],
  });
  charts.first.show({
    x,
    range,
    series: [
      { name: "p50", colour: "--chart-p50", values: p50, rest: timing(last(p50)) },
      { name: "p99", colour: "--chart-p99", values: p99, rest: timing(last(p99)) },
    ],
  });
}

// How it was

async function lookBack() {
  const asked = minutes();
  const then = await history(asked);
  if (asked !== minutes()) return;
  const x = then.steps.map((step) => Date.parse(step) / 1000);
  const time = { x, range: [x[0] - then.stepSeconds, x.at(-1)] };
  drawPopulation(time, then);
  drawEndings(time, then.endings);
  drawStops(time, then);
  drawLengths(then.partialLengths);
  const { overallCount, overallP50, overallP99 } = then.requestToCommit;
  tile("tile-stop", timing(overallP99), overallCount ? `p50 ${timing(overallP50)} · ${plural(overallCount, "stop")}` : "nothing was stopped");
  trouble("history", "");
  trouble("truncated", then.truncated ? "There are more streams than are read: the charts begin later than the time asked for." : "");
}

function drawPopulation(time, { active, queued }) {
  charts.streams.show({
    ...time,
    series: [
      { name: "active", colour: "--chart-active", values: active, area: true, rest: number(active.at(-1)) },
      { name: "queued", colour: "--chart-queued", values: queued, rest: number(queued.at(-1)) },
    ],
  });
}

function drawEndings(time, endings) {
  const cut = Object.entries(endings).filter(([reason]) => !COMPLETED.has(reason));
  const series = cut.map(([reason, values]) => ({
    name: spoken(reason),
    colour: `--reason-${reason.replaceAll("_", "-")}`,
    values,
    rest: number(values.reduce((sum, value) => sum + (value ?? 0), 0)),
  }));
  charts.endings.show({ ...time, series, none: "nothing was terminated" });
}

function drawStops(time, { requestToFence, fenceToUpstreamClosed, requestToCommit }) {
  const one = (name, colour, values, overall, more) => ({ name, colour, values, rest: timing(overall), ...more });
  charts.stops.show({
    ...time,
    series: [
      one("saved p99", "--chart-p99", requestToCommit.p99, requestToCommit.overallP99),
      one("saved p50", "--chart-p50", requestToCommit.p50, requestToCommit.overallP50),
      one("fenced p99", "--chart-fence", requestToFence.p99, requestToFence.overallP99, { dash: [4, 3] }),
      one("closed p99", "--chart-closed", fenceToUpstreamClosed.p99, fenceToUpstreamClosed.overallP99, { dash: [2, 3] }),
    ],
  });
}

function drawLengths({ upperBounds, counts }) {
  const { labels, names } = boundNames(upperBounds);
  const total = counts.reduce((sum, count) => sum + count, 0);
  charts.lengths.show({
    x: labels.map((_, index) => index),
    range: [-0.6, labels.length - 0.4],
    labels,
    names,
    series: [{ name: "answers", colour: "--chart-lengths", values: counts, rest: number(total) }],
  });
}

// Stopping

async function stop(session) {
  try {
    const receipt = await terminate(session.sessionId);
    trouble("stop", "");
    announce(`Stopped the stream of ${session.userName}: ${plural(receipt.length, "character")} kept`);
    lookBackNow();
    return receipt;
  } catch (error) {
    trouble("stop", `The stream of ${session.userName} was not stopped: ${error.message}`);
    return null;
  } finally {
    lookNow();
  }
}

// What is said

/** Show what is wrong, of each kind one line; empty: it is well again. */
function trouble(kind, text) {
  if (troubles.get(kind) === text || (!text && !troubles.has(kind))) return;
  troubles.set(kind, text);
  const lines = [...new Set([...troubles.values()].filter(Boolean))];
  element("trouble").textContent = lines.join(" · ");
  element("trouble").hidden = !lines.length;
  if (kind === "overview" && text) element("beat").dataset.state = "lost";
  if (kind === "overview" || text) announce(text || "Sluicegate answers again");
}

function announce(text) {
  element("announcer").textContent = text;
}

function minutes() {
  return Number(document.querySelector('input[name="minutes"]:checked').value);
}

function restoreWindow() {
  const wanted = new URLSearchParams(location.search).get("minutes");
  const choice = [...document.querySelectorAll('input[name="minutes"]')].find((one) => one.value === wanted);
  if (choice) choice.checked = true;
}
