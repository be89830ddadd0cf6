// Milliseconds from a click to the changed field.
async ([button, field]) => {
  const began = performance.now();
  const before = field.value;
  button.click();
  while (field.value === before) {
    await new Promise((done) => setTimeout(done, 1));
  }
  return performance.now() - began;
};
