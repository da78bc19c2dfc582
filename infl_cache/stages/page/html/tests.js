/* Test samples: the list, and a page of each. */

const testValues = {
  id: (test) => test.id, label: (test) => test.label, said: (test) => test.said, loss: (test) => test.loss,
  helpful: (test) => (test.helpful.length ? Math.abs(test.helpful[0][1]) : null),
  harmful: (test) => (test.harmful.length ? Math.abs(test.harmful[0][1]) : null),
};

/* The test samples that the filters let through, in the order that is chosen. */
function testRows() {
  const list = lists.test, words = list.search.trim().toLowerCase();
  const found = data.tests.filter((test) =>
    (!list.wrong || isWrong(test)) &&
    (list.label === "" || test.label === Number(list.label)) &&
    (list.said === "" || test.said === Number(list.said)) &&
    (list.loss === "" || (test.loss !== null && test.loss >= Number(list.loss))) &&
    (words === "" || String(test.id) === words || labelText(test.label).toLowerCase().includes(words) ||
      labelText(test.said).toLowerCase().includes(words) || wordsOf("test", test.id).includes(words)));
  return ordered(found, list, testValues);
}

function testFilters(redraw) {
  const list = lists.test;
  const input = (id, key, kind, more) => el("input", { id, type: kind, value: list[key], ...more,
    input: (event) => { list[key] = event.target.value; list.rows = 100; redraw(id); } });
  const tick = el("input", { id: "wrong", type: "checkbox", checked: list.wrong, change: (event) => { list.wrong = event.target.checked; redraw("wrong"); } });
  return el("form", { class: "filters", role: "search", submit: (event) => event.preventDefault() },
    field("Search (id, label, text)", input("search", "search", "search", { autocomplete: "off" })),
    labelled && field("Label", choice("label", data.tests.map((test) => test.label), list, "label", redraw)),
    labelled && field("Predicted", choice("predicted", data.tests.map((test) => test.said), list, "said", redraw)),
    field("Loss at least", input("loss", "loss", "number", { min: 0, step: "any" })),
    labelled && field("wrong predictions only", tick, "tick"));
}

function testsView() {
  const place = el("div", {}), redraw = (focus) => {
    const rows = testRows();
    const strongest = (end) => (test) => el("span", { class: end }, test[end].length ? signed(test[end][0][1]) : "-");
    const columns = [
      data.samples && ["", "sample", thumbClass("test"), (test) => thumb("test", test.id)],
      ["id", "id", null, (test) => el("a", { href: "#test-" + test.id, class: "row" }, test.id)],
      ["label", "label", labelled ? null : "number", (test) => labelText(test.label)],
      ["said", "predicted", labelled ? null : "number", (test) => el("span", { class: isWrong(test) ? "wrong" : null }, labelText(test.said), isWrong(test) ? " (wrong)" : "")],
      ["loss", "loss", "number", (test) => number(test.loss)],
      ["helpful", "most helpful", "number less", strongest("helpful")],
      ["harmful", "most harmful", "number less", strongest("harmful")],
    ].filter((column) => column);
    const words = count(rows.length) + " of " + count(data.tests.length) + " test samples";
    place.replaceChildren(...[el("p", { id: "count" }, words), listTable(rows, columns, lists.test, redraw)].flat(Infinity).filter((each) => each));
    if (focus) say(words);
    if (focus && focus.startsWith("sort-")) document.getElementById(focus).focus();
  };
  redraw("");
  return [titled("Test samples"), testFilters(redraw), place];
}

function stepTo(kind, rows, id) {
  const at = rows.findIndex((row) => row.id === id);
  const link = (row, words, rel) => row && el("a", { href: "#" + kind + "-" + row.id, rel }, words + " (" + row.id + ")");
  const list = kind === "test" ? "#tests" : "#trains";
  return el("p", { class: "step" }, el("a", { href: list }, kind === "test" ? "All test samples" : "All training samples"),
    at > 0 && link(rows[at - 1], "Previous", "prev"), at >= 0 && link(rows[at + 1], "Next", "next"),
    at >= 0 && el("span", { class: "muted" }, count(at + 1) + " of " + count(rows.length)));
}

function testView(test) {
  const words = labelText(test.label) + ", predicted " + labelText(test.said);
  const end = (kind) => el("section", { "aria-labelledby": kind }, el("h2", { id: kind, class: kind }, "Most " + kind),
    test[kind].length ? cards("train", test[kind]) : el("p", {}, "None: the influences on this sample are not finite."));
  return [
    stepTo("test", testRows(), test.id),
    titled("Test sample " + test.id),
    el("div", { class: "asked" },
      data.samples && el("div", { class: "large" }, seen("test", test.id, "test sample " + test.id + ": " + words)),
      facts([
        ["label", labelText(test.label)],
        ["predicted", labelText(test.said) + (isWrong(test) ? " (wrong)" : ""), isWrong(test) ? "wrong" : null],
        ["loss", number(test.loss, 4)],
        ["residual", number(test.residual, 2) + (test.over ? ": over the tolerance of the solver" : ""), test.over ? "wrong" : null],
      ])),
    el("p", { class: "muted" }, data.sign),
    el("div", { class: "ends" }, end("helpful"), end("harmful")),
    test.layers && [el("h2", {}, "Which layers carry it"),
      barChart(data.layers.names.map((name, at) => [name, test.layers[at]]), percent,
        "Share of each layer: " + data.layers.names.map((name, at) => name + " " + percent(test.layers[at])).join(", "))],
  ];
}
