// Who is who, and each expert's share of the answer so far.

import { element, percent, write } from "./dom.js";
import { lookOf } from "./palette.js";

const MOST_ROWS = 12;

export class Legend {
  /** Shows shares in the list `place`; while a row is pointed at, `onFocus` hears its expert's slot and key. */
  constructor(place, onFocus) {
    this.place = place;
    this.onFocus = onFocus;
    this.clear([]);
  }

  clear(experts) {
    this.experts = experts;
    this.sums = new Float64Array(experts.length);
    this.tokens = 0;
    this.rows = new Map();
    this.others = null;
    this.place.replaceChildren();
    if (experts.length <= MOST_ROWS) experts.forEach((_, index) => this.#row(index));
  }

  /** Counts tokens in; `show` makes it seen. */
  add(tokens) {
    for (const token of tokens) {
      this.tokens += 1;
      token.shares.forEach((share, index) => (this.sums[index] += share));
      // In a large bank a row is for who dominates something.
      if (token.expert !== null && this.rows.size < MOST_ROWS) this.#row(this.experts.indexOf(token.expert));
    }
  }

  show() {
    let shown = 0;
    for (const [index, { bar, number }] of this.rows) {
      const share = this.tokens ? this.sums[index] / this.tokens : 0;
      shown += share;
      const width = percent(Math.min(1, Math.max(0, share)));
      if (bar.style.width !== width) bar.style.width = width;
      write(number, this.tokens ? percent(share) : "–");
    }
    if (this.rows.size < this.experts.length && this.tokens) this.#showOthers(this.sums.reduce((a, b) => a + b) / this.tokens - shown);
  }

  #row(index) {
    if (this.rows.has(index)) return;
    const name = this.experts[index];
    const { key, slot } = lookOf(name);
    const bar = element("i", { className: "bar", data: { slot } });
    const number = element("span", { className: "share" }, "–");
    const chip = element("b", { className: "chip", data: { slot } }, key);
    const label = element("span", { className: "name", title: name }, name);
    const row = element("li", { data: { expert: name } }, chip, label, element("span", { className: "track" }, bar), number);
    row.addEventListener("pointerenter", () => this.onFocus(name));
    row.addEventListener("pointerleave", () => this.onFocus(null));
    this.place.insertBefore(row, this.others);
    this.rows.set(index, { bar, number });
  }

  #showOthers(share) {
    if (!this.others) this.others = this.place.appendChild(element("li", { className: "others" }));
    write(this.others, `${this.experts.length - this.rows.size} other experts: ${percent(share)}`);
  }
}
