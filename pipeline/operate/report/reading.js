// How a chart is read and zoomed: by pointer, by keys; and what it tells.

const placeOf = (chart, event) => {
  const x = event.clientX - chart.svg.getBoundingClientRect().left, { left, right } = chart.box;
  return chart.from + (Math.min(Math.max(x, left), right) - left) / (right - left) * (chart.to - chart.from);
};

const listenTo = (chart) => {
  const { svg } = chart;
  let start = null;
  svg.addEventListener("pointerdown", (event) => { if (event.button === 0) start = { x: event.clientX, place: placeOf(chart, event) }; });
  svg.addEventListener("pointermove", (event) => {
    if (!event.buttons) start = null; // let go elsewhere
    chart.at = placeOf(chart, event);
    if (start && chart.isOverSteps && Math.abs(event.clientX - start.x) > 5) {
      svg.setPointerCapture(event.pointerId);
      const [a, b] = [chart.toX(start.place), chart.toX(chart.at)].sort((p, q) => p - q);
      chart.selection.setAttribute("x", a);
      chart.selection.setAttribute("width", b - a);
    }
    tell(chart);
  });
  svg.addEventListener("pointerup", (event) => {
    if (start && chart.isOverSteps && Math.abs(event.clientX - start.x) > 5) {
      chart.view.zoomTo(chart.data.group, ...[start.place, placeOf(chart, event)].sort((p, q) => p - q));
    }
    start = null;
    chart.selection.setAttribute("width", 0);
  });
  svg.addEventListener("pointercancel", () => { start = null; chart.selection.setAttribute("width", 0); });
  for (const event of ["pointerleave", "blur"]) svg.addEventListener(event, () => { chart.at = null; tell(chart); });
  svg.addEventListener("dblclick", () => { if (chart.isOverSteps) chart.view.zoomTo(chart.data.group, null); });
  svg.addEventListener("keydown", (event) => { if (!event.ctrlKey && !event.metaKey && !event.altKey && press(chart, event)) event.preventDefault(); });
};

// Where one may stand to read: in the window, at each point that a visible curve has.
const stopsOf = (chart) => chart.stops ??= [...new Set(chart.visible.flatMap((curve) => chart.places(curve)))]
  .filter((place) => place >= chart.from && place <= chart.to)
  .sort((a, b) => a - b);

const press = (chart, event) => {
  if (!chart.visible.length) return false;
  const stops = stopsOf(chart), last = stops.length - 1;
  const at = nearest(stops, chart.at ?? chart.to), far = event.shiftKey ? 10 : 1;
  const move = { ArrowLeft: at - far, ArrowRight: at + far, Home: 0, End: last }[event.key];
  if (move !== undefined) {
    if (stops.length) chart.at = stops[Math.min(Math.max(move, 0), last)];
    tell(chart);
  } else if (chart.isOverSteps && ["+", "=", "-", "0", "Escape"].includes(event.key)) {
    const middle = chart.at ?? (chart.from + chart.to) / 2, half = (chart.to - chart.from) * (event.key === "-" ? 1 : 0.25);
    if (event.key === "0" || event.key === "Escape") chart.view.zoomTo(chart.data.group, null);
    else chart.view.zoomTo(chart.data.group, middle - half, middle + half);
  } else return false;
  return true;
};

// What a curve tells of a place, by its nearest point; nothing before its first and after its last. Where that point is
// elsewhere than the cursor, it says so.
const toldOf = (chart, curve, place, cursor) => {
  const places = chart.places(curve), end = places.length - 1;
  const reach = curve.low ? (places[end] - places[0]) / end : 0; // its points stand for several lines
  if (place < places[0] - reach || place > places[end] + reach) return { text: "\u2013", words: "nothing" };
  const i = nearest(places, place), value = curve.mean[i];
  let text = value === null ? "not finite" : numberText(value);
  if (value !== null && curve.low) {
    const [low, high] = [curve.low[i], curve.high[i]].map(numberText);
    if (low !== high) text += ` (${low} to ${high})`;
  }
  if (value !== null && curve.average) text += `, average ${numberText(curve.average[i])}`;
  if (Math.abs(places[i] - cursor) > reach) text += ` (at ${chart.unit} ${placeText(places[i])})`;
  return { text, words: text, value, at: places[i] };
};

// Say the values: at the cursor; without one the last that are seen.
const tell = (chart) => {
  const { svg } = chart, stops = stopsOf(chart);
  const reads = chart.at !== null && stops.length > 0 && chart.at >= chart.from && chart.at <= chart.to;
  const place = reads ? stops[nearest(stops, chart.at)] : stops[stops.length - 1] ?? chart.to;
  chart.cursor.classList.toggle("shown", reads);
  for (const end of ["x1", "x2"]) chart.cursor.setAttribute(end, reads ? chart.toX(place) : 0);
  chart.dots.replaceChildren();
  const words = [];
  chart.legend.style.minHeight = reads ? `${chart.legend.offsetHeight}px` : ""; // what is below stays where it is
  for (const curve of chart.curves) {
    curve.told.textContent = "";
    curve.button.classList.toggle("unseen", !chart.shows(curve));
  }
  for (const curve of chart.visible) {
    const places = chart.places(curve), last = places[places.length - 1];
    const told = toldOf(chart, curve, reads || last < chart.from ? place : Math.min(place, last), place);
    curve.told.textContent = told.text;
    words.push(`${curve.name} ${told.words}`);
    const seen = reads && chart.has(told.value) && told.at >= chart.from && told.at <= chart.to;
    if (seen) chart.dots.append(dot(chart, curve, told.at, told.value, 3.5));
  }
  chart.where.textContent = reads ? `${chart.unit} ${placeText(place)}` : "";
  svg.setAttribute("aria-label", `${chart.data.title}, curves; arrow keys read them`);
  svg.setAttribute("aria-valuemin", chart.from);
  svg.setAttribute("aria-valuemax", chart.to);
  svg.setAttribute("aria-valuenow", place);
  svg.setAttribute("aria-valuetext", `${chart.unit} ${placeText(place)}: ${words.join(", ")}`);
};
