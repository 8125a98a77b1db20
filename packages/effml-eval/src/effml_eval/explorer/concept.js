// The panel of the selected concept: its numbers, bridges, strongest inputs and nearest atoms.

function drawConcept(panel, c) {
  const images = record.inputsOf(c, "image"),
    texts = record.inputsOf(c, "text"),
    nearest = record.nearestOf(c);
  const parts = [
    make("button", { type: "button", id: "back" }, "← All concepts", make("kbd", { ariaHidden: "true" }, "Esc")),
    drawHeading(c),
    record.alive(c) ? make("section", drawGauge(record.score[c]), drawByModality(c)) : null,
    drawNumbers(c),
    record.hasBridges ? drawBridges(c) : null,
    images.length ? section("Strongest images", count(images.length, "image"), drawImages(images)) : null,
    texts.length ? section("Strongest texts", count(texts.length, "text"), drawTexts(texts)) : null,
    nearest.length ? section("Nearest atoms", "cosine", drawNearest(nearest)) : null,
  ];
  panel.replaceChildren(...parts.filter(part => part !== null));
}

const part = (share, tone) =>
  make("span.part", {
    style: { "--part": Math.max(0, Math.min(1, share)), ...(tone && { "--tone": tone }) },
    ariaHidden: "true",
  });

function drawHeading(c) {
  const name = record.nameOf(c),
    total = record.n.toLocaleString("en");
  const kind = record.alive(c)
    ? `${kindOf(c)}, rank ${record.rank[c].toLocaleString("en")} of ${total} by energy`
    : "dead: fires on nothing it was measured on";
  return make(
    "div.concept",
    make("h2", { tabIndex: -1, id: "concept" }, swatch(c), `Concept ${c}`),
    name ? make("p.title", name) : null,
    make("p.sub", kind),
  );
}

function drawGauge(score) {
  const gauge = make(
    "div.gauge",
    { role: "img", ariaLabel: `modality score ${score.toFixed(2)}`, style: { "--at": score } },
    make("i"),
  );
  const ends = make(
    "div.ends",
    make("span", "text"),
    make("strong", `modality score ${score.toFixed(2)}`),
    make("span", "images"),
  );
  return [gauge, ends];
}

function drawByModality(c) {
  const line = (title, show, text, image) => {
    const most = Math.max(text, image) || 1;
    const cell = (value, score) => make("td", part(value / most, scale(score)), make("span.value", show(value)));
    return make("tr", make("th", { scope: "row" }, title), cell(text, 0), cell(image, 1));
  };
  const { text_energy, image_energy, text_rate, image_rate } = record.columns;
  const head = make(
    "tr",
    make("td"),
    make("th", { scope: "col" }, "on text"),
    make("th", { scope: "col" }, "on images"),
  );
  const energy = line("Energy", brief, text_energy[c], image_energy[c]),
    rate = line("Fires on", percent, text_rate[c], image_rate[c]);
  return make("table", make("thead", head), make("tbody", energy, rate));
}

function drawNumbers(c) {
  const { stability, alignment, probe_accuracy, atom_norm } = record.columns,
    partner = record.partner?.[c] ?? -1;
  const line = (title, meaning, value, share = null) =>
    make(
      "div",
      make("dt", title, make("small", meaning)),
      make("dd", share === null || Number.isNaN(share) ? null : part(share), make("span.value", brief(value))),
    );
  return make(
    "dl.numbers",
    stability &&
      line(
        "Stability",
        partner >= 0 ? `cosine to atom ${partner} of the other run` : "no partner in the other run",
        stability[c],
        stability[c],
      ),
    alignment && line("Alignment", "|cosine| with the modality axis", alignment[c], alignment[c]),
    line(
      "Modality probe",
      "balanced accuracy of its best threshold; chance is .5",
      probe_accuracy[c],
      2 * probe_accuracy[c] - 1,
    ),
    line("Atom norm", "", atom_norm[c]),
  );
}

function drawBridges(c) {
  const links = record.bridgesOf(c),
    whole = record.pairSimilarity;
  if (!links.length)
    return section(
      "Bridges",
      "",
      make("p.none", `None among the strongest ${record.bridgeCount.toLocaleString("en")} that were kept.`),
    );
  const lines = links.map(({ other, asImage, score }) => {
    const line = row(other, whole > 0 ? percent(score / whole) : brief(score), score / links[0].score);
    line.title = `bridge score ${brief(score)}`;
    line.querySelector(".number").append(make("small", other === c ? "itself" : asImage ? "on text" : "on images"));
    return line;
  });
  return section(
    "Bridges",
    whole > 0 ? "share of the pairs’ similarity" : "score",
    make("div.rows", { id: "bridges" }, lines),
  );
}

function drawImages(images) {
  const enlarged = event => event.target.classList.toggle("tiny", event.target.naturalWidth < 33); // show its pixels
  const figures = images.map(({ row, code, label, picture }) => {
    const text = label ?? `image ${row}`;
    const shown = picture ? make("img", { alt: text, onload: enlarged, src: picture }) : make("div.missing", text);
    return make("figure", { title: text }, shown, make("figcaption", brief(code)));
  });
  return make("div.images", figures);
}

const drawTexts = texts =>
  make(
    "ol.texts",
    texts.map(({ row, code, label }) => make("li", make("span", label ?? `text ${row}`), make("small", brief(code)))),
  );

const drawNearest = nearest =>
  make(
    "div.rows",
    nearest.map(({ other, cosine }) => row(other, brief(cosine), Math.max(0, cosine))),
  );
