// What is shown (one state, S), the pickers and keys that change it, and the link that holds it.

const S = { scope: "prompt", order: "size", log: false, lock: false, mask: false, first: 1, zoom: 0, cell: null, hover: null, seen: null, theme: "" };
// first: how many tokens at the start the mask leaves out besides special ones
// cell is the one that was clicked, hover the one under the pointer, seen the last that was: {row, column} each
const sheetsOf = (s) => s.pair.sheets.filter((sheet) => sheet.variant === s.sheet.variant);
const viewsOf = (pair) => [["comparison", pair.comparisons], ["pass", pair.runs], ["effect", effectsOf(pair)]];
const dark = () => S.theme ? S.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;

const firstOf = (text) => /^\d{1,3}$/.test(text ?? "") ? Number(text) : 1; // whatever is no such number is the default

// ---- the link ----
function toHash() {
  const { cell, data } = S, out = new URLSearchParams({ pair: S.pair.name, prompt: S.sheet.prompt, show: S.view, metric: S.metric });
  if (S.sheet.variant !== "identity") out.set("variant", S.sheet.variant);
  for (const name of ["log", "lock", "mask"]) if (S[name]) out.set(name, "1");
  if (S.first !== 1) out.set("first", S.first);
  if (S.scope === "all") out.set("scope", "all");
  if (S.order === "z") out.set("order", "z");
  if (S.zoom) out.set("zoom", S.zoom);
  if (S.theme) out.set("theme", S.theme);
  if (cell) out.set("cell", `${data.sheet.layers[cell.row]}.${cell.column}`);
  return `#${out}`;
}

function fromHash() { // whatever the link does not say, or says wrongly, keeps its default
  const said = new URLSearchParams(location.hash.slice(1)), pick = (list, test) => list.find(test) ?? list[0];
  S.pair = pick(INDEX.pairs, (p) => p.name === said.get("pair"));
  const variant = said.get("variant") ?? "identity", prompt = said.get("prompt");
  S.sheet = pick(S.pair.sheets, (x) => String(x.prompt) === prompt && x.variant === variant);
  chooseView(said.get("show"), said.get("metric"));
  for (const name of ["log", "lock", "mask"]) S[name] = said.get(name) === "1";
  S.first = firstOf(said.get("first"));
  S.scope = said.get("scope") === "all" ? "all" : "prompt";
  S.order = said.get("order") === "z" ? "z" : "size";
  S.zoom = Math.min(3, Math.max(-4, parseInt(said.get("zoom"), 10) || 0));
  S.theme = ["light", "dark"].includes(said.get("theme")) ? said.get("theme") : "";
  const [layer, column] = (said.get("cell") ?? "").split(".").map(Number), row = S.sheet.layers.indexOf(layer);
  S.cell = row >= 0 && column >= 0 && column < S.sheet.tokens.length ? { row, column } : null;
  S.hover = S.seen = null;
}

// A view and a metric that the pair has: those asked for, else those that were, else the first.
function chooseView(view, metric) {
  const views = viewsOf(S.pair).flatMap(([, list]) => list);
  S.view = [view, S.view, "BB-SS"].find((v) => views.includes(v)) ?? views[0];
  const names = metricsOf(S.pair, S.view).map((m) => m.name);
  S.metric = [metric, S.metric, viewKind(S.view) === "comparison" ? "kl_divergence" : "norm"].find((m) => names.includes(m)) ?? names[0];
}

function remember() {
  const hash = toHash();
  if (location.hash === hash) return;
  try { history.replaceState(null, "", hash); } catch { location.hash = hash; }
}

// ---- drawing ----
const option = (value, text, chosen) => { const o = el("option", { value }, text); o.selected = chosen; return o; };
const press = (id, on) => { byId(id).setAttribute("aria-pressed", String(on)); };

function drawControls() {
  const cutText = (sheet) => `${sheet.prompt}${sheet.variant === "identity" ? "" : ` (${showText(sheet.variant)})`}: ${cut(showText(sheet.text.replace(/\s+/g, " ")), 60)}`;
  byId("pair").replaceChildren(...INDEX.pairs.map((p, i) => option(i, p.name, p === S.pair)));
  byId("prompt").replaceChildren(...S.pair.sheets.map((sheet, i) => option(i, cutText(sheet), sheet === S.sheet)));
  byId("view").replaceChildren(...viewsOf(S.pair).filter(([, list]) => list.length).map(([kind, list]) =>
    el("optgroup", { label: { comparison: "comparisons", pass: "passes", effect: "effects of the four passes" }[kind] }, ...list.map((v) => option(v, viewName(v), v === S.view)))));
  byId("metric").replaceChildren(...metricsOf(S.pair, S.view).map((m) => option(m.name, m.label || m.name, m.name === S.metric)));
  const { facts } = S.pair, base = (name) => String(name ?? "").split("/").filter(Boolean).slice(-2).join("/");
  byId("models").textContent = facts.base_model ? showText(`${base(facts.base_model)} against ${base(facts.sft_model)}`) : "";
  byId("text").textContent = showText(S.sheet.text);
  byId("lock").checked = S.lock;
  byId("mask").checked = S.mask;
  if (document.activeElement !== byId("first")) byId("first").value = S.first;
  press("linear", !S.log); press("log", S.log); press("by-size", S.order === "size"); press("by-z", S.order === "z");
  press("this-prompt", S.scope === "prompt"); press("all-prompts", S.scope === "all");
  document.documentElement.dataset.theme = S.theme;
  byId("theme").textContent = dark() ? "Light" : "Dark";
  document.title = `${S.pair.name}: ${S.metric} of ${viewName(S.view)}, prompt ${S.sheet.prompt} – pairscope`;
}

function drawHead() {
  const metric = metricOf(S), unit = unitOf(metric), { scale } = S;
  byId("grid-title").textContent = `${metric.label || metric.name}, ${viewName(S.view)}`;
  byId("grid-doc").textContent = metric.doc + (unit ? ` [${unit}]` : "");
  const colours = [0, 42, 85, 127, 170, 212, 255].map((i) => scale.css[i]);
  byId("bar").style.background = scale.empty ? "none" : `linear-gradient(to right, ${colours.join(", ")})`;
  const tick = (share) => `${share === 1 && scale.most > scale.high * 1.001 ? "≥ " : share === 0 && scale.least < scale.low ? "≤ " : ""}${show(scale.at(share), 2)}`;
  byId("bar-ticks").replaceChildren(...(scale.empty ? [] : [0, 0.5, 1].map((share) => el("span", {}, tick(share)))));
  const notes = [];
  if (scale.empty) notes.push(S.values?.some(Number.isFinite) ? "Every token that has a number is left out."
    : "No cell has a number: was the lens on, and this layer among lens.layers?");
  else if (scale.allZero) notes.push("Exactly zero everywhere: the two do not differ.");
  if (S.log && !scale.log) notes.push("No log scale: nothing is positive.");
  if (S.log && scale.signed) notes.push("Linear within a thousandth of zero.");
  if (S.floor) notes.push("Dots: below the noise floor.");
  notes.push(`emb: what enters block 0; norm: after the final norm.`);
  byId("grid-note").textContent = notes.join(" ");
  grid.canvas.setAttribute("aria-label", `${document.title}; layers by tokens, arrow keys move`);
  showSql("grid-sql", SQL.grid(S));
}

let ticket = 0;
async function update() {
  const mine = ++ticket;
  drawControls();
  const data = await openSheet(S.pair, S.sheet);
  if (mine !== ticket) return; // something else was chosen meanwhile
  S.data = data;
  S.hover = null; // the pointer read another prompt, pass or metric: it reads again when it moves
  byId("tip").hidden = true;
  // keys and clicks choose among the cells that are drawn, which were another sheet's until now
  for (const name of ["seen", "cell"]) if (S[name]?.row >= data.rows || S[name]?.column >= data.columns) S[name] = null;
  S.values = valuesOf(data, S.view, S.metric);
  S.left = maskOf(S.sheet, skipped(S));
  const floor = noiseFloor(data, S.view, S.metric);
  S.floor = floor && floor.some((v) => v > 0) ? floor : null;
  const kind = viewKind(S.view), views = S.lock ? viewsOf(S.pair).flatMap(([, list]) => list).filter((v) => viewKind(v) === kind) : [S.view];
  S.scale = makeScale(views.map((v) => ({ values: valuesOf(data, v, S.metric), columns: data.columns, left: S.left })), S.log, dark() ? "dark" : "light");
  layGrid(S);
  drawHead();
  drawGrid(S);
  remember();
  document.documentElement.dataset.first ??= String(Math.round(performance.now())); // ms until the first grid was drawn
  await new Promise((done) => setTimeout(done)); // the grid is seen before the rest is made
  if (mine !== ticket) return;
  drawCell(S);
  drawMarginals(S);
  drawProvenance(S);
  drawSpectrum(S);
  const many = S.scope === "all" ? await Promise.all(sheetsOf(S).map((sheet) => openSheet(S.pair, sheet))) : [data];
  if (mine !== ticket) return;
  const same = many.filter((d) => d.rows === data.rows);
  drawHotspots(S, same, jump);
  drawProfile(S, same);
  drawFour(S, same);
  document.documentElement.dataset.ready = toHash();
}

// ---- actions ----
S.select = (cell) => { S.cell = cell; S.hover = null; layGrid(S); if (cell) scrollToCell(cell); update(); };
S.show = (view) => { chooseView(view, S.metric); update(); };
const set = (changes) => { Object.assign(S, changes); update(); };
function takePair(pair) { S.pair = pair; S.sheet = pair.sheets.find((x) => x.prompt === S.sheet.prompt) ?? pair.sheets[0]; S.cell = S.seen = null; chooseView(S.view, S.metric); update(); }
function takeSheet(sheet) { S.sheet = sheet; if (S.cell?.column >= sheet.tokens.length) S.cell = null; S.seen = null; grid.scroller.scrollLeft = 0; update(); }
async function jump(i) {
  const spot = S.spots[i];
  if (spot.data.pair !== S.pair) return; // still the list of the pair before: its sheets would be shown as this one's
  jump.last = i;
  S.sheet = spot.data.sheet;
  S.seen = null;
  S.cell = { row: spot.row, column: spot.column };
  S.hover = null;
  await update();
  if (S.cell) scrollToCell(S.cell);
}
const step = (list, now, by) => list[(list.indexOf(now) + by + list.length) % list.length];

function move(dx, dy) {
  const { rows, columns } = S.data, at = S.cell ?? { row: dy > 0 ? -1 : 0, column: dx > 0 ? -1 : 0 };
  S.select({ row: Math.min(rows - 1, Math.max(0, at.row + dy)), column: Math.min(columns - 1, Math.max(0, at.column + dx)) });
}

const KEYS = {
  ArrowLeft: () => move(-1, 0), ArrowRight: () => move(1, 0), ArrowUp: () => move(0, 1), ArrowDown: () => move(0, -1),
  Escape: () => { S.seen = null; S.select(null); },
  p: () => takeSheet(step(S.pair.sheets, S.sheet, 1)), P: () => takeSheet(step(S.pair.sheets, S.sheet, -1)),
  c: () => S.show(step(viewsOf(S.pair).flatMap(([, l]) => l), S.view, 1)), C: () => S.show(step(viewsOf(S.pair).flatMap(([, l]) => l), S.view, -1)),
  m: () => set({ metric: step(metricsOf(S.pair, S.view).map((m) => m.name), S.metric, 1) }), M: () => set({ metric: step(metricsOf(S.pair, S.view).map((m) => m.name), S.metric, -1) }),
  h: () => S.spots?.length && jump(((jump.last ?? -1) + 1) % S.spots.length), H: () => S.spots?.length && jump(((jump.last ?? 0) - 1 + S.spots.length) % S.spots.length),
  z: () => set({ order: S.order === "z" ? "size" : "z" }), l: () => set({ log: !S.log }), s: () => set({ lock: !S.lock }), x: () => set({ mask: !S.mask }),
  a: () => set({ scope: S.scope === "all" ? "prompt" : "all" }), t: () => set({ theme: dark() ? "light" : "dark" }),
  "+": () => set({ zoom: Math.min(S.zoom + 1, 3) }), "=": () => set({ zoom: Math.min(S.zoom + 1, 3) }), "-": () => set({ zoom: Math.max(S.zoom - 1, -4) }),
  "?": () => byId("keys").showModal(),
};
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open || !S.data) return;
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "checkbox") return;
  const key = KEYS[event.key];
  if (!key) return;
  event.preventDefault();
  key();
});

const on = (id, event, act) => byId(id).addEventListener(event, act);
on("pair", "change", (e) => takePair(INDEX.pairs[e.target.value]));
on("prompt", "change", (e) => takeSheet(S.pair.sheets[e.target.value]));
on("view", "change", (e) => S.show(e.target.value));
on("metric", "change", (e) => set({ metric: e.target.value }));
on("lock", "change", (e) => set({ lock: e.target.checked }));
on("mask", "change", (e) => set({ mask: e.target.checked }));
on("first", "change", (e) => { e.target.value = firstOf(e.target.value); set({ mask: true, first: firstOf(e.target.value) }); });
for (const [id, changes] of Object.entries({ linear: { log: false }, log: { log: true }, "by-size": { order: "size" }, "by-z": { order: "z" },
  "this-prompt": { scope: "prompt" }, "all-prompts": { scope: "all" } })) on(id, "click", () => { jump.last = undefined; set(changes); });
on("narrower", "click", KEYS["-"]);
on("wider", "click", KEYS["+"]);
on("theme", "click", KEYS.t);
on("help", "click", KEYS["?"]);
on("link", "click", async () => {
  remember();
  try { await navigator.clipboard.writeText(location.href); byId("link").textContent = "Copied"; } catch { byId("link").textContent = "See address"; }
  setTimeout(() => { byId("link").textContent = "Link"; }, 1500);
});

function hover(cell, event) {
  const changed = cell?.row !== S.hover?.row || cell?.column !== S.hover?.column, tip = byId("tip");
  S.hover = cell;
  S.seen = cell ?? S.seen;
  tip.hidden = !cell;
  if (cell) {
    const { data } = S, value = S.values?.[cell.row * data.columns + cell.column];
    if (changed) tip.replaceChildren(el("span", { class: "token" }, showToken(data.sheet.tokens[cell.column])), ` ${layerWords(data, cell.row)}`, el("b", {}, show(value)));
    const right = event.clientX > innerWidth - 220;
    tip.style.transform = `translate(${Math.round(event.clientX + (right ? -tip.offsetWidth - 12 : 14))}px, ${Math.round(event.clientY + 16)}px)`;
  }
  if (!changed) return;
  drawGrid(S);
  drawCell(S);
}
grid.canvas.addEventListener("pointermove", (event) => { if (S.data && event.pointerType !== "touch") hover(cellAt(S, event), event); });
grid.canvas.addEventListener("pointerleave", () => S.data && hover(null));
grid.canvas.addEventListener("click", (event) => { const cell = S.data && cellAt(S, event); if (cell) { S.cell = cell; update(); } });
grid.scroller.addEventListener("scroll", () => S.data && drawGrid(S), { passive: true });
addEventListener("hashchange", () => { if (location.hash !== toHash()) { fromHash(); update(); } });
let resized;
addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(update, 60); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", update);

fromHash();
update().then(() => { if (S.cell) scrollToCell(S.cell); });
