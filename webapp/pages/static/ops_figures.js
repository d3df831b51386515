// What is known only as a counter's difference between two looks: tokens a second, and the time to the first token.

const SAMPLES_KEPT = 5_400;
const FIRST_TOKEN_SECONDS = 60;
const SHORTEST_RANGE_SECONDS = 120;
const SHORTEST_SECONDS = 1;
const GAP_SECONDS = 30;

export class LiveFigures {
  /** What the last two looks tell; null where there are no two. */
  rates = { tokens: null, characters: null };
  series = { x: [], tokens: [], p50: [], p99: [] };
  #looks = [];
  #last = Date.now() / 1000;

  add(at, figures) {
    const moment = Date.parse(at) / 1000;
    const before = this.#looks.at(-1);
    // What little came between two looks that follow each other closely tells nothing.
    if (before && moment - before.moment < SHORTEST_SECONDS) return;
    this.#last = moment;
    this.rates = rates(before, figures && { moment, ...figures });
    if (before && moment - before.moment > GAP_SECONDS) this.#push(before.moment + 1, null, null, null);
    if (!figures) {
      this.#push(moment, null, null, null);
      return;
    }
    this.#looks.push({ moment, ...figures });
    while (this.#looks.length > 2 && this.#looks[1].moment <= moment - FIRST_TOKEN_SECONDS) this.#looks.shift();
    const counts = differences(this.#looks[0].firstTokenSeconds.counts, figures.firstTokenSeconds.counts);
    const bounds = figures.firstTokenSeconds.upperBounds;
    this.#push(moment, this.rates.tokens, quantile(bounds, counts, 0.5), quantile(bounds, counts, 0.99));
  }

  /** From when this page was opened, or so many minutes ago, until now. */
  range(minutes) {
    const first = this.series.x[0] ?? this.#last;
    const from = Math.max(first, this.#last - minutes * 60);
    return [Math.min(from, this.#last - SHORTEST_RANGE_SECONDS), this.#last];
  }

  #push(moment, ...values) {
    const { x, tokens, p50, p99 } = this.series;
    x.push(moment);
    [tokens, p50, p99].forEach((one, index) => one.push(values[index]));
    if (x.length > SAMPLES_KEPT) for (const one of [x, tokens, p50, p99]) one.shift();
  }
}

function rates(before, now) {
  const seconds = before && now ? now.moment - before.moment : 0;
  // A counter that fell was begun anew.
  if (seconds <= 0 || now.chunksTotal < before.chunksTotal) return { tokens: null, characters: null };
  return {
    tokens: (now.chunksTotal - before.chunksTotal) / seconds,
    characters: (now.charactersTotal - before.charactersTotal) / seconds,
  };
}

function differences(before, now) {
  return now.map((count, index) => Math.max(0, count - (before[index] ?? 0)));
}

/** As Prometheus estimates it: values lie evenly within a bucket; null of none. */
function quantile(bounds, counts, share) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  if (!total) return null;
  let below = 0;
  for (const [index, count] of counts.entries()) {
    if (count && below + count >= share * total) {
      if (index === bounds.length) return bounds.at(-1);
      const from = index ? bounds[index - 1] : 0;
      return from + (bounds[index] - from) * ((share * total - below) / count);
    }
    below += count;
  }
  return null;
}
