"use strict";
(() => {
  const tip = document.getElementById("tip");
  const show = (event) => {
    const mark = event.target.closest ? event.target.closest("[data-tip]") : null;
    if (!mark) { tip.hidden = true; return; }
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const gap = 14, box = tip.getBoundingClientRect();
    let left = event.clientX + gap, top = event.clientY + gap;
    if (left + box.width > innerWidth - 8) left = Math.max(8, event.clientX - gap - box.width);
    if (top + box.height > innerHeight - 8) top = Math.max(8, event.clientY - gap - box.height);
    tip.style.left = left + "px";
    tip.style.top = top + "px";
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { capture: true, passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0], headRow = table.tHead.rows[table.tHead.rows.length - 1];
    const value = (row, index) => {
      const text = row.cells[index].dataset.value ?? row.cells[index].textContent.trim();
      const number = Number(text);
      return text === "" ? null : Number.isNaN(number) ? text.toLowerCase() : number;
    };
    [...headRow.cells].forEach((head, index) => {
      head.querySelector("button").addEventListener("click", () => {
        const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        for (const other of headRow.cells) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
        const rows = [...body.rows].map((row) => [value(row, index), row]);
        rows.sort(([a], [b]) => {
          if (a === null || b === null) return (a === null) - (b === null);
          return a < b ? -sign : a > b ? sign : 0;
        });
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      let label = "Copied";
      try {
        await navigator.clipboard.writeText(code.textContent.trim());
      } catch {
        const range = document.createRange();
        range.selectNodeContents(code);
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        label = document.execCommand("copy") ? "Copied" : "Selected";
      }
      button.textContent = label;
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
  addEventListener("beforeprint", () => {
    for (const each of document.querySelectorAll("details")) each.open = true;
  });
})();
