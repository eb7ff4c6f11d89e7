"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);

  // Okabe and Ito's colours, which colour-blind eyes tell apart; on a dark ground a little lighter. Markers differ too.
  const COLORS = {
    light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#6b4c9a"],
    dark: ["#5fb0e8", "#ff8c42", "#2ec79a", "#e6a3c6", "#f0c63c", "#9bd6fa", "#b79be6"],
  };
  const INK = { light: ["#1b1f24", "#59636e", "#e6e9ed"], dark: ["#e7eaee", "#a3adb8", "#2b3138"] };
  const SYMBOLS = ["square", "diamond", "triangle-up", "triangle-down", "cross", "x", "pentagon", "star", "hexagon"];
  const DASHES = { untrained: "dot", transferred: "dash" };
  const off = { attentions: new Set(), stages: new Set() };
  let group = 0;

  const el = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "text") made.textContent = value;
      else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  };

  // Dark and light.
  const system = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => root.dataset.theme || (system.matches ? "dark" : "light");
  const remembered = (value) => {
    try {
      if (value === undefined) return localStorage.getItem("attn-plugins-theme");
      localStorage.setItem("attn-plugins-theme", value);
    } catch { /* a page from a file may have no storage */ }
    return null;
  };
  const labelled = () => {
    byId("theme").textContent = theme() === "dark" ? "Light" : "Dark";
    byId("theme").setAttribute("aria-pressed", String(theme() === "dark"));
  };
  if (["dark", "light"].includes(remembered())) root.dataset.theme = remembered();
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = theme() === "dark" ? "light" : "dark";
    remembered(root.dataset.theme);
    labelled();
    draw();
  });
  system.addEventListener("change", () => { labelled(); draw(); });
  labelled();

  // The leaderboard: rows are there already, this sorts and hides them.
  const body = document.querySelector("#board tbody");
  const rows = [...body.rows];
  const heads = [...document.querySelectorAll("#board thead th")];
  const number = (cell) => (cell.dataset.value === "" ? NaN : Number(cell.dataset.value));
  const sort = (column, direction) => {
    const numeric = data.columns[column].number;
    const order = [...rows].sort((a, b) => {
      if (!numeric) return direction * a.cells[column].dataset.value.localeCompare(b.cells[column].dataset.value, undefined, { numeric: true });
      const [x, y] = [number(a.cells[column]), number(b.cells[column])];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // rows without a figure stay last
      return direction * (x - y);
    });
    body.append(...order);
    heads.forEach((head, at) => head.setAttribute("aria-sort", at !== column ? "none" : direction > 0 ? "ascending" : "descending"));
  };
  heads.forEach((head, column) =>
    head.querySelector("button").addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const first = data.columns[column].first;
      sort(column, now === "none" ? first : now === "ascending" ? -1 : 1);
    })
  );
  const filters = [...document.querySelectorAll("[data-filter]")];
  const filter = () => {
    const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const fits = words.every((word) => text.includes(word)) &&
        filters.every((one) => !one.value || row.dataset[one.dataset.filter].split(" + ").includes(one.value) || row.dataset[one.dataset.filter] === one.value);
      row.hidden = !fits;
      shown += fits;
    }
    byId("shown").textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
  };
  byId("find").addEventListener("input", filter);
  filters.forEach((one) => one.addEventListener("change", filter));
  document.querySelector(".filters").addEventListener("submit", (event) => event.preventDefault());
  filter();

  // What a row was made of.
  const copied = async (text, button, block) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const range = document.createRange();
      range.selectNodeContents(block);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
  const folded = (title, text, open = false) => {
    const made = el("details", {}, el("summary", { text: title }), el("pre", { text, class: "wrap", tabindex: "0" }));
    made.open = open;
    return made;
  };
  const pairs = (facts) => el("dl", { class: "rules" }, ...facts.flatMap(([name, value]) => [el("dt", { text: name }), el("dd", { text: value })]));
  const told = (cell) => {
    const parts = [el("h3", { text: cell.title }), pairs(cell.facts)];
    if (cell.log) parts.push(folded("Log", cell.log, cell.status === "error"));
    if (cell.command) {
      const block = el("pre", { text: cell.command, tabindex: "0" });
      const button = el("button", { type: "button", class: "quiet", text: "Copy" });
      button.addEventListener("click", () => copied(cell.command, button, block));
      parts.push(el("div", { class: "copy" }, el("span", { text: "Measure this cell again" }), button), block);
    }
    if (cell.figures) parts.push(folded("All figures", cell.figures));
    if (cell.settings) parts.push(folded("Settings", cell.settings));
    return parts;
  };
  const show = (row) => {
    const its = data.rows[Number(row.dataset.row)];
    byId("detail-title").textContent = its.title;
    byId("detail-body").replaceChildren(pairs(its.facts), ...its.cells.flatMap((key) => told(data.cells[key])));
    byId("detail").showModal();
    byId("detail").scrollTop = 0;
  };
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row && !String(getSelection())) show(row);
  });
  byId("close").addEventListener("click", () => byId("detail").close());
  byId("detail").addEventListener("click", (event) => { if (event.target === byId("detail")) byId("detail").close(); });

  // Figures.
  const colour = (at) => (at < 0 ? INK[theme()][0] : COLORS[theme()][at % COLORS[theme()].length]);
  const symbol = (at) => (at < 0 ? "circle" : SYMBOLS[at % SYMBOLS.length]);
  const faded = (color, share) => color + Math.round(255 * share).toString(16).padStart(2, "0");
  const scale = (kinds) => {
    const palette = [INK[theme()][2], ...COLORS[theme()]];
    return Array.from({ length: kinds }, (_, at) => [[at / kinds, palette[at % palette.length]], [(at + 1) / kinds, palette[at % palette.length]]]).flat();
  };
  const styled = (trace) => {
    const [ink, soft] = INK[theme()];
    const meta = trace.meta || {};
    if (trace.type === "heatmap") {
      const bar = { ...trace.colorbar, outlinewidth: 0, tickfont: { color: soft, size: 11 } };
      if (bar.title) bar.title = { ...bar.title, font: { color: soft, size: 11 } };
      return { ...trace, colorbar: bar, ...(meta.kinds ? { colorscale: scale(meta.kinds) } : { textfont: { size: 9 } }) };
    }
    if (meta.front) return { ...trace, line: { ...trace.line, color: soft } };
    const color = colour(meta.number);
    const open = meta.stage === "untrained" ? "-open" : meta.stage === "transferred" ? "-open-dot" : "";
    const hidden = off.attentions.has(meta.attention) || off.stages.has(meta.stage);
    return {
      ...trace,
      visible: !hidden,
      marker: { color, symbol: symbol(meta.number) + open, size: 9, line: { color, width: 2 } },
      line: { color, width: 1.75, dash: DASHES[meta.stage] || "solid" },
      textfont: { color: ink, size: 11 },
      ...(trace.error_y ? { error_y: { ...trace.error_y, color: faded(color, 0.6) } } : {}),
    };
  };
  const layout = (figure) => {
    const [ink, soft, line] = INK[theme()];
    const axis = { gridcolor: line, linecolor: line, zeroline: false, automargin: true, tickfont: { color: soft }, title: { standoff: 10 } };
    const own = figure.layout;
    const merged = (name) => ({ ...axis, ...own[name], title: { ...axis.title, ...(own[name] || {}).title, font: { color: soft, size: 12 } } });
    return {
      ...own,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink },
      margin: { l: 56, r: 16, t: 22, b: 48 },
      showlegend: false, hovermode: "closest", dragmode: false,
      hoverlabel: { font: { family: getComputedStyle(document.body).fontFamily } },
      shapes: (own.shapes || []).map((shape) => ({ ...shape, line: { ...shape.line, color: soft } })),
      xaxis: merged("xaxis"), yaxis: merged("yaxis"),
    };
  };
  const plots = new Map();
  const draw = () => {
    for (const [place, figure] of plots) {
      Plotly.react(place, figure.data.map(styled), layout(figure), { responsive: true, displayModeBar: false });
    }
    marks();
  };

  // Which attentions and stages are shown: a legend for all figures.
  const SHAPES = {
    circle: "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0", square: "M-4,-4H4V4H-4Z", diamond: "M0,-5.5L5.5,0L0,5.5L-5.5,0Z",
    "triangle-up": "M0,-5L5,4H-5Z", "triangle-down": "M0,5L5,-4H-5Z", cross: "M-1.7,-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
    x: "M-5,-2.6L-2.6,-5L0,-2.4L2.6,-5L5,-2.6L2.4,0L5,2.6L2.6,5L0,2.4L-2.6,5L-5,2.6L-2.4,0Z",
    pentagon: "M0,-5L4.8,-1.5L2.9,4H-2.9L-4.8,-1.5Z", hexagon: "M-2.8,-4.8H2.8L5.5,0L2.8,4.8H-2.8L-5.5,0Z",
    star: "M0,-5.8L1.5,-1.9L5.6,-1.8L2.3,0.8L3.5,4.8L0,2.4L-3.5,4.8L-2.3,0.8L-5.6,-1.8L-1.5,-1.9Z",
  };
  const svg = (tag, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const mark = (shape, color, filled, dash) => {
    const made = svg("svg", { viewBox: "-9 -7 18 14", "aria-hidden": "true" });
    if (dash !== undefined) made.append(svg("line", { x1: -9, x2: 9, y1: 0, y2: 0, stroke: color, "stroke-width": 1.75, "stroke-dasharray": dash }));
    made.append(svg("path", { d: SHAPES[shape], fill: filled ? color : "var(--ground)", stroke: color, "stroke-width": 1.75 }));
    return made;
  };
  const chip = (what, value, picture) => {
    const shown = !off[what].has(value);
    const made = el("button", { type: "button", "aria-pressed": String(shown), title: shown ? "hide in the figures" : "show in the figures" }, picture, document.createTextNode(value));
    made.addEventListener("click", () => {
      off[what].has(value) ? off[what].delete(value) : off[what].add(value);
      draw();
      [...byId(what).children].find((one) => one.textContent === value)?.focus();
    });
    return made;
  };
  const marks = () => {
    if (!byId("attentions")) return;
    const { attentions, stages } = data.groups[group];
    byId("attentions").replaceChildren(...attentions.map(([name, at]) => chip("attentions", name, mark(symbol(at), colour(at), true))));
    const ink = INK[theme()][0];
    const dashes = { untrained: "2 2.5", transferred: "5 3" };
    byId("stages").replaceChildren(...(stages.length > 1 ? stages : []).map((stage) => chip("stages", stage, mark("circle", ink, !(stage in dashes), dashes[stage] || ""))));
  };
  const choose = (at) => {
    group = at;
    off.attentions.clear();
    off.stages.clear();
    for (const place of plots.keys()) Plotly.purge(place);
    plots.clear();
    for (const holder of document.querySelectorAll(".figures")) {
      const its = data.groups[at].figures.filter((figure) => figure.section === holder.dataset.section);
      holder.replaceChildren(...its.map((figure) => {
        const place = el("div", { class: "plot", role: "img", "aria-label": `${figure.title}. ${figure.caption}` });
        if (figure.layout.height) place.style.height = `${figure.layout.height}px`;
        plots.set(place, figure);
        return el("figure", {}, el("h3", { text: figure.title }), place, el("figcaption", { text: figure.caption }));
      }));
      if (!its.length) holder.append(el("p", { class: "note", text: `Nothing of the kind was measured of ${data.groups[at].label}.` }));
    }
    draw();
  };
  if (byId("group")) byId("group").addEventListener("change", (event) => choose(Number(event.target.value)));
  if (data.groups.length && document.querySelector(".figures")) choose(0);
})();
