// What keys do: walk over the map, the bars and the lists, search, zoom, go back.

const DIRECTIONS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const zooms = { in: () => map.zoomAt(1.5), out: () => map.zoomAt(1 / 1.5), all: () => map.showAll() };
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const typing = event.target.matches("input, select"),
    direction = DIRECTIONS[event.key];
  const act = () => {
    if (event.key === "Escape") return event.target === byId("search") ? leaveSearch() : goBack();
    if (event.target === byId("search") && (event.key === "Enter" || event.key === "ArrowDown"))
      return enterResults(event.key === "Enter");
    if (typing) return false;
    if (event.key === "/") return (byId("search").select(), byId("search").focus());
    if (event.target.matches(".bar") && direction?.[0]) return walkBars(event.target, direction[0]);
    if (event.target.matches(".row") && direction?.[1]) return walkRows(event.target, direction[1]);
    const zoom = { "+": zooms.in, "=": zooms.in, "-": zooms.out, 0: zooms.all }[event.key];
    if (zoom) return zoom();
    return direction && onMap(event.target) ? walkMap(...direction) : false;
  };
  if (act() !== false) event.preventDefault();
});
// The page of a narrow window scrolls, by the same keys.
const onMap = target => target === canvas || target.id === "concept" || (target === document.body && innerWidth > 860);
function walkMap(dx, dy) {
  const next = state.selected >= 0 ? map.next(state.selected, dx, dy) : (listed()[0] ?? -1);
  if (next >= 0) change({ selected: next });
}
function walkBars(bar, step) {
  const next = byId("panel").querySelectorAll(".bar")[Number(bar.dataset.bin) + step];
  if (next) {
    bar.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}
function walkRows(line, step) {
  const all = [...byId("panel").querySelectorAll(".row")];
  all[all.indexOf(line) + step]?.focus();
}
function enterResults(select) {
  if (select && state.query && listed().length) change({ selected: listed()[0] }, { focus: true });
  else byId("panel").querySelector(".row")?.focus();
}
function leaveSearch() {
  byId("search").value = "";
  change({ query: "" });
  canvas.focus();
}
function goBack() {
  const from = state.selected;
  if (from >= 0) {
    const inPanel = byId("panel").contains(document.activeElement);
    change({ selected: -1 });
    if (inPanel) (byId("panel").querySelector(`.row[data-concept="${from}"]`) ?? canvas).focus();
  } else {
    byId("search").value = "";
    change({ query: "", bin: -1, list: "energy" });
  }
}
