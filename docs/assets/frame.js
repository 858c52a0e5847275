// What was typed is copied: neither prompts nor what was printed.
const prompt = /^(?:>>>|\.\.\.|\$)(?: |$)/;
document.querySelectorAll("pre > code").forEach((code) => {
  const lines = code.textContent.split("\n");
  if (!lines.some((line) => /^(?:>>>|\$) /.test(line))) return;
  const typed = lines.filter((line, i) => prompt.test(line) || lines[i - 1]?.endsWith("\\"));
  code.parentElement.setAttribute("data-copy", typed.map((line) => line.replace(prompt, "")).join("\n"));
});

// On a narrow screen a table that does not fit becomes a list of its rows, each cell below its
// heading, and a formula that does not fit is set smaller.
const cells = (table) => {
  const heads = [...table.tHead.rows[0].cells];
  for (const row of table.tBodies[0].rows)
    [...row.cells].slice(1).forEach((cell, i) => {
      const head = document.createElement("span");
      head.className = "head";
      head.append(...[...heads[i + 1].childNodes].map((node) => node.cloneNode(true)));
      cell.prepend(head);
    });
};
const fit = () => {
  for (const table of document.querySelectorAll(".md-typeset table:not([class])")) {
    const column = (table.closest(".md-typeset__scrollwrap") ?? table).parentElement;
    table.removeAttribute("data-stacked");
    if (!table.tHead || table.offsetWidth <= column.clientWidth) continue;
    if (!table.querySelector(".head")) cells(table);
    table.setAttribute("data-stacked", "");
  }
  for (const box of document.querySelectorAll("div.arithmatex")) {
    box.style.fontSize = "";
    if (box.scrollWidth > box.clientWidth)
      box.style.fontSize = `${Math.floor((100 * box.clientWidth) / box.scrollWidth)}%`;
  }
};
document.fonts.ready.then(fit);
addEventListener("load", fit);
addEventListener("resize", fit);
