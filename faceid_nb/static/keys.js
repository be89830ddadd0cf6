// Keys that are pressed in a board stay there, and some of them mean something.

const HELP = [
  ["Ctrl+Enter", "the main button of this tab"],
  ["Escape", "stop the work, or close what lies over the board"],
  ["arrows", "from picture to picture"],
  ["Enter", "see a picture large"],
  ["Space", "choose a picture for a comparison"],
  ["?", "this list"],
];
const TILES = ".faceid-gallery button.faceid-tile, .faceid-grid button.faceid-tile";
const WORDS = "textarea, select, input:not([type=checkbox]), [contenteditable]";

function makeHelp() {
  const dialog = document.createElement("dialog");
  dialog.className = "faceid-keys";
  dialog.setAttribute("aria-label", "keys");
  const list = document.createElement("dl");
  for (const [key, meaning] of HELP) {
    const dt = document.createElement("dt");
    const dd = document.createElement("dd");
    dt.textContent = key;
    dd.textContent = meaning;
    list.append(dt, dd);
  }
  const close = document.createElement("button");
  close.type = "button";
  close.textContent = "close";
  close.addEventListener("click", () => dialog.close());
  dialog.append(list, close);
  return dialog;
}

const middle = (element) => {
  const box = element.getBoundingClientRect();
  return [box.left + box.width / 2, box.top + box.height / 2];
};

// The picture beside, above or below one; undefined at the edge.
function neighbour(tiles, tile, key) {
  const at = tiles.indexOf(tile);
  if (key === "ArrowRight") return tiles[at + 1];
  if (key === "ArrowLeft") return tiles[at - 1];
  const [x, y] = middle(tile);
  const sign = key === "ArrowDown" ? 1 : -1;
  const away = (other) => {
    const [a, b] = middle(other);
    return sign * (b - y) > 4 ? sign * (b - y) * 10 + Math.abs(a - x) : Infinity;
  };
  const nearest = [...tiles].sort((a, b) => away(a) - away(b))[0];
  return away(nearest) < Infinity ? nearest : undefined;
}

function walk(board, event) {
  const tile = event.target.closest?.(TILES);
  if (!tile || !event.key.startsWith("Arrow")) return false;
  const seen = [...board.querySelectorAll(TILES)].filter((e) => e.offsetParent);
  neighbour(seen, tile, event.key)?.focus();
  return true;
}

// Whether the key meant something here.
function act(board, help, model, event) {
  const plain = !event.ctrlKey && !event.metaKey && !event.altKey;
  const over = event.target.closest?.("dialog[open]");
  if (event.key === "Enter" && !plain && !event.altKey) {
    document.activeElement?.blur?.(); // a field tells its value when it is left
    event.target.focus?.();
    if (!over) setTimeout(() => model.send({ key: "go" }), 50);
    return true;
  }
  if (over) return false; // the dialogue has keys of its own
  if (event.key === "Escape") {
    model.send({ key: "stop" });
    return true;
  }
  if (event.key === "?" && plain && !event.target.closest?.(WORDS)) {
    help.showModal();
    return true;
  }
  return plain && walk(board, event);
}

// A click beside the controls brings the keyboard into the board as well.
function takeFocus(board, event) {
  if (!event.target.closest("button, input, textarea, select, a, [tabindex='0']"))
    board.focus({ preventScroll: true });
}

function listen(board, help, model) {
  board.tabIndex = -1;
  const onKey = (event) => {
    const save = (event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "s";
    if (save) return; // the notebook is saved as everywhere
    event.stopPropagation();
    if (act(board, help, model, event)) event.preventDefault();
  };
  const onClick = (event) => takeFocus(board, event);
  board.addEventListener("keydown", onKey);
  board.addEventListener("click", onClick);
  board.append(help);
  return () => {
    board.removeEventListener("keydown", onKey);
    board.removeEventListener("click", onClick);
    help.remove();
  };
}

function render({ model, el }) {
  const help = makeHelp();
  let stop = () => {};
  let frame = 0;
  const find = () => {
    const board = el.closest(".faceid-board"); // not before the page has taken it in
    if (board) stop = listen(board, help, model);
    else frame = requestAnimationFrame(find);
  };
  find();
  return () => {
    cancelAnimationFrame(frame);
    stop();
  };
}

export default { render };
