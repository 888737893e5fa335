"use strict";
// What the scripts of all reports share: figures in the colours of the page's theme, and heatmaps.
const figures = JSON.parse(document.getElementById("figures").textContent);
const palette = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9"];
const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

let paper = null; // the width of the page while it is printed, in pixels

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const short = (text, limit) => (text.length > limit ? "…" + text.slice(1 - limit) : text);
const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const fixed = (value) => (value === null ? "none" : value.toFixed(3));

function layout(height, extra) {
  const axis = { gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true };
  const base = {
    height, ...(paper ? { width: paper } : { autosize: true }), margin: { l: 60, r: 10, t: 30, b: 60 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: css("--ink"), family: "system-ui, sans-serif", size: 12 }, xaxis: { ...axis }, yaxis: { ...axis },
    hoverlabel: { align: "left" }, modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--ink") },
  };
  for (const [key, value] of Object.entries(extra)) {
    base[key] = key === "xaxis" || key === "yaxis" ? { ...axis, ...value } : value;
  }
  return base;
}

// As many names as there is room for, of the layers between two positions.
function ticks(names, from, to, pixels) {
  const first = Math.max(0, Math.ceil(from)), last = Math.min(names.length - 1, Math.floor(to));
  const step = Math.max(1, Math.ceil((last - first + 1) * 13 / pixels));
  const at = [];
  for (let position = first; position <= last; position += step) at.push(position);
  return { tickvals: at, ticktext: at.map((position) => escaped(short(names[position], 26))) };
}

function modelOf(axis) {
  return axis.models.flatMap((model, index) => Array(axis.counts[index]).fill(model));
}

// The boundaries between models, and a tick in the middle of each.
function boundaries(axis) {
  let end = 0;
  const lines = [], middles = [];
  for (const count of axis.counts) {
    middles.push(end + count / 2 - 0.5);
    end += count;
    lines.push(end - 0.5);
  }
  return { lines: lines.slice(0, -1), middles };
}

// Of `data.marks`, which may be missing, each is a cell [column, row] to be framed.
function drawHeatmap(element, data, label, range, wide, colorscale = "Viridis", reversescale = false) {
  const several = data.rows.models.length > 1 || data.cols.models.length > 1;
  const names = { x: data.cols.names, y: data.rows.names };
  const xModels = modelOf(data.cols), yModels = modelOf(data.rows);
  const text = data.values.map((row, y) => row.map((value, x) => {
    if (value === null) return "no value";
    const error = data.errors[y][x];
    return `<b>${value.toFixed(3)}</b>${error === null ? "" : " ± " + error.toFixed(3)}<br>` +
      `${escaped(yModels[y])} <b>${escaped(names.y[y])}</b><br>${escaped(xModels[x])} <b>${escaped(names.x[x])}</b>` +
      (data.control ? `<br>control ${fixed(data.control[y][x])}` : "") + (data.p ? `<br>p = ${fixed(data.p[y][x])}, of this pair by itself` : "");
  }));
  const width = paper || element.clientWidth || 500;
  const height = wide ? Math.min(width, 900) : Math.min(width * 0.9, 520);
  const trace = {
    type: "heatmap", z: data.values, text, hoverinfo: "text", colorscale, reversescale, zmin: range[0], zmax: range[1],
    hoverongaps: false, colorbar: { title: { text: label, side: "right" }, thickness: 12, outlinewidth: 0 },
  };
  const extra = {
    plot_bgcolor: css("--gap"),
    xaxis: { title: { text: several ? "" : escaped(short(data.cols.models[0], 50)), standoff: 12 }, tickangle: -90, showgrid: false },
    yaxis: { title: { text: several ? "" : escaped(short(data.rows.models[0], 50)), standoff: 12 }, showgrid: false },
  };
  if (several) {
    const x = boundaries(data.cols), y = boundaries(data.rows);
    const line = { color: "white", width: 1.5 };
    Object.assign(extra.xaxis, { tickvals: x.middles, ticktext: data.cols.models.map((m) => escaped(short(m, 26))), tickangle: -45 });
    Object.assign(extra.yaxis, { tickvals: y.middles, ticktext: data.rows.models.map((m) => escaped(short(m, 26))) });
    extra.shapes = [
      ...x.lines.map((at) => ({ type: "line", x0: at, x1: at, yref: "paper", y0: 0, y1: 1, line })),
      ...y.lines.map((at) => ({ type: "line", y0: at, y1: at, xref: "paper", x0: 0, x1: 1, line })),
    ];
  } else {
    Object.assign(extra.xaxis, ticks(names.x, 0, names.x.length, width - 180));
    Object.assign(extra.yaxis, ticks(names.y, 0, names.y.length, height - 220));
  }
  const frame = (at, line) => ({ type: "rect", x0: at[0] - 0.5, x1: at[0] + 0.5, y0: at[1] - 0.5, y1: at[1] + 0.5, line });
  extra.shapes = [
    ...(extra.shapes ?? []),
    ...(data.marks ?? []).flatMap((at) => [frame(at, { color: "black", width: 4 }), frame(at, { color: "white", width: 2 })]),
  ];
  element.names = several ? null : names;
  Plotly.react(element, [trace], layout(height, extra), config).then(() => {
    if (element.dataset.zooms) return;
    element.dataset.zooms = "yes";
    element.on("plotly_relayout", (change) => {
      if (element.names && Object.keys(change).some((key) => /axis\.(auto)?range/.test(key))) nameAgain(element);
    });
  });
}

// After a zoom there is room for other names.
function nameAgain(element) {
  const update = {};
  for (const axis of ["x", "y"]) {
    const drawn = element._fullLayout[axis + "axis"];
    const found = ticks(element.names[axis], ...drawn.range, drawn._length);
    update[axis + "axis.tickvals"] = found.tickvals;
    update[axis + "axis.ticktext"] = found.ticktext;
  }
  Plotly.relayout(element, update);
}

// Draw now, and when the theme changes or the page is printed.
function drawAgainFor(draw) {
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("beforeprint", () => { paper = 660; draw(); });
  addEventListener("afterprint", () => { paper = null; draw(); });
}
