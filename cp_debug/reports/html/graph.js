// The layer graph. Drawn by cytoscape, each module's inside placed by dagre; both are unpacked when it comes into view.
"use strict";

(() => {
  const section = document.getElementById("graph");
  if (!section) return;
  const canvas = section.querySelector(".graph-canvas");
  const about = section.querySelector(".graph-about");
  const found = section.querySelector(".graph-found");
  const form = section.querySelector("form");
  const field = (name) => form.querySelector(`[data-graph="${name}"]`);
  const data = JSON.parse(document.getElementById("graph-data").textContent);
  const ROOT = -1, HEIGHT = 28, PAD = 12, HEAD = 20, MANY = 800;
  const layers = data.layers.map(([name, label, op, group, shape], id) => ({ id, name, label, op, group, shape }));
  const groups = data.groups.map(([label, parent], id) => ({ id, label, parent, layers: [], open: false }));
  const members = new Map([[ROOT, []], ...groups.map((group) => [group.id, []])]); // group → ids of what it holds
  const chain = (layer) => {
    const path = [];
    for (let g = layers[layer].group; g !== ROOT; g = groups[g].parent) path.unshift(g);
    return path;
  };
  const paths = layers.map((_, id) => chain(id));
  const began = new Set();
  for (const { id } of layers) {
    paths[id].forEach((group, depth) => {
      groups[group].layers.push(id);
      if (!began.has(group)) members.get(depth ? paths[id][depth - 1] : ROOT).push(`g${group}`);
      began.add(group);
    });
    members.get(layers[id].group).push(`n${id}`);
  }
  // Edges inside a group are those between its members: they depend on no other group, open or folded.
  const inside = new Map([...members.keys()].map((group) => [group, new Map()]));
  for (const [a, b] of data.edges) {
    const [from, to] = [paths[a], paths[b]];
    let depth = 0;
    while (depth < from.length && depth < to.length && from[depth] === to[depth]) depth += 1;
    const ends = [[a, from], [b, to]].map(([id, path]) => (depth < path.length ? `g${path[depth]}` : `n${id}`));
    inside.get(depth ? from[depth - 1] : ROOT).set(ends.join(">"), ends);
  }

  let cy = null, current = null, test = 0, turn = 0, matches = [], at = -1;
  const figures = (layer) => data.figures[test][layer];
  const VERDICT = 0, EXCESS = 1, INTRODUCED = 2, DIVERGENCE = 3, SHARE = 4, ROW = 5, LIT = 6;
  const value = (x) => (x === null || x === undefined ? null : Number(x));
  const shown = (x) => {
    const v = value(x);
    if (v === null) return "–";
    if (!Number.isFinite(v)) return Number.isNaN(v) ? "NaN" : "Inf";
    if (v === 0) return "0";
    return Math.abs(v) >= 0.01 && Math.abs(v) < 10000 ? String(Number(v.toPrecision(3))) : v.toExponential(2);
  };
  const holds = (id) => (id[0] === "g" ? groups[id.slice(1)].layers : [Number(id.slice(1))]);
  const guilty = (layer) => ["guilty", "shape"].includes(figures(layer)?.[VERDICT]);
  const most = (ids, column) => {
    const values = ids.map((id) => value(figures(id)?.[column])).filter((v) => v !== null);
    return values.find((v) => !Number.isFinite(v)) ?? (values.length ? Math.max(...values) : null);
  };

  // Colours, from the page's own, so that they follow light and dark.
  const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const css = (name) => {
    pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    return [1, 3, 5].map((i) => parseInt(pen.fillStyle.slice(i, i + 2), 16));
  };
  const mixed = (a, b, part) => `rgb(${a.map((v, i) => Math.round(v + (b[i] - v) * part)).join(",")})`;
  const clamp = (x) => Math.min(Math.max(x, 0), 1);
  const palette = () => Object.fromEntries(["panel", "good", "warn", "bad", "new", "accent"].map((n) => [n, css(`--${n}`)]));
  const colour = (ids, of, p) => {
    const kind = field("colour").value;
    const v = most(ids, { excess: EXCESS, share: SHARE, divergence: DIVERGENCE }[kind]);
    if (v === null) return mixed(p.panel, p.panel, 0);
    if (!Number.isFinite(v)) return mixed(p.panel, p.new, of);
    if (kind === "share") return mixed(p.panel, p.bad, of * clamp(Math.abs(v)));
    if (kind === "divergence") return mixed(p.panel, p.accent, of * clamp(v > 0 ? 1 + Math.log10(v) / 7 : 0));
    if (v <= 1) return mixed(p.panel, p.good, of * 0.5);
    if (v <= 4) return mixed(p.panel, p.warn, of * (0.4 + (0.6 * Math.log(v)) / Math.log(4)));
    return mixed(p.panel, p.bad, of * (0.6 + 0.4 * clamp(Math.log10(v / 4) / 3)));
  };

  pen.font = "12px system-ui, sans-serif";
  const short = (text, letters) => (text.length > letters ? `${text.slice(0, letters / 2 - 1)}…${text.slice(1 - letters / 2)}` : text);
  const caption = (id) => {
    if (id[0] === "g") return `▸ ${short(groups[id.slice(1)].label, 40)} (${holds(id).length})`;
    const { label, op } = layers[id.slice(1)];
    const text = label.toLowerCase().includes(op.toLowerCase()) ? label : `${label} · ${op}`;
    return (guilty(holds(id)[0]) ? "✗ " : "") + short(text, 40);
  };
  const isOpen = (id) => id[0] === "g" && groups[id.slice(1)].open;

  // Sizes and places: groups are numbered parents first, so that from the last one on the inner ones are ready.
  const pause = () => new Promise((resolve) => setTimeout(resolve));
  const inner = new Map();
  const place = async () => {
    let since = performance.now();
    for (let group = groups.length - 1; group >= ROOT; group -= 1) {
      if (group !== ROOT && !groups[group].open) continue;
      const graph = new dagre.graphlib.Graph();
      graph.setGraph({ rankdir: "TB", nodesep: 14, ranksep: 26 });
      for (const id of members.get(group)) {
        const box = isOpen(id) ? inner.get(id.slice(1)) : null;
        const width = box ? box.width + 2 * PAD : Math.ceil(pen.measureText(caption(id)).width) + 22;
        graph.setNode(id, { width, height: box ? box.height + 2 * PAD + HEAD : HEIGHT });
      }
      for (const [a, b] of inside.get(group).values()) graph.setEdge(a, b, {});
      dagre.layout(graph);
      const { width, height } = graph.graph();
      inner.set(String(group), { width, height, nodes: new Map(members.get(group).map((id) => [id, graph.node(id)])) });
      if (performance.now() - since > 30) {
        await pause();
        since = performance.now();
      }
    }
  };
  const standIn = (layer) => {
    const folded = paths[layer].find((group) => !groups[group].open);
    return folded === undefined ? `n${layer}` : `g${folded}`;
  };
  const elements = () => {
    const nodes = [], edges = new Map();
    const put = (group, left, top) => {
      for (const [id, node] of inner.get(String(group)).nodes) {
        const parent = group === ROOT ? undefined : `g${group}`;
        const [x, y] = [left + node.x, top + node.y];
        if (isOpen(id)) {
          nodes.push({ group: "nodes", data: { id, parent, label: `▾ ${short(groups[id.slice(1)].label, 60)}` }, classes: "module" });
          put(Number(id.slice(1)), x - node.width / 2 + PAD, y - node.height / 2 + PAD + HEAD);
        } else {
          nodes.push({ group: "nodes", data: { id, parent, label: caption(id), w: node.width }, position: { x, y } });
        }
      }
    };
    put(ROOT, 0, 0);
    for (const [a, b] of data.edges) {
      const [from, to] = [standIn(a), standIn(b)];
      if (from === to) continue;
      const id = `${from}>${to}`;
      const lit = Boolean(figures(a)?.[LIT] && figures(b)?.[LIT]);
      if (!edges.has(id)) edges.set(id, { group: "edges", data: { id, source: from, target: to }, classes: "" });
      if (lit) edges.get(id).classes = "lit";
    }
    return [...nodes, ...edges.values()];
  };

  const paint = () => {
    const p = palette();
    const many = cy.nodes().length > MANY;
    const rgb = (c) => `rgb(${c.join(",")})`;
    const [text, muted, rule] = ["--text", "--muted", "--rule"].map((n) => rgb(css(n)));
    cy.style()
      .clear()
      .fromJson([
        { selector: "node[w]", style: { width: "data(w)", height: HEIGHT } },
        { selector: "node[fill]", style: { "background-color": "data(fill)", "border-color": "data(line)" } },
        { selector: "node", style: { shape: "round-rectangle", label: "data(label)", color: text, "font-size": 12, "font-family": "system-ui, sans-serif", "text-valign": "center", "border-width": 1.5, "min-zoomed-font-size": 5 } },
        { selector: "node.module", style: { "background-color": rgb(p.panel), "background-opacity": 0.45, "border-color": rule, "text-valign": "top", "text-margin-y": -3, "text-background-color": rgb(css("--page")), "text-background-opacity": 0.85, color: muted, padding: PAD, "padding-relative-to": "min", "text-halign": "center", "compound-sizing-wrt-labels": "exclude" } },
        { selector: "node.lit", style: { "border-color": rgb(p.bad), "border-width": 2 } },
        { selector: "node.guilty", style: { "border-width": 4 } },
        { selector: "node.strange", style: { "border-style": "dashed", "border-color": rgb(p.new), "border-width": 3 } },
        { selector: "node.match", style: { "underlay-color": rgb(p.accent), "underlay-opacity": 0.35, "underlay-padding": 5 } },
        { selector: "node.current", style: { "overlay-opacity": 0, "outline-color": rgb(p.accent), "outline-width": 3, "outline-offset": 2 } },
        { selector: "edge", style: { "curve-style": many ? "haystack" : "straight", width: 1.5, "line-color": muted, "line-opacity": 0.55, "target-arrow-shape": many ? "none" : "triangle", "target-arrow-color": muted, "arrow-scale": 0.8 } },
        { selector: "edge.lit", style: { width: 3, "line-color": rgb(p.bad), "target-arrow-color": rgb(p.bad), "line-opacity": 0.9 } },
      ]);
    cy.batch(() => {
      for (const node of cy.nodes()) {
        const ids = holds(node.id());
        if (!node.hasClass("module")) {
          node.data({ fill: colour(ids, 0.42, p), line: colour(ids, 1, p), label: caption(node.id()) });
          node.toggleClass("guilty", ids.some(guilty));
          node.toggleClass("strange", [EXCESS, DIVERGENCE].some((c) => { const v = most(ids, c); return v !== null && !Number.isFinite(v); }));
        }
        node.toggleClass("lit", ids.some((id) => figures(id)?.[LIT]));
        node.toggleClass("match", ids.some((id) => matches.includes(id)));
      }
    });
    cy.style().update();
  };

  let drawing = Promise.resolve();
  const draw = (anchor) => {
    drawing = drawing.then(async () => {
      canvas.setAttribute("aria-busy", "true");
      await place();
      const before = anchor && cy.getElementById(anchor).nonempty() ? cy.getElementById(anchor).renderedPosition() : null;
      cy.batch(() => {
        cy.elements().remove();
        cy.add(elements());
      });
      paint();
      const after = anchor && cy.getElementById(anchor);
      if (before && after.nonempty()) {
        const now = after.renderedPosition();
        cy.panBy({ x: before.x - now.x, y: before.y - now.y });
      }
      if (current) mark(cy.getElementById(current).nonempty() ? current : standIn(holds(current)[0]));
      canvas.removeAttribute("aria-busy");
    });
    return drawing;
  };

  const make = (tag, text, attributes = {}) => {
    const element = Object.assign(document.createElement(tag), attributes);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const tell = (id) => {
    const ids = holds(id);
    const parts = [];
    const list = make("dl", undefined, { className: "pairs" });
    const pair = (name, text) => list.append(make("dt", name), make("dd", text));
    if (id[0] === "g") {
      const accused = ids.filter(guilty);
      parts.push(make("h3", groups[id.slice(1)].label));
      pair("layers", String(ids.length));
      pair("guilty", accused.length ? accused.slice(0, 8).map((each) => layers[each].name).join(", ") : "none");
      pair("highest excess", shown(most(ids, EXCESS)));
      pair("highest rel. L2", shown(most(ids, DIVERGENCE)));
      parts.push(list);
    } else {
      const layer = layers[ids[0]], row = figures(ids[0]);
      parts.push(make("h3", layer.name));
      pair("operator", layer.op);
      pair("shape", layer.shape);
      if (row) {
        pair("verdict", row[VERDICT]);
        for (const [name, column] of [["excess", EXCESS], ["introduced", INTRODUCED], ["rel. L2", DIVERGENCE]]) pair(name, shown(row[column]));
        if (row[SHARE] !== null) pair("share", `${shown(100 * row[SHARE])} % of the final divergence`);
      } else pair("verdict", `not compared on ${data.tests[test].spec}`);
      parts.push(list);
      if (row) {
        const { anchor } = data.tests[test];
        const link = make("a", "Row in the table");
        link.setAttribute("href", `#${anchor}-layer-${row[ROW]}`);
        parts.push(make("p"));
        parts.at(-1).append(link);
        const charts = document.querySelector(`#${anchor}-charts-${row[ROW]} .charts`);
        const ask = document.querySelector(`#${anchor}-layer-${row[ROW]} .ask`);
        if (charts) parts.push(charts.cloneNode(true));
        else if (ask) parts.push(ask.cloneNode(true));
      }
    }
    about.replaceChildren(...parts);
  };
  const mark = (id) => {
    cy.nodes(".current").removeClass("current");
    current = id;
    cy.getElementById(id).addClass("current");
  };
  const choose = (id) => {
    mark(id);
    tell(id);
  };
  const toggle = (id) => {
    const group = groups[id.slice(1)];
    group.open = !group.open;
    tell(id);
    current = id;
    return draw(id);
  };
  const see = (id) => {
    const node = cy.getElementById(id);
    const { x1, x2, y1, y2 } = cy.extent();
    const p = node.position();
    if (p.x < x1 || p.x > x2 || p.y < y1 || p.y > y2) cy.center(node);
  };
  const reveal = async (layer) => {
    for (const group of paths[layer]) groups[group].open = true;
    await draw();
    choose(`n${layer}`);
    if (cy.zoom() < 0.7) cy.zoom(0.9);
    cy.center(cy.getElementById(`n${layer}`));
  };
  const READABLE = 0.55;
  const fit = () => cy.fit(undefined, 20);
  // The whole graph where its names can be read then, else the first guilty layer and what is around it.
  const frame = () => {
    fit();
    const first = layers.find((l) => guilty(l.id));
    if (cy.zoom() < READABLE) {
      cy.zoom(0.8);
      cy.center(cy.getElementById(current ?? standIn(first ? first.id : 0)));
    } else if (cy.zoom() > 1.2) {
      cy.zoom(1.2);
      cy.center();
    }
  };
  const zoom = (factor) => cy.zoom({ level: cy.zoom() * factor, renderedPosition: { x: cy.width() / 2, y: cy.height() / 2 } });

  const search = () => {
    const words = field("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    matches = words.length
      ? layers.filter((l) => words.every((word) => `${l.name} ${l.op}`.toLowerCase().includes(word))).map((l) => l.id)
      : [];
    at = -1;
    form.querySelector("output").value = words.length ? `${matches.length} of ${layers.length} layers` : `${layers.length} layers`;
    found.replaceChildren(
      ...matches.slice(0, 8).map((id) => {
        const item = make("li");
        const button = make("button", layers[id].name, { type: "button" });
        button.addEventListener("click", () => reveal(id));
        item.append(button);
        return item;
      }),
    );
    if (cy) paint();
  };

  const STEPS = { ArrowDown: [0, 1], ArrowUp: [0, -1], ArrowRight: [1, 0], ArrowLeft: [-1, 0] };
  const step = ([dx, dy]) => {
    const here = cy.getElementById(current ?? "");
    if (here.empty()) return choose(cy.nodes(":childless").first().id());
    const from = here.position();
    const reachable = dy ? (dy > 0 ? here.outgoers("node") : here.incomers("node")) : cy.nodes(":childless");
    let best = null, least = Infinity;
    for (const node of reachable) {
      const [x, y] = [node.position().x - from.x, node.position().y - from.y];
      const ahead = x * dx + y * dy, aside = Math.abs(dx ? y : x);
      if (node.same(here) || (dx && (ahead <= 0 || aside > 4 * HEIGHT))) continue;
      const far = dx ? ahead + 3 * aside : aside;
      if (far < least) [best, least] = [node, far];
    }
    if (best) {
      choose(best.id());
      see(best.id());
    }
  };
  const keys = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const plain = {
      Enter: () => current && (current[0] === "g" ? toggle(current) : choose(current)),
      " ": () => current && (current[0] === "g" ? toggle(current) : choose(current)),
      f: () => {
        const parent = current && (current[0] === "g" ? groups[current.slice(1)].parent : layers[current.slice(1)].group);
        if (parent !== null && parent >= 0) toggle(`g${parent}`);
      },
      "+": () => zoom(1.3),
      "-": () => zoom(1 / 1.3),
      0: fit,
    }[event.key];
    if (STEPS[event.key]) step(STEPS[event.key]);
    else if (plain) plain();
    else return;
    event.preventDefault();
  };

  const unpack = async (name) => {
    const bytes = Uint8Array.from(atob(document.getElementById(`library-${name}`).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = make("script", await new Response(stream).text());
    document.head.append(script);
  };
  const openSome = (most) => {
    for (const group of groups) group.open = false;
    let visible = members.get(ROOT).length;
    const open = (group, limit) => {
      if (groups[group].open || visible + members.get(group).length > limit) return;
      groups[group].open = true;
      visible += members.get(group).length - 1;
    };
    layers.filter((l) => guilty(l.id)).slice(0, 3).forEach((l) => paths[l.id].forEach((group) => open(group, 150)));
    for (const group of groups) if (group.parent === ROOT || groups[group.parent].open) open(group.id, most);
  };
  const start = async () => {
    const began = performance.now();
    try {
      for (const name of ["dagre", "cytoscape"]) await unpack(name);
    } catch {
      about.replaceChildren(make("p", "This browser is too old for the layer graph: it cannot unpack the libraries. The table of layers has everything."));
      return;
    }
    cy = cytoscape({
      container: canvas, elements: [], layout: { name: "preset" }, autoungrabify: true, boxSelectionEnabled: false,
      minZoom: 0.02, maxZoom: 4, userZoomingEnabled: false, hideEdgesOnViewport: layers.length > 1500, textureOnViewport: layers.length > MANY,
    });
    const first = layers.find((l) => guilty(l.id));
    // Without a guilty layer to look at, as much is opened as can be read when all of it is seen.
    for (const most of [50, 25, 12, 1]) {
      openSome(most);
      await draw();
      fit();
      if (first || cy.zoom() >= READABLE) break;
    }
    frame();
    if (first) choose(standIn(first.id));
    cy.on("tap", "node", ({ target }) => (target.id()[0] === "g" ? toggle(target.id()) : choose(target.id())));
    canvas.addEventListener("keydown", keys);
    // The wheel scrolls the page until the graph has been clicked.
    canvas.addEventListener("focus", () => cy.userZoomingEnabled(true));
    canvas.addEventListener("blur", () => cy.userZoomingEnabled(false));
    canvas.addEventListener("pointerdown", () => canvas.focus({ preventScroll: true }));
    field("search").addEventListener("input", search);
    field("search").addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      at = (at + 1) % (matches.length || 1);
      if (matches.length) reveal(matches[at]);
    });
    field("colour").addEventListener("change", () => {
      section.dataset.colour = field("colour").value;
      paint();
    });
    field("backend")?.addEventListener("change", () => {
      test = Number(field("backend").value);
      draw().then(() => current && tell(current));
    });
    const actions = { in: () => zoom(1.3), out: () => zoom(1 / 1.3), fit, fold: () => all(false), open: () => all(true) };
    const all = async (open) => {
      for (const group of groups) group.open = open;
      await draw();
      frame();
    };
    for (const button of form.querySelectorAll("[data-do]")) button.addEventListener("click", () => actions[button.dataset.do]());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
    document.addEventListener("themechange", paint);
    form.querySelector("output").value = `${layers.length} layers`;
    section.dataset.ready = String(Math.round(performance.now() - began)); // milliseconds
    section.graph = { cy, reveal, idle: () => drawing };
  };
  form.addEventListener("submit", (event) => event.preventDefault());
  const near = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    near.disconnect();
    start();
  }, { rootMargin: "300px" });
  near.observe(canvas);
})();
