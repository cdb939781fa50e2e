"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const root = document.documentElement;
  let drawn = [];

  function colours() {
    const style = getComputedStyle(root);
    const of = (name) => style.getPropertyValue(`--${name}`).trim();
    return Object.fromEntries(["ink", "muted", "line", "soft", "surface", "paper", "accent", "second", "third", "fourth"].map((name) => [name, of(name)]));
  }

  const percent = (value) => `${(100 * value).toFixed(1)}%`;
  const short = (value) => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));

  function tip(lines, picture) {
    const box = document.createElement("div");
    box.className = "tip";
    if (picture) box.append(Object.assign(new Image(), { src: picture, alt: "" }));
    const words = box.appendChild(document.createElement("div"));
    for (const line of lines) words.append(Object.assign(document.createElement("div"), { textContent: line }));
    return box;
  }

  function base(c) {
    return {
      animation: false,
      textStyle: { fontFamily: getComputedStyle(root).fontFamily, color: c.ink },
      tooltip: { confine: true, backgroundColor: c.surface, borderColor: c.line, textStyle: { color: c.ink, fontSize: 13 }, extraCssText: "box-shadow:0 4px 16px rgba(0,0,0,.12)" },
    };
  }

  const axis = (c, more) => ({
    axisLine: { show: false }, axisTick: { show: false }, splitLine: { lineStyle: { color: c.line } },
    axisLabel: { color: c.muted, fontSize: 12, hideOverlap: true }, nameTextStyle: { color: c.muted, fontSize: 12 }, ...more,
  });

  function names(c, list, width, more) {
    const room = Math.min(170, Math.round(width * 0.34));
    return axis(c, { type: "category", data: list, inverse: true, splitLine: { show: false },
      axisLabel: { color: c.ink, fontSize: 13, width: room, overflow: "break", lineHeight: 15 }, ...more });
  }

  // A dot a model with its 95% interval; the value is written above its dot.
  function intervals(data, c, width) {
    const hue = { student: c.accent, teacher: c.ink, start: c.muted, random: c.line, file: c.third };
    const fill = (point) => point.role === "random" ? c.muted : hue[point.role];
    return {
      ...base(c),
      height: 46 + 40 * data.points.length,
      grid: { left: 4, right: 20, top: 12, bottom: 4, outerBoundsMode: "same", outerBoundsContain: "axisLabel" },
      xAxis: axis(c, { type: "value", scale: true, splitNumber: 4, axisLabel: { color: c.muted, formatter: (value) => `${Math.round(100 * value)}%`, hideOverlap: true } }),
      yAxis: names(c, data.points.map((point) => point.name), width),
      series: [
        { type: "custom", silent: true, encode: { x: [0, 1], y: 2 }, data: data.points.map((point, row) => point.interval ? [point.interval[0], point.interval[1], row] : [point.value, point.value, row]),
          renderItem: (_, api) => {
            const [from, to] = [0, 1].map((end) => api.coord([api.value(end), api.value(2)]));
            return { type: "line", shape: { x1: from[0], y1: from[1], x2: to[0], y2: to[1] }, style: { stroke: fill(data.points[api.value(2)]), lineWidth: 3, opacity: 0.4, lineCap: "round" } };
          } },
        { type: "scatter", symbolSize: 11, data: data.points.map((point, row) => ({ value: [point.value, row], itemStyle: { color: fill(point) }, symbol: point.role === "random" ? "emptyCircle" : "circle" })),
          label: { show: true, position: "top", distance: 3, color: c.ink, fontSize: 12, formatter: (item) => percent(item.value[0]) } },
      ],
      tooltip: { ...base(c).tooltip, formatter: (item) => {
        const point = data.points[item.dataIndex];
        return tip([point.name, percent(point.value), ...(point.interval ? [`95%: ${percent(point.interval[0])} to ${percent(point.interval[1])}`] : [])]);
      } },
    };
  }

  function lines(data, c) {
    const hues = [c.accent, c.second, c.third, c.fourth, c.muted];
    const several = data.series.length > 1;
    return {
      ...base(c),
      height: 250,
      color: hues,
      legend: several ? { bottom: 0, icon: "roundRect", itemWidth: 14, itemHeight: 3, textStyle: { color: c.muted } } : undefined,
      grid: { left: 4, right: 14, top: 12, bottom: several ? 54 : 24, outerBoundsMode: "same", outerBoundsContain: "axisLabel" },
      xAxis: axis(c, { type: "value", min: "dataMin", max: "dataMax", splitLine: { show: false }, name: "step", nameLocation: "middle", nameGap: 24, axisLabel: { color: c.muted, formatter: short, hideOverlap: true, showMaxLabel: true } }),
      yAxis: axis(c, { type: "value", scale: true, splitNumber: 4, axisLabel: { color: c.muted, formatter: short } }),
      series: data.series.map((each) => ({ type: "line", name: each.name, data: each.points, showSymbol: each.points.length < 3, symbolSize: 6, lineStyle: { width: 2 }, emphasis: { disabled: true } })),
      tooltip: { ...base(c).tooltip, trigger: "axis", axisPointer: { lineStyle: { color: c.muted } },
        formatter: (items) => tip([`step ${short(items[0].value[0])}`, ...items.map((item) => `${item.seriesName}: ${short(item.value[1])}`)]) },
    };
  }

  function bars(data, c, width) {
    const total = data.points.reduce((sum, point) => sum + point.value, 0) || 1;
    const time = (seconds) => seconds < 60 ? `${seconds.toFixed(seconds < 10 ? 1 : 0)} s` : seconds < 3600 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
    return {
      ...base(c),
      height: 20 + 32 * data.points.length,
      grid: { left: 4, right: 74, top: 4, bottom: 4, outerBoundsMode: "same", outerBoundsContain: "axisLabel" },
      xAxis: { type: "value", show: false },
      yAxis: names(c, data.points.map((point) => point.name), width),
      series: [{ type: "bar", barWidth: 12, data: data.points.map((point) => point.value), itemStyle: { color: c.accent, borderRadius: [0, 4, 4, 0] },
        label: { show: true, position: "right", color: c.muted, fontSize: 12, formatter: (item) => time(item.value) } }],
      tooltip: { ...base(c).tooltip, formatter: (item) => tip([item.name, `${time(item.value)}, ${percent(item.value / total)} of all parts`]) },
    };
  }

  function histogram(data, c) {
    return {
      ...base(c),
      height: 200,
      grid: { left: 4, right: 10, top: 26, bottom: 4, outerBoundsMode: "same", outerBoundsContain: "axisLabel" },
      xAxis: axis(c, { type: "category", data: data.x.map((value) => value.toFixed(2)), splitLine: { show: false } }),
      yAxis: axis(c, { type: "value", splitNumber: 3, name: data.unit, nameTextStyle: { color: c.muted, align: "left" }, nameGap: 10 }),
      series: [{ type: "bar", barCategoryGap: "8%", data: data.y, itemStyle: { color: c.accent, borderRadius: [2, 2, 0, 0] } }],
      tooltip: { ...base(c).tooltip, formatter: (item) => tip([`${short(item.value)} ${data.unit}`, `similarity about ${item.name}`]) },
    };
  }

  function matrix(data, c, width) {
    const cells = data.counts.flatMap((row, y) => {
      const sum = row.reduce((total, count) => total + count, 0) || 1;
      return row.map((count, x) => [x, y, count / sum, count]);
    });
    const few = data.classes.length <= 15;
    const room = Math.min(120, Math.round(width * 0.2));
    const side = Math.min(width - room, 26 + data.classes.length * 44);
    return {
      ...base(c),
      height: Math.min(side, width - room) + room,
      grid: { left: room, width: side, top: 6, height: side },
      xAxis: axis(c, { type: "category", data: data.classes, splitLine: { show: false }, name: "taken for", nameLocation: "end", nameGap: 8, axisLabel: { color: c.muted, rotate: 50, width: room - 20, overflow: "truncate", interval: 0, fontSize: few ? 12 : 10 } }),
      yAxis: axis(c, { type: "category", data: data.classes, inverse: true, splitLine: { show: false }, axisLabel: { color: c.ink, width: room - 12, overflow: "truncate", interval: 0, fontSize: few ? 13 : 10 } }),
      visualMap: { show: false, min: 0, max: 1, dimension: 2, inRange: { color: [c.soft, c.accent] } },
      series: [{ type: "heatmap", data: cells, itemStyle: { borderColor: c.surface, borderWidth: 2, borderRadius: 3 }, emphasis: { disabled: true },
        label: { show: few && width > 420, fontSize: 11, formatter: (item) => item.value[3] || "", color: "inherit" } }],
      tooltip: { ...base(c).tooltip, formatter: (item) => tip([`${data.classes[item.value[1]]} taken for ${data.classes[item.value[0]]}`, `${item.value[3]} images, ${percent(item.value[2])} of the class`]) },
    };
  }

  function files(data, c) {
    const hues = [c.accent, c.second, c.third, c.fourth, c.muted];
    const judged = data.points.every((point) => point.value !== null && point.value !== undefined);
    const most = Math.max(...data.points.map((point) => point.mb));
    const ends = (point) => judged && point.interval ? point.interval : [judged ? point.value : point.mb, judged ? point.value : point.mb];
    const told = (point) => [point.name, `${point.ms.toFixed(2)} ms, ${short(point.mb)} MB`, ...(judged ? [`linear probe ${percent(point.value)}`] : [])];
    return {
      ...base(c),
      height: 320,
      color: hues,
      legend: { bottom: 0, icon: "circle", itemWidth: 10, itemHeight: 10, textStyle: { color: c.ink }, data: data.points.map((point) => point.name) },
      grid: { left: 8, right: 24, top: 32, bottom: 62, outerBoundsMode: "same", outerBoundsContain: "axisLabel" },
      xAxis: axis(c, { type: "value", min: 0, name: "milliseconds a picture, one thread", nameLocation: "middle", nameGap: 28, max: (range) => Math.ceil(range.max * 1.15) }),
      yAxis: axis(c, { type: "value", scale: judged, name: judged ? "linear probe; larger dots are larger files" : "MB", nameTextStyle: { color: c.muted, align: "left" }, nameGap: 12, splitNumber: 4,
        axisLabel: { color: c.muted, formatter: judged ? (value) => `${Math.round(100 * value)}%` : short } }),
      series: [
        { type: "custom", silent: true, encode: { x: 0, y: [1, 2] }, data: data.points.map((point) => [point.ms, ...ends(point)]),
          renderItem: (item, api) => {
            const [from, to] = [1, 2].map((end) => api.coord([api.value(0), api.value(end)]));
            return { type: "line", shape: { x1: from[0], y1: from[1], x2: to[0], y2: to[1] }, style: { stroke: hues[item.dataIndex % hues.length], lineWidth: 2, opacity: 0.4 } };
          } },
        ...data.points.map((point, which) => ({ type: "scatter", name: point.name, symbolSize: 10 + 22 * Math.sqrt(point.mb / most),
          data: [[point.ms, judged ? point.value : point.mb]], itemStyle: { color: hues[which % hues.length], opacity: 0.85 } })),
      ],
      tooltip: { ...base(c).tooltip, formatter: (item) => tip(told(data.points[item.seriesIndex - 1])) },
    };
  }

  function unpacked(text) {
    const raw = atob(text), bytes = new Uint8Array(raw.length);
    for (let place = 0; place < raw.length; place++) bytes[place] = raw.charCodeAt(place);
    return Float32Array.from(new Uint16Array(bytes.buffer));
  }

  // One colour a place in the teacher's map: around its middle by hue, away from it by strength.
  function hues(places) {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches && !("print" in root.dataset);
    const found = [];
    for (let place = 0; place < places.length; place += 2) {
      const x = places[place] / 65535 - 0.5, y = places[place + 1] / 65535 - 0.5;
      const angle = Math.atan2(y, x) * 180 / Math.PI + 180, far = Math.min(1, Math.hypot(x, y) / 0.5);
      found.push(`hsl(${angle.toFixed(0)} ${(18 + 44 * far).toFixed(0)}% ${dark ? 64 : 46}%)`);
    }
    return found;
  }

  function map(element, data, c) {
    element.replaceChildren();
    const places = { teacher: unpacked(data.teacher), student: unpacked(data.student) };
    const others = unpacked(data.others), hue = hues(places.teacher);
    // Both halves stand before one is drawn: only then is their width known.
    const planes = Object.keys(places).map((name) => {
      const half = element.appendChild(document.createElement("div"));
      half.append(Object.assign(document.createElement("p"), { textContent: name }));
      const plane = half.appendChild(Object.assign(document.createElement("div"), { className: "plane", role: "img" }));
      plane.ariaLabel = `The ${name}'s map of ${data.images.length} images`;
      return plane;
    });
    const instances = Object.entries(places).map(([name, flat], which) => {
      const instance = echarts.init(planes[which], null, { renderer: "canvas" });
      const points = Array.from({ length: flat.length / 2 }, (_, row) => [flat[2 * row], flat[2 * row + 1]]);
      const bare = { type: "value", min: 0, max: 65535, show: false };
      instance.setOption({
        ...base(c),
        grid: { left: 8, right: 8, top: 8, bottom: 8, outerBoundsMode: "none" },
        xAxis: bare, yAxis: bare,
        dataZoom: [0, 1].map((which) => ({ type: "inside", [which ? "yAxisIndex" : "xAxisIndex"]: 0, filterMode: "none", zoomOnMouseWheel: "ctrl", moveOnMouseWheel: false, preventDefaultMouseMove: false })),
        series: [
          { type: "scatter", z: 2, progressive: 0, data: points, symbolSize: points.length > 1500 ? 5 : 7, itemStyle: { color: (item) => hue[item.dataIndex], opacity: 0.85 }, emphasis: { itemStyle: { borderColor: c.ink, borderWidth: 2, opacity: 1 }, scale: 2.4 } },
          ...(name === "teacher" && others.length ? [{ type: "scatter", z: 1, progressive: 0, large: true, largeThreshold: 0, silent: true, symbolSize: 2, data: others, itemStyle: { color: c.muted, opacity: 0.35 }, tooltip: { show: false } }] : []),
        ],
        tooltip: { ...base(c).tooltip, formatter: (item) => {
          const image = data.images[item.dataIndex], picture = data.pictures[image];
          return tip([data.names[item.dataIndex] || `image ${(image + 1).toLocaleString("en")}`], picture && `data:image/webp;base64,${picture}`);
        } },
        aria: { enabled: true, label: { description: planes[which].ariaLabel } },
      });
      return instance;
    });
    echarts.connect(instances);
    const row = element.appendChild(Object.assign(document.createElement("div"), { className: "buttons" }));
    let span = 100;
    const zoom = (next) => {
      span = Math.min(100, next);
      for (const which of [0, 1]) instances[0].dispatchAction({ type: "dataZoom", dataZoomIndex: which, start: 50 - span / 2, end: 50 + span / 2 });
    };
    for (const [words, act] of [["Zoom in", () => zoom(span / 1.5)], ["Zoom out", () => zoom(span * 1.5)], ["Whole map", () => zoom(100)]]) {
      const button = row.appendChild(Object.assign(document.createElement("button"), { type: "button", textContent: words }));
      button.addEventListener("click", act);
    }
    row.append("Ctrl and the wheel zoom too; drag to move. Point at an image to see it in both maps.");
    return instances;
  }

  const kinds = { intervals, lines, bars, histogram, matrix, files };

  function draw() {
    for (const instance of drawn) instance.dispose();
    drawn = [];
    const c = colours();
    for (const element of document.querySelectorAll(".plot")) {
      const chart = charts[Number(element.dataset.chart)];
      if (chart.type === "map") {
        drawn.push(...map(element, chart.data, c));
        continue;
      }
      const { height, ...option } = kinds[chart.type](chart.data, c, element.clientWidth);
      element.style.height = `${height}px`;
      const instance = echarts.init(element, null, { renderer: "svg" });
      instance.setOption({ ...option, aria: { enabled: true, label: { description: `${chart.name}. The table below holds the same figures.` } } });
      drawn.push(instance);
    }
  }

  function print(now) {
    if (now) root.dataset.print = ""; else delete root.dataset.print;
    draw();
  }

  let width = root.clientWidth, waiting = 0;
  addEventListener("resize", () => {
    if (root.clientWidth === width) return;
    width = root.clientWidth;
    clearTimeout(waiting);
    waiting = setTimeout(draw, 150);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  draw();
  root.dataset.drawn = Math.round(performance.now());
})();
