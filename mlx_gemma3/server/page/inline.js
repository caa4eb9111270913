// The text of one Markdown block → DOM nodes: emphasis, code spans, links, line breaks.
//
// Links lead to http, https and mailto only; pictures of an answer become links, since a picture that is loaded tells
// its server that it was. All else is text, HTML too. Left out on purpose: links by reference.

import { make } from "./dom.js";

const PLAIN = /[^\\`[!<*_~\nhH]+/y;
const BARE = /https?:\/\/[^\s<>"`]+/iy;
const ANGLE = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/iy;
const BREAK = /<br ?\/?>/iy;
const TARGET = /\(\s{0,8}(<[^<>\n]*>|[^\s()<]*(?:\([^\s()]*\)[^\s()]*)*)(?:\s{1,8}(?:"[^"]*"|'[^']*'))?\s{0,8}\)/y;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const LABEL = 2000; // longest text of a link, in characters
const MARKS = 500; // most runs of * _ ~ in one block that are more than text

/** Nodes of one block's text. `open`: it may go on; what was begun is shown as if it ended here. */
export function inline(text, open, linked = false) {
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
      add(broken ? make("br") : (anchor(angle[1], [angle[1]]) ?? document.createTextNode(angle[0])));
      at += (broken ?? angle)[0].length;
    } else if (
      "hH".includes(character) &&
      !linked &&
      !/[\p{L}\p{N}_]/u.test(text[at - 1] ?? "") &&
      match(BARE, text, at)
    ) {
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
    if (address[end - 1] === ")" && address.slice(0, end).split("(").length >= address.slice(0, end).split(")").length)
      break;
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
