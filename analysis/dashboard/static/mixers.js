"use strict";
// One mixer: its contract result, what its arms cost and reached in every sweep, and what benchmarks measured.

(function () {
  const byId = (id) => document.getElementById(id);
  const e = mixlab.element;
  const view = new mixlab.View(false);
  const name = view.get("name", null);
  let data = null;
  let drawnWidth = 0;

  mixlab.theme(view, draw);
  new ResizeObserver(() => { if (byId("plot").clientWidth !== drawnWidth) draw(); }).observe(byId("plot"));
  byId("controls").onsubmit = (event) => event.preventDefault();
  for (const id of ["x", "y"]) byId(id).onchange = () => { view.set({ [id]: byId(id).value }); draw(); };
  for (const format of ["png", "svg"]) byId("save-" + format).onclick = () => mixlab.savePicture(byId("plot"), format, ("mixlab-" + name).replace(/[^\w.-]+/g, "_"));
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
    drawBench();
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
    byId("key").replaceChildren(...look.key.map((entry) => e("span", {}, mixlab.swatch(entry), " ", entry.label)));
    drawnWidth = byId("plot").clientWidth;
    const panels = [{ title: "", lines: model.lines, single: false }];
    const nLeftOut = mixlab.drawPlot(byId("plot"), { model, panels, x, y, xlog: x.log, ylog: y.log, look, seedRuns: null, intervals: true, front: false }, (arm, cell, sweep) => {
      location.href = "./compare?" + new URLSearchParams({ sweep, cell, arm });
    });
    byId("left-out").textContent = nLeftOut ? `${nLeftOut} arms and cells without a point on these axes.` : "";
    byId("plot").setAttribute("aria-label", `${y.label} against ${x.label}, listed in the table of runs below`);
  }

  function drawBench() {
    if (data.bench.length === 0) {
      return byId("bench").replaceChildren(e("p", {}, "No measurement is recorded. To make one, with RUNS the folder of the runs of this server: ",
        e("code", {}, `mixlab bench ${data.name} --json RUNS/bench/${data.name}.json`)));
    }
    const skip = new Set(["file", "made_ms", "name", "mixer"]);
    const columns = [...new Set(data.bench.flatMap((row) => Object.keys(row)))].filter((column) => !skip.has(column) && data.bench.some((row) => ["number", "string", "boolean"].includes(typeof row[column])));
    byId("bench").replaceChildren(e("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Benchmarks" }, e("table", {},
      e("thead", {}, e("tr", {}, ...columns.map((column) => e("th", { scope: "col" }, column.replaceAll("_", " "))))),
      e("tbody", {}, ...data.bench.slice(0, 200).map((row) => e("tr", {}, ...columns.map((column) => e("td", {}, shown(row[column])))))))),
      e("p", { class: "quiet" }, `From ${[...new Set(data.bench.map((row) => row.file))].join(", ")}.`));
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
