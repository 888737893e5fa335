"use strict";
// Shows the figures that Python made: those of the chosen measure and pair, in the colours of the page's theme.
const figures = JSON.parse(document.getElementById("figures").textContent);
const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
const [measure, colours, pair] = ["measure", "colours", "pair"].map((id) => document.getElementById(id));
let paper = null; // the width of the page while it is printed, in pixels

function theme() {
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = { gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true };
  const clear = "rgba(0,0,0,0)";
  return { layout: {
    paper_bgcolor: clear, plot_bgcolor: clear, font: { color: css("--ink"), family: "system-ui, sans-serif", size: 12 },
    xaxis: axis, yaxis: axis, hoverlabel: { align: "left" },
    modebar: { bgcolor: clear, color: css("--soft"), activecolor: css("--ink") },
  } };
}

function show(element, figure, range) {
  const { data, layout } = structuredClone(figure); // plotly writes into them
  const { aspect, label, names, ranges } = layout.meta ?? {};
  if (aspect) layout.height = Math.min((paper || element.clientWidth || 500) * aspect, layout.height);
  if (paper) layout.width = paper;
  if (ranges) [layout.coloraxis.cmin, layout.coloraxis.cmax] = ranges[range] ?? ranges.fixed;
  if (names) data[0].text = names[0].map((row) => names[1].map((column) => `${row}<br>${column}`));
  layout.template = theme();
  element.setAttribute("role", "figure");
  element.setAttribute("aria-label", label ?? element.closest("section").querySelector("h2").textContent);
  Plotly.react(element, data, layout, config);
}

// The figures of a place: [figure or null, ...], of one measure or, panel by panel, of every one.
function figuresOf(place, key) {
  const { figure, panel } = place.dataset;
  const of = (one) => figures[one]?.[figure] ?? figures[""][figure] ?? [];
  if ("everyMeasure" in place.dataset) {
    return Object.keys(figures).filter(Boolean).map((one) => of(one)[pair ? pair.value : panel]);
  }
  return panel === undefined ? of(key) : [of(key)[panel]];
}

function draw() {
  const key = measure ? measure.value : Object.keys(figures).find(Boolean);
  for (const element of document.querySelectorAll(".of-measure")) element.hidden = element.dataset.measure !== key;
  for (const element of document.querySelectorAll(".of-pair")) element.hidden = pair && element.dataset.pair !== pair.value;
  // All places before the first figure: one alone would take the whole width.
  const drawn = [...document.querySelectorAll("[data-figure]")].flatMap((place) => {
    const found = figuresOf(place, key).filter(Boolean);
    while (place.children.length < found.length) place.append(document.createElement("div"));
    [...place.children].forEach((element, index) => { element.hidden = index >= found.length; });
    place.closest("section").hidden = !found.length;
    const range = "everyMeasure" in place.dataset ? "panel" : colours?.value;
    return found.map((figure, index) => [place.children[index], figure, range]);
  });
  for (const one of drawn) show(...one);
}

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("beforeprint", () => { paper = 660; draw(); });
addEventListener("afterprint", () => { paper = null; draw(); });
for (const control of [measure, colours, pair]) control?.addEventListener("change", draw);
