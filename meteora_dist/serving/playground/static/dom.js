// Small helpers around the DOM. Text only ever enters the page as text.

export const find = (selector, root = document) => root.querySelector(selector);

/** A new element with properties, data attributes and children (elements or texts). */
export function element(tag, { data = {}, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  Object.assign(made.dataset, data);
  made.append(...children);
  return made;
}

export const percent = (share) => `${Math.round(share * 100)}%`;

/** Puts a text in its place; one that stands there already costs no layout. */
export function write(place, text) {
  if (place.textContent !== text) place.textContent = text;
}

/** Tells screen readers, once they have finished what they are saying. */
export function announce(text) {
  find("#live").textContent = text;
}

/** Shows an error, or hides it when there is none. */
export function alertIn(place, error) {
  place.hidden = !error;
  place.replaceChildren();
  if (error) {
    place.append(element("strong", {}, error.message[0].toUpperCase() + error.message.slice(1)));
    if (error.advice) place.append(element("span", {}, error.advice));
  }
}
