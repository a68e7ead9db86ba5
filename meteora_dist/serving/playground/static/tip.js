// What a token was made by: the small window beside it.

import { element, find, percent } from "./dom.js";
import { lookOf } from "./palette.js";

const MOST = 4;
const LEAST_SHARE = 0.005;
const GAP = 8;

/** The experts with the largest shares of a token, largest first, as [name, share]. */
export function topExperts(experts, shares) {
  return shares
    .map((share, index) => [experts[index], share])
    .filter(([, share]) => share >= LEAST_SHARE)
    .sort((a, b) => b[1] - a[1])
    .slice(0, MOST);
}

/** In words: for tokens that are read out. */
export function inWords(token, experts) {
  const top = topExperts(experts, token.shares);
  const who = top.map(([name, share]) => `${name} ${percent(share)}`).join(", ") || "no expert";
  return `Token ${token.number + 1}, ${JSON.stringify(token.text)}: ${who}`;
}

/** Shows a token's experts beside an element. */
export function showTip(token, experts, beside) {
  const tip = find("#tip");
  const rows = topExperts(experts, token.shares).map(([name, share]) => {
    const { key, slot } = lookOf(name);
    const bar = element("i", { className: "bar", data: { slot } });
    bar.style.width = percent(share);
    const track = element("span", { className: "track" }, bar);
    return element("li", {}, element("b", { className: "chip", data: { slot } }, key), name, track, percent(share));
  });
  tip.replaceChildren(
    element("p", {}, element("code", {}, JSON.stringify(token.text)), ` token ${token.number + 1}, id ${token.id}`),
    rows.length ? element("ul", {}, ...rows) : element("p", {}, "No expert acted: the base model alone."),
  );
  tip.hidden = false;
  place(tip, beside.getBoundingClientRect());
}

export function hideTip() {
  find("#tip").hidden = true;
}

function place(tip, target) {
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(GAP, target.left), document.documentElement.clientWidth - width - GAP);
  const below = target.bottom + GAP;
  tip.style.left = `${left}px`;
  tip.style.top = `${below + height < innerHeight ? below : Math.max(GAP, target.top - height - GAP)}px`;
}
