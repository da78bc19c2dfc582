/* The run as a whole. */

function overviewView() {
  const view = [
    titled("Influences in " + data.run),
    el("p", { class: "lead" }, data.sign),
    data.notes.length > 0 && el("ul", { class: "notes" }, data.notes.map((note) => el("li", {}, note))),
    el("dl", { class: "facts" }, data.facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    el("p", {}, el("a", { href: "#tests" }, count(data.tests.length) + " test samples"), " and ",
      el("a", { href: "#trains" }, count(trainOf.size) + " training samples"), " are in this page."),
  ];
  return [...view, stagesPart(), overPart(), sizesPart(), betweenPart(), layersPart()];
}

function stagesPart() {
  const rows = data.stages.map((stage) => el("tr", {}, el("th", { scope: "row" }, stage.name), el("td", {}, stage.done),
    el("td", { class: "number" }, stage.time), el("td", { class: "number" }, stage.disk)));
  const details = data.stages.filter((stage) => stage.details.length).map((stage) => el("details", { open: stage.name === "stest" },
    el("summary", {}, stage.name === "stest" ? "stest: the system that was solved, and how well" : stage.name),
    el("table", {}, el("tbody", {}, stage.details.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value)))))));
  const titles = ["stage", "done", "time", "on disk"].map((title, at) => el("th", { scope: "col", class: at > 1 ? "number" : null }, title));
  return [el("h2", {}, "Stages"), el("div", { class: "wide" }, el("table", {}, el("thead", {}, el("tr", {}, titles)), el("tbody", {}, rows))), details];
}

function overPart() {
  if (!data.n_over) return null;
  const links = data.over.map((id, at) => [at ? ", " : "", testOf.has(id) ? el("a", { href: "#test-" + id }, id) : id]);
  const more = data.n_over > data.over.length ? " and " + count(data.n_over - data.over.length) + " more" : "";
  return el("p", { class: "wrong" }, "Over the tolerance of the solver: test samples ", links, more, ".");
}

function sizesPart() {
  if (!data.totals) return null;
  const sizes = data.totals.sizes;
  const left = data.lower_helps ? sizes.negative : sizes.positive, right = data.lower_helps ? sizes.positive : sizes.negative;
  const rows = left.map((value, bin) => el("tr", {}, el("th", { scope: "row" }, number(sizes.edges[bin]) + " to " + number(sizes.edges[bin + 1])),
    el("td", { class: "number" }, count(value)), el("td", { class: "number" }, count(right[bin]))));
  const titles = ["size", "helpful", "harmful"].map((title, at) => el("th", { scope: "col", class: at ? "number" : null }, title));
  return [
    el("h2", {}, "How large the influences are"),
    el("p", { class: "muted" }, "Each bar reaches over a factor of two of the absolute value; its height is the logarithm of the number. ",
      sizes.not_finite ? count(sizes.not_finite) + " are not finite and left out." : ""),
    sizesChart(sizes),
    el("details", {}, el("summary", {}, "As a table"), el("div", { class: "wide" }, el("table", {}, el("thead", {}, el("tr", {}, titles)), el("tbody", {}, rows))),
      el("p", {}, "Smaller, or zero: " + count(sizes.small))),
  ];
}

function betweenPart() {
  const between = data.totals && data.totals.between;
  if (!between) return null;
  const [noTrain, noTest] = between.left_out;
  const head = between.test.map((label) => el("th", { scope: "col", class: "number" }, labelText(label)));
  const rows = between.train.map((label, row) => el("tr", {}, el("th", { scope: "row" }, labelText(label)),
    between.mean[row].map((value) => el("td", { class: "number " + endOf(value) }, signed(value)))));
  return [
    el("h2", {}, "What each class does to each other"),
    el("p", { class: "muted" }, "Mean influence of the training samples of a class (rows) on the test samples of a class (columns). ",
      el("span", { class: "helpful" }, "Helpful"), " and ", el("span", { class: "harmful" }, "harmful"),
      "; the colour is as strong as the square root of the mean.",
      noTrain || noTest ? " The largest classes; left out: " + count(noTrain) + " of training, " + count(noTest) + " of test samples." : ""),
    el("div", { class: "wide" }, heatMap(between)),
    el("details", {}, el("summary", {}, "As a table"),
      el("div", { class: "wide" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "train \\ test"), head)), el("tbody", {}, rows)))),
  ];
}

function layersPart() {
  if (!data.layers) return null;
  const rows = data.layers.names.map((name, at) => [name, data.layers.share[at]]);
  return [
    el("h2", {}, "Which layers carry it"),
    el("p", { class: "muted" }, "Share of each layer in all influences; they sum to 100 %.",
      data.layers.left_out ? " The " + rows.length + " of largest share; " + data.layers.left_out + " more are left out." : ""),
    barChart(rows, percent, "Share of each layer: " + rows.map(([name, share]) => name + " " + percent(share)).join(", ")),
  ];
}
