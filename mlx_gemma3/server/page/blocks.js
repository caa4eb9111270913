// The lines of a Markdown text → its blocks: paragraphs, headings, lists, quotes, code, tables, rules.
//
// Left out on purpose: indented code and setext headings. Models write fences and #.

const FENCE = /^ *(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:([ \t]+)(.*))?$/;
const DELIMITERS = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const DEEPEST = 16; // quotes and lists inside one another; deeper ones are text

/** The blocks of some lines: {kind, start, end, open, …}, lines start to end without end. `open`: more may come. */
export function blocks(lines, open, depth = 0) {
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
      (nested ? (quote(lines, at, open, depth) ?? list(lines, at, open, depth)) : null) ??
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
  const text = lines
    .slice(at + 1, end)
    .map((line) => dedented(line, indent))
    .join("\n");
  return { kind: "code", language: info.trim().split(/\s/)[0], text, end: Math.min(end + 1, lines.length) };
}

function heading(lines, at) {
  const [, marks, text] = HEADING.exec(lines[at]) ?? [];
  return marks
    ? { kind: "heading", level: marks.length, text: (text ?? "").trim().replace(/(?:^|[ \t])#+$/, ""), end: at + 1 }
    : null;
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
    open &&
    lines[at].trimStart().startsWith("|") &&
    (under === undefined || (at + 2 === lines.length && /^[ \t|:-]*$/.test(under)));
  if (!complete && !begun) return null;
  let end = Math.min(at + 2, lines.length);
  const rows = [];
  while (complete && end < lines.length && lines[end].includes("|")) rows.push(cells(lines[end++]));
  const align = complete
    ? cells(under).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""))
    : [];
  return { kind: "table", header, rows, align, end };
}

function cells(line) {
  const found = line
    .trim()
    .replace(/^\|/, "")
    .split(/(?<!\\)\|/);
  if (found.length > 1 && !found.at(-1).trim()) found.pop();
  return found.map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines, end)) end += 1;
  return {
    kind: "paragraph",
    text: lines
      .slice(at, end)
      .map((line) => line.trimStart())
      .join("\n")
      .trimEnd(),
    end,
  };
}

/** Whether a line ends the paragraph above it. Of numbers only 1 does: a sentence may begin a line with "1984." */
function interrupts(lines, at) {
  const line = lines[at];
  const item = ITEM.exec(line);
  return (
    FENCE.test(line) ||
    HEADING.test(line) ||
    RULE.test(line) ||
    QUOTE.test(line) ||
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
  for (let left = count; left > 0 && (line[at] === " " || line[at] === "\t"); at += 1)
    left -= line[at] === "\t" ? 4 : 1;
  return line.slice(at);
}
