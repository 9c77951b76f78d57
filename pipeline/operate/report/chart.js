// A chart: curves as SVG in real pixels, read by pointer or keys, zoomed together with the others.

const SVG = "http://www.w3.org/2000/svg";
const FEWEST_SMOOTHED = 20;
const MOST_BANDS = 3; // more hide each other
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];

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
      dashes: DASHES[(curve.dash ?? 0) % DASHES.length],
      shown: true,
    }));
    this.build();
  }

  get isOverSteps() { return this.data.across === ""; }
  get along() { return this.isOverSteps ? this.view.along : "steps"; }
  get unit() { return this.isOverSteps ? { steps: "step", samples: "sample", hours: "hour" }[this.along] : this.data.across; }
  get banded() { return this.visible.filter((c) => c.low).length <= MOST_BANDS; }
  get visible() { return this.curves.filter((c) => c.shown && !this.view.hidden.has(c.run)); }

  build() {
    const head = this.figure.querySelector(".chart-head");
    this.where = make("span", { class: "where" });
    const log = this.button("log", "logarithmic", () => { this.log = !this.log; this.draw(); });
    const wide = this.button("wide", "wide", () => { this.figure.classList.toggle("wide"); });
    wide.classList.add("widens");
    head.append(this.where, ...(this.data.log ? [log] : []), wide);
    this.svg = make("svg:svg", { tabindex: "0", role: "slider", "aria-orientation": "horizontal" });
    this.frame = make("div", { class: "plot" }, this.svg);
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
    const swatch = make("svg:svg", { class: "swatch", "aria-hidden": "true", viewBox: "0 0 18 4" });
    const line = make("svg:line", { x1: 0, x2: 18, y1: 2, y2: 2, "stroke-dasharray": curve.dashes });
    line.style.stroke = curve.colour;
    swatch.append(line);
    curve.told = make("span", { class: "value" });
    curve.button = make("button", { type: "button", "aria-pressed": "true" }, swatch, make("span", { class: "name" }, curve.name), curve.told);
    curve.button.addEventListener("click", () => {
      curve.shown = !curve.shown;
      curve.button.setAttribute("aria-pressed", curve.shown);
      this.draw();
    });
    return make("li", {}, curve.button);
  }

  // Where a curve's points lie along the axis that was chosen.
  places(curve) {
    if (this.along === "steps") return curve.x;
    curve.laid ??= {};
    return curve.laid[this.along] ??= curve.x.map((step) => {
      const run = this.runs[curve.run ?? 0];
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

  // The values of the points between two places, and of one more on each side.
  range(from, to) {
    let low = Infinity, high = -Infinity;
    for (const curve of this.visible) {
      const places = this.places(curve), band = this.banded && curve.low;
      const lows = band ? curve.low : curve.mean, highs = band ? curve.high : curve.mean;
      for (let i = 0; i < places.length; i++) {
        if (places[i] < from || places[i] > to || lows[i] === null) continue;
        if (this.log && lows[i] <= 0) continue;
        low = Math.min(low, lows[i]);
        high = Math.max(high, highs[i]);
      }
    }
    if (low > high) return this.log ? [0.1, 1] : [0, 1];
    if (this.log) return [low / 1.1, high * 1.1];
    const air = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
    return [low >= 0 && low <= high * 0.6 ? 0 : low - air, high + air];
  }

  draw() {
    const width = Math.floor(this.frame.clientWidth);
    if (!width) return;
    const height = Math.round(Math.min(Math.max(width * 0.55, 210), 400));
    const full = this.extent();
    const [from, to] = (this.isOverSteps && this.view.zooms.get(this.data.group)) || full;
    const [low, high] = this.range(from, to);
    const y = this.log ? logTicks(low, high, 7) : linearTicks(low, high, 6);
    const labels = y.ticks.map((tick) => tickText(tick, y.step));
    const box = { left: 14 + 7 * Math.max(2, ...labels.map((l) => l.length)), right: width - 12, top: 22, bottom: height - 40 };
    const scale = this.log ? Math.log10 : (v) => v;
    Object.assign(this, { box, from, to });
    this.toX = (place) => box.left + (place - from) / (to - from || 1) * (box.right - box.left);
    this.toY = (value) => box.bottom - (scale(value) - scale(low)) / (scale(high) - scale(low) || 1) * (box.bottom - box.top);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    const clip = `clip-${this.figure.getAttribute("aria-labelledby")}`;
    const inside = make("svg:g", { "clip-path": `url(#${clip})` });
    for (const curve of this.visible) inside.append(...this.line(curve));
    this.cursor = make("svg:line", { class: "cursor", y1: box.top, y2: box.bottom });
    this.dots = make("svg:g", {});
    this.selection = make("svg:rect", { class: "selection", y: box.top, height: box.bottom - box.top, width: 0, x: 0 });
    const cut = make("svg:rect", { x: box.left - 2, width: box.right - box.left + 4, y: box.top - 2, height: box.bottom - box.top + 4 });
    this.svg.replaceChildren(
      make("svg:clipPath", { id: clip }, cut), ...this.axes(y, labels, height), this.selection, inside, ...this.marks(), this.cursor, this.dots);
    this.tell();
  }

  axes(y, labels, height) {
    const { left, right, top, bottom } = this.box, parts = [];
    y.ticks.forEach((tick, i) => {
      const at = this.toY(tick);
      parts.push(make("svg:line", { class: "grid", x1: left, x2: right, y1: at, y2: at }));
      parts.push(make("svg:text", { x: left - 6, y: at + 4, "text-anchor": "end" }, labels[i]));
    });
    const x = linearTicks(this.from, this.to, Math.max(2, (right - left) / 80));
    const ticks = this.along === "steps" && this.isOverSteps ? x.ticks.filter((t) => Math.abs(t - Math.round(t)) < 1e-9) : x.ticks;
    for (const tick of ticks) {
      const at = this.toX(tick);
      parts.push(make("svg:line", { class: "tick", x1: at, x2: at, y1: bottom, y2: bottom + 4 }));
      parts.push(make("svg:text", { x: at, y: bottom + 17, "text-anchor": at > right - 14 ? "end" : "middle" }, tickText(tick, x.step)));
    }
    parts.push(make("svg:line", { class: "tick", x1: left, x2: right, y1: bottom, y2: bottom }));
    parts.push(make("svg:text", { class: "axis", x: right, y: height - 5, "text-anchor": "end" }, this.unit));
    parts.push(make("svg:text", { class: "axis", x: 0, y: 12 }, this.data.unit));
    if (!this.visible.some((c) => c.mean.some((v) => v !== null))) {
      const said = this.visible.length ? "no finite value" : "all curves are hidden";
      parts.push(make("svg:text", { x: (left + right) / 2, y: (top + bottom) / 2, "text-anchor": "middle" }, said));
    }
    return parts;
  }

  line(curve) {
    const { smoothing } = this.view, places = this.places(curve), parts = [];
    const smooth = this.data.smooth && !curve.plain && smoothing > 0 && places.length >= FEWEST_SMOOTHED;
    curve.drawn = curve.mean;
    if (smooth) {
      if (curve.smoothing !== smoothing) [curve.smooth, curve.smoothing] = [smoothed(curve.mean, smoothing), smoothing];
      curve.drawn = curve.smooth;
    }
    const [first, last] = this.inWindow(places);
    if (curve.low && this.banded) parts.push(this.path(this.band(curve, places, first, last), "band", curve, "fill"));
    if (smooth) parts.push(this.path(this.outline(places, curve.mean, first, last), "raw", curve));
    parts.push(this.path(this.outline(places, curve.drawn, first, last), smooth ? "strong" : "", curve));
    if (last - first < 40) {
      for (let i = first; i <= last; i++) if (this.has(curve.drawn[i])) parts.push(this.dot(curve, places[i], curve.drawn[i], 2.2));
    }
    return parts;
  }

  inWindow(places) {
    let first = 0, last = places.length - 1;
    while (first < last && places[first + 1] < this.from) first++;
    while (last > first && places[last - 1] > this.to) last--;
    return [first, last];
  }

  has(value) { return value !== null && value !== undefined && (!this.log || value > 0); }

  outline(places, values, first, last) {
    let path = "", pen = "M";
    for (let i = first; i <= last; i++) {
      if (!this.has(values[i])) { pen = "M"; continue; }
      path += `${pen}${this.toX(places[i]).toFixed(1)} ${this.toY(values[i]).toFixed(1)}`;
      pen = "L";
    }
    return path;
  }

  band(curve, places, first, last) {
    let path = "", run = [];
    const close = () => {
      const back = run.slice().reverse().map((i) => `L${this.toX(places[i]).toFixed(1)} ${this.toY(curve.low[i]).toFixed(1)}`);
      const forth = run.map((i, n) => `${n ? "L" : "M"}${this.toX(places[i]).toFixed(1)} ${this.toY(curve.high[i]).toFixed(1)}`);
      if (run.length) path += forth.join("") + back.join("") + "Z";
      run = [];
    };
    for (let i = first; i <= last; i++) if (this.has(curve.low[i])) run.push(i); else close();
    close();
    return path;
  }

  path(d, kind, curve, paint = "stroke") {
    const path = make("svg:path", { d, class: kind, ...(paint === "stroke" ? { "stroke-dasharray": kind === "raw" ? "" : curve.dashes } : {}) });
    path.style[paint] = curve.colour;
    return path;
  }

  dot(curve, place, value, radius) {
    const dot = make("svg:circle", { cx: this.toX(place), cy: this.toY(value), r: radius });
    dot.style.fill = curve.colour;
    return dot;
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

  // Say the values: at the cursor, or the last ones.
  tell() {
    const leader = this.visible[0];
    const reads = this.at !== null && leader && this.at >= this.from && this.at <= this.to;
    this.cursor.classList.toggle("shown", Boolean(reads));
    this.dots.replaceChildren();
    let place = this.to;
    if (reads) {
      const places = this.places(leader);
      place = places[nearest(places, this.at)];
      this.cursor.setAttribute("x1", this.toX(place));
      this.cursor.setAttribute("x2", this.toX(place));
    }
    const words = [];
    for (const curve of this.visible) {
      const places = this.places(curve), i = reads ? nearest(places, place) : this.inWindow(places)[1];
      const value = curve.drawn?.[i];
      curve.told.textContent = numberText(value) + (curve.low && reads ? ` (${numberText(curve.low[i])} to ${numberText(curve.high[i])})` : "");
      words.push(`${curve.name} ${curve.told.textContent}`);
      if (reads && this.has(value)) this.dots.append(this.dot(curve, places[i], value, 3.5));
    }
    for (const curve of this.curves) if (!this.visible.includes(curve)) curve.told.textContent = "";
    this.where.textContent = reads ? `${this.unit} ${placeText(place)}` : "";
    const svg = this.svg;
    svg.setAttribute("aria-label", `${this.data.title}, curves; arrow keys read them`);
    svg.setAttribute("aria-valuemin", this.from);
    svg.setAttribute("aria-valuemax", this.to);
    svg.setAttribute("aria-valuenow", place);
    svg.setAttribute("aria-valuetext", `${this.unit} ${placeText(place)}: ${words.join(", ")}`);
  }
}
