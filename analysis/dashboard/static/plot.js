"use strict";
// The plot: a panel per cell (or one for all), a mark per arm, its interval over seeds, and the Pareto line.

// `shown` = {data, x, y (axes), xlog, ylog, cell, hidden (Set of arms), intervals, front, seeds}.
mixlab.drawPlot = function (host, shown, onPick) {
  const { data, x, y } = shown;
  const style = getComputedStyle(document.documentElement);
  const theme = {
    page: style.getPropertyValue("--page").trim(), text: style.getPropertyValue("--text").trim(),
    quiet: style.getPropertyValue("--quiet").trim(), grid: style.getPropertyValue("--line").trim(),
  };
  const arms = data.sweep.arms.filter((arm) => !shown.hidden.has(arm.name));
  const visible = data.comparisons.filter((c) => !shown.hidden.has(c.arm));
  const panels = mixlab.panels(shown).map((panel) => ({ ...panel, lines: visible.filter((c) => panel.cells.includes(c.cell)) }));
  const byFactor = x.name.startsWith("factor/");
  const inUse = panels.flatMap((panel) => panel.lines);
  const runsInUse = shown.seeds ? data.runs.filter((run) => inUse.some((c) => c.arm === run.arm && c.cell === run.cell)) : [];
  const width = host.clientWidth || 800;
  const columns = Math.max(1, Math.min(panels.length, width >= 1050 ? 3 : width >= 640 ? 2 : 1));
  const rows = Math.ceil(panels.length / columns);
  const every = (axis) => [...inUse.map((c) => mixlab.valueOf(c, axis.name)), ...runsInUse.map((run) => mixlab.valueOfRun(run, axis.name))]
    .filter((value) => value !== null);
  const xs = mixlab.scale(x, every(x), shown.xlog, theme, true, Math.max(3, Math.floor((width / columns - 90) / 62)));
  const ys = mixlab.scale(y, every(y), shown.ylog, theme, false, 8);
  const panelHeight = panels.length === 1 ? (width < 640 ? 360 : 460) : 330;
  const layout = {
    paper_bgcolor: theme.page, plot_bgcolor: theme.page, font: { color: theme.text, size: 13, family: 'system-ui, "Segoe UI", sans-serif' }, showlegend: false,
    height: rows * panelHeight + 40, margin: { l: 64, r: 16, t: 34, b: 56 }, hovermode: "closest",
    hoverlabel: { align: "left", bgcolor: theme.page, bordercolor: theme.quiet, font: { color: theme.text } },
    annotations: [], shapes: [],
  };
  if (panels.length > 1) layout.grid = { rows, columns, pattern: "independent", xgap: 0.16, ygap: 0.3 };
  const traces = [];
  let nLeftOut = 0;

  panels.forEach((panel, index) => {
    const suffix = index === 0 ? "" : String(index + 1);
    const ids = { xaxis: "x" + suffix, yaxis: "y" + suffix };
    const first = index === 0;
    layout["xaxis" + suffix] = structuredClone({ ...xs.layout, ...(first ? {} : { matches: "x" }) });
    layout["yaxis" + suffix] = structuredClone({ ...ys.layout, ...(first ? {} : { matches: "y" }) });
    if (index % columns !== 0) layout["yaxis" + suffix].title = { text: "" };
    layout.annotations.push({
      text: "<b>" + mixlab.plotlyText(panel.title) + "</b>", showarrow: false, xref: ids.xaxis + " domain", yref: ids.yaxis + " domain",
      x: 0, y: 1, xanchor: "left", yanchor: "bottom", yshift: 6, font: { color: theme.text, size: 13 },
    });
    for (const reference of data.references.filter((r) => r.axis === y.name)) {
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
    if (shown.front && panel.single && !byFactor) traces.push(frontTrace(panel, ids));
    for (const arm of arms) {
      const lines = panel.lines.filter((c) => c.arm === arm.name);
      if (shown.seeds) traces.push(seedTrace(arm, panel, ids));
      traces.push(meanTrace(arm, lines, ids));
    }
  });

  const config = { responsive: false, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"], displayModeBar: width >= 640 ? "hover" : false };
  Plotly.react(host, traces, layout, config);
  host.removeAllListeners("plotly_click");
  host.on("plotly_click", (event) => { const picked = event.points[0]?.customdata; if (picked) onPick(picked[0], picked[1]); });
  return nLeftOut;

  function meanTrace(arm, lines, ids) {
    const kept = lines.map((c) => ({ c, px: xs.place(mixlab.valueOf(c, x.name) ?? NaN), py: ys.place(mixlab.valueOf(c, y.name) ?? NaN) }))
      .filter((p) => { const there = p.px !== null && p.py !== null; nLeftOut += there ? 0 : 1; return there; })
      .sort((a, b) => a.px - b.px);
    const bars = (axis, place, key) => {
      if (!shown.intervals || axis.name.startsWith("cost/") || axis.name.startsWith("factor/")) return { visible: false };
      const edge = (p, side) => p.c.metrics[axis.name]?.[side] ?? null;
      return {
        type: "data", symmetric: false, visible: true, thickness: 1.6, width: 4, color: arm.color,
        array: kept.map((p) => (edge(p, "high") === null ? 0 : edge(p, "high") - p[key])),
        // a log axis ends above zero: an interval that reaches below is drawn as far as it goes
        arrayminus: kept.map((p) => (edge(p, "low") === null ? 0 : p[key] - ((place(edge(p, "low")) ?? p[key] * 1e-3)))),
      };
    };
    return {
      type: "scatter", mode: byFactor ? "lines+markers" : "markers", name: mixlab.plotlyText(arm.name), ...ids,
      x: kept.map((p) => p.px), y: kept.map((p) => p.py), customdata: kept.map((p) => [p.c.arm, p.c.cell]), cliponaxis: false,
      marker: { color: arm.color, symbol: arm.symbol, size: 12, line: { color: theme.page, width: 1 } },
      line: { color: arm.color, width: byFactor ? 1.8 : 0 }, error_y: bars(y, ys.place, "py"), error_x: bars(x, xs.place, "px"),
      text: kept.map((p) => mixlab.hoverText(p.c, shown)), hovertemplate: "%{text}<extra></extra>",
    };
  }

  function seedTrace(arm, panel, ids) {
    const runs = data.runs.filter((run) => run.arm === arm.name && panel.cells.includes(run.cell) && run.outcome === "finished")
      .map((run) => ({ run, px: xs.place(mixlab.valueOfRun(run, x.name) ?? NaN), py: ys.place(mixlab.valueOfRun(run, y.name) ?? NaN) }))
      .filter((p) => p.px !== null && p.py !== null);
    return {
      type: "scatter", mode: "markers", name: "seeds", ...ids, x: runs.map((p) => p.px), y: runs.map((p) => p.py),
      customdata: runs.map((p) => [p.run.arm, p.run.cell]), marker: { color: arm.color, symbol: arm.symbol + "-open", size: 7, opacity: 0.75 },
      text: runs.map((p) => `<b>${mixlab.plotlyText(p.run.arm)}</b>, seed ${p.run.seed}<br>` +
        `${mixlab.plotlyText(y.label)}: ${mixlab.human(mixlab.valueOfRun(p.run, y.name), y.unit)}`),
      hovertemplate: "%{text}<extra></extra>",
    };
  }

  // The best that is reached at each cost: a step line through the front, flat until the next arm on it.
  function frontTrace(panel, ids) {
    const front = mixlab.paretoFront(panel.lines, x, y);
    const points = [...front].map((c) => ({ px: xs.place(mixlab.valueOf(c, x.name)), py: ys.place(mixlab.valueOf(c, y.name)) }))
      .filter((p) => p.px !== null && p.py !== null).sort((a, b) => a.px - b.px);
    return {
      type: "scatter", mode: "lines", name: "Pareto front", ...ids, x: points.map((p) => p.px), y: points.map((p) => p.py), hoverinfo: "skip",
      line: { color: theme.quiet, width: 1.5, dash: "dash", shape: x.direction === "minimize" ? "hv" : "vh" },
    };
  }
};

// Panels: {title, cells, single (one cell only)}. Across a varied factor, cells that differ only in it share a panel.
mixlab.panels = function (shown) {
  const cells = shown.data.sweep.cells;
  const chosen = cells.filter((cell) => cell.label === shown.cell);
  if (shown.x.name.startsWith("factor/")) {
    const factor = shown.x.name.slice(7);
    const groups = new Map();
    for (const cell of cells) {
      const rest = Object.entries(cell.factors).filter(([name]) => name !== factor);
      const title = rest.map(([name, value]) => `${name}=${value}`).join(", ") || "all cells";
      groups.set(title, [...(groups.get(title) ?? []), cell.label]);
    }
    return [...groups].map(([title, labels]) => ({ title, cells: labels, single: false }))
      .filter((panel) => chosen.length === 0 || panel.cells.includes(shown.cell));
  }
  if (shown.cell === mixlab.OVERLAY) return [{ title: "all cells", cells: cells.map((cell) => cell.label), single: cells.length === 1 }];
  return (chosen.length ? chosen : cells).map((cell) => ({ title: cell.label, cells: [cell.label], single: true }));
};

mixlab.hoverText = function (c, shown) {
  const { data, x, y } = shown;
  const text = mixlab.plotlyText;
  const measured = (axis) => (c.metrics[axis.name] ? mixlab.spread(c.metrics[axis.name]) : mixlab.human(mixlab.valueOf(c, axis.name), axis.unit));
  const lines = [`<b>${text(c.arm)}</b>  ${text(c.cell)}`, text(c.pattern)];
  for (const axis of [y, x]) lines.push(`${text(axis.label)}: ${text(measured(axis))}`);
  lines.push(`${c.n_seeds} of ${c.n_planned} seeds${c.notes.length ? ": " + text(c.notes.join("; ")) : ""}`);
  const runs = data.runs.filter((run) => run.arm === c.arm && run.cell === c.cell);
  for (const name of data.told_settings.slice(0, 8)) {
    const values = [...new Set(runs.map((run) => String(run.settings[name] ?? "–")))];
    lines.push(`${text(name)} = ${text(values.slice(0, 4).join(", "))}${values.length > 4 ? ", …" : ""}`);
  }
  return lines.join("<br>");
};
