// Every rank's phases, memory and pushed weights in one step: three figures whose numbers change with the step.
"use strict";
(async () => {
  const holder = document.getElementById("times");
  if (!holder) return;
  const runs = (await unpack("times-packed")).filter((one) => one.moments.length);
  const [runSelect, momentSelect] = ["time-run", "time-moment"].map((id) => document.getElementById(id));

  function figureOf(title, axis, tooltips, glyphs, wide = false) {
    const { shown, place, setKeys } = frame(title, "", "", wide);
    holder.append(shown);
    return { title, axis, tooltips, glyphs, place, setKeys, sources: null };
  }
  const figures = [
    figureOf("phases of every rank", "seconds", [["rank", "@rank"], ["", "@name"], ["seconds", "@seconds{0.0000}"]],
      (figure, [source]) => figure.hbar({ field: "rank" }, 0.8, { field: "right" }, { field: "left" },
        { source, fill_color: { field: "shade" }, line_color: null }), true),
    figureOf("memory of every rank at the end of a phase", "GiB", [["rank", "@rank"], ["", "@name"], ["GiB", "@value{0.000}"]],
      (figure, [source]) => figure.scatter({ field: "value" }, { field: "rank" },
        { source, size: 10, fill_color: { field: "shade" }, line_color: { field: "shade" } })),
    figureOf("weight pushes of every rank: received and sent", "MiB",
      [["rank", "@rank"], ["", "@name"], ["MiB", "@value{0.000}"], ["seconds", "@seconds{0.0000}"]],
      (figure, [source]) => figure.hbar({ field: "place" }, 0.35, { field: "value" }, 0,
        { source, fill_color: { field: "shade" }, line_color: null })),
  ];

  /** Columns of the three figures for a moment. */
  function columns(moment) {
    const shades = (rows) => rows.map(([, name]) => colourOf(name));
    const push = moment.push.flatMap(([rank, received, sent, seconds]) =>
      [[rank, "received", received, seconds, 0.2], [rank, "sent", sent, seconds, -0.2]]);
    return [
      { rank: moment.bars.map((b) => b[0]), name: moment.bars.map((b) => b[1]), left: moment.bars.map((b) => b[2]),
        right: moment.bars.map((b) => b[3]), seconds: moment.bars.map((b) => b[3] - b[2]), shade: shades(moment.bars) },
      { rank: moment.memory.map((m) => m[0]), name: moment.memory.map((m) => m[1]), value: moment.memory.map((m) => m[2]),
        shade: shades(moment.memory) },
      { rank: push.map((p) => p[0]), name: push.map((p) => p[1]), value: push.map((p) => p[2]), seconds: push.map((p) => p[3]),
        place: push.map((p) => [p[0], p[4]]), shade: push.map((p) => colour(p[1] === "sent" ? 1 : 0)) },
    ];
  }
  /** What a moment says in words. */
  function words(moment) {
    const by = {};
    for (const [rank, name, left, right] of moment.bars) ((by[name] ??= {})[rank] ??= 0, by[name][rank] += right - left);
    const spread = Object.entries(by).map(([name, ranks]) =>
      `${name} ${Math.min(...Object.values(ranks)).toFixed(3)} to ${Math.max(...Object.values(ranks)).toFixed(3)} s`);
    const held = moment.memory.map((m) => m[2]), moved = moment.push.map((p) => p[1]);
    return [spread.join(", "), held.length ? `up to ${Math.max(...held).toFixed(2)} GiB` : "not recorded",
      moved.length ? `${moved.reduce((a, b) => a + b, 0).toFixed(2)} MiB received in all` : "not recorded"];
  }
  function show() {
    const run = runs[runSelect.selectedIndex], moment = run.moments[momentSelect.selectedIndex];
    const data = columns(moment), said = words(moment), factors = [...moment.ranks].reverse();
    figures.forEach((one, number) => {
      one.place.setAttribute("aria-label", `${one.title}, ${moment.label}: ${said[number]}`);
      const names = [...new Set(data[number].name)];
      one.setKeys(names.map((name) => [name, data[number].shade[data[number].name.indexOf(name)]]));
      if (!one.figure) {
        one.place.style.height = `${Math.max(160, 70 + 26 * factors.length)}px`;
        one.source = new Bokeh.ColumnDataSource({ data: data[number] });
        one.figure = newFigure({ y_range: new Bokeh.FactorRange({ factors }), x_axis_label: one.axis, y_axis_label: "rank",
          height: Math.max(160, 70 + 26 * factors.length) }, one.tooltips);
        one.glyphs(one.figure, [one.source]);
        Plotting.show(one.figure, one.place);
      } else {
        one.figure.y_range.factors = factors;
        one.source.data = data[number];
      }
    });
    document.getElementById("time-before").disabled = momentSelect.selectedIndex === 0;
    document.getElementById("time-after").disabled = momentSelect.selectedIndex === run.moments.length - 1;
  }
  function fill() {
    const run = runs[runSelect.selectedIndex];
    momentSelect.replaceChildren(...run.moments.map((one) => element("option", {}, one.label)));
    const steps = run.moments.map((one) => one.label.startsWith("step"));
    momentSelect.selectedIndex = Math.max(0, steps.lastIndexOf(true));
    show();
  }
  const turn = (by) => { momentSelect.selectedIndex += by; show(); };
  runSelect.replaceChildren(...runs.map((one) => element("option", {}, given.runs[one.run])));
  runSelect.addEventListener("change", fill);
  momentSelect.addEventListener("change", show);
  document.getElementById("time-before").addEventListener("click", () => turn(-1));
  document.getElementById("time-after").addEventListener("click", () => turn(1));
  holder.draw = fill;
  drawn.observe(holder);
})();
