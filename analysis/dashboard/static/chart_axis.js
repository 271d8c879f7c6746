"use strict";
// Where values stand along an axis, and which of them are named there. A coordinate is the value, or its logarithm to
// base 10 on a logarithmic axis, as plotly counts ranges and annotations.

mixlab.coordinate = (axis, value) => (value === null || value === undefined ? NaN : axis.type === "log" ? Math.log10(value) : value);

// The range of axes that share one: as they say, or what holds all `values` with some room around.
mixlab.axisRange = function (axis, values) {
  if (axis.range) return [...axis.range];
  const found = values.filter(Number.isFinite);
  if (found.length === 0) return [0, 1];
  let low = Infinity, high = -Infinity;
  for (const value of found) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low === high) return [low - Math.max(1, Math.abs(low)), high + Math.max(1, Math.abs(high))];
  const pad = 0.06 * (high - low);
  return axis.rangemode === "tozero" && low >= 0 ? [0, high + pad] : [low - pad, high + pad];
};

// [{at (a coordinate), text}]: those that the axis names, or round numbers where it names none that can be seen.
mixlab.axisTicks = function (axis, range, most) {
  const inside = (at) => at >= range[0] - 1e-9 * Math.abs(range[1] - range[0]) && at <= range[1] + 1e-9 * Math.abs(range[1] - range[0]);
  const named = (axis.tickvals ?? []).map((value, i) => ({ at: mixlab.coordinate(axis, value), text: String(axis.ticktext?.[i] ?? value) })).filter(({ at }) => inside(at));
  if (named.length > 1 || (axis.tickvals && axis.range && range.every((end, i) => end === axis.range[i]))) return named;
  const [low, high] = axis.type === "log" ? range.map((end) => 10 ** end) : range;
  const step = roundStep((high - low) / Math.max(1, most));
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step && ticks.length < 50; i += 1) ticks.push(i * step);
  return ticks.map((value) => ({ at: mixlab.coordinate(axis, value), text: tickText(value, step, axis.tickformat) })).filter(({ at }) => Number.isFinite(at));

  // 1, 2 or 5 of a power of ten, and no less than `least`
  function roundStep(least) {
    const power = 10 ** Math.floor(Math.log10(least));
    return power * [1, 2, 5, 10].find((m) => m * power >= least * (1 - 1e-9));
  }
  function tickText(value, size, format) {
    const exact = Number(value.toPrecision(12));
    if (exact === 0) return "0";
    if (format === "~s" || Math.abs(exact) >= 1e5) {
      const power = Math.max(0, Math.min(5, Math.floor(Math.log10(Math.abs(exact)) / 3 + 1e-9)));
      return String(Number((exact / 1000 ** power).toPrecision(6))) + ["", "k", "M", "G", "T", "P"][power];
    }
    if (size < 1e-4) return exact.toExponential(2).replace(/\.?0+e/, "e");
    return exact.toFixed(Math.max(0, -Math.floor(Math.log10(size) + 1e-9))).replace("-", "−");
  }
};

// Width of a text in pixels.
mixlab.textWidth = (function () {
  const known = new Map();
  let context = null;
  return function (text, font) {
    const name = `${font.bold ? "600 " : ""}${font.size}px ${font.family} ${text}`;
    if (!known.has(name)) {
      context ??= document.createElement("canvas").getContext("2d");
      context.font = `${font.bold ? "600 " : ""}${font.size}px ${font.family}`;
      if (known.size > 5000) known.clear();
      known.set(name, context.measureText(text).width);
    }
    return known.get(name);
  };
})();
