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
