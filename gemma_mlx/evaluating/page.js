"use strict";
const STEP = 200;
const body = document.querySelector("#table tbody"), search = document.getElementById("search");
const kind = document.getElementById("kind"), more = document.getElementById("more");
const heads = [...document.querySelectorAll("#table thead th")];
const rows = [...body.rows].map(row => ({ row, text: row.textContent.toLowerCase(), kinds: row.dataset.kinds.split(" ") }));
let limit = STEP;

function show() {
  const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let found = 0;
  for (const { row, text, kinds } of rows) {
    const fits = (!kind.value || kinds.includes(kind.value)) && wanted.every(word => text.includes(word));
    found += fits;
    row.hidden = !fits || found > limit;
  }
  document.getElementById("count").textContent = `${found} of ${rows.length} rows` + (found > limit ? `, the first ${limit} shown` : "");
  more.hidden = found <= limit;
}

function value(row, column) {
  const given = row.cells[column].dataset.value;
  const number = Number(given);
  return given === "" || Number.isNaN(number) ? given : number;
}

function sort(column) {
  const up = heads[column].getAttribute("aria-sort") === "descending";
  heads.forEach(head => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
  rows.sort((a, b) => {
    const x = value(a.row, column), y = value(b.row, column);
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return up ? order : -order;
  });
  body.append(...rows.map(({ row }) => row));
  show();
}

heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => sort(column)));
search.addEventListener("input", () => { limit = STEP; show(); });
kind.addEventListener("change", () => { limit = STEP; show(); });
more.addEventListener("click", () => { limit += STEP; show(); });
show();
