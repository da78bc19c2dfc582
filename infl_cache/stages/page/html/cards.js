/* Samples: as a thumbnail in a list, as a card among neighbours, large on their own page. */

/* Cells of a row that a card has room for. */
const mostCells = 10;

function seen(kind, id, words, most) {
  const sample = sampleOf(kind, id);
  if (!sample) return null;
  if (sample.png !== undefined) {
    const small = Math.max(...sample.size) <= 64;
    return el("img", { class: small ? "picture" : "picture smooth", src: "data:image/png;base64," + sample.png, alt: words || kind + " sample " + id,
      width: sample.size[0], height: sample.size[1] });
  }
  if (sample.cells) {
    const cells = most && sample.cells.length > most ? sample.cells.slice(0, most).concat([["...", sample.cells.length - most + " more"]]) : sample.cells;
    return el("table", { class: "cells" }, el("tbody", {},
      cells.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value)))));
  }
  return el("p", { class: "quote" }, sample.text);
}

/* In a list: a row of a table is a line of text there. */
function thumb(kind, id) {
  const sample = sampleOf(kind, id);
  if (sample && sample.cells) {
    return el("p", { class: "quote" }, sample.cells.slice(0, 8).map(([name, value]) => name + " " + value).join(", "));
  }
  return seen(kind, id, "");
}

/* The class of a list's cell that holds a thumbnail. */
function thumbClass(kind) {
  const first = data.samples && Object.values(data.samples[kind])[0];
  return "seen thumb" + (first && first.png === undefined ? " words" : "");
}

function layoutOf(kind, ids) {
  const first = ids.map((id) => sampleOf(kind, id)).find((sample) => sample);
  return first && first.text !== undefined ? "cards text" : first && first.cells ? "cards table" : "cards";
}

/* Neighbours of a sample: a card for each [id, influence], a link where the sample is in this page. */
function cards(kind, pairs) {
  const most = Math.max(...pairs.map(([, value]) => Math.abs(value)), 1e-300);
  return el("ul", { class: layoutOf(kind, pairs.map(([id]) => id)) }, pairs.map(([id, value]) => {
    const there = kind === "test" ? testOf.get(id) : trainOf.get(id);
    const bar = el("i", { class: endOf(value) });
    bar.style.width = (100 * Math.abs(value)) / most + "%";
    const inside = [
      there && seen(kind, id, "", mostCells),
      el("p", {}, el("span", { class: "id" }, kind + " " + id), there ? ": " + labelText(there.label) : ", not in this page"),
      there && kind === "test" && isWrong(there) && el("p", { class: "wrong" }, "said " + labelText(there.said)),
      el("p", { class: endOf(value) }, signed(value)),
      el("div", { class: "bar" }, bar),
    ];
    return el("li", { class: "card" }, there ? el("a", { href: "#" + kind + "-" + id }, inside) : el("div", { class: "gone" }, inside));
  }));
}

function facts(rows) {
  return el("dl", {}, rows.filter((row) => row).map(([name, value, kind]) => [el("dt", {}, name), el("dd", { class: kind }, value)]));
}

/* A list's table: columns are [key, title, class, cell of a row]; clicking a title sorts by it. */
function listTable(rows, columns, list, redraw) {
  const head = columns.map(([key, title, kind]) => {
    const sorted = list.sort === key;
    const arrow = sorted ? (list.down ? " \u25bc" : " \u25b2") : "";
    const sort = () => {
      list.down = sorted ? !list.down : key !== "id" && key !== "label" && key !== "said";
      list.sort = key;
      redraw("sort-" + key);
    };
    return el("th", { scope: "col", class: kind, "aria-sort": sorted ? (list.down ? "descending" : "ascending") : null },
      title && key ? el("button", { type: "button", id: "sort-" + key, click: sort }, title + arrow) : el("span", { class: "unseen" }, title));
  });
  const body = rows.slice(0, list.rows).map((row) => el("tr", {}, columns.map(([, , kind, cell]) => el("td", { class: kind }, cell(row)))));
  const more = () => {
    list.rows += 200;
    redraw("");
  };
  return [
    el("div", { class: "wide" }, el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, body))),
    rows.length > list.rows && el("p", {}, el("button", { type: "button", click: more }, "Show more (" + count(rows.length - list.rows) + " left)")),
  ];
}

/* A field of a list's filters that keeps the focus while the list is drawn anew. */
function field(title, element, kind) {
  return kind === "tick" ? el("label", { class: "tick" }, element, title) : el("label", {}, title, element);
}

function choice(id, values, list, key, redraw) {
  const options = [...new Set(values)].filter((value) => value !== null).sort((a, b) => a - b);
  const select = el("select", { id, change: (event) => { list[key] = event.target.value; redraw(id); } },
    el("option", { value: "" }, "all"), options.map((value) => el("option", { value }, labelText(value))));
  select.value = list[key];
  return select;
}
