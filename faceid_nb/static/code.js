// Python, and a button that copies it.

async function copy(pre) {
  try {
    await navigator.clipboard.writeText(pre.textContent);
  } catch {
    // a page without the right to the clipboard may still copy what is selected
    const range = document.createRange();
    range.selectNodeContents(pre);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    document.execCommand("copy");
  }
}

function render({ model, el }) {
  const box = document.createElement("div");
  box.className = "faceid-code";

  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "copy";
  button.title = "copy to the clipboard";

  const pre = document.createElement("pre");
  pre.tabIndex = 0;
  pre.setAttribute("aria-label", "Python");
  box.append(button, pre);
  el.append(box);

  button.addEventListener("click", async () => {
    await copy(pre);
    button.textContent = "copied";
    setTimeout(() => (button.textContent = "copy"), 1500);
  });

  const show = () => {
    pre.textContent = model.get("text");
    box.hidden = !model.get("text");
  };
  model.on("change:text", show);
  show();
}

export default { render };
