"use strict";
// What is inferred beside the means: paired differences, capacity, tuning, what is in no mean, and how it was made.

// `found` = [{sweep, paired, pareto_probability, capacity, tuning, exclusions, method}], one for each sweep.
mixlab.drawFindings = function (host, found, shown) {
  const e = mixlab.element;
  const open = new Set([...host.querySelectorAll("details[open]")].map((details) => details.dataset.name));
  const sections = found.flatMap((one) => [
    ["paired", "Paired differences", one.paired.differences.length, paired], ["capacity", "Capacity", one.capacity.length, capacity],
    ["tuning", "Tuning", one.tuning.arm_cells.length, tuning], ["exclusions", `In no mean (${one.exclusions.length} runs)`, one.exclusions.length, exclusions],
    ["method", "Method", 1, method],
  ].filter(([, , n]) => n > 0).map(([name, title, , content]) => {
    const full = `${one.sweep} ${name}`;
    const details = e("details", { "data-name": full }, e("summary", {}, found.length > 1 ? `${one.sweep}: ${title}` : title));
    // what is closed is made once it is opened: of many sweeps these are thousands of cells
    const fill = () => { if (details.open && details.children.length === 1) details.append(...content(one)); };
    details.open = open.has(full) || (host.children.length === 0 && name === "paired" && found.length === 1);
    details.ontoggle = fill;
    fill();
    return details;
  }));
  host.replaceChildren(...sections);

  function table(headings, rows, label) {
    return e("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, e("table", {},
      e("thead", {}, e("tr", {}, ...headings.map(([heading, words]) => e("th", { scope: "col", ...(words ? { class: "words" } : {}) }, heading)))),
      e("tbody", {}, ...rows.slice(0, 300).map((row) => e("tr", {}, ...row.map((value, i) => e("td", headings[i][1] ? { class: "words" } : {}, value)))))),
      ...(rows.length > 300 ? [e("p", { class: "quiet" }, `The first 300 of ${rows.length} rows: choose cells or arms to see others.`)] : []));
  }

  // Each arm against the best of its cell, of the arms and cells shown.
  function paired(one) {
    const differences = new Map(one.paired.differences.map((each) => [JSON.stringify([each.cell, each.a, each.b]), each]));
    const probability = new Map(one.pareto_probability.map((each) => [JSON.stringify([each.arm, each.cell]), each.probability]));
    const lines = shown.lines.filter((line) => line.sweep === one.sweep);
    const sign = shown.y.direction === "maximize" ? 1 : -1;
    const rows = [];
    for (const cell of new Set(lines.map((line) => line.cell))) {
      const here = lines.filter((line) => line.cell === cell);
      const valued = here.filter((line) => line.n_seeds > 0 && mixlab.valueOf(line, shown.y.name) !== null);
      if (valued.length === 0) continue;
      const against = one.paired.baseline ?? valued.reduce((best, line) => (sign * mixlab.valueOf(line, shown.y.name) > sign * mixlab.valueOf(best, shown.y.name) ? line : best)).armInSweep;
      for (const line of here) {
        const p = probability.get(JSON.stringify([line.armInSweep, cell])) ?? null;
        const told = line.armInSweep === against ? ["", "", "", ""] : [against, ...difference(differences, cell, line.armInSweep, against)];
        rows.push([cell, line.arm, ...told, p === null ? "–" : p.toFixed(2)]);
      }
    }
    return [table([["cell", true], ["arm", true], ["minus", true], ["difference [95 %]"], ["p, Holm"], ["pairs"], ["P(on the front)"]], rows, "Paired differences"),
      e("p", { class: "quiet" }, `${one.paired.metric}: each arm minus the best of its cell, on shared seeds and data; p-values by paired t-tests, adjusted by Holm's method for all ${one.paired.n_comparisons} comparisons.`)];
  }

  function difference(all, cell, a, b) {
    const there = all.get(JSON.stringify([cell, a, b])), back = all.get(JSON.stringify([cell, b, a]));
    const each = there ?? back, flip = there ? 1 : -1;
    if (!each || each.mean === null) return ["–", "–", String(each?.n ?? 0)];
    const bounds = each.low === null ? "" : ` [${[flip * each.low, flip * each.high].sort((l, r) => l - r).map(signed).join(", ")}]`;
    return [signed(flip * each.mean) + bounds, each.p_holm === null ? "–" : each.p_holm < 0.001 ? "<0.001" : each.p_holm.toFixed(3), String(each.n)];
  }

  function signed(value) { return (value >= 0 ? "+" : "−") + (Math.abs(value) < 1e3 ? Math.abs(value).toFixed(3) : Math.abs(value).toPrecision(3)); }

  function capacity(one) {
    const thresholds = [...new Set(one.capacity.flatMap((each) => each.thresholds.map((t) => t.accuracy)))];
    const rows = one.capacity.map((each) => {
      const best = each.points.reduce((top, point) => ((point.bits_per_byte ?? -1) > (top?.bits_per_byte ?? -1) ? point : top), null);
      return [each.arm, each.group, ...thresholds.map((accuracy) => pairs(each.thresholds.find((t) => t.accuracy === accuracy))),
        best?.bits_per_byte == null ? "–" : `${Number(best.bits_per_byte.toPrecision(3))} at ${best.n_pairs} pairs`];
    });
    return [table([["arm", true], ["at", true], ...thresholds.map((accuracy) => [`pairs at ${100 * accuracy} %`]), ["bits per state byte, best"]], rows, "Capacity"),
      e("p", { class: "quiet" }, "The largest number of pairs recalled at that accuracy, between the numbers tested; ≥ or ≤ where some seeds lie beyond them, and there is then no interval.")];
  }

  function pairs(threshold) {
    if (!threshold || threshold.pairs === null) return "–";
    const bound = threshold.n_above ? "≥ " : threshold.n_below ? "≤ " : "";
    const spread = threshold.low === null || threshold.high === null ? "" : ` [${Number(threshold.low.toPrecision(3))}, ${Number(threshold.high.toPrecision(3))}]`;
    return bound + Number(threshold.pairs.toPrecision(3)) + spread;
  }

  function tuning(one) {
    const { arm_cells: all, faults, edges, equal } = one.tuning;
    const rows = all.map((each) => [each.arm, each.cell, `${each.n_finished}/${each.n_planned}`, each.best === null ? "–" : String(Number(each.best.toPrecision(4))),
      Object.entries(each.chosen).map(([name, value]) => `${name}=${value}`).join(", "),
      each.sensitivity.map((s) => (s.edge && s.n_values >= 3 ? (s.edge === "high" ? "▲ " : "▼ ") : "") + (s.ratio === null ? "" : `${s.open_low || s.open_high ? "≥ " : ""}${Number(s.ratio.toPrecision(3))}x`)).join(", ")]);
    return [...(equal ? [] : [e("p", { class: "failed-word" }, "Tuning was not equal: " + faults.join("; "))]),
      table([["arm", true], ["cell", true], ["trials"], ["best select"], ["chosen", true], ["range near the best"]], rows, "Tuning"),
      ...(edges.length ? [e("p", { class: "quiet" }, `▲ ▼ In ${edges.length} of ${all.length} arm-cells the best setting is the highest or lowest tried: better ones may lie outside.`)] : [])];
  }

  function exclusions(one) {
    const columns = Object.keys(one.exclusions[0]).filter((name) => name !== "key");
    return [table(columns.map((name) => [name, true]), one.exclusions.map((each) => columns.map((name) => (each[name] === null ? "" : String(each[name])))), "Runs in no mean")];
  }

  function method(one) {
    const { sections: parts, commands, sweep_file: file, environment } = one.method;
    const told = Object.entries(environment).map(([name, value]) => e("li", {}, `${name}: ${typeof value === "object" ? JSON.stringify(value) : value}`));
    return [e("dl", {}, ...parts.flatMap((part) => [e("dt", {}, part.title), e("dd", {}, part.text)])),
      e("p", {}, "To repeat it:"), e("pre", {}, commands.join("\n")),
      ...(file ? [e("details", {}, e("summary", {}, "The sweep file"), e("pre", {}, file))] : []), ...(told.length ? [e("ul", { class: "quiet" }, ...told)] : [])];
  }
};
