"use strict";
// What a scatter can't show: recall over difficulty, tuning curves, cost over T, quality by position, use of memory.

// `found` as for drawFindings; drawn for the arms and cells shown. A section that is closed is made once it is opened:
// of many sweeps these are hundreds of panels.
mixlab.drawFigures = function (host, found, shown) {
  const e = mixlab.element;
  const theme = mixlab.colors();
  const arms = new Map(shown.model.arms.map((arm) => [arm.name, { ...arm, color: mixlab.visible(arm.color) }]));
  const made = new Map([...host.children].map((details) => [details.dataset.name, details]));
  const few = shown.lines.length <= 60;
  host.replaceChildren(...found.flatMap((one) => {
    const lines = shown.lines.filter((line) => line.sweep === one.sweep);
    const names = new Map(lines.map((line) => [line.armInSweep, line.arm]));
    const cells = [...new Set(lines.map((line) => line.cell))];
    const about = { one, lines, cells, shown, theme, arms, lookOf: (armInSweep) => arms.get(names.get(armInSweep)) };
    return [
      ["capacity", "Recall over difficulty", mixlab.capacityPanels, 3], ["tuning-curves", "Tuning curves", mixlab.tuningPanels, 3],
      ["growth", "State over the context T", mixlab.growthPanels, 2], ["position", "Quality by position", mixlab.positionPanels, 3],
      ["memory", "Use of memory over training", mixlab.memoryPanels, 4],
    ].flatMap(([kind, title, panelsOf, most]) => section(`${one.sweep} ${kind}`, found.length > 1 ? `${one.sweep}: ${title}` : title, () => panelsOf(about), most));
  }));
  for (const details of made.values()) mixlab.charts.clear(details.children[2]);
  for (const details of host.children) details.ontoggle();

  // [the section], or [] where there is nothing to show
  function section(name, title, panelsOf, most) {
    const known = made.get(name);
    let content = known && !known.open ? null : panelsOf();
    if (content?.panels.length === 0) return [];
    const details = known ?? fresh(name, title, content);
    made.delete(name);
    details.ontoggle = () => { if (details.open) fill(details.children, content ??= panelsOf(), most); };
    return [details];
  }

  function fill([, legend, plot, caption], { panels, looks, caption: text }, most) {
    legend.replaceChildren(...looks.map((arm) => e("span", {}, mixlab.swatch(arm), " ", arm.name)));
    const nMore = panels.length - mixlab.MAX_PANELS;
    caption.textContent = panels.length === 0 ? "Nothing to show of these arms and cells." : text + (nMore > 0 ? ` ${nMore} more panels: choose cells or arms.` : "");
    if (panels.length === 0) mixlab.charts.clear(plot); else mixlab.drawPanels(plot, panels.slice(0, mixlab.MAX_PANELS), most, theme);
  }

  function fresh(name, title, { panels }) {
    const details = e("details", { "data-name": name, class: "figure" }, e("summary", {}, title),
      e("div", { class: "figure-legend quiet" }), e("div", { class: "figure-plot", role: "figure", "aria-label": title }), e("p", { class: "quiet" }));
    // many panels below each other would hide what follows
    details.open = few && (panels.length <= 6 || host.clientWidth >= 640);
    return details;
  }
};

mixlab.looksOf = (about, armsInSweep) => [...new Set(armsInSweep)].map(about.lookOf).filter(Boolean);

// A step aside for each arm, so that marks at one place don't hide each other: factors around 1.
mixlab.aside = function (armsInSweep, step) {
  const all = [...new Set(armsInSweep)];
  return new Map(all.map((arm, i) => [arm, step ** (i - (all.length - 1) / 2)]));
};

mixlab.curve = function (look, points, options = {}) {
  return {
    type: "scatter", mode: "lines+markers", x: points.map((p) => p.x), y: points.map((p) => p.y), text: points.map((p) => p.text),
    line: { color: look.color, width: 1.6, dash: look.dash ?? "solid" }, marker: { color: look.color, symbol: look.symbol, size: 9 }, ...options,
  };
};

mixlab.bars = (found, color) => ({
  type: "data", symmetric: false, visible: true, thickness: 1.4, width: 3, color,
  array: found.map((i) => (i.high === null ? 0 : i.high - i.mean)), arrayminus: found.map((i) => (i.low === null ? 0 : i.mean - i.low)),
});

mixlab.capacityPanels = function (about) {
  const { one, shown, theme } = about;
  const known = (one.capacity ?? []).filter((each) => about.lookOf(each.arm));
  const aside = mixlab.aside(known.map((each) => each.arm), 1.03);
  const accuracy = shown.model.axes.find((axis) => axis.name === "report/accuracy") ?? { name: "report/accuracy", label: "Accuracy", unit: "fraction" };
  const load = { name: "factor/pairs", label: "key-value pairs", unit: "" };
  const chance = shown.model.references.find((r) => r.sweep === one.sweep && r.axis === "report/accuracy")?.value ?? null;
  const panels = [...new Set(known.map((each) => each.group))].flatMap((group) => {
    const members = known.filter((each) => each.group === group);
    const loads = members.flatMap((each) => each.points.map((point) => point.n_pairs));
    const axisX = () => mixlab.scale(load, loads, true, theme, true, 6).layout;
    return [over(members, group, axisX()), held(members, loads), efficiency(members, axisX())].filter((panel) => panel.traces.length > 0);
  });
  return { panels, looks: mixlab.looksOf(about, known.map((each) => each.arm)), caption:
    "Accuracy with 95 % intervals over seeds; open marks: a seed diverged. Pairs at 90 %: where each seed first falls below it, between the numbers tested; an arrow says that seeds lie beyond them. Bits per byte: of the mean accuracy." };

  function over(members, group, x) {
    const traces = members.map((each) => {
      const look = about.lookOf(each.arm), points = each.points.filter((point) => point.accuracy !== null);
      return mixlab.curve(look, points.map((point) => ({ x: point.n_pairs * aside.get(each.arm), y: point.accuracy.mean,
        text: `<b>${mixlab.plotlyText(look.name)}</b><br>${point.n_pairs} pairs: ${mixlab.spread(point.accuracy)}<br>${point.accuracy.n} seeds${point.n_diverged ? `, ${point.n_diverged} diverged` : ""}` })),
      { error_y: mixlab.bars(points.map((point) => point.accuracy), look.color),
        marker: { color: look.color, size: 9, symbol: points.map((point) => look.symbol + (point.n_diverged ? "-open" : "")) } });
    }).filter((trace) => trace.x.length > 0);
    const levels = members[0].thresholds.map((t) => mixlab.levelLine(t.accuracy, t === members[0].thresholds[0] ? `${100 * t.accuracy} %` : "", theme, "dash"));
    if (chance !== null) levels.push(mixlab.levelLine(chance, "chance", theme, "dot"));
    const y = mixlab.scale(accuracy, members.flatMap((each) => each.points.map((point) => point.accuracy?.mean ?? null)), false, theme, false, 6).layout;
    return { title: group || "accuracy over difficulty", x, y, traces, shapes: levels.map((l) => l.shape), annotations: levels.map((l) => l.annotation) };
  }

  function held(members, loads) {
    const stateOf = (each) => each.points.map((point) => point.state_bytes).filter((bytes) => bytes !== null).at(-1) ?? null;
    const shownOf = members.map((each) => ({ each, state: stateOf(each), t: each.thresholds[0], look: about.lookOf(each.arm) })).filter((m) => m.state !== null && m.t.pairs !== null);
    const xs = mixlab.scale({ name: "cost/state_bytes", label: "State per sequence", unit: "bytes" }, shownOf.map((m) => m.state), true, theme, true, 4);
    const y = mixlab.scale({ ...load, label: "pairs recalled at 90 %" }, loads, true, theme, false, 6).layout;
    const traces = shownOf.map(({ each, state, t, look }) => mixlab.curve(look, [{ x: xs.place(state), y: t.pairs, text:
      `<b>${mixlab.plotlyText(look.name)}</b><br>${t.n_below === t.n ? "fewer than" : t.n_above ? "at least" : t.n_below ? "at most" : ""} ${Number(t.pairs.toPrecision(3))} pairs at 90 %`
      + (t.low === null ? "" : ` [${Number(t.low.toPrecision(3))}, ${Number(t.high.toPrecision(3))}]`) + `<br>${mixlab.human(state, "bytes")} of state<br>${t.n} seeds: ${t.n_above} beyond, ${t.n_below} below what was tested${t.n_unknown ? `; ${t.n_unknown} more unknown` : ""}` }],
    { mode: "markers", marker: { color: look.color, size: 11, symbol: look.symbol + (t.n_above || t.n_below ? "-open" : ""), line: { width: 2, color: look.color } },
      error_y: mixlab.bars([{ mean: t.pairs, low: t.low, high: t.high }], look.color) }));
    const arrows = shownOf.flatMap(({ state, t, look }) => [[t.n_above, -26], [t.n_below, 26]].filter(([n]) => n > 0).map(([, ay]) => ({
      x: Math.log10(xs.place(state)), y: Math.log10(t.pairs), ax: 0, ay, text: "", showarrow: true, arrowhead: 0, startarrowhead: 2, arrowside: "start", arrowcolor: look.color, arrowwidth: 1.6,
    })));
    return { title: "pairs at 90 % against state", x: xs.layout, y, traces, annotations: arrows };
  }

  function efficiency(members, x) {
    const points = members.map((each) => each.points.filter((point) => (point.bits_per_byte ?? 0) > 0));
    const traces = members.map((each, i) => mixlab.curve(about.lookOf(each.arm), points[i].map((point) => ({ x: point.n_pairs, y: point.bits_per_byte,
      text: `<b>${mixlab.plotlyText(about.lookOf(each.arm).name)}</b><br>${Number(point.bits_per_byte.toPrecision(3))} bits per byte<br>${Number(point.bits.toPrecision(3))} bits in ${mixlab.human(point.state_bytes, "bytes")}, ${point.n_pairs} pairs` })))).filter((trace) => trace.x.length > 0);
    const all = points.flat().map((point) => point.bits_per_byte);
    const y = mixlab.scale({ name: "bits", label: "bits recalled per byte", unit: "" }, all, all.length > 0 && Math.max(...all) / Math.min(...all) > 4, theme, false, 6).layout;
    return { title: "bits per byte of state", x, y, traces };
  }
};

// The select metric of every trial over each tuned number; see analysis/figures/learning_rate.py.
mixlab.tuningPanels = function (about) {
  const { one, shown, theme, cells } = about;
  const tunings = one.tuning.arm_cells.filter((each) => about.lookOf(each.arm) && cells.includes(each.cell));
  const trialsOf = new Map((one.trials ?? []).map((each) => [JSON.stringify([each.arm, each.cell]), each.trials]));
  const select = shown.model.sweeps.find((sweep) => sweep.name === one.sweep).metric.select;
  const y = shown.model.axes.find((axis) => axis.name === select) ?? { name: select, label: select, unit: "", direction: "maximize" };
  const settings = [...new Set(tunings.flatMap((each) => each.sensitivity.map((s) => s.setting)))];
  const values = [...trialsOf.values()].flat().map((trial) => trial.value).filter((value) => value !== null);
  const span = values.length ? Math.max(...values) - Math.min(...values) : 1;
  const foot = y.direction === "maximize" ? Math.min(...values, y.unit === "fraction" ? 0 : Infinity) - (y.unit === "fraction" ? 0 : 0.06 * span) : Math.max(...values) + 0.06 * span;
  const panels = settings.flatMap((setting) => cells.map((cell) => panel(setting, cell))).filter((made) => made.traces.length > 0);
  return { panels, looks: mixlab.looksOf(about, tunings.map((each) => each.arm)), caption:
    "Every tuning trial on the select split, one seed each. Ring: the setting that the replicates use. Thick: the range that stays within 5 % of the best. → ←: the best is the highest or lowest tried, so better ones may lie outside. Crosses at the edge: diverged or failed." };

  function panel(setting, cell) {
    const here = tunings.filter((each) => each.cell === cell);
    const trials = here.map((each) => (trialsOf.get(JSON.stringify([each.arm, cell])) ?? []).filter((trial) => typeof trial.settings[setting] === "number").sort((a, b) => a.settings[setting] - b.settings[setting]));
    const at = trials.flat().map((trial) => trial.settings[setting]);
    const log = at.length > 0 && Math.min(...at) > 0 && Math.max(...at) / Math.min(...at) >= 8;
    const traces = here.flatMap((each, i) => curves(each, trials[i], setting));
    const scaled = mixlab.scale(y, values, false, theme, false, 6).layout;
    return { title: cell === "all" ? "" : cell, x: mixlab.scale({ name: setting, label: setting, unit: "" }, at, log, theme, true, 5).layout, y: scaled, traces };
  }

  function curves(each, trials, setting) {
    const look = about.lookOf(each.arm);
    const point = (trial, value = trial.value) => ({ x: trial.settings[setting], y: value, text: `<b>${mixlab.plotlyText(look.name)}</b>${Object.entries(trial.settings).map(([name, v]) => `<br>${mixlab.plotlyText(name)} = ${mixlab.plotlyText(v)}`).join("")}<br>`
      + mixlab.plotlyText(trial.outcome === "finished" && trial.value !== null ? `${y.label}: ${mixlab.human(trial.value, y.unit)}` : `${trial.outcome} ${trial.reason}`) });
    const isDone = (trial) => trial.outcome === "finished" && trial.value !== null;
    const done = trials.filter(isDone), lost = trials.filter((trial) => !isDone(trial));
    const chosen = done.filter((trial) => Object.entries(trial.settings).every(([name, value]) => each.chosen[name] === value));
    const s = each.sensitivity.find((found) => found.setting === setting);
    const one_setting = trials.length > 0 && Object.keys(trials[0].settings).length === 1;
    const made = [];
    if (s && s.low !== null && each.best !== null) made.push({ type: "scatter", mode: "lines", x: [s.low, s.high], y: [each.best, each.best], hoverinfo: "skip", hovertemplate: null, opacity: 0.3, line: { color: look.color, width: 7 } });
    if (done.length) made.push(mixlab.curve(look, done.map((trial) => point(trial)), { mode: one_setting ? "lines+markers" : "markers" }));
    if (lost.length) made.push(mixlab.curve(look, lost.map((trial) => point(trial, foot)), { mode: "markers", marker: { color: look.color, symbol: "x-thin", size: 8, line: { color: look.color, width: 2 } } }));
    const flag = s && s.edge && s.n_values >= 3 ? (s.edge === "high" ? "→" : "←") : "";
    if (chosen.length) made.push({ type: "scatter", mode: flag ? "markers+text" : "markers", name: "chosen", x: chosen.map((trial) => trial.settings[setting]), y: chosen.map((trial) => trial.value), hoverinfo: "skip", hovertemplate: null,
      marker: { symbol: "circle-open", size: 17, color: theme.quiet, line: { width: 1.6 } }, text: chosen.map(() => flag), textposition: flag === "→" ? "middle right" : "middle left", textfont: { color: look.color, size: 15 } });
    return made;
  }
};

// By the measured fixed part and growth per token: a line by construction.
mixlab.growthPanels = function (about) {
  const { lines, theme } = about;
  const curves = new Map();
  for (const line of lines) {
    const { state_bytes_fixed: fixed, state_bytes_per_token: growth, state_context_tokens: at } = line.cost;
    if (curves.has(line.armInSweep) || fixed === undefined || growth === undefined || !at) continue;
    const points = [0.5, 1, 2, 4, 8].map((factor) => ({ x: at * factor, y: fixed + growth * at * factor })).filter((point) => point.y > 0);
    if (points.length) curves.set(line.armInSweep, points);
  }
  const all = [...curves.values()].flat();
  const x = mixlab.scale({ name: "factor/T", label: "context T (tokens)", unit: "" }, all.map((p) => p.x), true, theme, true, 6).layout;
  const y = mixlab.scale({ name: "cost/state_bytes", label: "State per sequence", unit: "bytes" }, all.map((p) => p.y), true, theme, false, 8).layout;
  const traces = [...curves].map(([arm, points]) => mixlab.curve(about.lookOf(arm), points.map((p) => ({ ...p, text: `<b>${mixlab.plotlyText(about.lookOf(arm).name)}</b><br>${mixlab.human(p.y, "bytes")} at ${p.x} tokens` }))));
  return { panels: traces.length ? [{ title: "", x, y, traces }] : [], looks: mixlab.looksOf(about, curves.keys()), caption:
    "From the fixed part and the growth per token that the runs measured: a line by construction, not a measurement. `mixlab bench` measures costs over T." };
};

mixlab.positionPanels = function (about) {
  const { lines, cells, shown, theme } = about;
  const buckets = new Map();
  for (const name of new Set(lines.flatMap((line) => Object.keys(line.metrics)))) {
    const match = name.match(/^(report\/\w+)\/pos_(\d+)_(\d+)$/);
    if (match) buckets.set(match[1], [...(buckets.get(match[1]) ?? []), { first: Number(match[2]), end: Number(match[3]) + 1, name }]);
  }
  const aside = mixlab.aside(lines.map((line) => line.armInSweep), 1.04);
  const several = [...buckets].filter(([, all]) => all.length > 1);
  const panels = several.flatMap(([metric, all]) => cells.map((cell) => {
    const of = all.sort((a, b) => a.first - b.first);
    const axis = shown.model.axes.find((each) => each.name === metric) ?? { name: metric, label: metric, unit: "" };
    const here = lines.filter((line) => line.cell === cell);
    const traces = here.map((line) => {
      const look = about.lookOf(line.armInSweep), known = of.filter((bucket) => line.metrics[bucket.name]);
      return mixlab.curve(look, known.map(({ first, end, name }) => ({ x: aside.get(line.armInSweep) * Math.sqrt(Math.max(first, end / 2) * end), y: line.metrics[name].mean,
        text: `<b>${mixlab.plotlyText(look.name)}</b><br>positions ${first} to ${end - 1}: ${mixlab.spread(line.metrics[name])}` })), { error_y: mixlab.bars(known.map(({ name }) => line.metrics[name]), look.color) });
    }).filter((trace) => trace.x.length > 0);
    const x = mixlab.scale({ name: "factor/position", label: "position (tokens)", unit: "" }, of.map(({ end }) => end), true, theme, true, 6).layout;
    x.range[0] -= 0.25;
    return { title: cell === "all" ? "" : cell, x, y: mixlab.scale(axis, traces.flatMap((trace) => trace.y), false, theme, false, 6).layout, traces };
  })).filter((panel) => panel.traces.length > 0);
  return { panels, looks: panels.length ? mixlab.looksOf(about, lines.map((line) => line.armInSweep)) : [], caption: "Means of buckets of positions, at their geometric middle, with 95 % intervals over seeds." };
};

// Mean and range over the seeds, a row for each arm, cell and layer.
mixlab.memoryPanels = function (about) {
  const { one, cells, theme } = about;
  const measures = [["gate_mean", "mean gate", true], ["slot_coverage", "slots read, share of all", true], ["slot_collisions", "reads of a slot read before", true], ["slot_kl_uniform", "KL from uniform (nats)", false]];
  const groups = new Map();
  for (const each of (one.memory_use ?? []).filter((use) => about.lookOf(use.arm) && cells.includes(use.cell))) {
    const name = [about.lookOf(each.arm).name, each.cell === "all" ? "" : each.cell, `layer ${each.layer.split("/")[0]}`].filter(Boolean).join(", ");
    groups.set(name, [...(groups.get(name) ?? []), each]);
  }
  const panels = [...groups].flatMap(([name, runs]) => measures.map(([metric, label, isShare], i) => panel(i === 0 ? name : "", runs, metric, label, isShare)));
  return { panels, looks: mixlab.looksOf(about, [...groups.values()].flat().map((each) => each.arm)), caption: "Line: mean over seeds; band: their range." };

  function panel(title, runs, metric, label, isShare) {
    const at = new Map();
    for (const run of runs) run.steps.forEach((step, i) => { const value = run.values[metric]?.[i]; if (Number.isFinite(value)) at.set(step, [...(at.get(step) ?? []), value]); });
    const steps = [...at.keys()].sort((a, b) => a - b), values = steps.map((step) => at.get(step));
    const look = about.lookOf(runs[0].arm), mean = values.map((all) => all.reduce((sum, value) => sum + value, 0) / all.length);
    const edge = (pick) => ({ type: "scatter", mode: "lines", x: steps, y: values.map((all) => pick(...all)), hoverinfo: "skip", hovertemplate: null, line: { width: 0, color: look.color } });
    const base = { gridcolor: theme.grid, linecolor: theme.quiet, zerolinecolor: theme.grid, showline: true, ticks: "outside", automargin: true };
    return { title, x: { ...base, title: { text: "training step", standoff: 6 } }, y: { ...base, title: { text: label, standoff: 6 }, ...(isShare ? { range: [-0.04, 1.04] } : { rangemode: "tozero" }) },
      traces: [edge(Math.min), { ...edge(Math.max), fill: "tonexty", fillcolor: look.color + "40" },
        mixlab.curve(look, steps.map((step, i) => ({ x: step, y: mean[i], text: `<b>${mixlab.plotlyText(look.name)}</b>, step ${step}<br>${label}: ${Number(mean[i].toPrecision(3))} (${values[i].length} seeds)` })), { mode: "lines" })] };
  }
};
