// What the panel, the search box and the buttons do; and the beginning.

byId("panel").addEventListener("click", event => {
  const line = event.target.closest(".row"),
    bar = event.target.closest(".bar");
  if (line) change({ selected: Number(line.dataset.concept) }, { focus: true });
  if (event.target.closest("#back")) goBack();
  if (bar) {
    const bin = Number(bar.dataset.bin);
    change({ bin: state.bin === bin ? -1 : bin });
    byId("panel").querySelectorAll(".bar")[bin].focus();
  }
});
byId("panel").addEventListener("change", event => {
  if (event.target.id === "list") {
    change({ list: event.target.value });
    byId("list").focus();
  }
});
byId("panel").addEventListener("pointerover", event => {
  const line = event.target.closest(".row"),
    c = line ? Number(line.dataset.concept) : -1;
  if (c !== map.hovered) {
    map.hovered = c;
    map.redraw();
  }
});
byId("panel").addEventListener("pointerleave", () => {
  map.hovered = -1;
  map.redraw();
});
let waiting = 0;
byId("search").addEventListener("input", event => {
  clearTimeout(waiting);
  waiting = setTimeout(() => change({ query: event.target.value.trim(), selected: -1, bin: -1 }), 80);
});
byId("views").addEventListener("click", event => {
  const { view } = event.target.dataset;
  if (view) {
    map.setView(view);
    show();
  }
});
byId("zoom").addEventListener("click", event => zooms[event.target.closest("button")?.dataset.zoom]?.());

function drawLegend() {
  const stops = Array.from({ length: 9 }, (_, i) => scale(i / 8)).join(",");
  document.documentElement.style.setProperty("--scale", `linear-gradient(90deg,${stops})`);
  byId("legend").replaceChildren(
    make("span", "text", make("i.ramp"), "images"),
    make("span", make("i.sizes", make("b"), make("b"), make("b")), "energy"),
    ...(record.dead.length
      ? [
          make(
            "span",
            make("i.swatch.hollow", { style: { "--tone": "var(--dead)" } }),
            `${record.dead.length.toLocaleString("en")} dead`,
          ),
        ]
      : []),
  );
}
const parts = [count(record.n, "concept"), `${count(record.rows[0], "image")}, ${count(record.rows[1], "text")}`];
if (record.dead.length) parts.push(`${record.dead.length.toLocaleString("en")} dead`);
if (record.pairSimilarity !== null) parts.push(`pair similarity ${brief(record.pairSimilarity)}`);
document.documentElement.style.setProperty("--digits", `${String(record.n).length + 1.5}ch`);
byId("summary").textContent = parts.join("  ·  ");
byId("views").hidden = record.map === null;
const restyle = () => {
  map.theme();
  drawLegend();
  show();
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
new ResizeObserver(() => map.resize()).observe(canvas);
map.theme();
drawLegend();
readAddress();
