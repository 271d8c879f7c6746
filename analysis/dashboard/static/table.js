"use strict";
// The same numbers as `mixlab compare` prints, the details of one arm, and the notes.

mixlab.drawTable = function (table, shown, onPick) {
  const { data, x, y } = shown;
  const e = mixlab.element;
  const axes = new Map(data.axes.map((axis) => [axis.name, axis]));
  const costs = [["state_bytes", "state"], ["state_bytes_fixed", "state, fixed"], ["state_bytes_per_token", "state / token"],
    ["params", "params"], ["flops_per_token", "FLOPs / token"], ["train_tokens_per_s", "train tok/s"]];
  const extra = [x].filter((axis) => !axis.name.startsWith("factor/") && !costs.some(([name]) => "cost/" + name === axis.name) && axis.name !== y.name);
  const headings = ["", "arm", y.name, "n", ...costs.map(([, heading]) => heading), ...extra.map((axis) => axis.name), "notes"];
  const head = e("thead", {}, e("tr", {}, ...headings.map((heading, i) =>
    e("th", { scope: "col", ...(i === 1 || i === headings.length - 1 ? { class: "words" } : {}) }, heading))));
  const bodies = [];
  const chosen = data.sweep.cells.filter((cell) => cell.label === shown.cell);
  for (const cell of chosen.length ? chosen : data.sweep.cells) {
    const lines = data.comparisons.filter((c) => c.cell === cell.label);
    const front = shown.x.name.startsWith("factor/") ? new Set() : mixlab.paretoFront(lines, x, y);
    const rows = lines.map((c) => {
      const arm = data.sweep.arms.find((found) => found.name === c.arm);
      const name = e("a", { href: "#details" }, c.arm);
      name.addEventListener("click", (event) => { event.preventDefault(); onPick(c.arm, c.cell); });
      return e("tr", { "data-arm": c.arm, "data-cell": c.cell },
        e("td", { class: "front", ...(front.has(c) ? { title: "on the Pareto front" } : {}) }, front.has(c) ? "●" : ""),
        e("td", { class: "arm" }, e("span", {}, mixlab.swatch(arm), " ", name)),
        e("td", {}, mixlab.spread(c.metrics[y.name] ?? (y.name.startsWith("cost/") && mixlab.valueOf(c, y.name) !== null ? { mean: mixlab.valueOf(c, y.name), high: null } : null))),
        e("td", {}, `${c.n_seeds}/${c.n_planned}`),
        ...costs.map(([cost]) => e("td", {}, mixlab.human(c.cost[cost], axes.get("cost/" + cost)?.unit))),
        ...extra.map((axis) => e("td", {}, axis.name.startsWith("cost/") ? mixlab.human(mixlab.valueOf(c, axis.name), axis.unit) : mixlab.spread(c.metrics[axis.name]))),
        e("td", { class: "words" }, c.notes.join("; ")));
    });
    bodies.push(e("tbody", {}, e("tr", { class: "cell" }, e("th", { colspan: headings.length, scope: "rowgroup" }, cell.label)), ...rows));
  }
  table.replaceChildren(head, ...bodies);
};

// One arm in one cell: its runs, each a link to MLflow where there is one, and the settings they share.
mixlab.drawDetails = function (section, shown, arm, cell) {
  const { data, x, y } = shown;
  const e = mixlab.element;
  const comparison = data.comparisons.find((c) => c.arm === arm && c.cell === cell);
  const runs = data.runs.filter((run) => run.arm === arm && run.cell === cell);
  const axes = [y, x].filter((axis) => !axis.name.startsWith("factor/"));
  const rows = runs.map((run) => {
    const seed = data.experiment_id && run.link
      ? e("a", { href: `./#/experiments/${encodeURIComponent(data.experiment_id)}/runs/${encodeURIComponent(run.link)}`, target: "_blank" }, `seed ${run.seed}`)
      : `seed ${run.seed}`;
    return e("tr", {}, e("td", {}, seed), e("td", { class: "words" }, run.outcome + (run.reason ? ": " + run.reason : "")),
      ...axes.map((axis) => e("td", {}, mixlab.human(mixlab.valueOfRun(run, axis.name), axis.unit))));
  });
  const head = e("tr", {}, e("th", {}, "run"), e("th", { class: "words" }, "outcome"), ...axes.map((axis) => e("th", {}, axis.name)));
  const settingsOf = (run) => ({ ...data.shared_settings, ...run.settings });
  const names = [...new Set(runs.flatMap((run) => Object.keys(settingsOf(run))))].sort();
  const settings = names.map((name) => e("li", {}, `${name} = ${[...new Set(runs.map((run) => String(settingsOf(run)[name])))].join(", ")}`));
  section.replaceChildren(
    e("h3", {}, `${arm}, ${cell}`),
    e("p", { class: "quiet" }, comparison.pattern),
    runs.length ? e("div", { class: "scroll" }, e("table", {}, e("thead", {}, head), e("tbody", {}, ...rows))) : e("p", {}, "No run yet."),
    e("ul", { class: "settings" }, ...settings));
  section.hidden = false;
  section.scrollIntoView({ block: "nearest" });
};

mixlab.drawNotes = function (list, data) {
  list.replaceChildren(...data.notes.flatMap((note) => [mixlab.element("dt", {}, note.title), mixlab.element("dd", {}, note.text)]));
};
