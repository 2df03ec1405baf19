"use strict";
// Adds to a page that is complete without it: tooltips, hiding arms, zoom, a copy button.
// Every text is set by textContent; nothing is fetched; no inline style text is written.
(() => {
  const NS = "http://www.w3.org/2000/svg";
  const data = JSON.parse(document.getElementById("data").textContent);
  const hidden = new Set();
  document.documentElement.classList.add("live");

  // --- tooltip -------------------------------------------------------------------------------------------------
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  document.body.append(tip);
  const say = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.max(8, Math.min(x + 14, innerWidth - box.width - 8));
    const top = y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18;
    tip.style.left = left + "px";
    tip.style.top = top + "px";
  };
  const hush = () => { tip.hidden = true; };
  // The SVG titles are the tooltips without a script; with it they would show twice.
  const words = new Map();
  document.querySelectorAll("svg title").forEach((title) => {
    words.set(title.parentNode, title.textContent);
    title.parentNode.setAttribute("aria-label", title.textContent);
    title.remove();
  });
  const worded = (node) => {
    for (let at = node; at && at.nodeName.toLowerCase() !== "svg"; at = at.parentNode) {
      if (words.has(at)) return words.get(at);
    }
    return null;
  };

  // --- hiding arms ---------------------------------------------------------------------------------------------
  const hint = document.getElementById("hint");
  if (hint) {
    hint.hidden = false;
    document.getElementById("drag").hidden = !matchMedia("(pointer: fine)").matches;
  }
  document.querySelectorAll(".keys button").forEach((button) => {
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      const arms = button.dataset.arms.split(" ");
      const off = !hidden.has(arms[0]);
      arms.forEach((arm) => (off ? hidden.add(arm) : hidden.delete(arm)));
      button.setAttribute("aria-pressed", String(!off));
      document.querySelectorAll("svg [data-arm]").forEach((node) => {
        node.classList.toggle("off", hidden.has(node.dataset.arm));
      });
      document.querySelectorAll("svg [data-less]").forEach((node) => {
        if (button.dataset.less) node.classList.toggle("off", off);
      });
    });
  });

  // --- accuracy against time: nearest point, zoom -----------------------------------------------------------------
  const error = (accuracy) => -Math.log(Math.max(1 - accuracy, 1e-5));
  const make = (name, attributes, text) => {
    const node = document.createElementNS(NS, name);
    Object.entries(attributes).forEach(([key, value]) => node.setAttribute(key, value));
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const steps = (low, high, wanted) => {
    const raw = (high - low) / wanted;
    const unit = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((k) => k * unit).find((s) => s >= raw * 0.999);
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high * (1 + 1e-12); k += 1) found.push(k * step);
    return [found, Math.max(0, -Math.floor(Math.log10(step)))];
  };
  const charts = [...document.querySelectorAll("svg[data-plot]")].map((svg) => {
    const [left, right, top, floor] = svg.dataset.plot.split(" ").map(Number);
    const whole = svg.dataset.domain.split(" ").map(Number);
    const still = { axes: svg.querySelector(".axes"), frame: svg.querySelector(".frame"), inside: svg.querySelector(".inside") };
    const first = { axes: still.axes.cloneNode(true), frame: still.frame.cloneNode(true), inside: still.inside.cloneNode(true) };
    const chart = { svg, left, right, top, floor, whole, domain: whole, still, first };
    chart.x = (v) => left + ((v - chart.domain[0]) / (chart.domain[1] - chart.domain[0])) * (right - left);
    chart.y = (v) => {
      const [, , low, high] = chart.domain;
      return floor + ((error(v) - error(low)) / (error(high) - error(low))) * (top - floor);
    };
    chart.atX = (px) => chart.domain[0] + ((px - left) / (right - left)) * (chart.domain[1] - chart.domain[0]);
    chart.atY = (py) => {
      const [, , low, high] = chart.domain;
      return 1 - Math.exp(-(error(low) + ((py - floor) / (top - floor)) * (error(high) - error(low))));
    };
    return chart;
  });
  const line = (chart, rows) => rows.map((r) => chart.x(r[0]).toFixed(1) + "," + chart.y(r[2]).toFixed(1)).join(" ");
  const redraw = (chart) => {
    const { svg, left, right, floor } = chart;
    data.arms.forEach((arm) => {
      const lines = svg.querySelectorAll(`.inside [data-arm="${arm.index}"] polyline`);
      [...arm.seeds.map((seed) => seed.curve), arm.median].forEach((rows, i) => lines[i].setAttribute("points", line(chart, rows)));
    });
    const less = svg.querySelector(".less");
    if (less) less.setAttribute("points", line(chart, data.less.map(([x, y]) => [x, 0, y])));
    svg.querySelectorAll(".lessdot").forEach((node, i) => {
      const [x, y] = data.less[i];
      node.setAttribute("d", `M${chart.x(x).toFixed(1)} ${(chart.y(y) - 5).toFixed(1)}l5 5l-5 5l-5 -5z`);
    });
    const zoomed = chart.domain !== chart.whole;
    svg.querySelector(".poles").classList.toggle("off", zoomed);
    const { axes, frame } = chart.still;
    if (!zoomed) {
      axes.replaceChildren(...chart.first.axes.cloneNode(true).childNodes);
      frame.replaceChildren(...chart.first.frame.cloneNode(true).childNodes);
      return;
    }
    const caption = axes.lastElementChild.cloneNode(true);
    const marks = [];
    const [xs, xd] = steps(chart.domain[0], chart.domain[1], right - left > 500 ? 8 : 4);
    xs.forEach((v) => marks.push(make("text", { x: chart.x(v), y: floor + 18, class: "tick mid" }, v.toFixed(xd))));
    const [ys, yd] = steps(chart.domain[2], chart.domain[3], 8);
    ys.forEach((v) => {
      marks.push(make("line", { x1: left, x2: right, y1: chart.y(v), y2: chart.y(v), class: "grid" }));
      marks.push(make("text", { x: left - 7, y: chart.y(v) + 4, class: "tick end" }, (100 * v).toFixed(Math.max(0, yd - 2)) + "%"));
    });
    marks.push(make("line", { x1: left, x2: right, y1: floor, y2: floor, class: "axis" }));
    axes.replaceChildren(...marks, caption);
    const inside = data.target > chart.domain[2] && data.target < chart.domain[3];
    frame.classList.toggle("off", !inside);
    if (inside) {
      const [rule, label] = frame.children;
      rule.setAttribute("y1", chart.y(data.target));
      rule.setAttribute("y2", chart.y(data.target));
      label.setAttribute("y", chart.y(data.target) - 6);
    }
  };
  const zoom = (domain) => charts.forEach((chart) => {
    chart.domain = domain || chart.whole;
    chart.still.frame.classList.remove("off");
    redraw(chart);
  });
  const finish = () => {
    const seen = data.arms.filter((arm) => !hidden.has(String(arm.index)));
    const ends = (seen.length ? seen : data.arms).map((arm) => arm.median[arm.median.length - 1]);
    const times = ends.map((r) => r[0]), heights = [...ends.map((r) => r[2]), data.target];
    const low = Math.min(...heights), high = Math.max(...heights), margin = Math.max((high - low) * 0.25, 0.004);
    const span = Math.max(...times) - Math.min(...times);
    return [Math.max(0, Math.min(...times) - span * 0.08), Math.max(...times) + span * 0.04 + 1e-9, Math.max(0, low - margin), Math.min(0.99999, high + margin)];
  };
  const place = (chart, event) => {
    const box = chart.svg.getBoundingClientRect();
    const view = chart.svg.viewBox.baseVal;
    return [((event.clientX - box.left) / box.width) * view.width, ((event.clientY - box.top) / box.height) * view.height];
  };
  const nearest = (chart, px, py) => {
    let best = null, least = 24 ** 2;
    data.arms.filter((arm) => !hidden.has(String(arm.index))).forEach((arm) => {
      arm.seeds.forEach((seed) => seed.curve.forEach((row) => {
        const away = (chart.x(row[0]) - px) ** 2 + (chart.y(row[2]) - py) ** 2;
        if (away < least) { least = away; best = [arm, seed, row]; }
      }));
    });
    return best;
  };
  charts.forEach((chart) => {
    const { svg } = chart;
    const ring = make("circle", { r: 5, class: "ring off" });
    const lasso = make("rect", { class: "lasso off" });
    svg.append(ring, lasso);
    let from = null;
    const clamp = ([x, y]) => [Math.min(Math.max(x, chart.left), chart.right), Math.min(Math.max(y, chart.top), chart.floor)];
    svg.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "mouse" || event.button !== 0) return;
      from = clamp(place(chart, event));
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointermove", (event) => {
      const [px, py] = place(chart, event);
      if (from) {
        const [x, y] = clamp([px, py]);
        Object.entries({ x: Math.min(x, from[0]), y: Math.min(y, from[1]), width: Math.abs(x - from[0]), height: Math.abs(y - from[1]) })
          .forEach(([key, value]) => lasso.setAttribute(key, value));
        lasso.classList.remove("off");
        hush();
        return;
      }
      const found = nearest(chart, px, py);
      ring.classList.toggle("off", !found);
      if (!found) { const text = worded(event.target); if (text) say(text, event.clientX, event.clientY); else hush(); return; }
      const [arm, seed, row] = found;
      ring.setAttribute("cx", chart.x(row[0]));
      ring.setAttribute("cy", chart.y(row[2]));
      say(`${arm.label}, seed ${seed.seed}\n${row[0].toFixed(1)} s · ${(100 * row[2]).toFixed(2)}% · ${Math.round(row[1]).toLocaleString("en")} samples`, event.clientX, event.clientY);
    });
    svg.addEventListener("pointerup", (event) => {
      if (!from) return;
      const to = clamp(place(chart, event)), start = from;
      from = null;
      lasso.classList.add("off");
      if (Math.abs(to[0] - start[0]) < 12 || Math.abs(to[1] - start[1]) < 12) return;
      const xs = [chart.atX(start[0]), chart.atX(to[0])].sort((a, b) => a - b);
      const ys = [chart.atY(start[1]), chart.atY(to[1])].sort((a, b) => a - b);
      zoom([xs[0], xs[1], ys[0], ys[1]]);
    });
    svg.addEventListener("pointercancel", () => { from = null; lasso.classList.add("off"); });
    svg.addEventListener("pointerleave", () => { ring.classList.add("off"); hush(); });
    svg.addEventListener("dblclick", () => zoom(null));
  });
  const act = { whole: () => zoom(null), finish: () => zoom(finish()) };
  document.querySelectorAll("[data-zoom]").forEach((button) => button.addEventListener("click", act[button.dataset.zoom]));

  // --- the other charts: words of the mark under the pointer --------------------------------------------------------
  document.querySelectorAll("svg:not([data-plot])").forEach((svg) => {
    svg.addEventListener("pointermove", (event) => {
      const text = worded(event.target);
      if (text) say(text, event.clientX, event.clientY); else hush();
    });
    svg.addEventListener("pointerleave", hush);
  });
  addEventListener("scroll", hush, { passive: true });

  // --- copy ---------------------------------------------------------------------------------------------------------
  document.querySelectorAll("[data-copy]").forEach((button) => button.addEventListener("click", () => {
    const range = document.createRange();
    range.selectNodeContents(document.getElementById(button.dataset.copy));
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
  }));
})();
