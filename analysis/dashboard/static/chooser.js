"use strict";
// A list to choose several from: a summary that says how many are chosen, a search field, all, none, and check boxes.

// `items` = [{value, label, swatch?}]; `chosen` a Set of values; `onChange(Set)`. What was open stays open.
mixlab.chooser = function (host, { title, items, chosen, onChange }) {
  const e = mixlab.element;
  const wasOpen = host.querySelector("details")?.open ?? false;
  const search = e("input", { type: "search", placeholder: "find", "aria-label": `Find in ${title}` });
  const list = e("ul", {});
  const summary = e("summary", {});
  const button = (text, choose) => {
    const made = e("button", { type: "button" }, text);
    made.addEventListener("click", () => { change(new Set(choose(visible()))); });
    return made;
  };
  const visible = () => items.filter((item) => item.label.toLowerCase().includes(search.value.toLowerCase()));
  const parts = e("div", { class: "choices" }, e("div", { class: "buttons" }, search,
    button("all", (found) => [...chosen, ...found.map((item) => item.value)]),
    button("none", (found) => [...chosen].filter((value) => !found.some((item) => item.value === value)))), list);
  const details = e("details", { class: "chooser" }, summary, parts);
  details.open = wasOpen;
  search.addEventListener("input", fill);
  // a press of Escape closes it, as a menu
  details.addEventListener("keydown", (event) => { if (event.key === "Escape") { details.open = false; summary.focus(); } });
  host.replaceChildren(details);
  fill();

  function change(next) { chosen = next; fill(); onChange(chosen); }
  function fill() {
    summary.textContent = `${title}: ${chosen.size === items.length ? "all " : chosen.size + " of "}${items.length}`;
    list.replaceChildren(...visible().slice(0, 300).map((item) => {
      const box = e("input", { type: "checkbox" });
      box.checked = chosen.has(item.value);
      box.addEventListener("change", () => {
        const next = new Set(chosen);
        if (box.checked) next.add(item.value); else next.delete(item.value);
        chosen = next;
        summary.textContent = `${title}: ${chosen.size === items.length ? "all " : chosen.size + " of "}${items.length}`;
        onChange(chosen);
      });
      return e("li", {}, e("label", {}, box, " ", ...(item.swatch ? [item.swatch, " "] : []), e("span", {}, item.label)));
    }));
  }
};
