"use strict";
// Charts by plotly, in a report: the same traces and layouts as chart.js draws.

mixlab.charts = {
  draw(host, traces, layout, { onPick = null } = {}) {
    // plotly draws the lines of panels that are new before it knows where they are
    const nPanels = String(Object.keys(layout).filter((name) => name.startsWith("xaxis")).length);
    if (host.dataset.panels !== undefined && host.dataset.panels !== nPanels) Plotly.purge(host);
    host.dataset.panels = nPanels;
    const bar = { modeBarButtonsToRemove: ["select2d", "lasso2d", "toImage"], displayModeBar: onPick && host.clientWidth >= 640 ? "hover" : false };
    const told = traces.map(({ tell, ...trace }) => (tell ? { ...trace, text: trace.x.map((_, i) => tell(i)) } : trace));
    Plotly.react(host, told, layout, { responsive: false, displaylogo: false, ...bar });
    host.removeAllListeners("plotly_click");
    if (onPick) host.on("plotly_click", (event) => { const picked = event.points[0]?.customdata; if (picked) onPick(...picked); });
  },
  clear(host) { Plotly.purge(host); },
  save(host, format, name) {
    return Plotly.downloadImage(host, { format, filename: name, width: host.clientWidth, height: host.clientHeight, scale: format === "png" ? 2 : 1 });
  },
};
