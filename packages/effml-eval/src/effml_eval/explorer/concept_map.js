// The map: one canvas, concepts as discs, one frame however many things have changed.
const HUES = 41; // steps of the colour scale
const LEAST = 3.5; // radius of a disc that is pointed out
const LINKS = 24; // bridges drawn at most
const LARGE = 1500; // discs with a rim at most

// From text (blue) through grey to images (orange), straight lines in OKLab: lightness alone already tells how shared.
function scale(score) {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches,
    side = 2 * score - 1,
    far = Math.abs(side);
  const [middle, end, chroma] = dark ? [0.48, 0.76, 0.14] : [0.83, 0.57, 0.16];
  return `oklch(${(middle + (end - middle) * far).toFixed(3)} ${(chroma * far).toFixed(3)} ${side < 0 ? 255 : 52})`;
}
const tone = c => (record.alive(c) ? scale(record.score[c]) : "var(--dead)");

class ConceptMap extends Places {
  redraw() {
    if (this.drawing) return;
    this.drawing = true;
    requestAnimationFrame(() => {
      this.drawing = false;
      this.draw();
    });
  }

  theme() {
    const style = getComputedStyle(document.documentElement),
      read = name => style.getPropertyValue(name).trim();
    this.ink = {
      page: read("--stage"),
      text: read("--ink"),
      soft: read("--soft"),
      line: read("--line"),
      dead: read("--dead"),
      dim: read("--dim"),
      link: read("--link"),
      font: getComputedStyle(document.body).fontFamily,
    };
    this.colours = Array.from({ length: HUES }, (_, i) => scale(i / (HUES - 1)));
    this.hue = Uint8Array.from(record.score, (score, c) => (record.alive(c) ? Math.round(score * (HUES - 1)) : HUES));
    this.redraw();
  }

  draw() {
    const pen = this.pen,
      links = this.selected >= 0 ? record.bridgesOf(this.selected).slice(0, LINKS) : [];
    this.count = { discs: 0, paints: 0 };
    pen.clearRect(0, 0, this.width, this.height);
    if (this.view === "chart") this.drawAxes();
    // Large discs one by one, so that each has its rim; small ones in one path per colour.
    const small = Array.from({ length: HUES }, () => []),
      faint = [],
      dead = [];
    pen.globalAlpha = this.selected >= 0 ? 0.4 : 0.92;
    pen.lineWidth = 1;
    pen.strokeStyle = this.ink.page;
    const large = [];
    for (const c of record.byEnergy) {
      const x = this.screenX(c),
        y = this.screenY(c),
        r = this.size(c);
      if (x < -r || y < -r || x > this.width + r || y > this.height + r) continue;
      if (!this.isLit(c)) faint.push(c);
      else if (this.hue[c] === HUES) dead.push(c);
      else (r < 4 || large.length === LARGE ? small[this.hue[c]] : large).push(c);
    }
    this.paint(faint, this.ink.dim);
    this.paint(dead, this.ink.dead, { hollow: true });
    for (const c of large) {
      this.paint([c], this.colours[this.hue[c]]);
      pen.strokeStyle = this.ink.page;
      pen.stroke();
    }
    small.forEach((concepts, hue) => this.paint(concepts, this.colours[hue]));
    pen.globalAlpha = 1;
    this.drawLinks(links);
    if (this.hovered >= 0) this.drawRing(this.hovered, 1.5, this.ink.soft);
    if (this.selected >= 0) this.drawRing(this.selected, 2, this.ink.text);
    this.drawNames(links);
    Object.assign(this.canvas.dataset, this.count);
  }

  paint(concepts, colour, { hollow = false, least = 0 } = {}) {
    if (!concepts.length) return;
    const pen = this.pen;
    pen.beginPath();
    for (const c of concepts) {
      const x = this.screenX(c),
        y = this.screenY(c),
        r = Math.max(this.size(c), least);
      pen.moveTo(x + r, y);
      pen.arc(x, y, r, 0, 7);
    }
    if (hollow) {
      pen.strokeStyle = colour;
      pen.stroke();
    } else {
      pen.fillStyle = colour;
      pen.fill();
    }
    this.count.discs += concepts.length;
    this.count.paints += 1;
  }

  drawRing(c, width, colour) {
    const pen = this.pen;
    if (record.alive(c)) this.paint([c], this.colours[this.hue[c]], { least: LEAST });
    pen.beginPath();
    pen.arc(this.screenX(c), this.screenY(c), Math.max(this.size(c), LEAST) + 2.5, 0, 7);
    [pen.lineWidth, pen.strokeStyle] = [width, colour];
    pen.stroke();
  }

  drawLinks(links) {
    const pen = this.pen,
      strongest = links[0]?.score ?? 1;
    const others = [...new Set(links.map(link => link.other))].filter(other => other !== this.selected);
    const [x0, y0] = this.selected >= 0 ? [this.screenX(this.selected), this.screenY(this.selected)] : [0, 0];
    pen.strokeStyle = this.ink.link;
    for (const link of links.slice().reverse()) {
      if (link.other === this.selected) continue;
      const x = this.screenX(link.other),
        y = this.screenY(link.other),
        part = Math.sqrt(link.score / strongest);
      pen.beginPath();
      pen.moveTo(x0, y0);
      pen.quadraticCurveTo((x0 + x) / 2 - (y - y0) * 0.16, (y0 + y) / 2 + (x - x0) * 0.16, x, y);
      [pen.lineWidth, pen.globalAlpha] = [0.75 + 3 * part, 0.2 + 0.7 * part];
      pen.stroke();
    }
    pen.globalAlpha = 1;
    for (const other of others) {
      this.paint([other], record.alive(other) ? this.colours[this.hue[other]] : this.ink.dead, { least: LEAST + 0.6 });
      [pen.lineWidth, pen.strokeStyle] = [1.25, this.ink.page];
      pen.stroke();
    }
  }

  // Names of the selected concept and its strongest bridges, or of the named concepts of most energy; none over another.
  drawNames(links) {
    const pen = this.pen,
      taken = [];
    const write = (c, text, weight) => {
      pen.font = `${weight} 12px ${this.ink.font}`;
      const wide = pen.measureText(text).width,
        r = Math.max(this.size(c), LEAST),
        y = this.screenY(c);
      const x0 = this.screenX(c),
        inside = Math.max(4, Math.min(this.width - wide - 4, x0 - wide / 2));
      const places = [
        [x0 + r + 6, y],
        [x0 - r - 6 - wide, y],
        [inside, y + r + 13],
        [inside, y - r - 13],
      ];
      for (const [x, middle] of places) {
        const box = [x - 2, middle - 8, x + wide + 2, middle + 8];
        const free =
          box[0] > 0 &&
          box[2] < this.width &&
          taken.every(other => box[2] < other[0] || box[0] > other[2] || box[3] < other[1] || box[1] > other[3]);
        if (!free) continue;
        taken.push(box);
        pen.textBaseline = "middle";
        [pen.lineWidth, pen.lineJoin, pen.strokeStyle, pen.fillStyle] = [4, "round", this.ink.page, this.ink.text];
        pen.strokeText(text, x, middle);
        pen.fillText(text, x, middle);
        return;
      }
    };
    if (this.selected >= 0) {
      const listed = [
        this.selected,
        ...new Set(links.map(link => link.other).filter(other => other !== this.selected)),
      ].slice(0, 9);
      for (const c of listed) {
        // a name may not cover another disc that matters
        const x = this.screenX(c),
          y = this.screenY(c),
          r = Math.max(this.size(c), LEAST) + 2;
        taken.push([x - r, y - r, x + r, y + r]);
      }
      for (const c of listed)
        write(c, `#${c} ${shorten(record.nameOf(c), 24)}`.trim(), c === this.selected ? 650 : 500);
      return;
    }
    let written = 0;
    for (const c of record.byEnergy) {
      if (written === 40) break;
      if (c in record.names && this.isLit(c) && this.screenX(c) > 0 && this.screenX(c) < this.width) {
        write(c, shorten(record.names[c], 24), 500);
        written++;
      }
    }
  }

  drawAxes() {
    const pen = this.pen,
      { up, left, wide, high } = this.room;
    pen.font = `12px ${this.ink.font}`;
    [pen.fillStyle, pen.strokeStyle, pen.lineWidth, pen.textBaseline] = [this.ink.soft, this.ink.line, 1, "middle"];
    pen.textAlign = "center";
    for (const score of [0, 0.25, 0.5, 0.75, 1]) {
      const x = this.axisX(score) * this.zoom + this.shiftX;
      if (x < left - 1) continue;
      pen.beginPath();
      pen.moveTo(x, up - 16);
      pen.lineTo(x, up + high + 8);
      pen.stroke();
      pen.fillText(
        { 0: "text only", 0.5: "shared", 1: "images only" }[score] ?? String(score).replace("0.", "."),
        x,
        up - 30,
      );
    }
    pen.textAlign = "right";
    const apart = (high * this.zoom) / (this.most - this.least),
      marks = apart > 90 ? [1, 2, 5] : [1];
    for (let power = Math.floor(this.least); power <= Math.ceil(this.most); power++)
      for (const mark of marks) {
        const y = this.axisY(power + Math.log10(mark)) * this.zoom + this.shiftY;
        if (y < up - 2 || y > up + high + 8) continue;
        pen.beginPath();
        pen.moveTo(left - 30, y);
        pen.lineTo(left + wide + 30, y);
        pen.stroke();
        pen.fillText(brief(mark * 10 ** power, 1).replace(".0e", "e"), left - 38, y);
      }
    pen.textAlign = "left";
    pen.fillText("energy", 14, up - 14);
    if (record.dead.length) pen.fillText("dead", 14, this.screenY(record.dead[0]));
  }
}

const shorten = (text, length) => (text.length > length ? text.slice(0, length - 1).trimEnd() + "…" : text);
function brief(value, digits = 3) {
  if (value === 0 || Number.isNaN(value)) return value === 0 ? "0" : "–";
  const size = Math.abs(value);
  const text =
    size >= 1e5 || size < 1e-4 ? value.toExponential(1) : size >= 100 ? value.toFixed(0) : value.toPrecision(digits);
  return text.replace("-", "−");
}
