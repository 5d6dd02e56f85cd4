// Small plots of the last minutes, one SVG each.

const SPAN_MS = 5 * 60_000;
const GAP_MS = 5_000; // nothing was heard for so long: the line breaks
const WIDTH = 300;
const HEIGHT = 60;
const SVG = "http://www.w3.org/2000/svg";

export class Plot {
  // series: [{name, value(live), class}], values being numbers or null. format: value to text. least: of the scale's end.
  constructor(title, series, format, least) {
    Object.assign(this, { title, series, format, least, points: [] });
    this.svg = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.area = this.svg.appendChild(svg("path", { class: "area" }));
    this.lines = series.map((_, i) => this.svg.appendChild(svg("path", { class: `line line-${i}` })));
    this.cursor = this.svg.appendChild(svg("path", { class: "cursor" }));
    this.svg.addEventListener("pointermove", (event) => this.pointAt(event.offsetX / this.svg.clientWidth));
    this.svg.addEventListener("pointerleave", () => this.pointAt(null));
    this.heading = document.createElement("span");
    this.values = series.map((_, i) => Object.assign(document.createElement("b"), { className: `value-${i}` }));
    this.top = Object.assign(document.createElement("small"), { className: "top" });
    const caption = document.createElement("figcaption");
    caption.append(this.heading, ...this.values);
    this.element = document.createElement("figure");
    this.element.append(caption, this.svg, this.top);
    this.draw();
  }

  add(live) {
    const now = Date.now();
    this.points.push({ at: now, values: this.series.map((each) => each.value(live)) });
    while (this.points[0].at < now - SPAN_MS) this.points.shift();
    this.draw();
  }

  draw() {
    const { points } = this;
    const most = niceCeiling(Math.max(this.least, ...points.flatMap(({ values }) => values)));
    const place = (point, i) => [this.x(point), round(HEIGHT - 1 - (HEIGHT - 4) * (point.values[i] / most))];
    this.lines.forEach((line, i) => {
      const runs = runsOf(points, i).map((run) => run.map((point) => place(point, i)));
      line.setAttribute("d", runs.map((run) => `M${run.join("L")}${run.length === 1 ? "h.1" : ""}`).join(""));
      const areas = runs.map((run) => `M${run[0][0]},${HEIGHT}L${run.join("L")}L${run.at(-1)[0]},${HEIGHT}Z`);
      if (i === 0) this.area.setAttribute("d", areas.join(""));
    });
    this.top.textContent = this.format(most);
    this.say(points.at(-1));
  }

  x({ at }) {
    return round(WIDTH * (1 - (this.points.at(-1).at - at) / SPAN_MS));
  }

  // part: of the width, from 0 to 1; null: nobody points.
  pointAt(part) {
    const end = this.points.at(-1)?.at;
    if (part === null || end === undefined) {
      this.pointed = null;
      this.cursor.setAttribute("d", "");
    } else {
      const wanted = end - SPAN_MS * (1 - part);
      const distance = ({ at }) => Math.abs(at - wanted);
      this.pointed = this.points.reduce((best, point) => (distance(point) < distance(best) ? point : best));
      this.cursor.setAttribute("d", `M${this.x(this.pointed)} 0V${HEIGHT}`);
    }
    this.say(this.points.at(-1));
  }

  say(latest) {
    const point = this.pointed ?? latest;
    const ago = this.pointed ? Math.round((latest.at - this.pointed.at) / 1000) : 0;
    this.heading.textContent = ago ? `${ago} s ago` : this.title;
    this.series.forEach((each, i) => {
      const value = point?.values[i] ?? null;
      this.values[i].textContent = value === null ? "–" : this.format(value);
      this.values[i].title = each.name;
    });
    const words = this.series.map((each, i) => `${each.name} ${this.values[i].textContent}`);
    this.svg.setAttribute("aria-label", `${this.title}: ${words.join(", ")}; the plot ends at ${this.top.textContent}`);
  }
}

// Stretches of points that have a value and are not far apart.
function runsOf(points, i) {
  const runs = [];
  let before = null;
  for (const point of points) {
    if (point.values[i] === null) before = null;
    else {
      if (before === null || point.at - before.at > GAP_MS) runs.push([]);
      runs.at(-1).push(point);
      before = point;
    }
  }
  return runs;
}

// The next of 1, 2, 5, 10, 20, ...
function niceCeiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => value <= step * power * 1.0001);
}

function round(value) {
  return Math.round(value * 10) / 10;
}

function svg(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
