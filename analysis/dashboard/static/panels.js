"use strict";
// Several small plots as one: panels in a grid, each with axes, traces, lines and notes of its own.

// `panels` = [{title, x, y (layouts of axes), traces, shapes, annotations}], where `shapes` and `annotations` may use
// "x", "y", "x domain" and "y domain" of their panel. At most `most` of them stand side by side.
mixlab.drawPanels = function (host, panels, most, theme) {
  const width = host.clientWidth || 800;
  const columns = Math.max(1, Math.min(panels.length, most, Math.floor(width / 300)));
  const rows = Math.ceil(panels.length / columns);
  const height = rows * (columns > 1 ? 300 : 260) + 30;
  const layout = {
    paper_bgcolor: theme.page, plot_bgcolor: theme.page, font: mixlab.font(theme, 12),
    showlegend: false, width, height, margin: { l: 58, r: 18, t: panels.some((panel) => panel.title) ? 34 : 14, b: 50 }, hovermode: "closest", shapes: [], annotations: [],
    hoverlabel: { align: "left", bgcolor: theme.page, bordercolor: theme.quiet, font: { color: theme.text } },
  };
  if (panels.length > 1) layout.grid = { rows, columns, pattern: "independent", xgap: 0.22, ygap: 100 / (height / rows) };
  const traces = [];
  panels.forEach((panel, index) => {
    const suffix = index === 0 ? "" : String(index + 1);
    const own = (name) => name.replace(/^[xy]/, (letter) => letter + suffix);
    const placed = (items) => (items ?? []).map((item) => ({ ...item, xref: own(item.xref ?? "x"), yref: own(item.yref ?? "y") }));
    layout["xaxis" + suffix] = structuredClone(panel.x);
    layout["yaxis" + suffix] = structuredClone(panel.y);
    layout.shapes.push(...placed(panel.shapes));
    layout.annotations.push(...placed(panel.annotations), {
      text: panel.title ? "<b>" + mixlab.plotlyText(panel.title) + "</b>" : "", showarrow: false, xref: own("x domain"), yref: own("y domain"),
      x: 0, y: 1, xanchor: "left", yanchor: "bottom", yshift: 6, font: { color: theme.text, size: 12 },
    });
    traces.push(...panel.traces.map((trace) => ({ cliponaxis: false, hovertemplate: "%{text}<extra></extra>", ...trace, xaxis: "x" + suffix, yaxis: "y" + suffix })));
  });
  mixlab.charts.draw(host, traces, layout);
};

// A level across a panel, named at its right end.
mixlab.levelLine = function (value, text, theme, dash) {
  return {
    shape: { type: "line", xref: "x domain", x0: 0, x1: 1, y0: value, y1: value, line: { color: theme.quiet, width: 1, dash }, layer: "below" },
    annotation: { text, showarrow: false, xref: "x domain", x: 1, y: value, xanchor: "right", yanchor: "bottom", font: { color: theme.quiet, size: 10 } },
  };
};
