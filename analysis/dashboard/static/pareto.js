"use strict";
// Values of arms on an axis, and the Pareto front for the axes that are chosen.

// The mean of a comparison on an axis; null where there is none.
mixlab.valueOf = function (comparison, axis) {
  if (axis.startsWith("cost/")) return comparison.cost[axis.slice(5)] ?? null;
  if (axis.startsWith("factor/")) return comparison.factors[axis.slice(7)] ?? null;
  return comparison.metrics[axis]?.mean ?? null;
};

mixlab.valueOfRun = function (run, axis) {
  if (axis.startsWith("cost/")) return run.cost[axis.slice(5)] ?? null;
  if (axis.startsWith("factor/")) return run.factors[axis.slice(7)] ?? null;
  return run.metrics[axis] ?? null;
};

// Comparisons of one cell that no other one beats; an arm without a finished seed is never among them.
mixlab.paretoFront = function (comparisons, x, y) {
  const sign = (axis) => (axis.direction === "maximize" ? 1 : -1);
  const points = comparisons
    .filter((c) => c.n_seeds > 0)
    .map((c) => ({ c, x: mixlab.valueOf(c, x.name), y: mixlab.valueOf(c, y.name) }))
    .filter((p) => p.x !== null && p.y !== null)
    .map((p) => ({ c: p.c, x: sign(x) * p.x, y: sign(y) * p.y }));
  const dominates = (a, b) => a.x >= b.x && a.y >= b.y && (a.x > b.x || a.y > b.y);
  return new Set(points.filter((p) => !points.some((other) => dominates(other, p))).map((p) => p.c));
};
