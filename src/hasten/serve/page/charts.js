// Live charts of the server's figures: one SVG each, the last five minutes, drawn anew with every second.
// All share one cursor, the age in seconds that is read; 0 is now.

const WINDOW_S = 300;

const decimals = (value, most) => value.toLocaleString("en", { maximumFractionDigits: most });
const count = (value) => decimals(value, value < 10 ? 1 : 0);
export const duration = (s) => (s < 1 ? `${count(s * 1000)} ms` : `${decimals(s, 1)} s`);
const share = (value) => `${count(value * 100)} %`;

// least: the smallest top of the vertical axis; memoryS: how far back a reading may look for a value
const CHARTS = [
  { title: "Output tokens/s", lines: [{ key: "tokensPerS" }], format: count, least: 10, memoryS: 3 },
  { title: "TTFT, mean of a second", lines: [{ key: "firstTokenS", mark: "dots" }], format: duration, least: 0.01, memoryS: WINDOW_S },
  {
    title: "Requests",
    lines: [{ key: "running", name: "running" }, { key: "waiting", name: "waiting", mark: "dashes" }],
    format: count,
    least: 5,
    memoryS: 3,
  },
  { title: "KV cache in use", lines: [{ key: "kvShare" }], format: share, least: 1, memoryS: 3 },
];

// A point from two answers of /page/figures; null where nothing is to be said.
function pointOf(before, now) {
  const seconds = now.time_s - before.time_s;
  const tokens = now.num_generated_tokens - before.num_generated_tokens;
  const firsts = now.num_first_tokens - before.num_first_tokens;
  return {
    tokensPerS: tokens < 0 ? null : tokens / seconds, // fewer than before: the engine was started again
    firstTokenS: firsts > 0 ? (now.sum_first_token_s - before.sum_first_token_s) / firsts : null,
    running: now.num_running,
    waiting: now.num_waiting,
    kvShare: now.num_kv_blocks ? now.num_used_kv_blocks / now.num_kv_blocks : 0,
  };
}

// The least of 1, 2, 5, 10, 20 … that is not below a value.
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((top) => top >= value * (1 - 1e-9));
}

function svg(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

class Chart {
  constructor(definition, figure) {
    Object.assign(this, definition, { figure });
    this.svg = figure.querySelector("svg");
    figure.querySelector(".title").textContent = this.title;
    this.paths = this.lines.map(({ mark = "" }) => this.svg.appendChild(svg("path", { class: `line ${mark}` })));
    this.values = this.lines.map(({ name = "", mark = "" }) => {
      const reading = document.createElement("span");
      const value = document.createElement("strong");
      if (name) {
        const key = svg("svg", { class: "key", viewBox: "0 0 24 6", "aria-hidden": "true" });
        key.append(svg("path", { class: `line ${mark}`, d: "M1 3H23" }));
        reading.append(key, `${name} `);
      }
      reading.append(value);
      figure.querySelector(".readings").append(reading);
      return value;
    });
  }

  draw(points, now, age) {
    const all = points.flatMap((point) => this.lines.map(({ key }) => point[key] ?? 0));
    const top = roundUp(Math.max(this.least, ...all));
    this.figure.querySelector(".top").textContent = this.format(top);
    this.lines.forEach(({ key, mark }, index) => {
      let d = "";
      let isDrawing = false;
      for (const point of points) {
        const value = point[key] ?? null;
        if (value !== null) {
          const place = `${(WINDOW_S - (now - point.time)).toFixed(1)} ${(100 - (value / top) * 100).toFixed(1)}`;
          d += isDrawing ? `L${place}` : `M${place}h0`; // h0: a point alone is a dot
        }
        isDrawing = value !== null && mark !== "dots";
      }
      this.paths[index].setAttribute("d", d);
    });
    this.read(points, now, age);
  }

  read(points, now, age) {
    const time = now - age + 0.5;
    const near = points.filter((point) => point.time <= time && point.time > time - this.memoryS);
    const texts = this.lines.map(({ key }) => {
      const point = near.findLast((each) => (each[key] ?? null) !== null);
      return point ? this.format(point[key]) : "–";
    });
    texts.forEach((text, index) => { this.values[index].textContent = text; });
    const cursor = this.svg.querySelector(".cursor");
    cursor.toggleAttribute("hidden", age === 0);
    cursor.setAttribute("x1", WINDOW_S - age);
    cursor.setAttribute("x2", WINDOW_S - age);
    const when = age === 0 ? "now" : `${age} s ago`;
    this.figure.querySelector(".middle").textContent = age === 0 ? "" : when;
    const readings = this.lines.map(({ name = "" }, index) => `${name} ${texts[index]}`.trim());
    this.svg.setAttribute("aria-label", `${this.title} over the last 5 minutes; ${when}: ${readings.join(", ")}`);
  }
}

export class Charts {
  constructor(container) {
    const template = container.querySelector("template");
    this.points = [];
    this.now = 0;
    this.age = 0;
    this.before = null;
    this.charts = CHARTS.map((chart) => {
      const figure = template.content.cloneNode(true).firstElementChild;
      template.before(figure);
      return new Chart(chart, figure);
    });
    this.draw();
    for (const { svg } of this.charts) {
      const point = ({ clientX }) => {
        const { left, width } = svg.getBoundingClientRect();
        this.read(WINDOW_S * (1 - (clientX - left) / width));
      };
      svg.addEventListener("pointermove", point);
      svg.addEventListener("pointerdown", point);
      svg.addEventListener("pointerleave", () => this.read(0));
      svg.addEventListener("blur", () => this.read(0));
      svg.addEventListener("keydown", ({ key }) => {
        const step = { ArrowLeft: 1, ArrowRight: -1 }[key];
        if (step) this.read(this.age + step);
      });
    }
  }

  // figures: what /page/figures answered, or null if it did not.
  add(figures) {
    this.now = performance.now() / 1000;
    if (figures && this.before) this.points.push({ time: this.now, ...pointOf(this.before, figures) });
    if (!figures) this.points.push({ time: this.now });
    this.before = figures;
    this.points = this.points.filter(({ time }) => this.now - time <= WINDOW_S);
    this.draw();
  }

  draw() {
    for (const chart of this.charts) chart.draw(this.points, this.now, this.age);
  }

  read(age) {
    this.age = Math.min(WINDOW_S, Math.max(0, Math.round(age)));
    for (const chart of this.charts) chart.read(this.points, this.now, this.age);
  }
}
