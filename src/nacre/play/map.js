// Draws the map of a substrate from the data inside its <figure class="map">.
(() => {
  "use strict";
  const colour = (name) => getComputedStyle(document.body).getPropertyValue(name).trim();

  function draw(figure) {
    const data = JSON.parse(figure.dataset.map);
    const packed = Uint8Array.from(atob(data.glyphs), (c) => c.charCodeAt(0));
    const size = (data.side * data.side) / 8;
    const keys = figure.appendChild(document.createElement("div"));
    const plot = figure.appendChild(document.createElement("canvas"));
    const seen = figure.appendChild(document.createElement("div"));
    keys.className = "keys";
    seen.className = "seen";
    seen.setAttribute("aria-live", "polite");
    plot.tabIndex = 0;
    plot.setAttribute("role", "application");
    plot.setAttribute("aria-label", figure.dataset.about + "; arrow keys go from token to token");
    const order = data.x.map((_, i) => i).sort((a, b) => data.x[a] - data.x[b]);
    let only = -1, chosen = -1;

    data.scripts.forEach((name, index) => {
      const key = keys.appendChild(document.createElement("button"));
      key.type = "button";
      key.setAttribute("aria-pressed", "false");
      const swatch = key.appendChild(document.createElement("i"));
      swatch.className = "swatch e" + index;
      key.append(name);
      key.onclick = () => {
        only = only === index ? -1 : index;
        [...keys.children].forEach((k, i) => k.setAttribute("aria-pressed", String(i === only)));
        paint();
      };
    });

    const place = (i) => [
      10 + ((plot.width - 20) * data.x[i]) / 4095,
      plot.height - 10 - ((plot.height - 20) * data.y[i]) / 4095,
    ];

    function paint() {
      const scale = window.devicePixelRatio || 1;
      plot.width = plot.clientWidth * scale;
      plot.height = plot.clientHeight * scale;
      const pen = plot.getContext("2d");
      const colours = data.scripts.map((_, i) => colour("--e" + i));
      for (let i = 0; i < data.x.length; i++) {
        const kind = data.script[i];
        pen.globalAlpha = only < 0 ? 0.65 : kind === only ? 0.9 : 0.06;
        pen.fillStyle = colours[kind];
        const [x, y] = place(i);
        pen.beginPath();
        pen.arc(x, y, 2.4 * scale, 0, 7);
        pen.fill();
      }
      pen.globalAlpha = 1;
      if (chosen >= 0) {
        const [x, y] = place(chosen);
        pen.strokeStyle = colour("--ink");
        pen.lineWidth = 2 * scale;
        pen.beginPath();
        pen.arc(x, y, 7 * scale, 0, 7);
        pen.stroke();
      }
    }

    function show(i) {
      if (i === chosen) return;
      chosen = i;
      paint();
      seen.replaceChildren();
      if (i < 0) return tell();
      const glyph = seen.appendChild(document.createElement("canvas"));
      glyph.width = glyph.height = data.side;
      glyph.setAttribute("aria-hidden", "true");
      const pen = glyph.getContext("2d");
      pen.fillStyle = colour("--ink");
      for (let p = 0; p < data.side * data.side; p++) {
        if ((packed[i * size + (p >> 3)] >> (7 - (p & 7))) & 1)
          pen.fillRect(p % data.side, Math.floor(p / data.side), 1, 1);
      }
      const words = seen.appendChild(document.createElement("div"));
      words.appendChild(document.createElement("b")).textContent = data.name[i];
      words.append(data.points[i] + " · " + data.scripts[data.script[i]]);
    }

    function tell() {
      seen.textContent = "Point at a dot, or use the arrow keys, to see its token.";
    }

    function nearest(event) {
      const box = plot.getBoundingClientRect();
      const scale = plot.width / box.width;
      const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
      let best = -1, least = (24 * scale) ** 2;
      for (let i = 0; i < data.x.length; i++) {
        if (only >= 0 && data.script[i] !== only) continue;
        const [a, b] = place(i);
        const far = (a - x) ** 2 + (b - y) ** 2;
        if (far < least) [best, least] = [i, far];
      }
      return best;
    }

    plot.onpointermove = (event) => show(nearest(event));
    plot.onpointerdown = (event) => show(nearest(event));
    plot.onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const able = order.filter((i) => only < 0 || data.script[i] === only);
      const at = able.indexOf(chosen);
      show(able[(at + step + able.length) % able.length]);
    };
    new ResizeObserver(paint).observe(plot);
    tell();
  }

  new MutationObserver(() => {
    for (const figure of document.querySelectorAll("figure.map:not([data-drawn])")) {
      figure.dataset.drawn = "yes";
      draw(figure);
    }
  }).observe(document.documentElement, { childList: true, subtree: true });
})();
