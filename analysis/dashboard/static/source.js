"use strict";
// Where single runs come from: the data of a report, or the server, which is asked for those that are shown.

mixlab.Source = class {
  // `tags` = ["name=value", ...], as for the data
  constructor(embedded, tags) { this.embedded = embedded; this.tags = tags; }

  // The runs of one arm and cell, with their settings.
  async runs(sweep, arm, cell) {
    if (this.embedded !== null) {
      return this.embedded.runs.filter((run) => run.arm === arm && run.cell === cell)
        .map((run) => ({ ...run, settings: { ...this.embedded.shared_settings, ...run.settings } }));
    }
    return (await this.ask("compare/runs", { experiment: sweep, arm, cell })).runs;
  }

  // Every finished replicate of a sweep: [{arm, cell, seed, x, y}].
  async seeds(sweep, x, y) {
    if (this.embedded !== null) {
      return this.embedded.runs.filter((run) => run.outcome === "finished").map((run) => ({
        arm: run.arm, cell: run.cell, seed: run.seed, x: mixlab.valueOfRun(run, x), y: mixlab.valueOfRun(run, y),
      }));
    }
    const columns = await this.ask("compare/seeds", { experiment: sweep, x, y });
    return columns.arm.map((arm, i) => ({ arm, cell: columns.cell[i], seed: columns.seed[i], x: columns.x[i], y: columns.y[i] }));
  }

  // What is inferred beside the means, for these axes; a report holds it for its own axes only: null for others.
  async statistics(sweep, x, y) {
    if (this.embedded !== null) return this.embedded.x === x && this.embedded.y === y && this.embedded.paired ? this.curves(sweep) : null;
    return this.ask("compare/statistics", { experiment: sweep, x, y });
  }

  // All that a report holds of its sweep.
  curves(sweep) { return { ...this.embedded, sweep, trials: this.embedded.comparisons }; }

  async ask(path, values) {
    const query = new URLSearchParams(values);
    this.tags.forEach((tag) => query.append("tag", tag));
    const response = await fetch(`${path}?${query}`, { cache: "no-cache" });
    const value = await response.json();
    if (!response.ok) throw new Error(value.error ?? `the server answered ${response.status}`);
    return value;
  }
};
