// Numbers of the page: blocks of base64 -> gzip -> arrays, and what is made from them.
// A sheet is one prompt of one pair; a figure of it is a view and a metric, one number per layer and token.

const INDEX = JSON.parse(document.getElementById("index").textContent);
const byId = (id) => document.getElementById(id);

const HALF = new Float32Array(65536); // float16 -> number, since Float16Array is young
for (let i = 0; i < 65536; i++) {
  const exponent = (i >> 10) & 31, fraction = i & 1023;
  const size = exponent === 31 ? (fraction ? NaN : Infinity)
    : exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction;
  HALF[i] = i >> 15 ? -size : size;
}

// The element of a block, once it is read to its end: the page draws while later blocks are still coming.
async function blockElement(id) {
  while (!byId(id)?.nextElementSibling && document.readyState === "loading")
    await new Promise((done) => setTimeout(done, 10));
  return byId(id);
}

async function inflate(id) {
  const text = (await blockElement(id)).textContent;
  let bytes;
  if (Uint8Array.fromBase64) bytes = Uint8Array.fromBase64(text);
  else {
    const raw = atob(text);
    bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  }
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Array `name` of n numbers in a block; undefined where the block has none of that name. Bytes of equal weight lie together.
function unpack(bytes, places, name, n) {
  if (!places[name]) return undefined;
  const [type, offset, scale] = places[name];
  const plane = (k) => bytes.subarray(offset + k * n, offset + (k + 1) * n);
  if (type === "f2") {
    const out = new Float32Array(n), low = plane(0), high = plane(1);
    for (let i = 0; i < n; i++) out[i] = HALF[low[i] | (high[i] << 8)] * scale;
    return out;
  }
  const words = new Uint32Array(n), [a, b, c, d] = [plane(0), plane(1), plane(2), plane(3)];
  for (let i = 0; i < n; i++) words[i] = (a[i] | (b[i] << 8) | (c[i] << 16) | (d[i] << 24)) >>> 0;
  return type === "u4" ? words : new Float32Array(words.buffer);
}

// The arrays of a sheet, its lists, or a pair's spectrum; unpacked once. Only the last few sheets stay in memory.
const opened = new Map();
function open_(block, places) {
  if (!opened.has(block)) {
    const arrays = {};
    opened.set(block, inflate(block).then((bytes) =>
      (name, n) => name in arrays ? arrays[name] : (arrays[name] = unpack(bytes, places, name, n))));
    if (opened.size > 60) opened.delete(opened.keys().next().value);
  }
  return opened.get(block);
}

async function openSheet(pair, sheet) {
  const get = await open_(sheet.block, sheet.arrays), n = sheet.layers.length * sheet.tokens.length;
  return { pair, sheet, n, rows: sheet.layers.length, columns: sheet.tokens.length, get: (name) => get(name, n) };
}

// ---- views and metrics ----
// A view is a comparison (BB-SS), a pass (BB) or an effect of the four passes (effect of embeddings).
const EFFECTS = {
  embeddings: { SB: 0.5, BB: -0.5, SS: 0.5, BS: -0.5 },
  blocks: { BS: 0.5, BB: -0.5, SS: 0.5, SB: -0.5 },
  interaction: { SS: 1, SB: -1, BS: -1, BB: 1 },
};
const FOUR = ["BB", "BS", "SB", "SS"];
const hasFour = (pair) => FOUR.every((run) => pair.runs.includes(run));
// Comparison -> its two passes. An imported pass may have a hyphen in its own name, so both sides must be passes.
function sidesOf(name, runs) {
  const cuts = [...name.matchAll(/-/g)].map(({ index }) => [name.slice(0, index), name.slice(index + 1)]);
  return cuts.find((two) => two.every((run) => runs.includes(run))) ?? cuts[0];
}
const SIDES = new Map(INDEX.pairs.flatMap((pair) => pair.comparisons.map((name) => [name, sidesOf(name, pair.runs)])));
// A pass may have the name of an effect: where the pair has one, that is meant.
const isEffect = (view) => Object.hasOwn(EFFECTS, view) && !S.pair.runs.includes(view);
const effectsOf = (pair) => hasFour(pair) ? Object.keys(EFFECTS).filter((name) => !pair.runs.includes(name)) : [];
const viewKind = (view) => isEffect(view) ? "effect" : SIDES.has(view) ? "comparison" : "run";
const viewName = (view) => isEffect(view) ? { embeddings: "effect of embeddings", blocks: "effect of blocks",
  interaction: "interaction of embeddings and blocks" }[view] : view;

// Differences of two passes that are made here: metric -> the column of passes, the weight of base_run, that of sft_run.
const MADE = { norm_delta: ["norm", 1, -1], entropy_delta: ["entropy", 1, -1] };

function metricsOf(pair, view) {
  const logits = pair.tracked.map((t) => ({ name: `logit ${t.token_id}`, label: `logit of ${showText(t.label)}`, unit: "logit",
    doc: `lens logit of the tracked token ${t.token_id} (${showText(t.label)})${viewKind(view) === "comparison" ? ", base_run minus sft_run" : ""}` }));
  const list = viewKind(view) === "comparison" ? [...INDEX.metrics.pairwise, ...INDEX.metrics.joined] : INDEX.metrics.runs;
  return [...list, ...logits];
}

function combine(n, parts, f) { // f of equal cells of several arrays; undefined where one is missing
  if (parts.some((p) => !p)) return undefined;
  const out = new Float64Array(n);
  for (let i = 0; i < n; i++) out[i] = f(...parts.map((p) => p[i]));
  return out;
}

// One number per cell, layer by layer; undefined where the capture has none.
function valuesOf(data, view, metric) {
  const kind = viewKind(view);
  if (kind === "effect") {
    const weights = EFFECTS[view], runs = Object.keys(weights);
    return combine(data.n, runs.map((run) => data.get(`${run} ${metric}`)),
      (a, b, c, d) => weights[runs[0]] * a + weights[runs[1]] * b + weights[runs[2]] * c + weights[runs[3]] * d);
  }
  const [base, sft] = SIDES.get(view) ?? [view];
  if (kind === "comparison") {
    if (metric === "norm_diff_relative")
      return combine(data.n, [data.get(`${view} norm_diff`), data.get(`${base} norm`)], (d, n) => n ? d / n : NaN);
    const [source, b, t] = MADE[metric] ?? (metric.startsWith("logit ") ? [metric, 1, -1] : []);
    if (source) return combine(data.n, [data.get(`${base} ${source}`), data.get(`${sft} ${source}`)], (x, y) => b * x + t * y);
  }
  return data.get(`${view} ${metric}`);
}

// What batching alone moves, per layer, in the larger of a comparison's two passes; null where it was not measured.
function noiseFloor(data, view, metric) {
  if (viewKind(view) !== "comparison") return null;
  const [a, b] = SIDES.get(view).map((run) => data.pair.noise?.[run]?.[metric]);
  // the lists have all layers from -1, the sheet those that the config kept
  return a && b ? data.sheet.layers.map((layer) => Math.max(a[layer + 1] ?? 0, b[layer + 1] ?? 0)) : null;
}

// The two or four top-k lists of a cell: [title, [[token id, number], ...]]; null where the page does not carry them.
async function listsOf(data, view, cell) {
  const { sheet } = data, k = sheet.k;
  if (!sheet.list_block || viewKind(view) === "effect") return null;
  const get = await open_(sheet.list_block, sheet.lists);
  const list = (label, name) => {
    const ids = get(`${label} ${name} ids`, data.n * k), values = get(`${label} ${name}`, data.n * k), rows = [];
    for (let i = cell * k; ids && i < (cell + 1) * k; i++) if (ids[i] !== 0xffffffff) rows.push([ids[i], values[i]]);
    return rows;
  };
  const [base, sft] = SIDES.get(view) ?? [view];
  const lists = sft ? [[`rose, ${base} to ${sft}`, list(view, "up")], [`fell, ${base} to ${sft}`, list(view, "down")],
    [`${base} predicts`, list(base, "top")], [`${sft} predicts`, list(sft, "top")]] : [[`${base} predicts`, list(base, "top")]];
  return lists.filter(([, rows]) => rows.length);
}

// Columns that hotspots, profiles and the colour scale leave out: special tokens and the first few; none where first is null.
const maskOf = (sheet, first) => new Set(first === null ? [] : [...Array(first).keys(), ...sheet.special]);

function quantile(sorted, q) {
  if (!sorted.length) return NaN;
  const place = q * (sorted.length - 1), i = Math.floor(place), rest = place - i;
  return rest ? sorted[i] * (1 - rest) + sorted[i + 1] * rest : sorted[i];
}

// Per layer over the tokens of some sheets: p10, median, p90, mean and standard deviation.
const profiles = new Map(); // those made last: three panels ask for the same ones
function profile(many, view, metric, first) {
  const key = JSON.stringify([many.map((data) => data.sheet.block), view, metric, first]);
  if (!profiles.has(key)) {
    if (profiles.size > 30) profiles.clear();
    profiles.set(key, makeProfile(many, view, metric, first));
  }
  return profiles.get(key);
}

function makeProfile(many, view, metric, first) {
  const out = { layers: many[0].sheet.layers, p10: [], p50: [], p90: [], mean: [], std: [] };
  const all = many.map((data) => [data, valuesOf(data, view, metric), maskOf(data.sheet, first)]);
  const room = new Float64Array(many.reduce((n, data) => n + data.columns, 0));
  for (let row = 0; row < many[0].rows; row++) {
    let n = 0, sum = 0, squares = 0;
    for (const [data, values, left] of all)
      for (let j = 0; values && j < data.columns; j++) {
        const v = values[row * data.columns + j];
        if (!left.has(j) && Number.isFinite(v)) sum += room[n++] = v;
      }
    const found = room.subarray(0, n).sort(), mean = sum / n;
    for (const v of found) squares += (v - mean) ** 2;
    out.mean.push(mean);
    out.std.push(found[n - 1] > found[0] ? Math.sqrt(squares / n) : 0); // the mean of equal values is rounded, and off
    for (const [name, q] of [["p10", 0.1], ["p50", 0.5], ["p90", 0.9]]) out[name].push(quantile(found, q));
  }
  return out;
}

// The row of a sheet that hotspots of a metric leave out: where the lens says the same at the last two layers, the last; else -1.
const ofLens = (metric) => ["nats", "logit"].includes(metric?.unit) || metric?.name === "top1_agree";
const twinLayer = (pair, view, metric) => ofLens(metricsOf(pair, view).find((m) => m.name === metric)) ? pair.facts.twin_layer ?? null : null;
const twinRow = (data, view, metric) => data.sheet.layers.indexOf(twinLayer(data.pair, view, metric));

// The n cells of largest magnitude, or of largest |z| within their layer, over some sheets.
function hotspots(many, view, metric, first, order, n) {
  const { mean, std } = profile(many, view, metric, first), best = []; // falling
  for (const data of many) {
    const values = valuesOf(data, view, metric), left = maskOf(data.sheet, first), twin = twinRow(data, view, metric);
    for (let i = 0; values && i < data.n; i++) {
      const row = Math.floor(i / data.columns), column = i % data.columns, value = values[i];
      if (row === twin || left.has(column) || !Number.isFinite(value)) continue;
      const z = std[row] > 0 ? (value - mean[row]) / std[row] : 0, key = Math.abs(order === "z" ? z : value);
      if (!(key > 0) || (best.length === n && key <= best[n - 1].key)) continue;
      const at = best.findIndex((other) => other.key < key);
      best.splice(at < 0 ? best.length : at, 0, { data, row, column, value, z, key });
      best.length = Math.min(best.length, n);
    }
  }
  return best;
}
