"use strict";
// What is selected, kept in the address so that a view can be shared: the query string of the served page, or the
// fragment of a report, since a browser lets no script change the query of a file or of a sandboxed frame.

mixlab.PANELS = ""; // every cell in a panel of its own
mixlab.OVERLAY = "*"; // every cell in one panel

mixlab.View = class {
  constructor(isReport) {
    this.isReport = isReport;
    this.values = new URLSearchParams(isReport ? location.hash.slice(1) : location.search);
  }
  get(name, otherwise) { return this.values.get(name) ?? otherwise; }
  isOn(name, otherwise) { return this.values.has(name) ? this.values.get(name) === "1" : otherwise; }
  // Set several; null forgets one.
  set(changes) {
    for (const [name, value] of Object.entries(changes)) {
      if (value === null) this.values.delete(name);
      else this.values.set(name, typeof value === "boolean" ? (value ? "1" : "0") : value);
    }
    const text = this.values.toString();
    if (this.isReport) location.replace("#" + text);
    else history.replaceState(null, "", location.pathname + (text ? "?" + text : ""));
  }
};
