"use strict";
// Several sweeps as one: their arms, cells and axes united, every comparison with the sweep that it is from.

// analysis/palette.py has the same, in the same order.
mixlab.COLORS = ["#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#5F5F5F", "#A89600"];
mixlab.SYMBOLS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "pentagon", "star"];
mixlab.MAX_PANELS = 12;

// Names of the mixers in a pattern such as `gated_deltanet*3,softmax(window=512) | pkm:channel@6 + fwpkm@2`.
mixlab.mixers = function (pattern) {
  return [...new Set(pattern.replace(/\([^()]*\)/g, "").match(/(?<![\w:])[A-Za-z_]\w*/g) ?? [])];
};

// {sweeps, arms, cells, lines, axes, factors, references, notes}; an arm has the same name in every sweep that has it
// with the same pattern, else its sweep is part of its name.
mixlab.merge = function (payloads) {
  const patterns = new Map();
  for (const p of payloads) for (const arm of p.sweep.arms) patterns.set(arm.name, (patterns.get(arm.name) ?? new Set()).add(arm.pattern));
  const nameOf = (p, arm) => (patterns.get(arm).size > 1 ? `${arm} (${p.sweep.name})` : arm);
  const arms = new Map(), cells = new Map(), axes = new Map(), looks = new Set();
  for (const p of payloads) {
    for (const arm of p.sweep.arms) {
      const name = nameOf(p, arm.name);
      if (arms.has(name)) continue;
      // within a sweep no two arms look alike; of two sweeps they may
      const first = mixlab.SYMBOLS.indexOf(arm.symbol);
      const free = mixlab.SYMBOLS.map((_, i) => mixlab.SYMBOLS[(first + i) % mixlab.SYMBOLS.length]).find((symbol) => !looks.has(arm.color + symbol)) ?? arm.symbol;
      looks.add(arm.color + free);
      arms.set(name, { ...arm, symbol: free, name, mixer: mixlab.mixers(arm.pattern).join(" + ") });
    }
    for (const cell of p.sweep.cells) if (!cells.has(cell.label)) cells.set(cell.label, cell);
    for (const axis of p.axes) if (!axes.has(axis.name)) axes.set(axis.name, axis);
  }
  const lines = payloads.flatMap((p) => p.comparisons.map((c) => ({
    ...c, sweep: p.sweep.name, armInSweep: c.arm, arm: nameOf(p, c.arm), mixer: arms.get(nameOf(p, c.arm)).mixer,
  })));
  const factors = [...new Set([...cells.values()].flatMap((cell) => Object.keys(cell.factors)))]
    .map((name) => ({ name, values: [...new Set([...cells.values()].map((cell) => cell.factors[name]).filter((value) => value !== undefined))] }))
    .filter((factor) => factor.values.length > 1);
  for (const { name, values } of factors) {
    if (!values.every((value) => typeof value === "number")) continue;
    axes.set("factor/" + name, {
      name: "factor/" + name, label: name, unit: "", direction: "minimize",
      log: Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) >= 8,
    });
  }
  return {
    sweeps: payloads.map((p) => ({ ...p.sweep, experiment_id: p.experiment_id, progress: p.progress })),
    arms: [...arms.values()], cells: [...cells.values()], axes: [...axes.values()], lines, factors,
    x: payloads[0].x, y: payloads[0].y,
    references: payloads.flatMap((p) => p.references.map((r) => ({ ...r, sweep: p.sweep.name }))),
    notes: notes(),
    tags: union(payloads.map((p) => p.tags ?? {})), payloads,
  };

  // What is said of every sweep is said once.
  function notes() {
    const said = new Map();
    for (const p of payloads) for (const note of p.notes) said.set(JSON.stringify(note), [...(said.get(JSON.stringify(note)) ?? []), p.sweep.name]);
    return [...said].map(([text, sweeps]) => [JSON.parse(text), sweeps])
      .map(([note, sweeps]) => (sweeps.length === payloads.length ? note : { ...note, title: `${sweeps.join(", ")}: ${note.title}` }));
  }

  function union(all) {
    const found = new Map();
    for (const tags of all) for (const [name, values] of Object.entries(tags)) found.set(name, new Set([...(found.get(name) ?? []), ...values]));
    return [...found].map(([name, values]) => ({ name, values: [...values] }));
  }
};

// What a line is grouped by, for panels and colours: {name, label, of(line)}.
mixlab.groupings = function (model) {
  const found = [
    { name: "arm", label: "arm", of: (line) => line.arm },
    { name: "mixer", label: "mixer", of: (line) => line.mixer },
    { name: "cell", label: "cell", of: (line) => line.cell },
    { name: "sweep", label: "sweep", of: (line) => line.sweep },
  ];
  return [...found, ...model.factors.map(({ name }) => ({ name: "factor/" + name, label: name, of: (line) => `${name}=${line.factors[name] ?? "–"}` }))];
};

// The look of every line: as its arm has it, or coloured by another grouping with its arm's marker.
mixlab.look = function (model, by) {
  const arms = new Map(model.arms.map((arm) => [arm.name, arm]));
  if (by.name === "arm") return { of: (line) => seen(arms.get(line.arm)), key: [] };
  const keys = [...new Set(model.lines.map(by.of))];
  const colors = new Map(keys.map((key, i) => [key, mixlab.visible(mixlab.COLORS[i % mixlab.COLORS.length])]));
  return {
    of: (line) => ({ color: colors.get(by.of(line)), symbol: arms.get(line.arm).symbol }),
    key: keys.map((label) => ({ label, color: colors.get(label), symbol: "circle" })),
  };

  function seen(arm) { return { ...arm, color: mixlab.visible(arm.color) }; }
};

// Panels {title, lines, single}: a group of lines each. Across a varied factor, cells that differ only in it share one.
// `single`: every sweep in it shows one cell, so that a Pareto front of each is meaningful.
mixlab.panels = function (shown) {
  const factor = shown.x.name.startsWith("factor/") ? shown.x.name.slice(7) : null;
  const rest = (line) => Object.entries(line.factors).filter(([name]) => name !== factor).map(([name, value]) => `${name}=${value}`).join(", ") || "all cells";
  const title = shown.facet.name === "none" ? () => "" : shown.facet.name === "cell" && factor !== null ? rest : shown.facet.of;
  const groups = new Map();
  for (const line of shown.lines) {
    const name = title(line);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(line);
  }
  return [...groups].map(([name, lines]) => ({
    title: name, lines, single: factor === null && new Set(lines.map((line) => line.cell)).size === 1,
  }));
};

// The Pareto front within each sweep and cell: a set of lines.
mixlab.fronts = function (lines, x, y) {
  const groups = new Map();
  for (const line of lines) {
    const name = JSON.stringify([line.sweep, line.cell]);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(line);
  }
  return [...groups.values()].map((group) => mixlab.paretoFront(group, x, y));
};
