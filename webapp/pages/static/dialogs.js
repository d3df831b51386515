// Questions to the person, as native dialogs: they keep the focus, and Escape leaves them.

/** Open a dialog; resolves to whether it was confirmed. */
export function ask(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "confirm"), { once: true });
  });
}

/** Whether something lies over the page that Escape is meant for. */
export function somethingIsOpen() {
  return document.querySelector("dialog[open], :popover-open") !== null;
}

for (const button of document.querySelectorAll("dialog [data-cancel]")) {
  button.addEventListener("click", () => button.closest("dialog").close(""));
}
