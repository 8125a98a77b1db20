// The panel while nothing is selected: modality scores, and a list of concepts or bridges.

function drawHistogram(state) {
  const scored = Math.max(1, record.n - record.dead.length);
  const highest = Math.max(...record.histogram.flatMap(bin => [bin.count / scored, bin.energy]), 1e-9);
  const bars = record.histogram.map((bin, i) => {
    const range = `score ${bin.low.toFixed(2)} to ${bin.high.toFixed(2)}`;
    const title = `${range}: ${count(bin.count, "concept")}, ${percent(bin.energy)} of the energy`;
    return make(
      "button.bar",
      {
        type: "button",
        "data-bin": i,
        ariaLabel: title,
        title,
        ariaPressed: String(state.bin === i),
        tabIndex: i === Math.max(state.bin, 0) ? 0 : -1,
        style: {
          "--tone": scale((i + 0.5) / record.histogram.length),
          "--count": bin.count / scored / highest,
          "--energy": bin.energy / highest,
        },
      },
      make("i"),
      make("b"),
    );
  });
  const ends = make("div.ends", make("span", "text only"), make("span", "shared"), make("span", "images only"));
  return make(
    "div",
    { className: state.bin < 0 ? "histogram" : "histogram some" },
    make("div.bars", { role: "group", ariaLabel: "Concepts by modality score" }, bars),
    ends,
    make("p.key", make("span.key-count"), "share of concepts", make("span.key-energy"), "share of energy"),
  );
}

function drawOverview(panel, state, listed) {
  const results = state.query ? make("h3", `Results for “${shorten(state.query, 40)}”`) : null,
    about = Object.entries(record.about);
  const head = make("div.list-head", results ?? drawPicker(state), make("small", count(listed.length, "concept")));
  const none = results ? "No concept has this in its name or its strongest inputs." : "None.";
  const parts = [
    results ? null : section("Modality", "click a bar to see its concepts", drawHistogram(state)),
    make("section.list", head, listed.length ? drawList(state, listed) : make("p.none", none)),
    results || !about.length
      ? null
      : make(
          "details",
          make("summary", "About this dictionary"),
          make("dl.facts", about.map(([key, value]) => [make("dt", key), make("dd", value)]).flat()),
        ),
  ];
  panel.replaceChildren(...parts.filter(part => part !== null));
}

function drawPicker(state) {
  const options = Object.entries(record.lists).map(([value, { title }]) =>
    make("option", { value, selected: value === state.list }, title),
  );
  return make("select", { id: "list", ariaLabel: "Which concepts" }, options);
}

function drawList(state, listed) {
  if (!state.query && state.list === "bridges") return drawBridgeList(listed);
  const most = record.energy[record.byEnergy[0]] || 1,
    byEnergy = state.query || state.list === "energy";
  if (byEnergy)
    return rows(
      listed,
      c => brief(record.energy[c]),
      c => record.energy[c] / most,
    );
  return rows(listed, c => brief(record.lists[state.list].value(c)));
}

function drawBridgeList(listed) {
  const pairs = new Set(),
    box = make("div.rows");
  for (const c of listed)
    for (const { image, text, score } of record.bridgesOf(c)) pairs.add(`${image} ${text} ${score}`);
  const strongest = [...pairs]
    .map(pair => pair.split(" ").map(Number))
    .sort((a, b) => b[2] - a[2])
    .slice(0, 100);
  for (const [image, text, score] of strongest)
    box.append(make("div.pair", row(image, ""), row(text, brief(score), score / strongest[0][2])));
  return [make("p.note", "Upper: the concept on images. Lower: the concept on text."), box];
}
