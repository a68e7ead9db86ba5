// One answer and everything that is shown of it. Tokens are taken as they come, and shown once a frame.

import { Answer } from "./answer.js";
import { streamChat } from "./api.js";
import { ModeControls } from "./controls.js";
import { alertIn, announce, find, write } from "./dom.js";
import { HeatMap } from "./heatmap.js";
import { Legend } from "./legend.js";
import { lookOf } from "./palette.js";

const READ_OUT_MS = 3000;

export class Pane {
  constructor(template, name) {
    this.root = template.content.firstElementChild.cloneNode(true);
    this.root.ariaLabel = name;
    this.controls = new ModeControls(this.root);
    this.answer = new Answer(find(".answer", this.root), (number) => this.heat.select(number, null));
    this.legend = new Legend(find(".legend", this.root), (expert) => this.#focus(expert));
    const axis = [find(".axis-top", this.root), find(".axis-low", this.root)];
    this.heat = new HeatMap(find(".scroll", this.root), find(".cell", this.root), axis, (number) => this.answer.mark(number));
    this.#reset();
  }

  /** Runs a request to its end; returns whether it got there. */
  async run(common, key, signal) {
    this.#reset();
    this.started = performance.now();
    this.#state("waiting");
    try {
      for await (const chunk of streamChat({ ...common, ...this.controls.request() }, key, signal)) this.#take(chunk);
      this.#finish(this.reason === "length" ? "cut at max tokens" : "complete");
      return true;
    } catch (error) {
      this.#finish(error.name === "AbortError" ? "stopped" : "failed");
      if (error.name !== "AbortError") alertIn(find(".alert", this.root), error);
      return false;
    }
  }

  /** Shows who may appear in answers, before there is one. */
  expect(experts) {
    this.expected = experts;
    if (!this.experts) this.legend.clear(experts);
  }

  repaint() {
    this.heat.redraw();
  }

  #reset() {
    Object.assign(this, { experts: null, queue: [], frame: 0, count: 0, first: 0, last: 0, reason: null, usage: null });
    Object.assign(this, { content: "", traced: "", spoken: 0, unspoken: "" });
    alertIn(find(".alert", this.root), null);
    this.#state("");
    this.answer.clear([]);
    this.heat.clear([]);
    this.legend.clear(this.expected ?? []);
    for (const name of ["first", "rate", "count"]) find(`.${name}`, this.root).textContent = "–";
  }

  #take(chunk) {
    this.usage = chunk.usage ?? this.usage;
    for (const choice of chunk.choices) {
      this.reason = choice.finish_reason ?? this.reason;
      this.content += choice.delta.content;
      const { experts, tokens } = choice.routing;
      if (!this.experts) this.#meet(experts);
      for (const token of tokens) this.#queue(token);
    }
    if (!this.frame) this.frame = requestAnimationFrame(() => this.#show());
  }

  #meet(experts) {
    this.experts = experts;
    for (const view of [this.answer, this.legend, this.heat]) view.clear(experts);
    this.#state("streaming");
  }

  #queue({ token: text, id, shares, layer_experts: layerExperts, layer_shares: layerShares }) {
    const largest = Math.max(...shares, 0);
    const expert = largest > 0 ? this.experts[shares.indexOf(largest)] : null;
    this.last = performance.now();
    this.first ||= this.last;
    this.traced += text;
    this.unspoken += text;
    this.queue.push({ text, id, shares, layerExperts, layerShares, expert, number: this.count++ });
  }

  #show() {
    this.frame = 0;
    const tokens = this.queue.splice(0);
    if (!tokens.length) return;
    // Asked before anything changes, and followed after all has: the page is laid out once a frame.
    const followed = [this.answer, this.heat].filter((view) => view.followed);
    this.answer.append(tokens);
    this.legend.add(tokens);
    this.legend.show();
    this.heat.append(tokens);
    this.#stats();
    followed.forEach((view) => view.follow());
    if (tokens[0].number === 0) seen(this.started);
    if (this.last - this.spoken > READ_OUT_MS) this.#readOut();
  }

  #stats() {
    const put = (name, text) => write(find(`.${name}`, this.root), text);
    put("count", String(this.count));
    put("first", `${Math.round(this.first - this.started)} ms`);
    if (this.count > 1) put("rate", ((1000 * (this.count - 1)) / (this.last - this.first)).toFixed(1));
  }

  #readOut() {
    this.spoken = this.last;
    announce(this.unspoken);
    this.unspoken = "";
  }

  #finish(state) {
    cancelAnimationFrame(this.frame);
    this.#show();
    if (this.content.length > this.traced.length) this.answer.appendPlain(this.content.slice(this.traced.length));
    const read = this.usage ? ` · ${this.usage.prompt_tokens} prompt tokens` : "";
    this.#state(state + read);
    announce(`${this.unspoken} Answer ${state}, ${this.count} tokens.`);
  }

  #state(text) {
    find(".state", this.root).textContent = text;
    this.root.dataset.state = text.split(" ")[0];
  }

  /** While an expert of the legend is pointed at, the tokens of others step back. */
  #focus(expert) {
    const look = expert === null ? null : lookOf(expert).slot;
    if (look === null) delete this.answer.place.dataset.focus;
    else this.answer.place.dataset.focus = look;
  }
}

/** Notes, for measurements, when the first token has reached the screen: in the task after the frame that has it. */
function seen(started) {
  requestAnimationFrame(() => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => performance.measure("first-token", { start: started, end: performance.now() });
    port2.postMessage(null);
  });
}
