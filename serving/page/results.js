// What is shown of an answer. Every text goes in as text, never as HTML.

const find = (id) => document.getElementById(id);

/** An element with a class and children (nodes or texts). */
export function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function image(source) {
  const made = document.createElement("img");
  made.alt = "";
  made.draggable = false; // else it could be dropped on this page as a file
  made.src = source;
  return made;
}

/** A search_hit as a button; `rank` from 1. */
function tile(hit, rank, chance) {
  const words = hit.caption || hit.id;
  const tile = hit.thumbnail
    ? element("span", "image", image(hit.thumbnail))
    : element("span", "image words", element("span", "", words));
  const bar = element("span", "bar");
  bar.style.setProperty("--share", String(Math.min(1, Math.max(0, hit.score))));
  const score = element("span", "score", element("b", "", hit.score.toFixed(3)), bar);
  const label = element("span", "label", score);
  if (hit.thumbnail) label.append(element("span", "caption", words));
  const button = element("button", "hit", tile, label);
  button.type = "button";
  button.title = words;
  const said = `${chance ? "Match" : "Score"} ${hit.score.toFixed(3)}`;
  button.setAttribute("aria-label", `${rank}. ${words}. ${said}. Show its neighbours.`);
  return button;
}

/** Fills the wall with `hits`; `open(hit)` is called for the one that is clicked. */
export function showHits(hits, { target, chance, open }) {
  const list = find("hits");
  list.className = target === "text" ? "hits texts" : "hits";
  list.replaceChildren(...hits.map((hit, index) => {
    const button = tile(hit, index + 1, chance);
    if (target === "text" && !hit.thumbnail) button.replaceChildren(asRow(button, hit));
    button.addEventListener("click", () => open(hit));
    return element("li", "", button);
  }));
}

/** A caption without an image: its words once, beside the score. */
function asRow(button, hit) {
  const label = button.querySelector(".label");
  label.append(element("span", "caption", hit.caption || hit.id));
  return label;
}

/** Arrow keys, Home and End move between the tiles, row by row. */
export function walkWithArrows(list) {
  list.addEventListener("keydown", (event) => {
    const tiles = [...list.querySelectorAll(".hit")];
    const here = tiles.indexOf(document.activeElement);
    if (here < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    const across = tiles.filter((other) => other.offsetTop === tiles[0].offsetTop).length;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across };
    const there = { Home: 0, End: tiles.length - 1 }[event.key] ?? here + steps[event.key];
    if (!tiles[there]) return; // another key, or the wall's edge
    event.preventDefault();
    tiles[there].focus();
  });
}

/** The panel that keeps an image or a row of the index in sight beside its neighbours; null hides it. */
export function showQuery(query) {
  find("query").hidden = !query;
  if (!query) return;
  find("query-frame").replaceChildren(...(query.image ? [image(query.image)] : []));
  find("query-title").textContent = query.title;
  find("query-caption").textContent = query.caption;
}

/** What went wrong, in words, with a way to try again where that may help. */
export function showFailure(failure, again) {
  const box = find("alert");
  box.replaceChildren();
  if (!failure) return;
  const words = element("div", "", element("strong", "", failure.title));
  if (failure.detail) words.append(element("span", "detail", failure.detail));
  box.append(words);
  if (!again) return;
  const button = element("button", "", "Try again");
  button.type = "button";
  button.addEventListener("click", again);
  box.append(button);
}

/** The line that says which version answered, and how fast. */
export function showAnswered({ model, space, milliseconds }) {
  const line = find("answered");
  line.replaceChildren(`Answered by ${model || "the service"} in ${Math.round(milliseconds)} ms`);
  if (space) line.append(", embedding space ", element("code", "", space));
}
