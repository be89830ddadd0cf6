// A picture with a caption; a button where it is clickable.

function add(parent, tag, className) {
  const made = document.createElement(tag);
  made.className = className;
  parent.append(made);
  return made;
}

// Where a click was in the picture, 0..1: it stands in the middle of its frame.
function placeInPicture(img, click) {
  const frame = img.getBoundingClientRect();
  const width = img.naturalWidth || 1;
  const height = img.naturalHeight || 1;
  const fit = Math.min(frame.width / width, frame.height / height) || 1;
  const right = click.clientX - frame.left - frame.width / 2;
  const down = click.clientY - frame.top - frame.height / 2;
  return { x: right / (width * fit) + 0.5, y: down / (height * fit) + 0.5 };
}

// The bytes of a picture in an <img>. A new one is decoded before it takes the
// place of the old one, so nothing flickers.
class Picture {
  constructor(img) {
    this.img = img;
    this.url = null;
  }

  show(data, side) {
    if (!data || !data.byteLength) return this.clear();
    const old = this.url;
    const next = URL.createObjectURL(new Blob([data], { type: "image/png" }));
    this.url = next;
    const probe = new Image();
    probe.onload = () => {
      if (this.url === next) this.put(probe, side);
      if (old) URL.revokeObjectURL(old);
    };
    probe.src = next;
  }

  put(probe, side) {
    this.img.src = probe.src;
    this.img.hidden = false;
    this.img.classList.toggle("small", probe.naturalWidth < side);
  }

  clear() {
    this.img.hidden = true;
    this.img.removeAttribute("src");
    this.release();
  }

  release() {
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = null;
  }
}

function render({ model, el }) {
  const clickable = model.get("clickable");
  const box = add(el, clickable ? "button" : "div", "faceid-tile");
  const frame = add(box, "span", "faceid-frame");
  const img = add(frame, "img", "");
  const caption = add(box, "span", "faceid-caption");
  const picture = new Picture(img);

  if (clickable) {
    box.type = "button";
    box.addEventListener("click", (e) => model.send(placeInPicture(img, e)));
  }

  const showPicture = () => picture.show(model.get("image"), model.get("side"));
  const showWords = () => {
    img.alt = model.get("alt");
    caption.textContent = model.get("caption");
    box.title = model.get("tip");
    box.classList.toggle("dim", model.get("dim"));
    box.style.setProperty("--side", `${model.get("side")}px`);
    box.style.setProperty("--ratio", model.get("ratio"));
    if (clickable) box.setAttribute("aria-pressed", model.get("chosen"));
  };

  model.on("change:image", showPicture);
  const words = ["alt", "caption", "tip", "side", "ratio", "chosen", "dim"];
  for (const name of words) model.on(`change:${name}`, showWords);
  showPicture();
  showWords();
  return () => picture.release();
}

export default { render };
