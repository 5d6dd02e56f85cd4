// Puts the page together and asks the server each second how it is, while somebody looks.

import { Chat } from "./chat.js";
import { Plot } from "./plots.js";
import { getStatus, key } from "./server.js";
import { Settings } from "./settings.js";

const POLL_MS = 1000;
const $ = (id) => document.getElementById(id);

const count = (value) => value.toLocaleString("en", { maximumFractionDigits: 0 });
const short = (value) => (value < 9.95 && value % 1 ? value.toFixed(1) : count(value));
const perSecond = (value) => [count(value), "/s"];
const percent = (value) => [short(value), " %"];
const duration = (ms) => (ms < 999.5 ? [short(ms), " ms"] : [short(ms / 1000), " s"]);
const times = (value, factor) => (value === null ? null : value * factor);
const bytes = (value) => (value < 2 ** 30 ? `${count(value / 2 ** 20)} MiB` : `${(value / 2 ** 30).toFixed(2)} GiB`);

const plots = [
  {
    title: "Throughput",
    help: "Tokens generated a second",
    series: [{ name: "now", value: (live) => live.tokens_per_s }],
    format: perSecond,
    least: 10,
  },
  {
    title: "Share of the limit",
    help: "The least time that the last minute's steps could have taken on this machine, over the time they took. "
      + "Idle time does not count.",
    series: [{ name: "now", value: (live) => times(live.share_of_limit, 100) }],
    format: percent,
    least: 100,
  },
  {
    title: "TTFT",
    help: "Time to the first token, of the last ten seconds: median and 95th percentile",
    series: [
      { name: "median", mark: "p50", value: (live) => times(live.ttft_p50_s, 1000) },
      { name: "95th percentile", mark: "p95", value: (live) => times(live.ttft_p95_s, 1000) },
    ],
    format: duration,
    least: 10,
  },
  {
    title: "ITL",
    help: "Time between the tokens of an answer, of the last ten seconds: median and 99th percentile",
    series: [
      { name: "median", mark: "p50", value: (live) => times(live.itl_p50_s, 1000) },
      { name: "99th percentile", mark: "p99", value: (live) => times(live.itl_p99_s, 1000) },
    ],
    format: duration,
    least: 10,
  },
  {
    title: "Running, waiting",
    help: "Sequences in the batch, and requests that wait for their turn",
    series: [
      { name: "running", value: (live) => live.num_running },
      { name: "waiting", value: (live) => live.num_waiting },
    ],
    format: (value) => [count(value), ""],
    least: 5,
  },
  {
    title: "Cache in use",
    help: "Blocks of the KV cache that sequences hold",
    series: [{ name: "now", value: (live) => live.cache_use * 100 }],
    format: percent,
    least: 100,
  },
].map((description) => new Plot(description));
$("plots").append(...plots.map((plot) => plot.element));

const prompt = $("prompt");
const chat = new Chat({
  log: $("log"),
  scroll: $("scroll"),
  settings: new Settings($("settings")),
  say: (text) => ($("announcer").textContent = text),
  onError: (error) => error.status === 401 && askForKey(),
  onChange: showAction,
  write: (text) => {
    prompt.value = text ?? prompt.value;
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
    ["Cost of 1,000 requests", cost === null ? null : (1000 * cost).toPrecision(2)],
    ["Prompt tokens found in the cache", count(live.prefix_hit_tokens)],
    ["Restarts of the engine", num_restarts || null],
    ["Up", age(uptime_s)],
  ]);
  if (card) showCard(card);
}

function showCard(card) {
  chat.model = card.names[0];
  $("model").textContent = chat.model;
  document.title = `${chat.model} · Strop`;
  list($("card"), [
    ["Name", card.names.join(", ")],
    ["Task", card.runner === "pooling" ? "embeddings" : card.has_chat_template ? "chat" : "completions"],
    ["Context", `${count(card.context_tokens)} tokens`],
    ["One request", card.request_tokens < card.context_tokens ? `${count(card.request_tokens)} tokens` : null],
    ["At once", `${count(card.num_seqs)} sequences`],
    ["Weights", bytes(card.weight_bytes)],
    ["Cache", `${count(card.cache_bytes_per_token / 1024)} KiB a token`],
    ["Kernels", card.isa],
    ["Strop", card.version],
  ]);
  $("memory").textContent = card.memory;
  prompt.disabled = $("action").disabled = card.runner === "pooling";
  $("welcome").firstChild.textContent = card.runner === "pooling"
    ? `${chat.model} makes vectors of texts: ask /v1/embeddings. It does not chat.`
    : `Ask ${chat.model} something.`;
}

function showState(text, isGood) {
  if ($("state").textContent !== text) $("state").textContent = $("state").title = text; // each change is read out
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

function age(seconds) {
  const [days, hours, minutes] = [seconds / 86_400, (seconds / 3600) % 24, (seconds / 60) % 60].map(Math.floor);
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}

document.addEventListener("visibilitychange", poll);
window.addEventListener("resize", fit);
fit();
poll();
