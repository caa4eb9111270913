// Markdown that a model writes → DOM nodes, also while it is still being written.
//
// While more may come, a construct that was begun is shown as if it were closed at the end, and characters that may yet
// turn out to be marks wait: nothing that was shown changes into something else.

import { blocks } from "./blocks.js";
import { icon, make } from "./dom.js";
import { inline } from "./inline.js";

const UNDECIDED = /^[ \t>]*(?:[#*+\-_=|~]+|`{1,2}|\d{1,9}[.)]?)[ \t]*$/; // a last line that may become anything

/** An answer inside an element. `update` builds only those blocks anew whose text has changed. */
export class Rendering {
  constructor(element) {
    this.element = element;
    this.shown = []; // {source, block, node} of each block
  }

  update(text, open) {
    const lines = text.replace(/\r\n?/g, "\n").split("\n");
    if (open && UNDECIDED.test(lines.at(-1))) lines.pop();
    const found = blocks(lines, open);
    found.forEach((block, number) => {
      const source = lines.slice(block.start, block.end).join("\n") + (block.open ? "\n\0" : "");
      const old = this.shown[number];
      if (old?.source === source) return;
      if (old && old.block.kind === "code" && block.kind === "code" && old.block.language === block.language) {
        old.node.querySelector("code").textContent = block.text; // keeps its place when scrolled sideways
        this.shown[number] = { source, block, node: old.node };
        return;
      }
      const node = built(block);
      if (old) old.node.replaceWith(node);
      else this.element.append(node);
      this.shown[number] = { source, block, node };
    });
    for (const { node } of this.shown.splice(found.length)) node.remove();
  }
}

function built(block) {
  switch (block.kind) {
    case "code":
      return code(block);
    case "heading": // the page's own headings are of levels 1 and 2
      return make(`h${Math.min(block.level + 2, 6)}`, {}, ...inline(block.text, block.open));
    case "rule":
      return make("hr");
    case "quote":
      return make("blockquote", {}, ...block.blocks.map(built));
    case "list": {
      const items = block.items.map((inner) => make("li", {}, ...inner.map(built)));
      if (block.start_at === null) return make("ul", {}, ...items);
      return make("ol", block.start_at === 1 ? {} : { start: block.start_at }, ...items);
    }
    case "table":
      return tableNode(block);
    default:
      return make("p", {}, ...inline(block.text, block.open));
  }
}

function code({ language, text }) {
  const copying = make(
    "button",
    { type: "button", class: "quiet copy-code" },
    icon("copy"),
    make("span", { text: "Copy code" }),
  );
  const head = make("div", { class: "code-head" }, make("span", { text: language || "text" }), copying);
  const body = make(
    "pre",
    { tabindex: "0", role: "group", "aria-label": `Code, ${language || "text"}` },
    make("code", { text }),
  );
  return make("div", { class: "code" }, head, body);
}

function tableNode({ header, rows, align, open }) {
  const cell = (tag, text, column, last) => make(tag, { class: align[column] || undefined }, ...inline(text, last));
  const row = (tag, texts, last) => {
    const padded = header.map((_, column) => texts[column] ?? "");
    return make(
      "tr",
      {},
      ...padded.map((text, column) => cell(tag, text, column, last && column === texts.length - 1)),
    );
  };
  const body = rows.map((texts, number) => row("td", texts, open && number === rows.length - 1));
  const whole = make(
    "table",
    {},
    make("thead", {}, row("th", header, open && !rows.length)),
    make("tbody", {}, ...body),
  );
  return make("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, whole);
}
