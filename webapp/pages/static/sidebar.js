// The list of conversations.

import { listConversations } from "./api.js";
import { titleOf } from "./words.js";

const PAGE_SIZE = 40;
const TYPING_MILLISECONDS = 200;

const sidebar = document.getElementById("sidebar");
const list = document.getElementById("conversations");
const older = document.getElementById("older");
const template = document.getElementById("conversation-template");
const search = document.getElementById("search");
const nothing = document.getElementById("nothing-found");

export class Sidebar {
  #conversations = [];
  #nextCursor = null;
  #currentId = null;
  #searched = "";
  #typingTimer = 0;

  /** `onError` is told what went wrong while more was loaded. */
  constructor({ onError }) {
    this.onError = onError;
    older.addEventListener("click", () => this.#loadOlder());
    search.addEventListener("input", () => {
      clearTimeout(this.#typingTimer);
      this.#typingTimer = setTimeout(() => this.#search(search.value.trim()), TYPING_MILLISECONDS);
    });
    search.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !search.value) return;
      event.stopPropagation(); // and so stops no answer
      search.value = "";
      this.#search("");
    });
  }

  /** Load the newest conversations; those that were loaded further down stay. */
  async refresh() {
    const searched = this.#searched;
    const page = await listConversations({ limit: PAGE_SIZE, search: searched });
    if (searched !== this.#searched) return;
    const fresh = new Set(page.items.map(({ id }) => id));
    if (this.#conversations.length === 0) this.#nextCursor = page.nextCursor;
    this.#conversations = [...page.items, ...this.#conversations.filter(({ id }) => !fresh.has(id))];
    this.#render();
  }

  /** Mark the conversation that is open; none for a new one. */
  setCurrent(id) {
    this.#currentId = id;
    for (const link of list.querySelectorAll("a")) this.#mark(link);
  }

  /** Show a changed title. */
  update(conversation) {
    this.#conversations = this.#conversations.map((old) => (old.id === conversation.id ? conversation : old));
    this.#render();
  }

  /** Show a conversation no longer. */
  remove(id) {
    this.#conversations = this.#conversations.filter((conversation) => conversation.id !== id);
    this.#render();
  }

  /** On a narrow page the list lies over the chat. */
  close() {
    if (sidebar.matches(":popover-open")) sidebar.hidePopover();
  }

  async #loadOlder() {
    const [cursor, search] = [this.#nextCursor, this.#searched];
    try {
      const page = await listConversations({ cursor, limit: PAGE_SIZE, search });
      if (cursor !== this.#nextCursor || search !== this.#searched) return;
      this.#nextCursor = page.nextCursor;
      this.#conversations.push(...page.items);
      this.#render();
    } catch (error) {
      this.onError(error);
    }
  }

  async #search(text) {
    if (text === this.#searched) return;
    this.#searched = text;
    this.#conversations = [];
    this.#nextCursor = null;
    await this.refresh().catch(this.onError);
  }

  #render() {
    older.hidden = !this.#nextCursor;
    nothing.hidden = !this.#searched || this.#conversations.length > 0;
    // Those that are there stay, so that whoever is among them with the keyboard stays there.
    const known = new Map([...list.children].map((item) => [item.dataset.id, item]));
    const items = this.#conversations.map((one) => this.#item(one, known.get(one.id)));
    items.forEach((item, index) => {
      if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null);
    });
    while (list.children.length > items.length) list.lastElementChild.remove();
  }

  #item(conversation, known) {
    const item = known ?? template.content.firstElementChild.cloneNode(true);
    const link = item.querySelector("a");
    item.dataset.id = conversation.id;
    link.href = `/c/${conversation.id}`;
    link.textContent = titleOf(conversation);
    this.#mark(link);
    return item;
  }

  #mark(link) {
    if (link.parentElement.dataset.id === this.#currentId) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}
