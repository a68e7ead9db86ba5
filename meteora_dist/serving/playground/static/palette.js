// One look for each expert, the same in all panes: a letter always, and one of eight colours while there are any.
// The colours are those of style.css; experts beyond the eighth share a hatch and are told apart by their letters.

const COLOURS = 8;
const NOBODY = { key: "–", slot: "none" };
const looks = new Map();

/** Gives experts their looks in this order; a bank with more than there are colours gives them to those that act. */
export function introduce(experts) {
  if (experts.length <= COLOURS) experts.forEach(lookOf);
}

/** The look of an expert; null for no expert. */
export function lookOf(expert) {
  if (expert === null) return NOBODY;
  if (!looks.has(expert)) {
    const number = looks.size;
    looks.set(expert, { key: letters(number), slot: number < COLOURS ? String(number) : "more" });
  }
  return looks.get(expert);
}

/** The page's colour of a slot, as it is in the theme of now. */
export function colourOf(slot) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--painted-${slot}`).trim();
}

function letters(number) {
  const last = String.fromCharCode(65 + (number % 26));
  return number < 26 ? last : letters(Math.floor(number / 26) - 1) + last;
}
