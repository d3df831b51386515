// The tables of the operations page. Rows are kept and written over, so that nothing flickers and a button that has the
// focus keeps it.

import { NOTHING, brief, compact, duration, moment, number, spoken, timing } from "./ops_words.js";

const SHORTEST_SECONDS = 1;
const FULL_SHARE = 0.9;
const STOPPED_SHOWN_MILLISECONDS = 5_000;

/** A table whose rows are known by a key. */
class Table {
  constructor(name, makeRow) {
    this.body = document.getElementById(`${name}-rows`);
    this.none = document.getElementById(`${name}s-none`);
    this.makeRow = makeRow;
    this.rows = new Map();
  }

  /** Show these, in this order; a row that is not among them goes, unless it is to stay. */
  show(items, keyOf, stays = () => false) {
    const wanted = new Map(items.map((item) => [keyOf(item), item]));
    for (const [key, row] of this.rows) {
      if (!wanted.has(key) && !stays(row)) this.#remove(key, row);
    }
    let next = this.body.firstElementChild;
    for (const [key, item] of wanted) {
      let row = this.rows.get(key);
      const shown = row !== undefined;
      if (!shown) this.rows.set(key, (row = this.makeRow(item)));
      row.show(item);
      while (shown && next && next !== row.element && !wanted.has(next.dataset.key)) next = next.nextElementSibling;
      if (next === row.element) next = next.nextElementSibling;
      else this.body.insertBefore(row.element, next);
      row.element.dataset.key = key;
    }
    this.none.hidden = this.rows.size > 0;
  }

  #remove(key, row) {
    const focused = row.element.contains(document.activeElement);
    const heir = row.element.nextElementSibling ?? row.element.previousElementSibling;
    row.element.remove();
    this.rows.delete(key);
    if (focused) (heir?.querySelector("button") ?? this.body.closest("[tabindex]")).focus();
  }
}

/** A table row; `columns` are names, a leading `#` for numbers and `!` for the one that names the row. */
class Row {
  constructor(columns) {
    this.element = document.createElement("tr");
    this.cells = {};
    for (const column of columns) {
      const name = column.replace(/^[#!]/, "");
      const cell = document.createElement(column.startsWith("!") ? "th" : "td");
      if (column.startsWith("!")) cell.scope = "row";
      if (column.startsWith("#")) cell.className = "number";
      this.cells[name] = cell;
      this.element.append(cell);
    }
  }

  write(name, text, title = "") {
    const cell = this.cells[name];
    if (cell.textContent !== text) cell.textContent = text;
    if (cell.title !== title) cell.title = title;
  }

  badge(name, text, kind) {
    const cell = this.cells[name];
    const badge = cell.firstElementChild ?? cell.appendChild(document.createElement("span"));
    badge.className = "ops-badge";
    badge.dataset.kind = kind;
    if (badge.textContent !== text) badge.textContent = text;
  }
}

class StreamRow extends Row {
  #stop;
  #session;
  #before = null;
  #receipt = null;

  constructor(session, onStop) {
    super(["!user", "model", "phase", "#age", "#length", "#rate", "#viewers", "session", "action"]);
    this.#session = session;
    this.cells.action.className = "action";
    this.cells.session.className = "code";
    this.#stop = document.createElement("button");
    this.#stop.type = "button";
    this.#stop.className = "ops-stop";
    this.#stop.addEventListener("click", () => this.#click(onStop));
    this.cells.action.append(this.#stop);
    this.#say("Stop");
  }

  /** Whether it was stopped here a moment ago, so that the receipt is still to be read. */
  get stays() {
    return this.#receipt !== null && performance.now() - this.#receipt < STOPPED_SHOWN_MILLISECONDS;
  }

  show(session) {
    this.#session = session;
    if (this.#receipt !== null) return;
    const length = session.length + session.thinkingLength;
    this.write("user", session.userName);
    this.write("model", session.model, session.model);
    this.badge("phase", spoken(session.phase) + (session.attempt > 1 ? ` · attempt ${session.attempt}` : ""), session.phase);
    this.write("age", duration(session.ageSeconds));
    this.write("length", number(length), session.thinkingLength ? `${number(session.thinkingLength)} of it thinking` : "");
    this.write("rate", this.#rate(length, session.ageSeconds));
    this.write("viewers", number(session.viewers));
    this.write("session", brief(session.sessionId), session.sessionId);
    if (session.stopping) this.#stopping();
    else if (!this.#stop.dataset.asked) this.#say("Stop");
  }

  /** Code points a second since the look before. */
  #rate(length, ageSeconds) {
    const before = this.#before;
    // Two looks that follow each other closely tell nothing.
    if (before && ageSeconds - before.ageSeconds < SHORTEST_SECONDS) return this.cells.rate.textContent;
    this.#before = { length, ageSeconds };
    if (!before) return NOTHING;
    return `${compact(Math.max(0, length - before.length) / (ageSeconds - before.ageSeconds))}/s`;
  }

  async #click(onStop) {
    if (this.#stop.getAttribute("aria-disabled") === "true") return;
    this.#stop.dataset.asked = "yes";
    this.#stopping();
    const receipt = await onStop(this.#session);
    delete this.#stop.dataset.asked;
    if (receipt) this.#stopped(receipt);
    else this.#say("Stop");
  }

  #stopping() {
    this.#say("stopping…", true);
  }

  #stopped({ status, reason, length, thinkingLength }) {
    this.#receipt = performance.now();
    this.#say(`kept ${number(length)}`, true);
    this.element.dataset.ended = "yes";
    this.badge("phase", spoken(reason), status);
    this.write("length", number(length + thinkingLength));
    this.write("rate", NOTHING);
  }

  #say(text, disabled = false) {
    if (this.#stop.textContent === text) return;
    const { userName, model } = this.#session;
    this.#stop.textContent = text;
    this.#stop.setAttribute("aria-label", `${text === "Stop" ? "Stop the stream" : text}: ${userName}, ${model}`);
    // It stays in the order of focus, which a disabled one does not.
    this.#stop.setAttribute("aria-disabled", String(disabled));
  }
}

class WorkerRow extends Row {
  constructor() {
    super(["!name", "state", "#streams", "load"]);
    this.load = document.createElement("div");
    this.load.className = "ops-load";
    this.load.setAttribute("role", "meter");
    this.load.append(document.createElement("i"));
    this.cells.load.append(this.load);
  }

  show({ name, state, streams, silentSeconds, concurrency }) {
    this.write("name", name, name);
    const silence = silentSeconds === null ? "" : ` ${duration(silentSeconds)}`;
    this.badge("state", state === "silent" ? `silent${silence}` : state, state);
    this.write("streams", number(streams));
    const most = Math.max(concurrency, streams);
    this.load.ariaLabel = `Load of ${name}`;
    this.load.ariaValueMax = String(most);
    this.load.ariaValueNow = String(streams);
    this.load.ariaValueText = `${number(streams)} of ${number(concurrency)} streams`;
    this.load.toggleAttribute("data-full", streams > FULL_SHARE * concurrency);
    this.load.firstChild.style.width = `${(100 * streams) / most}%`;
  }
}

class EndingRow extends Row {
  constructor() {
    super(["ended", "!user", "model", "reason", "by", "#length", "#duration", "#fence", "#commit", "session"]);
    this.cells.session.className = "code";
  }

  show(ending) {
    this.write("ended", moment(ending.endedAt), ending.endedAt);
    this.write("user", ending.userName);
    this.write("model", ending.model, ending.model);
    this.badge("reason", spoken(ending.reason), ending.status);
    this.write("by", ending.terminatedBy ?? NOTHING);
    this.write("length", number(ending.length), ending.thinkingLength ? `and ${number(ending.thinkingLength)} of thinking` : "");
    this.write("duration", duration(ending.durationSeconds));
    this.write("fence", timing(ending.requestToFenceSeconds));
    this.write("commit", timing(ending.requestToCommitSeconds));
    this.write("session", brief(ending.sessionId), ending.sessionId);
  }
}

/** Shows streams; `onStop` stops one and answers its receipt, or null where that failed. */
export function streamTable(onStop) {
  const table = new Table("stream", (session) => new StreamRow(session, onStop));
  return (sessions) => table.show(sessions, (one) => one.sessionId, (row) => row.stays);
}

export function workerTable() {
  const table = new Table("worker", () => new WorkerRow());
  return (workers, concurrency) => table.show(workers.map((one) => ({ ...one, concurrency })), (one) => one.name);
}

export function endingTable() {
  const table = new Table("ending", () => new EndingRow());
  return (endings) => table.show(endings, (one) => one.sessionId);
}
