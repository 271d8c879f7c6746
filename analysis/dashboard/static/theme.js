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

// A colour of the palette as it is, or lighter on a dark page that would swallow it: with a contrast of at least 3.5.
mixlab.visible = (function () {
  const PAGE = 0.0085, LEAST = 3.5; // luminance of the dark page
  const lighter = new Map();
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const contrast = ([r, g, b]) => (0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255) + 0.05) / (PAGE + 0.05);
  return function (color) {
    if (document.documentElement.dataset.theme !== "dark" || !/^#[0-9a-f]{6}$/i.test(color)) return color;
    if (!lighter.has(color)) {
      let parts = [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
      while (contrast(parts) < LEAST) parts = parts.map((part) => Math.min(255, part + Math.max(1, 0.05 * (255 - part))));
      lighter.set(color, "#" + parts.map((part) => Math.round(part).toString(16).padStart(2, "0").toUpperCase()).join(""));
    }
    return lighter.get(color);
  };
})();
