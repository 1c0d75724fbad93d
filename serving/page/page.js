// The search page: what is asked lives in the address (never an image), so that back, forward and links work.

import { FIRST, MOST, addressOf, parse } from "./address.js";
import { Failure, ask, forgetKey, hasKey, keepKey } from "./api.js";
import { readImage } from "./image.js";
import { showAnswered, showFailure, showHits, showQuery, walkWithArrows } from "./results.js";

const RERANKED = 50; // the service re-orders so many
const find = (id) => document.getElementById(id);
const images = new Map(); // of this visit: number -> {url, name}
const seen = new Map(); // rows that were shown: "side id" -> hit
let models = [];
let state = {};
let shown = 0;
let running = null; // AbortController of the newest search

/* Asking */

/** Asks for the state with `changes`, as a new step of the history. */
function go(changes) {
  state = { ...state, ...changes };
  if (addressOf(state) !== location.hash) history.pushState(null, "", addressOf(state));
  show();
}
const NOTHING = { text: "", id: "", image: "", count: FIRST };

/** Changes a control; words that stand in the field and were not asked yet are asked along. */
function turn(changes) {
  const text = find("text").value.trim();
  go({ ...(text && text !== state.text ? { ...NOTHING, text } : {}), count: FIRST, ...changes });
}

const asks = ({ text, id, image }) => Boolean(text || id || image);
const served = () => models.find((one) => (state.version ? one.label === state.version : one.current));
const modality = ({ image }) => (image ? "image" : "text");
const mayRerank = () => Boolean(served()?.matching) && !state.id && modality(state) !== state.target;

/** Whether the row that is asked for is itself among what is found, as its own nearest neighbour: it is left out. */
const toItself = () => Boolean(state.id) && state.side === state.target;

function body() {
  const query = state.id ? { id: state.id, side: state.side }
    : state.image ? { image: images.get(state.image).url } : { text: state.text };
  const { target, count } = state;
  if (state.rerank && mayRerank()) return { ...query, target, top_k: Math.min(count, RERANKED), rerank: true };
  return { ...query, target, top_k: count + (toItself() ? 1 : 0) };
}

/** Shows the controls and, where something is asked, its answer; an answer that is overtaken is never shown. */
async function show() {
  running?.abort();
  settle();
  showFailure(null);
  showControls();
  if (!asks(state)) return showStart();
  find("start").hidden = true;
  showQuery(described());
  if (state.image && !images.has(state.image)) {
    showNothing();
    const advice = "Images are kept only while this page is open. Drop or choose it once more.";
    return showFailure(new Failure(400, "The image of this search is gone.", advice));
  }
  const mine = (running = new AbortController());
  document.body.classList.add("busy");
  find("results").setAttribute("aria-busy", "true");
  find("status").textContent = "Searching.";
  try {
    const asked = body();
    const answer = await ask("v1/search", { body: asked, version: state.version, signal: mine.signal });
    if (running === mine) showAnswer(answer, asked);
  } catch (error) {
    if (running === mine) showTrouble(error);
  } finally {
    if (running === mine) settle();
  }
}

function settle() {
  running = null;
  document.body.classList.remove("busy");
  find("results").removeAttribute("aria-busy");
}

function showAnswer(answer, asked) {
  for (const hit of answer.data.data) seen.set(`${state.target} ${hit.id}`, hit);
  const hits = answer.data.data.filter((hit) => !(toItself() && hit.id === state.id));
  find("key").hidden = true;
  showQuery(described());
  showHits(hits, { target: state.target, chance: Boolean(asked.rerank), open: (hit) => openHit(hit) });
  const more = hits.length >= state.count && state.count < MOST && !asked.rerank;
  find("more").hidden = !more;
  find("status").textContent = summary(hits.length, asked);
  showAnswered(answer);
  if (state.count > FIRST && shown && shown < hits.length) find("hits").children[shown].firstChild.focus();
  shown = 0;
  if (!models.some((one) => one.current && one.label === answer.model) && !state.version) loadModels();
}

function summary(count, asked) {
  const things = state.target === "text" ? ["caption", "captions"] : ["image", "images"];
  if (!count) return `No ${things[1]} found.`;
  const order = asked.rerank ? "re-ranked by match probability" : "by cosine similarity";
  return `${count} ${things[count === 1 ? 0 : 1]}, ${order}.`;
}

/** What the panel beside the wall says of the query; a text stands in the field already. */
function described() {
  const own = images.get(state.image);
  if (own) return { image: own.url, title: "Nearest to this image", caption: own.name };
  if (!state.id) return null;
  const hit = seen.get(`${state.side} ${state.id}`);
  const title = state.side === "text" ? "Nearest to this caption" : "Nearest to this image";
  return { image: hit?.thumbnail, title, caption: hit?.caption || state.id };
}

function openHit(hit) {
  go({ ...NOTHING, id: hit.id, side: state.target });
  scrollTo({ top: 0 });
  find("results").focus({ preventScroll: true });
}

function showTrouble(error) {
  showNothing();
  if (!(error instanceof Failure)) throw error;
  if (error.status === 401) return askForKey(error);
  showFailure(error, [0, 429, 503, 504].includes(error.status) || error.status >= 500 ? show : null);
  if (error.status === 404) loadModels();
}

/* What is on the page */

function showNothing() {
  showHits([], { target: state.target });
  find("more").hidden = true;
  find("status").textContent = "";
  find("answered").textContent = "";
}

function showStart() {
  showNothing();
  showQuery(null);
  find("start").hidden = false;
}

function showControls() {
  find("text").value = state.text;
  document.title = state.text ? `${state.text}: Triptych` : "Triptych: search";
  for (const radio of document.getElementsByName("target")) radio.checked = radio.value === state.target;
  showRerank();
  showVersions();
}

function showRerank() {
  const possible = mayRerank() || !asks(state);
  find("rerank-option").hidden = !served()?.matching;
  find("rerank").disabled = !possible;
  find("rerank").checked = state.rerank && possible;
  const reason = state.id ? "not for neighbours" : "only between words and images";
  find("rerank-note").textContent = possible || !served()?.matching ? "" : reason;
}

function showVersions() {
  const select = find("version");
  const current = models.find((one) => one.current);
  const options = models.filter((one) => one !== current).map((one) => new Option(one.label, one.label));
  if (current) options.unshift(new Option(`${current.label} (current)`, ""));
  const listed = !state.version || options.some((one) => one.value === state.version);
  if (!listed) options.push(new Option(`${state.version} (only)`, state.version));
  if (!options.length) options.push(new Option("not known", ""));
  select.replaceChildren(...options);
  select.value = state.version;
  select.disabled = options.length < 2;
  const index = served()?.index;
  const number = new Intl.NumberFormat("en");
  find("corpus").textContent = index ? `${number.format(index.images)} images, ${number.format(index.texts)} captions`
    : served() ? "no index loaded" : "";
}

/** Which versions are loaded; asked at the start and whenever another one answers. */
async function loadModels() {
  try {
    const { data } = await ask("v1/models");
    models = data.data.flatMap((one) => one.versions);
    find("alarm").textContent = data.alarm ? `A newer version is not served: ${data.alarm}` : "";
    showRerank();
    showVersions();
    find("forget").hidden = !hasKey();
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    if (error.status === 401) askForKey(error);
    else if (!asks(state)) showFailure(error, () => { showFailure(null); loadModels(); });
  }
}

function askForKey(failure) {
  find("key-title").textContent = failure.title;
  find("start").hidden = true;
  find("key").hidden = false;
  find("key-value").focus();
}

/* What the reader does */

async function take(file) {
  try {
    const image = await readImage(file);
    const number = String(Date.now());
    images.set(number, image);
    go({ ...NOTHING, image: number });
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    showFailure(error);
  }
}

function listen() {
  find("search").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = find("text").value.trim();
    if (text) go({ ...NOTHING, text });
    else if (asks(state) && !state.text) show();
    else find("text").focus();
  });
  for (const radio of document.getElementsByName("target")) {
    radio.addEventListener("change", () => turn({ target: radio.value }));
  }
  find("rerank").addEventListener("change", (event) => turn({ rerank: event.target.checked }));
  find("version").addEventListener("change", (event) => turn({ version: event.target.value }));
  find("more").addEventListener("click", () => {
    shown = state.count;
    go({ count: Math.min(MOST, state.count * 2) });
  });
  for (const id of ["pick", "pick-large"]) find(id).addEventListener("click", () => find("file").click());
  find("file").addEventListener("change", () => {
    const [file] = find("file").files;
    if (file) take(file);
    find("file").value = ""; // so that the same file can be chosen again
  });
  find("clear").addEventListener("click", () => {
    go(NOTHING);
    find("text").focus();
  });
  find("key").addEventListener("submit", (event) => {
    event.preventDefault();
    keepKey(find("key-value").value.trim());
    find("key-value").value = "";
    find("key").hidden = true;
    loadModels();
    show();
  });
  find("forget").addEventListener("click", () => {
    forgetKey();
    location.reload();
  });
  walkWithArrows(find("hits"));
  addEventListener("popstate", () => {
    state = parse(location.hash);
    show();
  });
}

function listenForImages() {
  addEventListener("paste", (event) => {
    const [file] = event.clipboardData?.files ?? [];
    if (!file) return;
    event.preventDefault();
    take(file);
  });
  let inside = 0;
  const carries = (event) => ["Files", "text/uri-list"].some((type) => event.dataTransfer?.types.includes(type));
  const hint = (depth) => {
    inside = Math.max(0, depth);
    find("drop").hidden = !inside;
  };
  addEventListener("dragenter", (event) => carries(event) && hint(inside + 1));
  addEventListener("dragleave", (event) => carries(event) && hint(inside - 1));
  addEventListener("dragover", (event) => carries(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    hint(0);
    if (!carries(event)) return;
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file) take(file);
    else showFailure(new Failure(400, "Only image files can be dropped.", "Save it first, or copy it and paste it here."));
  });
}

async function begin() {
  state = parse(location.hash);
  listen();
  listenForImages();
  const known = loadModels();
  if (asks(state)) await known; // only a known version says whether re-ranking is possible
  show();
}

begin();
