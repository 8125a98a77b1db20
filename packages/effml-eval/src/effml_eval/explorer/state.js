// What is shown: one state, which is also the page's address.

const byId = id => document.getElementById(id);
const map = new ConceptMap(byId("map"));
const state = { selected: -1, query: "", list: "energy", bin: -1 };

// The concepts of the panel's list, which are also those that the map keeps bright; found once for each question.
const found = { question: "", concepts: [] };
function listed() {
  const { query, list, bin } = state,
    question = JSON.stringify([query, list, bin]);
  if (found.question !== question) {
    const picked = record.search(query) ?? record.lists[list].pick();
    found.concepts = bin < 0 || query ? picked : picked.filter(c => record.binOf(c) === bin);
    found.question = question;
  }
  return found.concepts;
}

function show({ focus = false } = {}) {
  const concepts = listed(),
    everything = !state.query && state.bin < 0 && state.list === "energy";
  map.lit = null;
  if (!everything) {
    map.lit = new Uint8Array(record.n);
    for (const c of concepts) map.lit[c] = 1;
  }
  map.selected = state.selected;
  map.hovered = -1;
  if (state.selected >= 0) {
    map.reveal(state.selected);
    drawConcept(byId("panel"), state.selected);
  } else drawOverview(byId("panel"), state, concepts);
  byId("panel").scrollTop = 0;
  if (focus && state.selected >= 0) {
    byId("concept").focus({ preventScroll: true });
    byId("concept").scrollIntoView({ block: "nearest" });
  }
  document.querySelectorAll("#views button").forEach(button => {
    button.ariaPressed = String(button.dataset.view === map.view);
  });
  byId("spoken").textContent = spoken(concepts);
  map.redraw();
  writeAddress();
}
function spoken(concepts) {
  if (state.selected < 0) return state.query ? count(concepts.length, "result") : "";
  return [`Concept ${state.selected}`, kindOf(state.selected), record.nameOf(state.selected)]
    .filter(Boolean)
    .join(", ");
}
function change(news, options) {
  Object.assign(state, news);
  show(options);
}

let written = location.hash;
function writeAddress() {
  const parts = new URLSearchParams();
  if (state.selected >= 0) parts.set("select", state.selected);
  if (state.query) parts.set("search", state.query);
  if (state.list !== "energy") parts.set("list", state.list);
  if (state.bin >= 0) parts.set("bin", state.bin);
  if (map.view !== (record.map ? "map" : "chart")) parts.set("view", map.view);
  const address = "#" + parts;
  if (address === (written || "#")) return;
  written = address;
  location.replace(address);
}
function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const index = (name, end) => {
    const value = parts.get(name);
    return value !== null && /^\d+$/.test(value) && Number(value) < end ? Number(value) : -1;
  };
  written = location.hash;
  map.setView(record.map && parts.get("view") !== "chart" ? "map" : "chart");
  byId("search").value = parts.get("search") ?? "";
  change({
    selected: index("select", record.n),
    query: byId("search").value,
    bin: index("bin", record.histogram.length),
    list: Object.hasOwn(record.lists, parts.get("list") ?? "") ? parts.get("list") : "energy",
  });
}
window.addEventListener("hashchange", () => {
  if (location.hash !== written) readAddress();
});
