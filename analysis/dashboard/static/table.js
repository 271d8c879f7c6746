"use strict";
// The same numbers as `mixlab compare` prints, the details of one arm, and the notes.

mixlab.COSTS = [["state_bytes", "state"], ["state_bytes_fixed", "state, fixed"], ["state_bytes_per_token", "state / token"],
  ["params", "params"], ["flops_per_token", "FLOPs / token"], ["train_tokens_per_s", "train tok/s"]];
mixlab.MAX_ROWS = 120;

// A row per line, grouped by sweep and cell. More than MAX_ROWS are shown on demand only.
mixlab.drawTable = function (table, shown, onPick) {
  const { model, x, y } = shown;
  const e = mixlab.element;
  const axes = new Map(model.axes.map((axis) => [axis.name, axis]));
  const extra = [x].filter((axis) => !axis.name.startsWith("factor/") && !mixlab.COSTS.some(([name]) => "cost/" + name === axis.name) && axis.name !== y.name);
  const headings = ["", "arm", y.name, "n", ...mixlab.COSTS.map(([, heading]) => heading), ...extra.map((axis) => axis.name), "notes"];
  const head = e("thead", {}, e("tr", {}, ...headings.map((heading, i) =>
    e("th", { scope: "col", ...(i === 1 || i === headings.length - 1 ? { class: "words" } : {}) }, i === 0 ? e("span", { class: "hidden" }, "on the Pareto front") : heading))));
  const groups = new Map();
  for (const line of shown.lines) {
    const title = model.sweeps.length > 1 ? `${line.sweep}: ${line.cell}` : line.cell;
    if (!groups.has(title)) groups.set(title, []);
    groups.get(title).push(line);
  }
  let nLeft = mixlab.MAX_ROWS;
  const bodies = [...groups].map(([title, lines]) => {
    const fronts = x.name.startsWith("factor/") ? [] : mixlab.fronts(lines, x, y);
    const some = lines.slice(0, Math.max(0, nLeft));
    nLeft -= some.length;
    return some.length ? e("tbody", {}, e("tr", { class: "cell" }, e("th", { colspan: headings.length, scope: "rowgroup" }, title)),
      ...some.map((line) => row(line, fronts.some((front) => front.has(line))))) : null;
  }).filter((body) => body !== null);
  const nHidden = shown.lines.length - (mixlab.MAX_ROWS - nLeft);
  if (nHidden > 0) {
    const more = e("button", { type: "button" }, `show ${nHidden} more rows`);
    more.addEventListener("click", () => { mixlab.MAX_ROWS = Infinity; mixlab.drawTable(table, shown, onPick); });
    bodies.push(e("tbody", {}, e("tr", {}, e("td", { colspan: headings.length, class: "words" }, more))));
  }
  table.replaceChildren(head, ...bodies);

  function row(line, isOnFront) {
    const name = e("a", { href: "#details" }, line.arm);
    name.addEventListener("click", (event) => { event.preventDefault(); onPick(line.arm, line.cell, line.sweep); });
    return e("tr", { "data-arm": line.arm, "data-cell": line.cell, "data-sweep": line.sweep },
      e("td", { class: "front", ...(isOnFront ? { title: "on the Pareto front" } : {}) }, isOnFront ? "●" : ""),
      e("td", { class: "arm" }, e("span", {}, mixlab.swatch(shown.look.of(line)), name)),
      e("td", {}, mixlab.spread(line.metrics[y.name] ?? (y.name.startsWith("cost/") && mixlab.valueOf(line, y.name) !== null ? { mean: mixlab.valueOf(line, y.name), high: null } : null))),
      e("td", {}, `${line.n_seeds}/${line.n_planned}`),
      ...mixlab.COSTS.map(([cost]) => e("td", {}, mixlab.human(line.cost[cost], axes.get("cost/" + cost)?.unit))),
      ...extra.map((axis) => e("td", {}, axis.name.startsWith("cost/") ? mixlab.human(mixlab.valueOf(line, axis.name), axis.unit) : mixlab.spread(line.metrics[axis.name]))),
      e("td", { class: "words" }, line.notes.join("; ")));
  }
};

// A run in MLflow, where the page is served beside it.
mixlab.runLink = function (experimentId, run, text) {
  if (!experimentId || !run.link) return text;
  const address = `./#/experiments/${encodeURIComponent(experimentId)}/runs/${encodeURIComponent(run.link)}`;
  return mixlab.element("a", { href: address, target: "_blank", rel: "noopener" }, text);
};

// One arm in one cell: its runs, each a link to MLflow where there is one, and the settings they share.
mixlab.drawDetails = function (section, shown, line, runs) {
  const { model, x, y } = shown;
  const e = mixlab.element;
  const experimentId = model.sweeps.find((sweep) => sweep.name === line.sweep).experiment_id;
  const axes = [y, x].filter((axis) => !axis.name.startsWith("factor/"));
  const cells = (run) => [e("td", { class: "words" }, run.outcome + (run.reason ? ": " + run.reason : "")),
    ...axes.map((axis) => e("td", {}, mixlab.human(mixlab.valueOfRun(run, axis.name), axis.unit)))];
  const replicates = runs.filter((run) => run.role === "replicate");
  const tuning = runs.filter((run) => run.role === "tuning");
  const head = (name) => e("thead", {}, e("tr", {}, e("th", { scope: "col" }, name), e("th", { class: "words", scope: "col" }, "outcome"), ...axes.map((axis) => e("th", { scope: "col" }, axis.name))));
  const table = (name, found, label) => e("div", { class: "scroll" }, e("table", {}, head(name),
    e("tbody", {}, ...found.map((run) => e("tr", {}, e("td", {}, mixlab.runLink(experimentId, run, label(run))), ...cells(run))))));
  const told = Object.keys(line.told ?? {});
  const names = [...new Set(replicates.flatMap((run) => Object.keys(run.settings)))].sort();
  const settings = names.map((name) => e("li", {}, `${name} = ${[...new Set(replicates.map((run) => String(run.settings[name])))].join(", ")}`));
  const close = e("button", { type: "button", class: "close", "aria-label": "Close the details" }, "×");
  close.addEventListener("click", () => { section.hidden = true; });
  const mixers = experimentId ? mixlab.mixers(line.pattern).map((name) => e("a", { href: "./mixers?name=" + encodeURIComponent(name) }, name)) : [];
  section.replaceChildren(
    close, e("h3", { tabindex: "-1" }, `${line.arm}, ${line.cell}`),
    e("p", { class: "quiet" }, line.pattern, ...(mixers.length ? [" – all about ", ...mixers.flatMap((link, i) => (i ? [", ", link] : [link]))] : [])),
    replicates.length ? table("run", replicates, (run) => `seed ${run.seed}`) : e("p", {}, "No run yet."),
    ...(tuning.length ? [e("details", {}, e("summary", {}, `${tuning.length} tuning trials`),
      table("trial", tuning, (run) => told.filter((name) => name in run.settings).map((name) => `${name}=${run.settings[name]}`).join(", ") || run.key))] : []),
    e("ul", { class: "settings" }, ...settings));
  section.hidden = false;
  section.scrollIntoView({ block: "nearest" });
  section.querySelector("h3").focus({ preventScroll: true });
};

mixlab.drawNotes = function (list, model) {
  list.replaceChildren(...model.notes.flatMap((note) => [mixlab.element("dt", {}, note.title), mixlab.element("dd", {}, note.text)]));
};
