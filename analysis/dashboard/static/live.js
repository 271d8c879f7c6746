"use strict";
// Data that keep themselves up to date: asked for again every so often, while somebody looks. An answer that is as
// before costs the server a look at a few rows, and has no body.

// Calls `take(value)` with the first answer and with each that differs; `take` gives the milliseconds until the next
// question. `fail(text)` is called with what went wrong, and with "" once all is well again. Returns what ends it.
mixlab.watch = function (address, take, fail) {
  let etag = "", timer = 0, isOver = false, wait = 5000, hasFailed = false, isAsking = false;

  async function ask() {
    clearTimeout(timer);
    if (isOver || isAsking) return;
    isAsking = true;
    try {
      const response = await fetch(address, { cache: "no-store", headers: etag ? { "If-None-Match": etag } : {} });
      if (isOver) return;
      if (response.status === 200) {
        const value = await response.json();
        if (isOver) return;
        etag = response.headers.get("ETag") ?? "";
        wait = take(value);
      } else if (response.status !== 304) {
        const told = await response.json().catch(() => ({}));
        if (!isOver) problem(told.error ?? `The server answered ${response.status}.`);
        return;
      }
      if (hasFailed) { hasFailed = false; fail(""); }
    } catch (error) {
      if (!isOver) problem(`The server could not be read: ${error.message}`);
    } finally {
      isAsking = false;
      if (!isOver && wait > 0 && !document.hidden) timer = setTimeout(ask, wait);
    }
  }
  function problem(text) { hasFailed = true; etag = ""; fail(text); }
  function onShown() { if (!document.hidden) ask(); }

  document.addEventListener("visibilitychange", onShown);
  ask();
  return () => { isOver = true; clearTimeout(timer); document.removeEventListener("visibilitychange", onShown); };
};

// How soon to ask again about a sweep: often while runs are under way, else seldom.
mixlab.pace = function (isRunning) { return isRunning ? 3000 : 20000; };

// "3 min ago", for a time in milliseconds.
mixlab.ago = function (time_ms, now_ms = Date.now()) {
  const s = Math.max(0, (now_ms - time_ms) / 1000);
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) if (s >= size) return `${Math.floor(s / size)} ${unit} ago`;
  return `${Math.floor(s)} s ago`;
};
