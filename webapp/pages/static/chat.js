// One open conversation: its messages, the answer that is being written, sending and stopping.

import * as api from "./api.js";
import { isWhatWasSaved } from "./integrity.js";
import { announce, hideNotice, showNotice } from "./notices.js";
import { followStream } from "./stream.js";
import { tabs } from "./tabs.js";
import { endingLabel, phaseLabel } from "./words.js";

const RECONNECTING = "Reconnecting…";
const OFFLINE = "You are offline. The answer goes on without you, and appears when you are back.";
const LOAD_AGAIN_MILLISECONDS = 3000;
// Another person, or another machine, may write here; other tabs of this browser say so themselves.
const LOOK_AGAIN_MILLISECONDS = 4000;

export class Chat {
  // The answer that is being written: {view, sessionId, stopping, started, note, leave}. Whoever comes back
  // from waiting compares it with the one it began with: the person may have gone elsewhere.
  #live = null;
  #conversation = null;
  #visit = null;
  #unsent = null;
  #lookTimer = 0;

  /**
   * `onOpened(conversation)` hears of the conversation that is open (null: a new one), `onStarted(id)` of one
   * in which an answer has begun.
   */
  constructor({ messages, composer, scroll, empty, onOpened, onStarted }) {
    this.messages = messages;
    this.composer = composer;
    this.scroll = scroll;
    this.empty = empty;
    this.onOpened = onOpened;
    this.onStarted = onStarted;
    tabs.addEventListener("message", ({ data }) => {
      if (data.changed && data.changed === this.#conversation?.id) this.refresh();
    });
  }

  get conversation() {
    return this.#conversation;
  }

  /** Show a conversation, and go on with the answer that is being written in it; without an id, a new one. */
  async open(id) {
    this.#leave();
    if (id) {
      this.composer.setState("waiting");
      await this.#load(id);
    } else {
      this.#setConversation(null);
    }
    this.scroll.toEnd();
    this.composer.focus();
  }

  /** Load again what another page, or another person, may have changed. */
  async refresh() {
    if (!this.#conversation || this.#live) return;
    await this.#load(this.#conversation.id);
  }

  /** Give the open conversation another title; resolves to the conversation. */
  async rename(title) {
    const renamed = await api.renameConversation(this.#conversation.id, title);
    tabs.postMessage({ changed: renamed.id });
    if (this.#conversation?.id === renamed.id) this.#setConversation(renamed);
    return renamed;
  }

  /** Send what is in the box. */
  async send(model) {
    hideNotice();
    this.#visit = null;
    const content = this.composer.take();
    const question = this.messages.add({ role: "user", content });
    const live = this.#begin(this.messages.add({ role: "assistant", status: "ACTIVE", model }));
    this.scroll.toEnd();
    const conversationId = this.#conversation?.id;
    try {
      const started = await this.#post({ content, conversationId, model });
      live.sessionId = started.sessionId;
      live.view.id = started.messageId;
      tabs.postMessage({ changed: started.conversationId });
      if (live === this.#live) this.#goOn(live, started);
      if (live.stopping) this.#terminate(live, started.conversationId);
      this.onStarted(started.conversationId);
    } catch (error) {
      if (live === this.#live) {
        this.#takeBack(live, question, content, error);
      } else {
        this.composer.giveBack(content);
        showNotice(`It could not be sent. ${error.message}`);
      }
    }
  }

  /** Go on with an answer that was cut off (`continue`), or have the question answered anew (`retry`). */
  async runAgain(action, view) {
    if (this.#live) return;
    hideNotice();
    this.#visit = null;
    const goesOn = action === "continue";
    const live = this.#begin(goesOn ? view : this.messages.add({ role: "assistant", status: "ACTIVE" }));
    if (goesOn) view.setActive("");
    this.scroll.toEnd();
    this.composer.focus(); // the button that was pressed is gone
    try {
      const started = await api.runAgain(action, view.sessionId, randomKey());
      live.sessionId = live.view.sessionId = started.sessionId;
      live.view.id = started.messageId;
      if (goesOn) view.restart();
      tabs.postMessage({ changed: started.conversationId });
      if (live !== this.#live) return;
      if (!goesOn) await this.#load(started.conversationId);
      if (live !== this.#live) return;
      this.#goOn(live, started);
      if (live.stopping) this.#terminate(live, started.conversationId);
    } catch (error) {
      if (live !== this.#live) return;
      this.#live = null;
      if (goesOn) view.setEnded(view.ending);
      else this.messages.remove(live.view);
      this.#setIdle();
      showNotice(error.message);
      this.refresh();
    }
  }

  /** Stop the answer; before the server has said which session it is, as soon as it does. */
  stop() {
    const live = this.#live;
    if (!live || live.stopping || this.#conversation?.role === "viewer") return;
    live.stopping = true;
    this.composer.setState("stopping");
    announce("Stopping");
    if (live.sessionId) this.#terminate(live, this.#conversation.id);
  }

  #leave() {
    this.#live?.leave?.();
    clearTimeout(this.#lookTimer);
    this.#live = null;
    this.#visit = null;
    this.#conversation = null;
    this.messages.clear();
    hideNotice();
  }

  async #load(id, again = false) {
    const visit = (this.#visit = {});
    try {
      const [conversation, { items }] = await Promise.all([api.getConversation(id), api.listMessages(id)]);
      if (visit !== this.#visit) return;
      if (again) hideNotice();
      this.messages.reconcile(items, this.#live?.view);
      this.#setConversation(conversation);
      this.#followActive(items);
    } catch (error) {
      if (visit === this.#visit) this.#showLoadFailure(id, error);
    }
  }

  async #learnTitle(id) {
    const conversation = await api.getConversation(id).catch(() => null);
    if (conversation && this.#conversation?.id === id) this.#setConversation(conversation);
  }

  #setConversation(conversation) {
    this.#conversation = conversation;
    this.empty.hidden = !this.messages.isEmpty;
    if (!this.#live) this.#setIdle();
    this.onOpened(conversation);
    this.#lookLater();
  }

  #setIdle() {
    const readOnly = this.#conversation?.role === "viewer";
    this.composer.setState(readOnly ? "readOnly" : "idle");
    this.messages.offer(!readOnly);
  }

  #lookLater() {
    clearTimeout(this.#lookTimer);
    if (this.#conversation) this.#lookTimer = setTimeout(() => this.#look(), LOOK_AGAIN_MILLISECONDS);
  }

  /** Whether something was said, or is being said, that is not shown. */
  async #look() {
    const { id } = this.#conversation;
    const idle = !this.#live && !document.hidden && navigator.onLine;
    const found = idle && (await api.getConversation(id).catch(() => null));
    if (this.#conversation?.id !== id) return;
    const isNew = found && (found.activeStreams.length > 0 || found.lastMessageId !== this.messages.lastId);
    if (isNew && !this.#live) await this.refresh();
    if (this.#conversation?.id === id) this.#lookLater();
  }

  #followActive(items) {
    const active = items.findLast(({ status, sessionId }) => status === "ACTIVE" && sessionId);
    if (!active || this.#live) return;
    const live = this.#begin(this.messages.find(active.id));
    live.sessionId = active.sessionId;
    live.view.restart();
    this.#follow(live);
  }

  #begin(view) {
    const live = { view, sessionId: null, stopping: false, started: false, note: "", leave: null };
    this.#live = live;
    this.empty.hidden = true;
    this.composer.setState(this.#conversation?.role === "viewer" ? "readOnly" : "active");
    this.messages.offer(false);
    return live;
  }

  /** The same message keeps its key: had the first try arrived after all, the second finds its session. */
  #post(message) {
    const body = JSON.stringify(message);
    if (this.#unsent?.body !== body) this.#unsent = { body, key: randomKey() };
    return api.sendMessage(message, this.#unsent.key).then((started) => {
      this.#unsent = null;
      return started;
    });
  }

  #goOn(live, { conversationId }) {
    live.view.sessionId = live.sessionId;
    this.#follow(live);
    if (this.#conversation) return;
    this.#setConversation({ id: conversationId });
    this.#learnTitle(conversationId);
  }

  #takeBack(live, question, content, error) {
    this.#live = null;
    this.messages.remove(question, live.view);
    this.empty.hidden = !this.messages.isEmpty;
    this.#setIdle();
    this.composer.giveBack(content);
    showNotice(error.message);
    // Somebody else's answer is being written here: show it.
    if (error.code === "conversation_busy") this.refresh();
  }

  #follow(live) {
    const { view } = live;
    const write = (append) => (piece) => {
      if (!live.started) announce("Answer started");
      live.started = true;
      append(piece);
    };
    const show = (note) => {
      if (note && !view.isNoted(note)) announce(note);
      view.setActive(note);
    };
    const setNote = (note) => show((live.note = note));
    live.leave = followStream(live.sessionId, {
      connected: () => show(live.note),
      disconnected: () => show(navigator.onLine ? RECONNECTING : OFFLINE),
      session: ({ model }) => view.setAuthor({ role: "assistant", model }),
      phase: (data) => setNote(phaseLabel(data)),
      thinking: write((piece) => view.appendThinking(piece)),
      content: write((piece) => view.appendContent(piece)),
      done: (done) => this.#settle(live, done),
      missed: () => this.#catchUp(live),
      lost: (why) => this.#lose(live, why),
    });
  }

  async #terminate(live, conversationId) {
    try {
      const receipt = await api.terminateStream(live.sessionId, conversationId);
      if (live === this.#live) live.view.content.set(receipt.partialResponse);
      this.#settle(live, receipt);
    } catch (error) {
      if (live !== this.#live) return;
      live.stopping = false;
      this.composer.setState("active");
      showNotice(`It could not be stopped. ${error.message}`);
    }
  }

  /** Show an ending, from `done` or from a receipt, whichever comes first; they say the same. */
  async #settle(live, ending) {
    if (live !== this.#live) return;
    this.#live = null;
    live.leave?.();
    live.view.setEnded(ending);
    this.#setIdle();
    announce(endingLabel(ending) || "Answer finished");
    const shown = { thinking: live.view.thinking.value, content: live.view.content.value };
    // The message also has the detail of an error.
    if (ending.status === "ERROR" || !(await isWhatWasSaved(shown, ending))) await this.refresh();
  }

  /** The stream is over, and how it ended is in the messages. */
  #catchUp(live) {
    if (live !== this.#live) return;
    this.#live = null;
    this.composer.setState("waiting");
    this.refresh();
  }

  #lose(live, { status }) {
    if (live !== this.#live) return;
    this.#live = null;
    if (status === 401) api.signInAgain();
    live.view.setEnded({ status: "ERROR" });
    this.#setIdle();
    showNotice("This answer is not yours to see any more.");
  }

  #showLoadFailure(id, error) {
    if (error.status === 404) {
      this.messages.clear();
      this.#setConversation(null);
      showNotice("There is no such conversation, or it is not yours to see.");
      return;
    }
    const visit = this.#visit;
    showNotice(error.message);
    setTimeout(() => visit === this.#visit && this.#load(id, true), LOAD_AGAIN_MILLISECONDS);
  }
}

function randomKey() {
  // randomUUID exists only over HTTPS and on localhost.
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
