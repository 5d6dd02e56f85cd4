// Small plots of the last minutes, one SVG each.

const LONGEST_MS = 5 * 60_000;
const SHORTEST_MS = 60_000;
const GAP_MS = 5_000; // nothing was heard for so long: the line breaks
const WIDTH = 300;
const HEIGHT = 60;
const SVG = "http://www.w3.org/2000/svg";

export class Plot {
  // series: [{name, value(live), mark}], values being numbers or null; mark: shown before the value, to tell it from others.
  // format: a value as [text, unit]; least: the scale's end, unless a value is larger.
  constructor({ title, help, series, format, least }) {
    Object.assign(this, { title, series, format, least, points: [], span: SHORTEST_MS });
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
    this.element = Object.assign(document.createElement("figure"), { title: help });
    this.element.append(caption, this.svg, this.top);
    this.draw();
  }

  add(live) {
    const now = Date.now();
    this.points.push({ at: now, values: this.series.map((each) => each.value(live)) });
    while (this.points[0].at < now - LONGEST_MS) this.points.shift();
    this.span = Math.max(SHORTEST_MS, now - this.points[0].at);
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
    this.top.textContent = this.format(most).join("");
    this.say(points.at(-1));
  }

  x({ at }) {
    return round(WIDTH * (1 - (this.points.at(-1).at - at) / this.span));
  }

  // part: of the width, from 0 to 1; null: nobody points.
  pointAt(part) {
    const end = this.points.at(-1)?.at;
    if (part === null || end === undefined) {
      this.pointed = null;
      this.cursor.setAttribute("d", "");
    } else {
      const wanted = end - this.span * (1 - part);
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
    const shown = this.series.map((_, i) => (point && point.values[i] !== null ? this.format(point.values[i]) : ["–", ""]));
    const unit = shown.at(-1)[1]; // once, if it is the same for all
    shown.forEach((value, i) => {
      this.values[i].dataset.mark = this.series[i].mark ?? "";
      this.values[i].textContent = value[1] === unit && i < shown.length - 1 ? value[0] : value.join("");
    });
    const words = this.series.map(({ name }, i) => `${name} ${shown[i].join("")}`);
    this.svg.setAttribute("aria-label", `${this.title}: ${words.join(", ")}; at most ${this.top.textContent}`);
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
