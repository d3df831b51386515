// The box in which a message is written, and the one place where Send and Stop take turns.

const element = (id) => document.getElementById(id);

/** What is in the box when the page goes, as to the sign-in page; for the same person, in the same tab. */
const draft = {
  key: `sluicegate.draft.${document.body.dataset.user}`,
  load() {
    return sessionStorage.getItem(this.key) ?? "";
  },
  save(text) {
    if (text) sessionStorage.setItem(this.key, text);
    else sessionStorage.removeItem(this.key);
  },
};

export class Composer {
  #state = "idle";

  constructor({ onSend, onStop }) {
    this.form = element("composer");
    this.prompt = element("prompt");
    this.send = element("send");
    this.stop = element("stop");
    this.stopLabel = element("stop-label");
    this.readOnly = element("read-only");
    this.onSend = onSend;

    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.prompt.addEventListener("keydown", (event) => this.#sendOnEnter(event));
    this.prompt.addEventListener("input", () => this.#fit());
    this.prompt.value ||= draft.load();
    addEventListener("pagehide", () => draft.save(this.prompt.value));
    this.stop.addEventListener("click", onStop);
    // The browser may have put back what was written before a reload.
    addEventListener("pageshow", () => this.#fit());
  }

  /** `idle`, `waiting` (nothing can be sent yet), `active` (an answer is being written), `stopping` or `readOnly`. */
  setState(state) {
    const stopHadFocus = document.activeElement === this.stop;
    this.#state = state;
    this.form.dataset.state = state;
    const busy = state === "active" || state === "stopping";
    this.send.hidden = busy;
    this.stop.hidden = !busy;
    this.stop.setAttribute("aria-disabled", String(state === "stopping"));
    this.stopLabel.textContent = state === "stopping" ? "Stopping…" : "Stop";
    this.form.hidden = state === "readOnly";
    this.readOnly.hidden = state !== "readOnly";
    if (stopHadFocus && !busy) this.focus();
    this.#fit();
  }

  /** Empty the box, and return what was in it. */
  take() {
    const text = this.prompt.value;
    this.prompt.value = "";
    this.#fit();
    return text;
  }

  /** Put back what could not be sent, before what was written meanwhile. */
  giveBack(text) {
    this.prompt.value = this.prompt.value ? `${text}\n\n${this.prompt.value}` : text;
    this.#fit();
    this.focus();
  }

  focus() {
    // On a touch screen focus opens the keyboard, over what one wants to read.
    if (!matchMedia("(pointer: coarse)").matches) this.prompt.focus({ preventScroll: true });
  }

  #sendOnEnter(event) {
    // Enter also accepts a proposal of an input method; 229 is how Safari says so.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    this.#submit();
  }

  #submit() {
    if (this.#canSend()) this.onSend();
  }

  #canSend() {
    return this.#state === "idle" && this.prompt.value.trim() !== "";
  }

  #fit() {
    this.send.disabled = !this.#canSend();
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${this.prompt.scrollHeight}px`;
  }
}
