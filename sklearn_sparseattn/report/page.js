"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const cells = byId("cells");
const gallery = byId("gallery");
const matrix = byId("matrix");
const items = [...gallery.children];
const pictures = items.map((item) => item.querySelector(".picture"));
const state = { true: -1, predicted: -1, verdict: "all" };

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// In its own direction, whatever stands beside it.
const named = (name) => make("bdi", { textContent: name });

const source = (layer, i) => "data:image/webp;base64," + data.layers[layer][i];

// ---- which cells are shown ----

function matches(one) {
  const right = one.true === one.predicted;
  return (state.true < 0 || one.true === state.true)
    && (state.predicted < 0 || one.predicted === state.predicted)
    && (state.verdict === "all" || right === (state.verdict === "right"));
}

function applyFilter() {
  let shown = 0;
  data.cells.forEach((one, i) => {
    items[i].hidden = !matches(one);
    shown += !items[i].hidden;
  });
  let total = 0;
  data.counts.forEach((row, i) => row.forEach((n, j) => {
    total += matches({ true: i, predicted: j }) ? n : 0;
  }));
  const said = [`${shown.toLocaleString("en")} of ${total.toLocaleString("en")} cells`];
  if (state.true >= 0) said.push(" · true: ", named(data.classes[state.true]));
  if (state.predicted >= 0) said.push(" · predicted: ", named(data.classes[state.predicted]));
  if (state.verdict !== "all") said.push(` · ${state.verdict} only`);
  byId("status").replaceChildren(...said);
  byId("clear").hidden = said.length === 1;
  for (const button of matrix.querySelectorAll("button")) {
    button.setAttribute("aria-pressed", isOn(button));
  }
  rove(visible().find((item) => item.firstChild.tabIndex === 0) ?? visible()[0]);
}

const place = (button) => [Number(button.dataset.true), Number(button.dataset.predicted)];

function isOn(button) {
  const [row, column] = place(button);
  return row === state.true && column === state.predicted;
}

function clear() {
  state.true = state.predicted = -1;
  state.verdict = "all";
  document.querySelector("[name=verdict][value=all]").checked = true;
  applyFilter();
}

matrix.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const on = isOn(button);
  [state.true, state.predicted] = on ? [-1, -1] : place(button);
  focusIn(button);
  applyFilter();
});

byId("clear").addEventListener("click", () => {
  clear();
  matrix.querySelector("[tabindex='0']").focus();
});

// ---- keys: one stop of the tab key each for the table and the gallery, arrows inside ----

const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

function focusIn(button) {
  matrix.querySelector("[tabindex='0']").tabIndex = -1;
  button.tabIndex = 0;
  button.focus();
}

matrix.addEventListener("keydown", (event) => {
  const step = steps[event.key];
  if (!step) return;
  event.preventDefault();
  const [row, column] = place(event.target);
  const next = matrix.querySelector(`[data-true="${row + step[0]}"][data-predicted="${column + step[1]}"]`);
  if (next) focusIn(next);
});

const visible = () => [...gallery.children].filter((item) => !item.hidden);

function rove(item) {
  for (const other of gallery.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
  if (item) item.firstChild.tabIndex = 0;
}

gallery.addEventListener("keydown", (event) => {
  const list = visible();
  const columns = getComputedStyle(gallery).gridTemplateColumns.split(" ").length;
  const now = list.indexOf(event.target.closest("li"));
  const [down, across] = steps[event.key] ?? [0, 0];
  let next = now + down * columns + across;
  if (event.key === "Home") next = 0;
  else if (event.key === "End") next = list.length - 1;
  else if (!steps[event.key]) return;
  event.preventDefault();
  if (!list[next]) return;
  rove(list[next]);
  list[next].firstChild.focus();
});

// ---- overlays ----

// Pictures are made where they come into view, and all of them for printing.
const seen = new Set();
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const i = pictures.indexOf(entry.target);
    if (entry.isIntersecting) seen.add(i);
    else seen.delete(i);
    if (entry.isIntersecting) cover(i);
  }
}, { rootMargin: "400px" });
pictures.forEach((picture) => watcher.observe(picture));

function cover(i) {
  const layer = cells.dataset.layer;
  if (layer === "image") return;
  let over = pictures[i].querySelector(".over");
  if (!over) {
    over = make("img", { className: "over", alt: "" });
    pictures[i].append(over);
  }
  if (over.dataset.layer === layer) return;
  over.dataset.layer = layer;
  over.src = source(layer, i);
}

addEventListener("beforeprint", () => items.forEach((_, i) => cover(i)));

byId("strength").addEventListener("input", (event) => {
  gallery.style.setProperty("--strength", event.target.value / 100);
});

document.addEventListener("change", (event) => {
  const { name, value } = event.target;
  if (name === "verdict") {
    state.verdict = value;
    applyFilter();
  } else if (name === "order") {
    sort(value === "surest" ? -1 : 1);
  } else if (name === "layer") {
    cells.dataset.layer = value;
    seen.forEach(cover);
  }
});

// ---- order ----

function sort(sign) {
  const key = (i) => {
    const one = data.cells[i];
    return [one.true === one.predicted, sign * one.proba[one.predicted]];
  };
  const order = items.map((_, i) => i).sort((a, b) => {
    const [first, second] = [key(a), key(b)];
    return first[0] - second[0] || first[1] - second[1];
  });
  gallery.append(...order.map((i) => items[i]));
}

// ---- one cell, large ----

const detail = byId("detail");
let opened;

const captions = {
  image: "image", coarse: "coarse attention", chosen: "chosen pixels", fine: "fine attention",
  contribution: "signed contribution",
};
const scales = {
  coarse: ["viridis", "low to high"], fine: ["viridis", "low to high"], contribution: ["signed", "− to +"],
};

function layerFigure(layer, i) {
  const base = make("img", { src: pictures[i].querySelector("img").src, alt: "" });
  const picture = make("span", { className: "picture" }, base);
  if (layer !== "image") {
    base.className = layer === "fine" ? "faint" : "under";
    picture.append(make("img", { src: source(layer, i), className: "over", alt: "" }));
  }
  const caption = make("figcaption", {}, captions[layer]);
  if (scales[layer]) {
    const [ramp, meaning] = scales[layer];
    caption.append(make("span", { className: "scale" }, make("span", { className: "ramp " + ramp }), meaning));
  }
  return make("figure", {}, picture, caption);
}

function enlarge(item) {
  opened = item;
  const i = items.indexOf(item);
  const one = data.cells[i];
  byId("detail-title").textContent = one.name;
  const verdict = one.true === one.predicted ? ["right"] : ["wrong, is ", named(data.classes[one.true])];
  byId("detail-answer").replaceChildren(
    named(data.classes[one.predicted]), `, ${(100 * one.proba[one.predicted]).toFixed(1)} %: `, ...verdict);
  byId("detail-layers").replaceChildren(...Object.keys(captions).map((layer) => layerFigure(layer, i)));
  const best = one.proba.map((_, c) => c).sort((a, b) => one.proba[b] - one.proba[a]);
  byId("detail-proba").tBodies[0].replaceChildren(...best.slice(0, 10).map((c) => {
    const bar = make("div", { className: "bar" });
    bar.style.width = 100 * one.proba[c] + "%";
    return make("tr", {}, make("th", { scope: "row", dir: "auto", textContent: data.classes[c] }),
      make("td", { textContent: (100 * one.proba[c]).toFixed(1) }), make("td", {}, bar));
  }));
  const list = visible();
  // A button that is disabled loses the focus, and the arrow keys with it.
  byId("previous").setAttribute("aria-disabled", list[0] === item);
  byId("next").setAttribute("aria-disabled", list.at(-1) === item);
  if (!detail.open) detail.showModal();
}

function walk(step) {
  const list = visible();
  const next = list[list.indexOf(opened) + step];
  if (next) enlarge(next);
}

gallery.addEventListener("click", (event) => {
  const item = event.target.closest("li");
  if (item) enlarge(item);
});
byId("previous").addEventListener("click", () => walk(-1));
byId("next").addEventListener("click", () => walk(1));
byId("close").addEventListener("click", () => detail.close());
detail.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step) walk(step);
});
detail.addEventListener("close", () => {
  rove(opened);
  opened.firstChild.focus();
});
