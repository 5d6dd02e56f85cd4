// Puts the page together and asks the server each second how it is, while somebody looks.

import { Chat } from "./chat.js";
import { Plot } from "./plots.js";
import { getStatus, key } from "./server.js";
import { Settings } from "./settings.js";

const POLL_MS = 1000;
const $ = (id) => document.getElementById(id);

const count = (value) => value.toLocaleString("en", { maximumFractionDigits: 0 });
const milliseconds = (value) => (value < 9.95 ? value.toFixed(1) : count(value)) + " ms";
const percent = (value) => `${value < 9.95 && value % 1 ? value.toFixed(1) : count(value)} %`;
const times = (value, factor) => (value === null ? null : value * factor);
const mebibytes = (bytes) => (bytes < 2 ** 30 ? `${count(bytes / 2 ** 20)} MiB` : `${(bytes / 2 ** 30).toFixed(2)} GiB`);

const plots = [
  new Plot("Throughput", [{ name: "tokens a second", value: (live) => live.tokens_per_s }], (v) => `${count(v)}/s`, 10),
  new Plot("Share of the limit", [{ name: "share", value: (live) => times(live.share_of_limit, 100) }], percent, 100),
  new Plot("First token", [
    { name: "median", value: (live) => times(live.ttft_p50_s, 1000) },
    { name: "95th percentile", value: (live) => times(live.ttft_p95_s, 1000) },
  ], milliseconds, 10),
  new Plot("Between tokens", [
    { name: "median", value: (live) => times(live.itl_p50_s, 1000) },
    { name: "99th percentile", value: (live) => times(live.itl_p99_s, 1000) },
  ], milliseconds, 10),
  new Plot("Running, waiting", [
    { name: "running", value: (live) => live.num_running },
    { name: "waiting", value: (live) => live.num_waiting },
  ], count, 5),
  new Plot("Cache in use", [{ name: "share", value: (live) => live.cache_use * 100 }], percent, 100),
];
$("plots").append(...plots.map((plot) => plot.element));

const prompt = $("prompt");
const chat = new Chat({
  log: $("log"),
  scroll: $("scroll"),
  settings: new Settings($("settings")),
  say: (text) => ($("announcer").textContent = text),
  onError: (error) => error.status === 401 && askForKey(),
  onChange: showAction,
  onEdit: (text) => {
    prompt.value = text;
    fit();
    prompt.focus();
  },
});

// Chat

function send() {
  if (!chat.send(prompt.value)) return;
  prompt.value = "";
  fit();
}

function showAction() {
  $("action").textContent = chat.isBusy ? "Stop" : "Send";
  $("action").classList.toggle("main", !chat.isBusy);
}

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (chat.isBusy) chat.stop();
  else send();
});
prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chat.isBusy && !$("key-dialog").open) chat.stop();
});
$("clear").addEventListener("click", () => {
  chat.clear();
  prompt.focus();
});

// The panel, which a narrow window shows instead of the chat

function showPanel(isOpen) {
  document.body.classList.toggle("panel", isOpen);
  $("toggle").setAttribute("aria-expanded", isOpen);
  $("toggle").textContent = isOpen ? "Chat" : "Panel";
}

$("toggle").addEventListener("click", () => showPanel(!document.body.classList.contains("panel")));
$("settings").addEventListener("invalid", () => showPanel(true), true); // a hidden field could not say what is wrong

// The key

function askForKey() {
  $("key-error").textContent = key.get() ? "The server does not know this key. Is it complete, and still valid?" : "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value.trim());
  poll();
});

// The server's state

let timer = null;

async function poll() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    show(await getStatus());
    $("key-dialog").close();
  } catch (error) {
    showState(error.status === 401 ? "no valid key" : error.message, false);
    if (error.status === 401) return askForKey(); // and not again until there is one
  }
  clearTimeout(timer);
  timer = setTimeout(poll, POLL_MS);
}

function show({ trouble, uptime_s, num_restarts, card, live }) {
  showState(trouble ?? "ready", trouble === null);
  for (const plot of plots) plot.add(live);
  const cost = live.cost_per_request;
  list($("figures"), [
    ["Requests a minute", live.requests_per_minute.toFixed(live.requests_per_minute < 10 ? 1 : 0)],
    ["Cost of a request", cost === null ? null : cost.toPrecision(2)],
    ["Prompt tokens found in the cache", count(live.prefix_hit_tokens)],
    ["Restarts of the engine", num_restarts || null],
    ["Up", duration(uptime_s)],
  ]);
  if (card) showCard(card);
}

function showCard(card) {
  chat.model = card.names[0];
  $("model").textContent = chat.model;
  document.title = `${chat.model} · Strop`;
  list($("card"), [
    ["Name", card.names.join(", ")],
    ["Does", card.runner === "pooling" ? "makes vectors of texts" : card.has_chat_template ? "chats" : "completes texts"],
    ["Context", `${count(card.context_tokens)} tokens`],
    ["One request", card.request_tokens < card.context_tokens ? `${count(card.request_tokens)} tokens` : null],
    ["At once", `${count(card.num_seqs)} sequences`],
    ["Weights", mebibytes(card.weight_bytes)],
    ["Cache", `${count(card.cache_bytes_per_token / 1024)} KiB a token`],
    ["Kernels", card.isa],
    ["Strop", card.version],
  ]);
  $("memory").textContent = card.memory;
  $("welcome").firstChild.textContent = card.runner === "pooling"
    ? `${chat.model} makes vectors of texts: ask /v1/embeddings. It does not chat.`
    : `Ask ${chat.model} something.`;
}

function showState(text, isGood) {
  if ($("state").textContent !== text) $("state").textContent = text; // each change is read out
  $("state").className = isGood ? "good" : "bad";
}

function list(element, rows) {
  const shown = rows.filter(([, value]) => value !== null);
  const text = JSON.stringify(shown);
  if (element.dataset.shown === text) return; // a selection in it survives
  element.dataset.shown = text;
  element.replaceChildren(...shown.flatMap(([name, value]) => [
    Object.assign(document.createElement("dt"), { textContent: name }),
    Object.assign(document.createElement("dd"), { textContent: value }),
  ]));
}

function duration(seconds) {
  const [days, hours, minutes] = [seconds / 86_400, (seconds / 3600) % 24, (seconds / 60) % 60].map(Math.floor);
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}

document.addEventListener("visibilitychange", poll);
window.addEventListener("resize", fit);
fit();
poll();
