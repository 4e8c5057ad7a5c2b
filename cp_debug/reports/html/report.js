// Sorting, filtering and copying. Without this script the page shows everything, unsorted.
"use strict";

for (const table of document.querySelectorAll("table.layers")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];

  const key = (row, column) => {
    const text = row.cells[column].dataset.v;
    const value = { Infinity: Infinity, inf: Infinity, "-inf": -Infinity, nan: NaN }[text] ?? Number(text);
    return text === "" || (Number.isNaN(value) && text === "nan") ? null : Number.isNaN(value) ? text : value;
  };

  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a < b ? -1 : Number(a > b));

  const sort = (head) => {
    const column = heads.indexOf(head);
    // Numbers are of interest from the largest down, names and places from the first on.
    const usual = head.classList.contains("n") && column > 0 ? "descending" : "ascending";
    const other = usual === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === usual ? other : usual;
    heads.forEach((h) => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const rows = [...body.rows].map((row) => [key(row, column), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return order === "ascending" ? compare(a, b) : compare(b, a);
    });
    body.append(...rows.map(([, row]) => row));
  };

  heads.forEach((head) => head.querySelector("button").addEventListener("click", () => sort(head)));

  const form = table.closest("section").querySelector(".filters");
  const wanted = Object.fromEntries([...form.querySelectorAll("[data-filter]")].map((f) => [f.dataset.filter, f]));
  const filter = () => {
    const words = wanted.text.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of body.rows) {
      const { text, verdict, op } = row.dataset;
      row.hidden =
        (wanted.verdict.value && wanted.verdict.value !== verdict) ||
        (wanted.op.value && wanted.op.value !== op) ||
        !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    form.querySelector("output").value = `${shown} of ${body.rows.length} layers`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
}

// A marker in the chart leads to its row, which is opened.
const reveal = () => {
  const row = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const details = row && row.querySelector(":scope > td > details");
  if (!details) return;
  row.hidden = false;
  details.open = true;
  details.querySelector("summary").focus();
};
addEventListener("hashchange", reveal);
reveal();

for (const box of document.querySelectorAll(".only-accused")) {
  box.addEventListener("change", () => document.getElementById(box.dataset.table).classList.toggle("only", box.checked));
}

// Light, dark or as the system has it; remembered where the browser lets a file remember.
const theme = document.querySelector(".theme select");
const wear = (name) => {
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  document.dispatchEvent(new Event("themechange"));
};
if (theme) {
  try {
    theme.value = localStorage.getItem("cpdebug-theme") ?? "system";
  } catch {
    theme.value = "system";
  }
  if (!theme.value) theme.value = "system";
  wear(theme.value);
  theme.closest(".theme").hidden = false;
  theme.addEventListener("change", () => {
    wear(theme.value);
    try {
      localStorage.setItem("cpdebug-theme", theme.value);
    } catch {
      // it holds for this visit
    }
  });
}

// The growth chart, part of it: a strip below chooses the layers, by dragging or by its buttons.
for (const chart of document.querySelectorAll("svg.growth")) {
  const strip = chart.closest("section").querySelector(".overview");
  const plots = chart.querySelectorAll(".plot");
  if (!strip) continue;
  const [left, right, count] = ["left", "right", "count"].map((name) => Number(chart.dataset[name]));
  const width = right - left;
  const chosen = strip.querySelector(".chosen");
  const picture = strip.querySelector("svg");
  let [from, to] = [0, count];
  const least = Math.min(8, count);
  const loose = [...chart.querySelectorAll("[data-x]")].map((e) => [e, Number(e.dataset.x)]);
  const show = (a, b) => {
    const span = Math.min(Math.max(b - a, least), count);
    from = Math.min(Math.max(a, 0), count - span);
    to = from + span;
    const scale = count / span;
    const place = (x) => left + (x - left - (from / count) * width) * scale;
    const shift = left - (left + (from / count) * width) * scale;
    for (const plot of plots) plot.setAttribute("transform", `translate(${shift} 0) scale(${scale} 1)`);
    for (const [element, x] of loose) {
      const moved = place(x);
      element.setAttribute("transform", `translate(${moved - x} 0)`);
      element.style.display = moved < left - 1 || moved > right + 1 ? "none" : "";
    }
    chosen.setAttribute("x", from);
    chosen.setAttribute("width", span);
    strip.querySelector("output").value = span === count ? `all ${count} layers` : `layers ${Math.floor(from)} to ${Math.ceil(to) - 1} of ${count}`;
  };
  const about = (factor) => {
    const accused = JSON.parse(chart.dataset.accused).find((i) => i >= from && i < to);
    const middle = factor < 1 && accused !== undefined && to - from === count ? accused : (from + to) / 2;
    const span = (to - from) * factor;
    show(middle - span / 2, middle + span / 2);
  };
  const actions = { in: () => about(0.5), out: () => about(2), left: () => show(from - (to - from) / 2, to - (to - from) / 2), right: () => show(from + (to - from) / 2, to + (to - from) / 2), all: () => show(0, count) };
  for (const button of strip.querySelectorAll("button")) button.addEventListener("click", () => actions[button.dataset.do]());
  const at = (event) => {
    const box = picture.getBoundingClientRect();
    return Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * count;
  };
  let start = null;
  picture.addEventListener("pointerdown", (event) => {
    start = at(event);
    picture.setPointerCapture(event.pointerId);
  });
  picture.addEventListener("pointermove", (event) => {
    if (start !== null && Math.abs(at(event) - start) > count / 200) show(Math.min(start, at(event)), Math.max(start, at(event)));
  });
  picture.addEventListener("pointerup", (event) => {
    const span = to - from;
    if (start !== null && Math.abs(at(event) - start) <= count / 200 && span < count) show(start - span / 2, start + span / 2);
    start = null;
  });
  strip.hidden = false;
}

for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    const code = button.closest("figure").querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code); // no clipboard here: it is selected, ready to be copied
    }
  });
}
