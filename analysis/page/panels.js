// The panels around the grid: cell, hotspots, profile, marginals, the 2 x 2, spectrum, provenance. Texts go in as text only.

function el(tag, options = {}, ...children) {
  const node = document.createElement(tag), { class: name, ...rest } = options;
  if (name) node.className = name;
  for (const [key, value] of Object.entries(rest))
    key.startsWith("on") ? node.addEventListener(key.slice(2), value) : node.setAttribute(key, value);
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}

const metricOf = (s) => metricsOf(s.pair, s.view).find((m) => m.name === s.metric);
const UNITS = { residual: "residual units", logit: "logits" };
const unitOf = (metric) => metric.unit && metric.unit !== "1" ? UNITS[metric.unit] ?? metric.unit : "";
const scopeWords = (s) => (s.scope === "prompt" ? `prompt ${s.sheet.prompt}` : `${sheetsOf(s).length} prompts`) +
  (s.mask ? `, without ${s.first === 1 ? "first" : `first ${s.first}`} and special tokens`.replace("first 0 and ", "") : "");
const skipped = (s) => s.mask ? s.first : null; // as maskOf wants it
const showSql = (id, text) => { byId(id).querySelector("pre").textContent = text; };

async function drawCell(s) {
  const cell = s.hover || s.cell || s.seen, host = byId("cell"), { data } = s;
  const ticket = (drawCell.ticket = (drawCell.ticket || 0) + 1);
  if (!cell) {
    host.replaceChildren(el("p", { class: "hint" }, "Point at a cell to read it. Click it to keep it and to see its row and column."));
    showSql("cell-sql", "");
    return;
  }
  const i = cell.row * data.columns + cell.column, kind = viewKind(s.view);
  const lists = await listsOf(data, s.view, i);
  if (ticket !== drawCell.ticket) return; // another cell came meanwhile
  const rows = [];
  const add = (name, value, unit, main) => rows.push(el("tr", main ? { class: "main" } : {},
    el("th", { scope: "row" }, name), el("td", {}, typeof value === "string" ? value : show(value, 5)), el("td", { class: "unit" }, unit)));
  for (const metric of metricsOf(s.pair, s.view)) {
    const values = valuesOf(data, s.view, metric.name);
    if (values) add(metric.label || metric.name, metric.type === "bool" && values[i] >= 0 ? ["no", "yes"][values[i]] : values[i], metric.unit.replace(/^1$/, ""), metric.name === s.metric);
  }
  if (kind === "comparison")
    for (const run of SIDES.get(s.view))
      for (const name of ["norm", "entropy"])
        if (data.get(`${run} ${name}`)) add(`${name} of ${run}`, data.get(`${run} ${name}`)[i], name === "norm" ? "residual" : "nats");
  if (kind === "effect")
    for (const run of FOUR) if (data.get(`${run} ${s.metric}`)) add(`${s.metric} of ${run}`, data.get(`${run} ${s.metric}`)[i], "");
  const next = data.sheet.tokens[cell.column + 1];
  const text = (id) => s.pair.texts[id], nextId = data.sheet.ids[cell.column + 1] ?? -1;
  // texts tell no byte from another: alone, each is U+FFFD; they count where an imported file says no ids
  const isNext = (id) => nextId < 0 ? text(id) !== undefined && text(id) === next : id === nextId;
  const listNodes = (lists || []).map(([title, found]) => el("div", {}, el("h4", {}, title), el("ol", {},
    ...found.map(([id, value]) => el("li", isNext(id) ? { class: "next" } : {},
      el("span", { class: "token", title: `token ${id}` }, text(id) === undefined ? `#${id}` : showToken(text(id))), el("span", {}, show(value, 3)))))));
  const floor = s.floor && Math.abs(s.values?.[i]) <= s.floor[cell.row];
  host.replaceChildren(...[
    el("p", { class: "where" }, el("span", { class: "token big" }, showToken(data.sheet.tokens[cell.column])), ` token ${cell.column}, ${layerWords(data, cell.row)}`),
    el("table", {}, el("tbody", {}, ...rows)),
    floor ? el("p", { class: "hint" }, "No more than batching alone moves: below the noise floor.") : null,
    el("div", { class: "lists" }, ...listNodes),
    !lists && kind !== "effect" ? el("p", { class: "hint" }, s.pair.has_lists ? "The token lists of this prompt are not in this page (--max-mb, --top-k)." : "This capture has no token lists.") : null,
    next !== undefined && listNodes.length ? el("p", { class: "hint" }, "Next in the prompt: ", el("span", { class: "token" }, showToken(next))) : null].filter(Boolean));
  showSql("cell-sql", kind === "effect" ? SQL.grid(s) : SQL.lists(s, data.sheet.layers[cell.row], cell.column));
}

const SPOTS = 12;
function drawHotspots(s, many, jump) {
  s.spots = hotspots(many, s.view, s.metric, skipped(s), s.order, SPOTS);
  byId("spots").replaceChildren(...s.spots.map((spot, i) => el("li", {},
    el("button", { type: "button", onclick: () => jump(i), title: `prompt ${spot.data.sheet.prompt}, ${layerWords(spot.data, spot.row)}, token ${spot.column}` },
      el("span", { class: "token" }, showToken(spot.data.sheet.tokens[spot.column])),
      el("span", { class: "at" }, `${s.scope === "all" ? `p${spot.data.sheet.prompt} ` : ""}${layerName(spot.data, spot.row)} : ${spot.column}`),
      el("span", { class: "value" }, show(spot.value, 3)), el("span", { class: "z" }, show(spot.z, 2))))));
  byId("spots-none").hidden = s.spots.length > 0;
  byId("spots-none").textContent = s.order === "z" ? "No cell stands out within its layer." : "No cell has a number other than zero.";
  byId("spots-scope").textContent = scopeWords(s);
  showSql("spots-sql", SQL.hotspots(s, SPOTS));
}

function drawProfile(s, many) {
  const found = profile(many, s.view, s.metric, skipped(s)), labels = found.layers.map((_, row) => layerName(s.data, row));
  byId("profile-scope").textContent = scopeWords(s);
  chart(byId("profile"), { labels, xTitle: "layer", unit: unitOf(metricOf(s)), lines: [{ name: "median", values: found.p50 }],
    band: { low: found.p10, high: found.p90, name: "p10 to p90" }, mark: s.cell?.row ?? null, log: s.log, pick: (row) => s.select({ row, column: s.cell?.column ?? 0 }) });
  showSql("profile-sql", SQL.profile(s));
}

function drawMarginals(s) {
  const { data, values, cell } = s;
  byId("marginals").hidden = !cell;
  if (!cell) return;
  const row = Array.from({ length: data.columns }, (_, j) => values?.[cell.row * data.columns + j]);
  const column = Array.from({ length: data.rows }, (_, l) => values?.[l * data.columns + cell.column]);
  const unit = unitOf(metricOf(s)), clean = (list) => list.map((v) => v ?? NaN);
  byId("by-token-title").textContent = `${layerWords(data, cell.row)}, over tokens`.replace(/^l/, "L");
  byId("by-layer-title").replaceChildren("Token ", el("span", { class: "token" }, showToken(data.sheet.tokens[cell.column])), ` (${cell.column}), over layers`);
  chart(byId("by-token"), { labels: grid.labels, tokens: true, xTitle: "token", unit, lines: [{ name: s.metric, values: clean(row) }],
    mark: cell.column, log: s.log, pick: (j) => s.select({ row: cell.row, column: j }) });
  chart(byId("by-layer"), { labels: column.map((_, l) => layerName(data, l)), xTitle: "layer", unit, lines: [{ name: s.metric, values: clean(column) }],
    mark: cell.row, log: s.log, pick: (l) => s.select({ row: l, column: cell.column }) });
  showSql("by-token-sql", SQL.byToken(s, data.sheet.layers[cell.row]));
  showSql("by-layer-sql", SQL.byLayer(s, cell.column));
}

// The 2 x 2: passes at the corners, and along its sides what embeddings or blocks alone change.
const CORNERS = { BB: [60, 172], SB: [240, 172], BS: [60, 38], SS: [240, 38] };
const EDGES = [["BB-SB", "embeddings", 150, 188], ["BS-SS", "embeddings2", 150, 30], ["BB-BS", "blocks", 46, 105], ["SB-SS", "blocks2", 254, 105], ["BB-SS", "both", 150, 112]];

function drawFour(s, many) {
  const comparison = viewKind(s.view) === "comparison", host = byId("square"), { data } = s;
  byId("four").hidden = !hasFour(s.pair);
  if (!hasFour(s.pair)) return;
  const mean = (view) => profile(many, view, s.metric, skipped(s)).mean;
  const at = (view, means) => {
    const values = s.cell && valuesOf(data, view, s.metric);
    if (values) return values[s.cell.row * data.columns + s.cell.column];
    const finite = means.filter(Number.isFinite);
    return finite.length ? finite.reduce((a, b) => a + b, 0) / finite.length : NaN;
  };
  const means = {}, root = svg("svg", { viewBox: "0 0 300 214", class: "square", role: "img", "aria-label": "the four passes and their comparisons" });
  for (const name of comparison ? EDGES.map((e) => e[0]).filter((n) => s.pair.comparisons.includes(n)) : [...FOUR, ...effectsOf(s.pair)]) means[name] = mean(name);
  svg("text", { x: 150, y: 210, "text-anchor": "middle", class: "axis" }, root, "embeddings: base, fine-tune →");
  svg("text", { transform: "translate(12 105) rotate(-90)", "text-anchor": "middle", class: "axis" }, root, "blocks: base, fine-tune →");
  for (const [name, style, x, y] of EDGES) {
    const [a, b] = name.split("-").map((run) => CORNERS[run]), known = s.pair.comparisons.includes(name);
    const group = svg("g", { class: `edge ${style}${s.view === name ? " on" : ""}${known ? " pick" : ""}` }, root);
    svg("line", { x1: a[0], y1: a[1], x2: b[0], y2: b[1] }, group);
    if (known) svg("line", { x1: a[0], y1: a[1], x2: b[0], y2: b[1], class: "target" }, group);
    if (comparison && means[name]) {
      const words = show(at(name, means[name]), 3), anchor = x < 50 ? "end" : x > 250 ? "start" : "middle";
      svg("text", { x: anchor === "end" ? 54 : anchor === "start" ? 246 : x, y, "text-anchor": anchor === "end" ? "start" : anchor === "start" ? "end" : "middle", class: "halo" }, group, words);
    }
    if (known) group.addEventListener("click", () => s.show(name));
  }
  for (const [run, [x, y]] of Object.entries(CORNERS)) {
    const group = svg("g", { class: `corner pick${s.view === run ? " on" : ""}` }, root);
    svg("rect", { x: x - 24, y: y - 17, width: 48, height: 34, rx: 8 }, group);
    svg("text", { x, y: comparison ? y + 4 : y - 2, "text-anchor": "middle", class: "run" }, group, run);
    if (!comparison) svg("text", { x, y: y + 11, "text-anchor": "middle", class: "small" }, group, show(at(run, means[run]), 3));
    group.addEventListener("click", () => s.show(run));
  }
  host.replaceChildren(root);
  byId("square-words").textContent = s.cell ? `${s.metric} at ${layerWords(data, s.cell.row)}, token ${s.cell.column}` : `${s.metric}, mean over layers and tokens of ${scopeWords(s)}`;
  byId("effects").replaceChildren(...(comparison ? [] : effectsOf(s.pair).map((name) => el("button", { type: "button", class: `effect ${name}${s.view === name ? " on" : ""}`, onclick: () => s.show(name) },
    el("span", {}, name), el("b", {}, show(at(name, means[name]), 3))))));
  const labels = data.sheet.layers.map((_, row) => layerName(data, row));
  const edges = EDGES.filter(([name]) => name in means).map(([name, style]) => ({ name, values: means[name], style }));
  const effects = effectsOf(s.pair).map((name) => ({ name, values: means[name], style: name }));
  chart(byId("four-chart"), { labels, xTitle: "layer", unit: unitOf(metricOf(s)), lines: comparison ? edges : effects, log: s.log && comparison, mark: s.cell?.row ?? null, height: 210 });
  byId("four-words").textContent = comparison
    ? "Embeddings alone exchanged (BB-SB under base's blocks, BS-SS under the fine-tune's), blocks alone exchanged (BB-BS, SB-SS), and both (BB-SS). Mean over tokens."
    : "Embeddings: mean of SB−BB and SS−BS. Blocks: mean of BS−BB and SS−SB. Interaction: SS−SB−BS+BB. Mean over tokens.";
  showSql("four-sql", SQL.four(s, comparison ? edges.map((e) => e.name) : FOUR));
}

async function drawSpectrum(s) {
  const ticket = (drawSpectrum.ticket = (drawSpectrum.ticket || 0) + 1), { spectrum } = s.pair, name = `${s.sheet.variant} ${s.view}`, panel = byId("spectrum-panel");
  panel.hidden = !spectrum || !spectrum.arrays[`${name} effective_rank`];
  if (panel.hidden) return;
  const get = await open_(spectrum.block, spectrum.arrays), n = spectrum.layers.length, { k } = spectrum;
  if (ticket !== drawSpectrum.ticket) return; // another pair or comparison came meanwhile
  const take = (measure) => Array.from(get(`${name} ${measure}`, n)), labels = spectrum.layers.map((layer) => layer < 0 ? "emb" : layer === s.pair.facts.n_layers ? "norm" : String(layer));
  const row = s.cell ? spectrum.layers.indexOf(s.data.sheet.layers[s.cell.row]) : n - 1;
  const all = get(`${name} singular_values`, n * k), values = Array.from(all.slice(row * k, (row + 1) * k)).filter(Number.isFinite);
  const pick = (at) => s.select({ row: s.data.sheet.layers.indexOf(spectrum.layers[at]), column: s.cell?.column ?? 0 });
  chart(byId("spectrum-ranks"), { labels, xTitle: "layer", pick, mark: row, lines: [{ name: "effective rank", values: take("effective_rank") }, { name: "participation ratio", values: take("participation_ratio"), style: "blocks" }] });
  chart(byId("spectrum-shift"), { labels, xTitle: "layer", pick, mark: row, legend: true, lines: [{ name: "share of the mean shift", values: take("mean_shift_share") }] });
  chart(byId("spectrum-values"), { labels: values.map((_, i) => String(i + 1)), xTitle: "number", unit: UNITS.residual, log: values.some((v) => v > 0), lines: [{ name: "singular value", values }] });
  byId("spectrum-layer").textContent = `Largest singular values, layer ${labels[row]}`;
  showSql("spectrum-sql", SQL.spectrum(s));
}

function drawProvenance(s) {
  const { facts } = s.pair, minutes = facts.seconds >= 100 ? `${Math.round(facts.seconds / 60)} min` : `${show(facts.seconds, 3)} s`;
  const left = s.pair.prompts_total - s.pair.sheets.length, floor = Object.values(s.pair.noise).flatMap((run) => run.norm_diff_relative || []);
  const rows = [["base", `${facts.base_model ?? "–"}  ${facts.base_revision ?? ""}`], ["fine-tune", `${facts.sft_model ?? "–"}  ${facts.sft_revision ?? ""}`],
    ["tokenizer", facts.tokenizer], ["capture", s.pair.capture + (facts.complete ? "" : " (not complete)")], ["written", facts.written && `${facts.written.slice(0, 19).replace("T", " ")} UTC`],
    ["computed", [facts.dtype, facts.mode, facts.gpu || facts.device, facts.seconds === null ? null : minutes].filter(Boolean).join(", ")],
    ["lens", facts.lens_norm === null ? null : facts.lens_norm === "final" ? "final norm, then unembedding" : "unembedding alone, no norm"],
    ["noise floor", floor.length ? `${show(Math.max(...floor), 3)} of a state's norm: what batching alone moves at most` : null],
    ["in this page", `${s.pair.sheets.length} of ${s.pair.prompts_total} prompts${left ? " (--max-mb, --prompts or --top-prompts left out the rest)" : ""}; comparisons as float16, about three digits, passes as float32`],
    ["page made", `${INDEX.made.slice(0, 19).replace("T", " ")} UTC`]];
  byId("facts").replaceChildren(...rows.filter(([, v]) => v).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, showText(value))]));
}
