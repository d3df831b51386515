// Markdown that grows. What a model writes becomes elements only through `sanitised`; no HTML of its own does, nor any
// address but of the web and of mail.
//
// The text is cut into top-level blocks. All but the last are settled and left alone; the last is laid anew as it
// grows, by changing only what differs, so that a selection survives and a frame stays short.

import hljs from "./vendor/highlight.js";
import { Marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";

// A block that is longer is shown as it is written, until it ends; one that is far longer, for good.
const GROWING_LIMIT = 24_576;
const SETTLED_LIMIT = 65_536;
const HIGHLIGHT_LIMIT = 30_000;
const PLAIN_CHUNK = 4096;
const HEADINGS_BELOW = 2; // the page has its own first and second
const REST = 1; // after laying out for some time, so many times as long is left to others

// Embeddings, overrides and isolates, which show a text in another order than it is written in.
const DIRECTION_CONTROL = /[\u202a-\u202e\u2066-\u2069]/;

// What may end a block that is too long to be looked through with each piece.
const BLOCK_END = /\n[ \t]*\n|^ {0,3}(?:`{3}|~{3})/m;

// What gives links elsewhere in the text, before it as well, their address.
const DEFINITION = /^ {0,3}\[[^\]\n]+\]:/m;

const ALLOWED = {
  ALLOWED_TAGS: (
    "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre span strong table tbody td th thead tr ul"
  ).split(" "),
  ALLOWED_ATTR: ["align", "class", "href", "start", "title"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const escaped = (text) =>
  text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    // Shown, not obeyed.
    html: ({ text, block }) => (block ? `<p class="raw">${escaped(text)}</p>` : escaped(text)),
    // To fetch it would tell its server who reads.
    image({ href, text }) {
      return `<a href="${escaped(href)}">${escaped(text || href)}</a>`;
    },
    heading({ tokens, depth }) {
      const level = Math.min(6, depth + HEADINGS_BELOW);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    code: ({ text, lang }) =>
      `<pre><code${lang ? ` class="language-${escaped(lang.split(/\s/)[0])}"` : ""}>${escaped(text)}</code></pre>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

function sanitised(html) {
  const fragment = DOMPurify.sanitize(html, ALLOWED);
  fragment.normalize(); // the browser's parser may cut a text in two
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const table of fragment.querySelectorAll("table")) scrolled(table);
  for (const code of fragment.querySelectorAll("pre > code")) frame(code.parentElement, code);
  return fragment;
}

/** What is wider than the page scrolls in a box of its own, which the keyboard must reach. */
function scrolled(table) {
  const box = document.createElement("div");
  box.className = "table";
  box.tabIndex = 0;
  box.role = "region";
  box.ariaLabel = "Table";
  table.replaceWith(box);
  box.append(table);
}

function frame(pre, code) {
  const language = languageOf(code);
  const box = document.createElement("div");
  const bar = box.appendChild(document.createElement("div"));
  box.className = "code";
  bar.className = "code-bar";
  bar.append(Object.assign(document.createElement("span"), { textContent: language || "text" }));
  bar.append(
    Object.assign(document.createElement("button"), { type: "button", textContent: "Copy", className: "copy-code" }),
  );
  pre.replaceWith(box);
  pre.tabIndex = 0;
  pre.dir = "ltr";
  pre.role = "region";
  pre.ariaLabel = language ? `Code in ${language}` : "Code";
  box.append(pre);
}

const languageOf = (code) => code.className.match(/^language-([\w+#.-]{1,20})$/)?.[1] ?? "";

const uncoloured = [];
// Safari has no idle time to give.
const whenIdle = self.requestIdleCallback ?? ((act) => setTimeout(act, 50));

/** Colour the code of what is settled, a block at a time, when nothing else is to be done. */
function highlight(root) {
  const found = root.querySelectorAll("pre > code:not([data-coloured])");
  if (found.length && uncoloured.push(...found) === found.length) whenIdle(highlightNext);
}

function highlightNext() {
  const code = uncoloured.shift();
  const language = languageOf(code);
  const text = code.textContent;
  if (hljs.getLanguage(language) && text.length <= HIGHLIGHT_LIMIT) {
    // The highlighter's markup goes through the same gate.
    code.replaceChildren(DOMPurify.sanitize(hljs.highlight(text, { language, ignoreIllegals: true }).value, ALLOWED));
    markControls(code);
  }
  code.dataset.coloured = "";
  if (uncoloured.length) whenIdle(highlightNext);
}

/** Show what turns a text around, and keep its effect within itself. */
function markControls(root) {
  if (!DIRECTION_CONTROL.test(root.textContent)) return;
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) if (DIRECTION_CONTROL.test(walker.currentNode.data)) found.push(walker.currentNode);
  for (const node of found) {
    if (node.parentElement?.className === "control") continue;
    const pieces = node.data.split(/([\u202a-\u202e\u2066-\u2069])/).map((piece) => {
      if (!DIRECTION_CONTROL.test(piece)) return piece;
      const mark = document.createElement("span");
      mark.className = "control";
      mark.dataset.code = `U+${piece.codePointAt(0).toString(16).toUpperCase()}`;
      mark.textContent = piece;
      return mark;
    });
    node.replaceWith(...pieces.filter((piece) => piece !== ""));
  }
}

/** Have `target` hold what `source` holds, changing only what differs. */
function morph(target, source) {
  let old = target.firstChild;
  let fresh = source.firstChild;
  while (fresh) {
    const nextFresh = fresh.nextSibling;
    if (!old) {
      target.append(fresh);
    } else {
      const nextOld = old.nextSibling;
      if (!alike(old, fresh)) old.replaceWith(fresh);
      else if (old.nodeType !== Node.TEXT_NODE) morph(old, fresh);
      else if (fresh.data.startsWith(old.data)) old.appendData(fresh.data.slice(old.length));
      else old.data = fresh.data;
      old = nextOld;
    }
    fresh = nextFresh;
  }
  while (old) {
    const next = old.nextSibling;
    old.remove();
    old = next;
  }
}

function alike(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) return false;
  if (old.nodeType !== Node.ELEMENT_NODE) return true;
  const names = old.getAttributeNames();
  return (
    names.length === fresh.getAttributeNames().length &&
    names.every((name) => old.getAttribute(name) === fresh.getAttribute(name))
  );
}

/** A text as Markdown in an element, whole or growing. */
export class MarkdownText {
  #text = "";
  #shown = 0; // up to where the text has been laid out
  #settled = 0; // where the last block begins
  #block = null; // the element of the last block
  #plain = null; // what holds the last block's text where that is too long to be laid out with each piece
  #isSettled = true;
  #scheduled = false;
  #notBefore = 0;
  #behind = 0; // how much of the element's text stands there from before a `restart`

  constructor(element) {
    this.element = element;
  }

  get value() {
    return this.#text;
  }

  get isEmpty() {
    return !this.#text && !this.element.firstChild;
  }

  /** Begin again; what is on the page stays there until the new text has come as far. */
  restart() {
    this.#behind = this.#text.length;
    this.#text = "";
  }

  append(piece) {
    this.#text += piece;
    if (this.#scheduled) return;
    this.#scheduled = true;
    const wait = this.#notBefore - performance.now();
    if (wait > 0) setTimeout(() => requestAnimationFrame(() => this.#paint()), wait);
    else requestAnimationFrame(() => this.#paint());
  }

  /** Show exactly this text, laid out whole; `lazily`: once it comes near to where one looks. */
  set(text, lazily = false) {
    if (text === this.#text && this.#isSettled) return;
    if (text !== this.#text) this.#isSettled = true; // what was laid out is of another text
    this.#shown = -1;
    this.#text = text;
    if (!lazily) {
      this.settle();
      return;
    }
    this.element.textContent = text;
    this.element.classList.add("raw");
    whenNear(this.element, () => this.settle());
  }

  /** Show the text as it will stay: all of it, with links that are defined at the end, and code in colour. */
  settle() {
    if (this.#isSettled && this.#shown === this.#text.length) return;
    const short = this.#text.length - this.#settled <= GROWING_LIMIT;
    const grown = !this.#isSettled && !this.#behind && !this.#plain && short && !DEFINITION.test(this.#text);
    this.element.classList.remove("raw");
    if (grown) this.#layTail();
    else this.#layWhole();
    highlight(this.element);
    this.#behind = 0;
    this.#shown = this.#settled = this.#text.length;
    this.#block = this.#plain = null;
    this.#isSettled = true;
  }

  #layWhole() {
    const fresh = document.createDocumentFragment();
    for (const token of tokensOf(this.#text)) if (token.type !== "space") fresh.append(laid(token));
    morph(this.element, fresh);
  }

  #paint() {
    this.#scheduled = false;
    if (this.#text.length < this.#behind || this.#text.length === this.#shown) return;
    const began = performance.now();
    this.#isSettled = false;
    if (this.#behind) this.#layAnew();
    if (this.#plain && !this.#mayHaveEnded()) this.#plain.append(this.#text.slice(this.#shown));
    else this.#layTail();
    this.#shown = this.#text.length;
    const ended = performance.now();
    this.#notBefore = ended + REST * (ended - began);
  }

  /** Of the long block: whether what has come since may be its end. */
  #mayHaveEnded() {
    const begunAt = this.#text.lastIndexOf("\n", this.#shown - 2) + 1; // with the line before, which may be its half
    return this.#text.length - this.#settled <= SETTLED_LIMIT && BLOCK_END.test(this.#text.slice(begunAt));
  }

  #layAnew() {
    this.#behind = this.#shown = this.#settled = 0;
    this.#block = this.#plain = null;
    this.element.replaceChildren();
  }

  #layTail() {
    const tail = this.#text.slice(this.#settled);
    const tokens = tokensOf(tail);
    if (tail.length > GROWING_LIMIT && tokens.length === 1) {
      this.#growPlain(tail);
      return;
    }
    this.#plain = null;
    const last = tokens.findLastIndex(({ type }) => type !== "space");
    tokens.forEach((token, index) => {
      if (token.type === "space") {
        if (index < last) this.#settled += token.raw.length;
        return;
      }
      this.#place(laid(token));
      if (index < last) {
        highlight(this.#block);
        this.#settled += token.raw.length;
        this.#block = null;
      }
    });
  }

  /** Have the last block be this one. */
  #place(element) {
    if (this.#block && alike(this.#block, element)) {
      morph(this.#block, element);
      return;
    }
    if (this.#block) this.#block.replaceWith(element);
    else this.element.append(element);
    this.#block = element;
  }

  #growPlain(tail) {
    this.#block?.remove();
    this.#block = this.element.appendChild(document.createElement("div"));
    this.#block.className = "block";
    this.#block.dir = "auto";
    this.#plain = new PlainText(this.#block);
    this.#plain.append(tail);
  }
}

/** The top-level blocks, whose lengths add up to the text's: the lexer would make one character of a CR LF. */
function tokensOf(text) {
  return marked.lexer(text.includes("\r") ? text.replaceAll("\r\n", " \n").replaceAll("\r", "\n") : text);
}

/** The element of a top-level block. */
function laid(token) {
  const element = document.createElement("div");
  element.className = "block";
  element.dir = "auto";
  if (token.raw.length > SETTLED_LIMIT) {
    new PlainText(element).append(token.raw);
    return element;
  }
  element.append(sanitised(marked.parser([token]).trimEnd()));
  markControls(element);
  return element;
}

const near = new WeakMap();
const observer = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      observer.unobserve(target);
      near.get(target)?.();
      near.delete(target);
    }
  },
  { rootMargin: "800px" },
);

/** Lay out no more what is no longer on the page. */
export function forget(element) {
  observer.unobserve(element);
  near.delete(element);
}

function whenNear(element, act) {
  near.set(element, act);
  observer.observe(element);
}

/** Text as it is, in pieces that the browser lays out one by one: a line of a megabyte is no paragraph. */
class PlainText {
  constructor(element) {
    element.classList.add("plain");
    this.element = element;
  }

  append(text) {
    let last = this.element.lastChild;
    for (let start = 0; start < text.length; ) {
      if (!last || last.firstChild.length >= PLAIN_CHUNK) {
        last = this.element.appendChild(document.createElement("div"));
        last.append("");
      }
      const end = start + PLAIN_CHUNK - last.firstChild.length;
      last.firstChild.appendData(text.slice(start, end));
      start = end;
    }
  }
}
