// Elements and icons, made without HTML text: whatever a string holds, it ends up as text.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `class` and `text` are what they say, `on…` listens, true and false set and leave out an attribute. */
export function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** One of the symbols of index.html; the words beside it, or the button's name, say what it means. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows an icon and is called by its words. */
export function iconButton(name, words, onclick, options = {}) {
  return make(
    "button",
    { type: "button", class: "quiet", "aria-label": words, title: words, onclick, ...options },
    icon(name),
  );
}

/** Put a text on the clipboard. Browsers offer `navigator.clipboard` to https and to this machine only. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = make("textarea", { class: "hidden", text, "aria-hidden": "true" });
  const focused = document.activeElement;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  if (!copied) throw new Error("the browser did not copy");
}
