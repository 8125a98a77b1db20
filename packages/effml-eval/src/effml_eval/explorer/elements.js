// What both states of the panel are built from. All text enters as text, never as markup.

// make("p.note", { title }, "text", child): an element with classes; the properties may be left out.
function make(name, ...children) {
  const [tag, ...classes] = name.split("."),
    element = document.createElement(tag);
  const plain = children[0] !== null && Object.getPrototypeOf(children[0] ?? "") === Object.prototype;
  for (const [property, value] of Object.entries(plain ? children.shift() : {})) {
    if (property === "style")
      for (const [key, setting] of Object.entries(value)) element.style.setProperty(key, setting);
    else if (property in element) element[property] = value;
    else element.setAttribute(property, value);
  }
  element.classList.add(...classes);
  element.append(...children.flat().filter(child => child !== null)); // null: left out
  return element;
}
const section = (title, note, ...body) =>
  make("section", make("h3", title, note ? make("small", note) : null), ...body);
const swatch = c =>
  make("span", {
    className: record.alive(c) ? "swatch" : "swatch hollow",
    style: { "--tone": tone(c) },
    ariaHidden: "true",
  });
const count = (number, what) => `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;
const percent = part =>
  `${part > 0 && part < 0.01 ? brief(100 * part, 2) : (100 * part).toFixed(part < 0.1 ? 1 : 0)} %`;

function kindOf(c) {
  if (!record.alive(c)) return "dead";
  const score = record.score[c];
  return score > 0.9
    ? "images only"
    : score < 0.1
      ? "text only"
      : score > 0.75
        ? "mostly images"
        : score < 0.25
          ? "mostly text"
          : "shared";
}

// One line of a list: a concept, and a number or two.
function row(c, value, part = null) {
  return make(
    "button.row",
    { type: "button", "data-concept": c },
    swatch(c),
    make("span.number", `#${c}`),
    make("span.name", record.nameOf(c)),
    part === null ? null : make("span.part", { style: { "--part": part }, ariaHidden: "true" }),
    make("span.value", value),
  );
}

const STEP = 50; // rows of a list at a time
function rows(concepts, value, part = () => null) {
  const box = make("div.rows");
  const more = make("button.more", { type: "button" });
  let shown = 0;
  const extend = () => {
    box.append(...concepts.slice(shown, (shown += STEP)).map((c, i) => row(c, value(c, i), part(c, i))));
    more.hidden = shown >= concepts.length;
    more.textContent = `${count(concepts.length - shown, "more concept")}`;
  };
  more.onclick = extend;
  extend();
  return [box, more];
}
