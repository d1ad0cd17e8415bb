// Axis, smoothing, logarithm and runs: the figures are changed as data, and the shell draws them again.
(() => {
  "use strict";
  if (!window.shell || !shell.figures.size) return;
  const FAINT = 0.25;
  const state = { axis: null, smooth: "0", log: false, usual: false, hidden: new Set() };
  const chosen = (name) => document.querySelector(`.controls input[name="${name}"]:checked`);
  const inputs = (name) => [...document.querySelectorAll(`.controls input[name="${name}"]`)];

  const originals = new Map([...shell.figures].map(([place, figure]) => [place, figure.data]));

  const originalRanges = new Map([...shell.figures].map(([place, { layout }]) => [place, layout.yaxis && layout.yaxis.range]));

  const apply = () => {
    for (const [place, figure] of shell.figures) {
      const facts = (figure.layout && figure.layout.meta) || {};
      const data = [];
      for (const trace of originals.get(place)) {
        const meta = trace.meta;
        if (!meta || !meta.raw) { data.push(trace); continue; }
        const visible = !state.hidden.has(meta.run);
        const raw = { ...trace, x: meta.raw[state.axis], y: meta.raw.y, visible };
        const smooth = state.smooth !== "0" && meta.smooth[state.smooth];
        if (!smooth) { data.push(raw); continue; }
        const group = trace.showlegend === false ? {} : { legendgroup: trace.name };
        data.push({ ...raw, opacity: FAINT, showlegend: false, hoverinfo: "skip", ...group });
        const sizes = smooth.y.map((y, i) => (y != null && smooth.y[i - 1] == null && smooth.y[i + 1] == null ? 4 : 0));
        data.push({ ...trace, x: smooth[state.axis], y: smooth.y, visible, mode: "lines+markers",
          line: { ...trace.line, width: 2 }, marker: { ...trace.marker, size: sizes }, ...group });
      }
      figure.data = data;
      if (facts.axes) {
        figure.layout.xaxis.title = { text: facts.axes[state.axis] };
        const end = facts.ends[state.axis];
        figure.layout.xaxis.range = [facts.key === "timeline" ? -0.02 * end : 0, end];
        figure.layout.uirevision = `${facts.key} ${state.axis} ${state.log} ${state.usual}`;
      }
      const own = originalRanges.get(place), isLog = state.log && facts.canBeLog;
      figure.layout.yaxis.range = state.usual && facts.usual && !isLog ? facts.usual.slice() : own && own.slice();
      figure.layout.yaxis.autorange = !figure.layout.yaxis.range;
      if (facts.canBeLog) {
        figure.layout.yaxis.type = state.log ? "log" : "linear";
        // a logarithmic axis of one decade would have one number alone
        if (state.log) Object.assign(figure.layout.yaxis, { nticks: 8, minor: { ticks: "outside", ticklen: 3 } });
        else for (const key of ["nticks", "minor"]) delete figure.layout.yaxis[key];
      }
    }
    shell.draw();
  };

  const read = () => {
    state.axis = chosen("axis").value;
    state.smooth = chosen("smooth") ? chosen("smooth").value : "0";
    state.log = document.getElementById("log").checked;
    state.usual = document.getElementById("usual").checked;
    state.hidden = new Set(inputs("run").filter((box) => !box.checked).map((box) => Number(box.value)));
    apply();
  };
  const next = (name) => {
    const all = inputs(name);
    if (!all.length) return;
    all[(all.indexOf(chosen(name)) + 1) % all.length].checked = true;
    read();
  };
  document.querySelector(".controls")?.addEventListener("change", read);

  // All charts have one horizontal axis: to zoom one is to zoom all.
  let linking = false;
  for (const place of shell.figures.keys()) {
    place.on?.("plotly_relayout", (change) => {
      if (linking) return;
      const [from, to] = change["xaxis.range"] || [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      const isReset = change["xaxis.autorange"];
      if (from === undefined && !isReset) return;
      linking = true;
      const others = [...shell.figures].filter(([other]) => other !== place);
      Promise.all(others.map(([other, figure]) => Plotly.relayout(other,
        isReset ? { "xaxis.range": figure.layout.xaxis.range.slice() } : { "xaxis.range": [from, to] },
      ))).finally(() => { linking = false; });
    });
  }
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.getElementById("keys").open) return;
    if (event.target.closest("select, textarea, input:not([type=radio]):not([type=checkbox])")) return;
    const ofRun = inputs("run")[Number(event.key) - 1];
    if (event.key === "x") next("axis");
    else if (event.key === "s") next("smooth");
    else if (event.key === "l" || event.key === "o") {
      const box = document.getElementById(event.key === "l" ? "log" : "usual");
      box.checked = !box.checked;
      read();
    }
    else if (ofRun) { ofRun.checked = !ofRun.checked; read(); }
  });
})();
