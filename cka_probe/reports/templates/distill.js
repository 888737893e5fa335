"use strict";
// Draws the curves of a training, and the similarity of student and teacher at its moments.
const { curves } = figures;
const diverging = [[0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1, "#b2182b"]];

function drawCurves(element, lines, title, axis, teacher, hovertemplate = "%{y:.4g}") {
  const few = curves.epochs.length < 3;
  const traces = Object.entries(lines).map(([name, values], index) => ({
    name: escaped(name), x: curves.epochs, y: values, mode: few ? "lines+markers" : "lines",
    line: { color: palette[index % palette.length] }, hovertemplate,
  }));
  const shapes = teacher === undefined || teacher === null ? [] : [{
    type: "line", xref: "paper", x0: 0, x1: 1, y0: teacher, y1: teacher, line: { color: css("--soft"), dash: "dash", width: 1.5 },
    label: { text: "teacher", textposition: "start", yanchor: "bottom", font: { color: css("--soft"), size: 11 } },
  }];
  Plotly.react(element, traces, layout(320, {
    title: { text: title, font: { size: 14 }, x: 0.02 }, shapes, margin: { l: 60, r: 10, t: 40, b: 50 },
    xaxis: { title: { text: "epoch" }, tickformat: "d", ...(curves.epochs.length <= 10 ? { dtick: 1 } : {}) }, yaxis: { exponentformat: "power", ...axis },
    showlegend: traces.length > 1, legend: { orientation: "h", y: -0.25 }, hovermode: "x unified",
  }), config);
}

// A place for a heatmap, under its title.
function place(grid, title) {
  const box = document.createElement("div"), heading = document.createElement("h3"), element = document.createElement("div");
  heading.textContent = title;
  box.append(heading, element);
  grid.append(box);
  return element;
}

function draw() {
  if (curves.epochs.length) {
    drawCurves(document.getElementById("loss"), curves.loss, "Parts of the loss", { rangemode: "tozero" });
    drawCurves(document.getElementById("accuracy"), curves.accuracy, "Accuracy", { tickformat: ".0%" }, curves.teacher, "%{y:.2%}");
    drawCurves(document.getElementById("lr"), curves.lr, "Learning rate", { rangemode: "tozero" });
    drawCurves(document.getElementById("speed"), curves.speed, "Images a second", { rangemode: "tozero" });
  }
  figures.heatmaps.forEach((data, index) => drawHeatmap(places[index], data, figures.label, [0, 1], false));
  const change = figures.change;
  if (change) drawHeatmap(places.at(-1), change, `Δ ${figures.label}`, [-change.reach, change.reach], false, diverging);
}

// All places before the first figure: one alone would take the whole width.
const grid = document.getElementById("heatmaps");
const drawn = figures.change ? [...figures.heatmaps, figures.change] : figures.heatmaps;
const places = drawn.map((data) => place(grid, data.title));
drawAgainFor(draw);
