"use strict";
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const NAMED_ROWS = 48; // above this, names no longer fit beside the bars and live in the hover label

  // Plotly reads <b>, <a href> and entities in every label: names from the model are shown as they are.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const wrap = (text, width) => (String(text).match(new RegExp(`[^]{1,${width}}`, "gu")) || []).map(plain).join("<br>");
  const words = (text, width) => {
    const lines = [""];
    for (const word of String(text).split(/\s+/)) {
      const last = lines.length - 1;
      if (lines[last] && lines[last].length + word.length >= width) lines.push(word);
      else lines[last] = lines[last] ? `${lines[last]} ${word}` : word;
    }
    return lines.map((line) => wrap(line, 40)).join("<br>");
  };
  const shorten = (text, width) => {
    const letters = Array.from(String(text));
    const half = Math.floor((width - 1) / 2);
    return plain(letters.length <= width ? text : [...letters.slice(0, half), "…", ...letters.slice(-half)].join(""));
  };
  const known = (value) => typeof value === "number";
  const percent = (share) => (known(share) ? 100 * share : null);

  const paint = () => {
    const style = getComputedStyle(document.documentElement);
    return (name) => style.getPropertyValue(`--${name}`).trim();
  };

  const draw = (id, make) => {
    const box = document.getElementById(id);
    if (!box) return;
    const color = paint();
    const { traces, layout } = make(color, box.clientWidth < 520);
    const axis = { automargin: true, gridcolor: color("line"), linecolor: color("line"), zeroline: false, fixedrange: true, tickfont: { color: color("muted") } };
    const whole = {
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("muted") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false, height: 280,
      margin: { l: 8, r: 12, t: 12, b: 8 },
      hoverlabel: { bgcolor: color("surface"), bordercolor: color("line"), font: { color: color("text"), size: 13 }, align: "left" },
      ...layout,
      xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
    };
    Plotly.react(box, traces, whole, { displayModeBar: false, responsive: true, doubleClick: "reset" });
  };

  const steps = (color, narrow) => ({
    traces: [{
      x: facts.steps.map((_, i) => i), y: facts.steps.map((s) => percent(s.accuracy)), mode: "lines+markers+text", cliponaxis: false,
      line: { color: color("accent"), width: 2 }, marker: { size: 9, color: color("accent") },
      text: facts.steps.map((s) => (known(s.accuracy) ? `${percent(s.accuracy).toFixed(2)}%` : "")), textposition: "top center",
      textfont: { color: color("text"), size: 13 }, hoverinfo: "text",
      hovertext: facts.steps.map((s) => `${wrap(s.step, 40)}<br>${known(s.accuracy) ? percent(s.accuracy).toFixed(2) : "?"}%` + (known(s.images) ? ` of ${s.images.toLocaleString("en")} images` : "")),
    }],
    layout: {
      margin: { l: 8, r: 28, t: 28, b: 8 },
      xaxis: { tickvals: facts.steps.map((_, i) => i), ticktext: facts.steps.map((s) => words(s.step, narrow ? 11 : 20)), range: [-0.35, facts.steps.length - 0.65], showgrid: false, tickangle: 0 },
      yaxis: { ticksuffix: "%", nticks: 5, ...spread(facts.steps.map((s) => percent(s.accuracy))) },
    },
  });

  // Room above for the labels, and never a scale so fine that noise looks like a cliff.
  const spread = (values) => {
    const numbers = values.filter(known);
    if (!numbers.length) return {};
    const low = Math.min(...numbers), high = Math.max(...numbers), room = Math.max(0.12 * (high - low), 1);
    return { range: [Math.max(low - room, -2), high + 1.4 * room] };
  };

  const groups = (color, narrow) => {
    const all = facts.groups, named = all.length <= NAMED_ROWS, place = all.map((_, i) => i);
    const dense = all.map((g) => g.channels), kept = all.map((g) => g.kept);
    const along = (values) => (named ? { x: values, y: place, orientation: "h" } : { x: place, y: values });
    const label = (g) => `${wrap(g.name, 36)}<br>${g.kept} of ${g.channels} channels` + (g.channels ? ` (${Math.round((100 * g.kept) / g.channels)}%)` : "");
    const names = { tickvals: place, ticktext: all.map((g) => shorten(g.name, narrow ? 16 : 34)), range: [all.length - 0.4, -0.6], showgrid: false };
    const numbers = { range: [0, Math.max(...dense) * (named ? (narrow ? 1.34 : 1.12) : 1.04)], rangemode: "tozero", nticks: narrow ? 4 : 8 };
    return {
      traces: [
        { type: "bar", ...along(dense), hoverinfo: "skip",
          marker: named ? { color: "rgba(0,0,0,0)", line: { color: color("ghost"), width: 1.5 } } : { color: color("ghost"), opacity: 0.55 },
          ...(named && { text: all.map((g) => (g.kept === g.channels ? `all ${g.channels}` : `${g.kept} of ${g.channels}`)), textposition: "outside", textfont: { color: color("muted"), size: 11 }, cliponaxis: false }) },
        { type: "bar", ...along(kept), marker: { color: color("accent") }, hoverinfo: "text", hovertext: all.map(label), textposition: "none" },
      ],
      layout: named
        ? { barmode: "overlay", bargap: 0.35, height: 24 * all.length + 56, hovermode: "y", xaxis: numbers, yaxis: names }
        : { barmode: "overlay", bargap: 0, height: 340, hovermode: "x",
            // Dragging zooms with a mouse; on a touch screen it has to go on scrolling the page.
            dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false,
            xaxis: { title: { text: "groups in network order", standoff: 8 }, showgrid: false, showticklabels: false, range: [-0.5, all.length - 0.5], fixedrange: !matchMedia("(pointer: fine)").matches },
            yaxis: { ...numbers, title: { text: "channels" } } },
    };
  };

  const line = (x, y, color, name, extra) => ({ x, y, name, mode: "lines+markers", line: { color, width: 2 }, marker: { size: x.length > 40 ? 3 : 6, color }, ...extra });
  const epochs = () => facts.curve.map((e) => e.epoch);
  const epochAxis = { title: { text: "epoch", standoff: 8 }, showgrid: false, ...(facts.curve.length < 12 && { dtick: 1 }) };
  const loss = (color) => ({
    traces: [
      line(epochs(), facts.curve.map((e) => e.train_loss), color("accent"), "training"),
      line(epochs(), facts.curve.map((e) => e.val_loss), color("second"), "validation"),
    ],
    layout: { hovermode: "x unified", xaxis: epochAxis, yaxis: { hoverformat: ".4f", nticks: 6 } },
  });
  const val = (color) => ({
    traces: [line(epochs(), facts.curve.map((e) => percent(e.val_accuracy)), color("accent"), "accuracy", { hovertemplate: "epoch %{x}: %{y:.2f}%<extra></extra>" })],
    layout: { xaxis: epochAxis, yaxis: { ticksuffix: "%", nticks: 6 } },
  });

  const rounds = (color) => {
    const all = facts.rounds, x = all.map((r) => r.round);
    const arm = (side) => all.map((r) => (known(r.measured_ms) && known(r[side]) ? Math.abs(r[side] - r.measured_ms) : 0));
    const dash = { type: "line", xref: "paper", x0: 0, x1: 1, y0: facts.asked_ms, y1: facts.asked_ms, line: { color: color("muted"), width: 1.5, dash: "dot" } };
    return {
      traces: [
        line(x, all.map((r) => r.predicted_ms), color("second"), "predicted", { line: { color: color("second"), width: 2, dash: "dash" }, hovertemplate: "%{y:.1f} ms" }),
        line(x, all.map((r) => r.measured_ms), color("accent"), "measured", { hovertemplate: "%{y:.1f} ms", error_y: { type: "data", symmetric: false, array: arm("high_ms"), arrayminus: arm("low_ms"), color: color("accent"), thickness: 1.5, width: 5 } }),
      ],
      layout: {
        hovermode: "x unified", shapes: known(facts.asked_ms) ? [dash] : [],
        xaxis: { title: { text: "round", standoff: 8 }, dtick: 1, showgrid: false, range: [Math.min(...x) - 0.4, Math.max(...x) + 0.4] },
        yaxis: { ticksuffix: " ms", nticks: 6 },
      },
    };
  };

  const all = () => {
    draw("chart-steps", steps);
    draw("chart-groups", groups);
    draw("chart-loss", loss);
    draw("chart-val", val);
    draw("chart-rounds", rounds);
  };
  all();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  matchMedia("(max-width: 600px)").addEventListener("change", all);
})();
