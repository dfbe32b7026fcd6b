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
    return lines.map((line) => wrap(line, width + 3)).join("<br>");
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

  const draw = (box, make) => {
    const color = paint();
    const { traces, layout } = make(color, box.clientWidth < 520, box.clientWidth);
    const axis = { automargin: true, gridcolor: color("line"), linecolor: color("line"), zeroline: false, fixedrange: true, tickfont: { color: color("muted") } };
    const whole = {
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("muted") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false, height: 280,
      margin: { l: 8, r: 12, t: 12, b: 8 },
      hoverlabel: { bgcolor: color("surface"), bordercolor: color("line"), font: { family: getComputedStyle(document.body).fontFamily, color: color("text"), size: 13 }, align: "left" },
      width: box.clientWidth, ...layout,
      xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
    };
    Plotly.react(box, traces, whole, { displayModeBar: false, doubleClick: "reset" });
  };

  const steps = (color, narrow) => {
    const all = facts.steps, x = all.map((_, i) => i), y = all.map((s) => percent(s.accuracy));
    const figure = (i) => (known(y[i]) ? `${y[i].toFixed(2)}%` : "not given");
    const images = (s) => (known(s.images) ? ` of ${s.images.toLocaleString("en")} images` : "");
    // Where the line leaves the point free: below a valley, left of a climb, right of a descent.
    const side = (i) => {
      const falls = y[i] < y[i - 1], climbs = y[i + 1] > y[i];
      if (falls) return y[i + 1] < y[i] ? "top right" : "bottom center";
      return climbs && i > 0 ? "top left" : "top center";
    };
    const brief = (s, i) => (i % 2 ? "<br>" : "") + shorten(s.step.replace(/^(right )?after /, ""), 16); // in two rows, or they touch
    return {
      traces: [{
        x, y, mode: "lines+markers+text", cliponaxis: false, line: { color: color("accent"), width: 2 }, marker: { size: 9, color: color("accent") },
        text: x.map((i) => (known(y[i]) ? figure(i) : "")), textposition: x.map(side),
        textfont: { color: color("text"), size: 13 }, hoverinfo: "text", hovertext: all.map((s, i) => `${wrap(s.step, 40)}<br>${figure(i)}${images(s)}`),
      }],
      layout: {
        margin: narrow ? { l: 4, r: 4, t: 16, b: 8 } : { l: 8, r: 28, t: 16, b: 8 },
        xaxis: { tickvals: x, ticktext: all.map(narrow ? brief : (s) => words(s.step, 22)), range: [-0.5, all.length - 0.5], showgrid: false, tickangle: 0, tickfont: { color: color("muted"), size: narrow ? 10 : 12 } },
        yaxis: { ticksuffix: "%", nticks: 5, showticklabels: !narrow, ...spread(y) },
      },
    };
  };

  // Room for the labels, and never a scale so fine that noise looks like a cliff.
  const spread = (values) => {
    const numbers = values.filter(known);
    if (!numbers.length) return {};
    const low = Math.min(...numbers), high = Math.max(...numbers), room = Math.max(0.18 * (high - low), 1);
    return { range: [low - room, high + room] };
  };

  const ruler = document.createElement("canvas").getContext("2d");
  const lengths = (texts, size) => {
    ruler.font = `${size}px ${getComputedStyle(document.body).fontFamily}`;
    return texts.map((text) => ruler.measureText(text).width);
  };

  // What every layer had and what is left of it. `told`: the words beside a bar, brief where there is little room; `hover`: those of it when
  // pointed at; `axis`, `what`: what the lengths are, and of what.
  const bars = (all, before, after, { told, hover, axis, what }) => (color, narrow, width) => {
    const named = all.length <= NAMED_ROWS, place = all.map((_, i) => i);
    const mouse = matchMedia("(pointer: fine)").matches; // dragging zooms with a mouse; on a touch screen it goes on scrolling the page
    const dense = all.map(before), kept = all.map(after);
    const label = (entry) => `${wrap(entry.name, 36)}<br>${hover(entry)}`;
    const shown = all.map((entry) => shorten(entry.name, narrow ? 16 : 34));
    const names = { tickvals: place, ticktext: shown, range: [all.length - 0.4, -0.6], showgrid: false };
    const pixels = width - Math.max(0, ...lengths(named ? shown : [], 12)) - 44; // for a bar and the words beside it
    const beside = (brief) => all.map((entry) => ` ${told(entry, brief)}`);
    const texts = beside(named && Math.max(...lengths(beside(false), 11)) > 0.6 * pixels);
    const share = (text) => Math.max(0.25, 1 - text / pixels); // of the width, that is left for the bar
    const reach = (named ? lengths(texts, 11) : []).map((text, i) => Math.max(dense[i], kept[i]) / share(text));
    const numbers = { range: [0, Math.max(1.04 * Math.max(...dense, ...kept), ...reach)], rangemode: "tozero", nticks: narrow ? 4 : 8 };
    return {
      traces: named
        ? [
            { type: "bar", x: dense, y: place, orientation: "h", hoverinfo: "skip", marker: { color: "rgba(0,0,0,0)", line: { color: color("ghost"), width: 1.5 } },
              text: texts.map(plain), textposition: "outside", textfont: { color: color("muted"), size: 11 }, cliponaxis: false },
            { type: "bar", x: kept, y: place, orientation: "h", hoverinfo: "text", hovertext: all.map(label), textposition: "none", marker: { color: color("accent") } },
          ]
        : [
            // Hundreds of bars a pixel wide shimmer; one stepped outline does not.
            { x: place, y: dense, mode: "lines", line: { shape: "hvh", color: color("ghost"), width: 1 }, fill: "tozeroy", fillcolor: color("sunken"), hoverinfo: "skip" },
            { x: place, y: kept, mode: "lines", line: { shape: "hvh", color: color("accent"), width: 1 }, fill: "tozeroy", fillcolor: color("accent"), hoverinfo: "text", hovertext: all.map(label) },
          ],
      layout: named
        ? { barmode: "overlay", bargap: 0.35, height: 24 * all.length + 56, hovermode: "y", xaxis: numbers, yaxis: names }
        : { height: 340, hovermode: "x", dragmode: mouse ? "zoom" : false,
            xaxis: { title: { text: `${what} in network order${mouse ? " (drag to zoom, double-click to go back)" : ""}`, standoff: 8 }, showgrid: false, showticklabels: false, range: [-0.5, all.length - 0.5], fixedrange: !mouse },
            yaxis: { ...numbers, title: { text: axis } } },
    };
  };
  const groups = bars(facts.groups, (g) => g.channels, (g) => g.kept, {
    told: (g) => (g.kept === g.channels ? `all ${g.channels}` : `${g.kept} of ${g.channels}`),
    hover: (g) => `${g.kept} of ${g.channels} channels` + (g.channels ? ` (${Math.round((100 * g.kept) / g.channels)}%)` : ""),
    axis: "channels", what: "groups",
  });
  const digits = (value) => (known(value) ? value.toPrecision(3) : "not given");
  const layers = bars(facts.layers, (l) => l.before_ms, (l) => l.after_ms, {
    told: (l, brief) => (brief || l.after_ms === l.before_ms ? `${digits(l.after_ms)} ms` : `${digits(l.after_ms)} of ${digits(l.before_ms)} ms`),
    hover: (l) => `${plain(l.kind)}<br>${digits(l.after_ms)} ms, dense ${digits(l.before_ms)} ms`, axis: "ms", what: "layers",
  });
  const bits = bars(Object.entries(facts.bits).map(([name, count]) => ({ name, count })), () => 32, (b) => b.count, {
    told: (b) => String(b.count), hover: (b) => `${b.count} bits a weight`, axis: "bits", what: "layers",
  });

  const line = (x, y, color, name, extra) => ({ x, y, name, mode: "lines+markers", line: { color, width: 2 }, marker: { size: x.length > 40 ? 3 : 6, color }, ...extra });
  const epochs = () => facts.curve.map((e) => e.epoch);
  const epochAxis = { title: { text: "epoch", standoff: 8 }, showgrid: false, dtick: Math.ceil(facts.curve.length / 8) };
  const loss = (color) => ({
    traces: [
      line(epochs(), facts.curve.map((e) => e.train_loss), color("accent"), "training"),
      line(epochs(), facts.curve.map((e) => e.val_loss), color("second"), "held-out images"),
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

  const sensed = (what, axes) => (color) => ({
    traces: facts.sensors.filter((s) => s[what].length).map((s) => {
      const points = s[what].map((read, i) => (Array.isArray(read) ? read : [1 + Math.floor(i / 2) + (i % 2 ? 0.3 : -0.3), read])); // before and after a process
      const paint = color(s.network === "dense" ? "second" : "accent");
      return line(points.map((p) => p[0]), points.map((p) => p[1]), paint, plain(s.network), { hovertemplate: `%{y:.4g}${axes.yaxis.ticksuffix}` });
    }),
    layout: { hovermode: "x", ...axes },
  });
  const power = sensed("power_mw", { xaxis: { title: { text: "seconds", standoff: 8 }, showgrid: false }, yaxis: { ticksuffix: " mW", nticks: 6 } });
  const temperature = sensed("temperatures_c", { xaxis: { title: { text: "process", standoff: 8 }, dtick: 1, showgrid: false }, yaxis: { ticksuffix: " °C", nticks: 6 } });

  const pareto = (color) => {
    const shown = facts.points.filter((p) => known(p.latency)).sort((a, b) => a.latency - b.latency), judged = shown.some((p) => known(p.accuracy));
    const dense = facts.dense && known(facts.dense.latency) ? [{ name: "dense", ...facts.dense }] : [];
    const height = (p) => (judged ? p.accuracy : p.macs), y = [...shown, ...dense].map(height);
    const marks = (points, options) => line(points.map((p) => p.latency), points.map(height), color("accent"), "", {
      cliponaxis: false, text: points.map((p) => shorten(p.name, 24)), textfont: { color: color("text") },
      textposition: points.map((_, i) => (i < points.length - 1 ? "bottom right" : "top center")), // clear of a line that rises
      hovertext: points.map((p) => `${wrap(p.name, 40)}<br>${p.latency.toPrecision(4)} ms`), hoverinfo: "text", ...options,
    });
    return {
      traces: [
        marks(shown, { mode: facts.points.some((p) => p.choices) ? "markers+text" : "lines+markers+text" }),  // a line joins budgets of one search
        marks(dense, { mode: "markers+text", marker: { size: 9, symbol: "circle-open", color: color("muted"), line: { width: 2 } } }),
      ],
      layout: {
        margin: { l: 8, r: 28, t: 24, b: 8 }, xaxis: { title: { text: "latency", standoff: 8 }, ticksuffix: " ms" },
        yaxis: judged ? { ticksuffix: "%", title: { text: "accuracy" }, ...spread(y) } : { title: { text: "MACs" } },
      },
    };
  };
  const search = (color) => ({
    traces: [line(facts.search.map((p) => p[0]), facts.search.map((p) => p[1]), color("accent"), "best loss", { line: { color: color("accent"), width: 2, shape: "hv" } })],
    layout: { xaxis: { title: { text: "candidates judged", standoff: 8 } }, yaxis: { title: { text: "best loss so far" }, nticks: 6 } },
  });

  const charts = { steps, groups, layers, bits, loss, val, rounds, power, temperature, pareto, search };
  const widths = new Map();
  const redraw = (box) => {
    widths.set(box, box.clientWidth);
    draw(box, charts[box.id.replace("chart-", "")]);
  };
  const boxes = [...document.querySelectorAll(".chart")];
  boxes.forEach(redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => boxes.forEach(redraw));
  // The box, not the window: it is what a chart must fit, whatever made it narrower.
  const resized = new ResizeObserver((entries) => entries.filter((e) => e.target.clientWidth !== widths.get(e.target)).forEach((e) => redraw(e.target)));
  boxes.forEach((box) => resized.observe(box));
})();
