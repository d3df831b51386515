// The choice of a model. It is a convenience: without the list the server takes its default.

import { listModels } from "./api.js";
import { modelLabel } from "./words.js";

const STORAGE_KEY = "sluicegate.model";

const choice = document.getElementById("model-choice");
const select = document.getElementById("model");

select.addEventListener("change", () => localStorage.setItem(STORAGE_KEY, select.value));

/** Fill the list, and choose what was chosen last time, else the server's default. */
export async function loadModels() {
  const { items, defaultModel } = await listModels().catch(() => ({ items: [], defaultModel: null }));
  // The default may be one that the upstream does not list.
  const names = new Set([...(defaultModel ? [defaultModel] : []), ...items.map(({ name }) => name)]);
  const last = localStorage.getItem(STORAGE_KEY);
  select.replaceChildren(...Array.from(names, (name) => new Option(modelLabel(name), name)));
  select.value = names.has(last) ? last : defaultModel;
  choice.hidden = names.size === 0;
}

/** The name of the chosen model, or undefined for the server's default. */
export function chosenModel() {
  return select.value || undefined;
}
