// One connection over which several streams are followed, each from its cursor to its `done`.
//
// A browser opens six HTTP/1.1 connections to one server, for all of its tabs together; so there is one of these for
// all tabs, in a shared worker, or one for a tab where there is no such thing. A cursor is opaque: it is kept and sent
// back, never looked into. To resume is exact and cheap, so a needless reconnection does no harm.

import { createParser } from "./vendor/eventsource-parser/parse.js";

const STREAM_LIMIT = 32; // what the server takes at a time
const SHORTEST_PAUSE_MILLISECONDS = 500;
const LONGEST_PAUSE_MILLISECONDS = 15_000;
// The server says something every 15 s. Who has slept, or is told to look, asks sooner than who merely waits.
const SILENCE_MILLISECONDS = 45_000;
const SUSPICIOUS_MILLISECONDS = 20_000;
// Several pages may begin, or leave, in one moment.
const GATHER_MILLISECONDS = 15;
// A connection that lasts so long was a good one: what comes after it is a new failure.
const GOOD_MILLISECONDS = 5000;

export class StreamConnection {
  #streams = new Map();
  #controller = null;
  #failures = 0;
  #heardAt = 0;
  #retryTimer = 0;
  #silenceTimer = 0;
  #gatherTimer = 0;
  #suspended = false;

  /**
   * Follow a stream from its start; whoever comes second is told at once what the first has been told. `tell` gets
   * {type, data}: session, phase, thinking, content (data: the text) and done; connected, and disconnected
   * ({pauseMilliseconds} until the next try); missed (it can only be read as a message any more); lost ({status}: it
   * makes no sense to go on). Returns what ends it.
   */
  follow(sessionId, tell) {
    let stream = this.#streams.get(sessionId);
    if (stream) {
      this.#repeat(stream, tell);
    } else {
      stream = { cursor: "", session: null, phase: null, thinking: "", content: "", followers: new Set() };
      this.#streams.set(sessionId, stream);
      this.#change();
    }
    stream.followers.add(tell);
    return () => {
      stream.followers.delete(tell);
      if (stream.followers.size || this.#streams.get(sessionId) !== stream) return;
      this.#streams.delete(sessionId);
      this.#change();
    };
  }

  /** Look at once whether the connection is what it seems: the network is back, or the page is looked at again. */
  wake() {
    this.#suspended = false;
    if (this.#retryTimer || !this.#controller || Date.now() - this.#heardAt > SUSPICIOUS_MILLISECONDS) this.#open();
  }

  /** Give the connection back until `wake`. */
  suspend() {
    this.#suspended = true;
    this.#close();
  }

  #repeat({ session, phase, thinking, content }, tell) {
    if (session) tell({ type: "session", data: session });
    if (phase) tell({ type: "phase", data: phase });
    if (thinking) tell({ type: "thinking", data: thinking });
    if (content) tell({ type: "content", data: content });
  }

  #change() {
    clearTimeout(this.#gatherTimer);
    this.#gatherTimer = setTimeout(() => this.#open(), GATHER_MILLISECONDS);
  }

  #close() {
    this.#controller?.abort();
    this.#controller = null;
    clearTimeout(this.#retryTimer);
    clearTimeout(this.#silenceTimer);
    clearTimeout(this.#gatherTimer);
    this.#retryTimer = 0;
  }

  async #open() {
    this.#close();
    if (this.#suspended || this.#streams.size === 0) return;
    const controller = (this.#controller = new AbortController());
    const followed = [...this.#streams].slice(-STREAM_LIMIT);
    const asked = followed.map(([id, { cursor }]) => (cursor ? `${id}:${cursor}` : id)).join(",");
    let pauseMilliseconds = 0;
    this.#watchForSilence();
    try {
      const response = await fetch(`/api/streams/events?streams=${asked}`, {
        headers: { Accept: "text/event-stream" },
        cache: "no-store",
        signal: controller.signal,
      });
      if (response.status === 200) await this.#read(response.body, new Map(followed));
      else if (response.status === 401) return this.#giveUp(followed, "lost", { status: 401 });
      else if (response.status === 404) await this.#dropLost(followed);
      else if (response.status === 204 || response.status === 400) return this.#giveUp(followed, "missed");
      else pauseMilliseconds = 1000 * (Number(response.headers.get("Retry-After")) || 0);
    } catch {
      // Broken, or closed by us; which of the two is seen below.
    }
    if (controller !== this.#controller) return;
    if (this.#streams.size) this.#retryLater(pauseMilliseconds);
    else this.#close();
  }

  async #read(body, followed) {
    const beganAt = Date.now();
    this.#tellAll("connected");
    let stream = null;
    const parser = createParser({
      onEvent: ({ id, event = "message", data }) => {
        if (Date.now() - beganAt > GOOD_MILLISECONDS) this.#failures = 0;
        const value = JSON.parse(data);
        if (event === "stream") stream = this.#isFollowed(value.sessionId, followed);
        else if (stream) this.#take(stream, event, value);
        if (stream && id) stream.cursor = id;
      },
    });
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      this.#watchForSilence();
      parser.feed(value);
    }
  }

  /** The stream of that id, if it is the one that was asked for: it may have been left, and followed anew. */
  #isFollowed(sessionId, followed) {
    const stream = this.#streams.get(sessionId);
    return stream === followed.get(sessionId) ? stream : null;
  }

  #take(stream, event, value) {
    if (event === "thinking" || event === "message") {
      const type = event === "message" ? "content" : event;
      stream[type] += value.content;
      this.#tell(stream, type, value.content);
      return;
    }
    if (event === "session" || event === "phase") stream[event] = value;
    if (event === "done") {
      this.#failures = 0;
      this.#forget(stream);
    }
    this.#tell(stream, event, value);
  }

  #forget(stream) {
    for (const [id, one] of this.#streams) if (one === stream) this.#streams.delete(id);
  }

  #tell(stream, type, data) {
    for (const tell of stream.followers) tell({ type, data });
  }

  #tellAll(type, data) {
    for (const stream of this.#streams.values()) this.#tell(stream, type, data);
  }

  #giveUp(followed, type, data) {
    for (const [id, stream] of followed) {
      if (this.#streams.get(id) !== stream) continue;
      this.#streams.delete(id);
      this.#tell(stream, type, data);
    }
    this.#open();
  }

  /** The server does not say which one it does not know, or shows no longer. */
  async #dropLost(followed) {
    for (const one of followed) {
      const { status } = await fetch(`/api/streams/${one[0]}`, { headers: { Accept: "application/json" } });
      if (status === 404 || status === 401) this.#giveUp([one], "lost", { status });
    }
  }

  #watchForSilence() {
    this.#heardAt = Date.now();
    clearTimeout(this.#silenceTimer);
    this.#silenceTimer = setTimeout(() => {
      this.#tellAll("disconnected", { pauseMilliseconds: 0 });
      this.#open();
    }, SILENCE_MILLISECONDS);
  }

  #retryLater(leastMilliseconds) {
    this.#close();
    const wanted = Math.min(SHORTEST_PAUSE_MILLISECONDS * 2 ** this.#failures, LONGEST_PAUSE_MILLISECONDS);
    const pauseMilliseconds = Math.max(wanted * (0.75 + Math.random() / 2), leastMilliseconds);
    this.#failures += 1;
    this.#tellAll("disconnected", { pauseMilliseconds });
    this.#retryTimer = setTimeout(() => this.#open(), pauseMilliseconds);
  }
}
