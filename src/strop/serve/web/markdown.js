// A model's text as elements. Text only ever becomes text nodes; what is not understood stays as it was written.

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)/;
const TABLE_RULE = /^\s*\|?(\s*:?-+:?\s*\|)+\s*:?-*:?\s*$/;
const INLINE = /(`+)(.+?)\1(?!`)|\*\*(?=\S)(.+?)\*\*|\*(?=[^\s*])([^*]+?)\*|(?<!\w)_(?=\S)([^_]+?)_(?!\w)/s;

// Shows `text` in `element`. Blocks that are as before keep their elements, so that a selection survives a stream.
export function showMarkdown(element, text) {
  const found = blocks(text);
  const kept = element.markdownBlocks ?? [];
  let same = 0;
  while (same < kept.length && same < found.length && kept[same] === found[same].source) same++;
  while (element.children.length > same) element.lastElementChild.remove();
  element.append(...found.slice(same).map((block) => block.render()));
  element.markdownBlocks = found.map((block) => block.source);
}

function blocks(text) {
  const lines = text.split("\n");
  const found = [];
  let at = 0;
  const take = (count, render) => {
    const source = lines.slice(at, at + count);
    found.push({ source: source.join("\n"), render: () => render(source) });
    at += count;
  };
  const run = (from, holds) => {
    let end = from;
    while (end < lines.length && holds(lines[end])) end++;
    return end - at;
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    if (!line.trim()) at++;
    else if (fence) {
      const size = run(at + 1, (other) => !other.trim().startsWith(fence[1]));
      take(Math.min(size + 1, lines.length - at), code);
    } else if (HEADING.test(line)) take(1, heading);
    else if (ITEM.test(line)) take(run(at, (other) => ITEM.test(other) || /^\s+\S/.test(other)), list);
    else if (line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? "")) take(run(at, (other) => other.includes("|")), table);
    else take(run(at + 1, isProse), paragraph);
  }
  return found;
}

const isProse = (line) => line.trim() && !FENCE.test(line) && !HEADING.test(line) && !ITEM.test(line);

function code(lines) {
  const [, mark, language] = FENCE.exec(lines[0]);
  const isClosed = lines.length > 1 && lines.at(-1).trim().startsWith(mark);
  const pre = node("pre", node("code", lines.slice(1, isClosed ? -1 : undefined).join("\n")));
  if (language) pre.dataset.language = language;
  pre.tabIndex = 0; // so that a long line can be scrolled to with keys
  return pre;
}

function heading([line]) {
  const [, marks, text] = HEADING.exec(line);
  return node(`h${Math.min(6, marks.length + 2)}`, ...inline(text));
}

function list(lines) {
  const root = node(/\d/.test(ITEM.exec(lines[0])[2]) ? "ol" : "ul");
  const open = [{ indent: -1, list: root }];
  let text = [];
  let item = null;
  const finish = () => item?.prepend(...inline(text.join("\n")));
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (!found) {
      text.push(line.trim());
      continue;
    }
    finish();
    const [, space, mark, words] = found;
    const indent = space.length;
    while (open.length > 1 && indent < open.at(-1).indent) open.pop();
    if (open.length === 1) open.push({ indent, list: root });
    else if (indent > open.at(-1).indent + 1 && item) {
      const inner = node(/\d/.test(mark) ? "ol" : "ul");
      item.append(inner);
      open.push({ indent, list: inner });
    }
    item = node("li");
    if (/\d/.test(mark)) item.value = parseInt(mark, 10);
    text = [words];
    open.at(-1).list.append(item);
  }
  finish();
  return root;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => inline(cell.trim()));
  const row = (line, tag) => node("tr", ...cells(line).map((cell) => node(tag, ...cell)));
  const body = node("tbody", ...lines.slice(2).map((line) => row(line, "td")));
  const whole = node("div", node("table", node("thead", row(lines[0], "th")), body));
  whole.className = "table";
  return whole;
}

function paragraph(lines) {
  return node("p", ...inline(lines.join("\n")));
}

function inline(text) {
  const found = [];
  for (let match; (match = INLINE.exec(text)); text = text.slice(match.index + match[0].length)) {
    if (match.index) found.push(text.slice(0, match.index));
    const [, , plain, strong, emphasis, underscored] = match;
    if (plain !== undefined) found.push(node("code", plain));
    else if (strong !== undefined) found.push(node("strong", ...inline(strong)));
    else found.push(node("em", ...inline(emphasis ?? underscored)));
  }
  return text ? [...found, text] : found;
}

function node(tag, ...children) {
  const element = document.createElement(tag);
  element.append(...children);
  return element;
}
