// Without scripts the page shows all the same; these sort tables, save the data, and open what print would hide.
function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const text = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const number = (word) => (word === "inf" ? Infinity : word === "-inf" ? -Infinity : word === "" ? NaN : Number(word));
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].map((row) => [row, text(row, column)]);
      const missing = (key) => key === "" || key === "nan";
      const numeric = rows.every(([, key]) => missing(key) || !Number.isNaN(number(key)));
      rows.sort(([, a], [, b]) => {
        if (missing(a) || missing(b)) return missing(a) - missing(b); // last in either direction
        const order = numeric ? (number(a) > number(b)) - (number(a) < number(b)) : a.localeCompare(b);
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows.map(([row]) => row));
    });
  });
}

function download(button) {
  button.addEventListener("click", () => {
    const blob = new Blob([document.getElementById("data").textContent], { type: "application/json" });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = button.dataset.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}

function prepare(part) {
  part.querySelectorAll("table.sortable").forEach(sortable);
  part.querySelectorAll("button.download").forEach(download);
}

prepare(document);
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
