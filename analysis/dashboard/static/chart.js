"use strict";
// Charts as SVG: what our pages draw with. It knows the part of plotly's vocabulary (traces, axes, shapes, annotations)
// that they use; plotly itself, which draws the same in a report, takes two seconds to start.

mixlab.charts = {
  // Draws `traces` on `layout` into `host`, in place of what was there. `onPick(...customdata)` hears of a click on a mark.
  draw(host, traces, layout, { onPick = null } = {}) {
    host.data = traces;
    host.layout = layout;
    const chart = mixlab.chartOf(host);
    chart.onPick = onPick;
    chart.paint();
  },
  clear(host) { host.replaceChildren(); },
};

// The chart of an element: {host, layout, panels, points, paint(), zoom}. `points` are the marks that can be pointed at.
mixlab.chartOf = (function () {
  const charts = new WeakMap();
  return function (host) {
    if (!charts.has(host)) {
      const chart = { host, onPick: null, panels: [], points: [], zoom: new Map(), svg: null, paint: () => mixlab.paintChart(chart) };
      charts.set(host, chart);
      mixlab.followPointer(chart);
    }
    return charts.get(host);
  };
})();

mixlab.paintChart = function (chart) {
  const { host } = chart, { data: traces, layout } = host;
  const s = mixlab.svg;
  const width = layout.width ?? (host.clientWidth || 800), height = layout.height;
  const font = { color: layout.font.color, size: layout.font.size - 1, family: layout.font.family };
  const panels = panelsOf();
  shareRanges();
  place();
  chart.panels = panels;
  chart.points = [];
  const id = chart.clip ??= "clip" + Math.random().toString(36).slice(2);
  chart.svg = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "font-family": layout.font.family, "aria-hidden": "true" },
    s("rect", { width, height, fill: layout.paper_bgcolor }), ...panels.map(drawPanel));
  chart.showDrawing();

  function panelsOf() {
    const found = [];
    for (const name of Object.keys(layout)) {
      const match = name.match(/^xaxis(\d*)$/);
      if (!match) continue;
      const x = layout[name], y = layout["yaxis" + match[1]], suffix = match[1];
      const of = (letter, axis) => ({ axis, id: letter + suffix, group: axis.matches ?? letter + suffix });
      found.push({ index: found.length, suffix, x: of("x", x), y: of("y", y), traces: [] });
    }
    const bySuffix = new Map(found.map((panel) => [panel.suffix, panel]));
    for (const trace of traces) bySuffix.get((trace.xaxis ?? "x").slice(1))?.traces.push(trace);
    return found;
  }

  // Axes that match have one range: of all that stands on them, or what was zoomed to.
  function shareRanges() {
    const values = new Map();
    for (const panel of panels) for (const letter of ["x", "y"]) {
      const side = panel[letter];
      if (side.axis.range) continue;
      if (!values.has(side.group)) values.set(side.group, []);
      const all = values.get(side.group);
      for (const trace of panel.traces) {
        const error = trace["error_" + letter];
        trace[letter].forEach((value, i) => {
          if (value === null) return;
          const at = mixlab.coordinate(side.axis, value);
          all.push(at);
          if (error?.visible) all.push(mixlab.coordinate(side.axis, value + error.array[i]), mixlab.coordinate(side.axis, value - error.arrayminus[i]));
        });
      }
    }
    const ranges = new Map();
    for (const panel of panels) for (const side of [panel.x, panel.y]) {
      if (!ranges.has(side.group)) {
        const own = mixlab.axisRange(side.axis, values.get(side.group) ?? []);
        side.about = `${side.axis.type} ${side.axis.title?.text}`;
        const zoomed = chart.zoom.get(side.group);
        if (zoomed && zoomed.about !== side.about) chart.zoom.delete(side.group); // it was of another axis
        ranges.set(side.group, { range: chart.zoom.get(side.group)?.range ?? own, about: side.about });
      }
      Object.assign(side, ranges.get(side.group));
    }
  }

  function place() {
    const { rows = 1, columns = 1 } = layout.grid ?? {};
    const rowHeight = height / rows, room = { top: layout.margin.t, bottom: panels.some((p) => p.x.axis.title?.text) ? 46 : 28, right: 14 };
    for (const panel of panels) {
      panel.column = panel.index % columns;
      panel.top = Math.floor(panel.index / columns) * rowHeight + room.top;
      panel.height = Math.max(40, rowHeight - room.top - room.bottom);
      panel.y.ticks = mixlab.axisTicks(panel.y.axis, panel.y.range, Math.max(2, Math.floor(panel.height / 42)));
      panel.left = 12 + Math.max(14, ...panel.y.ticks.map((tick) => mixlab.textWidth(tick.text, font))) + (panel.y.axis.title?.text ? 22 : 0);
    }
    const left = Array.from({ length: columns }, (_, column) => Math.max(0, ...panels.filter((p) => p.column === column).map((p) => p.left)));
    const inner = Math.max(60, (width - left.reduce((sum, each) => sum + each, 0) - columns * room.right) / columns);
    const starts = left.map((_, column) => left.slice(0, column + 1).reduce((sum, each) => sum + each, 0) + column * (inner + room.right));
    for (const panel of panels) {
      panel.left = starts[panel.column];
      panel.width = inner;
      panel.x.ticks = mixlab.axisTicks(panel.x.axis, panel.x.range, Math.max(2, Math.floor(inner / 80)));
      panel.atX = (c) => panel.left + (panel.width * (c - panel.x.range[0])) / (panel.x.range[1] - panel.x.range[0]);
      panel.atY = (c) => panel.top + panel.height - (panel.height * (c - panel.y.range[0])) / (panel.y.range[1] - panel.y.range[0]);
    }
  }

  function drawPanel(panel) {
    const { left, top, width: w, height: h } = panel;
    const clip = `${id}-${panel.index}`;
    const group = s("g", { class: "subplot" }, s("clipPath", { id: clip }, s("rect", { x: left - 1, y: top - 1, width: w + 2, height: h + 2 })));
    group.append(...gridAndNames(panel));
    for (const shape of layout.shapes ?? []) {
      if (!belongs(shape, panel)) continue;
      const [x0, x1] = [shape.x0, shape.x1].map((x) => spotX(panel, shape.xref, shape.xref.endsWith("domain") ? x : mixlab.coordinate(panel.x.axis, x)));
      const [y0, y1] = [shape.y0, shape.y1].map((y) => spotY(panel, shape.yref, shape.yref.endsWith("domain") ? y : mixlab.coordinate(panel.y.axis, y)));
      group.append(s("path", { d: mixlab.pathThrough([[x0, y0], [x1, y1]]), stroke: shape.line.color, "stroke-width": shape.line.width, "stroke-dasharray": mixlab.LINE_DASHES[shape.line.dash], "clip-path": `url(#${clip})` }));
    }
    const clipped = s("g", { "clip-path": `url(#${clip})`, fill: "none" });
    const marks = s("g", { class: "points" });
    group.append(clipped, marks);
    panel.traces.forEach((trace, i) => drawTrace(panel, trace, panel.traces[i - 1], clipped, marks));
    for (const note of layout.annotations ?? []) if (belongs(note, panel)) group.append(...annotation(panel, note));
    return group;
  }

  function gridAndNames(panel) {
    const { left, top, width: w, height: h } = panel, bottom = top + h;
    const made = [];
    let grid = "", ticks = "", end = -Infinity;
    for (const { at, text } of panel.x.ticks) {
      const x = mixlab.px(panel.atX(at)), half = mixlab.textWidth(text, font) / 2;
      grid += `M${x} ${top}V${bottom}`;
      ticks += `M${x} ${bottom}v5`;
      if (x - half < end + 4) continue; // it would run into the name before
      end = x + half;
      made.push(mixlab.svgText(mixlab.plotlyText(text), x, bottom + 18, { anchor: "middle", font }));
    }
    for (const { at, text } of panel.y.ticks) {
      const y = mixlab.px(panel.atY(at));
      grid += `M${left} ${y}H${left + w}`;
      ticks += `M${left} ${y}h-5`;
      made.push(mixlab.svgText(mixlab.plotlyText(text), left - 8, y, { anchor: "end", baseline: "central", font }));
    }
    const titleFont = { ...font, size: font.size + 1 };
    if (panel.x.axis.title?.text) made.push(mixlab.svgText(panel.x.axis.title.text, left + w / 2, bottom + 37, { anchor: "middle", font: titleFont }));
    if (panel.y.axis.title?.text) {
      const widest = Math.max(14, ...panel.y.ticks.map((tick) => mixlab.textWidth(tick.text, font)));
      made.push(mixlab.svgText(panel.y.axis.title.text, left - widest - 18, top + h / 2, { anchor: "middle", font: titleFont, rotate: -90 }));
    }
    return [s("path", { d: grid, stroke: panel.x.axis.gridcolor, fill: "none" }),
      s("path", { d: `M${left} ${top}V${bottom}H${left + w}${ticks}`, stroke: panel.x.axis.linecolor, fill: "none" }), ...made];
  }

  function drawTrace(panel, trace, before, clipped, marks) {
    const spot = (t, i) => {
      const x = panel.atX(mixlab.coordinate(panel.x.axis, t.x[i])), y = panel.atY(mixlab.coordinate(panel.y.axis, t.y[i]));
      return Number.isFinite(x) && Number.isFinite(y) ? [x, y] : null;
    };
    const spots = trace.x.map((_, i) => spot(trace, i));
    const isSeen = (p) => p !== null && p[0] >= panel.left - 1 && p[0] <= panel.left + panel.width + 1 && p[1] >= panel.top - 1 && p[1] <= panel.top + panel.height + 1;
    const opacity = trace.opacity ?? null;
    if (trace.fill === "tonexty" && before) {
      const back = before.x.map((_, i) => spot(before, i)).reverse();
      clipped.append(s("path", { d: mixlab.pathThrough([...spots, ...back].filter((p) => p !== null)) + "Z", fill: trace.fillcolor, stroke: "none" }));
    }
    if (trace.mode.includes("lines") && trace.line?.width !== 0) {
      clipped.append(s("path", { d: mixlab.pathThrough(spots, trace.line.shape), stroke: trace.line.color, "stroke-width": trace.line.width, "stroke-dasharray": mixlab.LINE_DASHES[trace.line.dash], "stroke-linejoin": "round", opacity }));
    }
    for (const [letter, error] of [["x", trace.error_x], ["y", trace.error_y]]) {
      if (!error?.visible) continue;
      clipped.append(s("path", { class: "bars", d: errorBars(panel, trace, spots, letter, error), stroke: error.color, "stroke-width": error.thickness, opacity }));
    }
    const marker = trace.marker ?? {}, size = marker.size ?? 6, symbols = marker.symbol ?? "circle";
    let group = null, shared = ""; // marks of one look are a group, which has it
    spots.forEach((p, i) => {
      if (!isSeen(p)) return;
      if (trace.mode.includes("markers")) {
        const symbol = Array.isArray(symbols) ? symbols[i] : symbols, kind = /-(open|thin)$/.test(symbol) ? "line" : "area";
        if (kind !== shared) marks.append(group = s("g", { ...mixlab.markLook(symbol, size, marker.color, marker.line), opacity: marker.opacity ?? opacity }));
        shared = kind;
        group.append(mixlab.markAt(p[0], p[1], symbol, size));
      }
      if (trace.mode.includes("text")) {
        const aside = trace.textposition === "middle right" ? 1 : -1;
        marks.append(mixlab.svgText(trace.text[i], p[0] + aside * (size / 2 + 3), p[1], { anchor: aside > 0 ? "start" : "end", baseline: "central", font: trace.textfont }));
      }
      if (trace.hoverinfo !== "skip") chart.points.push({ panel, x: p[0], y: p[1], size, text: () => trace.tell?.(i) ?? trace.text?.[i] ?? "", who: trace.customdata?.[i] ?? null });
    });
  }

  function errorBars(panel, trace, spots, letter, error) {
    const cap = error.width;
    let path = "";
    spots.forEach((p, i) => {
      const value = trace[letter][i];
      if (p === null || (!error.array[i] && !error.arrayminus[i])) return;
      const at = (end) => mixlab.px(letter === "x" ? panel.atX(mixlab.coordinate(panel.x.axis, end)) : panel.atY(mixlab.coordinate(panel.y.axis, end)));
      const far = letter === "x" ? panel.left - 9 : panel.top + panel.height + 9; // below a logarithmic axis
      const ends = [value - error.arrayminus[i], value + error.array[i]].map((end) => (Number.isFinite(at(end)) ? at(end) : far));
      const [x, y] = p.map(mixlab.px);
      path += letter === "x" ? `M${ends[0]} ${y - cap}v${2 * cap}m0 ${-cap}H${ends[1]}m0 ${-cap}v${2 * cap}` : `M${x - cap} ${ends[0]}h${2 * cap}m${-cap} 0V${ends[1]}m${-cap} 0h${2 * cap}`;
    });
    return path;
  }

  function belongs(item, panel) { return item.xref.split(" ")[0] === panel.x.id && item.yref.split(" ")[0] === panel.y.id; }
  function spotX(panel, ref, x) { return ref.endsWith("domain") ? panel.left + x * panel.width : panel.atX(x); }
  function spotY(panel, ref, y) { return ref.endsWith("domain") ? panel.top + (1 - y) * panel.height : panel.atY(y); }

  function annotation(panel, note) {
    const x = spotX(panel, note.xref, note.x), y = spotY(panel, note.yref, note.y);
    if (!(x >= panel.left - 1 && x <= panel.left + panel.width + 1 && y >= panel.top - 1 && y <= panel.top + panel.height + 1)) return [];
    if (note.showarrow) {
      const [tx, ty] = [x + note.ax, y + note.ay], way = Math.sign(note.ay);
      return [s("path", { d: `M${mixlab.px(x)} ${mixlab.px(y)}L${mixlab.px(tx)} ${mixlab.px(ty)}m-4 ${-5 * way}l4 ${5 * way}l4 ${-5 * way}`, stroke: note.arrowcolor, "stroke-width": note.arrowwidth, fill: "none" })];
    }
    if (!note.text) return [];
    const anchor = { left: "start", right: "end" }[note.xanchor] ?? "middle";
    const isMiddle = note.yanchor === "middle";
    const made = mixlab.svgText(note.text, x, y - (isMiddle ? 0 : 3) - (note.yshift ?? 0), { anchor, baseline: isMiddle ? "central" : null, font: { ...font, ...note.font } });
    if (!note.bgcolor) return [made];
    const w = mixlab.textWidth(note.text, { ...font, ...note.font });
    return [s("rect", { x: mixlab.px(x - w / 2), y: mixlab.px(y - 7), width: mixlab.px(w), height: 14, fill: note.bgcolor }), made];
  }
};
