// The record: columns as typed arrays, what follows from them, lists and search. Nothing here touches the page.
const record = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const decode = (text, Type) =>
    text === null ? null : new Type(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
  const floats = text => decode(text, Float32Array),
    integers = text => decode(text, Int32Array);
  const n = data.concepts,
    columns = {};
  for (const [name, text] of Object.entries(data.columns)) columns[name] = floats(text);

  const energy = Float32Array.from({ length: n }, (_, c) => (columns.image_energy[c] + columns.text_energy[c]) / 2);
  const everyone = Array.from({ length: n }, (_, c) => c);
  const sorted = (concepts, key) => concepts.slice().sort((a, b) => key(b) - key(a) || a - b);
  const byEnergy = Int32Array.from(sorted(everyone, c => energy[c]));
  const rank = new Int32Array(n);
  byEnergy.forEach((c, i) => {
    rank[c] = i + 1;
  });
  const alive = c => energy[c] > 0;

  const top = {},
    labels = {};
  for (const side of ["image", "text"]) {
    const { rows, codes, count } = data.top[side];
    top[side] = { rows: integers(rows), codes: floats(codes), count };
    labels[side] = new Map(Object.entries(data.labels[side]).map(([row, label]) => [Number(row), label]));
  }
  const inputsOf = (c, side) => {
    const { rows, codes, count } = top[side],
      found = [];
    for (let i = c * count; i < (c + 1) * count && rows[i] >= 0; i++)
      found.push({
        row: rows[i],
        code: codes[i],
        label: labels[side].get(rows[i]),
        picture: side === "image" ? data.thumbnails[rows[i]] : undefined,
      });
    return found;
  };

  // What stands for a concept: its given name, or the strongest text or image that has a label.
  const nameOf = c =>
    data.names[c] ?? [...inputsOf(c, "text"), ...inputsOf(c, "image")].find(input => input.label)?.label ?? "";

  const bridges = data.bridges && {
    image: integers(data.bridges.image),
    text: integers(data.bridges.text),
    score: floats(data.bridges.score),
  };
  const edges = new Map(); // of a concept, strongest first, as they are stored
  bridges?.score.forEach((score, e) => {
    for (const c of new Set([bridges.image[e], bridges.text[e]]))
      edges.has(c) ? edges.get(c).push(e) : edges.set(c, [e]);
  });
  const bridgesOf = c =>
    (edges.get(c) ?? []).map(e => {
      const asImage = bridges.image[e] === c;
      return {
        image: bridges.image[e],
        text: bridges.text[e],
        other: asImage ? bridges.text[e] : bridges.image[e],
        asImage,
        score: bridges.score[e],
      };
    });

  const nearest = data.nearest && {
    ...data.nearest,
    indices: integers(data.nearest.indices),
    cosines: floats(data.nearest.cosines),
  };
  const nearestOf = c =>
    nearest === null
      ? []
      : Array.from({ length: nearest.count }, (_, i) => c * nearest.count + i).map(i => ({
          other: nearest.indices[i],
          cosine: nearest.cosines[i],
        }));

  // Lists of the panel: which concepts, in which order, and the number that stands beside each.
  const score = columns.modality_score;
  const among = (test, key) => () => sorted(everyone.filter(test), key);
  const list = (title, value, pick) => ({ title, value, pick });
  const ofScore = (title, test) =>
    list(
      title,
      c => score[c],
      among(
        c => test(score[c]),
        c => energy[c],
      ),
    );
  const ofColumn = (title, column, sign = 1) =>
    column &&
    list(
      title,
      c => column[c],
      among(
        c => !Number.isNaN(column[c]) && alive(c),
        c => sign * column[c],
      ),
    );
  const lists = {
    energy: list(
      "Most energy",
      c => energy[c],
      among(alive, c => energy[c]),
    ),
    bridges:
      bridges && list("Strongest bridges", null, () => sorted([...edges.keys()], c => bridges.score[edges.get(c)[0]])),
    image: ofScore("Images only, above .9", score => score > 0.9),
    text: ofScore("Text only, below .1", score => score < 0.1),
    shared: ofScore("Shared, .25 to .75", score => score >= 0.25 && score <= 0.75),
    stable: ofColumn("Most stable", columns.stability),
    unstable: ofColumn("Least stable", columns.stability, -1),
    aligned: ofColumn("Along the modality axis", columns.alignment),
    probed: ofColumn("Best modality probe", columns.probe_accuracy),
    dead: list(
      "Dead, no energy",
      c => columns.atom_norm[c],
      among(
        c => !alive(c),
        () => 0,
      ),
    ),
  };
  for (const name of Object.keys(lists))
    if (!lists[name] || (name === "dead" && everyone.every(alive))) delete lists[name];

  // Search: every word in the name, or in one text of the concept, without case and accents; a number also finds itself.
  const plain = text => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
  let plainLabels = null;
  const search = query => {
    const words = plain(query).split(/\s+/).filter(Boolean);
    if (!words.length) return null;
    plainLabels ??= Object.fromEntries(
      ["image", "text"].map(side => [side, [...labels[side]].map(([row, label]) => [row, plain(label)])]),
    );
    const holds = text => words.every(word => text.includes(word));
    const rows = {};
    for (const side of ["image", "text"])
      rows[side] = new Set(plainLabels[side].filter(([, text]) => holds(text)).map(([row]) => row));
    const number = /^#?\d+$/.test(query.trim()) ? Number(query.trim().replace("#", "")) : -1;
    const has = (c, side) => {
      const { rows: all, count } = top[side];
      for (let i = c * count; i < (c + 1) * count; i++) if (rows[side].has(all[i])) return true;
      return false;
    };
    const found = Array.from(byEnergy).filter(
      c => c !== number && ((c in data.names && holds(plain(data.names[c]))) || has(c, "text") || has(c, "image")),
    );
    return number >= 0 && number < n ? [number, ...found] : found;
  };

  // Modality scores in bins: how many concepts, and how much of all energy.
  const BINS = 20;
  const binOf = c => (Number.isNaN(score[c]) ? -1 : Math.min(BINS - 1, Math.floor(score[c] * BINS)));
  const histogram = Array.from({ length: BINS }, (_, i) => ({
    low: i / BINS,
    high: (i + 1) / BINS,
    count: 0,
    energy: 0,
  }));
  for (let c = 0; c < n; c++)
    if (binOf(c) >= 0) {
      histogram[binOf(c)].count += 1;
      histogram[binOf(c)].energy += energy[c];
    }
  const total = histogram.reduce((sum, bin) => sum + bin.energy, 0);
  for (const bin of histogram) bin.energy /= total || 1;

  return {
    n,
    rows: data.rows,
    columns,
    energy,
    byEnergy,
    rank,
    alive,
    score,
    nameOf,
    inputsOf,
    bridgesOf,
    nearestOf,
    lists,
    search,
    binOf,
    histogram,
    partner: integers(data.partner),
    hasBridges: bridges !== null,
    bridgeCount: bridges?.score.length ?? 0,
    pairSimilarity: data.pair_similarity,
    names: data.names,
    about: data.about,
    map: floats(data.map),
    dead: everyone.filter(c => !alive(c)),
  };
})();
