// What the chosen token read: the sentence, the passages, the table of layers.

const STATS = 5;
const passageStart = (i) => meta.passages[i][0];
const passageEnd = (i) => (i + 1 < meta.passages.length ? meta.passages[i + 1][0] : meta.tokens + meta.answer_tokens);

class Panel {
  constructor(text, rows) {
    this.text = text;
    this.rows = rows;
    this.passageOf = new Uint32Array(meta.tokens + meta.answer_tokens);
    meta.passages.forEach((_, i) => this.passageOf.fill(i, passageStart(i), passageEnd(i)));
    this.key = null;
  }

  stat(query, layer, which) { return this.rows.stats[(query * layerCount + layer) * STATS + which]; }

  // Attention on every token, mean over the layers asked for.
  weights(query, layers) {
    const weights = new Float32Array(meta.tokens + meta.answer_tokens);
    for (const layer of layers) this.each(query, layer, (position, weight) => { weights[position] += weight / layers.length; });
    return weights;
  }

  each(query, layer, visit) {
    const { begins, positions, weights } = this.rows;
    const row = query * layerCount + layer;
    for (let i = begins[row]; i < begins[row + 1]; i++) visit(positions[i], weightOf[weights[i]]);
  }

  // Attention on every passage beyond sinks and local window, of every kept query. Those of the layers looked at last
  // are kept.
  sharesOf(layers) {
    const key = layers.join(), { passageOf } = this, { begins, positions, weights } = this.rows;
    if (this.key !== key) {
      const count = meta.passages.length;
      this.shares = meta.queries.map((at, query) => {
        const found = new Float32Array(count);
        for (const layer of layers) {
          const end = at + 1 - meta.layers[layer].local, row = query * layerCount + layer;
          for (let i = begins[row]; i < begins[row + 1]; i++) {
            const position = positions[i];
            if (position >= meta.sinks && position < end) found[passageOf[position]] += weightOf[weights[i]] / layers.length;
          }
        }
        return found;
      });
      this.key = key;
    }
    return this.shares;
  }

  mostRead(query, layers, count) {
    const shares = this.sharesOf(layers), read = [];
    shares[query].forEach((share, passage) => { if (share && meta.passages[passage][3]) read.push({ passage, share }); });
    read.sort((a, b) => b.share - a.share || a.passage - b.passage);
    const column = new Float32Array(shares.length), middle = (shares.length - 1) >> 1;
    let best = [];
    for (const each of read) {
      // What follows has a smaller share, so less excess than that, too.
      if (best.length === count && best[count - 1].excess >= each.share) break;
      shares.forEach((one, i) => { column[i] = one[each.passage]; });
      const usual = column.sort()[middle];
      best.push({ ...each, usual, excess: each.share - usual });
      best = best.sort((a, b) => b.excess - a.excess || a.passage - b.passage).slice(0, count);
    }
    return best;
  }

  mean(query, layers, which) {
    return layers.reduce((sum, layer) => sum + this.stat(query, layer, which), 0) / Math.max(1, layers.length);
  }

  describe(query, layers, label) {
    const read = this.mean(query, layers, 0), visible = meta.queries[query] + 1;
    const where = layers.length === 1 ? `layer ${meta.layers[layers[0]].number}` : `each of ${layers.length} sparse layers`;
    const share = this.mean(query, layers, 3), outside = this.mean(query, layers, 4);
    return `${label} read ${number(read)} of ${number(visible)} tokens in ${where}. ` +
      `${number(outside)} of them, with ${percent(share)} of its attention, lie where a sliding window of the same budget does not reach.`;
  }

  list(element, query, layers, onChoose) {
    const readings = this.mostRead(query, layers, 10);
    const most = Math.max(...readings.map((each) => each.share), 1e-9);
    element.replaceChildren(...readings.map((each) => this.item(each, most, query, onChoose)));
    if (!readings.length) {
      const item = document.createElement("li");
      item.textContent = "Nothing beyond the first tokens and the local window.";
      element.append(item);
    }
  }

  item({ passage, share, usual }, most, query, onChoose) {
    const start = passageStart(passage), end = passageEnd(passage);
    const [, page, part] = meta.passages[passage];
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.passage = passage;
    const where = document.createElement("span");
    where.className = "where";
    const place = part === "document" ? (page ? `page ${page}` : `token ${number(start)}`) : `the ${part === "before" ? "prompt before the text" : part}`;
    const times = usual > 0 ? share / usual : 0;
    where.textContent = `${place} · ${(100 * share).toFixed(2)} % of the attention${times >= 1.5 ? `, ${times < 100 ? times.toFixed(1) : "over 100"} times the usual` : ""} · ${number(meta.queries[query] - start)} tokens back`;
    const excerpt = document.createElement("span");
    excerpt.dir = "auto";
    const words = this.text.text.slice(this.text.starts[start], this.text.starts[end]).replace(/\s+/g, " ").trim();
    excerpt.textContent = words.length > 260 ? `${words.slice(0, 260)}…` : words || "(white space)";
    const bar = document.createElement("span");
    bar.className = "bar";
    bar.style.width = `${Math.max(1, (100 * share) / most)}%`;
    button.append(where, excerpt, bar);
    button.addEventListener("click", () => onChoose(start, end, page, part));
    item.append(button);
    return item;
  }

  table(body, query) {
    body.replaceChildren(...meta.layers.map((layer, i) => {
      const row = document.createElement("tr");
      const dense = layer.top_k === null;
      const cells = [
        dense ? `${layer.number} (dense)` : layer.number, number(this.stat(query, i, 0)),
        dense ? "–" : number(this.stat(query, i, 4)), dense ? "–" : percent(this.stat(query, i, 3)),
        dense ? "–" : percent(this.stat(query, i, 1)), dense ? "–" : percent(this.stat(query, i, 2)),
      ];
      row.append(...cells.map((content, column) => {
        const cell = document.createElement(column ? "td" : "th");
        if (!column) cell.scope = "row";
        cell.textContent = content;
        return cell;
      }));
      return row;
    }));
  }
}
