// Copying: of an answer as the model wrote it, or of a block of code in it.

const COPIED_MILLISECONDS = 1600;

/** Copy a text, and have the button show for a moment that it did. */
export async function copyFrom(button, text) {
  const label = (button.dataset.label ??= button.textContent);
  try {
    await write(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not copied";
  }
  setTimeout(() => (button.textContent = label), COPIED_MILLISECONDS);
}

async function write(text) {
  // Browsers offer the clipboard only over HTTPS and on localhost.
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const focused = document.activeElement;
  const box = document.createElement("textarea");
  box.value = text;
  box.className = "unseen";
  document.body.append(box);
  box.select();
  const copied = document.execCommand("copy");
  box.remove();
  focused?.focus();
  if (!copied) throw new Error("not copied");
}
