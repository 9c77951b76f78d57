// How a chart is read and zoomed: by pointer, by keys.

const placeOf = (chart, event) => {
  const x = event.clientX - chart.svg.getBoundingClientRect().left, { left, right } = chart.box;
  return chart.from + (Math.min(Math.max(x, left), right) - left) / (right - left) * (chart.to - chart.from);
};

const listenTo = (chart) => {
  const { svg } = chart;
  let start = null;
  svg.addEventListener("pointerdown", (event) => { if (event.button === 0) start = { x: event.clientX, place: placeOf(chart, event) }; });
  svg.addEventListener("pointermove", (event) => {
    chart.at = placeOf(chart, event);
    if (start && chart.isOverSteps && Math.abs(event.clientX - start.x) > 5) {
      svg.setPointerCapture(event.pointerId);
      const [a, b] = [chart.toX(start.place), chart.toX(chart.at)].sort((p, q) => p - q);
      chart.selection.setAttribute("x", a);
      chart.selection.setAttribute("width", b - a);
    }
    chart.tell();
  });
  svg.addEventListener("pointerup", (event) => {
    if (start && chart.isOverSteps && Math.abs(event.clientX - start.x) > 5) {
      chart.view.zoomTo(chart.data.group, ...[start.place, placeOf(chart, event)].sort((p, q) => p - q));
    }
    start = null;
    chart.selection.setAttribute("width", 0);
  });
  svg.addEventListener("pointercancel", () => { start = null; chart.selection.setAttribute("width", 0); });
  for (const event of ["pointerleave", "blur"]) svg.addEventListener(event, () => { chart.at = null; chart.tell(); });
  svg.addEventListener("dblclick", () => { if (chart.isOverSteps) chart.view.zoomTo(chart.data.group, null); });
  svg.addEventListener("keydown", (event) => { if (!event.ctrlKey && !event.metaKey && !event.altKey && press(chart, event)) event.preventDefault(); });
};

const press = (chart, event) => {
  const leader = chart.visible[0];
  if (!leader) return false;
  const places = chart.places(leader), [first, last] = chart.inWindow(places);
  const at = nearest(places, chart.at ?? chart.to), far = event.shiftKey ? 10 : 1;
  const move = { ArrowLeft: at - far, ArrowRight: at + far, Home: first, End: last }[event.key];
  if (move !== undefined) {
    chart.at = places[Math.min(Math.max(move, first), last)];
    chart.at = Math.min(Math.max(chart.at, chart.from), chart.to);
    chart.tell();
  } else if (chart.isOverSteps && ["+", "=", "-", "0", "Escape"].includes(event.key)) {
    const middle = chart.at ?? (chart.from + chart.to) / 2, half = (chart.to - chart.from) * (event.key === "-" ? 1 : 0.25);
    if (event.key === "0" || event.key === "Escape") chart.view.zoomTo(chart.data.group, null);
    else chart.view.zoomTo(chart.data.group, middle - half, middle + half);
  } else return false;
  return true;
};
