/* Training samples: the suspects, all that are in this page, and a page of each. */

const byWords = {
  self: "Largest self-influence: probably mislabelled, or unlike all others.",
  mean: "Most harmful on average over the test samples: mislabelled ones are often among them.",
};
const trainValues = {
  id: (train) => train.id, label: (train) => train.label, loss: (train) => train.loss, self: (train) => train.self,
  mean: (train) => (train.mean === undefined || train.mean === null ? null : data.lower_helps ? train.mean : -train.mean),
  near: (train) => (nearOf.get(train.id) || []).length,
};

function trainRows() {
  const list = lists.train, words = list.search.trim().toLowerCase();
  const among = list.which === "suspects" ? data.suspects.ids.map((id) => trainOf.get(id)) : [...trainOf.values()];
  const found = among.filter((train) =>
    (list.label === "" || train.label === Number(list.label)) &&
    (words === "" || String(train.id) === words || labelText(train.label).toLowerCase().includes(words) || wordsOf("train", train.id).includes(words)));
  return ordered(found, list, trainValues);
}

function trainsView() {
  const list = lists.train, all = [...trainOf.values()], place = el("div", {});
  const has = (key) => all.some((train) => train[key] !== undefined);
  const redraw = (focus) => {
    const rows = trainRows();
    const columns = [
      data.samples && ["", "sample", thumbClass("train"), (train) => thumb("train", train.id)],
      ["id", "id", null, (train) => el("a", { href: "#train-" + train.id, class: "row" }, train.id)],
      ["label", "label", classed(all.map((train) => train.label)) ? null : "number", (train) => labelText(train.label)],
      ["loss", "loss", "number", (train) => number(train.loss)],
      has("self") && ["self", "self-influence", "number", (train) => number(train.self)],
      has("mean") && ["mean", "mean influence", "number less", (train) => el("span", { class: endOf(train.mean) }, signed(train.mean))],
      ["near", "strong for", "number less", (train) => trainValues.near(train) + " tests"],
    ].filter((column) => column);
    const words = count(rows.length) + (list.which === "suspects" ? " suspects. " + byWords[data.suspects.by] : " of the " + count(all.length) + " training samples in this page");
    place.replaceChildren(...[el("p", { id: "count" }, words), listTable(rows, columns, list, redraw)].flat(Infinity).filter((each) => each));
    if (focus) say(words);
    if (focus && focus.startsWith("sort-")) document.getElementById(focus).focus();
  };
  const which = el("select", { id: "which", change: (event) => { list.which = event.target.value; list.sort = ""; list.rows = 100; redraw("which"); } },
    data.suspects.ids.length > 0 && el("option", { value: "suspects" }, "suspects"), el("option", { value: "all" }, "all in this page"));
  which.value = list.which;
  const search = el("input", { id: "search", type: "search", value: list.search, autocomplete: "off", input: (event) => { list.search = event.target.value; redraw("search"); } });
  redraw("");
  return [titled("Training samples"),
    el("form", { class: "filters", role: "search", submit: (event) => event.preventDefault() }, field("Which", which), field("Search (id, label, text)", search),
      classed(all.map((train) => train.label)) && field("Label", choice("label", all.map((train) => train.label), list, "label", redraw))),
    place];
}

function trainView(train) {
  const near = (nearOf.get(train.id) || []).slice().sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  const end = (name, words) => train[name] && el("section", {}, el("h2", { class: name === "helps" ? "helpful" : "harmful" }, words),
    train[name].length ? cards("test", train[name]) : el("p", {}, "None."));
  return [
    stepTo("train", trainRows(), train.id),
    titled("Training sample " + train.id),
    el("div", { class: "asked" },
      data.samples && el("div", { class: "large" }, seen("train", train.id, "training sample " + train.id + ": " + labelText(train.label))),
      facts([
        ["label", labelText(train.label)],
        ["loss", number(train.loss, 4)],
        train.self !== undefined && ["self-influence", number(train.self, 4)],
        train.mean !== undefined && ["mean influence", signed(train.mean), endOf(train.mean)],
        data.suspects.ids.includes(train.id) && ["suspect", "number " + (data.suspects.ids.indexOf(train.id) + 1) + (data.suspects.by === "self" ? " by self-influence" : " by mean harm")],
      ])),
    el("p", { class: "muted" }, data.sign),
    el("div", { class: "ends" }, end("helps", "Test samples it helps most"), end("harms", "Test samples it harms most")),
    near.length > 0 && [el("h2", {}, "In this page it is among the strongest for"),
      el("p", {}, near.slice(0, 24).map(([id, value], at) => [at ? ", " : "", el("a", { href: "#test-" + id }, "test " + id), " ", el("span", { class: endOf(value) }, signed(value))]), near.length > 24 ? " and " + count(near.length - 24) + " more" : "")],
  ];
}
