// The messages as elements. Text reaches the page only as text nodes: nothing a model writes becomes markup.

import { endingLabel, modelLabel } from "./words.js";

const template = document.getElementById("message-template");

/** Text that grows by pieces and is put on the page once a frame. */
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
  constructor(message) {
    this.element = template.content.firstElementChild.cloneNode(true);
    this.element.dataset.role = message.role;
    this.who = this.element.querySelector(".who");
    this.details = this.element.querySelector(".thinking");
    this.note = this.element.querySelector(".note");
    this.content = new GrowingText(this.element.querySelector(".content"));
    this.thinking = new GrowingText(this.details.querySelector(".text"));
    this.update(message);
  }

  /** Show a message as the server has it. */
  update(message) {
    this.id = message.id;
    this.setAuthor(message);
    this.content.set(message.content ?? "");
    this.thinking.set(message.thinking ?? "");
    if (message.role === "user") return;
    if (message.status === "ACTIVE") this.setActive("");
    else this.setEnded(message);
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
    this.#setNote(note);
    this.#showThinking();
  }

  /** As a message, a `done` event or a receipt says how it ended. */
  setEnded(ending) {
    this.content.settle();
    this.thinking.settle();
    this.element.dataset.state = ending.status.toLowerCase();
    this.element.removeAttribute("aria-busy");
    this.#setNote(endingLabel(ending) || (this.content.isEmpty ? "An empty answer" : ""));
    this.#showThinking();
  }

  #setNote(text) {
    this.note.textContent = text;
    this.note.hidden = !text;
  }

  #showThinking() {
    const thinks = this.element.dataset.state === "active" && this.content.isEmpty;
    this.details.hidden = this.thinking.isEmpty;
    this.details.firstElementChild.textContent = thinks ? "Thinking…" : "Thoughts";
  }
}

export class MessageList {
  #views = [];

  constructor(element) {
    this.element = element;
  }

  get isEmpty() {
    return this.#views.length === 0;
  }

  add(message) {
    const view = new MessageView(message);
    this.#views.push(view);
    this.element.append(view.element);
    return view;
  }

  remove(...views) {
    this.#views = this.#views.filter((view) => !views.includes(view));
    for (const view of views) view.element.remove();
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
    this.#views = messages.map((message) => {
      const view = known.get(message.id);
      if (!view) return new MessageView(message);
      if (view !== untouched) view.update(message);
      return view;
    });
    this.#arrange();
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
