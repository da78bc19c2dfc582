/* What the page was made from, and how one finds a thing in it. */

const data = JSON.parse(document.getElementById("data").textContent);
const testOf = new Map(data.tests.map((test) => [test.id, test]));
const trainOf = new Map(Object.entries(data.trains).map(([id, train]) => [Number(id), Object.assign(train, { id: Number(id) })]));

/* Of each training sample the shown test samples among whose strongest it is: [test id, influence]. */
const nearOf = new Map();
for (const test of data.tests) {
  for (const end of ["helpful", "harmful"]) {
    for (const [id, value] of test[end]) {
      if (!nearOf.has(id)) nearOf.set(id, []);
      nearOf.get(id).push([test.id, value]);
    }
  }
}

function isHelpful(value) {
  return data.lower_helps ? value < 0 : value > 0;
}

function endOf(value) {
  return value === 0 || value === null ? "" : isHelpful(value) ? "helpful" : "harmful";
}

function labelText(value) {
  if (value === null || value === undefined) return "-";
  if (!Number.isInteger(value)) return number(value);
  return data.classes && value >= 0 && value < data.classes.length ? data.classes[value] : String(value);
}

function classed(values) {
  return values.every((value) => value === null || Number.isInteger(value)) && values.some((value) => value !== null);
}

const labelled = classed(data.tests.map((test) => test.label)) && classed(data.tests.map((test) => test.said));

function isWrong(test) {
  return labelled && test.label !== null && test.said !== null && test.label !== test.said;
}

function sampleOf(kind, id) {
  return data.samples ? data.samples[kind][id] : undefined;
}

/* The words by which a sample is searched, in lower case. */
function wordsOf(kind, id) {
  const sample = sampleOf(kind, id);
  if (!sample) return "";
  if (sample.text !== undefined) return sample.text.toLowerCase();
  return sample.cells ? sample.cells.flat().join(" ").toLowerCase() : "";
}

/* What the page remembers of its lists while one looks at a sample. */
const lists = {
  test: { search: "", label: "", said: "", wrong: false, loss: "", sort: "loss", down: true, rows: 100 },
  train: { search: "", label: "", which: data.suspects.ids.length ? "suspects" : "all", sort: "", down: true, rows: 100 },
};

function ordered(rows, list, values) {
  if (!list.sort || !values[list.sort]) return rows;
  const value = values[list.sort];
  const known = (row) => value(row) !== null && value(row) !== undefined;
  const compare = (a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0);
  const sorted = rows.filter(known).sort((a, b) => (list.down ? -compare(a, b) : compare(a, b)) || a.id - b.id);
  return sorted.concat(rows.filter((row) => !known(row)));
}
