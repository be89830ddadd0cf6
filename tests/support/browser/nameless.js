// The controls of a board that have no name, or are not reached by the Tab key.
(board) => {
  const controls = "button, input, select, textarea, [role=slider]";
  const row = ".jupyter-widgets.widget-inline-hbox, .widget-hslider";
  const words = (elements) => elements.map((e) => e.textContent).join(" ");

  const labelled = (e) => {
    const ids = (e.getAttribute("aria-labelledby") || "").split(" ");
    return words(ids.map((id) => document.getElementById(id)).filter(Boolean));
  };
  const beside = (e) => {
    const label = e.closest(row)?.querySelector("label");
    return label ? label.textContent : "";
  };
  const name = (e) =>
    e.getAttribute("aria-label") ||
    labelled(e) ||
    words([...(e.labels || [])]) ||
    e.title ||
    e.textContent ||
    e.querySelector("img")?.alt ||
    beside(e);

  return [...board.querySelectorAll(controls)]
    .filter((e) => e.offsetParent && e.type !== "file")
    .map((e) => ({
      what: `${e.tagName} ${e.className}`,
      name: name(e).trim(),
      unreached: e.tabIndex < 0 && !e.disabled,
    }))
    .filter((control) => !control.name || control.unreached);
};
