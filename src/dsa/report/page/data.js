// Unpacking what the report carries. Formats are described in packing.py.

const meta = JSON.parse(document.getElementById("meta").textContent);
const byId = (id) => document.getElementById(id);

// Younger browsers do this themselves.
function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const binary = atob(base64);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

async function inflate(name) {
  const element = byId(`data-${name}`);
  const bytes = bytesOf(element.textContent);
  element.remove();
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

// The text and where each token begins in it, in UTF-16 units.
async function readText() {
  const [raw, widths] = await Promise.all([inflate("text"), inflate("widths")]);
  const text = new TextDecoder().decode(raw);
  const each = new Uint16Array(widths);
  const starts = new Uint32Array(each.length + 1);
  for (let i = 0; i < each.length; i++) starts[i + 1] = starts[i] + each[i];
  return { text, starts, token: (i) => text.slice(starts[i], starts[i + 1]) };
}

async function readCounts() {
  const [rates, distances, parts] = await Promise.all([inflate("rates"), inflate("distances"), inflate("parts")]);
  return { rates: new Uint8Array(rates), distances: new Uint8Array(distances), parts: new Uint8Array(parts) };
}

// Positions and weights of every kept query and layer; `rows[q * layers + l]` is where they begin.
async function readRows() {
  const [rawGaps, rawWeights, rawSizes, rawStats] = await Promise.all(["gaps", "weights", "sizes", "stats"].map(inflate));
  const sizes = new Int32Array(rawSizes);
  const begins = new Uint32Array(sizes.length + 1);
  for (let i = 0; i < sizes.length; i++) begins[i + 1] = begins[i] + sizes[i];
  const positions = new Int32Array(begins[sizes.length]);
  const gaps = new Uint8Array(rawGaps);
  let at = 0;
  for (let row = 0; row < sizes.length; row++) {
    let position = -1;
    for (let i = begins[row]; i < begins[row + 1]; i++) {
      let gap = 0, shift = 0, byte;
      do { byte = gaps[at++]; gap |= (byte & 127) << shift; shift += 7; } while (byte & 128);
      positions[i] = position += gap;
    }
  }
  return { begins, positions, weights: new Uint8Array(rawWeights), stats: new Float32Array(rawStats) };
}

const weightOf = new Float32Array(256);
for (let level = 1; level < 256; level++) weightOf[level] = 2 ** ((level - 160) / 8);
const rateOf = Float32Array.from({ length: 16 }, (_, level) => (level ? 2 ** ((level - 15) / 1.5) : 0));

const layerCount = meta.layers.length;
const selecting = meta.layers.map((layer, i) => i).filter((i) => meta.layers[i].top_k !== null);
const number = (value) => Math.round(value).toLocaleString("en");
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

// What is made at its first use only.
function once(make) {
  let made = null;
  return () => (made ??= make());
}
