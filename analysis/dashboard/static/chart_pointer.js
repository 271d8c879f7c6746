"use strict";
// What a pointer does on a chart: the nearest mark tells about itself and can be picked, a drag of the mouse zooms.

mixlab.followPointer = function (chart) {
  const { host } = chart;
  const e = mixlab.element;
  const REACH = 20, DRAG = 6; // pixels
  const tip = e("div", { class: "tip", hidden: "" });
  const back = e("button", { type: "button", class: "unzoom", hidden: "" }, "Reset zoom");
  let marked = null; // {point, ring}
  let drag = null; // {panel, from, box}
  let hasDragged = false;
  host.classList.add("chart");

  chart.showDrawing = () => {
    tell(null);
    drag = null;
    if (chart.svg.parentNode === host) return;
    const [old] = host.children;
    if (old && tip.parentNode === host) old.replaceWith(chart.svg);
    else host.replaceChildren(chart.svg, tip, back);
    back.hidden = chart.zoom.size === 0;
  };
  back.addEventListener("click", (event) => { event.stopPropagation(); unzoom(); });
  host.addEventListener("pointermove", (event) => (drag ? stretch(event) : tell(nearest(event))));
  host.addEventListener("pointerleave", () => { if (!drag) tell(null); });
  host.addEventListener("pointerdown", (event) => {
    hasDragged = false;
    if (event.target === back || !chart.svg) return;
    tell(nearest(event));
    const [x, y] = spot(event);
    const panel = chart.panels.find((p) => inside(p, x, y));
    // a finger scrolls the page
    if (panel && event.pointerType === "mouse" && event.button === 0) drag = { panel, from: [x, y], box: null };
  });
  host.addEventListener("pointerup", () => { const done = drag; drag = null; if (done?.box) zoom(done); });
  host.addEventListener("pointercancel", () => { drag?.box?.remove(); drag = null; });
  host.addEventListener("click", (event) => {
    if (hasDragged || event.target === back || !chart.svg) return;
    const point = nearest(event);
    tell(point);
    if (point?.who && chart.onPick) chart.onPick(...point.who);
  });
  host.addEventListener("dblclick", () => { if (chart.zoom.size > 0) unzoom(); });

  function spot(event) {
    const box = chart.svg.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }
  function inside(panel, x, y) { return x >= panel.left && x <= panel.left + panel.width && y >= panel.top && y <= panel.top + panel.height; }

  function nearest(event) {
    if (!chart.svg || event.target === back) return null;
    const [x, y] = spot(event);
    let best = null, least = REACH;
    for (const point of chart.points) {
      // small marks, single seeds, lie around a large one: theirs is what is clearly nearer to them
      const distance = Math.hypot(point.x - x, point.y - y) + Math.max(0, 12 - point.size) / 2.5;
      if (distance <= least) { least = distance; best = point; } // of two at one place the one on top
    }
    return best;
  }

  function tell(point) {
    if (point === (marked?.point ?? null)) return;
    marked?.ring.remove();
    marked = null;
    tip.hidden = true;
    host.style.cursor = point?.who && chart.onPick ? "pointer" : "";
    const text = point?.text();
    if (!text) return;
    const ring = mixlab.svg("circle", { cx: mixlab.px(point.x), cy: mixlab.px(point.y), r: point.size / 2 + 4, fill: "none", stroke: host.layout.font.color, "stroke-width": 1.2 });
    chart.svg.append(ring);
    marked = { point, ring };
    tip.replaceChildren(...mixlab.textLines(text).map((line) => e("div", {}, ...line.map((part) => e(part.bold ? "strong" : "span", {}, part.text)))));
    tip.hidden = false;
    const width = host.clientWidth, left = point.x + 14 + tip.offsetWidth <= width ? point.x + 14 : Math.max(0, Math.min(point.x - 14 - tip.offsetWidth, width - tip.offsetWidth));
    const above = point.x + 14 + tip.offsetWidth > width && point.x - 14 < tip.offsetWidth; // no room on either side
    tip.style.left = `${left}px`;
    tip.style.top = `${Math.max(0, above ? point.y - 14 - tip.offsetHeight : point.y - tip.offsetHeight / 2)}px`;
  }

  function stretch(event) {
    const { panel, from } = drag;
    const clamp = (value, low, size) => Math.max(low, Math.min(low + size, value));
    const [px, py] = spot(event);
    const to = [clamp(px, panel.left, panel.width), clamp(py, panel.top, panel.height)];
    const moved = [Math.abs(to[0] - from[0]), Math.abs(to[1] - from[1])];
    if (!drag.box) {
      if (Math.max(...moved) < DRAG) return;
      tell(null);
      hasDragged = true;
      host.setPointerCapture(event.pointerId);
      drag.box = mixlab.svg("rect", { fill: host.layout.font.color, "fill-opacity": 0.12, stroke: host.layout.font.color });
      chart.svg.append(drag.box);
    }
    // along one axis only where the drag is: a strip
    drag.isX = moved[0] >= DRAG;
    drag.isY = moved[1] >= DRAG;
    drag.to = to;
    const [x, y] = [drag.isX ? Math.min(from[0], to[0]) : panel.left, drag.isY ? Math.min(from[1], to[1]) : panel.top];
    const size = { x, y, width: drag.isX ? moved[0] : panel.width, height: drag.isY ? moved[1] : panel.height };
    for (const name in size) drag.box.setAttribute(name, size[name]);
  }

  function zoom({ panel, from, to, isX, isY }) {
    const between = (side, a, b, ends) => {
      const at = (pixel) => side.range[0] + ((pixel - ends[0]) / (ends[1] - ends[0])) * (side.range[1] - side.range[0]);
      chart.zoom.set(side.group, { about: side.about, range: [at(a), at(b)].sort((l, r) => l - r) });
    };
    if (isX) between(panel.x, from[0], to[0], [panel.left, panel.left + panel.width]);
    if (isY) between(panel.y, from[1], to[1], [panel.top + panel.height, panel.top]);
    chart.paint();
  }

  function unzoom() { chart.zoom.clear(); chart.paint(); }
};
