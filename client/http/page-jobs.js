// The views of jobs and batches. They show to whom a job belongs what it is doing, never what it says.
import {TIMEOUT_MS, ask, at, count, empty, fine, make, show, span, table} from "./page-parts.js";

let after = "";

const STATES = ["queued", "running", "succeeded", "failed", "cancelled", "expired"];
const chip = state => make("span", state.replace("_", " "), {class: `state ${state}`});
const again = () => dispatchEvent(new Event("headrace-refresh"));

function cancelButton(path, words) {
  const button = make("button", "Cancel", {type: "button", "aria-label": words, "data-cancel": path});
  return button;
}

// A narrow screen leaves out the beginning: the rows of a batch share it.
function shortId(id) {
  return make("span", [make("span", id.slice(0, -8), {class: "head"}), id.slice(-8)], {class: "id", title: id});
}

function jobRow(job) {
  const open = job.state === "queued" || job.state === "running";
  const took = job.ended_after_s === null ? "" : fine(job.ended_after_s);
  return make("tr", [make("td", shortId(job.id)), make("td", chip(job.state)), make("td", job.adapter ? [job.model, make("small", ` with ${job.adapter}`)] : job.model),
    make("td", `${span(job.age_s)} ago`), make("td", took),
    make("td", open ? cancelButton(`jobs/${job.id}/cancel`, `cancel job ${job.id}`) : "", {class: "act"})]);
}

export async function refreshJobs() {
  const query = new URLSearchParams({search: at("job-search").value.trim(), state: at("job-state").value, model: at("job-model").value, after});
  const found = await (await ask(`jobs.json?${query}`, {signal: AbortSignal.timeout(TIMEOUT_MS)})).json();
  const filtered = at("job-search").value || at("job-state").value || at("job-model").value;
  show(at("job-list"), found.data.length ? table(["job", "state", "model", "sent", "took", ""], found.data.map(jobRow))
    : empty(found.has_more ? "No job matches among those looked at. Look at older ones." : after ? "No older jobs." : filtered ? "No job matches." : "No jobs yet. Send one to /v1/completions, or try a prompt."));
  at("job-more").disabled = !found.has_more; at("job-first").disabled = !after;
  at("job-more").hidden = at("job-first").hidden = !found.has_more && !after;
  at("job-more").dataset.last = found.after;
  const numbers = STATES.filter(state => found.counts[state]).map(state => [state, found.counts[state]]), all = numbers.reduce((sum, [, number]) => sum + number, 0);
  at("job-note").textContent = (all >= 1000 ? "of the newest 1,000: " : "") + numbers.map(([state, number]) => `${count(number)} ${state}`).join(", ");
}

function batchCard(batch) {
  const {total, completed, failed} = batch.request_counts, parts = [make("i"), make("b")];
  parts[0].style.width = `${100 * completed / Math.max(1, total)}%`; parts[1].style.width = `${100 * failed / Math.max(1, total)}%`;
  const words = `${count(completed)} of ${count(total)} rows computed${failed ? `, ${count(failed)} failed` : ""}`;
  const bar = make("div", parts, {class: "progress", role: "progressbar", "aria-valuemin": 0, "aria-valuemax": total, "aria-valuenow": completed + failed, "aria-label": words});
  const head = make("div", [make("span", batch.id, {class: "id"}), chip(batch.status), make("small", `${span(Math.max(0, Date.now() / 1000 - batch.created_at))} ago`)], {class: "worker-head"});
  const card = make("article", head, {class: "card"});
  if (total) card.append(bar, make("small", words));
  if (["validating", "in_progress"].includes(batch.status)) head.append(cancelButton(`v1/batches/${batch.id}/cancel`, `cancel ${batch.id}`));
  if (batch.errors) card.append(make("p", batch.errors.data.slice(0, 3).map(error => `${error.line ? `line ${error.line}: ` : ""}${error.message}`).join("; "), {class: "bad"}));
  return card;
}

export async function refreshBatches() {
  const found = await (await ask("v1/batches?limit=50", {signal: AbortSignal.timeout(TIMEOUT_MS)})).json();
  show(at("batch-list"), ...(found.data.length ? found.data.map(batchCard) : [make("div", empty("No batches yet. Upload a file to ", make("code", "/v1/files"), " and create one at ", make("code", "/v1/batches"), "."), {class: "card"})]));
}

document.addEventListener("click", async event => {
  const button = event.target.closest("[data-cancel]");
  if (!button) return;
  button.disabled = true; button.textContent = "…"; at("refused").hidden = true;
  try { await ask(button.dataset.cancel, {method: "POST"}); } catch (error) { at("refused").textContent = `Not cancelled: ${error.message}`; at("refused").hidden = false; }
  again();
});
addEventListener("hashchange", () => { at("refused").hidden = true; });
at("filters").oninput = () => { after = ""; again(); };
at("filters").onsubmit = event => event.preventDefault();
at("job-more").onclick = () => { after = at("job-more").dataset.last; again(); };
at("job-first").onclick = () => { after = ""; again(); };
