"use strict";
// The numbers on screen as CSV, and what is a file for whoever looks at the page.

mixlab.saveText = (text, name, type) => mixlab.saveBlob(new Blob([text], { type }), name);

mixlab.saveBlob = function (blob, name) {
  const link = mixlab.element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};

// The lines shown, one a row; numbers in full precision.
mixlab.csv = function (shown) {
  const { model, x, y, lines } = shown;
  const factors = [...new Set(lines.flatMap((line) => Object.keys(line.factors)))];
  const measured = [...new Set([y.name, x.name])].filter((name) => !name.startsWith("cost/") && !name.startsWith("factor/"));
  const costs = [...new Set(lines.flatMap((line) => Object.keys(line.cost)))].sort();
  const onFront = x.name.startsWith("factor/") ? [] : mixlab.fronts(lines, x, y);
  const head = ["sweep", "cell", "arm", "pattern", ...factors, "n_seeds", "n_planned", "n_diverged", "n_failed", "pareto",
    ...measured.flatMap((name) => [name, name + " low", name + " high"]), ...costs.map((name) => "cost/" + name), "notes"];
  const rows = lines.map((line) => [line.sweep, line.cell, line.arm, line.pattern, ...factors.map((name) => line.factors[name]),
    line.n_seeds, line.n_planned, line.n_diverged, line.n_failed, onFront.some((front) => front.has(line)) ? 1 : 0,
    ...measured.flatMap((name) => ["mean", "low", "high"].map((part) => line.metrics[name]?.[part])),
    ...costs.map((name) => line.cost[name]), line.notes.join("; ")]);
  return [head, ...rows].map((row) => row.map(mixlab.csvField).join(",")).join("\r\n") + "\r\n";
};

// Text in quotes where it must be; a spreadsheet takes no text for a formula.
mixlab.csvField = function (value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  let text = typeof value === "string" ? value : JSON.stringify(value);
  if (/^[=+\-@\t\r]/.test(text)) text = "'" + text;
  return /[",\r\n']/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text;
};
