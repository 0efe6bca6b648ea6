"use strict";
// Filters, sorts and pages through the rows of one artifact. Texts reach the page through textContent alone.

const PAGE = 20, SHOWN_COMPLETIONS = 12, FOLD = 700, MAX_CELLS = 4e6, CACHED = 12;
const index = JSON.parse(document.getElementById("index").textContent);
const blocks = document.querySelectorAll("script.rows");
const size = Number(document.getElementById("index").dataset.size);
const at = (id) => document.getElementById(id);
const cache = new Map();

/** The items of one block, parsed when they are needed; the last few stay in memory. */
function block(number) {
  let items = cache.get(number);
  if (!items) {
    items = JSON.parse(blocks[number].textContent);
    cache.set(number, items);
    if (cache.size > CACHED) cache.delete(cache.keys().next().value);
  }
  return items;
}

const item = (number) => block(Math.floor(number / size))[number % size];

function make(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const number = (value) =>
  value === null || value === undefined ? "–" : Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));

/** A text, with marks of hidden characters set off; `differs` are runs of [text, whether it differs]. */
function body(text, differs) {
  const made = make("div", "text");
  for (const [run, other] of differs || [[text, false]]) {
    run.split(/(⟦U\+[0-9A-F]{4,6}⟧)/).forEach((piece, place) => {
      if (piece) made.append(make(other ? "ins" : "span", place % 2 ? "hidden" : "", piece));
    });
  }
  return made;
}

/** A text that may be long: folded, and with a note where the artifact has more of it. */
function long([text, cut], differs) {
  const made = make("div");
  const whole = body(text, differs);
  made.append(whole);
  if (text.length > FOLD) {
    whole.classList.add("folded");
    const more = make("button", "more", `show all ${number(text.length)} characters`);
    more.addEventListener("click", () => {
      whole.classList.remove("folded");
      more.remove();
    });
    made.append(more);
  }
  if (cut) made.append(make("p", "faint", `${number(cut)} more characters are in the artifact`));
  return made;
}

const WORDS = /[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[\p{L}\p{N}\p{M}_]+|\s+|./gsu;

/** Two texts as runs of [text, whether it is in one of them alone], by a longest common subsequence of words. */
function differences(first, second) {
  const a = first.match(WORDS) || [], b = second.match(WORDS) || [];
  let head = 0, tail = 0;
  while (head < a.length && head < b.length && a[head] === b[head]) head++;
  while (tail < a.length - head && tail < b.length - head && a[a.length - 1 - tail] === b[b.length - 1 - tail]) tail++;
  const rows = a.length - head - tail, columns = b.length - head - tail, width = columns + 1;
  if (rows * columns > MAX_CELLS) return null;
  const common = new Uint16Array((rows + 1) * width);
  for (let i = rows - 1; i >= 0; i--)
    for (let j = columns - 1; j >= 0; j--)
      common[i * width + j] =
        a[head + i] === b[head + j]
          ? common[(i + 1) * width + j + 1] + 1
          : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
  const inA = new Array(a.length).fill(false), inB = new Array(b.length).fill(false);
  let i = 0, j = 0;
  while (i < rows || j < columns) {
    if (i < rows && j < columns && a[head + i] === b[head + j]) { i++; j++; }
    else if (j >= columns || (i < rows && common[(i + 1) * width + j] >= common[i * width + j + 1])) inA[head + i++] = true;
    else inB[head + j++] = true;
  }
  const runs = (words, marks) => {
    const made = [];
    words.forEach((word, place) => {
      const last = made[made.length - 1];
      if (last && last[1] === marks[place]) last[0] += word;
      else made.push([word, marks[place]]);
    });
    return made;
  };
  return [runs(a, inA), runs(b, inB)];
}

/** One completion, with its label and its numbers. */
function side(completion, differs) {
  const made = make("div", `side ${completion.label}`), who = make("div", "who");
  who.append(make("b", "", completion.label), make("span", "faint", completion.facts));
  made.append(who, long(completion.text, differs));
  return made;
}

function sides(completions) {
  const made = make("div", index.kind === "pair" ? "sides" : "sides many");
  if (index.kind === "pair") {
    const runs = at("differences").checked ? differences(completions[0].text[0], completions[1].text[0]) : [];
    completions.forEach((completion, place) => made.append(side(completion, runs ? runs[place] : undefined)));
    if (!runs) made.append(make("p", "faint", "too long to be compared word by word"));
    return made;
  }
  let shown = 0;
  const more = make("button", "more");
  const add = () => {
    for (const completion of completions.slice(shown, shown + SHOWN_COMPLETIONS)) made.insertBefore(side(completion), more);
    shown = Math.min(completions.length, shown + SHOWN_COMPLETIONS);
    more.textContent = `show more of ${number(completions.length - shown)} further completions`;
    more.hidden = shown === completions.length;
  };
  made.append(more);
  more.addEventListener("click", add);
  add();
  return made;
}

function card(place) {
  const row = item(place), made = make("article", "card"), top = make("div", "top");
  top.append(make("b", "", row.id), make("span", "faint", [row.source, row.split, ...(row.row === null ? [] : [`row ${number(row.row)}`])].join(" · ")));
  index.columns.forEach((name, column) => {
    const value = index.items[place][2][column];
    if (value !== null && value !== undefined && !name.endsWith("characters")) top.append(make("span", "number", `${name} ${number(value)}`));
  });
  made.append(top);
  for (const [role, text] of row.messages) {
    const turn = make("div", "turn");
    turn.append(make("span", "role", role), long(text));
    made.append(turn);
  }
  made.append(sides(row.completions));
  for (const [name, text] of row.more) {
    const fold = make("details"), summary = make("summary", "faint", name);
    fold.append(summary, body(text[0]));
    if (text[1]) fold.append(make("p", "faint", `${number(text[1])} more characters are in the artifact`));
    made.append(fold);
  }
  return made;
}

// What is shown: places of items, filtered and sorted, and the first one of this page.
let found = [], first = 0, latest = 0;

function show() {
  const shown = found.slice(first, first + PAGE);
  at("cards").replaceChildren(...shown.map(card));
  const all = index.items.length;
  at("status").textContent = found.length
    ? `${number(first + 1)}–${number(first + shown.length)} of ${number(found.length)}${found.length < all ? `, of ${number(all)}` : ""} ${index.unit}`
    : `none of ${number(all)} ${index.unit}`;
  at("page").value = String(Math.floor(first / PAGE) + 1);
  at("pages").textContent = `of ${number(Math.max(1, Math.ceil(found.length / PAGE)))}`;
  at("back").disabled = first === 0;
  at("forward").disabled = first + PAGE >= found.length;
}

function turn(to) {
  const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
  first = Math.min(Math.max(0, to), last) * PAGE;
  show();
  remember();
  scrollTo(0, 0);
}

const strings = (row) => [
  row.id, ...row.messages.map(([, text]) => text[0]), ...row.completions.map((completion) => completion.text[0]), ...row.more.map(([, text]) => text[0]),
];

/** Places that pass the cheap filters, and then those whose texts hold the words; gives way to the page in between. */
async function filtered(mine) {
  const source = at("source").value, split = at("split").value, column = Number(at("column").value);
  const low = at("low").value === "" ? -Infinity : Number(at("low").value);
  const high = at("high").value === "" ? Infinity : Number(at("high").value);
  const bounded = low !== -Infinity || high !== Infinity;
  let places = index.items.map((_, place) => place).filter((place) => {
    const [itsSource, itsSplit, numbers] = index.items[place], value = numbers[column];
    if ((source !== "" && itsSource !== Number(source)) || (split !== "" && itsSplit !== Number(split))) return false;
    return !bounded || (value !== null && value !== undefined && value >= low && value <= high);
  });
  const words = at("search").value.toLowerCase();
  if (!words) return places;
  const kept = [];
  let paused = performance.now();
  for (const place of places) {
    if (strings(item(place)).some((text) => text.toLowerCase().includes(words))) kept.push(place);
    if (performance.now() - paused > 40) {
      at("status").textContent = `searching, ${number(kept.length)} found …`;
      await new Promise((go) => setTimeout(go));
      if (mine !== latest) return null;
      paused = performance.now();
    }
  }
  return kept;
}

async function update(page) {
  const mine = ++latest;
  document.body.dataset.state = "busy";
  const places = await filtered(mine);
  if (places === null || mine !== latest) return;
  const column = at("sort").value, sign = at("direction").value === "down" ? -1 : 1;
  if (column !== "") {
    const value = (place) => index.items[place][2][Number(column)];
    const known = (place) => value(place) !== null && value(place) !== undefined;
    places.sort((x, y) => known(y) - known(x) || (known(x) ? sign * (value(x) - value(y)) : 0) || x - y);
  } else if (sign < 0) places.reverse();
  found = places;
  first = Math.max(0, Math.min(Number(page) || 0, Math.ceil(found.length / PAGE) - 1)) * PAGE;
  show();
  remember();
  document.body.dataset.state = "ready";
}

// The view is part of the address, so that a link leads to it.
const FIELDS = ["search", "source", "split", "column", "low", "high", "sort", "direction"];
const defaults = {};

function remember() {
  const words = new URLSearchParams();
  for (const id of FIELDS) if (at(id).value !== defaults[id]) words.set(id, at(id).value);
  if (first) words.set("page", String(first / PAGE + 1));
  history.replaceState(null, "", `#${words}`);
}

function option(select, value, text) {
  const made = make("option", "", text);
  made.value = String(value);
  select.append(made);
}

function start() {
  for (const note of index.notes) at("notes").append(make("p", "note", note));
  index.sources.forEach((name, place) => option(at("source"), place, name));
  index.splits.forEach((name, place) => option(at("split"), place, name));
  index.columns.forEach((name, place) => {
    option(at("column"), place, name);
    option(at("sort"), place, name);
  });
  at("compare").hidden = index.kind !== "pair";
  for (const id of FIELDS) defaults[id] = at(id).value;
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const id of FIELDS) if (asked.has(id)) at(id).value = asked.get(id);
  let waiting;
  for (const id of FIELDS)
    at(id).addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(update, id === "search" ? 200 : 0, 0);
    });
  at("differences").addEventListener("input", show);
  at("back").addEventListener("click", () => turn(first / PAGE - 1));
  at("forward").addEventListener("click", () => turn(first / PAGE + 1));
  at("page").addEventListener("change", () => turn((Number(at("page").value) || 1) - 1));
  document.addEventListener("keydown", (event) => {
    if (["INPUT", "SELECT"].includes(event.target.tagName) || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "ArrowLeft") turn(first / PAGE - 1);
    if (event.key === "ArrowRight") turn(first / PAGE + 1);
  });
  update((Number(asked.get("page")) || 1) - 1);
}

start();
