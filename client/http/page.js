// The page: views, the status every two seconds, the overview. The other views are in files of their own.
import {Refused, TIMEOUT_MS, ask, at, count, empty, fine, make, short, show, span, sum, table} from "./page-parts.js";
import {showChart} from "./page-chart.js";
import {refreshBatches, refreshJobs} from "./page-jobs.js";
import {openComparison} from "./page-compare.js";
import {setModels} from "./page-try.js";

const INTERVAL_MS = 2000;
const VIEWS = ["overview", "jobs", "batches", "try", "compare"];
let view = "overview", last = null, timer = 0;

function openView() {
  const hash = location.hash.slice(1), asked = new URLSearchParams(hash);
  view = asked.get("job") && asked.get("reference") ? "compare" : VIEWS.includes(hash) ? hash : "overview";
  for (const name of VIEWS) at(`view-${name}`).hidden = name !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  document.title = view === "overview" ? "headrace" : `${view} · headrace`;
  if (asked.get("job") && asked.get("reference")) openComparison(asked.get("job"), asked.get("reference"));
  refresh();
}

function box(name, value, note = "", kind = "") {
  return make("div", [make("dt", name), make("dd", [make("b", value, kind ? {class: kind} : {}), make("small", note || "\u00a0")])]);
}

function showNumbers(status) {
  const queues = Object.fromEntries(["interactive", "normal", "bulk"].map(name => [name, sum(status.queues, name)]));
  const queued = queues.interactive + queues.normal + queues.bulk;
  const ended = Object.fromEntries(["succeeded", "failed", "cancelled", "expired"].map(name => [name, status.workers.reduce((all, worker) => all + worker.ended[name], 0)]));
  const workers = new Set(status.workers.map(worker => worker.name.split("@")[0])).size;
  const since = workers ? "since the workers started" : "no worker counts";
  const other = [ended.cancelled && `${count(ended.cancelled)} cancelled`, ended.expired && `${count(ended.expired)} expired`].filter(Boolean).join(", ");
  show(at("numbers"),
    box("tokens per second", count(sum(status.workers, "tokens_per_s")), "all workers, now"),
    box("slots in use", `${count(sum(status.workers, "running"))} of ${count(sum(status.workers, "slots"))}`, `${workers} ${workers === 1 ? "worker" : "workers"}`),
    box("queued", count(queued), Object.entries(queues).filter(([, n]) => n).map(([name, n]) => `${short(n)} ${name}`).join(", ") || "no job waits"),
    box("finished", workers ? count(ended.succeeded) : "–", other || since),
    box("failed", workers ? count(ended.failed) : "–", status.dead ? `${count(status.dead)} unreadable messages` : since, ended.failed ? "bad" : ""));
}

function facts(worker) {
  const model = worker.description, found = [];
  if (model) {
    found.push(["parameters", short(model.parameters)], ["weights", model.dtype || "unknown"], ["context", `${count(model.max_context)} tokens`]);
    const ids = model.eos_token_ids.slice(0, 4).join(", ") + (model.eos_count > 4 ? ", …" : "");
    found.push(["texts end at", ids ? `token ${ids}` : "no token"], ["family", model.family]);
  }
  const ended = worker.ended;
  found.push(["finished / failed", `${count(ended.succeeded)} / ${count(ended.failed)}`]);
  return make("dl", found.map(([name, value]) => make("div", [make("dt", name), make("dd", value)])), {class: "facts"});
}

// The adapters that have had jobs or are in memory, the busiest first; a directory may have thousands of others.
const ADAPTERS = 8;
function adapters(found) {
  const used = found.filter(each => each.loaded || each.jobs).sort((one, other) => other.running - one.running || other.jobs - one.jobs || other.loaded - one.loaded);
  const row = each => make("tr", [make("th", each.name, {scope: "row"}), make("td", each.loaded ? `rank ${each.rank}` : "not in memory"), make("td", count(each.running)), make("td", count(each.jobs)), make("td", short(each.tokens))]);
  const rest = found.length - Math.min(used.length, ADAPTERS);
  const words = !rest ? "" : used.length ? `and ${count(rest)} more` : `${count(rest)} ${rest === 1 ? "adapter" : "adapters"}, no job yet`;
  return make("div", [used.length ? table(["adapter", "", "running", "finished", "tokens"], used.slice(0, ADAPTERS).map(row)) : "", make("small", words)], {class: "latency"});
}

function latencies({first_token_s: first, total_s: total, jobs}) {
  const row = (name, values) => make("tr", [make("th", name, {scope: "row"}), ...values.map(value => make("td", fine(value)))]);
  const words = jobs === 1 ? "the last job, from its arrival at the worker" : `the last ${jobs} jobs, from their arrival at the worker`;
  return make("div", [table(["", "median", "90 %", "99 %"], [row("first token", first), row("whole job", total)]), make("small", words)], {class: "latency"});
}

function slotCell(row) {
  if (!row) return make("li", undefined, {"aria-label": "free"});
  const reading = row.read < row.prompt;
  const share = reading ? row.read / row.prompt : row.written / Math.max(1, row.most);
  const words = `job ${row.job}: ${reading ? `reads its prompt, ${row.read} of ${row.prompt} tokens` : `writes, ${row.written} of at most ${row.most} tokens`}, for ${span(row.age_s)}`;
  const bar = make("i"), cell = make("li", bar, {title: words, "aria-label": words, class: reading ? "read" : ""});
  bar.style.height = `${Math.max(14, 100 * share)}%`;
  return cell;
}

function workerCard(worker, now) {
  const state = !worker.loaded ? make("span", "not loaded: no job has needed it yet", {class: "dim"})
    : worker.stalled ? make("span", `stalled: in one step for ${span(worker.step_age_s)}`, {class: "bad"})
      : make("span", `up for ${span(now - worker.started_at)}`, {class: "dim"});
  const head = make("div", [make("strong", worker.model), make("span", worker.name, {class: "mono dim"}), state], {class: "worker-head"});
  const used = `${worker.running} of ${worker.slots} slots of ${worker.name} in use`;
  const slots = make("ul", Array.from({length: worker.slots}, (_, i) => slotCell(worker.rows[i])), {class: "slots", "aria-label": used});
  const card = make("article", [head, slots, make("div", [facts(worker), worker.latency.jobs ? latencies(worker.latency) : "", worker.adapters?.length ? adapters(worker.adapters) : ""], {class: "about"})], {class: "card"});
  if (worker.fingerprint) card.append(make("small", worker.fingerprint, {class: "fine mono"}));
  return card;
}

function showFailures(status) {
  const all = status.workers.flatMap(worker => worker.failures.map(failure => ({...failure, worker: worker.name})));
  all.sort((one, other) => other.at - one.at);
  if (!all.length) { show(at("failures"), empty("No job has failed since the workers started.")); return; }
  show(at("failures"), table(["when", "code", "job", "worker"], all.slice(0, 10).map(failure => make("tr", [
    make("td", `${span(Math.max(0, status.now - failure.at))} ago`), make("td", make("code", failure.code, {class: "bad"})),
    make("td", make("span", failure.job, {class: "mono"})), make("td", make("span", failure.worker, {class: "mono dim"}))]))));
}

function showStatus(status) {
  showNumbers(status); showChart(status.rates, status.now); showFailures(status);
  show(at("workers"), ...(status.workers.length ? status.workers.map(worker => workerCard(worker, status.now))
    : [make("div", empty("No worker is running. Start one with ", make("code", "headrace up"), " or ", make("code", "celery -A headrace.worker worker"), "; queued jobs wait for it."), {class: "card"})]));
  const models = [...new Set(status.workers.map(worker => worker.model))];
  setModels(models, [...new Set(status.workers.flatMap(worker => (worker.adapters || []).map(each => each.name)))].slice(0, 100));
}

function showTrouble(error) {
  const locked = error instanceof Refused && error.status === 401, when = at("when");
  document.body.classList.toggle("stale", !locked); document.body.classList.toggle("locked", locked);
  document.body.classList.toggle("blank", !last);
  when.className = "bad";
  when.textContent = locked ? "a key is needed" : last ? `as of ${last.toLocaleTimeString()}` : "no data";
  at("keybox").hidden = !locked;
  if (locked) sessionStorage.removeItem("key");
  at("trouble").hidden = locked && !at("key").value;
  const title = locked ? "This key is not valid. " : last ? "No news: what is shown is old. " : "No data. ";
  at("trouble").replaceChildren(make("strong", title), locked ? "Check it, or ask whoever runs the server." : error.message.charAt(0).toUpperCase() + error.message.slice(1).replace(/[^.!?]$/, "$&."));
}

async function refresh() {
  clearTimeout(timer);
  try {
    const status = await (await ask("status.json", {signal: AbortSignal.timeout(TIMEOUT_MS)})).json();
    last = new Date(status.now * 1000);
    document.body.classList.remove("stale", "locked", "blank");
    at("keybox").hidden = at("trouble").hidden = true;
    at("when").className = status.workers.some(worker => !worker.stalled) ? "ok" : "bad";
    at("when").textContent = last.toLocaleTimeString();
    showStatus(status);
    if (view === "jobs") await refreshJobs();
    if (view === "batches") await refreshBatches();
    if (at("key").value) sessionStorage.setItem("key", at("key").value);
  } catch (error) { showTrouble(error); }
  clearTimeout(timer);
  // A page in the background asks for nothing.
  if (!document.hidden) timer = setTimeout(refresh, INTERVAL_MS);
}

at("key").value = sessionStorage.getItem("key") || "";
at("keybox").onsubmit = event => { event.preventDefault(); refresh(); };
document.onvisibilitychange = refresh;
addEventListener("hashchange", openView);
addEventListener("headrace-refresh", refresh);
openView();
