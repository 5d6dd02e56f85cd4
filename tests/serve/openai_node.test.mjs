// OpenAI's own client for Node against the servers in STROP_TEST_SERVERS; test_openai_versions.py runs this.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { test } from "node:test";

const OpenAI = createRequire(`${process.env.STROP_TEST_NODE_MODULES}/.`)("openai");
const servers = JSON.parse(process.env.STROP_TEST_SERVERS);
const until = async (name, isEnough) => {
  for (;;) {
    const headers = { authorization: `Bearer ${servers.keys.ada}` };
    const page = await (await fetch(`${servers.keyed_url}/metrics`, { headers })).text();
    if (isEnough(Number(page.match(new RegExp(`^${name}(?:{.*})? (\\S+)$`, "m"))[1]))) return;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
};
const connect = (url, apiKey = "none", maxRetries = 0) => new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries });
const client = connect(servers.server_url);

const model = "smollm2";
const user = (content) => [{ role: "user", content }];
const greedy = { model, messages: user("Name three colours of the rainbow."), temperature: 0, max_completion_tokens: 24 };

test("chat, whole and streamed", async () => {
  const whole = await client.chat.completions.create(greedy);
  assert.equal(whole.object, "chat.completion");
  assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);
  assert.match(whole._request_id, /^req-/);
  let text = "";
  let usage = null;
  const reasons = [];
  const settings = { ...greedy, stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.chat.completions.create(settings)) {
    for (const choice of chunk.choices) {
      text += choice.delta.content ?? "";
      if (choice.finish_reason !== null) reasons.push(choice.finish_reason);
    }
    usage = chunk.usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual(reasons, [whole.choices[0].finish_reason]);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
});

test("the stream helper", async () => {
  const settings = { ...greedy, messages: user("hi") };
  const whole = await client.chat.completions.create(settings);
  const stream = client.chat.completions.stream({ ...settings, stream_options: { include_usage: true } });
  let text = "";
  stream.on("content", (delta) => (text += delta));
  const final = await stream.finalChatCompletion();
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(final.choices[0].message.content, text);
  assert.equal(final.choices[0].finish_reason, whole.choices[0].finish_reason);
  assert.equal((await stream.totalUsage()).completion_tokens, whole.usage.completion_tokens);
});

test("several choices, seeds and log probabilities", async () => {
  const settings = { ...greedy, n: 3, temperature: 1, seed: 5, logprobs: true, top_logprobs: 2 };
  const whole = await client.chat.completions.create(settings);
  const stream = client.chat.completions.stream({ ...settings });
  const final = await stream.finalChatCompletion();
  assert.deepEqual(final.choices.map((choice) => choice.index).sort(), [0, 1, 2]);
  for (const choice of whole.choices) {
    const streamed = final.choices.find((other) => other.index === choice.index);
    assert.equal(streamed.message.content, choice.message.content);
    assert.deepEqual(streamed.logprobs.content, choice.logprobs.content);
    const bytes = Buffer.from(choice.logprobs.content.flatMap((token) => token.bytes));
    assert.equal(bytes.toString("utf8"), choice.message.content);
    assert.ok(choice.logprobs.content.every((token) => token.top_logprobs.length === 2));
  }
});

test("responses, whole and streamed", async () => {
  const settings = { model, input: "Name a colour.", temperature: 0, max_output_tokens: 24 };
  const whole = await client.responses.create(settings);
  assert.ok(whole.output_text);
  const stream = client.responses.stream(settings);
  let text = "";
  stream.on("response.output_text.delta", (event) => (text += event.delta));
  const final = await stream.finalResponse();
  assert.equal(text, whole.output_text);
  assert.equal(final.output_text, text);
  assert.equal(final.status, whole.status);
  assert.equal(final.usage.output_tokens, whole.usage.output_tokens);
});

test("text completions", async () => {
  const settings = { model, prompt: ["The sun rises in the", "Once"], temperature: 0, max_tokens: 8, n: 2 };
  const whole = await client.completions.create(settings);
  const texts = ["", "", "", ""];
  for await (const chunk of await client.completions.create({ ...settings, stream: true })) {
    for (const choice of chunk.choices) texts[choice.index] += choice.text;
  }
  assert.deepEqual(texts, whole.choices.map((choice) => choice.text));
});

const parameters = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const asks = { model, messages: user("What is the weather in Paris?"), temperature: 0, max_completion_tokens: 200 };

test("tools, whole and streamed", async () => {
  const tools = [{ type: "function", function: { name: "get_weather", parameters } }];
  const settings = { ...asks, tools, tool_choice: "required", parallel_tool_calls: false };
  const [choice] = (await client.chat.completions.create(settings)).choices;
  assert.equal(choice.finish_reason, "tool_calls");
  const [call] = choice.message.tool_calls;
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ["city"]);
  const final = await client.chat.completions.stream(settings).finalChatCompletion();
  assert.deepEqual(final.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
  assert.equal(final.choices[0].finish_reason, "tool_calls");
  const flat = [{ type: "function", name: "get_weather", parameters, strict: true }];
  const response = { model, input: "What is the weather in Paris?", temperature: 0, tools: flat, tool_choice: "required" };
  const whole = await client.responses.create({ ...response, parallel_tool_calls: false });
  assert.equal(whole.output[0].type, "function_call");
  const streamed = await client.responses.stream({ ...response, parallel_tool_calls: false }).finalResponse();
  assert.equal(streamed.output[0].arguments, whole.output[0].arguments);
});

test("runTools calls a function and goes on", async () => {
  const called = [];
  const get_weather = ({ city }) => called.push(city) && "Rain, 9 degrees.";
  const tools = [{ type: "function", function: { name: "get_weather", parameters, function: get_weather, parse: JSON.parse } }];
  const runner = client.chat.completions.runTools({ ...asks, tools, tool_choice: "required", parallel_tool_calls: false }, { maxChatCompletions: 1 });
  await runner.done();
  assert.equal(called.length, 1);
  assert.ok(runner.messages.some((message) => message.role === "tool" && message.content.startsWith("Rain")));
});

test("structured output is parsed", async () => {
  const response_format = { type: "json_schema", json_schema: { name: "weather", strict: true, schema: parameters } };
  const reply = await client.chat.completions.parse({ ...asks, response_format });
  assert.deepEqual(Object.keys(JSON.parse(reply.choices[0].message.content)), ["city"]);
  const format = { type: "json_schema", name: "weather", strict: true, schema: parameters };
  const response = await client.responses.parse({ model, input: "Paris", temperature: 0, text: { format } });
  assert.deepEqual(Object.keys(JSON.parse(response.output_text)), ["city"]);
});

test("embeddings", async () => {
  const embedder = connect(servers.encoder_url);
  const settings = { model: "encoder", input: ["a sharp knife", "ab cd"] };
  const packed = await embedder.embeddings.create(settings); // base64 on the wire
  const floats = await embedder.embeddings.create({ ...settings, encoding_format: "float" });
  assert.deepEqual(packed.data.map((item) => item.index), [0, 1]);
  for (const [i, item] of packed.data.entries()) {
    assert.deepEqual(Array.from(item.embedding), floats.data[i].embedding.map(Math.fround));
  }
});

test("models", async () => {
  const cards = [];
  for await (const card of client.models.list()) cards.push(card);
  assert.deepEqual(cards.map((card) => card.id), [model]);
  assert.deepEqual({ ...(await client.models.retrieve(model)) }, cards[0]);
});

test("errors", async () => {
  const refuses = (promise, kind, status, code) =>
    assert.rejects(promise, (error) => {
      assert.ok(error instanceof kind, String(error));
      assert.equal(error.status, status);
      assert.equal(error.code, code);
      return true;
    });
  const create = (more) => client.chat.completions.create({ ...greedy, ...more });
  await refuses(create({ model: "gpt-4" }), OpenAI.NotFoundError, 404, "model_not_found");
  await refuses(create({ max_completion_tokens: 5000 }), OpenAI.BadRequestError, 400, "context_length_exceeded");
  await refuses(create({ max_tokenz: 5 }), OpenAI.BadRequestError, 400, null);
  const anybody = connect(servers.keyed_url, "sk-wrong", 2).chat.completions.create(greedy);
  await refuses(anybody, OpenAI.AuthenticationError, 401, "invalid_api_key");
});

test("a full queue, and a retry", async () => {
  const busy = connect(servers.keyed_url, servers.keys.ada);
  const running = [];
  for (let i = 0; i < 2; i++) {
    const stream = await busy.chat.completions.create({ ...greedy, max_completion_tokens: 1500, ignore_eos: true, stream: true });
    const frames = stream[Symbol.asyncIterator]();
    await frames.next();
    running.push({ stream, frames });
  }
  const waits = busy.chat.completions.create(greedy).asResponse();
  await until("vllm:num_requests_waiting", (count) => count === 1);
  await assert.rejects(busy.chat.completions.create(greedy), (error) => {
    assert.ok(error instanceof OpenAI.RateLimitError, String(error));
    assert.ok(Number(error.headers.get("retry-after")) >= 1);
    return true;
  });
  let before = 0;
  await until("strop:requests_rejected_total", (count) => ((before = count), true));
  const retries = connect(servers.keyed_url, servers.keys.ada, 20).chat.completions.create(greedy);
  await until("strop:requests_rejected_total", (count) => count > before);
  for (const { stream } of running) stream.controller.abort();
  const { choices } = await (await waits).json();
  assert.equal((await retries).choices[0].message.content, choices[0].message.content);
});
