"""The look of report.html, and the script that shows values under the pointer. No address of any kind in here."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #ffffff; --ink: #1c1d1f; --soft: #6a6d73; --rule: #e3e3df;
  --c0: #2458c6; --c1: #c2570c; --c2: #2f7d4f; }
@media (prefers-color-scheme: dark) { :root { --page: #141517; --card: #1d1f22; --ink: #e9e9e6; --soft: #9a9da3;
  --rule: #303338; --c0: #7ba4f7; --c1: #f0a060; --c2: #76c493; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 20px 60px; max-width: 1240px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 24px; margin: 0; }
h2 { font-size: 17px; margin: 36px 0 12px; }
.sub { color: var(--soft); margin: 2px 0 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 10px; margin-bottom: 14px; }
.tile, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.tile { padding: 10px 14px; }
.tile b { display: block; font-size: 18px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 14px; }
.card { padding: 12px 14px 8px; position: relative; min-width: 0; }
.card h3 { font-size: 14px; margin: 0 0 4px; font-weight: 600; }
.card h3 small { color: var(--soft); font-weight: 400; }
.key { float: right; font-size: 12px; color: var(--soft); }
.key i { display: inline-block; width: 14px; height: 3px; margin: 0 5px 3px 12px; border-radius: 2px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .y { text-anchor: end; } svg .x, svg .empty { text-anchor: middle; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--soft); stroke-opacity: .5; }
svg .cursor { stroke: var(--soft); stroke-dasharray: 3 3; visibility: hidden; }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg polyline.faint { stroke-width: 1; stroke-opacity: .35; }
polyline.s0 { stroke: var(--c0); } polyline.s1 { stroke: var(--c1); } polyline.s2 { stroke: var(--c2); }
circle.s0 { fill: var(--c0); } circle.s1 { fill: var(--c1); } circle.s2 { fill: var(--c2); }
.b0 { background: var(--c0); } .b1 { background: var(--c1); } .b2 { background: var(--c2); }
.tip { position: absolute; pointer-events: none; visibility: hidden; z-index: 2; padding: 5px 9px; font-size: 12px;
  background: var(--ink); color: var(--page); border-radius: 6px; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
td { border-top: 1px solid var(--rule); padding: 5px 12px 5px 0; vertical-align: top; overflow-wrap: anywhere;
  white-space: pre-line; }
tr:first-child td { border-top: 0; }
td:first-child { color: var(--soft); white-space: nowrap; width: 1%; padding-right: 24px; }
pre { margin: 0; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
details summary { cursor: pointer; font-size: 17px; font-weight: 600; margin: 30px 0 12px; }
@media print { details { display: block; } }
"""

SCRIPT = """
"use strict";
function short(value) {
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e15)) return value.toExponential(3);
  return value.toLocaleString("en", { maximumSignificantDigits: 5 });
}
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}
const charts = JSON.parse(document.getElementById("charts").textContent);
document.querySelectorAll(".card[data-chart]").forEach(card => {
  const chart = charts[card.dataset.chart], svg = card.querySelector("svg"), tip = card.querySelector(".tip");
  const cursor = svg.querySelector(".cursor");
  if (!cursor || !chart.series) return;
  const hide = () => { cursor.style.visibility = tip.style.visibility = "hidden"; };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), scale = chart.width / box.width;
    const share = ((event.clientX - box.left) * scale - chart.left) / (chart.right - chart.left);
    if (share < -0.03 || share > 1.03) return hide();
    const first = chart.series[0], step = first.x[nearest(first.x, chart.low + share * (chart.high - chart.low))];
    const place = chart.left + (chart.high > chart.low ? (step - chart.low) / (chart.high - chart.low) : 0.5)
      * (chart.right - chart.left);
    cursor.setAttribute("x1", place); cursor.setAttribute("x2", place); cursor.style.visibility = "visible";
    tip.replaceChildren();
    const line = text => { const row = document.createElement("div"); row.textContent = text; tip.append(row); };
    line("step " + step.toLocaleString("en"));
    chart.series.forEach(series => {
      const index = nearest(series.x, step), at = series.x[index];
      const value = series.y[index] === null ? "not a number" : short(series.y[index]) + chart.unit;
      line(series.name + " " + value + (at === step ? "" : " (step " + at.toLocaleString("en") + ")"));
    });
    tip.style.visibility = "visible";
    const right = event.clientX - box.left > box.width / 2;
    const offset = place / scale + (box.left - card.getBoundingClientRect().left);
    tip.style.left = (right ? offset - tip.offsetWidth - 10 : offset + 10) + "px";
    tip.style.top = "44px";
  });
});
"""
