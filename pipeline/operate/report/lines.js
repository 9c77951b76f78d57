// How a curve is drawn: as a line, as a moving average over it, with a band of what each of its points stands for.

const FEWEST_SMOOTHED = 20;
const FEWEST_UNDOTTED = 40;

const lineOf = (chart, curve) => {
  const { smoothing } = chart.view, places = chart.places(curve), parts = [], [first, last] = chart.inWindow(places);
  const smooth = chart.data.smooth && !curve.plain && smoothing > 0 && places.length >= FEWEST_SMOOTHED;
  if (smooth && curve.smoothing !== smoothing) [curve.smooth, curve.smoothing] = [smoothed(curve.mean, smoothing), smoothing];
  curve.average = smooth ? curve.smooth : null;
  const drawn = curve.average ?? curve.mean;
  if (curve.low && chart.banded) parts.push(filled(band(chart, curve, places, first, last), curve));
  if (smooth) parts.push(stroked(outline(chart, places, curve.mean, first, last), "raw", curve));
  parts.push(stroked(outline(chart, places, drawn, first, last), smooth ? "strong" : "", curve));
  if (last - first < FEWEST_UNDOTTED) {
    for (let i = first; i <= last; i++) if (chart.has(drawn[i])) parts.push(dot(chart, curve, places[i], drawn[i], 2.2));
  }
  return parts;
};

const spot = (chart, place, value) => `${chart.toX(place).toFixed(1)} ${chart.toY(value).toFixed(1)}`;

const outline = (chart, places, values, first, last) => {
  let path = "", pen = "M";
  for (let i = first; i <= last; i++) {
    if (!chart.has(values[i])) { pen = "M"; continue; }
    path += pen + spot(chart, places[i], values[i]);
    pen = "L";
  }
  return path;
};

const band = (chart, curve, places, first, last) => {
  let path = "", run = [];
  const close = () => {
    const forth = run.map((i) => spot(chart, places[i], curve.high[i]));
    const back = run.reverse().map((i) => spot(chart, places[i], curve.low[i]));
    if (run.length) path += `M${[...forth, ...back].join("L")}Z`;
    run = [];
  };
  for (let i = first; i <= last; i++) if (chart.has(curve.low[i])) run.push(i); else close();
  close();
  return path;
};

const stroked = (d, kind, curve) => {
  const path = make("svg:path", { d, class: kind, "stroke-dasharray": kind === "raw" ? "" : curve.dashes });
  path.style.stroke = curve.colour;
  return path;
};

const filled = (d, curve) => {
  const path = make("svg:path", { d, class: "band" });
  path.style.fill = curve.colour;
  return path;
};

const dot = (chart, curve, place, value, radius) => {
  const circle = make("svg:circle", { cx: chart.toX(place), cy: chart.toY(value), r: radius });
  circle.style.fill = curve.colour;
  return circle;
};
