// The conversation: what is shown, what is sent, and the answer that is being written.

import { showMarkdown } from "./markdown.js";
import { chatChunks } from "./server.js";

const TURNS = "strop.turns";

// A turn is {role, content} and, for an answer, {thoughts, note, error}: plain data, kept while the tab lives.
export class Chat {
  // say(text): to those who do not see the page; onError(error): of each failure; onChange(): an answer began or ended;
  // write(text): the cursor goes where messages are written, and this text, if any, comes before it.
  constructor({ log, scroll, settings, say, onError, onChange, write }) {
    Object.assign(this, { log, scroll, settings, say, onError, onChange, write });
    this.model = "";
    this.abort = null;
    this.turns = JSON.parse(sessionStorage.getItem(TURNS) ?? "[]");
    for (const turn of this.turns) if (turn.role === "assistant" && !turn.error) turn.note ??= "stopped"; // by a reload
    this.views = this.turns.map((turn) => this.show(turn));
    this.refresh();
    this.scroll.scrollTop = this.scroll.scrollHeight;
    window.addEventListener("beforeunload", () => this.stop()); // else it would look like a connection that broke
    window.addEventListener("pagehide", () => this.keep());
  }

  get isBusy() {
    return this.abort !== null;
  }

  send(text) {
    const parameters = this.settings.parameters();
    if (this.isBusy || !text.trim() || parameters === null) return false;
    this.push({ role: "user", content: text });
    this.answer(parameters);
    return true;
  }

  stop() {
    this.abort?.abort();
  }

  again() {
    const parameters = this.settings.parameters();
    if (this.isBusy || parameters === null) return;
    this.cut(this.turns.findLastIndex((turn) => turn.role === "user") + 1);
    this.write(); // the button that had the focus is gone
    this.answer(parameters);
  }

  clear() {
    this.stop();
    this.cut(0);
    this.keep();
  }

  async answer(parameters) {
    const messages = this.messages();
    const view = this.push({ role: "assistant", content: "" });
    const { turn } = view;
    const times = { began: performance.now(), first: 0, last: 0 };
    const abort = (this.abort = new AbortController());
    let usage, finish;
    view.element.setAttribute("aria-busy", "true");
    this.refresh();
    this.onChange();
    try {
      for await (const chunk of chatChunks({ model: this.model, messages, ...parameters }, abort.signal)) {
        usage = chunk.usage ?? usage;
        const choice = chunk.choices[0];
        finish = choice?.finish_reason ?? finish;
        const { content, reasoning_content: thoughts } = choice?.delta ?? {};
        if (!content && !thoughts) continue;
        times.last = performance.now();
        times.first ||= times.last;
        turn.content += content ?? "";
        if (thoughts) turn.thoughts = (turn.thoughts ?? "") + thoughts;
        this.redraw(view);
      }
      turn.note = note(usage, finish, times);
    } catch (error) {
      if (abort.signal.aborted) turn.note = "stopped";
      else {
        turn.error = error.message;
        this.onError(error);
      }
    }
    if (this.abort === abort) this.abort = null;
    if (!this.turns.includes(turn)) return this.onChange(); // cleared meanwhile
    view.draw();
    view.element.removeAttribute("aria-busy");
    this.say(`Answer: ${turn.error ?? turn.note}`);
    this.keep();
    this.refresh();
    this.onChange();
  }

  // What the model is to read. Templates want the roles to alternate: neighbours of one role are joined.
  messages() {
    const messages = this.settings.system ? [{ role: "system", content: this.settings.system }] : [];
    for (const { role, content } of this.turns) {
      if (!content) continue;
      if (messages.at(-1)?.role === role) messages.at(-1).content += `\n\n${content}`;
      else messages.push({ role, content });
    }
    return messages;
  }

  push(turn) {
    this.turns.push(turn);
    const view = this.show(turn);
    this.views.push(view);
    this.refresh();
    this.scroll.scrollTop = this.scroll.scrollHeight;
    return view;
  }

  cut(length) {
    this.turns.length = length;
    for (const view of this.views.splice(length)) view.element.remove();
    this.refresh();
  }

  keep() {
    try {
      sessionStorage.setItem(TURNS, JSON.stringify(this.turns));
    } catch {
      // More than the browser keeps: the conversation lives as long as the page.
    }
  }

  show(turn) {
    const view = turn.role === "user" ? new Question(turn) : new Answer(turn);
    view.onEdit = () => {
      if (this.isBusy) return;
      this.cut(this.turns.indexOf(turn));
      this.keep();
      this.write(turn.content);
    };
    view.onAgain = () => this.again();
    view.draw();
    this.log.append(view.element);
    return view;
  }

  // Once a frame, however fast tokens come.
  redraw(view) {
    view.frame ??= requestAnimationFrame(() => {
      view.frame = null;
      const { scrollTop, scrollHeight, clientHeight } = this.scroll;
      const isAtEnd = scrollHeight - scrollTop - clientHeight < 40;
      view.draw();
      if (isAtEnd) this.scroll.scrollTop = this.scroll.scrollHeight;
    });
  }

  refresh() {
    this.scroll.classList.toggle("empty", !this.turns.length);
    this.views.forEach((view, i) => view.allow({ edit: !this.isBusy, again: !this.isBusy && i === this.views.length - 1 }));
  }
}

class Question {
  constructor(turn) {
    this.turn = turn;
    this.text = element("p", "text");
    this.bar = bar(button("Edit", () => this.onEdit()));
    this.element = element("article", "question", element("h2", "unseen", "You"), this.text, this.bar);
  }

  draw() {
    this.text.textContent = this.turn.content;
  }

  allow({ edit }) {
    this.bar.hidden = !edit;
  }
}

class Answer {
  constructor(turn) {
    this.turn = turn;
    this.thought = element("p", "");
    this.thoughts = element("details", "thoughts", element("summary", "", "Thoughts"), this.thought);
    this.text = element("div", "text");
    this.error = element("p", "error");
    this.note = element("span", "note");
    this.again = button("Again", () => this.onAgain());
    this.copy = button("Copy", async () => {
      this.copy.textContent = (await copied(turn.content)) ? "Copied" : "Not allowed";
      setTimeout(() => (this.copy.textContent = "Copy"), 1500);
    });
    this.bar = bar(this.note, element("span", "", this.copy, this.again));
    const title = element("h2", "unseen", "Answer");
    this.element = element("article", "answer", title, this.thoughts, this.text, this.error, this.bar);
  }

  draw() {
    showMarkdown(this.text, this.turn.content);
    this.thoughts.hidden = !this.turn.thoughts;
    this.thought.textContent = this.turn.thoughts ?? "";
    const hasText = this.turn.content !== "";
    if (hasText !== this.hadText) this.thoughts.open = !hasText; // later, as the reader likes
    this.hadText = hasText;
    this.error.textContent = this.turn.error ?? "";
    this.note.textContent = this.turn.note ?? "";
    this.copy.hidden = !this.turn.content;
    this.bar.hidden = this.turn.note === undefined && this.turn.error === undefined;
  }

  allow({ again }) {
    this.again.hidden = !again;
  }
}

// How many tokens, how fast; as the browser saw it.
function note(usage, finish, { began, first, last }) {
  const parts = [];
  if (usage) {
    const { completion_tokens: written, prompt_tokens: read, prompt_tokens_details: details } = usage;
    parts.push(`${written} token${written === 1 ? "" : "s"}`);
    if (written > 1 && last > first) parts.push(`${(((written - 1) * 1000) / (last - first)).toFixed(0)} a second`);
    if (first) parts.push(`first after ${(first - began).toFixed(0)} ms`);
    const cached = details?.cached_tokens;
    parts.push(`prompt ${read}${cached ? `, ${cached} of it cached` : ""}`);
  }
  if (finish === "length") parts.push("cut off at the token limit");
  return parts.join(" · ") || "done";
}

async function copied(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(() => true, () => false);
  }
  const area = element("textarea", "unseen"); // the clipboard's interface needs TLS or loopback
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

function element(tag, className, ...children) {
  const made = Object.assign(document.createElement(tag), { className });
  made.append(...children);
  return made;
}

function bar(...children) {
  return element("div", "bar", ...children);
}

function button(text, onClick) {
  const made = element("button", "quiet", text);
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}
