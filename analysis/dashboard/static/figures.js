"use strict";
// The other figures of a report: accuracy over pairs, tuning curves, quality by position, state over length, memories.
// The arms look as they do in every other figure.

mixlab.drawFigures = function (host, data) {
  const e = mixlab.element;
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const looks = new Map(data.sweep.arms.map((arm) => [arm.name, arm]));
  const cells = data.sweep.cells.map((cell) => cell.label);
  const figures = [capacity(), tuning(), position(), stateGrowth(), memoryUse()].filter((figure) => figure && figure.panels.length > 0);
  host.replaceChildren(...(figures.length ? [e("h2", {}, "Figures")] : []));
  for (const figure of figures) draw(figure);

  // A panel is {title, x, y (titles), xlog, traces}; `figure` = {title, panels}.
  function draw(figure) {
    const box = e("div", { role: "img", "aria-label": figure.title });
    host.append(e("h3", {}, figure.title), box);
    const columns = Math.max(1, Math.min(figure.panels.length, figure.columns ?? 4, Math.floor((host.clientWidth || 800) / 270)));
    const rows = Math.ceil(figure.panels.length / columns);
    const layout = {
      paper_bgcolor: color("--page"), plot_bgcolor: color("--page"), font: { color: color("--text"), size: 12, family: 'system-ui, "Segoe UI", sans-serif' },
      height: rows * 260 + 50, margin: { l: 56, r: 16, t: 34, b: 50 }, hovermode: "closest", annotations: [], showlegend: true,
      legend: { orientation: "h", y: -0.22 / rows, yanchor: "top" },
      ...(figure.panels.length > 1 ? { grid: { rows, columns, pattern: "independent", xgap: 0.2, ygap: 0.34 } } : {}),
    };
    const named = new Set();
    const traces = figure.panels.flatMap((panel, index) => {
      const suffix = index === 0 ? "" : String(index + 1);
      const line = { gridcolor: color("--line"), zeroline: false, automargin: true };
      layout["xaxis" + suffix] = { ...line, title: { text: panel.x, standoff: 6 }, type: panel.xlog ? "log" : "linear", ...(panel.ticks ? { tickvals: panel.ticks, ticktext: panel.ticks.map((tick) => String(Number(tick.toPrecision(4)))) } : {}) };
      layout["yaxis" + suffix] = { ...line, title: { text: panel.y, standoff: 6 }, type: panel.ylog ? "log" : "linear", ...(panel.ylog ? { dtick: 1, exponentformat: "power" } : {}) };
      layout.annotations.push({ text: "<b>" + mixlab.plotlyText(panel.title) + "</b>", showarrow: false, xref: `x${suffix} domain`, yref: `y${suffix} domain`, x: 0, y: 1, xanchor: "left", yanchor: "bottom", yshift: 6 });
      return panel.traces.map((trace) => {
        const isNew = trace.showlegend !== false && !named.has(trace.name);
        if (isNew) named.add(trace.name);
        return { type: "scatter", ...trace, legendgroup: trace.name, showlegend: isNew, xaxis: "x" + suffix, yaxis: "y" + suffix };
      });
    });
    Plotly.newPlot(box, traces, layout, { displaylogo: false, responsive: true, displayModeBar: "hover" });
  }

  // Points of one arm with their intervals; `points` = [{x, mean, low, high, text}].
  function curve(arm, points) {
    const look = looks.get(arm);
    const side = (name, sign) => points.map((point) => (point[name] == null ? 0 : sign * (point[name] - point.mean)));
    return {
      name: mixlab.plotlyText(arm), mode: "lines+markers", x: points.map((point) => point.x), y: points.map((point) => point.mean),
      marker: { color: look.color, symbol: look.symbol, size: 9 }, line: { color: look.color, width: 1.6, dash: look.dash },
      error_y: { type: "data", symmetric: false, array: side("high", 1), arrayminus: side("low", -1), thickness: 1.4, width: 3, color: look.color, visible: points.some((point) => point.low != null) },
      text: points.map((point) => mixlab.plotlyText(point.text ?? "")), hovertemplate: "%{y:.4g} at %{x:.4g}<br>%{text}",
    };
  }

  function capacity() {
    const groups = new Map();
    for (const each of data.capacity) groups.set(each.group, [...(groups.get(each.group) ?? []), each]);
    return {
      title: "Accuracy over the number of pairs", panels: [...groups].map(([group, members]) => ({
        title: group, x: "key-value pairs", y: "accuracy (report split)", xlog: true, ticks: [...new Set(members.flatMap((each) => each.points.map((point) => point.n_pairs)))],
        traces: members.map((each) => curve(each.arm, each.points.filter((point) => point.accuracy !== null)
          .map((point) => ({ x: point.n_pairs, ...point.accuracy, text: point.n_diverged ? `${point.n_diverged} diverged` : "" })))),
      })),
    };
  }

  // Every trial; those that gave no value stand at the foot, as crosses.
  function tuning() {
    const settings = [...new Set(data.tuning.arm_cells.flatMap((each) => each.sensitivity.map((found) => found.setting)))];
    const panels = settings.flatMap((setting) => cells.map((cell) => {
      const lines = data.comparisons.filter((line) => line.cell === cell);
      const having = (line) => line.trials.filter((trial) => typeof trial.settings[setting] === "number").sort((a, b) => a.settings[setting] - b.settings[setting]);
      const values = lines.flatMap(having).map((trial) => trial.settings[setting]);
      const known = lines.flatMap(having).filter((trial) => trial.outcome === "finished" && trial.value !== null);
      const foot = Math.min(0, ...known.map((trial) => trial.value));
      return {
        title: cell, x: mixlab.plotlyText(setting), y: mixlab.plotlyText(data.sweep.metric.select), xlog: Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) >= 8,
        traces: lines.flatMap((line) => {
          const trials = having(line);
          const chosen = data.tuning.arm_cells.find((each) => each.arm === line.arm && each.cell === cell)?.chosen[setting];
          const finished = trials.filter((trial) => trial.outcome === "finished" && trial.value !== null);
          const lost = trials.filter((trial) => !finished.includes(trial));
          const found = curve(line.arm, finished.map((trial) => ({ x: trial.settings[setting], mean: trial.value, text: trial.settings[setting] === chosen ? "chosen" : "" })));
          found.marker.line = { color: color("--text"), width: finished.map((trial) => (trial.settings[setting] === chosen ? 2 : 0)) };
          return [found, ...(lost.length ? [{
            name: mixlab.plotlyText(line.arm), showlegend: false, mode: "markers", x: lost.map((trial) => trial.settings[setting]), y: lost.map(() => foot),
            marker: { color: looks.get(line.arm).color, symbol: "x-thin-open", size: 9 }, text: lost.map((trial) => mixlab.plotlyText(`${trial.outcome} ${trial.reason}`)), hovertemplate: "%{x:.4g}: %{text}",
          }] : [])];
        }),
      };
    }).filter((panel) => panel.traces.some((trace) => trace.x.length > 0)));
    return { title: "Tuning: every trial on the select split, the chosen one ringed", panels };
  }

  function position() {
    const buckets = new Map();
    for (const line of data.comparisons) {
      for (const name of Object.keys(line.metrics)) {
        const match = /^(report\/\w+)\/pos_(\d+)_(\d+)$/.exec(name);
        if (match) buckets.set(name, { metric: match[1], first: Number(match[2]), last: Number(match[3]) });
      }
    }
    const metrics = [...new Set([...buckets.values()].map((bucket) => bucket.metric))];
    const panels = metrics.flatMap((metric) => cells.map((cell) => ({
      title: cell === "all" ? "" : cell, x: "position (tokens)", y: mixlab.plotlyText(metric), xlog: true,
      ticks: [...buckets.values()].filter((bucket) => bucket.metric === metric).map((bucket) => bucket.last + 1),
      traces: data.comparisons.filter((line) => line.cell === cell).map((line) => curve(line.arm, [...buckets]
        .filter(([name, bucket]) => bucket.metric === metric && line.metrics[name])
        .map(([name, bucket]) => ({ x: Math.sqrt(Math.max(bucket.first, (bucket.last + 1) / 2) * (bucket.last + 1)), ...line.metrics[name], text: `positions ${bucket.first} to ${bucket.last}` }))
        .sort((a, b) => a.x - b.x))),
    })));
    return { title: "Quality by position in the sequence", panels };
  }

  // A line by construction, from what was measured at one length.
  function stateGrowth() {
    const traces = [...looks.keys()].flatMap((arm) => {
      const cost = data.comparisons.find((line) => line.arm === arm && line.cost.state_context_tokens)?.cost;
      if (cost?.state_bytes_per_token == null || cost.state_bytes_fixed == null) return [];
      const points = [0.5, 1, 2, 4, 8].map((times) => times * cost.state_context_tokens)
        .map((tokens) => ({ x: tokens, mean: cost.state_bytes_fixed + cost.state_bytes_per_token * tokens })).filter((point) => point.mean > 0);
      return points.length > 0 ? [curve(arm, points)] : [];
    });
    const panel = { title: "", x: "context (tokens)", y: "bytes of state", xlog: true, ylog: true, ticks: [...new Set(traces.flatMap((trace) => trace.x))], traces };
    return { title: "State over the length of the context, from its fixed part and growth per token", panels: traces.length > 0 ? [panel] : [] };
  }

  // Single seeds: they are few.
  function memoryUse() {
    const names = { gate_mean: "mean gate", gate_above_50: "gates above .5", slot_coverage: "share of slots read", slot_collisions: "repeated reads", slot_kl_uniform: "KL from uniform (nats)" };
    const groups = new Map();
    for (const each of data.memory_use) {
      const key = [each.arm, each.cell === "all" ? "" : each.cell, `layer ${each.layer.split("/")[0]}`].filter((part) => part).join(", ");
      groups.set(key, [...(groups.get(key) ?? []), each]);
    }
    const shown = Object.keys(names).filter((name) => data.memory_use.some((each) => name in each.values));
    const panels = [...groups].flatMap(([title, runs]) => shown.map((name, i) => ({
      title: i === 0 ? title : "", x: "training step", y: names[name],
      traces: runs.filter((run) => name in run.values).map((run) => ({
        name: mixlab.plotlyText(run.arm), mode: "lines", x: run.steps, y: run.values[name], line: { color: looks.get(run.arm).color, width: 1.4 },
        text: run.steps.map(() => `seed ${run.seed}`), hovertemplate: "%{y:.4g} at step %{x}<br>%{text}",
      })),
    })));
    return { title: "Fast-weight memories over training, each seed", panels, columns: shown.length };
  }
};

// Only a report holds all that these figures need.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  if (data === null) return;
  const host = document.createElement("section");
  host.id = "figures";
  document.getElementById("findings").before(host);
  const redraw = () => mixlab.drawFigures(host, data);
  redraw();
  new MutationObserver(redraw).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
})();
