// Where the parts of the page are put together: the address, the list, the open conversation, the keyboard.

import * as api from "./api.js";
import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { ask, somethingIsOpen } from "./dialogs.js";
import { Members } from "./members.js";
import { chosenModel, loadModels } from "./models.js";
import { showNotice } from "./notices.js";
import { followEnd } from "./scroll.js";
import { Sidebar } from "./sidebar.js";
import { tabs } from "./tabs.js";
import { MessageList } from "./view.js";
import { titleOf } from "./words.js";

import "./theme.js";

const element = (id) => document.getElementById(id);
const fail = (error) => showNotice(error.message);

const sidebar = new Sidebar({ onError: fail });
const composer = new Composer({
  onSend: () => chat.send(chosenModel()),
  onStop: () => chat.stop(),
});
const members = new Members({ onError: fail, onLeft: showLeft });
const chat = new Chat({
  messages: new MessageList(element("messages"), { onAction: (action, view) => chat.runAgain(action, view) }),
  composer,
  scroll: followEnd(element("scroll"), element("messages"), element("latest")),
  empty: element("empty"),
  onOpened: showHeading,
  onStarted: () => sidebar.refresh().catch(fail),
});

function showHeading(conversation) {
  const title = titleOf(conversation);
  element("title").textContent = title;
  for (const id of ["rename", "delete"]) element(id).hidden = conversation?.role !== "owner";
  element("members").hidden = !conversation?.role;
  document.title = conversation ? `${title} · Sluicegate` : "Sluicegate";
  sidebar.setCurrent(conversation?.id ?? null);
  // The first message of a new conversation gives it an address, at which a reload finds it.
  const path = conversation ? `/c/${conversation.id}` : "/";
  if (location.pathname !== path) history.replaceState(null, "", path);
}

function showLeft(id) {
  sidebar.remove(id);
  go("/");
}

function idInAddress() {
  return location.pathname.match(/^\/c\/([^/]+)$/)?.[1] ?? null;
}

function go(path) {
  history.pushState(null, "", path);
  chat.open(idInAddress());
}

element("sidebar").addEventListener("click", (event) => {
  const link = event.target.closest("a");
  const plain = event.button === 0 && !event.ctrlKey && !event.metaKey && !event.shiftKey && !event.altKey;
  if (!link || !plain) return;
  event.preventDefault();
  sidebar.close();
  go(link.pathname);
});

element("rename").addEventListener("click", async () => {
  element("new-title").value = chat.conversation.title ?? "";
  if (!(await ask(element("rename-dialog")))) return;
  try {
    sidebar.update(await chat.rename(element("new-title").value.trim()));
  } catch (error) {
    fail(error);
  }
});

element("members").addEventListener("click", () => members.open(chat.conversation));

element("delete").addEventListener("click", async () => {
  const { id } = chat.conversation;
  if (!(await ask(element("delete-dialog")))) return;
  try {
    await api.deleteConversation(id);
    sidebar.remove(id);
    if (chat.conversation?.id === id) go("/");
  } catch (error) {
    fail(error);
  }
});

// By itself the link would change the address, which means another conversation here.
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  element("prompt").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && !somethingIsOpen()) chat.stop();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) chat.refresh();
});
addEventListener("popstate", () => chat.open(idInAddress()));

// Who signs in in this browser is who every call is made for from then on, in all of its tabs.
const me = document.body.dataset.user;
tabs.addEventListener("message", ({ data }) => {
  if ("user" in data && data.user !== me) location.reload();
});
tabs.postMessage({ user: me });

sidebar.refresh().catch(fail);
loadModels();
chat.open(idInAddress());
