// Layers by tokens: the dominating expert of each layer at each token, stronger where its share is larger.
// Drawn in tiles of so many tokens, each of them once: a long answer costs as much for each token as a short one.

import { element, percent } from "./dom.js";
import { colourOf, lookOf } from "./palette.js";

const COLUMN = 18;
const TILE_TOKENS = 32;
const LABELS = 62;
const MOST_HEIGHT = 240;
const NAME_CHARACTERS = 9;

export class HeatMap {
  /** Draws into `place`; says in `output` what is pointed at; `onSelect` hears the token's number, or null. */
  constructor(place, output, axis, onSelect) {
    Object.assign(this, { place, output, axis, onSelect });
    this.clear([]);
    place.addEventListener("pointermove", (event) => this.#point(event));
    place.addEventListener("pointerleave", () => this.select(null, null));
    place.addEventListener("blur", () => this.select(null, null));
    place.addEventListener("keydown", (event) => this.#move(event));
  }

  clear(experts) {
    this.experts = experts;
    this.tokens = [];
    this.layers = 0;
    this.tiles = [];
    this.cursor = null;
    this.strip = element("div", { className: "strip" });
    this.place.replaceChildren();
    this.output.value = "";
    this.axis.forEach((label) => (label.textContent = ""));
  }

  append(tokens) {
    const fresh = tokens.filter((token) => token.layerExperts);
    if (!fresh.length) return;
    if (!this.layers) this.#begin(fresh[0].layerExperts.length);
    for (const token of fresh) this.#draw(this.tokens.push(token) - 1);
    this.strip.style.width = `${this.tokens.length * COLUMN}px`;
  }

  /** Whether its reader is at its end. */
  get followed() {
    return this.place.scrollLeft + this.place.clientWidth >= this.place.scrollWidth - COLUMN;
  }

  follow() {
    this.place.scrollLeft = this.place.scrollWidth;
  }

  /** Draws all of it anew, in the colours of now. */
  redraw() {
    this.colours = new Map();
    this.tiles.forEach(({ context }) => context.clearRect(0, 0, TILE_TOKENS * COLUMN, this.height + LABELS));
    this.tokens.forEach((_, index) => this.#draw(index));
  }

  /** Points out a token's column, and one of its cells when a layer is given. */
  select(number, layer) {
    this.cursor?.remove();
    this.cursor = null;
    this.at = number === null ? null : { number, layer };
    this.output.value = "";
    if (number === null || !this.tokens[number]) return;
    this.cursor = this.strip.appendChild(element("span", { className: "cursor" }));
    this.cursor.style.left = `${number * COLUMN}px`;
    this.cursor.style.height = `${this.height}px`;
    if (layer === null) return;
    const { layerExperts, layerShares, text } = this.tokens[number];
    const name = this.experts[layerExperts[layer]];
    const who = name === undefined ? "no expert" : `${lookOf(name).key} ${name}, ${percent(layerShares[layer])}`;
    this.output.value = `layer ${layer}, ${JSON.stringify(text)}: ${who}`;
  }

  #begin(layers) {
    this.layers = layers;
    this.place.append(this.strip);
    this.row = Math.max(3, Math.min(14, Math.floor(MOST_HEIGHT / layers)));
    this.height = this.row * layers;
    this.colours = new Map();
    this.axis[0].textContent = String(layers - 1);
    this.axis[1].textContent = "0";
    this.place.parentElement.style.setProperty("--cells", `${this.height}px`);
  }

  #tile(index) {
    if (index === this.tiles.length) {
      const canvas = element("canvas", { ariaHidden: "true" });
      const scale = devicePixelRatio || 1;
      canvas.width = TILE_TOKENS * COLUMN * scale;
      canvas.height = (this.height + LABELS) * scale;
      canvas.style.width = `${TILE_TOKENS * COLUMN}px`;
      canvas.style.height = `${this.height + LABELS}px`;
      const context = canvas.getContext("2d");
      context.scale(scale, scale);
      this.strip.append(element("span", { className: "tile" }, canvas));
      this.tiles.push({ canvas, context });
    }
    return this.tiles[index];
  }

  #draw(number) {
    const token = this.tokens[number];
    const { context } = this.#tile(Math.floor(number / TILE_TOKENS));
    const left = (number % TILE_TOKENS) * COLUMN;
    token.layerExperts.forEach((expert, layer) => {
      const name = expert < 0 ? null : this.experts[expert];
      context.globalAlpha = name === null ? 1 : 0.25 + 0.75 * Math.min(1, token.layerShares[layer]);
      context.fillStyle = this.#colour(lookOf(name).slot);
      // The first layer is at the bottom, where an answer enters the model.
      context.fillRect(left, this.height - (layer + 1) * this.row, COLUMN - 1, this.row - (this.row > 4 ? 1 : 0));
    });
    context.globalAlpha = 1;
    this.#label(context, token, left);
  }

  #label(context, token, left) {
    context.save();
    context.translate(left + COLUMN / 2 + 3, this.height + 6);
    context.rotate(Math.PI / 2);
    context.fillStyle = this.#colour("label");
    context.font = "11px ui-monospace, monospace";
    const text = token.text.trim() || (token.text.includes("\n") ? "↵" : "␣");
    const shown = text.length > NAME_CHARACTERS ? `${text.slice(0, NAME_CHARACTERS - 1)}…` : text;
    context.fillText(token.text === "" ? "·" : shown, 0, 6);
    context.restore();
  }

  #colour(slot) {
    if (!this.colours.has(slot)) this.colours.set(slot, colourOf(slot));
    return this.colours.get(slot);
  }

  #point(event) {
    const box = this.place.getBoundingClientRect();
    const number = Math.floor((event.clientX - box.left + this.place.scrollLeft) / COLUMN);
    const layer = Math.ceil((this.height - (event.clientY - box.top)) / this.row) - 1;
    const inside = number < this.tokens.length && number >= 0;
    this.#choose(inside ? number : null, inside && layer >= 0 && layer < this.layers ? layer : null);
  }

  #move(event) {
    const steps = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    const step = steps[event.key];
    if (!step || !this.tokens.length) return;
    event.preventDefault();
    const from = this.at ?? { number: -step[0], layer: 0 };
    const within = (value, most) => Math.max(0, Math.min(most, value));
    const number = within(from.number + step[0], this.tokens.length - 1);
    this.#choose(number, within((from.layer ?? 0) + step[1], this.layers - 1));
    const left = number * COLUMN;
    if (left < this.place.scrollLeft) this.place.scrollLeft = left;
    if (left + COLUMN > this.place.scrollLeft + this.place.clientWidth) this.place.scrollLeft = left + COLUMN - this.place.clientWidth;
  }

  #choose(number, layer) {
    this.onSelect(number);
    this.select(number, layer);
  }
}
