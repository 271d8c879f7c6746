"use strict";
// Light or dark: as the system has it, or as the address says, which the links between our pages carry on.

mixlab.theme = function (view, redraw) {
  const select = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    const chosen = view.get("theme", "");
    document.documentElement.dataset.theme = chosen || (system.matches ? "dark" : "light");
    for (const link of document.querySelectorAll("nav a[data-page]")) {
      link.href = "./" + link.dataset.page + (chosen ? "?theme=" + encodeURIComponent(chosen) : "");
    }
  };
  apply();
  select.value = view.get("theme", "");
  select.addEventListener("change", () => { view.set({ theme: select.value || null }); apply(); redraw(); });
  system.addEventListener("change", () => { apply(); redraw(); });
};
