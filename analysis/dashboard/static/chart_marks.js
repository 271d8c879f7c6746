"use strict";
// The parts of a chart as elements of SVG. Their looks are attributes, so that a saved picture has them too.

// Outlines in a square of 16, by plotly's names; a circle is 12 across.
mixlab.SHAPES = {
  circle: "M8 2a6 6 0 1 0 .01 0z", square: "M2.5 2.5h11v11h-11z", diamond: "M8 .8 15.2 8 8 15.2.8 8z",
  "triangle-up": "M8 1.5 15 14H1z", "triangle-down": "M8 14.5 1 2h14z",
  cross: "M6 2h4v4h4v4h-4v4H6v-4H2V6h4z", x: "M3.5 1 8 5.5 12.5 1 15 3.5 10.5 8 15 12.5 12.5 15 8 10.5 3.5 15 1 12.5 5.5 8 1 3.5z",
  pentagon: "M8 1 15 6.2 12.3 14.5H3.7L1 6.2z", star: "M8 .8 9.9 6h5.3l-4.2 3.3 1.5 5.4L8 11.5l-4.5 3.2 1.5-5.4L.8 6h5.3z",
  "x-thin": "M2 2 14 14M14 2 2 14",
};
mixlab.LINE_DASHES = { dash: "6 4", dashdot: "7 3 1.5 3", dot: "1.5 3" };

mixlab.svg = function (tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in attributes) if (attributes[name] !== null && attributes[name] !== undefined) made.setAttribute(name, attributes[name]);
  made.append(...children);
  return made;
};

mixlab.px = (value) => Math.round(value * 10) / 10;

// A mark of `size` pixels; its look is that of the group that it is put into.
mixlab.markAt = function (x, y, symbol, size) {
  const scale = size / 12;
  return mixlab.svg("path", {
    d: mixlab.SHAPES[symbol.replace(/-open$/, "")] ?? mixlab.SHAPES.circle,
    transform: `translate(${mixlab.px(x - 8 * scale)} ${mixlab.px(y - 8 * scale)}) scale(${Math.round(scale * 1000) / 1000})`,
  });
};

// The look of marks, as attributes; `outline` = {color, width} or null.
mixlab.markLook = function (symbol, size, color, outline) {
  if (!/-(open|thin)$/.test(symbol)) return outline ? { fill: color, stroke: outline.color, "stroke-width": mixlab.px((12 * outline.width) / size) } : { fill: color };
  return { fill: "none", stroke: color, "stroke-width": mixlab.px((12 * Math.max(1.4, outline?.width ?? 0)) / size) };
};

// The path through `points` = [[x, y] or null, ...]: null leaves a gap; "hv" and "vh" go in steps.
mixlab.pathThrough = function (points, shape) {
  let path = "", isDown = false, last = null;
  for (const point of points) {
    if (point === null) { isDown = false; continue; }
    const [x, y] = point.map(mixlab.px);
    if (!isDown) path += `M${x} ${y}`;
    else if (shape === "hv") path += `H${x}V${y}`;
    else if (shape === "vh") path += `V${y}H${x}`;
    else if (last !== `${x} ${y}`) path += `L${x} ${y}`;
    isDown = true;
    last = `${x} ${y}`;
  }
  return path;
};

// Lines of text at a place. `text` is in plotly's dialect: <b>, <br>, and entities for what names hold of <, > and &.
mixlab.svgText = function (text, x, y, { anchor = "start", baseline = null, font, rotate = null }) {
  const made = mixlab.svg("text", {
    x: mixlab.px(x), y: mixlab.px(y), "text-anchor": anchor, "dominant-baseline": baseline, fill: font.color, "font-size": font.size,
    transform: rotate === null ? null : `rotate(${rotate} ${mixlab.px(x)} ${mixlab.px(y)})`,
  });
  mixlab.textLines(text).forEach((line, i) => {
    made.append(...line.map((part, j) => mixlab.svg("tspan", { "font-weight": part.bold ? 600 : null, x: i > 0 && j === 0 ? mixlab.px(x) : null, dy: i > 0 && j === 0 ? "1.25em" : null }, part.text)));
  });
  return made;
};

// [[{text, bold}, ...] for each line]
mixlab.textLines = function (text) {
  const plain = (part) => part.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
  return String(text).split("<br>").map((line) => {
    let bold = false;
    return line.split(/(<\/?b>)/).flatMap((part) => {
      if (part === "<b>" || part === "</b>") { bold = part === "<b>"; return []; }
      return part ? [{ text: plain(part), bold }] : [];
    });
  });
};
