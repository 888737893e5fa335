"use strict";
// Draws the figures of the measure that is chosen.
const views = JSON.parse(document.getElementById("views").textContent);
const measure = document.getElementById("measure");
const colours = document.getElementById("colours");
const pair = document.getElementById("pair");
const isDistance = (figure) => figure.kind === "distance";
const hasValue = (heatmap) => heatmap.values.flat().some((value) => value !== null); // two networks have no distance
let distance = false; // whether the measure is one: its brightest colour is then that of 0

function drawProfile(element, figure) {
  const traces = [];
  figure.profiles.forEach((profile, index) => {
    const color = palette[index % palette.length];
    const column = (cells, part) => cells.map((cell) => cell[part]);
    const hover = (cells) => cells.map((cell) =>
      `<b>${fixed(cell[1])}</b>${cell[2] === null ? "" : " ± " + fixed(cell[2])}<br>${escaped(cell[3])}`);
    const group = { legendgroup: String(index), line: { color }, marker: { color }, hoverinfo: "text" };
    traces.push({
      ...group, name: escaped(profile.name), x: column(profile.matched, 0), y: column(profile.matched, 1),
      text: hover(profile.matched), mode: "lines+markers",
      error_y: { type: "data", array: profile.matched.map((cell) => 2 * (cell[2] ?? 0)), color, thickness: 1, width: 2 },
    });
    traces.push({
      ...group, showlegend: false, x: column(profile.best, 0), y: column(profile.best, 1), text: hover(profile.best),
      mode: "lines", line: { color, dash: "dot" },
    });
  });
  const shapes = figure.band[0] === null ? [] : [{
    type: "rect", xref: "paper", x0: 0, x1: 1, y0: figure.band[0], y1: figure.band[1], fillcolor: "gray", opacity: 0.25, line: { width: 0 },
  }];
  Plotly.react(element, traces, layout(420, {
    shapes, xaxis: { title: { text: "relative depth (of the deeper model)" }, range: [0, 1.03] }, yaxis: { title: { text: figure.label }, rangemode: "tozero" },
    legend: { orientation: "h", y: -0.2 }, hovermode: "closest",
  }), config);
}

// A place in the grid for each item, as many as there are now.
function drawPanels(grid, items, drawOne) {
  while (grid.children.length < items.length) grid.append(document.createElement("div"));
  [...grid.children].forEach((element, index) => { element.hidden = index >= items.length; });
  items.forEach((item, index) => drawOne(grid.children[index], item, items.length));
}

// One panel a measure, of the pair of models that is chosen; each on its own scale, as their units differ.
function drawBeside(grid) {
  const number = pair ? pair.value : grid.dataset.first;
  for (const element of document.querySelectorAll(".of-pair")) element.hidden = element.dataset.pair !== String(number);
  drawPanels(grid, Object.values(figures).filter((figure) => hasValue(figure.heatmaps[number])), (element, figure) => {
    const data = figure.heatmaps[number];
    const values = data.values.flat().filter((value) => value !== null);
    const range = isDistance(figure) ? [Math.min(0, ...values), Math.max(...values)] : [Math.min(...values), Math.max(...values)];
    drawHeatmap(element, data, figure.label, range, false, "Viridis", isDistance(figure));
  });
}

// How like itself each layer is in two views: similarities above, distances below, each over its own largest.
function drawLayers(element, view) {
  const keys = Object.keys(figures);
  const distances = keys.filter((key) => isDistance(figures[key])), similarities = keys.filter((key) => !isDistance(figures[key]));
  const both = distances.length > 0 && similarities.length > 0;
  const names = view.rows.map((row) => escaped(short(row.layer, 26)));
  const traces = keys.map((key, index) => {
    const cells = view.rows.map((row) => row.cells[key]);
    const scale = isDistance(figures[key]) ? Math.max(...cells.map((cell) => Math.abs(cell[0] ?? 0))) || 1 : 1;
    const color = palette[index % palette.length];
    return {
      x: names, y: cells.map((cell) => (cell[0] === null ? null : cell[0] / scale)), name: escaped(figures[key].label),
      error_y: { type: "data", array: cells.map((cell) => 2 * (cell[1] ?? 0) / scale), color, thickness: 1, width: 2 },
      text: cells.map((cell, row) => `<b>${fixed(cell[0])}</b>${cell[1] === null ? "" : " ± " + fixed(cell[1])}<br>${names[row]}`),
      hoverinfo: "text+name", mode: "lines+markers", line: { color }, marker: { color },
      yaxis: both && isDistance(figures[key]) ? "y2" : "y",
    };
  });
  const axis = { gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true, rangemode: "tozero" };
  const extra = {
    xaxis: { type: "category", tickangle: -90, anchor: both ? "y2" : "y" }, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
    yaxis: { title: { text: similarities.length ? "similarity" : "distance / its largest" }, rangemode: "tozero", domain: both ? [0.54, 1] : [0, 1] },
    hovermode: "closest",
  };
  if (both) extra.yaxis2 = { ...axis, title: { text: "distance / its largest" }, domain: [0, 0.46] };
  Plotly.react(element, traces, layout(both ? 620 : 420, extra), config);
}

function drawModels(element, models, label, range) {
  const names = models.names.map((name) => escaped(short(name, 26)));
  const trace = {
    type: "heatmap", x: names, y: names, z: models.values, zmin: range[0], zmax: range[1], colorscale: "Viridis", reversescale: distance,
    texttemplate: names.length > 12 ? "" : "%{z:.2f}", hovertemplate: "%{y}<br>%{x}<br><b>%{z:.3f}</b><extra></extra>",
    colorbar: { title: { text: label, side: "right" }, thickness: 12, outlinewidth: 0 },
  };
  Plotly.react(element, [trace], layout(440, { plot_bgcolor: css("--gap"), xaxis: { type: "category" }, yaxis: { type: "category" } }), config);
}

function drawTree(element, tree) {
  const traces = tree.x.map((x, index) => ({
    x: tree.y[index], y: x, mode: "lines", line: { color: css("--accent"), width: 2 }, hoverinfo: "x", showlegend: false,
  }));
  Plotly.react(element, traces, layout(440, {
    xaxis: { title: { text: distance ? "mean distance" : "1 − mean similarity" }, rangemode: "tozero" },
    yaxis: { tickvals: tree.names.map((_, index) => 5 + 10 * index), ticktext: tree.names.map((name) => escaped(short(name, 26))), showgrid: false },
  }), config);
}

function drawCurve(element, curve, label) {
  const traces = curve.lines.map((line, index) => ({
    x: curve.examples, y: line.values, name: escaped(line.name), mode: "lines+markers",
    line: { color: palette[index % palette.length] }, hovertemplate: "%{x} images: <b>%{y:.3f}</b><extra></extra>",
  }));
  Plotly.react(element, traces, layout(360, {
    xaxis: { type: "log", tickvals: curve.examples, ticktext: curve.examples.map((n) => n.toLocaleString("en")), title: { text: "images" } },
    yaxis: { title: { text: label } }, legend: { orientation: "h", y: -0.25 }, showlegend: true, hovermode: "closest",
  }), config);
}

function draw() {
  const key = measure ? measure.value : Object.keys(figures)[0];
  const figure = figures[key];
  distance = figure.kind === "distance";
  const range = colours.value === "data" ? figure.range : distance ? [0, figure.range[1]] : [0, 1];
  for (const element of document.querySelectorAll(".of-measure")) element.hidden = element.dataset.measure !== key;
  drawPanels(document.getElementById("heatmaps"), figure.heatmaps.filter(hasValue),
    (element, data, drawn) => drawHeatmap(element, data, figure.label, range, drawn === 1, "Viridis", distance));
  drawProfile(document.getElementById("profile"), figure);
  const curve = document.getElementById("curve");
  if (curve) drawCurve(curve, figure.curve, figure.label);
  const beside = document.getElementById("beside");
  if (beside) drawBeside(beside);
  for (const element of document.querySelectorAll(".two-views")) drawLayers(element, views[element.dataset.view]);
  if (figure.atlas) {
    drawHeatmap(document.getElementById("atlas"), figure.atlas, figure.label, range, true, "Viridis", distance);
    drawModels(document.getElementById("models"), figure.models, figure.label, range);
    const tree = document.getElementById("tree");
    tree.hidden = !figure.tree; // models without a value between them make none
    if (figure.tree) drawTree(tree, figure.tree);
  }
}

drawAgainFor(draw);
for (const control of [measure, colours, pair]) control?.addEventListener("change", draw);
