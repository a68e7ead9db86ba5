// The answer, token by token. It only ever grows at its end, however long it gets.

import { announce, element } from "./dom.js";
import { lookOf } from "./palette.js";
import { hideTip, inWords, showTip } from "./tip.js";

const STRONG = 0.66;
const MIDDLE = 0.4;
const LINE_TOKENS = 200;

export class Answer {
  /** Shows tokens in `place`; `onSelect` hears of the number of the token that is looked at, or null. */
  constructor(place, onSelect) {
    this.place = place;
    this.onSelect = onSelect;
    this.clear([]);
    place.addEventListener("pointerover", (event) => this.#look(event.target.closest(".t"), false));
    place.addEventListener("pointerleave", () => this.#look(null, false));
    place.addEventListener("blur", () => this.#look(null, false));
    place.addEventListener("keydown", (event) => this.#move(event));
  }

  clear(experts) {
    this.experts = experts;
    this.tokens = [];
    this.spans = [];
    this.selected = null;
    this.lastSlot = "";
    this.place.replaceChildren();
    this.line = null;
  }

  /** Appends tokens: {text, id, shares, number, expert}, the expert being the dominating one's name or null. */
  append(tokens) {
    for (const token of tokens) {
      // What grows is laid out and painted anew. A block for each line, and for so many tokens of a very long one,
      // keeps that from reaching back to the start of the answer.
      if (this.line?.childElementCount >= LINE_TOKENS && /^\s/.test(token.text)) this.line = null;
      this.line ??= this.place.appendChild(element("span", { className: "line" }));
      this.line.append(this.#span(token));
      if (token.text.endsWith("\n")) this.line = null;
    }
  }

  /** Whether its reader is at its end. */
  get followed() {
    return this.place.scrollTop + this.place.clientHeight >= this.place.scrollHeight - 4;
  }

  follow() {
    this.place.scrollTop = this.place.scrollHeight;
  }

  /** Text that no token of the trace accounts for: the rest of a character that never was completed. */
  appendPlain(text) {
    (this.line ?? this.place).append(text);
  }

  /** Points out a token, from wherever it was found. */
  mark(number) {
    this.spans[this.selected]?.classList.remove("now");
    this.selected = number;
    this.spans[number]?.classList.add("now");
  }

  #span(token) {
    const { key, slot } = lookOf(token.expert);
    const share = Math.max(...token.shares, 0);
    const data = { slot, weight: share >= STRONG ? "3" : share >= MIDDLE ? "2" : "1", n: token.number };
    // A letter wherever the expert changes: colour is never the only sign.
    if (slot + key !== this.lastSlot) data.key = key;
    this.lastSlot = slot + key;
    const span = element("span", { className: "t", data }, token.text);
    this.tokens.push(token);
    this.spans.push(span);
    return span;
  }

  #look(span, aloud) {
    const number = span ? Number(span.dataset.n) : null;
    if (number === this.selected && !aloud) return;
    this.mark(number);
    this.onSelect(number);
    if (!span) return hideTip();
    showTip(this.tokens[number], this.experts, span);
    if (aloud) announce(inWords(this.tokens[number], this.experts));
  }

  #move(event) {
    if (event.key === "Escape") return this.#look(null, false);
    const last = this.spans.length - 1;
    const now = this.selected;
    const next = {
      ArrowRight: now === null ? 0 : Math.min(now + 1, last),
      ArrowLeft: now === null ? last : Math.max(now - 1, 0),
      Home: 0,
      End: last,
    }[event.key];
    if (next === undefined || last < 0) return;
    event.preventDefault();
    this.spans[next].scrollIntoView({ block: "nearest" });
    this.#look(this.spans[next], true);
  }
}
