// What all views share: elements, numbers, and requests with the key.

// How long a view waits for its data.
export const TIMEOUT_MS = 6000;

export const at = id => document.getElementById(id);

export function make(name, content, attributes = {}) {
  const element = document.createElement(name);
  if (content !== undefined) element.append(...[content].flat());
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

export const count = value => new Intl.NumberFormat("en", {maximumFractionDigits: 0}).format(value);
export const short = value => new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 3}).format(value);
export const span = s => s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min`
  : s < 172800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} d`;
export const fine = s => s < 0.001 ? "<1 ms" : s < 1 ? `${Math.round(s * 1000)} ms` : s < 10 ? `${s.toFixed(2)} s` : s < 90 ? `${s.toFixed(1)} s` : span(s);
export const sum = (items, name) => items.reduce((total, item) => total + item[name], 0);

// The key stays in this tab's storage; a tab that is closed forgets it.
export const headers = () => at("key").value ? {Authorization: `Bearer ${at("key").value}`} : {};

export class Refused extends Error {
  constructor(status, error) { super(error.message); this.status = status; this.code = error.code; }
}

export async function ask(path, options = {}) {
  let answer;
  try { answer = await fetch(path, {...options, headers: {...headers(), ...options.headers}}); }
  catch (error) {
    if (error.name === "AbortError") throw error;
    const silent = error.name === "TimeoutError" ? "has not answered in time; Redis may be away" : "does not answer";
    throw new Refused(0, {message: `the server ${silent}`, code: "no_server"});
  }
  if (answer.ok) return answer;
  let error = {message: `the server answered ${answer.status}`, code: "unknown"};
  try { error = (await answer.json()).error; } catch { /* not JSON: a proxy's page */ }
  throw new Refused(answer.status, error);
}

export function table(names, rows, caption) {
  const found = make("table"), head = make("thead", make("tr", names.map(name => name ? make("th", name, {scope: "col"}) : make("td"))));
  if (caption) found.append(make("caption", caption));
  found.append(head, make("tbody", rows));
  return found;
}

export const empty = (...content) => make("p", content, {class: "empty"});

// Replace what an element shows, only if it differs. A button in it keeps the focus.
export function show(element, ...content) {
  const next = make("div", content);
  if (next.innerHTML === element.innerHTML) return;
  const focused = element.contains(document.activeElement) && document.activeElement.dataset.cancel;
  element.replaceChildren(...next.childNodes);
  if (focused) element.querySelector(`[data-cancel="${CSS.escape(focused)}"]`)?.focus();
}
