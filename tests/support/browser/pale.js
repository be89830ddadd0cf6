// Texts of a board whose contrast with what is behind them is less than 3.
(board) => {
  const numbers = (css) => (css.match(/[\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const linear = (v) =>
    v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = numbers(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0.5) return colour;
    }
    return [255, 255, 255];
  };
  const contrast = (e) => {
    const a = luminance(numbers(getComputedStyle(e).color));
    const b = luminance(behind(e));
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const hasText = (e) =>
    [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());

  return [...board.querySelectorAll("*")]
    .filter((e) => e.offsetParent && !e.closest("[disabled], option"))
    .filter(hasText)
    .map((e) => [e.textContent.trim().slice(0, 30), contrast(e)])
    .filter(([, seen]) => seen < 3);
};
