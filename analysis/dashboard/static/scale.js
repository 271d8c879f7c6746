"use strict";
// Axes of the plot: ticks that a reader of bytes expects, and a place for zero on a logarithmic axis.

// Whether a value can stand on an axis: beyond these, differences and ratios overflow, and nothing at all is drawn.
mixlab.hasPlace = function (value) { return Number.isFinite(value) && Math.abs(value) < 1e150 && (value === 0 || Math.abs(value) > 1e-150); };

// How an axis over `values` is drawn. `place(value)` gives the coordinate, or null where there is none to give:
// on a log axis zero gets a place of its own left of everything (a static memory has zero bytes of state).
// At most `nTicks` of them are labelled on a log axis.
mixlab.scale = function (axis, values, log, theme, isX, nTicks) {
  const finite = values.filter(mixlab.hasPlace);
  const positive = finite.filter((value) => value > 0);
  const base = {
    title: { text: mixlab.plotlyText(axis.label), standoff: 8 }, gridcolor: theme.grid, linecolor: theme.quiet,
    zerolinecolor: theme.grid, showline: true, ticks: "outside", automargin: true, tickangle: 0,
    ticklabeloverflow: "allow", // the margins make room for labels: looking for those without it takes long
  };
  if (!log || positive.length === 0) {
    const layout = { ...base, type: "linear" };
    if (axis.unit === "bytes" || axis.unit === "count") layout.tickformat = "~s";
    if (axis.unit === "fraction" && !isX) layout.range = fractionRange(finite);
    // there is no range to find for panels that share an axis with nothing, or one value, on it
    const [one] = finite;
    if (!layout.range && finite.every((value) => value === one)) layout.range = one === undefined ? [0, 1] : [one - Math.max(1, Math.abs(one)), one + Math.max(1, Math.abs(one))];
    if (axis.name.startsWith("factor/")) Object.assign(layout, { tickmode: "array", tickvals: [...new Set(finite)] });
    return { layout, place: (value) => (mixlab.hasPlace(value) ? value : null) };
  }
  const low = Math.min(...positive), high = Math.max(...positive);
  const hasZero = finite.some((value) => value === 0);
  const decades = Math.log10(high / low);
  const zeroAt = low / 10 ** Math.max(0.35, 0.18 * decades);
  const pad = Math.max(0.08 * (decades + (hasZero ? 0.5 : 0)), 0.12);
  let { tickvals, ticktext } = axis.name.startsWith("factor/")
    ? { tickvals: [...new Set(positive)], ticktext: [...new Set(positive)].map(String) }
    : mixlab.logTicks(low / 10 ** (pad / 2), high * 10 ** (pad / 2), axis.unit, nTicks - hasZero);
  // values so close together that no round number lies between: they are the ticks
  if (tickvals.length === 0) { tickvals = [...new Set([low, high])]; ticktext = tickvals.map((value) => mixlab.human(value, axis.unit)); }
  if (hasZero) { tickvals = [zeroAt, ...tickvals.filter((v) => v > zeroAt * 1.3)]; ticktext = ["0", ...ticktext.slice(-(tickvals.length - 1))]; }
  const layout = {
    ...base, type: "log", tickmode: "array", tickvals, ticktext,
    range: [Math.log10(hasZero ? zeroAt : low) - pad, Math.log10(high) + pad],
  };
  const place = (value) => (!mixlab.hasPlace(value) ? null : value > 0 ? value : value === 0 ? zeroAt : null);
  return { layout, place, breakAt: hasZero ? Math.sqrt(zeroAt * low) : null };

  // fractions keep one common range, so that panels and sweeps look alike
  function fractionRange(found) {
    const inside = found.every((value) => value >= 0 && value <= 1);
    return inside ? [-0.04, 1.06] : undefined;
  }
};

// Ticks between two positive numbers: powers of two for bytes, else 1, 2, 5 or whole powers of ten.
mixlab.logTicks = function (low, high, unit, limit) {
  let tickvals = [];
  if (unit === "bytes") {
    const first = Math.ceil(Math.log2(low)), last = Math.floor(Math.log2(high));
    const step = Math.max(1, Math.ceil((last - first + 1) / limit));
    for (let power = Math.ceil(first / step) * step; power <= last; power += step) tickvals.push(2 ** power);
  } else {
    for (const mantissas of [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 5], [1, 3], [1]]) {
      tickvals = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
        for (const m of mantissas) { const v = m * 10 ** power; if (v >= low && v <= high) tickvals.push(v); }
      }
      if (tickvals.length <= limit) break;
    }
    const stride = Math.max(1, Math.ceil(tickvals.length / limit));
    tickvals = tickvals.filter((_, i) => i % stride === 0);
  }
  return { tickvals, ticktext: tickvals.map((value) => (unit === "fraction" ? String(Number(value.toPrecision(2))) : mixlab.human(value, unit))) };
};
