"use strict";
// What is selected, kept in the address so that a view can be shared: the query string of the served page, or the
// fragment of a report, since a browser lets no script change the query of a file or of a sandboxed frame.

mixlab.View = class {
  constructor(isReport) {
    this.isReport = isReport;
    this.values = new URLSearchParams(isReport ? location.hash.slice(1) : location.search);
  }
  get(name, otherwise) { return this.values.get(name) ?? otherwise; }
  all(name) { return this.values.getAll(name); }
  isOn(name, otherwise) { return this.values.has(name) ? this.values.get(name) === "1" : otherwise; }
  // Set several; null forgets one, a list sets as many of it.
  set(changes) {
    for (const [name, value] of Object.entries(changes)) {
      this.values.delete(name);
      if (Array.isArray(value)) value.forEach((one) => this.values.append(name, one));
      else if (value !== null) this.values.set(name, typeof value === "boolean" ? (value ? "1" : "0") : value);
    }
    const text = this.values.toString();
    if (this.isReport) location.replace("#" + text);
    else history.replaceState(null, "", location.pathname + (text ? "?" + text : ""));
  }
};
