// What the pointer does on the map: drag, pinch, wheel, point at a concept, select it.

const canvas = byId("map"),
  pointers = new Map();
let travelled = 0;
const place = event => {
  const box = canvas.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};
canvas.addEventListener("pointerdown", event => {
  canvas.setPointerCapture(event.pointerId);
  if (!pointers.size) travelled = 0;
  pointers.set(event.pointerId, place(event));
});
canvas.addEventListener("pointermove", event => {
  const [x, y] = place(event),
    before = pointers.get(event.pointerId);
  if (!before) return hover(map.at(x, y), x, y);
  const others = [...pointers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
  travelled += Math.hypot(x - before[0], y - before[1]);
  if (others.length === 1) {
    const [ox, oy] = others[0],
      apart = Math.hypot(before[0] - ox, before[1] - oy);
    if (apart > 0) map.zoomAt(Math.hypot(x - ox, y - oy) / apart, ox, oy);
  } else if (travelled > 4) map.move(x - before[0], y - before[1]);
  pointers.set(event.pointerId, [x, y]);
  hover(-1);
});
canvas.addEventListener("pointerup", event => {
  if (pointers.delete(event.pointerId) && travelled <= 4 && !pointers.size) {
    const hit = map.at(...place(event), event.pointerType === "touch" ? 16 : 6);
    change({ selected: hit });
  }
});
canvas.addEventListener("pointercancel", event => pointers.delete(event.pointerId));
canvas.addEventListener("pointerleave", () => hover(-1));
canvas.addEventListener(
  "wheel",
  event => {
    event.preventDefault();
    map.zoomAt(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0018)), ...place(event));
  },
  { passive: false },
);

function hover(c, x, y) {
  const tip = byId("tip");
  canvas.style.cursor = c >= 0 ? "pointer" : "";
  if (c >= 0) {
    tip.style.setProperty("--x", `${Math.min(x, map.width - 250)}px`);
    tip.style.setProperty("--y", `${y}px`);
    tip.classList.toggle("above", y > map.height - 110);
    if (c !== map.hovered)
      tip.replaceChildren(
        make("strong", `#${c} `, shorten(record.nameOf(c), 80)),
        make(
          "span",
          record.alive(c) ? `${kindOf(c)} (${record.score[c].toFixed(2)}), energy ${brief(record.energy[c])}` : "dead",
        ),
      );
  }
  tip.hidden = c < 0;
  if (c !== map.hovered) {
    map.hovered = c;
    map.redraw();
  }
}
