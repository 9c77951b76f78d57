// The page: what is set for all charts together, and pictures over time.
{
  const panel = document.querySelector("#curves");
  const runs = panel ? JSON.parse(panel.dataset.runs) : [];
  const view = { along: "steps", smoothing: 0.05, zooms: new Map(), hidden: new Set() };
  const charts = [...document.querySelectorAll(".chart")].map((figure) => new Chart(figure, view, runs));
  view.charts = charts;
  let due = false; // once for each frame, however fast a slider moves
  const redraw = () => {
    if (!due) requestAnimationFrame(() => {
      due = false;
      for (const chart of charts) chart.draw();
    });
    due = true;
  };
  const control = (id) => document.getElementById(id);

  // A window within what there is of a group of charts; null shows all of it.
  view.zoomTo = (group, from, to) => {
    const zoomed = charts.filter((chart) => chart.isOverSteps && chart.data.group === group && chart.visible.length);
    if (!zoomed.length) return;
    const extents = zoomed.map((chart) => chart.extent());
    const low = Math.min(...extents.map((e) => e[0])), high = Math.max(...extents.map((e) => e[1]));
    const zoom = [Math.max(from ?? low, low), Math.min(to ?? high, high)];
    if (zoom[1] - zoom[0] < (high - low) / 1e5) return;
    if (zoom[1] - zoom[0] < (high - low) * 0.999) view.zooms.set(group, zoom); else view.zooms.delete(group);
    if (control("reset")) control("reset").disabled = view.zooms.size === 0;
    redraw();
  };
  const showAll = () => {
    view.zooms.clear();
    control("reset").disabled = true;
    redraw();
  };

  if (panel) {
    panel.classList.add("works");
    control("reset").addEventListener("click", showAll);
    control("smoothing").addEventListener("input", (event) => {
      view.smoothing = event.target.value / 100;
      control("smoothing-value").textContent = view.smoothing ? `${event.target.value} %` : "none";
      redraw();
    });
    control("along")?.addEventListener("change", (event) => {
      view.along = event.target.value;
      showAll();
    });
    for (const button of panel.querySelectorAll(".run-toggle")) {
      button.addEventListener("click", () => {
        const run = Number(button.dataset.run), hides = button.getAttribute("aria-pressed") === "true";
        button.setAttribute("aria-pressed", !hides);
        if (hides) view.hidden.add(run); else view.hidden.delete(run);
        redraw();
      });
    }
  }

  // Of each run the newest pictures that are not newer than the slider's step.
  for (const album of document.querySelectorAll(".album")) {
    const steps = JSON.parse(album.dataset.steps);
    const slider = album.querySelector("input"), told = album.querySelector("output"), play = album.querySelector("button");
    const show = () => {
      const step = steps[slider.value];
      told.textContent = `step ${step.toLocaleString("en")}`;
      slider.setAttribute("aria-valuetext", told.textContent);
      for (const figure of album.querySelectorAll("figure")) {
        const sheets = [...figure.querySelectorAll("img")];
        const chosen = sheets.filter((sheet) => Number(sheet.dataset.step) <= step).pop() ?? sheets[0];
        for (const sheet of sheets) sheet.hidden = sheet !== chosen;
        figure.querySelector(".of-step").textContent = `step ${Number(chosen.dataset.step).toLocaleString("en")}`;
      }
    };
    let timer = null;
    const stop = () => {
      clearInterval(timer);
      timer = null;
      play.textContent = "play";
    };
    play.addEventListener("click", () => {
      if (timer) return stop();
      if (Number(slider.value) === steps.length - 1) slider.value = 0;
      play.textContent = "pause";
      show();
      timer = setInterval(() => {
        slider.value = Number(slider.value) + 1;
        show();
        if (Number(slider.value) === steps.length - 1) stop();
      }, 500);
    });
    slider.addEventListener("input", () => { stop(); show(); });
    album.classList.add("works");
    show();
  }
}
