// A chart: curves as SVG in real pixels, read by pointer or keys, zoomed together with the others.

const SVG = "http://www.w3.org/2000/svg";
const MOST_BANDS = 3; // more hide each other
const FARTHEST = 1e4; // heights of the box: what is farther away than a picture can tell
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "14 4", "9 3 2 3 2 3", "14 3 5 3"];

const make = (name, attributes = {}, ...children) => {
  const element = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};

const colourOf = (curve, place) => {
  if (curve.tone !== undefined) return `color-mix(in oklch, var(--tone-first), var(--tone-last) ${100 * curve.tone}%)`;
  return `var(--c${(curve.hue ?? place) % 8})`;
};

class Chart {
  constructor(figure, view, runs) {
    this.figure = figure;
    this.view = view;
    this.runs = runs;
    this.data = JSON.parse(figure.dataset.chart);
    this.log = false;
    this.at = null;
    this.curves = this.data.curves.map((curve, i) => ({
      ...curve,
      colour: colourOf(curve, i),
      dashes: DASHES[(curve.dash ?? i) % DASHES.length],
      shown: true,
    }));
    this.build();
  }

  get isOverSteps() { return this.data.across === ""; }
  get along() { return this.isOverSteps ? this.view.along : "steps"; }
  get unit() { return this.isOverSteps ? { steps: "step", samples: "sample", hours: "hour" }[this.along] : this.data.across; }
  get banded() { return this.visible.filter((c) => c.low).length <= MOST_BANDS; }
  get alike() {
    const { scale, group } = this.data;
    return scale ? this.view.charts.filter((chart) => chart.data.scale === scale && chart.data.group === group) : [this];
  }

  get window() { return (this.isOverSteps && this.view.zooms.get(this.data.group)) || this.extent(); }
  get visible() { return this.curves.filter((c) => this.shows(c)); }
  shows(curve) { return curve.shown && !this.view.hidden.has(curve.run); }

  build() {
    const head = this.figure.querySelector(".chart-head");
    this.where = make("span", { class: "where" });
    const log = this.button("log", "logarithmic", () => { this.log = !this.log; this.draw(); });
    const wide = this.button("wide", "wide", () => { this.figure.classList.toggle("wide"); });
    wide.classList.add("widens");
    head.append(...(this.data.log ? [log] : []), wide);
    this.svg = make("svg:svg", { tabindex: "0", role: "slider", "aria-orientation": "horizontal" });
    this.frame = make("div", { class: "plot" }, this.svg, this.where);
    head.after(this.frame);
    this.legend = make("ul", { class: "legend" });
    this.frame.after(this.legend);
    for (const curve of this.curves) this.legend.append(this.entry(curve));
    listenTo(this);
    new ResizeObserver(() => this.draw()).observe(this.frame);
  }

  button(text, label, act) {
    const button = make("button", { type: "button", "aria-pressed": "false", "aria-label": `${label}: ${this.data.title}` }, text);
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
      act();
    });
    return button;
  }

  entry(curve) {
    const swatch = make("svg:svg", { class: "swatch", "aria-hidden": "true", viewBox: "0 0 30 4" });
    const line = make("svg:line", { x1: 0, x2: 30, y1: 2, y2: 2, "stroke-dasharray": curve.dashes });
    line.style.stroke = curve.colour;
    swatch.append(line);
    curve.told = make("span", { class: "value" });
    curve.button = make("button", { type: "button", "aria-pressed": "true" }, swatch, make("span", { class: "name" }, curve.name), curve.told);
    curve.button.addEventListener("click", () => {
      curve.shown = !curve.shown;
      curve.button.setAttribute("aria-pressed", curve.shown);
      for (const chart of this.alike) chart.draw();
    });
    return make("li", {}, curve.button);
  }

  // Where a curve's points lie along the axis that was chosen.
  places(curve) {
    if (this.along === "steps") return curve.x;
    curve.laid ??= {};
    return curve.laid[this.along] ??= curve.x.map((step) => {
      const run = this.runs[curve.run];
      return this.along === "samples" ? step * run.samples : between(run.steps, run.hours, step);
    });
  }

  extent() {
    let low = Infinity, high = -Infinity;
    for (const curve of this.visible) {
      const places = this.places(curve);
      low = Math.min(low, places[0]);
      high = Math.max(high, places[places.length - 1]);
    }
    if (low > high) [low, high] = [0, 1];
    return low === high ? [low - 0.5, high + 0.5] : [low, high];
  }

  // The least and the greatest of what is seen of the curves.
  seen(log) {
    const [from, to] = this.window;
    let low = Infinity, high = -Infinity;
    for (const curve of this.visible) {
      for (const values of this.banded && curve.low ? [curve.low, curve.high] : [curve.mean]) {
        for (const value of within(this.places(curve), values, from, to, log)) {
          low = Math.min(low, value);
          high = Math.max(high, value);
        }
      }
    }
    return low <= high ? [low, high] : null;
  }

  // The ends of the axis of values; of charts on one scale they are the same.
  range() {
    const seen = this.seen(this.log) && this.alike.flatMap((chart) => chart.seen(this.log) ?? []);
    return seen && axisEnds(Math.min(...seen), Math.max(...seen), this.log);
  }

  draw() {
    const width = Math.floor(this.frame.clientWidth);
    if (!width) return;
    const height = Math.round(Math.min(Math.max(width * 0.55, 210), 400));
    const [from, to] = this.window, range = this.range();
    const [low, high] = range ?? [1, 10];
    const y = !range ? { ticks: [], step: 1 } : this.log ? logTicks(low, high, 7) : linearTicks(low, high, 6);
    const labels = tickTexts(y);
    const box = { left: 14 + 7 * Math.max(2, ...labels.map((l) => l.length)), right: width - 12, top: 26, bottom: height - 40 };
    const scale = this.log ? Math.log10 : (v) => v;
    Object.assign(this, { box, from, to, stops: null });
    this.toX = (place) => box.left + (place - from) / (to - from || 1) * (box.right - box.left);
    this.toY = (value) => {
      const share = (scale(value) - scale(low)) / (scale(high) - scale(low) || 1);
      return box.bottom - Math.max(-FARTHEST, Math.min(share, FARTHEST)) * (box.bottom - box.top);
    };
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    const clip = `clip-${this.figure.getAttribute("aria-labelledby")}`;
    const inside = make("svg:g", { "clip-path": `url(#${clip})` });
    for (const curve of this.visible) inside.append(...lineOf(this, curve));
    this.cursor = make("svg:line", { class: "cursor", y1: box.top, y2: box.bottom });
    this.dots = make("svg:g", {});
    this.selection = make("svg:rect", { class: "selection", y: box.top, height: box.bottom - box.top, width: 0, x: 0 });
    const cut = make("svg:rect", { x: box.left - 2, width: box.right - box.left + 4, y: box.top - 2, height: box.bottom - box.top + 4 });
    this.svg.replaceChildren(
      make("svg:clipPath", { id: clip }, cut), ...this.axes(y, labels, height), ...(range ? [] : [this.excuse()]), this.selection, inside, ...this.marks(), this.cursor, this.dots);
    tell(this);
  }

  axes(y, labels, height) {
    const { left, right, top, bottom } = this.box, parts = [];
    y.ticks.forEach((tick, i) => {
      const at = this.toY(tick);
      parts.push(make("svg:line", { class: "grid", x1: left, x2: right, y1: at, y2: at }));
      parts.push(make("svg:text", { x: left - 6, y: at + 4, "text-anchor": "end" }, labels[i]));
    });
    let x = { ticks: [] };
    for (let most = Math.max(2, (right - left) / 80), more = 0; x.ticks.length < 2 && more < 3; more++) {
      x = linearTicks(this.from, this.to, most + more);
    }
    if (this.along === "steps" && this.isOverSteps) x.ticks = x.ticks.filter((t) => Math.abs(t - Math.round(t)) < 1e-9);
    const texts = tickTexts(x);
    x.ticks.forEach((tick, i) => {
      const at = this.toX(tick);
      parts.push(make("svg:line", { class: "tick", x1: at, x2: at, y1: bottom, y2: bottom + 4 }));
      parts.push(make("svg:text", { x: at, y: bottom + 17, "text-anchor": at > right - 14 ? "end" : "middle" }, texts[i]));
    });
    parts.push(make("svg:line", { class: "tick", x1: left, x2: right, y1: bottom, y2: bottom }));
    parts.push(make("svg:text", { class: "axis", x: right, y: height - 5, "text-anchor": "end" }, this.unit));
    parts.push(make("svg:text", { class: "axis", x: 0, y: 12 }, this.data.unit));
    return parts;
  }

  // The first and the last point that a line through the window needs: those in it, and one more on each side.
  inWindow(places) {
    let first = 0, last = places.length - 1;
    while (first < last && places[first + 1] < this.from) first++;
    while (last > first && places[last - 1] > this.to) last--;
    return [first, last];
  }

  has(value) { return value !== null && value !== undefined && (!this.log || value > 0); }

  // Why there is nothing to see.
  excuse() {
    const { left, right, top, bottom } = this.box, finite = this.visible.some((curve) => curve.mean.some((v) => v !== null));
    const said = !this.visible.length ? "all curves are hidden" : finite ? "no value in this part" : "no finite value";
    return make("svg:text", { x: (left + right) / 2, y: (top + bottom) / 2, "text-anchor": "middle" }, said);
  }

  // Lines where runs were started again, and crosses on the axis where values were not finite.
  marks() {
    const parts = [], drawn = new Set(this.isOverSteps ? this.visible.map((curve) => curve.run ?? -1) : []);
    for (const number of drawn) {
      for (const step of this.runs[number]?.starts ?? []) {
        const place = this.places({ x: [step], run: number })[0];
        if (place <= this.from || place >= this.to) continue;
        const x = this.toX(place);
        parts.push(make("svg:line", { class: "start", x1: x, x2: x, y1: this.box.top, y2: this.box.bottom }));
      }
    }
    for (const curve of this.visible) {
      for (const step of curve.broken ?? []) {
        const place = this.places(curve)[nearest(curve.x, step)];
        if (place < this.from || place > this.to) continue;
        const x = this.toX(place), y = this.box.bottom;
        const cross = make("svg:path", { class: "broken", d: `M${x - 3} ${y - 3}L${x + 3} ${y + 3}M${x - 3} ${y + 3}L${x + 3} ${y - 3}` });
        cross.style.stroke = curve.colour;
        parts.push(cross);
      }
    }
    return parts;
  }
}
