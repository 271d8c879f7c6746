"use strict";
// Numbers and names as text. `mixlab` is the one global of this page.
const mixlab = {};

mixlab.human = function (value, unit) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (unit === "bytes") return scaled(value, 1024, [" B", " KiB", " MiB", " GiB", " TiB"]);
  if (unit === "count") return scaled(value, 1000, ["", " k", " M", " G", " T", " P"]);
  if (unit === "fraction") return value.toFixed(3);
  if (unit === "ms") return significant(value, 3) + " ms";
  return significant(value, 4);

  function scaled(number, base, suffixes) {
    let power = 0;
    while (Math.abs(number) >= 999.5 && power < suffixes.length - 1) { number /= base; power += 1; }
    return (Math.abs(number) < 999.5 ? significant(number, 3) : number.toFixed(0)) + suffixes[power];
  }
  function significant(number, digits) { return String(Number(number.toPrecision(digits))); }
};

// A mean with its interval: "0.934 ±0.012"; the ± is left out where one seed leaves the spread unknown.
mixlab.spread = function (found) {
  if (!found || found.mean === null) return "–";
  const half = found.high === null ? null : found.high - found.mean;
  const size = Math.max(Math.abs(found.mean), half ?? 0);
  const usual = size >= 1e-2 && size < 1e3;
  const mean = usual ? found.mean.toFixed(3) : String(Number(found.mean.toPrecision(3)));
  if (half === null) return mean;
  return mean + " ±" + (usual ? half.toFixed(3) : String(Number(half.toPrecision(2))));
};

// Gives a function that does `act` once what was just drawn is on the screen; called again before that, it acts once.
mixlab.afterPaint = function (act) {
  let isDue = false;
  return () => {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(() => setTimeout(() => { isDue = false; act(); }));
  };
};

// The texts of a chart are in a small dialect of HTML, plotly's: names of arms and settings must not be taken for it.
mixlab.plotlyText = function (text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
};

mixlab.clipped = function (text, nCharacters) { return text.length <= nCharacters ? text : text.slice(0, nCharacters - 1) + "…"; };

// An element with attributes and children; strings become text, never markup.
mixlab.element = function (tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return made;
};

// The mark of an arm, drawn as in the plot.
mixlab.swatch = function (arm) {
  return mixlab.svg("svg", { class: "swatch", viewBox: "0 0 16 16", "aria-hidden": "true", ...mixlab.markLook(arm.symbol, 12, mixlab.visible(arm.color), null) }, mixlab.markAt(8, 8, arm.symbol, 12));
};
