// Draws the formulas of a page: arithmatex wraps them in \( \) in running text and in \[ \] where they stand alone.
for (const element of document.querySelectorAll(".arithmatex")) {
  const text = element.textContent;
  katex.render(text.slice(2, -2), element, { displayMode: text.startsWith("\\[") });
}
