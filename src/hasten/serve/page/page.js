// The page of a server: sends prompts to it, shows what it streams, and its figures once a second.
// Addresses are relative, so that the page also works behind a proxy's folder. What a model says is only
// ever put into text nodes.

import { Charts, duration } from "./charts.js";

const FIGURES_EVERY_MS = 1000;
const FIGURES_TIMEOUT_MS = 5000;
const KEY = "hasten.key"; // in sessionStorage
const NO_SERVER = "The server does not answer.";
const ENDINGS = { stop: "ended by itself", length: "max tokens reached" };

const byId = (id) => document.getElementById(id);
const form = byId("ask");
const prompt = byId("prompt");
const answers = byId("answers");
const charts = new Charts(byId("charts"));

let conversation = []; // messages of the chat so far
let running = null; // the AbortController of the answer that streams
let figuresTimer = 0;

class ServerError extends Error {}

// Like fetch, with the key; raises ServerError with the sentence that the server gave instead of an answer.
async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  if (response.status === 401) askForKey();
  const body = await response.json().catch(() => null);
  throw Object.assign(new ServerError(body?.error?.message ?? `The server answered ${response.status}.`), { status: response.status });
}

function askForKey() {
  const key = sessionStorage.getItem(KEY);
  byId("key-form").hidden = false;
  say(key ? "The server does not know this API key." : "The server asks for an API key.", true);
}

function say(text, isProblem) {
  const state = byId("state");
  if (state.textContent !== text) state.textContent = text; // a status that did not change is not read out again
  state.classList.toggle("error", isProblem);
}

// The server's figures, again and again; after a refused key only once there is another one.
async function follow() {
  let figures = null;
  try {
    figures = await (await ask("page/figures", { signal: AbortSignal.timeout(FIGURES_TIMEOUT_MS) })).json();
    show(figures);
  } catch (error) {
    if (error.status === 401) return;
    say(error instanceof ServerError ? error.message : `${NO_SERVER} It is asked again every second.`, true);
  }
  charts.add(figures);
  clearTimeout(figuresTimer);
  figuresTimer = setTimeout(follow, FIGURES_EVERY_MS);
}

function show(figures) {
  byId("key-form").hidden = true;
  byId("model").textContent = figures.model;
  document.title = `${figures.model} · hasten`;
  say(figures.problem ? `No requests now: ${figures.problem}.` : "Ready", figures.problem !== null);
  const chat = form.elements.kind[0];
  chat.disabled = !figures.has_chat_template;
  chat.parentElement.title = chat.disabled ? "this model has no chat template" : "";
  if (chat.disabled && chat.checked) {
    form.elements.kind[1].checked = true;
    showKind();
  }
}

function showKind() {
  const isChat = form.elements.kind.value === "chat";
  prompt.placeholder = isChat ? "Your message" : "Text that the model continues";
  byId("system-field").hidden = !isChat;
}

// The sampling options that are filled in, as the API names them.
function sampling() {
  const fields = [...form.querySelectorAll(".options input")].filter(({ value }) => value !== "");
  return Object.fromEntries(fields.map(({ name, type, value }) => [name, type === "number" ? Number(value) : value]));
}

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

// One prompt and its answer, on the page.
class Turn {
  constructor(promptText, isChat) {
    this.box = element("article", isChat ? "chat" : "completion");
    this.text = document.createTextNode("");
    this.facts = element("p", "facts", "waiting for the first token …");
    const answer = element("div", "text answer");
    answer.append(this.text);
    this.box.append(element("div", "text prompt", promptText), answer, this.facts);
    answers.append(this.box);
    answers.scrollTop = answers.scrollHeight;
    this.askedMs = performance.now();
    this.firstMs = this.lastMs = 0;
    this.unseen = ""; // it waits for the next frame: a layout for each token would take longer than the token
    this.frame = 0;
    this.numTokens = 0;
    this.isCounted = false; // by the server; until then a piece of text counts as a token
  }

  add(text) {
    this.lastMs = performance.now();
    this.firstMs ||= this.lastMs;
    this.numTokens += 1;
    this.unseen += text;
    this.frame ||= requestAnimationFrame(() => this.show());
  }

  show(ending = "") {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const isAtEnd = answers.scrollHeight - answers.scrollTop - answers.clientHeight < 40;
    this.text.appendData(this.unseen);
    this.unseen = "";
    const parts = [];
    if (this.firstMs) {
      const about = this.isCounted ? "" : "≈ ";
      parts.push(`TTFT ${duration((this.firstMs - this.askedMs) / 1000)}`);
      const seconds = (this.lastMs - this.firstMs) / 1000;
      if (this.numTokens > 1 && seconds > 0) parts.push(`${about}${((this.numTokens - 1) / seconds).toFixed(1)} tokens/s after it`);
      parts.push(`${about}${this.numTokens} tokens`);
    }
    this.facts.textContent = [...parts, ...(ending ? [ending] : [])].join(" · ");
    if (isAtEnd) answers.scrollTop = answers.scrollHeight;
  }

  fail(message) {
    this.show();
    this.box.append(element("p", "error", message));
    answers.scrollTop = answers.scrollHeight;
  }
}

// The data of server-sent events; ends with the one that says that all came.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ServerError("The answer broke off.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event === "data: [DONE]") return;
      const data = JSON.parse(event.slice("data: ".length));
      if (data.error) throw new ServerError(data.error.message);
      yield data;
    }
  }
}

async function stream(turn, path, body) {
  let ending = "";
  const options = { stream: true, stream_options: { include_usage: true }, ...sampling() };
  const response = await ask(path, { method: "POST", body: JSON.stringify({ ...body, ...options }), signal: running.signal });
  for await (const { choices, usage } of eventsOf(response)) {
    for (const { text, delta, finish_reason } of choices) {
      const piece = text ?? delta.content;
      if (piece) turn.add(piece);
      if (finish_reason) ending = ENDINGS[finish_reason];
    }
    if (usage) {
      turn.numTokens = usage.completion_tokens;
      turn.isCounted = true;
    }
  }
  turn.show(ending);
}

async function send() {
  const said = prompt.value;
  if (running || !said || !form.reportValidity()) return;
  const isChat = form.elements.kind.value === "chat";
  const system = byId("system").value;
  const asked = [...conversation, { role: "user", content: said }];
  const messages = system ? [{ role: "system", content: system }, ...asked] : asked;
  const turn = new Turn(said, isChat);
  setRunning(new AbortController());
  prompt.value = "";
  try {
    await (isChat ? stream(turn, "v1/chat/completions", { messages }) : stream(turn, "v1/completions", { prompt: said }));
  } catch (error) {
    if (error.name === "AbortError") turn.show("stopped");
    else turn.fail(error instanceof ServerError ? error.message : NO_SERVER);
    if (!turn.text.data) prompt.value ||= said;
  } finally {
    setRunning(null);
  }
  if (isChat && turn.text.data) conversation = [...asked, { role: "assistant", content: turn.text.data }];
}

function setRunning(controller) {
  const [from, to] = controller ? [byId("send"), byId("stop")] : [byId("stop"), prompt];
  const hadFocus = document.activeElement === from;
  running = controller;
  byId("send").disabled = controller !== null;
  byId("stop").disabled = controller === null;
  byId("clear").disabled = controller !== null;
  answers.setAttribute("aria-busy", String(controller !== null));
  if (hadFocus) to.focus();
}

const stop = () => running?.abort();

form.addEventListener("submit", (event) => { event.preventDefault(); send(); });
form.addEventListener("change", showKind);
byId("stop").addEventListener("click", stop);
byId("clear").addEventListener("click", () => {
  conversation = [];
  answers.replaceChildren();
  prompt.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value.trim());
  follow();
});
showKind();
follow();
