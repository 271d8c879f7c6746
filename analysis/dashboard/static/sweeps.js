"use strict";
// Where every sweep stands: a bar of its runs by outcome, and the best that each arm has reached so far.

(function () {
  const byId = (id) => document.getElementById(id);
  const e = mixlab.element;
  const view = new mixlab.View(false);
  const STATES = [["finished", "finished"], ["pruned", "pruned"], ["diverged", "diverged"], ["failed", "failed"], ["running", "running"], ["killed", "cut off"]];
  const AT_ONCE = 50;
  let sweeps = [];
  let nShown = AT_ONCE;
  const chosen = new Set(view.all("sweep"));
  const open = new Set();
  const drawn = new Map(); // name -> {text, element}: what has not changed is left alone, with its focus

  mixlab.theme(view, () => {});
  byId("find").onsubmit = (event) => event.preventDefault();
  byId("query").value = view.get("q", "");
  byId("query").oninput = () => { view.set({ q: byId("query").value || null }); nShown = AT_ONCE; draw(); };
  byId("more").onclick = () => { nShown += AT_ONCE; draw(); };
  mixlab.watch("sweeps/data", take, (text) => { byId("status").textContent = text; byId("status").className = text ? "error" : ""; });
  setInterval(() => { for (const element of document.querySelectorAll("[data-changed]")) element.textContent = mixlab.ago(Number(element.dataset.changed)); }, 5000);

  function take(found) {
    sweeps = found;
    byId("status").textContent = found.length ? "" : "This store holds no sweep yet: run one with `mixlab sweep run`.";
    byId("find").hidden = found.length === 0;
    draw();
    return mixlab.pace(found.some((sweep) => sweep.counts.running > 0));
  }

  function draw() {
    const query = byId("query").value.toLowerCase();
    const fitting = sweeps.filter((sweep) => [sweep.name, sweep.question, ...sweep.arms.map((arm) => arm.name)].some((text) => text.toLowerCase().includes(query)));
    const nRuns = fitting.reduce((sum, sweep) => sum + total(sweep), 0);
    byId("total").textContent = `${fitting.length} of ${sweeps.length} sweeps, ${nRuns.toLocaleString("en")} runs`;
    const cards = fitting.slice(0, nShown).map((sweep) => {
      const text = JSON.stringify(sweep);
      const before = drawn.get(sweep.name);
      if (before?.text === text) return before.element;
      const element = card(sweep);
      drawn.set(sweep.name, { text, element });
      return element;
    });
    const host = byId("list");
    // moving an element takes its focus: only where the order differs
    if (host.children.length !== cards.length || cards.some((element, i) => host.children[i] !== element)) host.replaceChildren(...cards);
    byId("more").hidden = fitting.length <= nShown;
    byId("more").textContent = `show ${Math.min(AT_ONCE, fitting.length - nShown)} more`;
    drawTogether();
  }

  function drawTogether() {
    const names = sweeps.map((sweep) => sweep.name).filter((name) => chosen.has(name));
    byId("together").hidden = names.length < 2;
    byId("together").textContent = `Compare ${names.length} sweeps`;
    byId("together").href = "./compare?" + new URLSearchParams(names.map((name) => ["sweep", name]));
  }

  function total(sweep) { return Object.values(sweep.counts).reduce((sum, n) => sum + n, 0); }

  function card(sweep) {
    const n = total(sweep);
    const planned = Math.max(sweep.planned ?? n, n);
    const nEnded = n - sweep.counts.running - sweep.counts.killed;
    const isRunning = sweep.counts.running > 0;
    const box = e("input", { type: "checkbox", "aria-label": `Choose ${sweep.name} for a comparison` });
    box.checked = chosen.has(sweep.name);
    box.onchange = () => { if (box.checked) chosen.add(sweep.name); else chosen.delete(sweep.name); view.set({ sweep: [...chosen] }); drawTogether(); };
    const shown = [...STATES.filter(([name]) => sweep.counts[name] > 0).map(([name, word]) => [name, word, sweep.counts[name]]),
      ...(planned > n ? [["planned", "to come", planned - n]] : [])];
    const bar = e("div", { class: "bar", role: "img", "aria-label": shown.map(([, word, count]) => `${count} ${word}`).join(", ") || "no runs" },
      ...shown.map(([name, , count]) => e("span", { class: name, "data-n": count })));
    [...bar.children].forEach((part) => { part.style.flexGrow = part.dataset.n; });
    const counts = e("p", { class: "counts quiet" },
      e("strong", {}, `${nEnded} of ${sweep.planned === null ? "?" : planned}`), " runs ended",
      ...shown.map(([name, word, count]) => e("span", { class: "state " + name }, `${count} ${word}`)),
      e("span", {}, "last change ", e("span", { "data-changed": sweep.changed_ms }, mixlab.ago(sweep.changed_ms))));
    const best = e("details", { class: "best" }, e("summary", {}, `Best so far of ${sweep.arms.length} arm${sweep.arms.length === 1 ? "" : "s"}`));
    best.open = open.has(sweep.name);
    const fill = () => { if (best.open && best.children.length === 1) best.append(bestTable(sweep)); };
    best.addEventListener("toggle", () => { if (best.open) open.add(sweep.name); else open.delete(sweep.name); fill(); });
    fill();
    return e("article", { class: "sweep", "data-sweep": sweep.name },
      e("h2", {}, box, e("a", { href: "./compare?sweep=" + encodeURIComponent(sweep.name) }, sweep.name),
        ...(isRunning ? [e("span", { class: "live" }, "running")] : []),
        e("a", { class: "quiet", href: `./#/experiments/${encodeURIComponent(sweep.id)}` }, "runs in MLflow")),
      ...(sweep.question ? [e("p", { class: "question" }, sweep.question)] : []), bar, counts, best);
  }

  // Arms down, cells across: the best select value so far, and the mean of the report metric where there is one.
  function bestTable(sweep) {
    const cells = sweep.cells.slice(0, 20);
    const lines = new Map(sweep.lines.map((line) => [JSON.stringify([line.arm, line.cell]), line]));
    const best = sweep.metric.direction === "minimize" ? Math.min : Math.max;
    const top = new Map(cells.map((cell) => [cell, best(...sweep.lines.filter((line) => line.cell === cell && line.best !== null).map((line) => line.best))]));
    const head = e("tr", {}, e("th", { scope: "col", class: "words" }, "arm"), ...cells.map((cell) => e("th", { scope: "col" }, cell || "all")));
    const rows = sweep.arms.map((arm) => e("tr", {}, e("th", { scope: "row", class: "words", title: arm.pattern }, arm.name), ...cells.map((cell) => {
      const line = lines.get(JSON.stringify([arm.name, cell]));
      const running = line?.counts.running ?? 0;
      return e("td", line && line.best !== null && line.best === top.get(cell) ? { class: "top" } : {},
        line?.best == null ? "–" : number(line.best),
        ...(line && line.report !== null ? [e("span", { class: "quiet", title: `mean of ${line.n_report} replicates on the report split` }, ` → ${number(line.report)}`)] : []),
        ...(running ? [e("span", { class: "quiet", title: "runs under way, and their latest value" }, ` ▸${running}${line.current === null ? "" : " at " + number(line.current)}`)] : []));
    })));
    const told = `Best ${sweep.metric.select} so far (the higher the better), → mean ${sweep.metric.report} of the replicates, ▸ runs under way.`
      .replace("higher", sweep.metric.direction === "minimize" ? "lower" : "higher");
    return e("div", {}, e("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Best so far in ${sweep.name}` }, e("table", {}, e("thead", {}, head), e("tbody", {}, ...rows))),
      e("p", { class: "quiet" }, told + (sweep.cells.length > cells.length ? ` The first ${cells.length} of ${sweep.cells.length} cells.` : "")));
  }

  function number(value) { return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4 ? String(Number(value.toFixed(4))) : String(Number(value.toPrecision(3))); }
})();
