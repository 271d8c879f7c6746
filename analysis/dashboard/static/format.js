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

// plotly reads a small dialect of HTML in its texts: names of arms and settings must not be taken for it.
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

// The marker of an arm, drawn as in the plot.
mixlab.swatch = function (arm) {
  const shapes = {
    circle: "M8 2a6 6 0 1 0 .01 0z", square: "M2.5 2.5h11v11h-11z", diamond: "M8 .8 15.2 8 8 15.2.8 8z",
    "triangle-up": "M8 1.5 15 14H1z", "triangle-down": "M8 14.5 1 2h14z",
    cross: "M6 2h4v4h4v4h-4v4H6v-4H2V6h4z", x: "M3.5 1 8 5.5 12.5 1 15 3.5 10.5 8 15 12.5 12.5 15 8 10.5 3.5 15 1 12.5 5.5 8 1 3.5z",
    pentagon: "M8 1 15 6.2 12.3 14.5H3.7L1 6.2z", star: "M8 .8 9.9 6h5.3l-4.2 3.3 1.5 5.4L8 11.5l-4.5 3.2 1.5-5.4L.8 6h5.3z",
  };
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("class", "swatch");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", shapes[arm.symbol] || shapes.circle);
  path.setAttribute("fill", arm.color);
  svg.append(path);
  return svg;
};
