"use strict";
// Data lies gzipped in the page; it is opened when something that needs it is.
const opened = {};
function data(name) {
  return opened[name] ??= (async () => {
    const text = atob(document.getElementById("data-" + name).textContent);
    const bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  })();
}

const SVG = "http://www.w3.org/2000/svg";
function make(tag, attributes, parent, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent?.append(node);
  return node;
}

function element(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function drawing(shape, lines, said) {
  const [nodes, edges, width, height] = shape;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": "operators" });
  let path = "";
  for (const [from, to] of edges) {
    const [, , x1, y1] = nodes[from], [, , x2, y2] = nodes[to], y = (y1 + y2) / 2;
    path += `M${x1} ${y1 + 11}C${x1} ${y} ${x2} ${y} ${x2} ${y2 - 11}`;
  }
  make("path", { d: path }, svg);
  nodes.forEach(([label, kind, x, y], index) => {
    const group = make("g", { class: kind }, svg);
    make("title", {}, group, lines[index]);
    make("rect", { x: x - 50, y: y - 11, width: 100, height: 22, rx: kind === "input" ? 11 : 5 }, group);
    const shown = kind === "input" ? lines[index].split(" = ")[0] : label;
    make("text", { x, y: y + 4 }, group, shown.length > 15 ? shown.slice(0, 14) + "…" : shown);
    for (const happens of ["pointerenter", "click"]) group.addEventListener(happens, () => { said.textContent = lines[index]; });
  });
  return svg;
}

async function open(button) {
  const [shapes, graphs] = await Promise.all([data("shapes"), data("graphs")]);
  if (button.getAttribute("aria-expanded") === "true") return;
  const group = graphs[button.dataset.graph][button.dataset.group];
  const shape = shapes[group.shape];
  const said = element("div", { class: "said" }, "point at an operator to read its line");
  const svg = drawing(shape, group.lines, said);
  const scroll = element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "graph of " + button.firstChild.textContent }, svg);
  let scale = 1;
  const zoom = (next) => {
    scale = Math.min(4, Math.max(0.1, next));
    svg.setAttribute("width", shape[2] * scale);
    svg.setAttribute("height", shape[3] * scale);
  };
  const fit = () => zoom(Math.min(1, (scroll.clientWidth - 4) / shape[2]));
  const bar = element("div", { class: "zoom" });
  for (const [sign, name, act] of [["+", "larger", () => zoom(scale * 1.25)], ["−", "smaller", () => zoom(scale / 1.25)], ["fit", "fit to the width", fit]]) {
    const one = element("button", { type: "button", "aria-label": name }, sign);
    one.addEventListener("click", act);
    bar.append(one);
  }
  scroll.addEventListener("keydown", (event) => {
    if (event.key === "+" || event.key === "=") zoom(scale * 1.25);
    else if (event.key === "-") zoom(scale / 1.25);
    else if (event.key === "0") fit();
    else if (event.key === "Escape") { close(button); button.focus(); }
    else return;
    event.preventDefault();
  });
  scroll.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoom(scale * Math.exp(-event.deltaY / 200));
  }, { passive: false });
  button.after(element("div", { class: "view" }, scroll, bar, said));
  button.setAttribute("aria-expanded", "true");
  fit();
}

function close(button) {
  if (button.getAttribute("aria-expanded") !== "true") return;
  button.nextElementSibling.remove();
  button.setAttribute("aria-expanded", "false");
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.classList.contains("group")) {
    if (button.getAttribute("aria-expanded") === "true") close(button);
    else await open(button);
  }
  const all = (title) => document.querySelectorAll(`button.group[data-graph="${title}"]`);
  if (button.dataset.none) all(button.dataset.none).forEach(close);
  if (button.dataset.all) {
    for (const [number, one] of [...all(button.dataset.all)].entries()) {
      await open(one);
      if (number % 10 === 9) await new Promise(requestAnimationFrame); // the page stays alive while it draws many
    }
  }
});

// Lines are unique in a program, or nearly: those that stand once in both stages, in the same order, are kept.
function difference(before, after) {
  const once = (rows) => {
    const at = new Map();
    rows.forEach((row, index) => at.set(row, at.has(row) ? -1 : index));
    return at;
  };
  const a = once(before), b = once(after), pairs = [];
  before.forEach((row, index) => { if (a.get(row) === index && b.get(row) >= 0) pairs.push([index, b.get(row)]); });
  const tails = [], previous = new Array(pairs.length);
  pairs.forEach(([, place], index) => {
    let low = 0, high = tails.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (pairs[tails[middle]][1] < place) low = middle + 1; else high = middle;
    }
    previous[index] = low ? tails[low - 1] : -1;
    tails[low] = index;
  });
  const kept = [];
  for (let index = tails.at(-1) ?? -1; index >= 0; index = previous[index]) kept.push(pairs[index]);
  kept.reverse().push([before.length, after.length]);
  const rows = [];
  let i = 0, j = 0;
  for (const [x, y] of kept) {
    while (i < x) rows.push(["del", before[i++]]);
    while (j < y) rows.push(["add", after[j++]]);
    if (x < before.length) { rows.push(["", before[i++]]); j++; }
  }
  return rows;
}

const AROUND = 2, MOST = 3000;
async function compare() {
  const { lines, texts } = await data("texts");
  const [from, to] = ["from", "to"].map((name) => Number(document.getElementById(name).value));
  const rows = difference(texts[from], texts[to]);
  const near = new Uint8Array(rows.length);
  rows.forEach(([kind], index) => { if (kind) near.fill(1, Math.max(0, index - AROUND), index + AROUND + 1); });
  const pre = element("pre", { tabindex: "0" });
  let gap = false, shown = 0;
  rows.forEach(([kind, line], index) => {
    if (!near[index] || shown > MOST) { gap = true; return; }
    if (gap) pre.append(element("span", { class: "gap" }, "⋯"));
    gap = false;
    shown++;
    pre.append(element("span", { class: kind }, (kind === "add" ? "+ " : kind === "del" ? "- " : "  ") + lines[line]));
  });
  if (gap && shown > MOST) pre.append(element("span", { class: "gap" }, `⋯ only the first ${MOST} lines are shown`));
  const count = (kind) => rows.filter(([one]) => one === kind).length;
  const said = element("p", {}, `${count("del")} lines went, ${count("add")} came`);
  document.getElementById("diff").replaceChildren(said, ...(shown ? [pre] : []));
}
document.getElementById("compare")?.addEventListener("click", compare);
