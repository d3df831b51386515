// The list of conversations.

import { listConversations } from "./api.js";
import { titleOf } from "./words.js";

const PAGE_SIZE = 40;

const sidebar = document.getElementById("sidebar");
const list = document.getElementById("conversations");
const older = document.getElementById("older");
const template = document.getElementById("conversation-template");

export class Sidebar {
  #conversations = [];
  #nextCursor = null;
  #currentId = null;

  /** `onError` is told what went wrong while more was loaded. */
  constructor({ onError }) {
    this.onError = onError;
    older.addEventListener("click", () => this.#loadOlder());
  }

  /** Load the newest conversations; those that were loaded further down stay. */
  async refresh() {
    const page = await listConversations(null, PAGE_SIZE);
    const fresh = new Set(page.items.map(({ id }) => id));
    if (this.#conversations.length === 0) this.#nextCursor = page.nextCursor;
    this.#conversations = [...page.items, ...this.#conversations.filter(({ id }) => !fresh.has(id))];
    this.#render();
  }

  /** Mark the conversation that is open; none for a new one. */
  setCurrent(id) {
    this.#currentId = id;
    this.#render();
  }

  /** Show a changed title. */
  update(conversation) {
    this.#conversations = this.#conversations.map((old) => (old.id === conversation.id ? conversation : old));
    this.#render();
  }

  remove(id) {
    this.#conversations = this.#conversations.filter((conversation) => conversation.id !== id);
    this.#render();
  }

  /** On a narrow page the list lies over the chat. */
  close() {
    if (sidebar.matches(":popover-open")) sidebar.hidePopover();
  }

  async #loadOlder() {
    try {
      const page = await listConversations(this.#nextCursor, PAGE_SIZE);
      this.#nextCursor = page.nextCursor;
      this.#conversations.push(...page.items);
      this.#render();
    } catch (error) {
      this.onError(error);
    }
  }

  #render() {
    older.hidden = !this.#nextCursor;
    list.replaceChildren(...this.#conversations.map((conversation) => this.#item(conversation)));
  }

  #item(conversation) {
    const item = template.content.firstElementChild.cloneNode(true);
    const link = item.querySelector("a");
    link.href = `/c/${conversation.id}`;
    link.textContent = titleOf(conversation);
    if (conversation.id === this.#currentId) link.setAttribute("aria-current", "page");
    return item;
  }
}
