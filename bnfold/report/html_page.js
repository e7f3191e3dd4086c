(() => {
  const tools = document.getElementById("tools");
  if (!tools) return;
  tools.hidden = false;
  const [search, verdict] = [tools.querySelector("input"), tools.querySelector("select")];
  const count = tools.querySelector("output");
  const table = document.getElementById("steps");
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, text: row.textContent.toLowerCase(), kind: row.dataset.kind }));
  const filter = () => {
    const wanted = search.value.trim().toLowerCase().split(/\s+/);
    let shown = 0;
    for (const { row, text, kind } of rows) {
      const fits = (!verdict.value || kind === verdict.value) && wanted.every((word) => text.includes(word));
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} shown`;
  };
  search.addEventListener("input", filter);
  verdict.addEventListener("change", filter);
  filter();
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = ({ row }) => row.cells[column].textContent;
      rows.sort((a, b) => (down ? -1 : 1) * key(a).localeCompare(key(b), "en", { numeric: true }));
      body.append(...rows.map(({ row }) => row));
    });
  });
})();
