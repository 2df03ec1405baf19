"use strict";
// Adds to a page that is complete without it: tooltips, dimming of the other arms, a copy button.
// Every text is set by textContent; nothing is fetched; no inline style text is written.
(() => {
  document.documentElement.classList.add("live");

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

  // The SVG titles are the tooltips without a script; with it they would show twice.
  const words = new Map();
  document.querySelectorAll("svg title").forEach((title) => {
    words.set(title.parentNode, title.textContent);
    title.parentNode.setAttribute("aria-label", title.textContent);
    title.remove();
  });
  const above = (node, has) => {
    for (let at = node; at && at.nodeName.toLowerCase() !== "svg"; at = at.parentNode) if (has(at)) return at;
    return null;
  };

  // The arm under the pointer stays, the others fade.
  const single = (svg, arm) => svg.querySelectorAll("[data-arm]").forEach((node) => {
    node.classList.toggle("faded", arm !== null && node.dataset.arm !== arm);
  });
  const leave = (svg) => { tip.hidden = true; single(svg, null); };
  document.querySelectorAll("svg").forEach((svg) => {
    const enter = (event) => {
      const worded = above(event.target, (node) => words.has(node));
      if (worded) say(words.get(worded), event.clientX, event.clientY); else tip.hidden = true;
      const arm = above(event.target, (node) => node.dataset && node.dataset.arm !== undefined);
      single(svg, arm ? arm.dataset.arm : null);
    };
    svg.addEventListener("pointermove", enter);
    svg.addEventListener("pointerdown", enter);
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") leave(svg); });
  });
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest("svg")) document.querySelectorAll("svg").forEach(leave);
  });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  document.querySelectorAll("[data-copy]").forEach((button) => button.addEventListener("click", () => {
    const range = document.createRange();
    range.selectNodeContents(document.getElementById(button.dataset.copy));
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
  }));
})();
