// Draws the charts by BokehJS, each when it comes into view.
"use strict";
const { Plotting } = Bokeh;

/** Colours of a figure by those of the page. */
function paint(figure) {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  figure.background_fill_color = of("--back");
  figure.border_fill_color = of("--back");
  figure.outline_line_color = of("--line");
  for (const axis of [...figure.left, ...figure.below]) {
    axis.major_label_text_color = of("--muted");
    axis.axis_label_text_color = of("--muted");
    axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = of("--line");
  }
  for (const grid of figure.center) if ("grid_line_color" in grid) grid.grid_line_color = of("--line");
}

/** A figure with the settings that all have. */
function newFigure(settings, tooltips) {
  const figure = Plotting.figure({
    height: 230, sizing_mode: "stretch_width", tools: "pan,box_zoom,reset,save", toolbar_location: "right",
    min_border_left: 50, ...settings,
  });
  figure.toolbar.autohide = true;
  figure.toolbar.logo = null;
  if (tooltips) figure.add_tools(new Bokeh.HoverTool({ tooltips }));
  paint(figure);
  themed.push(() => paint(figure));
  return figure;
}

function drawLines(chart) {
  const figure = newFigure({ x_axis_label: "step" }, [["", "@name"], ["step", "@x"], ["value", "@y{0.[000000]}"]]);
  const byRun = chart.series.length === new Set(chart.series.map((one) => one.run)).size;
  // Of several lines of a run the colour says which, and the dashes say of which run.
  const keyOf = (one) => one.name.replace(`${given.runs[one.run]} · `, "");
  const names = [...new Set(chart.series.map(keyOf))];
  const shadeOf = (one) => colour(byRun ? one.run : names.indexOf(keyOf(one)));
  for (const one of chart.series) {
    const y = one.y.map((value) => value ?? NaN);
    const source = new Bokeh.ColumnDataSource({ data: { x: one.x, y, name: one.x.map(() => one.name) } });
    const shade = shadeOf(one), dash = dashOf(one.run);
    figure.line({ field: "x" }, { field: "y" }, { source, line_color: shade, line_width: 2, line_dash: dash });
    if (one.x.length < 15) figure.scatter({ field: "x" }, { field: "y" }, { source, size: 5, fill_color: shade, line_color: shade });
  }
  const keys = chart.series.length > 1 && !(byRun && given.runs.length > 1);
  return [figure, keys ? chart.series.map((one) => [one.name, shadeOf(one), dashOf(one.run)]) : []];
}

function drawBars(chart) {
  const figure = newFigure({ x_axis_label: "step" }, [["", "@name"], ["step", "@x"], ["seconds", "@height{0.000}"]]);
  const half = chart.width / 2;
  chart.series.forEach((one) => {
    const data = {
      x: one.x, left: one.x.map((x) => x - half), right: one.x.map((x) => x + half), bottom: one.low, top: one.y,
      height: one.y.map((top, place) => top - one.low[place]), name: one.x.map(() => one.name),
    };
    const source = new Bokeh.ColumnDataSource({ data });
    figure.quad({ field: "left" }, { field: "right" }, { field: "bottom" }, { field: "top" },
      { source, fill_color: colourOf(one.name), line_color: null });
  });
  return [figure, chart.series.map((one) => [one.name, colourOf(one.name)])];
}

/** A figure's place in the page, with its title, its text for those who do not see it, and the keys of its colours. */
function frame(title, note, said, wide = false) {
  const place = element("div", { className: "chart", role: "img" });
  place.setAttribute("aria-label", `${title}. ${said}`);
  const caption = element("figcaption", {}, title);
  if (note) caption.append(element("span", { className: "muted" }, ` (${note})`));
  const list = element("ul", { className: "keys" });
  const shown = element("figure", { className: wide ? "wide" : "" }, caption, place, list);
  return { shown, place, setKeys(pairs) {
    list.replaceChildren(...pairs.map(([name, shade, dash]) => element("li", {}, chipOf(shade, dash), name)));
  } };
}

const drawn = new IntersectionObserver((seen) => {
  for (const one of seen) {
    if (!one.isIntersecting) continue;
    drawn.unobserve(one.target);
    one.target.draw();
  }
}, { rootMargin: "300px" });

for (const chart of given.charts) {
  const holder = document.querySelector(`.charts[data-section="${CSS.escape(chart.section)}"]`);
  const { shown, place, setKeys } = frame(chart.title, chart.note, chart.said);
  place.draw = () => {
    const [figure, keys] = (chart.kind === "bars" ? drawBars : drawLines)(chart);
    setKeys(keys);
    Plotting.show(figure, place);
  };
  holder.append(shown);
  drawn.observe(place);
}
if (!given.charts.some((chart) => chart.section === "Other numbers")) document.getElementById("others").hidden = true;
