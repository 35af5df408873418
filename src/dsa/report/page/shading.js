// The text: all of it is in the page as plain text, in blocks that the browser skips while they are out of sight.
// A block near the view gets a span for each run of tokens with one shade; it loses them when it is left.

const BLOCK_TOKENS = 256;
const RATE_ALPHA = Array.from({ length: 16 }, (_, level) => (level ? 0.06 + 0.64 * (level / 15) ** 1.5 : 0));

class TextPane {
  constructor(pane, text) {
    this.pane = pane;
    this.text = text;
    this.shade = () => null;
    this.blocks = [];
    this.visible = new Set();
    this.pages = new Map();
    this.found = null;
    this.build();
    this.watcher = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        const block = this.blocks[target.dataset.block];
        if (isIntersecting) { this.visible.add(block); this.paint(block); }
        else if (this.visible.delete(block)) block.element.textContent = this.slice(block.start, block.end);
      }
    }, { root: pane, rootMargin: "300px 0px" });
    for (const block of this.blocks) this.watcher.observe(block.element);
  }

  slice(start, end) { return this.text.text.slice(this.text.starts[start], this.text.starts[end]); }

  // Blocks end where a passage ends, and at every page.
  build() {
    const [first, last] = meta.document;
    const whole = document.createDocumentFragment();
    let start = first, page = 0;
    const close = (end) => {
      if (end <= start) return;
      const element = document.createElement("div");
      element.className = "block";
      element.dir = "auto";
      element.dataset.block = this.blocks.length;
      element.textContent = this.slice(start, end);
      whole.append(element);
      this.blocks.push({ element, start, end });
      start = end;
    };
    for (const [at, onPage, part] of meta.passages) {
      if (part !== "document") continue;
      if (onPage && onPage !== page) {
        close(at);
        page = onPage;
        const heading = document.createElement("h3");
        heading.textContent = `Page ${page}`;
        heading.tabIndex = -1;
        whole.append(heading);
        this.pages.set(page, heading);
      } else if (at - start >= BLOCK_TOKENS) close(at);
    }
    close(last);
    this.pane.append(whole);
  }

  paint(block) {
    const pieces = document.createDocumentFragment();
    let from = block.start;
    let style = this.style(from);
    for (let i = block.start + 1; i <= block.end; i++) {
      const next = i < block.end ? this.style(i) : null;
      if (i < block.end && next === style) continue;
      const content = this.slice(from, i);
      if (style) {
        const span = document.createElement("span");
        if (style.endsWith("!")) span.className = "found";
        span.style.backgroundColor = style.replace("!", "");
        span.textContent = content;
        pieces.append(span);
      } else pieces.append(content);
      from = i;
      style = next;
    }
    block.element.replaceChildren(pieces);
  }

  style(token) {
    const colour = this.shade(token) ?? "";
    const found = this.found && token >= this.found[0] && token < this.found[1];
    return found ? `${colour || "transparent"}!` : colour;
  }

  shadeBy(shade) {
    this.shade = shade;
    for (const block of this.visible) this.paint(block);
  }

  // Where nobody asked for it the page stays where it is: scrollIntoView would also move the start of the Tab key.
  goTo(start, end, asked = true) {
    this.found = [start, end];
    const block = this.blocks.find((each) => start < each.end);
    if (!block) return;
    const above = block.element.getBoundingClientRect().top - this.pane.getBoundingClientRect().top;
    this.pane.scrollBy({ top: above, behavior: "instant" });
    this.visible.add(block);
    for (const each of this.visible) this.paint(each);
    const target = block.element.querySelector(".found") ?? block.element;
    const inside = this.pane.getBoundingClientRect();
    const place = target.getBoundingClientRect();
    this.pane.scrollBy({ top: place.top - inside.top - inside.height / 3, behavior: "instant" });
    if (asked) this.show();
  }

  // On a narrow screen the text is below what leads to it.
  show() {
    const { top, bottom } = this.pane.getBoundingClientRect();
    if (bottom < 120 || top > innerHeight - 120) this.pane.scrollIntoView({ block: "center" });
  }

  // On paper all of the text is seen.
  paintAll() {
    for (const each of this.blocks) this.paint(each);
  }

  goToPage(page) {
    const heading = this.pages.get(page);
    if (!heading) return;
    this.pane.scrollBy({ top: heading.getBoundingClientRect().top - this.pane.getBoundingClientRect().top - 8, behavior: "instant" });
    this.show();
  }
}

function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

// Near is one colour and far another, over log2 of the distance.
function distanceShare(level) {
  const most = Math.log2(Math.max(meta.tokens, 512));
  return Math.min(1, Math.max(0, (level / 8 - 8) / (most - 8)));
}

function mixed(share) {
  const near = colour("--near").split(",").map(Number), far = colour("--far").split(",").map(Number);
  return near.map((value, i) => Math.round(value + (far[i] - value) * share)).join(",");
}

function swatch(rgb, alpha) {
  const element = document.createElement("span");
  element.className = "swatch";
  element.style.backgroundColor = `rgba(${rgb},${alpha})`;
  return element;
}

// Shade functions give a colour for a token, or null.
function shadeByToken(weights) {
  const rgb = colour("--mark");
  return (token) => {
    const weight = weights[token];
    if (!weight) return null;
    return `rgba(${rgb},${Math.min(0.7, Math.max(0.07, Math.round((0.7 + 0.065 * Math.log2(weight)) * 20) / 20))})`;
  };
}

function shadeByRate(levels) {
  const rgb = colour("--mark");
  return (token) => (levels[token] ? `rgba(${rgb},${RATE_ALPHA[levels[token]].toFixed(2)})` : null);
}

function shadeByDistance(levels, distances) {
  const colours = Array.from({ length: 9 }, (_, i) => mixed(i / 8));
  return (token) => {
    const level = levels[token];
    return level ? `rgba(${colours[Math.round(8 * distanceShare(distances[token]))]},${RATE_ALPHA[Math.min(15, level + 2)].toFixed(2)})` : null;
  };
}

// How often a token was selected, over all layers: the mean of the rates, as a level again.
function meanLevels(rates) {
  const sums = new Float32Array(meta.tokens);
  for (const layer of selecting) for (let i = 0; i < meta.tokens; i++) sums[i] += rateOf[rates[layer * meta.tokens + i]];
  const levels = new Uint8Array(meta.tokens);
  for (let i = 0; i < meta.tokens; i++) {
    const mean = sums[i] / Math.max(1, selecting.length);
    levels[i] = mean ? Math.max(1, Math.round(15 + 1.5 * Math.log2(mean))) : 0;
  }
  return levels;
}
