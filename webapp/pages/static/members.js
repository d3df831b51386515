// Who belongs to a conversation, and what they may do in it.

import { listMembers, removeMember, setMember } from "./api.js";

const element = (id) => document.getElementById(id);
const dialog = element("members-dialog");
const list = element("member-list");
const form = element("member-form");
const problem = element("member-problem");
const template = element("member-template");

export class Members {
  #conversation = null;

  /** `onLeft(id)` hears of a conversation that the person has left. */
  constructor({ onError, onLeft }) {
    this.onError = onError;
    this.onLeft = onLeft;
    this.me = document.body.dataset.user;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const name = form.elements["member-name"];
      this.#change(async () => {
        await setMember(this.#conversation.id, name.value.trim(), form.elements["member-role"].value);
        name.value = "";
      });
    });
  }

  /** Show them; whoever manages the conversation changes them here. */
  async open(conversation) {
    this.#conversation = conversation;
    form.hidden = conversation.role !== "owner";
    problem.hidden = true;
    try {
      await this.#load();
      dialog.showModal();
    } catch (error) {
      this.onError(error);
    }
  }

  async #load() {
    const { items } = await listMembers(this.#conversation.id);
    const focused = list.contains(document.activeElement) && document.activeElement.ariaLabel;
    list.replaceChildren(...items.map((member) => this.#row(member)));
    if (focused) [...list.querySelectorAll("select, button")].find((one) => one.ariaLabel === focused)?.focus();
  }

  #row({ name, role }) {
    const manages = this.#conversation.role === "owner";
    const row = template.content.firstElementChild.cloneNode(true);
    const select = row.querySelector("select");
    const remove = row.querySelector("button");
    row.querySelector(".name").textContent = name === this.me ? `${name} (you)` : name;
    select.value = role;
    select.disabled = !manages;
    select.ariaLabel = `Role of ${name}`;
    select.addEventListener("change", () =>
      this.#change(() => setMember(this.#conversation.id, name, select.value)),
    );
    remove.hidden = !manages && name !== this.me;
    remove.textContent = name === this.me ? "Leave" : "Remove";
    remove.ariaLabel = name === this.me ? "Leave the conversation" : `Remove ${name}`;
    remove.addEventListener("click", () => this.#remove(name));
    return row;
  }

  #remove(name) {
    const { id } = this.#conversation;
    return this.#change(async () => {
      await removeMember(id, name);
      if (name !== this.me) return;
      dialog.close();
      this.onLeft(id);
    });
  }

  async #change(act) {
    problem.hidden = true;
    try {
      await act();
    } catch (error) {
      problem.textContent = error.message;
      problem.hidden = false;
    }
    if (dialog.open) await this.#load().catch(this.onError);
  }
}
