"use strict";
// One mixer: its contract result, what its arms cost and reached in every sweep, and what benchmarks measured.

(function () {
  const byId = (id) => document.getElementById(id);
  const e = mixlab.element;
  const view = new mixlab.View(false);
  const name = view.get("name", null);
  let data = null;
  let drawnWidth = 0;
  let key = []; // what the colours of the plot stand for

  mixlab.theme(view, draw);
  new ResizeObserver(() => { if (byId("plot").clientWidth !== drawnWidth) draw(); }).observe(byId("plot"));
  byId("controls").onsubmit = (event) => event.preventDefault();
  for (const id of ["x", "y"]) byId(id).onchange = () => { view.set({ [id]: byId(id).value }); draw(); };
  for (const format of ["png", "svg"]) byId("save-" + format).onclick = () => mixlab.charts.save(byId("plot"), format, ("mixlab-" + name).replace(/[^\w.-]+/g, "_"), key);
  const fail = (text) => { byId("status").textContent = text; byId("status").className = text ? "error" : ""; };
  if (name === null) mixlab.watch("mixers/data", takeAll, fail);
  else mixlab.watch("mixers/data?name=" + encodeURIComponent(name), take, fail);

  function takeAll(mixers) {
    byId("status").textContent = mixers.length ? "" : "This store holds no sweep yet: run one with `mixlab sweep run`.";
    const rows = mixers.map((mixer) => e("tr", {}, e("th", { scope: "row", class: "words" }, e("a", { href: "./mixers?name=" + encodeURIComponent(mixer.name) }, mixer.name)),
      e("td", {}, mixer.n_runs.toLocaleString("en")), e("td", { class: "words" }, mixer.sweeps.slice(0, 12).join(", ") + (mixer.sweeps.length > 12 ? ` and ${mixer.sweeps.length - 12} more` : ""))));
    byId("all").replaceChildren(e("div", { class: "scroll" }, e("table", {}, e("thead", {}, e("tr", {}, e("th", { scope: "col", class: "words" }, "mixer"), e("th", { scope: "col" }, "runs"),
      e("th", { scope: "col", class: "words" }, "sweeps"))), e("tbody", {}, ...rows))));
    return mixlab.pace(false);
  }

  function take(found) {
    data = found;
    byId("status").textContent = "";
    byId("content").hidden = false;
    byId("title").textContent = data.name;
    document.title = data.name + " – mixlab";
    drawContract();
    fillControls();
    draw();
    drawRuns();
    return mixlab.pace(false);
  }

  function drawContract() {
    const found = data.contract;
    const make = `mixlab check ${data.name} --json > RUNS/checks/${data.name}.json`;
    if (found === null) {
      return byId("contract").replaceChildren(e("p", {}, "No result is recorded. To make one, with RUNS the folder of the runs of this server: ", e("code", {}, make)));
    }
    const counts = new Map();
    for (const check of found.checks) counts.set(check.status, (counts.get(check.status) ?? 0) + 1);
    const bad = found.checks.filter((check) => check.status !== "passed");
    byId("contract").replaceChildren(
      e("p", {}, e("strong", { class: found.ok ? "passed" : "failed-word" }, found.ok ? "✓ keeps the contract" : "✗ breaks the contract"),
        ` – ${[...counts].map(([status, n]) => `${n} ${status}`).join(", ")}; ${[found.impl, found.device, found.dtype].filter(Boolean).join(", ")}`),
      ...(bad.length ? [e("ul", {}, ...bad.map((check) => e("li", {}, e("strong", {}, `${check.name}: ${check.status}`), check.message ? " – " + check.message : "")))] : []),
      e("p", { class: "quiet" }, `From ${found.file}, ${mixlab.ago(found.made_ms)}. Again: `, e("code", {}, make)));
  }

  // What can stand across: the context at which state was measured, sizes, and settings in which the arms' cells differ.
  function axes() {
    const known = new Map(data.sweeps.flatMap((sweep) => sweep.axes).map((axis) => [axis.name, axis]));
    const factors = new Map();
    for (const line of lines()) for (const [factor, value] of Object.entries(line.factors)) if (typeof value === "number") factors.set(factor, (factors.get(factor) ?? new Set()).add(value));
    const varied = [...factors].filter(([, values]) => values.size > 1).map(([factor, values]) => ({
      name: "factor/" + factor, label: factor, unit: "", direction: "minimize", log: Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) >= 8,
    }));
    return [...varied, ...known.values()];
  }

  function lines() { return data.sweeps.flatMap((sweep) => sweep.comparisons.map((line) => ({ ...line, sweep: sweep.name, armInSweep: line.arm, mixer: data.name }))); }

  function fillControls() {
    const all = axes();
    byId("x").replaceChildren(...all.map((axis) => new Option(axis.name.startsWith("cost/") || axis.name.startsWith("factor/") ? axis.label : axis.name, axis.name)));
    byId("y").replaceChildren(...all.filter((axis) => !axis.name.startsWith("factor/")).map((axis) => new Option(axis.name.startsWith("cost/") ? axis.label : axis.name, axis.name)));
  }

  function draw() {
    if (data === null) return;
    const all = axes();
    const named = (id, otherwise) => all.find((axis) => axis.name === view.get(id)) ?? all.find((axis) => axis.name === otherwise) ?? all[0];
    const x = named("x", all.some((axis) => axis.name === "cost/state_context_tokens") && !all.some((axis) => axis.name.startsWith("factor/")) ? "cost/state_context_tokens" : all[0].name);
    const y = named("y", "cost/state_bytes");
    byId("x").value = x.name;
    byId("y").value = y.name;
    const model = {
      lines: lines(), factors: [], references: [], sweeps: data.sweeps.map((sweep) => ({ name: sweep.name, experiment_id: sweep.experiment_id })),
      arms: [...new Map(data.sweeps.flatMap((sweep) => sweep.arms).map((arm, i) => [arm.name, { ...arm, symbol: mixlab.SYMBOLS[i % mixlab.SYMBOLS.length] }])).values()],
    };
    const look = mixlab.look(model, { name: "sweep", of: (line) => line.sweep });
    key = look.key;
    byId("key").replaceChildren(...key.map((entry) => e("span", {}, mixlab.swatch(entry), " ", entry.label)));
    drawnWidth = byId("plot").clientWidth;
    const panels = [{ title: "", lines: model.lines, single: false }];
    const nLeftOut = mixlab.drawPlot(byId("plot"), { model, panels, x, y, xlog: x.log, ylog: y.log, look, seedRuns: null, intervals: true, front: false }, (arm, cell, sweep) => {
      location.href = "./compare?" + new URLSearchParams({ sweep, cell, arm });
    });
    byId("left-out").textContent = nLeftOut ? `${nLeftOut} arms and cells without a point on these axes.` : "";
    byId("plot").setAttribute("aria-label", `${y.label} against ${x.label}, listed in the table of runs below`);
    drawBench();
  }

  // Of `mixlab bench`: [scene, field of a row, label, unit]
  const BENCHED = [["prefill", "seconds", "Prefill time (s)", ""], ["prefill", "tokens_per_s", "Prefill speed (tokens/s)", "count"], ["decode", "seconds", "Time of one token after T (s)", ""],
    ["prefill", "state_bytes", "State after T tokens", "bytes"], ["prefill", "peak_bytes", "Peak memory of a prefill", "bytes"], ["train", "tokens_per_s", "Training speed (tokens/s)", "count"]];

  function drawBench() {
    const { rows, growth } = data.bench;
    byId("bench-controls").hidden = byId("bench-plot").hidden = byId("bench-key").hidden = rows.length === 0;
    if (rows.length === 0) {
      return byId("bench").replaceChildren(e("p", {}, "No measurement is recorded. To make one, with RUNS the folder of the runs of this server: ",
        e("code", {}, `mixlab bench mixers ${data.name} --json RUNS/bench/${data.name}.json`)));
    }
    const there = BENCHED.filter(([scene, field]) => rows.some((row) => row.scene === scene && typeof row[field] === "number"));
    byId("cost").replaceChildren(...there.map(([scene, field, label]) => new Option(label, `${scene} ${field}`)));
    byId("cost").onchange = () => { view.set({ cost: byId("cost").value }); drawBenchPlot(there); };
    drawBenchPlot(there);
    const columns = ["label", "scene", "tokens", "batch", "status", "seconds", "tokens_per_s", "peak_bytes", "state_bytes"].filter((column) => rows.some((row) => row[column] !== undefined));
    byId("bench").replaceChildren(...growthTable(growth), e("details", {}, e("summary", {}, `${rows.length} measurements`),
      e("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Benchmarks" }, e("table", {},
        e("thead", {}, e("tr", {}, ...columns.map((column) => e("th", { scope: "col" }, column.replaceAll("_", " "))))),
        e("tbody", {}, ...rows.slice(0, 300).map((row) => e("tr", {}, ...columns.map((column) => e("td", {}, shown(row[column]))))))))),
      e("p", { class: "quiet" }, `From ${[...new Set(rows.map((row) => row.file))].join(", ")}.`));
  }

  // Of the power laws that were fitted: [cost, heading]
  const GROWN = [["prefill_seconds", "prefill time"], ["decode_seconds", "time of one token"], ["state_bytes", "state"], ["peak_bytes", "peak memory"]];

  // How costs grow with the context, a row for each layer and file.
  function growthTable(growth) {
    const fitted = growth.filter((row) => typeof row.exponent === "number");
    const costs = GROWN.filter(([cost]) => fitted.some((row) => row.cost === cost));
    if (costs.length === 0) return [];
    const layers = new Map(fitted.map((row) => [`${row.label}\n${row.file}`, row]));
    const manyFiles = new Set(fitted.map((row) => row.file)).size > 1;
    const rows = [...layers.values()].map((layer) => e("tr", {}, e("th", { scope: "row", class: "words" }, layer.label, manyFiles ? e("span", { class: "quiet" }, " " + layer.file) : ""), ...costs.map(([cost]) => {
      const row = fitted.find((one) => one.cost === cost && one.label === layer.label && one.file === layer.file);
      if (!row) return e("td", {}, "–");
      const [power, low, high] = [row.exponent, row.low, row.high].map((value) => (typeof value === "number" ? value.toFixed(2) : null));
      return e("td", {}, `T^${power}`, low !== null && high !== null ? e("span", { class: "quiet" }, ` ${low} to ${high}`) : "");
    })));
    return [e("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Growth of costs with the context T" }, e("table", {},
      e("caption", {}, "Growth with the context T: the exponent, and its 95 % interval from the scatter around the power law"),
      e("thead", {}, e("tr", {}, e("th", { scope: "col", class: "words" }, "layer"), ...costs.map(([, heading]) => e("th", { scope: "col" }, heading)))), e("tbody", {}, ...rows)))];
  }

  // Cost against context, a line for each layer and file, both axes logarithmic.
  function drawBenchPlot(there) {
    if (there.length === 0) { byId("bench-plot").hidden = true; return; }
    const [scene, field, label, unit] = there.find(([s, f]) => `${s} ${f}` === view.get("cost")) ?? there[0];
    byId("cost").value = `${scene} ${field}`;
    const series = new Map();
    for (const row of data.bench.rows) {
      if (row.scene !== scene || typeof row[field] !== "number" || typeof row.tokens !== "number") continue;
      const name = `${row.label}, ${row.file}`;
      if (!series.has(name)) series.set(name, []);
      series.get(name).push(row);
    }
    const theme = mixlab.colors();
    const all = [...series.values()].flat();
    const xs = mixlab.scale({ label: "Context T (tokens)", unit: "count", name: "factor/tokens" }, all.map((row) => row.tokens), true, theme, true, 8);
    const ys = mixlab.scale({ label, unit, name: field }, all.map((row) => row[field]), true, theme, false, 8);
    const traces = [...series].map(([name, found], i) => {
      found.sort((a, b) => a.tokens - b.tokens);
      return {
        type: "scatter", mode: "lines+markers", name: mixlab.plotlyText(name), x: found.map((row) => xs.place(row.tokens)), y: found.map((row) => ys.place(row[field])),
        marker: { color: mixlab.visible(mixlab.COLORS[i % 8]), symbol: mixlab.SYMBOLS[i % 9], size: 9 }, line: { color: mixlab.visible(mixlab.COLORS[i % 8]), width: 1.8 },
        text: found.map((row) => `<b>${mixlab.plotlyText(name)}</b><br>${row.tokens} tokens: ${mixlab.human(row[field], unit)}`), hovertemplate: "%{text}<extra></extra>",
      };
    });
    byId("bench-key").replaceChildren(...traces.map((trace, i) => e("span", {}, mixlab.swatch({ color: mixlab.COLORS[i % 8], symbol: trace.marker.symbol }), " ", [...series.keys()][i])));
    mixlab.charts.draw(byId("bench-plot"), traces, {
      paper_bgcolor: theme.page, font: mixlab.font(theme, 13), height: 380, margin: { t: 10 }, xaxis: xs.layout, yaxis: ys.layout,
    });
    byId("bench-plot").setAttribute("aria-label", `${label} against context, listed below`);
  }

  function shown(value) {
    if (typeof value === "number") return Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));
    return value === null || value === undefined || typeof value === "object" ? "" : String(value);
  }

  function drawRuns() {
    byId("runs").replaceChildren(...data.sweeps.map((sweep) => {
      const axis = new Map(sweep.axes.map((one) => [one.name, one]));
      const report = sweep.metric.report;
      const rows = sweep.comparisons.map((line) => e("tr", {},
        e("td", { class: "arm" }, e("a", { href: "./compare?" + new URLSearchParams({ sweep: sweep.name, arm: line.arm, cell: line.cell }) }, line.arm)), e("td", { class: "words" }, line.cell),
        e("td", {}, mixlab.spread(line.metrics[report])), e("td", {}, `${line.n_seeds}/${line.n_planned}`),
        ...mixlab.COSTS.map(([cost]) => e("td", {}, mixlab.human(line.cost[cost], axis.get("cost/" + cost)?.unit))), e("td", { class: "words" }, line.notes.join("; "))));
      const head = ["arm", "cell", report, "n", ...mixlab.COSTS.map(([, heading]) => heading), "notes"];
      return e("details", { open: "" }, e("summary", {}, sweep.name, e("span", { class: "quiet" }, `  ${sweep.comparisons.length} arms and cells`)),
        e("ul", { class: "quiet" }, ...sweep.arms.map((arm) => e("li", {}, `${arm.name}: ${arm.pattern}`))),
        e("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Runs in ${sweep.name}` }, e("table", {}, e("thead", {}, e("tr", {}, ...head.map((heading) => e("th", { scope: "col", ...(["arm", "cell", "notes"].includes(heading) ? { class: "words" } : {}) }, heading)))), e("tbody", {}, ...rows.slice(0, 300)))));
    }));
  }
})();
