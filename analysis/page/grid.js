// The layer x token grid on a canvas. Only what is in view is drawn: the canvas stays put while a wide spacer scrolls.

const grid = { canvas: byId("grid"), scroller: byId("scroller"), spacer: byId("spacer"), gutter: 42 };
grid.pen = grid.canvas.getContext("2d");
const MONO = "ui-monospace, 'SF Mono', 'Cascadia Mono', 'DejaVu Sans Mono', Menlo, Consolas, monospace";

function layGrid(s) { // sizes for the data at hand
  const { data } = s, width = grid.scroller.clientWidth, small = width < 520;
  grid.gutter = small ? 34 : 42;
  grid.labels = data.sheet.tokens.map(showToken);
  grid.font = `${small ? 10.5 : 11.5}px ${MONO}`;
  grid.pen.font = grid.font;
  const widths = grid.labels.slice(0, 2000).map((t) => grid.pen.measureText(t).width), longest = Math.max(...widths, 8);
  const fit = (width - grid.gutter - 2) / data.columns;
  grid.cellWidth = Math.min(Math.max(Math.min(fit, 96), 15) * 2 ** s.zoom, 120);
  if (s.zoom < 0) grid.cellWidth = Math.max(grid.cellWidth, Math.min(fit, 15), 2);
  grid.cellHeight = Math.min(Math.max(Math.floor((small ? 380 : 500) / data.rows), 13), 34);
  grid.flat = longest + 6 <= grid.cellWidth; // labels lie flat where all of them fit
  grid.labelHeight = grid.flat ? 24 : Math.min(longest, small ? 72 : 104) + 14;
  grid.height = data.rows * grid.cellHeight + grid.labelHeight;
  grid.width = Math.ceil(grid.gutter + data.columns * grid.cellWidth) + 2;
  const ratio = window.devicePixelRatio || 1;
  grid.canvas.width = Math.round(width * ratio);
  grid.canvas.height = Math.round(grid.height * ratio);
  grid.canvas.style.width = `${width}px`;
  grid.canvas.style.height = `${grid.height}px`;
  grid.spacer.style.width = `${Math.max(grid.width, 1)}px`;
  grid.spacer.style.height = `${grid.height}px`;
  grid.pen.setTransform(ratio, 0, 0, ratio, 0, 0);
}

const cut = (text, most) => [...text].length > most ? [...text].slice(0, most - 1).join("") + "…" : text;

function drawGrid(s) {
  const { data, values, scale } = s, { pen, gutter, cellWidth: w, cellHeight: h } = grid;
  const width = grid.scroller.clientWidth, left = grid.scroller.scrollLeft, styles = getComputedStyle(grid.canvas);
  const ink = styles.color, muted = styles.borderTopColor, accent = styles.outlineColor;
  const from = Math.max(0, Math.floor(left / w)), to = Math.min(data.columns, Math.ceil((left + width - gutter) / w) + 1);
  const x = (column) => gutter + column * w - left, y = (row) => (data.rows - 1 - row) * h;
  const gap = w >= 6 ? 1 : 0, floor = s.floor, over = s.hover || s.cell;
  pen.clearRect(0, 0, width, grid.height);
  pen.save();
  pen.beginPath();
  pen.rect(gutter, 0, width - gutter, grid.height);
  pen.clip();
  pen.textBaseline = "middle";
  for (let column = from; column < to; column++) {
    const masked = s.left.has(column);
    for (let row = 0; row < data.rows; row++) {
      const value = values ? values[row * data.columns + column] : NaN, cx = x(column), cy = y(row);
      if (!Number.isFinite(value)) {
        pen.strokeStyle = muted;
        pen.globalAlpha = 0.35;
        pen.beginPath();
        pen.moveTo(cx + 2, cy + h - 3);
        pen.lineTo(cx + w - 3, cy + 2);
        pen.stroke();
        pen.globalAlpha = 1;
        continue;
      }
      const i = scale.step(value);
      pen.fillStyle = scale.css[i];
      pen.globalAlpha = masked ? 0.3 : 1;
      pen.fillRect(cx, cy, w - gap, h - gap);
      pen.globalAlpha = 1;
      const numbers = w >= 46 && h >= 13;
      if (numbers) {
        pen.fillStyle = scale.dark[i] && !masked ? "#fff" : masked ? ink : "#10161d";
        pen.textAlign = "center";
        pen.font = `10px ${MONO}`;
        pen.fillText(show(value, w >= 60 ? 3 : 2), cx + w / 2, cy + h / 2);
      }
      if (floor && Math.abs(value) <= floor[row] && w >= 5) { // no more than batching alone moves
        pen.fillStyle = masked ? ink : scale.dark[i] ? "#fff" : "#10161d";
        pen.globalAlpha = numbers ? 0.7 : 0.45;
        if (numbers) pen.fillRect(cx + w - gap - 5, cy + 2, 3, 3); // in the corner, beside the number
        else pen.fillRect(cx + w / 2 - 1.5, cy + h / 2 - 1.5, 2, 2);
        pen.globalAlpha = 1;
      }
    }
  }
  // token texts
  pen.font = grid.font;
  const every = Math.max(1, Math.ceil(12 / w)), most = Math.floor((grid.labelHeight - 12) / 6.4);
  for (let column = from - (from % every); column < to; column += every) {
    const here = over?.column === column;
    pen.fillStyle = here ? accent : s.left.has(column) ? muted : ink;
    if (grid.flat) {
      pen.textAlign = "center";
      pen.fillText(grid.labels[column], x(column) + w / 2, data.rows * h + 13);
    } else {
      pen.save();
      pen.translate(x(column) + w / 2, data.rows * h + 6);
      pen.rotate(-Math.PI / 2);
      pen.textAlign = "right";
      pen.fillText(cut(grid.labels[column], most), 0, 0.5);
      pen.restore();
    }
  }
  for (const [cell, colour] of [[s.cell, accent], [s.hover, ink]])
    if (cell && cell.column >= from && cell.column < to) {
      pen.strokeStyle = colour;
      pen.lineWidth = 2;
      pen.strokeRect(x(cell.column) - 1, y(cell.row) - 1, w + 1, h + 1);
      pen.lineWidth = 1;
    }
  pen.restore();
  // layers
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  const step = Math.ceil(12 / h);
  for (let row = 0; row < data.rows; row++) {
    const here = over?.row === row;
    if (row % step && row !== data.rows - 1 && !here) continue;
    pen.fillStyle = here ? accent : muted;
    pen.fillText(layerName(data, row), gutter - 7, y(row) + h / 2);
  }
}

function cellAt(s, event) {
  const box = grid.canvas.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
  const column = Math.floor((px - grid.gutter + grid.scroller.scrollLeft) / grid.cellWidth);
  const row = s.data.rows - 1 - Math.floor(py / grid.cellHeight);
  const inside = px >= grid.gutter && column >= 0 && column < s.data.columns && row < s.data.rows;
  return inside && row >= -Infinity && py < grid.height ? { row: Math.max(row, 0), column } : null;
}

function scrollToCell(cell) {
  const x = cell.column * grid.cellWidth, room = grid.scroller.clientWidth - grid.gutter, { scroller } = grid;
  if (x < scroller.scrollLeft) scroller.scrollLeft = Math.max(0, x - 40);
  else if (x + grid.cellWidth > scroller.scrollLeft + room) scroller.scrollLeft = x + grid.cellWidth - room + 40;
}
