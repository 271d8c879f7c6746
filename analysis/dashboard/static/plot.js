"use strict";
// The plot: a panel per group of lines, a mark per line (an arm in a cell of a sweep), its interval, the Pareto fronts.

// The colours of the page, which a chart must be told.
mixlab.colors = (function () {
  const known = new Map(); // by theme: asking for a style makes the browser lay out what has changed
  return function () {
    const { theme } = document.documentElement.dataset;
    if (!known.has(theme)) {
      const style = getComputedStyle(document.documentElement);
      const value = (name) => style.getPropertyValue(name).trim();
      known.set(theme, { page: value("--page"), text: value("--text"), quiet: value("--quiet"), grid: value("--line") });
    }
    return known.get(theme);
  };
})();

mixlab.font = (theme, size) => ({ color: theme.text, size, family: 'system-ui, "Segoe UI", sans-serif' });

// `shown` = {model, lines, panels, x, y (axes), xlog, ylog, look, seedRuns (or null), intervals, front}. Returns how
// many lines have no place on these axes.
mixlab.drawPlot = function (host, shown, onPick) {
  const { x, y, panels } = shown;
  const theme = mixlab.colors();
  const byFactor = x.name.startsWith("factor/");
  const width = host.clientWidth || 800;
  const columns = Math.max(1, Math.min(panels.length, width >= 1050 ? 3 : width >= 640 ? 2 : 1));
  const rows = Math.max(1, Math.ceil(panels.length / columns));
  const inUse = panels.flatMap((panel) => panel.lines);
  const seedsOf = groupSeeds();
  const every = (axis, side) => [...inUse.map((line) => mixlab.valueOf(line, axis.name)), ...inUse.flatMap((line) => seedsOf(line).map((run) => run[side]))]
    .filter((value) => value !== null);
  const xs = mixlab.scale(x, every(x, "x"), shown.xlog, theme, true, Math.max(3, Math.floor((width / columns - 90) / 62)));
  const ys = mixlab.scale(y, every(y, "y"), shown.ylog, theme, false, 8);
  const panelHeight = panels.length === 1 ? (width < 640 ? 360 : 460) : 330;
  const layout = {
    paper_bgcolor: theme.page, plot_bgcolor: theme.page, font: mixlab.font(theme, 13), showlegend: false,
    height: rows * panelHeight + 40, margin: { l: 64, r: 16, t: panels.some((panel) => panel.title) ? 34 : 14, b: 56 }, hovermode: "closest",
    hoverlabel: { align: "left", bgcolor: theme.page, bordercolor: theme.quiet, font: { color: theme.text } },
    annotations: [], shapes: [],
  };
  if (panels.length > 1) layout.grid = { rows, columns, pattern: "independent", xgap: 0.16, ygap: 0.3 };
  const traces = [];
  let nLeftOut = 0;
  panels.forEach(drawPanel);

  mixlab.charts.draw(host, traces, layout, { onPick });
  return nLeftOut;

  function drawPanel(panel, index) {
    const suffix = index === 0 ? "" : String(index + 1);
    const ids = { xaxis: "x" + suffix, yaxis: "y" + suffix };
    layout["xaxis" + suffix] = structuredClone({ ...xs.layout, ...(index === 0 ? {} : { matches: "x" }) });
    layout["yaxis" + suffix] = structuredClone({ ...ys.layout, ...(index === 0 ? {} : { matches: "y" }) });
    if (index % columns !== 0) layout["yaxis" + suffix].title = { text: "" };
    layout.annotations.push({
      text: panel.title ? "<b>" + mixlab.plotlyText(mixlab.clipped(panel.title, Math.floor(width / columns / 9))) + "</b>" : "", showarrow: false, xref: ids.xaxis + " domain", yref: ids.yaxis + " domain",
      x: 0, y: 1, xanchor: "left", yanchor: "bottom", yshift: 6, font: { color: theme.text, size: 13 },
    });
    for (const reference of referencesOf(panel)) {
      layout.shapes.push({
        type: "line", xref: ids.xaxis + " domain", yref: ids.yaxis, x0: 0, x1: 1, y0: reference.value, y1: reference.value,
        line: { color: theme.quiet, width: 1, dash: "dot" }, layer: "below",
      });
      layout.annotations.push({
        text: mixlab.plotlyText(reference.label), showarrow: false, xref: ids.xaxis + " domain", yref: ids.yaxis, x: 1,
        y: shown.ylog ? Math.log10(reference.value) : reference.value, xanchor: "right", yanchor: "bottom", font: { color: theme.quiet, size: 11 },
      });
    }
    if (xs.breakAt && shown.xlog) {
      layout.annotations.push({
        text: "//", showarrow: false, xref: ids.xaxis, yref: ids.yaxis + " domain", x: Math.log10(xs.breakAt), y: 0,
        yanchor: "middle", font: { color: theme.quiet, size: 12 }, bgcolor: theme.page, borderpad: 0,
      });
    }
    if (shown.front && panel.single) traces.push(...mixlab.fronts(panel.lines, x, y).map((front) => frontTrace(front, ids)));
    // the error bars of a trace have one colour: a trace for each
    for (const [color, lines] of grouped(panel.lines, (line) => shown.look.of(line).color)) {
      if (shown.seedRuns) traces.push(seedTrace(lines, color, ids));
      traces.push(meanTrace(lines, color, ids));
    }
  }

  // Only what holds for every sweep of a panel, each value once.
  function referencesOf(panel) {
    const sweeps = new Set(panel.lines.map((line) => line.sweep));
    const found = new Map();
    for (const r of shown.model.references) if (r.axis === y.name && sweeps.has(r.sweep)) found.set(r.value, r);
    return found.size === 1 ? [...found.values()] : [];
  }

  function meanTrace(lines, color, ids) {
    const placed = [];
    // marks that only differ in the factor across are joined; a gap keeps the others apart
    for (const [, group] of grouped(lines, (line) => JSON.stringify([line.arm, line.sweep, byFactor ? otherFactors(line) : line.cell]))) {
      const kept = group.map((line) => ({ line, px: xs.place(mixlab.valueOf(line, x.name) ?? NaN), py: ys.place(mixlab.valueOf(line, y.name) ?? NaN) }))
        .filter((p) => { const there = p.px !== null && p.py !== null; nLeftOut += there ? 0 : 1; return there; })
        .sort((a, b) => a.px - b.px);
      if (byFactor && placed.length && kept.length) placed.push({ line: null, px: null, py: null });
      placed.push(...kept);
    }
    const bars = (axis, place, key) => {
      if (!shown.intervals || axis.name.startsWith("cost/") || axis.name.startsWith("factor/")) return { visible: false };
      const edge = (p, side) => { const value = p.line?.metrics[axis.name]?.[side] ?? null; return mixlab.hasPlace(value) ? value : null; };
      return {
        type: "data", symmetric: false, visible: true, thickness: 1.6, width: 4, color,
        array: placed.map((p) => (edge(p, "high") === null ? 0 : edge(p, "high") - p[key])),
        // a log axis ends above zero: an interval that reaches below is drawn as far as it goes
        arrayminus: placed.map((p) => (edge(p, "low") === null ? 0 : p[key] - ((place(edge(p, "low")) ?? p[key] * 1e-3)))),
      };
    };
    return {
      type: "scatter", mode: byFactor ? "lines+markers" : "markers", name: mixlab.plotlyText(lines[0].arm), ...ids,
      x: placed.map((p) => p.px), y: placed.map((p) => p.py), customdata: placed.map((p) => (p.line ? [p.line.arm, p.line.cell, p.line.sweep] : null)), cliponaxis: false,
      marker: { color, symbol: placed.map((p) => (p.line ? shown.look.of(p.line).symbol : "circle")), size: placed.length > 150 ? 8 : 12, line: { color: theme.page, width: 1 } },
      line: { color, width: byFactor ? 1.8 : 0 }, error_y: bars(y, ys.place, "py"), error_x: bars(x, xs.place, "px"),
      tell: (i) => (placed[i].line ? mixlab.hoverText(placed[i].line, shown) : ""), hovertemplate: "%{text}<extra></extra>",
    };
  }

  function seedTrace(lines, color, ids) {
    const runs = lines.flatMap((line) => seedsOf(line).map((run) => ({ line, run, px: xs.place(run.x ?? NaN), py: ys.place(run.y ?? NaN) })))
      .filter((p) => p.px !== null && p.py !== null);
    return {
      type: "scatter", mode: "markers", name: "seeds", ...ids, x: runs.map((p) => p.px), y: runs.map((p) => p.py),
      customdata: runs.map((p) => [p.line.arm, p.line.cell, p.line.sweep]),
      marker: { color, symbol: runs.map((p) => shown.look.of(p.line).symbol + "-open"), size: 7, opacity: 0.75 },
      tell: (i) => `<b>${mixlab.plotlyText(runs[i].line.arm)}</b>, seed ${runs[i].run.seed}<br>${mixlab.plotlyText(y.label)}: ${mixlab.human(runs[i].run.y, y.unit)}`,
      hovertemplate: "%{text}<extra></extra>",
    };
  }

  // The best that is reached at each cost: a step line through the front, flat until the next arm on it.
  function frontTrace(front, ids) {
    const points = [...front].map((line) => ({ px: xs.place(mixlab.valueOf(line, x.name)), py: ys.place(mixlab.valueOf(line, y.name)) }))
      .filter((p) => p.px !== null && p.py !== null).sort((a, b) => a.px - b.px);
    return {
      type: "scatter", mode: "lines", name: "Pareto front", ...ids, x: points.map((p) => p.px), y: points.map((p) => p.py), hoverinfo: "skip",
      line: { color: theme.quiet, width: 1.5, dash: "dash", shape: x.direction === "minimize" ? "hv" : "vh" },
    };
  }

  function groupSeeds() {
    if (!shown.seedRuns) return () => [];
    const runs = new Map();
    for (const run of shown.seedRuns) {
      const name = JSON.stringify([run.sweep, run.arm, run.cell]);
      if (!runs.has(name)) runs.set(name, []);
      runs.get(name).push(run);
    }
    return (line) => runs.get(JSON.stringify([line.sweep, line.armInSweep, line.cell])) ?? [];
  }

  function otherFactors(line) { return Object.entries(line.factors).filter(([name]) => "factor/" + name !== x.name); }

  function grouped(items, of) {
    const groups = new Map();
    for (const item of items) {
      const name = of(item);
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(item);
    }
    return groups;
  }
};

mixlab.hoverText = function (line, shown) {
  const { x, y } = shown;
  const text = mixlab.plotlyText;
  const measured = (axis) => (line.metrics[axis.name] ? mixlab.spread(line.metrics[axis.name]) : mixlab.human(mixlab.valueOf(line, axis.name), axis.unit));
  const lines = [`<b>${text(line.arm)}</b>  ${text(line.cell)}${shown.model.sweeps.length > 1 ? "  " + text(line.sweep) : ""}`, text(line.pattern)];
  for (const axis of [y, x]) lines.push(`${text(axis.label)}: ${text(measured(axis))}`);
  lines.push(`${line.n_seeds} of ${line.n_planned} seeds${line.notes.length ? ": " + text(line.notes.join("; ")) : ""}`);
  for (const [name, values] of Object.entries(line.told ?? {}).slice(0, 8)) {
    lines.push(`${text(name)} = ${text(values.slice(0, 4).join(", "))}${values.length > 4 ? ", …" : ""}`);
  }
  return lines.join("<br>");
};
