"use strict";
// Numbers as a person reads them, and the round ones that an axis is labelled with.

const numberText = (value) => {
  if (value === null || value === undefined || !Number.isFinite(value)) return "\u2013";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e7) return value.toExponential(2);
  const digits = Math.max(0, 2 - Math.floor(Math.log10(size)));
  return value.toLocaleString("en", { maximumFractionDigits: Math.min(digits, 8) });
};

const placeText = (value) => value.toLocaleString("en", { maximumFractionDigits: Math.abs(value) < 10 ? 3 : 1 });

// As many digits as tell neighbours apart.
const tickText = (value, step) => {
  const size = Math.abs(value);
  if (size < step / 1e6) return "0";
  if (size >= 1e15 || step < 1e-5) {
    return value.toExponential(Math.min(10, Math.max(0, Math.ceil(Math.log10(size) - Math.log10(step) - 1e-9))));
  }
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit * 10 || (size >= unit && unit >= 1e6)) return withDigits(value / unit, step / unit) + name;
  }
  return withDigits(value, step);
};

const withDigits = (value, step) =>
  value.toLocaleString("en", { maximumFractionDigits: Math.max(0, Math.min(10, Math.ceil(-Math.log10(step) - 1e-9))) });

const linearTicks = (low, high, most) => {
  if (!(high > low)) return { ticks: [low], step: Math.abs(low) || 1 };
  const rough = (high - low) / Math.max(1, most);
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((m) => unit * m >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i++) ticks.push(i * step);
  return { ticks, step };
};

const logTicks = (low, high, most) => {
  const first = Math.floor(Math.log10(low)), last = Math.floor(Math.log10(high));
  for (const multiples of [[1], [1, 3], [1, 2, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9]]) {
    const ticks = [];
    for (let e = first; e <= last; e++) {
      for (const m of multiples) if (m * 10 ** e >= low && m * 10 ** e <= high) ticks.push(m * 10 ** e);
    }
    if (ticks.length >= 3) {
      const every = Math.ceil(ticks.length / most);
      return { ticks: ticks.filter((_, i) => i % every === 0), step: 10 ** first };
    }
  }
  return linearTicks(low, high, most);
};

// The place in ascending numbers that is nearest to a value.
const nearest = (places, value) => {
  let low = 0, high = places.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (places[middle] < value) low = middle + 1; else high = middle;
  }
  return low > 0 && value - places[low - 1] < places[low] - value ? low - 1 : low;
};

// Mean over a share of the values to each side, so that it does not lag; gaps take no part.
const smoothed = (values, share) => {
  const count = values.length, reach = Math.max(1, Math.round(count * share / 2));
  const sums = new Float64Array(count + 1), counts = new Int32Array(count + 1);
  for (let i = 0; i < count; i++) {
    sums[i + 1] = sums[i] + (values[i] ?? 0);
    counts[i + 1] = counts[i] + (values[i] === null ? 0 : 1);
  }
  return values.map((value, i) => {
    const start = Math.max(0, i - reach), end = Math.min(count, i + reach + 1);
    return value === null ? null : (sums[end] - sums[start]) / (counts[end] - counts[start]);
  });
};

// The value at a place between given ones, or beyond them.
const between = (places, values, at) => {
  let i = Math.min(Math.max(1, nearest(places, at)), places.length - 1);
  if (places[i] < at && i < places.length - 1) i++;
  const share = (at - places[i - 1]) / (places[i] - places[i - 1] || 1);
  return values[i - 1] + share * (values[i] - values[i - 1]);
};
