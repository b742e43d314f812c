// Small line charts in SVG: lines over layers or tokens, a band, a crosshair that reads the numbers out.

function svg(tag, attributes = {}, parent = null, text = null) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  parent?.append(node);
  return node;
}

function niceTicks(low, high, n = 4) {
  const raw = (high - low) / n, size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * size).find((v) => v >= raw) ?? size * 10, ticks = [];
  for (let t = Math.ceil(low / step); t * step <= high + step * 1e-9; t++) ticks.push(t * step);
  return ticks;
}

function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)), every = Math.ceil((last - first) / 5) || 1, ticks = [];
  for (let e = first; e <= last; e += every) if (10 ** e >= low * 0.999 && 10 ** e <= high * 1.001) ticks.push(10 ** e);
  return ticks.length > 1 ? ticks : niceTicks(low, high, 3).filter((t) => t > 0);
}

// host: an element. labels: text of each x. lines: [{name, values, style}], style a class of CSS. band: {low, high, name}.
// mark: an x to point out. pick(i): called on a click. log: where all numbers are positive.
function chart(host, { labels, xTitle, unit = "", lines, band, mark = null, pick, log = false, height = 190, tokens = false, legend = lines.length > 1 }) {
  host.replaceChildren();
  const numbers = [...lines.flatMap((l) => l.values), ...(band ? [...band.low, ...band.high] : [])].filter(Number.isFinite);
  const readout = document.createElement("p");
  readout.className = "readout";
  if (!numbers.length) {
    readout.textContent = "no numbers here";
    host.append(readout);
    return;
  }
  const n = labels.length, width = Math.max(host.clientWidth, 240);
  const vertical = tokens && (width - 60) / n >= 11, bottom = vertical ? 70 : 34, pad = { l: 52, r: 18, t: 8, b: bottom };
  const full = height + (vertical ? 36 : 0);
  let low = numbers.reduce((a, b) => Math.min(a, b)), high = numbers.reduce((a, b) => Math.max(a, b));
  const useLog = log && high > 0 && low >= 0;
  if (useLog) {
    const positive = numbers.filter((v) => v > 0);
    low = Math.max(positive.reduce((a, b) => Math.min(a, b)), high / 1e6);
    if (high <= low * (1 + 1e-12)) high = low * 10; // quantiles of equal numbers may differ in their last bit
  } else {
    if (low > 0 && low < high * 0.6) low = 0;
    if (high < 0 && high > low * 0.6) high = 0;
    if (high - low <= 1e-12 * Math.max(high, -low)) [low, high] = [Math.min(low, 0), high > 0 ? high : low < 0 ? 0 : 1];
  }
  const x = (i) => pad.l + (n < 2 ? 0.5 : i / (n - 1)) * (width - pad.l - pad.r);
  const share = (v) => useLog ? Math.log(Math.max(v, low) / low) / Math.log(high / low) : (v - low) / (high - low);
  const y = (v) => full - pad.b - share(v) * (full - pad.t - pad.b);
  const root = svg("svg", { viewBox: `0 0 ${width} ${full}`, width, height: full, role: "img", "aria-label": lines.map((l) => l.name).join(", ") });
  for (const t of useLog ? logTicks(low, high) : niceTicks(low, high)) {
    svg("line", { x1: pad.l, x2: width - pad.r, y1: y(t), y2: y(t), class: t === 0 ? "zero" : "rule" }, root);
    svg("text", { x: pad.l - 7, y: y(t) + 3.5, "text-anchor": "end" }, root, show(t, 3));
  }
  const every = Math.max(1, Math.ceil(n / Math.floor((width - 64) / (vertical ? 11 : 34))));
  for (let i = 0; i < n; i += every) {
    if (vertical) svg("text", { transform: `translate(${x(i) + 3.5} ${full - pad.b + 8}) rotate(-90)`, "text-anchor": "end", class: "mono" }, root, cut(labels[i], 9));
    else svg("text", { x: x(i), y: full - pad.b + 15, "text-anchor": "middle" }, root, tokens ? i : labels[i]);
  }
  if (!vertical) svg("text", { x: width - pad.r, y: full - 4, "text-anchor": "end", class: "title" }, root, xTitle);
  const path = (values, back = []) => {
    let out = "", pen = false;
    for (const [i, v] of [...values.map((v, i) => [i, v]), ...back.map((v, i) => [i, v]).reverse()]) {
      if (!Number.isFinite(v)) { pen = pen && back.length > 0; continue; }
      out += `${pen ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}`;
      pen = true;
    }
    return out;
  };
  if (band) svg("path", { d: `${path(band.low, band.high)}Z`, class: "band" }, root);
  for (const line of lines) {
    svg("path", { d: path(line.values), class: `line ${line.style || ""}` }, root);
    if (line.values.filter(Number.isFinite).length < 40)
      line.values.forEach((v, i) => Number.isFinite(v) && svg("circle", { cx: x(i), cy: y(v), r: 2, class: `dot ${line.style || ""}` }, root));
  }
  const cross = svg("line", { y1: pad.t, y2: full - pad.b, class: "cross", visibility: "hidden" }, root);
  const tell = (i) => {
    if (i === null) {
      cross.setAttribute("visibility", "hidden");
      readout.textContent = unit ? `in ${unit}` : "\u00a0";
      return;
    }
    cross.setAttribute("visibility", "visible");
    cross.setAttribute("x1", x(i));
    cross.setAttribute("x2", x(i));
    const parts = lines.map((l) => `${lines.length > 1 || band ? `${l.name} ` : ""}${show(l.values[i], 3)}`);
    if (band) parts.push(`${band.name} ${show(band.low[i], 3)} to ${show(band.high[i], 3)}`);
    // apart: after a word that is written from right to left a number would stand before it
    readout.replaceChildren(tokens ? `${i} ` : "", el("bdi", {}, labels[i]), `: ${parts.join(", ")}`);
  };
  if (mark !== null && mark >= 0) svg("line", { x1: x(mark), x2: x(mark), y1: pad.t, y2: full - pad.b, class: "mark" }, root);
  const place = (event) => {
    const box = root.getBoundingClientRect(), px = (event.clientX - box.left) * (width / box.width);
    return Math.min(n - 1, Math.max(0, Math.round(((px - pad.l) / (width - pad.l - pad.r)) * (n - 1) || 0)));
  };
  root.addEventListener("pointermove", (event) => tell(place(event)));
  root.addEventListener("pointerleave", () => tell(null));
  if (pick) {
    root.classList.add("pick");
    root.addEventListener("click", (event) => pick(place(event)));
  }
  host.append(root, readout);
  if (legend) {
    const keys = document.createElement("p");
    keys.className = "legend";
    for (const line of lines) {
      const item = document.createElement("span");
      const key = svg("svg", { width: 22, height: 8, "aria-hidden": "true" });
      svg("path", { d: "M1 4H21", class: `line ${line.style || ""}` }, key);
      item.append(key, line.name);
      keys.append(item);
    }
    host.append(keys);
  }
  tell(null);
}
