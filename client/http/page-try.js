// The try box: a completion as a stream, with the probabilities of its tokens.
import {ask, at, make, span} from "./page-parts.js";

const LOGPROBS = 5;
let running = null, written = "";

export function setModels(models, adapters) {
  const names = [...models, ...adapters], known = JSON.stringify([models, adapters]);
  if (known === setModels.known) return;
  setModels.known = known;
  at("models").replaceChildren(...names.map(name => make("option", undefined, {value: name})));
  at("job-model").replaceChildren(make("option", "all", {value: ""}), ...models.map(model => make("option", model, {value: model})));
  if (!at("model").value && models.length) at("model").value = models[0];
}

// The server reads and checks the form: a schema is sent as its text.
function form() {
  const kind = at("form").value, text = at("form-text").value;
  return {[kind]: kind === "choice" ? text.split("\n").filter(Boolean) : text};
}

function request() {
  const body = {model: at("model").value || null, prompt: at("prompt").value, priority: "interactive", stream: true, stream_options: {include_usage: true}};
  for (const input of at("ask").querySelectorAll("input[name]")) if (input.value !== "") body[input.name] = +input.value;
  const stops = at("stops").value.split("\n").filter(Boolean);
  if (stops.length) body.stop = stops;
  if (at("ignore-eos").checked) body.ignore_eos = true;
  if (at("form").value) body.structured_outputs = form();
  if (at("probabilities").checked) body.logprobs = LOGPROBS;
  return body;
}

const visible = text => text.replaceAll("\n", "↵").replaceAll(" ", "·") || "(nothing)";
const percent = logprob => { const p = 100 * Math.exp(logprob); return p >= 99.95 ? "100 %" : p >= 10 ? `${p.toFixed(0)} %` : p >= 0.01 ? `${p.toPrecision(2)} %` : "<0.01 %"; };

function describe(token, logprob, top) {
  const ranked = Object.entries(top || {}).sort((one, other) => other[1] - one[1]);
  const rows = ranked.map(([name, value]) => {
    const bar = make("span"); bar.style.width = `${Math.max(1, 100 * Math.exp(value))}%`;
    return make("li", [make("code", visible(name), name === token ? {class: "good"} : {}), bar, make("em", percent(value))]);
  });
  at("token").replaceChildren(make("div", [make("code", visible(token)), ` was written with probability ${percent(logprob)}`]), make("ol", rows));
  at("token").hidden = false;
}

// Tokens as parts of the text. A token that is part of a character has no text of its own.
function addTokens(target, choice) {
  const {tokens, token_logprobs: values, top_logprobs: tops, text_offset: offsets} = choice.logprobs;
  at("legend").hidden = false;
  const begin = [...written].length, letters = [...written, ...choice.text];
  tokens.forEach((token, i) => {
    const text = letters.slice(i ? offsets[i] : begin, i + 1 < tokens.length ? offsets[i + 1] : letters.length).join("");
    if (!text) return;
    const level = Math.exp(values[i]), step = level > 0.8 ? 4 : level > 0.4 ? 3 : level > 0.15 ? 2 : level > 0.03 ? 1 : 0;
    const part = make("span", text, {class: `t p${step}`, tabindex: "0", title: `${visible(token)} ${percent(values[i])}`});
    part.onmouseenter = part.onfocus = () => describe(token, values[i], tops[i]);
    target.append(part);
  });
  written = letters.join("");
}

function addText(target, choice) {
  if (choice.logprobs && choice.logprobs.tokens.length) { addTokens(target, choice); return; }
  written += choice.text;
  if (choice.text) target.append(choice.text);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "";;) {
    const {done, value} = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n"); rest = parts.pop();
    for (const part of parts.filter(part => part.startsWith("data: "))) {  // others are keep-alive comments
      const data = part.slice("data: ".length);
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function generate() {
  const began = performance.now(), target = make("span"), outcome = at("outcome");
  let tokens = 0, seed = null, reason = "", first = 0, complete = null;
  written = "";
  at("token").hidden = true; at("legend").hidden = true; at("copy").disabled = true;
  at("text").replaceChildren(make("span", at("prompt").value, {class: "prompt"}), target);
  const wait = () => { if (!first) { outcome.className = "hint waiting"; outcome.textContent = `waiting for a slot, ${span((performance.now() - began) / 1000)}`; } };
  wait();
  const clock = setInterval(wait, 200);
  try {
    const answer = await ask("v1/completions", {method: "POST", signal: running.signal, headers: {"Content-Type": "application/json"}, body: JSON.stringify(request())});
    for await (const piece of events(answer)) {
      if (piece.error) throw new Error(piece.error.message);
      for (const choice of piece.choices) {
        if (!first) { first = performance.now(); outcome.className = "hint"; outcome.textContent = "writing …"; }
        addText(target, choice);
        reason = choice.finish_reason || reason;
        complete = choice.complete ?? complete;
      }
      if (piece.usage) tokens = piece.usage.completion_tokens;
      if (Number.isInteger(piece.seed)) seed = piece.seed;
    }
    const seconds = (performance.now() - began) / 1000;
    outcome.textContent = `${tokens} tokens in ${seconds.toFixed(2)} s, the first after ${((first - began) / 1000).toFixed(2)} s; seed ${seed}; ended by ${reason === "stop" ? "a stop or the end of text" : "the limit of new tokens"}${complete === null ? "" : complete ? "; it has the form" : "; it does not have the whole form"}`;
  } catch (error) {
    outcome.className = error.name === "AbortError" ? "hint" : "hint bad";
    outcome.textContent = error.name === "AbortError" ? "stopped; the job was cancelled" : error.message;
  } finally { clearInterval(clock); outcome.classList.remove("waiting"); }
}

at("stop").onclick = () => running && running.abort();
at("copy").onclick = async () => {
  try { await navigator.clipboard.writeText(written); at("copy").textContent = "Copied"; }
  catch { getSelection().selectAllChildren(at("text")); at("copy").textContent = "Selected: press Ctrl-C"; }
  setTimeout(() => { at("copy").textContent = "Copy"; }, 2000);
};
at("prompt").onkeydown = event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit(); };
at("ask").onsubmit = async event => {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  at("stop").hidden = false; at("go").disabled = true; at("text").setAttribute("aria-busy", "true");
  const done = generate();
  at("text").parentElement.scrollIntoView({block: "nearest"});  // it is below the form on a narrow screen
  await done;
  running = null;
  at("stop").hidden = true; at("go").disabled = false; at("copy").disabled = !written; at("text").setAttribute("aria-busy", "false");
};
