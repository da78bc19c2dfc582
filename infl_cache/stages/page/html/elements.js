/* Elements from names, attributes and children. Text is always a text node: data never become markup. */

function made(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

function el(tag, attributes, ...children) {
  return made(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return made(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function number(value, digits) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential((digits || 3) - 1);
  const whole = size < 1 ? 0 : Math.floor(Math.log10(size)) + 1; // digits before the point are never made up
  return String(Number(value.toPrecision(Math.max(digits || 3, whole))));
}

function signed(value) {
  if (value === null || value === undefined) return "-";
  return (value > 0 ? "+" : "") + (value === 0 ? "0" : value.toExponential(2));
}

function percent(value) {
  return value === null || value === undefined ? "-" : (100 * value).toFixed(1) + " %";
}

function count(value) {
  return value.toLocaleString("en-US");
}

function say(text) {
  document.getElementById("said").textContent = text;
}

function titled(text) {
  document.title = text + " - " + data.run;
  return el("h1", {}, text);
}
