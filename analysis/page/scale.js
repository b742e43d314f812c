// Colour scales: ramps that the colour-blind tell apart, ends at the 1st and 99th percentile, linear or log.

const RAMPS = {
  light: {
    sequential: ["#f4f1ea", "#d3e3d8", "#93c4c0", "#4d9bad", "#2a6d94", "#1d4474", "#16234a"],
    diverging: ["#164a80", "#4f8cc0", "#a9cbe2", "#f2efe9", "#f0bf8e", "#cf7a32", "#87400c"],
  },
  dark: {
    sequential: ["#1a232d", "#1d3d55", "#1f5f7c", "#2f8792", "#5fb095", "#aed58c", "#f7f1a8"],
    diverging: ["#a8d3ff", "#5b9bd6", "#2b5c8c", "#1d2630", "#8a4f1d", "#d6863a", "#ffcf9c"],
  },
};
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

function ramp(theme, kind) { // 256 colours
  const stops = RAMPS[theme][kind].map(rgb);
  return Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (stops.length - 1), k = Math.min(Math.floor(place), stops.length - 2);
    return stops[k].map((v, c) => Math.round(v + (stops[k + 1][c] - v) * (place - k)));
  });
}

// The scale of some arrays. masked: per array the columns to leave out, and their number.
function makeScale(arrays, log, theme) {
  const found = [];
  for (const { values, columns, left } of arrays)
    for (let i = 0; values && i < values.length; i++)
      if (Number.isFinite(values[i]) && !left.has(i % columns)) found.push(values[i]);
  found.sort((a, b) => a - b);
  const least = found[0], most = found[found.length - 1], signed = least < 0 && most > 0;
  const canLog = found.length > 0 && most > 0;
  const sizes = signed ? found.map(Math.abs).sort((a, b) => a - b) : found;
  let high = quantile(sizes, 0.99), low = signed ? -high : quantile(sizes, 0.01);
  if (!(high > low)) [low, high] = [Math.min(low || 0, 0), Math.max(high || 0, low > 0 ? low : 0) || 1];
  const useLog = log && canLog && high > 0;
  let share;
  if (!useLog) share = (v) => (v - low) / (high - low);
  else if (signed) { // linear in the middle thousandth, so that zero has its place
    const bend = high / 1000, end = Math.asinh(high / bend);
    share = (v) => 0.5 + Math.asinh(v / bend) / end / 2;
  } else {
    low = Math.max(quantile(sizes.filter((v) => v > 0), 0.05), high / 1e6); // a few tiny cells do not take half of the ramp
    low = low < high ? low : high / 10;
    share = (v) => v > 0 ? Math.log(v / low) / Math.log(high / low) : 0;
  }
  const colours = ramp(theme, signed ? "diverging" : "sequential");
  const step = (v) => Math.round(255 * Math.min(Math.max(share(v), 0), 1));
  return { low, high, least, most, signed, log: useLog, canLog, empty: !found.length, allZero: least === 0 && most === 0, share, step,
    css: colours.map(([r, g, b]) => `rgb(${r},${g},${b})`), dark: colours.map(([r, g, b]) => 0.3 * r + 0.59 * g + 0.11 * b < 128),
    // value at a share of the bar, for its ticks
    at: (s) => !useLog ? low + s * (high - low)
      : signed ? Math.sinh((s - 0.5) * 2 * Math.asinh(1000)) * (high / 1000) : low * (high / low) ** s };
}

function show(value, digits = 4) { // a number for people
  if (value === undefined || value === null || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞"; // of a pass in float16, say
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) {
    const [m, e] = value.toExponential(Math.max(digits - 2, 0)).split("e");
    return `${String(Number(m)).replace("-", "−")}e${e.replace("+", "").replace("-", "−")}`;
  }
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}

const escaped = (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`;

// A text among others: what would turn the direction of all that stands behind it is seen, as other controls are.
const showText = (text) => text.replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, escaped);

// A token as a label: spaces and line ends seen.
const showToken = (text) => text === "" ? "∅" : text.replace(/ /g, "·").replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/\r/g, "␍")
  .replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g, escaped);

const layerName = (data, row) => {
  const layer = data.sheet.layers[row];
  return layer < 0 ? "emb" : layer === data.pair.facts.n_layers ? "norm" : String(layer);
};
const layerWords = (data, row) => {
  const layer = data.sheet.layers[row];
  return layer < 0 ? "layer −1, what enters block 0" : layer === data.pair.facts.n_layers ? `layer ${layer}, after the final norm`
    : `layer ${layer}`;
};
