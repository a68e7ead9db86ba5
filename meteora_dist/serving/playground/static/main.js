// The page: keys, theme, examples, and one or two panes that run the same prompt.

import { listExamples, listModels } from "./api.js";
import { commonRequest } from "./controls.js";
import { alertIn, element, find } from "./dom.js";
import { introduce } from "./palette.js";
import { Pane } from "./pane.js";

const MODES = ["auto", "auto-sequence", "base"];
const KEY = "meteora-api-key";
const THEMES = { system: "light dark", light: "light", dark: "dark" };

const template = find("#pane");
const panes = [new Pane(template, "First answer")];
const form = find("#composer");
let models = [];
let running = null;

find("#panes").append(panes[0].root);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
form.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  form.requestSubmit();
});
find("#stop").addEventListener("click", () => running?.abort());
find("#compare").addEventListener("change", (event) => compare(event.target.checked));
find("#theme").addEventListener("click", nextTheme);
find("#key-toggle").addEventListener("click", () => showKeyForm(find("#key-form").hidden));
find("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  // For this tab alone, and gone with it.
  sessionStorage.setItem(KEY, find("#key").value.trim());
  connect();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
find("#key").value = key();
connect();

function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

async function connect() {
  try {
    const [served, examples] = await Promise.all([listModels(key()), listExamples()]);
    models = served;
    const experts = models.filter((name) => !MODES.includes(name));
    introduce(experts);
    panes.forEach(prepare);
    offerExamples(examples, experts);
    status(`Ready: ${experts.length} ${experts.length === 1 ? "expert" : "experts"}`, "ready");
    alertIn(find("#alert"), null);
    if (key()) showKeyForm(false);
  } catch (error) {
    status("Not connected", "failed");
    alertIn(find("#alert"), error);
    if (error.code === "invalid_api_key") showKeyForm(true);
  }
}

async function run() {
  running?.abort();
  const abort = (running = new AbortController());
  setRunning(true);
  const common = commonRequest(form);
  // Two answers to one prompt shall differ by their modes, and not by their luck.
  common.seed ??= crypto.getRandomValues(new Uint32Array(1))[0];
  await Promise.all(panes.map((pane) => pane.run(common, key(), abort.signal)));
  if (running === abort) setRunning(false);
}

function setRunning(on) {
  find("#stop").disabled = !on;
  document.body.dataset.running = String(on);
  if (!on) running = null;
}

function compare(on) {
  if (on) {
    panes.push(new Pane(template, "Second answer"));
    prepare(panes[1], 1);
    find("#panes").append(panes[1].root);
  } else {
    running?.abort();
    panes.pop().root.remove();
  }
  find("#panes").classList.toggle("two", on);
}

function prepare(pane, index) {
  pane.controls.offer(models, index ? "base" : "auto");
  pane.expect(models.filter((name) => !MODES.includes(name)));
}

function offerExamples(examples, experts) {
  const chips = examples
    .filter((example) => example.experts.every((name) => experts.includes(name)))
    .map((example) => {
      const chip = element("button", { type: "button", className: "chip-button", title: example.prompt }, example.title);
      chip.addEventListener("click", () => {
        find("#prompt").value = example.prompt;
        find("#prompt").focus();
      });
      return chip;
    });
  find("#examples").replaceChildren(...chips);
}

function nextTheme() {
  const names = Object.keys(THEMES);
  const root = document.documentElement;
  const next = names[(names.indexOf(root.dataset.theme ?? "system") + 1) % names.length];
  root.dataset.theme = next;
  root.style.colorScheme = THEMES[next];
  find("#theme-name").textContent = next;
  repaint();
}

function repaint() {
  panes.forEach((pane) => pane.repaint());
}

function showKeyForm(on) {
  find("#key-form").hidden = !on;
  find("#key-toggle").ariaExpanded = String(on);
  if (on) find("#key").focus();
}

function status(text, state) {
  find("#status").textContent = text;
  find("#status").dataset.state = state;
}
