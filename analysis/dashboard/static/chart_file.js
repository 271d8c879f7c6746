"use strict";
// A chart as a file, with the names of its colours and marks below it.

// `key` = [{label, color, symbol}, ...]
mixlab.charts.save = function (host, format, name, key) {
  const drawn = mixlab.chartOf(host).svg.cloneNode(true);
  const { font, paper_bgcolor: page } = host.layout;
  const width = Number(drawn.getAttribute("width"));
  let x = 16, y = Number(drawn.getAttribute("height")) + 16;
  const small = { ...font, size: 12 };
  const entries = key.map(({ label, color, symbol }) => {
    const size = Math.min(width - 32, mixlab.textWidth(label, small) + 36);
    if (x > 16 && x + size > width - 16) { x = 16; y += 20; }
    const made = [mixlab.svg("g", mixlab.markLook(symbol, 11, color, null), mixlab.markAt(x + 7, y, symbol, 11)), mixlab.svgText(mixlab.plotlyText(label), x + 18, y, { baseline: "central", font: small })];
    x += size;
    return made;
  });
  const height = key.length ? y + 18 : y - 16;
  const set = { height, viewBox: `0 0 ${width} ${height}` };
  for (const part in set) drawn.setAttribute(part, set[part]);
  drawn.querySelector("rect").setAttribute("fill", page);
  drawn.querySelector("rect").setAttribute("height", height);
  drawn.append(...entries.flat());
  const text = new XMLSerializer().serializeToString(drawn);
  if (format === "svg") return mixlab.saveText(text, name + ".svg", "image/svg+xml");
  const image = new Image();
  image.onload = () => {
    const scale = 2, canvas = mixlab.element("canvas", { width: scale * width, height: scale * height });
    canvas.getContext("2d").drawImage(image, 0, 0, scale * width, scale * height);
    canvas.toBlob((blob) => mixlab.saveBlob(blob, name + ".png"), "image/png");
  };
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text);
};
