(() => {
  "use strict";
  const root = document.documentElement;
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const colors = JSON.parse(document.getElementById("colors").textContent);
  let printing = false;

  const isDark = () => !printing && (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);

  // Charts: figures have the light colours; in the dark theme each is exchanged for its counterpart.
  const darkOf = new Map(Object.values(colors).map(([light, dark]) => [light, dark]));
  const color = (name) => colors[name][isDark() ? 1 : 0];

  const themed = (value) => {
    if (typeof value === "string") return isDark() && darkOf.has(value) ? darkOf.get(value) : value;
    if (Array.isArray(value)) return value.map(themed);
    if (value && typeof value === "object" && !ArrayBuffer.isView(value)) {
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, themed(inner)]));
    }
    return value;
  };

  const dressed = (layout) => {
    const axis = (own) => ({
      gridcolor: color("line"), linecolor: color("line"), zerolinecolor: color("line"), automargin: true, ...own,
      title: own && own.title ? { standoff: 8, ...own.title } : undefined,
    });
    const result = {
      xaxis: {}, yaxis: {}, ...themed(layout),
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("muted") },
      hoverlabel: { bgcolor: color("surface"), bordercolor: color("line"), font: { color: color("ink"), size: 12 } },
      autosize: true,
    };
    for (const key of Object.keys(result)) if (/^[xy]axis\d*$/.test(key)) result[key] = axis(result[key]);
    return result;
  };

  const figures = new Map();
  for (const data of document.querySelectorAll("script[data-for]")) {
    figures.set(document.getElementById(data.dataset.for), JSON.parse(data.textContent));
  }
  const draw = () => {
    if (!window.Plotly) return;
    for (const [place, figure] of figures) {
      Plotly.react(place, themed(figure.data), dressed(figure.layout || {}), {
        responsive: true, displaylogo: false, displayModeBar: false,
      }).then(() => { place.dataset.drawn = isDark() ? "dark" : "light"; });
    }
  };

  // Theme.
  const button = document.getElementById("theme");
  const tellTheme = () => {
    button.setAttribute("aria-pressed", String(isDark()));
    button.querySelector("span").textContent = isDark() ? "Light" : "Dark";
  };
  const toggleTheme = () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("vlm-dist-theme", root.dataset.theme);
    } catch (error) {
      console.debug("the theme is not remembered here", error);
    }
    tellTheme();
    draw();
  };
  button.addEventListener("click", toggleTheme);
  systemDark.addEventListener("change", () => { tellTheme(); draw(); });
  addEventListener("beforeprint", () => { printing = true; draw(); });
  addEventListener("afterprint", () => { printing = false; draw(); });

  // Keys.
  const help = document.getElementById("keys");
  document.getElementById("show-keys").addEventListener("click", () => help.showModal());
  help.addEventListener("click", (event) => { if (event.target === help) help.close(); });

  const items = () => [...document.querySelectorAll("[data-item]")].filter((item) => item.offsetParent !== null);
  const go = (by) => {
    const all = items();
    if (!all.length) return;
    const at = all.findIndex((item) => item === document.activeElement || item.contains(document.activeElement));
    let next = at + by;
    if (at < 0) {
      // nothing has the focus: from where the reader is on the page
      const seen = all.findIndex((item) => item.getBoundingClientRect().bottom > 80);
      next = seen < 0 ? all.length - 1 : by > 0 ? seen : seen - 1;
    }
    const item = all[Math.min(Math.max(next, 0), all.length - 1)];
    item.tabIndex = -1;
    item.focus({ preventScroll: true });
    item.scrollIntoView({ block: "start" });
  };
  const actions = {
    j: () => go(1), ArrowRight: () => go(1), k: () => go(-1), ArrowLeft: () => go(-1),
    t: toggleTheme, "?": () => (help.open ? help.close() : help.showModal()),
  };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, select, textarea")) return;
    // the arrows belong to what scrolls sideways, if that has the focus
    if (event.key.startsWith("Arrow") && event.target.matches(".scroll, .thumbs")) return;
    if (help.open && event.key !== "?") return;
    const action = actions[event.key];
    if (action) { event.preventDefault(); action(); }
  });

  // What scrolls sideways can be reached by Tab.
  for (const wide of document.querySelectorAll(".scroll, .thumbs")) {
    if (wide.scrollWidth > wide.clientWidth) wide.tabIndex = 0;
  }

  // A room's own script may change a figure's data and layout, and have it drawn again.
  window.shell = { figures, draw };

  tellTheme();
  draw();
})();
