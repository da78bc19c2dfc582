/* Which part is shown: the address after #. And the keys. */

function viewOf(address) {
  const found = /^(test|train)-(\d+)$/.exec(address);
  if (found) {
    const sample = (found[1] === "test" ? testOf : trainOf).get(Number(found[2]));
    if (!sample) return [titled(found[1] + " sample " + found[2]), el("p", {}, "It is not in this page. infl-cache report RUN --tests chooses test samples.")];
    return found[1] === "test" ? testView(sample) : trainView(sample);
  }
  return address === "tests" ? testsView() : address === "trains" ? trainsView() : overviewView();
}

/* The address before, whose link is focused in a list that one comes back to; what is to be focused instead. */
let before = location.hash.replace(/[^#a-z0-9-]/g, ""), wanted = "";

function show(moved) {
  const address = location.hash.slice(1) || "overview", main = document.getElementById("main");
  main.replaceChildren(...viewOf(address).flat(Infinity).filter((each) => each !== null && each !== undefined && each !== false));
  const part = address.startsWith("test") ? "tests" : address.startsWith("train") ? "trains" : "overview";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.getAttribute("href") === "#" + part) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (!moved) return;
  window.scrollTo(0, 0);
  const place = wanted ? document.getElementById(wanted) : document.querySelector('a.row[href="' + before + '"]');
  if (place) place.focus();
  else main.focus({ preventScroll: true });
  before = "#" + address.replace(/[^a-z0-9-]/g, "");
  wanted = "";
}

/* j, k and arrows: to the next or previous sample, or row of a list. */
function step(forward) {
  const link = document.querySelector(forward ? 'a[rel="next"]' : 'a[rel="prev"]');
  if (link) {
    location.hash = link.getAttribute("href");
    return true;
  }
  const rows = [...document.querySelectorAll("a.row")];
  if (!rows.length) return false;
  const at = rows.indexOf(document.activeElement);
  rows[at < 0 ? 0 : Math.max(0, Math.min(rows.length - 1, at + (forward ? 1 : -1)))].focus();
  return true;
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const field = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (field) {
    if (event.key === "Escape") document.getElementById("main").focus();
    return;
  }
  const sideways = /^#(test|train)-/.test(location.hash);
  let done = true;
  if (event.key === "j" || event.key === (sideways ? "ArrowRight" : "ArrowDown")) done = step(true);
  else if (event.key === "k" || event.key === (sideways ? "ArrowLeft" : "ArrowUp")) done = step(false);
  else if (event.key === "u" && sideways) location.hash = location.hash.startsWith("#test") ? "#tests" : "#trains";
  else if (event.key === "/") {
    const search = document.getElementById("search");
    if (search) search.focus();
    else {
      wanted = "search";
      location.hash = "#tests";
    }
  } else done = false;
  if (done) event.preventDefault();
}

function dressed() {
  const button = document.getElementById("scheme"), root = document.documentElement;
  let dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const name = () => { button.textContent = dark ? "Light" : "Dark"; button.setAttribute("aria-label", (dark ? "Light" : "Dark") + " colours"); };
  button.addEventListener("click", () => { dark = !dark; root.style.colorScheme = dark ? "dark" : "light"; name(); });
  name();
}

document.getElementById("name").textContent = data.run;
document.getElementById("skip").addEventListener("click", () => document.getElementById("main").focus());
window.addEventListener("hashchange", () => show(true));
document.addEventListener("keydown", pressed);
let drawn = window.innerWidth, waiting = 0;
window.addEventListener("resize", () => {
  clearTimeout(waiting);
  const drawing = /^#(tests|trains)$/.test(location.hash);
  waiting = setTimeout(() => { if (window.innerWidth !== drawn && !drawing) { drawn = window.innerWidth; show(false); } }, 150);
});
dressed();
show(false);
