// What the form says, as the API wants to hear it.

import { element, find } from "./dom.js";

const MODES = {
  auto: "auto: gates pick for every token",
  "auto-sequence": "auto-sequence: one expert for the answer",
  base: "base: no expert",
};
const BLEND = "blend…";

/** Fills a pane's list of modes with the models that may be used, and shows the fields that go with the chosen one. */
export class ModeControls {
  constructor(root) {
    this.root = root;
    this.mode = find(".mode", root);
    this.mode.addEventListener("change", () => this.#adapt());
  }

  offer(models, chosen) {
    const experts = models.filter((name) => !(name in MODES));
    const modes = models.filter((name) => name in MODES).map((name) => new Option(MODES[name], name));
    const named = experts.map((name) => new Option(name, name));
    const blend = experts.length > 1 ? [new Option("blend: several experts, weighted", BLEND)] : [];
    const wanted = this.mode.value || chosen;
    this.mode.replaceChildren(
      element("optgroup", { label: "Modes" }, ...modes, ...blend),
      element("optgroup", { label: "One expert" }, ...named),
    );
    this.mode.value = [...modes, ...blend, ...named].some((option) => option.value === wanted) ? wanted : models[0];
    if (experts.length > 1) find(".blend-text", this.root).placeholder = `${experts[0]}:0.5,${experts[1]}:0.5`;
    this.#adapt();
  }

  get label() {
    return this.mode.value === BLEND ? find(".blend-text", this.root).value : this.mode.value;
  }

  /** Fields of a request: `model` and `routing`. */
  request() {
    const routing = { trace: "layers" };
    if (this.mode.value === "auto") {
      put(routing, "top_k", find(".top-k", this.root));
      put(routing, "temperature", find(".gate-temperature", this.root));
    }
    return { model: this.label, routing };
  }

  #adapt() {
    find(".blend", this.root).hidden = this.mode.value !== BLEND;
    for (const field of this.root.querySelectorAll(".gate-only")) {
      const gates = this.mode.value === "auto";
      field.classList.toggle("off", !gates);
      find("input", field).disabled = !gates;
    }
  }
}

/** Fields of a request that hold for all panes. */
export function commonRequest(form) {
  const body = {
    messages: [{ role: "user", content: find("#prompt", form).value }],
    stream: true,
    stream_options: { include_usage: true },
  };
  put(body, "temperature", find("#temperature", form));
  put(body, "max_tokens", find("#max-tokens", form));
  put(body, "seed", find("#seed", form));
  if (find("#ignore-eos", form).checked) body.ignore_eos = true;
  return body;
}

/** An empty field is the service's own default. */
function put(body, name, input) {
  if (input.value !== "") body[name] = input.valueAsNumber;
}
