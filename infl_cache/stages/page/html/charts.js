/* Charts as SVG, drawn at the width that there is. */

function roomFor(most) {
  return Math.max(280, Math.min(most, document.getElementById("main").clientWidth - 40));
}

/* How many influences are of which size: helpful ones to the left, harmful ones to the right, powers of two each. */
function sizesChart(sizes) {
  const bins = sizes.edges.length - 1;
  const left = data.lower_helps ? sizes.negative : sizes.positive;
  const right = data.lower_helps ? sizes.positive : sizes.negative;
  const width = roomFor(760), height = 220, bottom = 46, top = 18;
  const step = width / (2 * bins + 1), floor = height - bottom;
  const most = Math.max(...left, ...right, sizes.small, 1), decades = Math.log10(1 + most);
  const tall = (value) => ((floor - top) * Math.log10(1 + value)) / decades;
  const chart = svg("svg", { width, height, role: "img", "aria-label": "Histogram of influences by size; the numbers are in the table below" });
  for (let power = 1; Math.pow(10, power) <= most; power += Math.ceil(decades / 4)) {
    const y = floor - tall(Math.pow(10, power));
    chart.append(svg("line", { x1: 0, x2: width, y1: y, y2: y, class: "grid" }));
    chart.append(svg("text", { x: 0, y: y - 3, class: "muted" }, count(Math.pow(10, power))));
  }
  const bar = (place, value, kind, words) => {
    chart.append(svg("rect", { x: place * step + 0.5, y: floor - tall(value), width: Math.max(1, step - 1), height: tall(value), class: kind },
      svg("title", {}, words + ": " + count(value))));
  };
  const range = (bin) => number(sizes.edges[bin], 2) + " to " + number(sizes.edges[bin + 1], 2);
  for (let bin = 0; bin < bins; bin++) {
    bar(bins - 1 - bin, left[bin], "helpful", "helpful, " + range(bin));
    bar(bins + 1 + bin, right[bin], "harmful", "harmful, " + range(bin));
  }
  bar(bins, sizes.small, "plain", "smaller or zero");
  chart.append(svg("line", { x1: 0, x2: width, y1: floor + 0.5, y2: floor + 0.5, class: "axis" }));
  const below = (x, text) => chart.append(svg("text", { x, y: floor + 16, "text-anchor": "middle" }, text));
  const every = Math.ceil(60 / step);
  for (let bin = every - 1; (bins - 1 - bin) * step > 20; bin += every) {
    below((bins + 2 + bin) * step, number(sizes.edges[bin + 1], 2));
    below((bins - 1 - bin) * step, number(sizes.edges[bin + 1], 2));
  }
  below((bins + 0.5) * step, "0");
  chart.append(svg("text", { x: 0, y: height - 10, class: "helpful" }, "\u2190 helpful"));
  chart.append(svg("text", { x: width, y: height - 10, "text-anchor": "end", class: "harmful" }, "harmful \u2192"));
  chart.append(svg("text", { x: width / 2, y: height - 10, "text-anchor": "middle", class: "muted" }, "size of the influence"));
  return chart;
}

/* A colour for a mean between -1 and 1, by the square root of its size. */
function shade(part) {
  const strength = Math.round(100 * Math.sqrt(Math.min(1, Math.abs(part))));
  const end = part === 0 ? "faint" : isHelpful(part) ? "helpful" : "harmful";
  return "color-mix(in srgb, var(--" + end + ") " + strength + "%, var(--panel))";
}

function heatMap(between) {
  const rows = between.train.length, columns = between.test.length;
  const most = Math.max(...between.mean.flat().map((value) => Math.abs(value || 0)), 1e-300);
  const names = between.train.map(labelText), longest = Math.max(...names.map((name) => name.length));
  const left = Math.min(120, 14 + 7 * longest);
  const across = Math.max(4, Math.min(46, (roomFor(760) - left - 50) / columns)), down = Math.max(8, Math.min(30, across));
  const heads = between.test.map(labelText), widest = Math.max(...heads.map((name) => name.length));
  const upright = 7 * widest <= across, top = upright ? 40 : 30 + Math.min(78, 5 * widest);
  const width = left + across * columns + (upright ? 0 : 50), height = top + down * rows + 4;
  const chart = svg("svg", { width, height, role: "img", "aria-label": "Mean influence between classes; the numbers are in the table below" });
  const short = (name, most) => (name.length > most ? name.slice(0, Math.max(1, most - 1)) + "\u2026" : name);
  chart.append(svg("text", { x: left, y: 12, class: "muted" }, "class of the test sample \u2192"));
  between.test.forEach((label, column) => {
    const x = left + across * (column + 0.5), slanted = { "text-anchor": "start", transform: "rotate(-45 " + x + " " + (top - 6) + ")" };
    if (column % Math.ceil(14 / across) === 0) {
      chart.append(svg("text", { x, y: top - 6, ...(upright ? { "text-anchor": "middle" } : slanted) }, short(heads[column], 14)));
    }
  });
  between.train.forEach((label, row) => {
    if (row % Math.ceil(13 / down) === 0) {
      chart.append(svg("text", { x: left - 6, y: top + down * (row + 0.5) + 4, "text-anchor": "end" }, short(names[row], Math.floor((left - 8) / 6.5))));
    }
    between.test.forEach((other, column) => {
      const value = between.mean[row][column];
      const cell = svg("rect", { x: left + across * column, y: top + down * row, width: across - 1, height: down - 1, class: value === null ? "none" : "cell" },
        svg("title", {}, "train " + names[row] + " on test " + labelText(other) + ": " + signed(value) + " (" + count(between.pairs[row][column]) + " pairs)"));
      if (value !== null) cell.style.fill = shade(value / most);
      chart.append(cell);
    });
  });
  return chart;
}

/* Bars to the left and right of zero: [name, value], by a function that writes the value. */
function barChart(rows, write, label) {
  const width = roomFor(640), tall = 24, names = Math.min(width * 0.4, 12 + 7 * Math.max(...rows.map(([name]) => name.length)));
  const low = Math.min(0, ...rows.map(([, value]) => value || 0)), high = Math.max(0, ...rows.map(([, value]) => value || 0));
  const room = width - names - 64, at = (value) => names + (low < 0 ? 56 : 0) + ((room - (low < 0 ? 56 : 0)) * (value - low)) / (high - low || 1);
  const chart = svg("svg", { width, height: tall * rows.length + 4, role: "img", "aria-label": label });
  const letters = Math.floor((names - 8) / 6.7);
  rows.forEach(([name, value], row) => {
    const y = row * tall, from = at(Math.min(0, value || 0)), to = at(Math.max(0, value || 0));
    chart.append(svg("text", { x: 0, y: y + 16 }, svg("title", {}, name), name.length > letters ? "\u2026" + name.slice(1 - letters) : name));
    chart.append(svg("rect", { x: from, y: y + 3, width: Math.max(1, to - from), height: tall - 7, class: "plain" }));
    chart.append(svg("text", value < 0 ? { x: from - 5, y: y + 16, "text-anchor": "end" } : { x: to + 5, y: y + 16 }, write(value)));
  });
  chart.append(svg("line", { x1: at(0), x2: at(0), y1: 0, y2: tall * rows.length, class: "axis" }));
  return chart;
}
