// The system prompt and the parameters of the next answer. An empty field leaves the choice to the server.

const SETTINGS = "strop.settings";

// name in the API, label, least, most, step, what an empty field means, what it does
const PARAMETERS = [
  ["temperature", "Temperature", 0, 100, 0.1, "1", "0 always takes the likeliest token"],
  ["max_completion_tokens", "Most tokens", 1, 2 ** 31 - 1, 1, "context's end", "where an answer is cut off"],
  ["top_p", "Top p", 0.01, 1, 0.01, "1", "keeps the likeliest tokens that together have this probability"],
  ["top_k", "Top k", 0, 2 ** 31 - 1, 1, "all", "keeps so many of the likeliest tokens"],
  ["min_p", "Min p", 0, 1, 0.01, "0", "keeps tokens at least this times as probable as the likeliest"],
  ["seed", "Seed", Number.MIN_SAFE_INTEGER, Number.MAX_SAFE_INTEGER, 1, "random", "the same seed gives the same answer"],
  ["presence_penalty", "Presence", -2, 2, 0.1, "0", "makes tokens that were there less likely"],
  ["frequency_penalty", "Frequency", -2, 2, 0.1, "0", "the same, for each time they were there"],
];

export class Settings {
  constructor(form) {
    this.form = form;
    for (const [name, label, min, max, step, empty, help] of PARAMETERS) {
      const input = Object.assign(document.createElement("input"), { type: "number", name, placeholder: empty });
      Object.assign(input, { min, max, step: Number.isInteger(step) ? step : "any", title: help });
      const wrapper = document.createElement("label");
      wrapper.append(label, input);
      form.append(wrapper);
    }
    const kept = JSON.parse(sessionStorage.getItem(SETTINGS) ?? "{}");
    for (const [name, text] of Object.entries(kept)) if (form.elements[name]) form.elements[name].value = text;
    form.addEventListener("input", () => {
      sessionStorage.setItem(SETTINGS, JSON.stringify(Object.fromEntries(new FormData(form))));
    });
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  get system() {
    return this.form.elements.system.value.trim();
  }

  // As the API calls them; null, and the field is pointed out, when one is out of range.
  parameters() {
    if (!this.form.reportValidity()) return null;
    const given = PARAMETERS.map(([name]) => [name, this.form.elements[name].value]).filter(([, text]) => text !== "");
    return Object.fromEntries(given.map(([name, text]) => [name, Number(text)]));
  }
}
