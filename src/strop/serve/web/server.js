// What the page asks of the server, and the key it sends along.

const KEY = "strop.key";

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (text) => sessionStorage.setItem(KEY, text),
};

export class ServerError extends Error {
  // status: of the reply; 0 when there was none.
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export async function getStatus() {
  return (await ask("status", { signal: AbortSignal.timeout(5000) })).json();
}

// The chunks of a streamed answer. Aborting the signal closes the connection, and with that ends the work.
export async function* chatChunks(body, signal) {
  const reply = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  try {
    for await (const data of eventData(reply.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message, 500);
      yield chunk;
    }
  } catch (error) {
    if (!(error instanceof TypeError)) throw error; // which is how fetch tells of a connection that broke
  }
  throw new ServerError("The connection ended before the answer did.", 0);
}

async function ask(path, options) {
  const headers = { ...options.headers };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  let reply;
  try {
    reply = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running?", 0);
  }
  if (!reply.ok) throw new ServerError(await why(reply), reply.status);
  return reply;
}

async function why(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `The server answered with status ${reply.status}.`;
  }
}

// The data of server-sent events: bytes may be cut anywhere, in the middle of a character too.
export async function* eventData(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
