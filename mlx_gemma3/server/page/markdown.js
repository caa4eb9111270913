// Markdown that a model writes → DOM nodes, also while it is still being written.
//
// All text goes into text nodes: HTML in an answer is shown as it stands. Links lead to http, https and mailto only,
// and pictures of an answer are links, since a picture that is loaded tells its server that it was.
//
// `open` says that more may come. Then a construct that was begun is shown as if it were closed at the end, and
// characters that may yet turn out to be marks wait; nothing that was shown changes into something else.
// Left out on purpose: indented code, setext headings, reference links. Models write fences, # and plain links.

import { icon, make } from "./dom.js";

const FENCE = /^ *(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*))?$/;
const DELIMITERS = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const UNDECIDED = /^[ \t>]*(?:[#*+\-_=|~]+|`{1,2}|\d{1,9}[.)]?)[ \t]*$/; // a last line that may become anything
const DEEPEST = 16; // quotes and lists inside one another; deeper ones are text

/** An answer inside an element. `update` builds only those blocks anew whose text has changed. */
export class Rendering {
  constructor(element) {
    this.element = element;
    this.shown = []; // {source, block, node} of each block
  }

  update(text, open) {
    const lines = text.replace(/\r\n?/g, "\n").split("\n");
    if (open && UNDECIDED.test(lines.at(-1))) lines.pop();
    const found = blocks(lines, open, 0);
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

// ---------------------------------------------------------------- lines → blocks

/** The blocks of some lines: {kind, start, end, open, …}, lines start to end without end. */
function blocks(lines, open, depth) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const nested = depth < DEEPEST;
    const block =
      fence(lines, at) ??
      heading(lines, at) ??
      rule(lines, at) ??
      (nested ? quote(lines, at, open, depth) ?? list(lines, at, open, depth) : null) ??
      table(lines, at, open) ??
      paragraph(lines, at);
    block.start = at;
    block.open = open && block.end >= lines.length;
    found.push(block);
    at = block.end;
  }
  return found;
}

function fence(lines, at) {
  const [, marks, info] = FENCE.exec(lines[at]) ?? [];
  if (!marks) return null;
  const indent = columns(lines[at]);
  const closing = new RegExp(`^ *${marks[0]}{${marks.length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  const text = lines.slice(at + 1, end).map((line) => dedented(line, indent)).join("\n");
  return { kind: "code", language: info.trim().split(/\s/)[0], text, end: Math.min(end + 1, lines.length) };
}

function heading(lines, at) {
  const [, marks, text] = HEADING.exec(lines[at]) ?? [];
  return marks ? { kind: "heading", level: marks.length, text: (text ?? "").trim().replace(/(?:^|[ \t])#+$/, ""), end: at + 1 } : null;
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? { kind: "rule", end: at + 1 } : null;
}

function quote(lines, at, open, depth) {
  const inner = [];
  let end = at;
  while (end < lines.length) {
    if (QUOTE.test(lines[end])) inner.push(lines[end].replace(QUOTE, ""));
    else if (inner.at(-1)?.trim() && lines[end].trim() && !interrupts(lines, end)) inner.push(lines[end]);
    else break;
    end += 1;
  }
  return inner.length ? { kind: "quote", blocks: blocks(inner, open && end >= lines.length, depth + 1), end } : null;
}

function list(lines, at, open, depth) {
  const first = ITEM.exec(lines[at]);
  if (!first) return null;
  const left = columns(lines[at]);
  const mark = first[2].at(-1);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || item[2].at(-1) !== mark || RULE.test(lines[end]) || columns(lines[end]) >= left + 2) break;
    const [inner, next] = itemLines(lines, end, item);
    items.push(blocks(inner, open && next >= lines.length, depth + 1));
    end = next;
    while (end < lines.length && !lines[end].trim()) end += 1; // items may stand apart
  }
  return { kind: "list", start_at: first[2].length > 1 ? parseInt(first[2], 10) : null, items, end };
}

/** The lines of one item without their indent, and the line after them. A sublist may be indented by two only. */
function itemLines(lines, at, [, , mark, gap, rest]) {
  const left = columns(lines[at]);
  let own = left + mark.length + (gap && gap.length <= 4 ? gap.length : 1);
  const inner = [rest ?? ""];
  let fenced = FENCE.exec(inner[0])?.[1];
  let end = at + 1;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    const indent = columns(line);
    const after = !lines[end - 1].trim();
    if (!line.trim()) {
      inner.push("");
      continue;
    }
    if (indent < own && indent >= left + 2 && (ITEM.test(line) || FENCE.test(line))) own = indent;
    if (indent < own && (fenced || after || interrupts(lines, end) || ITEM.test(line))) break;
    inner.push(dedented(line, own));
    const marks = FENCE.exec(inner.at(-1))?.[1];
    if (marks) fenced = fenced ? (marks.startsWith(fenced) ? undefined : fenced) : marks;
  }
  return [inner, end];
}

function table(lines, at, open) {
  if (!lines[at].includes("|")) return null;
  const header = cells(lines[at]);
  const under = lines[at + 1];
  const complete = under !== undefined && DELIMITERS.test(under) && cells(under).length === header.length;
  const begun =
    open && lines[at].trimStart().startsWith("|") &&
    (under === undefined || (at + 2 === lines.length && /^[ \t|:-]*$/.test(under)));
  if (!complete && !begun) return null;
  let end = Math.min(at + 2, lines.length);
  const rows = [];
  while (complete && end < lines.length && lines[end].includes("|")) rows.push(cells(lines[end++]));
  const align = complete ? cells(under).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "")) : [];
  return { kind: "table", header, rows, align, end };
}

function cells(line) {
  const found = line.trim().replace(/^\|/, "").split(/(?<!\\)\|/);
  if (found.length > 1 && !found.at(-1).trim()) found.pop();
  return found.map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines, end)) end += 1;
  return { kind: "paragraph", text: lines.slice(at, end).map((line) => line.trimStart()).join("\n").trimEnd(), end };
}

/** Whether a line ends the paragraph above it. Of numbers only 1 does: a sentence may begin a line with "1984." */
function interrupts(lines, at) {
  const line = lines[at];
  const item = ITEM.exec(line);
  return (
    FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) ||
    (item?.[4] && (item[2].length === 1 || item[2].slice(0, -1) === "1")) ||
    (line.includes("|") && DELIMITERS.test(lines[at + 1] ?? "") && lines[at + 1].includes("|"))
  );
}

function columns(line) {
  let count = 0;
  for (const character of line) {
    if (character === " ") count += 1;
    else if (character === "\t") count += 4;
    else break;
  }
  return count;
}

function dedented(line, count) {
  let at = 0;
  for (let left = count; left > 0 && (line[at] === " " || line[at] === "\t"); at += 1) left -= line[at] === "\t" ? 4 : 1;
  return line.slice(at);
}

// ---------------------------------------------------------------- blocks → nodes

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
  const copying = make("button", { type: "button", class: "quiet copy-code" }, icon("copy"), make("span", { text: "Copy code" }));
  const head = make("div", { class: "code-head" }, make("span", { text: language || "text" }), copying);
  const body = make("pre", { tabindex: "0", role: "group", "aria-label": `Code, ${language || "text"}` }, make("code", { text }));
  return make("div", { class: "code" }, head, body);
}

function tableNode({ header, rows, align, open }) {
  const cell = (tag, text, column, last) => make(tag, { class: align[column] || undefined }, ...inline(text, last));
  const row = (tag, texts, last) => {
    const padded = header.map((_, column) => texts[column] ?? "");
    return make("tr", {}, ...padded.map((text, column) => cell(tag, text, column, last && column === texts.length - 1)));
  };
  const body = rows.map((texts, number) => row("td", texts, open && number === rows.length - 1));
  const whole = make("table", {}, make("thead", {}, row("th", header, open && !rows.length)), make("tbody", {}, ...body));
  return make("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, whole);
}

// ---------------------------------------------------------------- text → nodes

const PLAIN = /[^\\`[!<*_~\nhH]+/y;
const BARE = /https?:\/\/[^\s<>"`]+/iy;
const ANGLE = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/iy;
const BREAK = /<br ?\/?>/iy;
const TARGET = /\(\s{0,8}(<[^<>\n]*>|[^\s()<]*(?:\([^\s()]*\)[^\s()]*)*)(?:\s{1,8}(?:"[^"]*"|'[^']*'))?\s{0,8}\)/y;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const LABEL = 2000; // longest text of a link, in characters
const MARKS = 500; // most runs of * _ ~ in one block that are more than text

/** Nodes of one block's text. */
function inline(text, open, linked = false) {
  if (open) text = text.replace(/[*_~`\\]+$/, ""); // half of a mark, or one that `open` closes anyway
  const parts = []; // nodes, and runs of marks: {mark, count, length, opens, closes}
  let plain = "";
  const add = (part) => {
    if (plain) parts.push(document.createTextNode(plain));
    plain = "";
    if (part) parts.push(part);
  };
  const unmatched = new Set(); // lengths of backtick runs that no later run closes
  let marks = 0;
  let at = 0;
  while (at < text.length) {
    const found = match(PLAIN, text, at);
    if (found) {
      plain += found[0];
      at += found[0].length;
      continue;
    }
    const character = text[at];
    if (character === "\\" && PUNCTUATION.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else if (character === "\n") {
      plain = plain.trimEnd();
      add(make("br"));
      at += 1;
    } else if (character === "`") {
      const run = match(/`+/y, text, at)[0];
      const end = unmatched.has(run.length) ? -1 : closing(text, at + run.length, run.length);
      if (end < 0) unmatched.add(run.length);
      if (end < 0 && !open) {
        plain += run;
        at += run.length;
      } else {
        const inside = text.slice(at + run.length, end < 0 ? text.length : end).replaceAll("\n", " ");
        add(make("code", { text: /^ .*[^ ].* $/.test(inside) ? inside.slice(1, -1) : inside }));
        at = end < 0 ? text.length : end + run.length;
      }
    } else if ((character === "[" || (character === "!" && text[at + 1] === "[")) && !linked) {
      const link = linkAt(text, character === "[" ? at : at + 1, open);
      if (link) add(link.node);
      else plain += character;
      at = link ? link.end : at + 1;
    } else if (character === "<" && (match(BREAK, text, at) || match(ANGLE, text, at))) {
      const broken = match(BREAK, text, at);
      const angle = match(ANGLE, text, at);
      add(broken ? make("br") : anchor(angle[1], [angle[1]]) ?? document.createTextNode(angle[0]));
      at += (broken ?? angle)[0].length;
    } else if ("hH".includes(character) && !linked && !/[\p{L}\p{N}_]/u.test(text[at - 1] ?? "") && match(BARE, text, at)) {
      const address = bareAddress(match(BARE, text, at)[0]);
      add(anchor(address, [address]) ?? document.createTextNode(address));
      at += address.length;
    } else if ("*_~".includes(character) && marks < MARKS) {
      const run = match(/\*+|_+|~+/y, text, at)[0];
      add(runOf(run, text[at - 1] ?? " ", text[at + run.length] ?? " "));
      marks += 1;
      at += run.length;
    } else {
      plain += character;
      at += 1;
    }
  }
  add();
  return emphasised(parts, open);
}

function match(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

function closing(text, from, length) {
  const runs = /`+/g;
  runs.lastIndex = from;
  for (let run = runs.exec(text); run; run = runs.exec(text)) if (run[0].length === length) return run.index;
  return -1;
}

/** A link whose label begins at a bracket, or null. While it is being written its address is not shown. */
function linkAt(text, at, open) {
  let depth = 0;
  let end = at;
  for (; end < Math.min(text.length, at + LABEL); end += 1) {
    if (text[end] === "\\") end += 1;
    else if (text[end] === "[") depth += 1;
    else if (text[end] === "]" && (depth -= 1) === 0) break;
  }
  if (depth !== 0 || text[end] !== "]") return null;
  const label = text.slice(at + 1, end);
  const target = match(TARGET, text, end + 1);
  if (target) {
    const node = anchor(target[1].replace(/^<|>$/g, ""), inline(label, false, true));
    return node && { node, end: end + 1 + target[0].length };
  }
  if (open && /^\([^\s()]*$/.test(text.slice(end + 1))) {
    return { node: make("span", {}, ...inline(label, false, true)), end: text.length };
  }
  return null;
}

/** A link, or null for an address that is not http, https or mailto. */
function anchor(address, children) {
  let parsed;
  try {
    parsed = new URL(address); // relative ones are none: nothing on this server is for a model to point at
  } catch {
    return null;
  }
  if (!["http:", "https:", "mailto:"].includes(parsed.protocol)) return null;
  return make("a", { href: parsed.href, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

/** An address without the punctuation of the sentence around it. */
function bareAddress(address) {
  let end = address.length;
  while (/[.,:;!?*_~'\])]/.test(address[end - 1])) {
    if (address[end - 1] === ")" && address.slice(0, end).split("(").length >= address.slice(0, end).split(")").length) break;
    end -= 1;
  }
  return address.slice(0, end);
}

/** A run of marks, and whether it may begin or end emphasis where it stands. */
function runOf(run, before, after) {
  const [spaceBefore, spaceAfter] = [/\s/.test(before), /\s/.test(after)];
  const [markBefore, markAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
  const left = !spaceAfter && (!markAfter || spaceBefore || markBefore);
  const right = !spaceBefore && (!markBefore || spaceAfter || markAfter);
  const inWord = run[0] === "_"; // snake_case is no emphasis
  return {
    mark: run[0],
    count: run.length,
    length: run.length,
    opens: left && (!inWord || !right || markBefore),
    closes: right && (!inWord || !left || markAfter),
    begins: spaceBefore || markBefore,
  };
}

/** Runs of marks paired as CommonMark does; those left over are text, or reach to the end if `open`. */
function emphasised(parts, open) {
  for (let at = 0; at < parts.length; at += 1) {
    const closer = parts[at];
    while (closer.mark && closer.closes && closer.count > 0) {
      let from = at - 1;
      while (from >= 0 && !pairs(parts[from], closer)) from -= 1;
      if (from < 0) break;
      const opener = parts[from];
      const used = Math.min(opener.count, closer.count) >= 2 ? 2 : 1;
      const inside = parts.splice(from + 1, at - from - 1).map(asNode);
      parts.splice(from + 1, 0, wrapped(closer.mark, used, inside));
      opener.count -= used;
      closer.count -= used;
      at = from + 2;
    }
  }
  for (let at = parts.length - 1; open && at >= 0; at -= 1) {
    const { mark, count, opens, begins } = parts[at];
    if (!mark || !opens || count === 0 || (count === 1 && !begins) || (mark === "~" && count !== 2)) continue;
    const used = Math.min(count, 2);
    parts[at].count -= used;
    parts.push(wrapped(mark, used, parts.splice(at + 1).map(asNode)));
    if (parts[at].count > 0) at += 1; // *** is both
  }
  return parts.map(asNode);
}

function pairs(opener, closer) {
  if (opener.mark !== closer.mark || !opener.opens || opener.count === 0) return false;
  if (opener.mark === "~") return opener.count === 2 && closer.count === 2;
  const both = opener.closes || closer.opens;
  return !both || (opener.length + closer.length) % 3 !== 0 || (opener.length % 3 === 0 && closer.length % 3 === 0);
}

function wrapped(mark, used, inside) {
  return make(mark === "~" ? "del" : used === 2 ? "strong" : "em", {}, ...inside);
}

function asNode(part) {
  return part.mark ? document.createTextNode(part.mark.repeat(part.count)) : part;
}
