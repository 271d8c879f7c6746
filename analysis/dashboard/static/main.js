"use strict";
// Puts the comparison together: data in, controls to view, view to plot and table.

(function () {
  const byId = (id) => document.getElementById(id);
  const embedded = JSON.parse(byId("data").textContent); // the data of a report; null when they are to be fetched
  const view = new mixlab.View(embedded !== null);
  const loaded = new Map(); // sweep -> data
  let known = []; // names of the sweeps of the store
  let watches = [];
  let model = null;
  let source = new mixlab.Source(embedded, []);
  let seedRuns = null; // of the last choice of axes; see loadSeeds
  let findings = null; // likewise
  let drawnWidth = 0;

  const drawRest = mixlab.afterPaint(() => {
    const shown = selection();
    mixlab.drawTable(byId("table"), shown, pick);
    drawFindings(shown);
  });

  mixlab.theme(view, () => { if (model !== null) fillLegend(); draw(); });
  new ResizeObserver(() => { if (byId("plot").clientWidth !== drawnWidth) draw(); }).observe(byId("plot"));
  addListeners();
  if (embedded !== null) {
    for (const comparison of embedded.comparisons) comparison.told = told(comparison);
    take(embedded);
  } else loadSweeps();

  async function loadSweeps() {
    const response = await fetch("compare/sweeps", { cache: "no-cache" }).catch((error) => error);
    if (!(response instanceof Response) || !response.ok) {
      return say(`The server could not be read: ${response.message ?? response.status}`, true);
    }
    known = (await response.json()).map((sweep) => ({ ...sweep }));
    byId("served").hidden = false;
    if (known.length === 0) return say("This store holds no sweep yet: run one with `mixlab sweep run`, then reload.");
    loadData();
  }

  // The names of the sweeps that the address asks for: the newest, where it asks for none.
  function wanted() {
    const given = view.all("sweep").map((name) => known.find((sweep) => sweep.name === name || sweep.id === name)?.name ?? name);
    return given.length ? [...new Set(given)] : [known[0].name];
  }

  function loadData() {
    watches.forEach((end) => end());
    loaded.clear();
    seedRuns = findings = null;
    say("Loading …");
    const tags = view.all("tag");
    source = new mixlab.Source(null, tags);
    watches = wanted().map((name) => {
      const query = new URLSearchParams({ experiment: name });
      tags.forEach((tag) => query.append("tag", tag));
      return mixlab.watch("compare/data?" + query, take, (text) => {
        if (text) say(text, true); else say("");
        if (text && loaded.size === 0) byId("content").hidden = true;
      });
    });
  }

  function say(text, isError = false) {
    byId("status").textContent = text;
    byId("status").className = isError ? "error" : "";
  }

  function take(data) {
    loaded.set(data.sweep.name, data);
    const isRunning = (data.progress?.counts.running ?? 0) > 0;
    const names = embedded !== null ? [data.sweep.name] : wanted();
    if (names.some((name) => !loaded.has(name))) return mixlab.pace(isRunning);
    const isFirst = byId("content").hidden;
    model = mixlab.merge(names.map((name) => loaded.get(name)));
    if (byId("status").className !== "error") say("");
    byId("content").hidden = false;
    byId("title").textContent = names.length === 1 ? names[0] : `${names.length} sweeps`;
    document.title = byId("title").textContent + " – mixlab";
    byId("question").textContent = names.length === 1 ? data.sweep.question : names.join(", ");
    fillControls();
    mixlab.drawNotes(byId("notes"), model);
    if (isFirst) byId("details").hidden = true;
    seedRuns = findings = null;
    draw();
    return mixlab.pace(isRunning);
  }

  // The settings in which a comparison's runs differ from others, with their values; the server gives them itself.
  function told(comparison) {
    const runs = embedded.runs.filter((run) => run.arm === comparison.arm && run.cell === comparison.cell);
    return Object.fromEntries(embedded.told_settings.map((name) => [name, [...new Set(runs.map((run) => String(run.settings[name] ?? "–")))]]));
  }

  function addListeners() {
    byId("controls").onsubmit = (event) => event.preventDefault();
    for (const id of ["x", "y"]) {
      byId(id).onchange = () => { view.set({ [id]: byId(id).value, [id + "log"]: null }); draw(); };
      byId(id + "log").onchange = () => { view.set({ [id + "log"]: byId(id + "log").checked }); draw(); };
    }
    for (const id of ["color", "facet"]) byId(id).onchange = () => { view.set({ [id]: byId(id).value }); draw(); };
    for (const id of ["intervals", "front", "seeds"]) byId(id).onchange = () => { view.set({ [id]: byId(id).checked }); draw(); };
    for (const format of ["png", "svg"]) byId("save-" + format).onclick = () => mixlab.charts.save(byId("plot"), format, fileName(), shownKey());
    byId("save-csv").onclick = () => mixlab.saveText(mixlab.csv(selection()), fileName() + ".csv", "text/csv");
    byId("reset").onclick = () => { view.set(Object.fromEntries([...view.values.keys()].filter((name) => !["sweep", "theme"].includes(name)).map((name) => [name, null]))); embedded === null ? loadData() : (fillControls(), draw()); };
  }

  function fileName() { return ("mixlab-" + model.sweeps.map((sweep) => sweep.name).join("-")).replace(/[^\w.-]+/g, "_").slice(0, 100); }

  // What the colours and marks of the lines on screen stand for.
  function shownKey() {
    const shown = selection(), names = new Set(shown.lines.map((line) => line.arm));
    const arms = model.arms.filter((arm) => names.has(arm.name));
    const ink = mixlab.colors().text;
    return shown.look.key.length ? [...shown.look.key, ...arms.map((arm) => ({ label: arm.name, color: ink, symbol: arm.symbol }))]
      : arms.map((arm) => ({ label: arm.name, color: mixlab.visible(arm.color), symbol: arm.symbol }));
  }

  function fillControls() {
    const groups = [["factor/", "Varied setting"], ["cost/", "Cost"], ["report/", "Report split"], ["select/", "Select split"]];
    for (const id of ["x", "y"]) {
      byId(id).replaceChildren(...groups.map(([prefix, label]) => {
        const group = mixlab.element("optgroup", { label });
        const own = model.axes.filter((axis) => axis.name.startsWith(prefix) && !(id === "y" && prefix === "factor/"));
        group.append(...own.map((axis) => new Option(prefix === "report/" || prefix === "select/" ? axis.name : axis.label, axis.name)));
        return group;
      }).filter((group) => group.children.length > 0));
    }
    const groupings = mixlab.groupings(model);
    byId("color").replaceChildren(...groupings.map((by) => new Option(by.label, by.name)));
    byId("facet").replaceChildren(...[{ label: "one for all", name: "none" }, ...groupings].map((by) => new Option(by.label, by.name)));
    if (known.length > 0) {
      chooser("sweeps", "Sweeps", known.map((sweep) => ({ value: sweep.name, label: sweep.name })), wanted, (names) => {
        view.set({ sweep: known.map((sweep) => sweep.name).filter((name) => names.has(name)) });
        if (names.size > 0) loadData();
      });
    }
    chooser("cells", "Cells", model.cells.map((cell) => ({ value: cell.label, label: cell.label })), () => chosen("cell", model.cells.map((cell) => cell.label)),
      (cells) => { keep("cell", model.cells.map((cell) => cell.label), cells); draw(); });
    const tags = model.tags.flatMap(({ name, values }) => values.map((value) => ({ value: `${name}=${value}`, label: `${name} = ${value}` })));
    byId("tags").hidden = tags.length === 0;
    chooser("tags", "Tags", tags, () => { const given = view.all("tag"); return given.length ? given : tags.map((tag) => tag.value); }, (values) => {
      view.set({ tag: values.size === tags.length ? [] : tags.map((tag) => tag.value).filter((value) => values.has(value)) });
      loadData();
    });
    fillLegend();
  }

  function chooser(id, title, items, current, onChange) { mixlab.chooser(byId(id), { title, items, chosen: new Set(current()), onChange }); }

  // A choice from `all` as the address has it: those it names, all where it names none.
  function chosen(name, all) {
    const given = new Set(view.all(name));
    return given.size === 0 ? all : all.filter((one) => given.has(one));
  }

  function keep(name, all, now) { view.set({ [name]: now.size === all.length ? [] : now.size ? [...now] : [""] }); }

  function fillLegend() {
    const names = model.arms.map((arm) => arm.name);
    const look = mixlab.look(model, grouping("color", "arm"));
    const change = (now) => { keep("arm", names, now); press(); draw(); };
    const tool = (text, label, choose) => {
      const made = mixlab.element("button", { type: "button", class: "tool", "aria-label": label }, text);
      made.addEventListener("click", () => change(choose()));
      return made;
    };
    byId("legend").replaceChildren(...model.arms.map((arm) => {
      const swatch = mixlab.swatch(look.key.length ? { color: "currentColor", symbol: arm.symbol } : arm);
      const button = mixlab.element("button", { type: "button", title: arm.pattern }, swatch, mixlab.element("span", {}, arm.name));
      button.addEventListener("click", () => {
        const now = new Set(chosen("arm", names));
        if (!now.delete(arm.name)) now.add(arm.name);
        change(now);
      });
      return button;
    }));
    press();
    byId("legend-tools").replaceChildren(tool("all", "Show all arms", () => new Set(names)), tool("none", "Hide all arms", () => new Set()));
    byId("key").replaceChildren(...look.key.map((entry) => mixlab.element("span", {}, mixlab.swatch(entry), " ", entry.label)));
  }

  // The buttons of the arms as the address has them.
  function press() {
    const names = model.arms.map((arm) => arm.name), shownArms = new Set(chosen("arm", names));
    [...byId("legend").children].forEach((button, i) => button.setAttribute("aria-pressed", String(shownArms.has(names[i]))));
  }

  function grouping(name, otherwise) {
    const all = mixlab.groupings(model);
    return all.find((by) => by.name === view.get(name)) ?? all.find((by) => by.name === otherwise);
  }

  // The view, with everything that the address doesn't say or says wrongly set to its default.
  function selection() {
    const named = (name, otherwise) => model.axes.find((axis) => axis.name === name) ?? model.axes.find((axis) => axis.name === otherwise) ?? model.axes[0];
    const x = named(view.get("x"), model.x), y = named(view.get("y")?.startsWith("factor/") ? null : view.get("y"), model.y);
    const arms = new Set(chosen("arm", model.arms.map((arm) => arm.name))), cells = new Set(chosen("cell", model.cells.map((cell) => cell.label)));
    const color = grouping("color", "arm");
    const facet = view.get("facet") === "none" ? { name: "none" } : grouping("facet", model.cells.length > mixlab.MAX_PANELS && !view.get("facet") ? "sweep" : "cell");
    const shown = {
      model, x, y, xlog: view.isOn("xlog", x.log), ylog: view.isOn("ylog", y.log), color, facet, look: mixlab.look(model, color),
      lines: model.lines.filter((line) => arms.has(line.arm) && cells.has(line.cell)),
      intervals: view.isOn("intervals", true), front: view.isOn("front", true), seeds: view.isOn("seeds", false),
    };
    shown.allPanels = mixlab.panels(shown);
    shown.panels = shown.allPanels.slice(0, mixlab.MAX_PANELS);
    return shown;
  }

  // The single seeds for the axes shown; what was loaded for others is forgotten.
  function loadSeeds(shown) {
    if (seedRuns?.what !== axesOf(shown)) {
      seedRuns = load(shown, "Single seeds", async (sweep, x, y) => (await source.seeds(sweep, x, y)).map((run) => ({ ...run, sweep })));
    }
    return seedRuns.value?.flat() ?? null;
  }

  // The statistics, which take longer than the means: drawn when they come.
  function loadFindings(shown) {
    if (findings?.what !== axesOf(shown)) findings = load(shown, "Statistics", (sweep, x, y) => source.statistics(sweep, x, y));
    return findings.value?.filter((one) => one !== null) ?? null;
  }

  function axesOf(shown) { return JSON.stringify([shown.x.name, shown.y.name]); }

  // {what, value}: value comes later, and then all is drawn again.
  function load(shown, title, ask) {
    const mine = { what: axesOf(shown), value: null };
    Promise.all(shown.model.sweeps.map((sweep) => ask(sweep.name, shown.x.name, shown.y.name))).then((found) => {
      mine.value = found;
      if (mine === seedRuns) draw();
      if (mine === findings) drawRest();
    }, (error) => say(`${title}: ${error.message}`, true));
    return mine;
  }

  function drawFindings(shown) {
    const isPossible = !shown.x.name.startsWith("factor/");
    const found = isPossible ? loadFindings(shown) : [];
    if (found === null) return;
    mixlab.drawFindings(byId("findings"), found, shown);
    // curves do not hang on the axes: a report has them for any
    mixlab.drawFigures(byId("figures"), embedded === null ? found : [source.curves(shown.model.sweeps[0].name)], shown);
  }

  async function pick(arm, cell, sweep) {
    const line = model.lines.find((found) => found.arm === arm && found.cell === cell && found.sweep === sweep);
    try {
      mixlab.drawDetails(byId("details"), selection(), line, await source.runs(sweep, line.armInSweep, cell));
    } catch (error) { say(`Runs of ${arm}: ${error.message}`, true); }
  }

  function draw() {
    if (model === null) return;
    const shown = selection();
    shown.seedRuns = shown.seeds ? loadSeeds(shown) : null;
    for (const id of ["x", "y", "color", "facet"]) byId(id).value = shown[id].name;
    for (const id of ["xlog", "ylog", "intervals", "front", "seeds"]) byId(id).checked = shown[id];
    if (byId("key").dataset.by !== shown.color.name) { byId("key").dataset.by = shown.color.name; fillLegend(); }
    drawnWidth = byId("plot").clientWidth;
    const nLeftOut = mixlab.drawPlot(byId("plot"), shown, pick);
    const nMore = shown.allPanels.length - shown.panels.length;
    const told = [];
    if (nMore > 0) told.push(`${nMore} more panels: choose cells, or another grouping.`);
    if (nLeftOut > 0) told.push(`${nLeftOut} arm${nLeftOut > 1 ? "s" : ""} and cell${nLeftOut > 1 ? "s" : ""} without a point on these axes: see the notes in the table.`);
    if (view.all("tag").length > 0) told.push("Only runs with the chosen tags: those without count as missing.");
    byId("left-out").textContent = told.join(" ");
    byId("plot").setAttribute("aria-label", `${shown.y.label} against ${shown.x.label}: ${shown.lines.length} points, listed in the table below`);
    drawRest();
  }
})();
