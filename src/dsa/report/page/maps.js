// Maps on a canvas: layers by positions, and parts of the text by parts of the text.

class Map2D {
  constructor(canvas, onPick) {
    this.canvas = canvas;
    this.rows = this.columns = 0;
    canvas.addEventListener("click", (event) => {
      const box = canvas.getBoundingClientRect();
      if (!this.rows) return;
      onPick(
        Math.min(this.rows - 1, Math.floor(((event.clientY - box.top) / box.height) * this.rows)),
        (event.clientX - box.left) / box.width,
      );
    });
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  // `values` are 0 to 1, row by row; `chosen` is a row to point out.
  show(values, rows, columns, description, chosen = -1) {
    Object.assign(this, { values, rows, columns, chosen });
    this.canvas.setAttribute("aria-label", description);
    this.draw();
  }

  draw() {
    const { canvas, rows, columns, values } = this;
    if (!rows || !canvas.clientWidth) return;
    const scale = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * scale);
    canvas.height = Math.round(canvas.clientHeight * scale);
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    const image = new ImageData(columns, rows);
    const [red, green, blue] = colour("--mark").split(",").map(Number);
    for (let i = 0; i < rows * columns; i++) {
      image.data.set([red, green, blue, Math.round(255 * Math.min(1, values[i]))], 4 * i);
    }
    const small = new OffscreenCanvas(columns, rows);
    small.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    if (this.chosen >= 0) {
      const height = canvas.height / rows;
      context.strokeStyle = colour("--accent");
      context.lineWidth = 2 * scale;
      context.strokeRect(scale, this.chosen * height + scale / 2, canvas.width - 2 * scale, Math.max(2, height - scale));
    }
  }
}

const COLUMNS = 320;
const columnsFor = () => Math.min(COLUMNS, Math.max(1, meta.tokens));

// Attention of one query: layers by positions, on a scale of its logarithm.
function tokenMap(rows, query) {
  const columns = columnsFor();
  const values = new Float32Array(layerCount * columns);
  const span = Math.max(meta.tokens, meta.queries[query] + 1);
  for (let layer = 0; layer < layerCount; layer++) {
    const row = query * layerCount + layer;
    for (let i = rows.begins[row]; i < rows.begins[row + 1]; i++) {
      values[layer * columns + Math.min(columns - 1, Math.floor((rows.positions[i] * columns) / span))] += weightOf[rows.weights[i]];
    }
  }
  return values.map((value) => (value ? Math.max(0, 1 + Math.log2(value) / 12) : 0));
}

function rateMap(rates) {
  const columns = columnsFor();
  const values = new Float32Array(layerCount * columns), counts = new Float32Array(columns);
  const columnOf = Uint16Array.from({ length: meta.tokens }, (_, i) => Math.floor((i * columns) / meta.tokens));
  for (const column of columnOf) counts[column]++;
  for (let layer = 0; layer < layerCount; layer++) {
    const from = layer * meta.tokens, to = layer * columns;
    for (let i = 0; i < meta.tokens; i++) values[to + columnOf[i]] += rateOf[rates[from + i]];
  }
  return values.map((value, i) => Math.sqrt(value / counts[i % columns]));
}
