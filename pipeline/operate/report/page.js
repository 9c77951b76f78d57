// A chart says its values at the pointer, or at the place the arrow keys have reached.
for (const chart of document.querySelectorAll(".chart")) {
  const curves = JSON.parse(chart.dataset.curves);
  const [width, left, right, first, last] = JSON.parse(chart.dataset.plot);
  const readout = chart.querySelector(".readout");
  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1; else high = middle;
    }
    return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
  };
  let at = 0;
  const show = (step) => {
    at = nearest(curves[0].steps, step);
    const snapped = curves[0].steps[at];
    const x = last > first ? left + (snapped - first) / (last - first) * (right - left) : (left + right) / 2;
    for (const line of chart.querySelectorAll(".cursor")) {
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
    }
    chart.classList.add("reading");
    readout.textContent = `step ${snapped.toLocaleString("en")}: ` +
      curves.map((c) => `${c.name} ${c.values[nearest(c.steps, snapped)]}`).join(", ");
  };
  const hide = () => {
    chart.classList.remove("reading");
    readout.textContent = "";
  };
  for (const svg of chart.querySelectorAll("svg")) {
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * width;
      show(first + (x - left) / (right - left) * (last - first));
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (!move) return;
      event.preventDefault();
      const steps = curves[0].steps;
      show(steps[Math.min(Math.max(at + move, 0), steps.length - 1)]);
    });
  }
}
