// Charts over uPlot: each redraws itself when its box or the colours change, has a legend that follows the pointer,
// and says in words what it shows.

import uPlot from "./vendor/uplot.js";

const HEIGHT = 168;
const FONT = "11px system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif";
const BAR = { size: [0.82, 48] };
const LABEL_PIXELS = 36;
const SECONDS_SHOWN_BELOW = 600;
const darkness = matchMedia("(prefers-color-scheme: dark)");
const charts = new Set();

darkness.addEventListener("change", redrawAll);
new MutationObserver(redrawAll).observe(document.documentElement, { attributeFilter: ["data-theme"] });

function redrawAll() {
  for (const chart of charts) chart.redraw();
}

/**
 * What a chart shows: `x` (seconds since 1970, or indices where there are `labels` and `names`), `range` of x, and
 * `series` of `{name, colour, values, rest, dash, area}`. `colour` is the name of a CSS property; `rest` what the legend says of the
 * series while the pointer is elsewhere.
 */
export class Chart {
  #plot;
  #legend;
  #title;
  #kind;
  #format;
  #whole;
  #model = null;
  #chart = null;
  #form = "";
  #values = new Map();

  /** `kind`: `lines`, `stacked` (bars over time) or `bars` (a distribution). `whole`: there are whole numbers only. */
  constructor(id, { kind = "lines", format = String, whole = false } = {}) {
    this.#plot = document.getElementById(id);
    this.#legend = document.getElementById(`${id}-legend`);
    this.#title = document.getElementById(`${id}-title`).textContent;
    this.#kind = kind;
    this.#format = format;
    this.#whole = whole;
    charts.add(this);
    new ResizeObserver(() => this.#fit()).observe(this.#plot);
  }

  show(model) {
    this.#model = model;
    const form = JSON.stringify([model.series.map(({ name, colour }) => [name, colour]), model.labels]);
    if (!this.#chart || form !== this.#form) {
      this.#form = form;
      this.#build();
    } else {
      this.#chart.setData(this.#data());
    }
    this.#write();
    const words = model.series.map(({ name, rest }) => `${name} ${rest}`).join(", ");
    this.#plot.setAttribute("aria-label", `${this.#title}: ${words || model.none || "nothing"}`);
  }

  redraw() {
    if (this.#model) this.#build();
  }

  #build() {
    this.#chart?.destroy();
    this.#buildLegend();
    this.#chart = new uPlot(this.#options(), this.#data(), this.#plot);
    this.#write();
  }

  #fit() {
    const width = this.#plot.clientWidth;
    if (this.#chart && width && width !== this.#chart.width) this.#chart.setSize({ width, height: HEIGHT });
  }

  /** What uPlot draws; stacked bars are drawn as sums, the highest first, so that each lies before the next. */
  #data() {
    const { x, series } = this.#model;
    const values = series.map((one) => one.values);
    if (this.#kind !== "stacked") return [x, ...values];
    const sums = [];
    for (const row of values) {
      const below = sums.at(-1);
      sums.push(row.map((value, index) => (value === null ? null : value + (below?.[index] ?? 0))));
    }
    return [x, ...sums.reverse()];
  }

  #options() {
    const { series, labels } = this.#model;
    const axis = { stroke: colour("--muted"), font: FONT, ticks: { show: false } };
    const drawn = this.#kind === "stacked" ? series.toReversed() : series;
    return {
      width: this.#plot.clientWidth || 320,
      height: HEIGHT,
      padding: [10, 18, 0, 0],
      legend: { show: false },
      cursor: {
        y: false,
        drag: { x: false, y: false },
        points: { show: this.#kind === "lines", size: 6 },
        ...(!labels && { sync: { key: "operations", scales: ["x", null] } }),
      },
      scales: {
        x: { time: !labels, range: () => this.#model.range },
        y: { range: (_, __, most) => [0, most > 0 ? most * 1.08 : 1] },
      },
      axes: [
        {
          ...axis,
          size: 24,
          gap: 4,
          space: 64,
          grid: { show: false },
          ...(labels
            ? { splits: () => labels.map((_, index) => index), values: (chart) => thinned(labels, chart.width) }
            : { values: (_, moments) => moments.map((moment) => this.#clock(moment)) }),
        },
        {
          ...axis,
          size: (_, values) => Math.max(34, ...(values ?? []).map((value) => 10 + 6.6 * value.length)),
          gap: 4,
          space: 30,
          grid: { stroke: colour("--line"), width: 1 },
          values: (_, values) => values.map((value) => this.#format(value)),
          ...(this.#whole && { incrs: [1, 2, 5].flatMap((one) => [...Array(8).keys()].map((e) => one * 10 ** e)).sort((a, b) => a - b) }),
        },
      ],
      series: [{}, ...drawn.map((one) => this.#series(one, colour(one.colour)))],
      hooks: { setCursor: [() => this.#write()] },
    };
  }

  #series({ dash, area }, stroke) {
    if (this.#kind === "lines") {
      // A value between two gaps is a point and no line.
      return { stroke, width: 1.75, dash, fill: area && stroke.replace("rgb(", "rgba(").replace(")", ", 0.15)"), points: { show: alone, size: 5, fill: stroke } };
    }
    const paths = uPlot.paths.bars({ ...BAR, align: this.#kind === "stacked" ? -1 : 0 });
    return { stroke, fill: stroke, width: 0, paths, points: { show: false } };
  }

  #clock(moment) {
    const [from, to] = this.#model.range;
    return clock(moment, to - from < SECONDS_SHOWN_BELOW);
  }

  #buildLegend() {
    this.#values.clear();
    const entries = this.#model.series.map(({ name, colour, dash }) => {
      const entry = document.createElement("span");
      const swatch = document.createElement("i");
      swatch.className = dash ? "dashed" : "";
      swatch.style.setProperty("--swatch", `var(${colour})`);
      const value = document.createElement("b");
      this.#values.set(name, value);
      entry.append(swatch, `${name} `, value);
      return entry;
    });
    const moment = document.createElement("span");
    moment.className = "ops-moment";
    this.#values.set("", moment);
    this.#legend.replaceChildren(...entries, moment);
  }

  /** The legend: what is under the pointer, or what is said otherwise. */
  #write() {
    const { series, x, names, none } = this.#model;
    const index = this.#chart?.cursor?.idx;
    const pointed = index !== null && index !== undefined && index < x.length;
    for (const { name, values, rest } of series) {
      const value = pointed ? values[index] : null;
      this.#values.get(name).textContent = pointed ? (value === null ? "–" : this.#format(value)) : rest;
    }
    const where = pointed ? (names?.[index] ?? clock(x[index], true)) : series.length ? "" : (none ?? "");
    this.#values.get("").textContent = where;
  }
}

/** For uPlot: the points that have no neighbour to be joined to, which it would not show. */
function alone(chart, seriesIndex) {
  const values = chart.data[seriesIndex];
  return values.some((one, i) => one !== null && (values[i - 1] ?? null) === null && (values[i + 1] ?? null) === null);
}

/** What a CSS property comes to in the scheme that is shown, as a canvas takes it: `rgb(r, g, b)`. */
function colour(property) {
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.color = `var(${property})`;
  const { color } = getComputedStyle(probe);
  probe.remove();
  return color;
}

/** Labels that have room: every second one, where not all of them do. */
function thinned(labels, width) {
  const each = width < labels.length * LABEL_PIXELS ? 2 : 1;
  return labels.map((label, index) => (index % each ? "" : label));
}

function clock(moment, withSeconds) {
  const options = { hour: "2-digit", minute: "2-digit", ...(withSeconds && { second: "2-digit" }) };
  return new Date(moment * 1000).toLocaleTimeString("en-GB", options);
}
