// The comparison of the checkpoint tensors of two jobs.
import {ask, at, make, table} from "./page-parts.js";

// Position on a logarithmic scale from 1e-9 (left end of the bar) to 10 (right end).
const place = value => value === null ? 1 : Math.min(1, Math.max(0, (Math.log10(value || 1e-9) + 9) / 10));
const digits = value => value === null ? "none" : value === 0 ? "0" : value.toExponential(1);

function row(found) {
  const words = found.ok === null ? "not compared" : found.ok ? "within" : "fails";
  const name = make("th", `${found.number} ${found.name}`, {scope: "row"}), gap = make("td", undefined, {class: "gap"});
  if (found.note) name.append(make("small", found.note, {class: found.ok === false ? "bad" : "dim"}));
  if (found.ok !== null) {
    const bar = make("span", undefined, {role: "img", title: `${found.compared} ${found.shape}`,
      "aria-label": `difference ${digits(found.max_abs)}, tolerance ${digits(found.tolerance)}: ${words}`});
    const fill = make("i"), mark = make("b");
    fill.style.width = `${Math.max(1, 100 * place(found.max_abs))}%`; mark.style.left = `${100 * place(found.tolerance)}%`;
    bar.append(fill, mark); gap.append(bar);
  }
  const numbers = found.ok === null ? ["", ""] : [digits(found.max_abs), digits(found.tolerance)];
  return make("tr", [name, gap, ...numbers.map(text => make("td", text)), make("td", words, found.ok === false ? {class: "bad"} : {})], found.ok === false ? {class: "fails"} : {});
}

at("check").onsubmit = async event => {
  event.preventDefault();
  const verdict = at("verdict");
  at("table").hidden = true; verdict.className = "dim"; verdict.textContent = "comparing …";
  try {
    const ids = new URLSearchParams({job: at("job").value.trim(), reference: at("reference").value.trim()});
    const found = await (await ask(`checkpoints.json?${ids}`)).json();
    at("table").replaceChildren(table(["checkpoint", "", "difference", "tolerance", ""], found.rows.map(row),
      "The largest difference of each checkpoint on a scale from 1e-9 to 10; the mark is the tolerance."));
    at("table").hidden = false;
    const failing = found.rows.filter(each => each.ok === false).length, all = found.rows.filter(each => each.ok !== null).length;
    verdict.className = failing ? "bad" : "good";
    verdict.textContent = failing ? `${failing} of ${all} checkpoints differ by more than the tolerance for float32` : `All ${all} common checkpoints are within the tolerance.`;
  } catch (error) { verdict.className = "bad"; verdict.textContent = error.message; }
};

export function openComparison(job, reference) {
  at("job").value = job; at("reference").value = reference;
  at("check").requestSubmit();
}
