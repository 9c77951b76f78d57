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

const placeText = (value) => value.toLocaleString("en", { maximumFractionDigits: Math.abs(value) < 1000 ? 3 : 1 });

// In one unit for all of an axis, but for decades, which have a step of 0.
const tickTexts = ({ ticks, step }) => {
  const largest = Math.max(...ticks.map(Math.abs));
  return ticks.map((tick) => tickText(tick, step, step ? largest : Math.abs(tick)));
};

// As many digits as tell neighbours apart; without a step between them, by its own first digit.
const tickText = (value, step, largest) => {
  const size = Math.abs(value);
  step ||= 10 ** Math.max(-323, Math.floor(Math.log10(size)));
  if (size < step / 1e6) return "0";
  if (largest >= 1e15 || step < 1e-5) {
    return value.toExponential(Math.min(10, Math.max(0, Math.ceil(Math.log10(size) - Math.log10(step) - 1e-9))));
  }
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (largest >= unit * 10 || (largest >= unit && unit >= 1e6)) return withDigits(value / unit, step / unit) + name;
  }
  return withDigits(value, step);
};

const withDigits = (value, step) =>
  value.toLocaleString("en", { maximumFractionDigits: Math.max(0, Math.min(10, Math.ceil(-Math.log10(step) - 1e-9))) });

// The ends of an axis for values between two: with some air, from 0 where that is near, never beyond what a number can be.
const axisEnds = (low, high, log) => {
  const most = Number.MAX_VALUE;
  if (log) return [Math.max(low / 1.1, Number.MIN_VALUE), Math.min(high * 1.1, most)];
  const apart = high - low > Math.max(-low, high) * 1e-9; // a line's values between equal points differ by their rounding
  const air = (apart && (high - low) * 0.05) || Math.abs(high) * 0.1 || 1;
  const ends = [Math.max(low >= 0 && low <= high * 0.6 ? 0 : low - air, -most), Math.min(high + air, most)];
  return Number.isFinite(ends[1] - ends[0]) ? ends : [-most / 2, most / 2];
};

const linearTicks = (low, high, most) => {
  if (!(high > low)) return { ticks: [low], step: Math.abs(low) || 1 };
  const rough = (high - low) / Math.max(1, most);
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((m) => unit * m >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9), count = Math.floor(high / step + 1e-9) - first + 1;
  return { ticks: Array.from({ length: count }, (_, i) => (first + i) * step), step };
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
      return { ticks: ticks.filter((_, i) => i % every === 0), step: 0 };
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

// Mean over a share of the values, half to each side, so that it does not lag. Near the first it is over fewer, for a
// curve begins steeply; near the last over those that are there. Gaps take no part. Each window is summed by itself:
// of the difference of two running sums one large value would leave nothing.
const smoothed = (values, share) => {
  const count = values.length, reach = Math.max(1, Math.round(count * share / 2));
  return values.map((value, i) => {
    if (value === null) return null;
    const aside = Math.min(reach, i), first = i - aside, last = Math.min(i + aside, count - 1);
    let near = 0, mean = 0;
    for (let j = first; j <= last; j++) near += values[j] !== null;
    for (let j = first; j <= last; j++) mean += values[j] / near; // a gap adds nothing
    return mean;
  });
};

// The value at a place between given ones, or beyond them.
const between = (places, values, at) => {
  let i = Math.min(Math.max(1, nearest(places, at)), places.length - 1);
  if (places[i] < at && i < places.length - 1) i++;
  const share = (at - places[i - 1]) / (places[i] - places[i - 1] || 1);
  return values[i - 1] + share * (values[i] - values[i - 1]);
};

// Of a line through points its values between two places: of the points there, and of where it enters and leaves.
const within = (places, values, from, to, log) => {
  const has = (i) => values[i] !== null && values[i] !== undefined && (!log || values[i] > 0);
  const mixed = (a, b, share) => log ? a ** (1 - share) * b ** share : a * (1 - share) + b * share;
  const found = [];
  for (let i = 0; i < places.length; i++) {
    if (!has(i)) continue;
    if (places[i] >= from && places[i] <= to) found.push(values[i]);
    for (const edge of has(i + 1) ? [from, to] : []) {
      const share = (edge - places[i]) / (places[i + 1] - places[i]);
      if (share > 0 && share < 1) found.push(mixed(values[i], values[i + 1], share));
    }
  }
  return found;
};
