// Puts the report together: the tokens to choose from, and what follows from a choice.

const state = { query: 0, layer: "all", shade: "token", map: "token" };

function layersChosen() {
  if (state.layer !== "all") return [Number(state.layer)];
  return selecting.length ? selecting : meta.layers.map((_, i) => i);
}

// A token as it is shown in the list: line breaks, tabs and what is nothing but spaces are seen.
const shown = (token) => token.replace(/^ +$/, (spaces) => "␣".repeat(spaces.length)).replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";

// The query in front of a token of the answer wrote it; a token of the question is its own query.
function choices(text) {
  const last = meta.tokens - 1;
  return meta.queries.map((position, query) => {
    const isAnswer = position >= last;
    const token = text.token(isAnswer ? position + 1 : position);
    const probability = isAnswer ? meta.probabilities[position - last] : null;
    return { query, isAnswer, token, probability };
  });
}

function fillTokens(list, offered, choose) {
  const groupOf = (name) => {
    const group = document.createElement("div"), label = document.createElement("span");
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", name);
    label.className = "group";
    label.setAttribute("aria-hidden", "true");
    label.textContent = name;
    group.append(label);
    list.append(group);
    return group;
  };
  const groups = {};
  for (const each of offered) {
    const group = (groups[each.isAnswer] ??= groupOf(each.isAnswer ? "answer" : "end of the prompt"));
    const option = document.createElement("span");
    option.setAttribute("role", "option");
    option.setAttribute("aria-selected", "false");
    option.tabIndex = -1;
    if (!each.isAnswer) option.className = "asked";
    option.textContent = shown(each.token);
    if (each.probability !== null) option.title = `probability ${each.probability}`;
    option.setAttribute("aria-label", `${each.token.trim() || "white space"}, ${each.isAnswer ? `answer, probability ${each.probability}` : "prompt"}`);
    option.addEventListener("click", () => choose(each.query));
    group.append(option);
  }
  const options = [...list.querySelectorAll("[role=option]")];
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const at = event.key === "Home" ? 0 : event.key === "End" ? options.length - 1 : step ? state.query + step : -1;
    if (at < 0 || at >= options.length) return;
    event.preventDefault();
    choose(at);
    options[at].focus();
  });
  return options;
}

function fillLayers(select) {
  const add = (value, label) => select.add(new Option(label, value));
  add("all", selecting.length ? `all ${selecting.length} sparse layers` : "all layers");
  meta.layers.forEach((layer, i) => add(String(i), `${layer.number}${layer.top_k === null ? " (dense)" : ""}`));
}

function showBars(element) {
  const measured = meta.layers.filter((layer) => layer.kept !== null);
  for (const layer of measured) {
    const name = document.createElement("span");
    name.textContent = `layer ${layer.number}`;
    const pair = document.createElement("span");
    pair.className = "pair";
    pair.setAttribute("role", "img");
    pair.setAttribute("aria-label", `selected ${percent(layer.kept)}, window ${percent(layer.window)}`);
    pair.title = pair.getAttribute("aria-label");
    for (const [share, kind] of [[layer.kept, "bar"], [layer.window, "bar other"]]) {
      const bar = document.createElement("span");
      bar.className = kind;
      bar.style.width = `${100 * share}%`;
      pair.append(bar);
    }
    element.append(name, pair);
  }
  const key = document.createElement("p");
  key.className = "hint";
  key.append(swatch(colour("--mark"), 1), "held by the selection ", swatch(colour("--far"), 1), "held by the window");
  element.before(key);
}

async function start() {
  const text = await readText();
  const pane = new TextPane(byId("pane"), text);
  const [counts, rows] = await Promise.all([readCounts(), readRows()]);
  const panel = new Panel(text, rows);
  const offered = choices(text);
  const mean = once(() => meanLevels(counts.rates));
  const rates = once(() => rateMap(counts.rates));

  const map = new Map2D(byId("map"), (row, across) => {
    if (state.map !== "parts") {
      state.layer = String(row);
      byId("layer").value = state.layer;
    }
    update();
    const token = Math.min(meta.tokens - 1, Math.floor(across * meta.tokens));
    lead(token, token + 1, 0);
  });

  // Shows a place in the text; who does not see it hears of it.
  function lead(begin, end, page) {
    pane.goTo(begin, end);
    byId("said").textContent = `The text shows ${meta.has_pages && page ? `page ${page}` : `token ${number(begin)}`}.`;
  }

  function shadeText() {
    const layer = Number(state.layer);
    const levels = () => (state.layer === "all" ? mean() : counts.rates.subarray(layer * meta.tokens, (layer + 1) * meta.tokens));
    const legend = byId("legend");
    if (state.shade === "token") {
      pane.shadeBy(shadeByToken(panel.weights(state.query, layersChosen())));
      legend.replaceChildren(swatch(colour("--mark"), 0.1), "little ", swatch(colour("--mark"), 0.7), "much of the chosen token's attention");
    } else if (state.shade === "rate") {
      pane.shadeBy(shadeByRate(levels()));
      legend.replaceChildren(swatch(colour("--mark"), RATE_ALPHA[6]), "rarely ", swatch(colour("--mark"), RATE_ALPHA[15]), "always selected by the later tokens that had the choice");
    } else {
      pane.shadeBy(shadeByDistance(levels(), counts.distances));
      legend.replaceChildren(swatch(mixed(0), 0.6), "selected from near ", swatch(mixed(1), 0.6), "from far; stronger where more often");
    }
  }

  function showMap() {
    const chosen = state.layer === "all" ? -1 : Number(state.layer);
    const notes = {
      token: "Rows are layers, the first on top; columns are positions. The stronger the colour, the more attention. Click to go there.",
      rate: "Rows are layers, the first on top; columns are positions. The stronger the colour, the more often selected. Layers that read everything are empty.",
      parts: `The text in ${meta.parts} equal parts: rows select (the start on top), columns are selected, over all sparse layers.`,
    };
    byId("map-note").textContent = notes[state.map];
    if (state.map === "token") map.show(tokenMap(rows, state.query), layerCount, columnsFor(), "Attention of the chosen token, layers by positions; the table below has its figures.", chosen);
    else if (state.map === "rate") map.show(rates(), layerCount, columnsFor(), "How often each position was selected in each layer.", chosen);
    else map.show(Float32Array.from(counts.parts, (value) => value / 255), meta.parts, meta.parts, "Which part of the text selected which.");
  }

  function update() {
    options.forEach((option, i) => {
      option.setAttribute("aria-selected", String(i === state.query));
      option.tabIndex = i === state.query ? 0 : -1;
    });
    const layers = layersChosen();
    const { token, isAnswer } = offered[state.query];
    const label = isAnswer ? `To write “${shown(token)}”, the model` : `“${shown(token)}”`;
    byId("summary").textContent = panel.describe(state.query, layers, label);
    panel.list(byId("passages"), state.query, layers, (begin, end, page, part) => {
      if (part === "document") lead(begin, end, page);
    });
    panel.table(document.querySelector("#layers tbody"), state.query);
    const held = panel.mean(state.query, layers, 1), window = panel.mean(state.query, layers, 2);
    byId("window-token").textContent = `For the chosen token, what was read holds ${percent(held)} of the attention that reading everything would give; the window of the same budget would have held ${percent(window)} and missed ${number(panel.mean(state.query, layers, 4))} of the tokens that were read.`;
    if (state.shade === "token") shadeText();
    showMap();
  }

  function choose(query) {
    state.query = query;
    update();
    const option = options[query], list = byId("tokens");
    if (option.offsetTop < list.scrollTop || option.offsetTop + option.offsetHeight > list.scrollTop + list.clientHeight) {
      list.scrollTop = option.offsetTop - list.clientHeight / 2;
    }
  }

  const options = fillTokens(byId("tokens"), offered, choose);
  fillLayers(byId("layer"));
  byId("layer").addEventListener("change", (event) => { state.layer = event.target.value; update(); shadeText(); });
  for (const radio of document.querySelectorAll("[name=shade]")) radio.addEventListener("change", () => { state.shade = radio.value; shadeText(); });
  for (const radio of document.querySelectorAll("[name=map]")) radio.addEventListener("change", () => { state.map = radio.value; showMap(); });
  byId("page").max = meta.has_pages ? Math.max(...pane.pages.keys()) : meta.document[1];
  byId("page").addEventListener("change", (event) => {
    const { min, max } = event.target;
    const wanted = Math.min(Number(max), Math.max(Number(min), Math.floor(Number(event.target.value)) || 0));
    event.target.value = wanted;
    if (meta.has_pages) pane.goToPage(wanted);
    else lead(Math.min(wanted, meta.document[1] - 1), Math.min(wanted, meta.document[1] - 1) + 1, 0);
  });
  if (byId("bars")) showBars(byId("bars"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { shadeText(); showMap(); });
  const first = offered.findIndex((each) => each.isAnswer);
  state.query = Math.max(0, first);
  update();
  shadeText();
  const opened = panel.mostRead(state.query, layersChosen(), 10).find(({ passage }) => meta.passages[passage][2] === "document");
  if (opened) pane.goTo(passageStart(opened.passage), passageEnd(opened.passage), false);
  addEventListener("beforeprint", () => { pane.paintAll(); showMap(); });
  byId("main").setAttribute("aria-busy", "false");
}

start().catch((error) => {
  byId("summary").textContent = `This report could not be opened: ${error.message}. A current browser is needed (Chrome 80, Firefox 113, Safari 16.4 or later).`;
  throw error;
});
