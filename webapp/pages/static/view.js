// The messages as elements. What a person writes is shown as it is; what a model writes, as Markdown.

import { copyFrom } from "./clipboard.js";
import { MarkdownText, forget } from "./markdown.js";
import { endingLabel, modelLabel } from "./words.js";

const RENDERED_AT_ONCE = 12;

const template = document.getElementById("message-template");

/** Text as it is, that grows by pieces and is put on the page once a frame. */
class GrowingText {
  #text = "";
  #scheduled = false;

  constructor(element) {
    this.node = element.appendChild(document.createTextNode(""));
  }

  get value() {
    return this.#text;
  }

  get isEmpty() {
    return !this.#text && this.node.length === 0;
  }

  /** Begin again; what is on the page stays there until the new text has come as far. */
  restart() {
    this.#text = "";
  }

  append(piece) {
    this.#text += piece;
    if (this.#scheduled) return;
    this.#scheduled = true;
    requestAnimationFrame(() => this.#paint());
  }

  set(text) {
    this.#text = text;
    if (this.node.data !== text) this.node.data = text;
  }

  /** Show exactly the text, also what waits for the next frame. */
  settle() {
    this.set(this.#text);
  }

  #paint() {
    this.#scheduled = false;
    if (this.#text.length > this.node.length) this.node.appendData(this.#text.slice(this.node.length));
  }
}

export class MessageView {
  constructor(message, lazily = false) {
    this.element = template.content.firstElementChild.cloneNode(true);
    this.element.dataset.role = message.role;
    this.who = this.element.querySelector(".who");
    this.details = this.element.querySelector(".thinking");
    this.note = this.element.querySelector(".note");
    this.actions = this.element.querySelector(".message-actions");
    this.body = this.element.querySelector(".content");
    this.content = new (message.role === "user" ? GrowingText : MarkdownText)(this.body);
    this.thinking = new GrowingText(this.details.querySelector(".text"));
    this.#button("copy").addEventListener("click", ({ target }) => copyFrom(target, this.content.value));
    this.#button("show").addEventListener("click", () => this.#showReplaced(this.body.hidden));
    this.update(message, lazily);
  }

  /** Show a message as the server has it; `lazily`: laid out once one looks. */
  update(message, lazily = false) {
    this.id = message.id;
    this.sessionId = message.sessionId ?? null;
    this.replacedBy = message.replacedBy ?? null;
    this.setAuthor(message);
    this.content.set(message.content ?? "", lazily);
    this.thinking.set(message.thinking ?? "");
    if (message.role === "user") return;
    if (message.status === "ACTIVE") this.setActive("");
    else this.setEnded(message);
    this.#showReplaced(false);
  }

  setAuthor({ role, model }) {
    this.who.textContent = role === "user" ? "You" : (modelLabel(model) ?? "Answer");
  }

  /** The stream sends the text from its start, which may be behind what is shown already. */
  restart() {
    this.content.restart();
    this.thinking.restart();
  }

  appendContent(piece) {
    this.content.append(piece);
    this.#showThinking();
  }

  appendThinking(piece) {
    this.thinking.append(piece);
    this.#showThinking();
  }

  /** Being written, or waiting for what `note` says. */
  setActive(note) {
    this.element.dataset.state = "active";
    this.element.setAttribute("aria-busy", "true");
    this.actions.hidden = true;
    this.#setNote(note);
    this.#showThinking();
  }

  /** Whether it says this already. */
  isNoted(note) {
    return this.note.textContent === note;
  }

  /** As a message, a `done` event or a receipt says how it ended. */
  setEnded(ending) {
    if (this.element.dataset.state === "active") {
      this.content.settle();
      this.thinking.settle();
    }
    this.ending = ending;
    this.element.dataset.state = ending.status.toLowerCase();
    this.element.removeAttribute("aria-busy");
    this.#setNote(endingLabel(ending) || (this.content.isEmpty ? "An empty answer" : ""));
    this.#showThinking();
  }

  /** What may be done with an answer that has ended: another of it only where it is the `latest`. */
  offer({ latest, writable }) {
    const { status, reason } = this.ending ?? {};
    this.actions.hidden = !status || this.element.dataset.state === "active";
    const mine = writable && this.sessionId && !this.replacedBy;
    this.#button("continue").hidden = !mine || !latest || reason === "stop";
    this.#button("retry").hidden = !mine || !latest;
    this.#button("copy").hidden = this.content.isEmpty || this.body.hidden;
  }

  /** An answer in whose place another came is folded away. */
  #showReplaced(shown) {
    const show = this.#button("show");
    show.hidden = !this.replacedBy;
    if (!this.replacedBy) {
      this.body.hidden = false;
      delete this.element.dataset.replaced;
      return;
    }
    this.element.dataset.replaced = "";
    this.body.hidden = !shown;
    show.textContent = shown ? "Hide the earlier answer" : "Show the earlier answer";
    show.setAttribute("aria-expanded", String(shown));
    this.#button("copy").hidden = !shown;
  }

  #button(name) {
    return this.actions.querySelector(`[data-action="${name}"]`);
  }

  #setNote(text) {
    this.note.textContent = text;
    this.note.hidden = !text;
  }

  #showThinking() {
    const thinks = this.element.dataset.state === "active" && this.content.isEmpty;
    this.details.hidden = this.thinking.isEmpty;
    const summary = this.details.firstElementChild;
    const label = thinks ? "Thinking…" : "Thoughts";
    if (summary.textContent !== label) summary.textContent = label;
  }
}

export class MessageList {
  #views = [];

  /** `onAction(name, view)`: the person asks that an answer be gone on with (`continue`), or given anew (`retry`). */
  constructor(element, { onAction }) {
    this.element = element;
    element.addEventListener("click", ({ target }) => {
      const action = target.closest("[data-action]")?.dataset.action;
      const view = this.#views.find((one) => one.element.contains(target));
      if (action === "continue" || action === "retry") onAction(action, view);
      if (target.matches(".copy-code")) copyFrom(target, target.closest(".code").querySelector("code").textContent);
    });
  }

  get isEmpty() {
    return this.#views.length === 0;
  }

  get lastId() {
    return this.#views.at(-1)?.id ?? null;
  }

  add(message) {
    const view = new MessageView(message);
    this.#views.push(view);
    this.element.append(view.element);
    return view;
  }

  remove(...views) {
    this.#views = this.#views.filter((view) => !views.includes(view));
    for (const view of views) {
      forget(view.body);
      view.element.remove();
    }
  }

  find(id) {
    return this.#views.find((view) => view.id === id);
  }

  clear() {
    this.remove(...this.#views);
  }

  /** Show these messages, in this order; the one that is being followed (`untouched`) keeps its own text. */
  reconcile(messages, untouched) {
    const known = new Map(this.#views.map((view) => [view.id, view]));
    this.#views = messages.map((message, index) => {
      const lazily = index < messages.length - RENDERED_AT_ONCE;
      const view = known.get(message.id);
      if (!view) return new MessageView(message, lazily);
      if (view !== untouched) view.update(message, lazily);
      return view;
    });
    this.#arrange();
  }

  /** Offer what may be done with each answer, by somebody who may write here or may not. */
  offer(writable) {
    for (const view of this.#views) view.offer({ latest: view === this.#views.at(-1), writable });
  }

  /** Move only what is out of place: moving an element drops the reader's selection in it. */
  #arrange() {
    const { children } = this.element;
    this.#views.forEach((view, index) => {
      if (children[index] !== view.element) this.element.insertBefore(view.element, children[index] ?? null);
    });
    while (children.length > this.#views.length) this.element.lastElementChild.remove();
  }
}
