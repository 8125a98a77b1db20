// Where concepts are on the screen: places in pixels at zoom 1, then one scale and one shift.
// A grid over the places finds the disc at a point.
const CELL = 24; // pixels
const MARGIN = { map: [36, 36, 36, 36], chart: [100, 72, 84, 92] }; // top, right, bottom, left

class Places {
  constructor(canvas) {
    this.canvas = canvas;
    this.pen = canvas.getContext("2d");
    this.view = record.map ? "map" : "chart";
    this.lit = null; // Uint8Array by concept, or null when all are
    this.selected = this.hovered = -1;
    this.x = new Float32Array(record.n);
    this.y = new Float32Array(record.n);
    this.radius = new Float32Array(record.n);
    this.resize();
  }

  redraw() {} // when a place or the view has changed

  resize() {
    const box = this.canvas.getBoundingClientRect(),
      dense = devicePixelRatio || 1;
    [this.width, this.height] = [Math.max(box.width, 120), Math.max(box.height, 120)];
    [this.canvas.width, this.canvas.height] = [Math.round(this.width * dense), Math.round(this.height * dense)];
    this.pen.setTransform(dense, 0, 0, dense, 0, 0);
    this.place();
  }

  place() {
    const [up, right, down, left] = MARGIN[this.view];
    this.room = { up, left, wide: this.width - left - right, high: this.height - up - down };
    if (this.view === "map") this.placeBySimilarity();
    else this.placeByEnergy();
    this.measure();
    this.index();
    this.showAll();
  }

  placeBySimilarity() {
    const { up, left, wide, high } = this.room;
    const half = 0.5 * Math.min(wide, high),
      across = Math.min(1.25 * half, 0.5 * wide);
    for (let c = 0; c < record.n; c++) {
      this.x[c] = left + wide / 2 + across * record.map[2 * c];
      this.y[c] = up + high / 2 + half * record.map[2 * c + 1];
    }
  }

  placeByEnergy() {
    const { up, left, wide, high } = this.room;
    const energies = record.energy.filter(e => e > 0).sort();
    [this.least, this.most] = energies.length ? [Math.log10(energies[0]), Math.log10(energies.at(-1))] : [-1, 0];
    if (this.most - this.least < 0.1) [this.least, this.most] = [this.least - 0.5, this.most + 0.5];
    for (let c = 0; c < record.n; c++) {
      // Those of one modality only are many: they spread beside the axis, at no score of their own.
      const score = record.score[c],
        beside = Math.min(28, 0.05 * wide) * ((c * 0.618034) % 1);
      this.x[c] = this.axisX(score) + (score > 0.995 ? beside : score < 0.005 ? -beside : 0);
      this.y[c] = this.axisY(Math.log10(record.energy[c]));
    }
    record.dead.forEach((c, i) => {
      [this.x[c], this.y[c]] = [left + (wide * (i + 0.5)) / record.dead.length, up + high + 30];
    });
  }
  axisX(score) {
    return this.room.left + this.room.wide * score;
  }
  axisY(power) {
    return this.room.up + (this.room.high * (this.most - power)) / (this.most - this.least);
  }

  // Areas say energy, above a smallest size; all of them together fill less than a third of the room.
  measure() {
    const area = this.room.wide * this.room.high,
      each = Math.sqrt(area / record.n);
    const most = record.energy[record.byEnergy[0]] || 1,
      sum = record.energy.reduce((total, e) => total + e / most, 0);
    const smallest = Math.min(3, Math.max(1.4, 0.12 * each));
    this.largest = Math.max(
      smallest,
      Math.min(20, Math.max(9, 0.5 * each), Math.sqrt((0.3 * area) / Math.PI / Math.max(1, sum))),
    );
    for (let c = 0; c < record.n; c++)
      this.radius[c] = Math.max(smallest, this.largest * Math.sqrt(record.energy[c] / most));
  }

  // The grid: concepts by cell in one array, and where each cell begins.
  index() {
    this.columns = Math.ceil(this.width / CELL) + 1;
    this.lines = Math.ceil(this.height / CELL) + 1;
    const cell = new Int32Array(record.n);
    this.begins = new Int32Array(this.columns * this.lines + 1);
    for (let c = 0; c < record.n; c++) {
      cell[c] = this.line(this.y[c]) * this.columns + this.column(this.x[c]);
      this.begins[cell[c] + 1]++;
    }
    for (let i = 0; i < this.columns * this.lines; i++) this.begins[i + 1] += this.begins[i];
    const next = this.begins.slice();
    this.members = new Int32Array(record.n);
    for (let c = 0; c < record.n; c++) this.members[next[cell[c]]++] = c;
  }
  column(x) {
    return Math.max(0, Math.min(this.columns - 1, Math.floor(x / CELL)));
  }
  line(y) {
    return Math.max(0, Math.min(this.lines - 1, Math.floor(y / CELL)));
  }

  screenX(c) {
    return this.x[c] * this.zoom + this.shiftX;
  }
  screenY(c) {
    return this.y[c] * this.zoom + this.shiftY;
  }
  size(c) {
    return this.radius[c] * Math.sqrt(this.zoom);
  }

  // The concept under a point of the screen, or the nearest within a few pixels, or -1.
  at(x, y, reach = 6) {
    const grow = Math.sqrt(this.zoom),
      near = (reach + this.largest * grow) / this.zoom;
    const bx = (x - this.shiftX) / this.zoom,
      by = (y - this.shiftY) / this.zoom;
    let best = -1,
      least = reach;
    for (let line = this.line(by - near); line <= this.line(by + near); line++)
      for (
        let i = this.begins[line * this.columns + this.column(bx - near)];
        i < this.begins[line * this.columns + this.column(bx + near) + 1];
        i++
      ) {
        const c = this.members[i],
          gap = Math.hypot(this.screenX(c) - x, this.screenY(c) - y) - this.size(c),
          distance = gap > 0 ? gap : -1 / this.size(c); // of those under the pointer the smallest, which lies on top
        if (distance < least && this.isLit(c)) [best, least] = [c, distance];
      }
    return best;
  }

  // The nearest concept within 45 degrees of a direction.
  next(from, dx, dy) {
    let best = -1,
      least = Infinity;
    for (let c = 0; c < record.n; c++) {
      const x = this.x[c] - this.x[from],
        y = this.y[c] - this.y[from],
        along = x * dx + y * dy,
        across = Math.abs(x * dy) + Math.abs(y * dx);
      if (c !== from && along > 0 && across <= along && this.isLit(c) && along + across < least)
        [best, least] = [c, along + across];
    }
    return best;
  }
  isLit(c) {
    return this.lit === null || this.lit[c] === 1 || c === this.selected;
  }

  // ---- view

  showAll() {
    [this.zoom, this.shiftX, this.shiftY] = [1, 0, 0];
    this.redraw();
  }
  zoomAt(factor, x = this.width / 2, y = this.height / 2) {
    const zoom = Math.max(0.6, Math.min(60, this.zoom * factor)),
      ratio = zoom / this.zoom;
    [this.zoom, this.shiftX, this.shiftY] = [zoom, x - (x - this.shiftX) * ratio, y - (y - this.shiftY) * ratio];
    this.redraw();
  }
  move(dx, dy) {
    this.shiftX += dx;
    this.shiftY += dy;
    this.redraw();
  }
  // Move so that a concept is in sight, if it is not.
  reveal(c) {
    const x = this.screenX(c),
      y = this.screenY(c);
    if (x < 20 || x > this.width - 20 || y < 20 || y > this.height - 20)
      this.move(this.width / 2 - x, this.height / 2 - y);
  }
  setView(view) {
    this.view = view;
    this.place();
  }
}
