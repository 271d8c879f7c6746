"use strict";
// Puts the page together: data in, controls to view, view to plot and table.

(function () {
  const byId = (id) => document.getElementById(id);
  const embedded = JSON.parse(byId("data").textContent); // the data of a report; null when they are to be fetched
  const view = new mixlab.View(embedded !== null);
  const hidden = new Set();
  let data = null;
  let axes = []; // of data, and the varied factors that are numbers

  applyTheme();
  byId("theme").value = view.get("theme", "");
  byId("theme").addEventListener("change", (event) => { view.set({ theme: event.target.value || null }); applyTheme(); draw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { applyTheme(); draw(); });
  let drawnWidth = 0;
  new ResizeObserver(() => { if (byId("plot").clientWidth !== drawnWidth) draw(); }).observe(byId("plot"));

  if (embedded !== null) take(embedded);
  else loadSweeps();

  function applyTheme() {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = view.get("theme", "") || (dark ? "dark" : "light");
  }

  async function loadSweeps() {
    const sweeps = await fetched("compare/sweeps");
    if (sweeps === null) return;
    byId("mlflow").hidden = false;
    if (sweeps.length === 0) return say("This store holds no sweep yet: run one with `mixlab sweep run`, then reload.");
    const select = byId("sweep");
    select.replaceChildren(...sweeps.map((sweep) => new Option(sweep.name, sweep.name)));
    byId("sweep-field").hidden = false;
    const wanted = view.get("sweep", sweeps[0].name);
    const found = sweeps.find((sweep) => sweep.name === wanted) ?? sweeps.find((sweep) => sweep.id === wanted);
    if (found) select.value = found.name;
    else select.selectedIndex = -1;
    select.addEventListener("change", () => {
      view.set({ sweep: select.value, x: null, y: null, xlog: null, ylog: null, cell: null });
      hidden.clear();
      loadSweep(select.value);
    });
    await loadSweep(found ? found.name : wanted);
  }

  async function loadSweep(name) {
    say("Loading …");
    byId("content").hidden = true;
    const found = await fetched("compare/data?experiment=" + encodeURIComponent(name));
    // a slower answer to an older question must not replace a newer one
    if (found !== null && (byId("sweep").value === name || byId("sweep").selectedIndex < 0)) take(found);
  }

  async function fetched(address) {
    try {
      const response = await fetch(address);
      const value = await response.json();
      if (response.ok) return value;
      say(value.error ?? `The server answered ${response.status}.`, true);
    } catch (error) {
      say(`The server could not be read: ${error.message}`, true);
    }
    return null;
  }

  function say(text, isError = false) {
    byId("status").textContent = text;
    byId("status").className = isError ? "error" : "";
  }

  function take(found) {
    data = found;
    say("");
    byId("details").hidden = true;
    byId("content").hidden = false;
    byId("title").textContent = data.sweep.name;
    document.title = data.sweep.name + " – mixlab";
    byId("question").textContent = data.sweep.question;
    axes = [...data.axes, ...factorAxes()];
    fillControls();
    mixlab.drawNotes(byId("notes"), data);
    draw();
  }

  function factorAxes() {
    const names = [...new Set(data.sweep.cells.flatMap((cell) => Object.keys(cell.factors)))];
    return names.map((name) => ({ name, values: data.sweep.cells.map((cell) => cell.factors[name]) }))
      .filter(({ values }) => values.every((value) => typeof value === "number") && new Set(values).size > 1)
      .map(({ name, values }) => ({
        name: "factor/" + name, label: name, unit: "", direction: "minimize",
        log: Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) >= 8,
      }));
  }

  function fillControls() {
    const groups = [["factor/", "Varied setting"], ["cost/", "Cost"], ["report/", "Report split"], ["select/", "Select split"]];
    for (const id of ["x", "y"]) {
      byId(id).replaceChildren(...groups.map(([prefix, label]) => {
        const group = mixlab.element("optgroup", { label });
        const own = axes.filter((axis) => axis.name.startsWith(prefix) && !(id === "y" && prefix === "factor/"));
        group.append(...own.map((axis) => new Option(prefix === "report/" || prefix === "select/" ? axis.name : axis.label, axis.name)));
        return group;
      }).filter((group) => group.children.length > 0));
      byId(id).onchange = () => { view.set({ [id]: byId(id).value, [id + "log"]: null }); draw(); };
      byId(id + "log").onchange = () => { view.set({ [id + "log"]: byId(id + "log").checked }); draw(); };
    }
    const cells = data.sweep.cells.map((cell) => new Option(cell.label, cell.label));
    const many = [new Option("each in a panel", mixlab.PANELS), new Option("all in one panel", mixlab.OVERLAY)];
    byId("cell").replaceChildren(...(cells.length > 1 ? many : []), ...cells);
    byId("cell").onchange = () => { view.set({ cell: byId("cell").value || null }); draw(); };
    for (const id of ["intervals", "front", "seeds"]) {
      byId(id).onchange = () => { view.set({ [id]: byId(id).checked }); draw(); };
    }
    byId("controls").onsubmit = (event) => event.preventDefault();
    byId("legend").replaceChildren(...data.sweep.arms.map((arm) => {
      const button = mixlab.element("button", { type: "button", "aria-pressed": "true", title: arm.pattern }, mixlab.swatch(arm), mixlab.element("span", {}, arm.name));
      button.addEventListener("click", () => {
        if (!hidden.delete(arm.name)) hidden.add(arm.name);
        button.setAttribute("aria-pressed", String(!hidden.has(arm.name)));
        draw();
      });
      return button;
    }));
  }

  // The view, with everything that the address doesn't say or says wrongly set to its default.
  function selection() {
    const named = (name, otherwise) => axes.find((axis) => axis.name === name) ?? axes.find((axis) => axis.name === otherwise) ?? axes[0];
    const x = named(view.get("x"), data.x), y = named(view.get("y")?.startsWith("factor/") ? null : view.get("y"), data.y);
    const cells = data.sweep.cells.map((cell) => cell.label);
    const known = [mixlab.PANELS, mixlab.OVERLAY, ...cells];
    const cell = known.includes(view.get("cell")) ? view.get("cell") : mixlab.PANELS;
    return {
      data, x, y, hidden, xlog: view.isOn("xlog", x.log), ylog: view.isOn("ylog", y.log),
      cell: cells.length === 1 ? cells[0] : cell,
      intervals: view.isOn("intervals", true), front: view.isOn("front", true), seeds: view.isOn("seeds", false),
    };
  }

  function draw() {
    if (data === null) return;
    const shown = selection();
    for (const id of ["x", "y"]) byId(id).value = shown[id].name;
    byId("cell").value = shown.cell;
    for (const id of ["xlog", "ylog", "intervals", "front", "seeds"]) byId(id).checked = shown[id];
    const pick = (arm, cell) => mixlab.drawDetails(byId("details"), shown, arm, cell);
    drawnWidth = byId("plot").clientWidth;
    const nLeftOut = mixlab.drawPlot(byId("plot"), shown, pick);
    byId("left-out").textContent = nLeftOut
      ? `${nLeftOut} arm${nLeftOut > 1 ? "s" : ""} and cell${nLeftOut > 1 ? "s" : ""} without a point on these axes: see the notes in the table.` : "";
    mixlab.drawTable(byId("table"), shown, pick);
  }
})();
