// A place where picture files are dropped, and a button that opens the dialogue.

const SENT_AS_IT_IS = 4e6; // bytes; a larger file is made smaller here
const LONGEST_SIDE = 2048; // pixels of what is made smaller

async function smaller(file) {
  const bitmap = await createImageBitmap(file);
  const longest = Math.max(bitmap.width, bitmap.height);
  const factor = Math.min(1, LONGEST_SIDE / longest);
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(factor * bitmap.width);
  canvas.height = Math.round(factor * bitmap.height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.95));
}

async function send(model, file) {
  try {
    const blob = file.size > SENT_AS_IT_IS ? await smaller(file) : file;
    model.send({ name: file.name }, undefined, [await blob.arrayBuffer()]);
  } catch {
    const megabytes = Math.round(file.size / 1e6);
    const wrong = `${file.name} could not be read by the browser`;
    const advice = "Give a JPEG, PNG or WebP file.";
    model.send({ problem: `${wrong} (${megabytes} MB). ${advice}` });
  }
}

async function sendAll(model, files) {
  for (const file of files) await send(model, file);
}

function listenForDrops(button, take) {
  const hear = (kind, act) =>
    button.addEventListener(kind, (e) => {
      e.preventDefault();
      e.stopPropagation();
      act(e);
    });
  hear("dragenter", () => button.classList.add("over"));
  hear("dragover", () => button.classList.add("over"));
  button.addEventListener("dragleave", () => button.classList.remove("over"));
  hear("drop", (e) => {
    button.classList.remove("over");
    take([...e.dataTransfer.files]);
  });
}

function render({ model, el }) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "faceid-drop";
  button.textContent = model.get("label");

  const input = document.createElement("input");
  input.type = "file";
  input.multiple = true;
  input.accept = "image/*";
  input.hidden = true;
  el.append(button, input);

  const take = (files) => sendAll(model, files);
  button.addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    take([...input.files]);
    input.value = "";
  });
  listenForDrops(button, take);
}

export default { render };
