// The throughput chart: axes, and the value under the pointer or at the arrow keys.
import {at, count, make, short} from "./page-parts.js";

const SPAN_S = 600, LEFT = 46, RIGHT = 10, TOP = 12, BOTTOM = 24;
let drawn = {rates: [], now: 0, top: 1}, chosen = null;

function shape(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// The next number of the form 1, 2 or 5 times a power of ten.
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map(digit => digit * power).find(number => number >= value);
}

export function showChart(rates, now) {
  const most = Math.max(0, ...rates.map(([, rate]) => rate));
  drawn = {rates, now, top: roundUp(Math.max(10, most))};
  const latest = rates.length ? rates[rates.length - 1][1] : 0;
  at("most").textContent = `new tokens per second, all workers, the last ten minutes; at most ${count(most)}`;
  at("chart").setAttribute("aria-label", `now ${count(latest)}, at most ${count(most)} tokens per second in the last ten minutes; arrow keys show single values`);
  draw();
}

function scales() {
  const chart = at("chart"), width = chart.clientWidth || 600, height = chart.clientHeight || 200;
  return {width, height, x: when => LEFT + (width - LEFT - RIGHT) * (1 - (drawn.now - when) / SPAN_S),
    y: rate => TOP + (height - TOP - BOTTOM) * (1 - rate / drawn.top)};
}

function draw() {
  const {width, height, x, y} = scales(), parts = [];
  for (const share of [0, 0.5, 1]) {
    const value = drawn.top * share;
    parts.push(shape("line", {class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value)}),
      shape("text", {x: LEFT - 8, y: y(value) + 4, "text-anchor": "end"}, short(value)));
  }
  for (const minutes of width < 500 ? [10, 5, 0] : [10, 8, 6, 4, 2, 0]) {
    const anchor = minutes === 10 ? "start" : minutes ? "middle" : "end";
    parts.push(shape("text", {x: x(drawn.now - 60 * minutes), y: height - 5, "text-anchor": anchor}, minutes ? `${minutes} min ago` : "now"));
  }
  const shown = drawn.rates.filter(([when]) => drawn.now - when <= SPAN_S);
  if (shown.length > 1) {
    const points = shown.map(([when, rate]) => `${x(when).toFixed(1)},${y(rate).toFixed(1)}`).join(" ");
    parts.push(shape("polygon", {class: "area", points: `${x(shown[0][0])},${y(0)} ${points} ${x(shown[shown.length - 1][0])},${y(0)}`}),
      shape("polyline", {class: "curve", points}));
  }
  const point = chosen && shown.find(([when]) => when === chosen);
  at("tip").hidden = !point;
  if (point) {
    const left = x(point[0]), tip = at("tip"), ago = Math.max(0, Math.round(drawn.now - point[0]));
    parts.push(shape("line", {class: "cursor", x1: left, x2: left, y1: TOP, y2: height - BOTTOM}), shape("circle", {cx: left, cy: y(point[1]), r: 5}));
    tip.textContent = `${count(point[1])} tokens/s, ${!ago ? "now" : ago < 60 ? `${ago} s ago` : `${Math.floor(ago / 60)}:${String(ago % 60).padStart(2, "0")} min ago`}`;
    tip.style.left = `${Math.min(Math.max(0, left - tip.offsetWidth / 2), width - tip.offsetWidth)}px`;
  }
  at("chart").replaceChildren(...parts);
}

function choose(when) { chosen = when; draw(); }

at("chart").onpointermove = event => {
  if (!drawn.rates.length) return;
  const {x} = scales(), place = event.offsetX;
  choose(drawn.rates.reduce((best, [when]) => Math.abs(x(when) - place) < Math.abs(x(best) - place) ? when : best, drawn.rates[0][0]));
};
at("chart").onpointerleave = at("chart").onblur = () => choose(null);
at("chart").onkeydown = event => {
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (!step || !drawn.rates.length) return;
  event.preventDefault();
  const index = drawn.rates.findIndex(([when]) => when === chosen);
  choose(drawn.rates[Math.min(drawn.rates.length - 1, Math.max(0, index < 0 ? drawn.rates.length - 1 : index + step))][0]);
};
addEventListener("resize", draw);
