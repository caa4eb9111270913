// What is asked of the server, and what comes back: the models, and an answer as it is written.
//
// Knows nothing of the page. The access key, where the server wants one, is kept in the browser.

const KEY = "gemma.key";

/** The server said no. `status` is HTTP's, 0 for an error in the middle of an answer. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The server cannot be reached, or the connection ended before the answer did. */
export class Lost extends Error {}

export const key = {
  get: () => localStorage.getItem(KEY) ?? "",
  set: (value) => (value ? localStorage.setItem(KEY, value) : localStorage.removeItem(KEY)),
};

/** The models of this server: [{id, max_model_len, capabilities}]. Raises Refused, Lost. */
export async function models() {
  return (await (await request("v1/models")).json()).data;
}

/** The events of one answer, in order.

  {kind: "progress", stage: "reading" | "pictures", done, total} · {kind: "thinking", text}: before the answer, by
  models that think · {kind: "text", text} · and, as the last, {kind: "end", finish, usage, timings}. Raises Refused,
  Lost, and AbortError when the signal says so. */
export async function* answer(asked, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...asked, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const end = { kind: "end", finish: null, usage: null, timings: null };
  for await (const line of lines(response.body)) {
    const progress = /^: ?(\w+) (\d+)\/(\d+)$/.exec(line);
    if (progress) yield { kind: "progress", stage: progress[1], done: Number(progress[2]), total: Number(progress[3]) };
    if (!line.startsWith("data:")) continue;
    const data = line.slice(5).trim();
    if (data === "[DONE]") {
      yield end;
      return;
    }
    const chunk = parsed(data);
    if (chunk.error) throw new Refused(chunk.error.message ?? String(chunk.error), 0);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.reasoning_content) yield { kind: "thinking", text: choice.delta.reasoning_content };
    if (choice?.delta?.content) yield { kind: "text", text: choice.delta.content };
    end.finish = choice?.finish_reason ?? end.finish;
    end.usage = chunk.usage ?? end.usage;
    end.timings = chunk.timings ?? end.timings;
  }
  throw new Lost("The connection ended before the answer did.");
}

async function request(path, options = {}) {
  const headers = { ...options.headers, ...(key.get() ? { Authorization: `Bearer ${key.get()}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Lost("The server cannot be reached. It may have been stopped.");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new Refused(
    said?.error?.message ?? `The server answered ${response.status} ${response.statusText}.`,
    response.status,
  );
}

async function* lines(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder(); // a pipe would drop what it holds when the connection breaks
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Lost("The connection was lost.");
    }
    if (part.done) return;
    const found = (rest + decoder.decode(part.value, { stream: true })).split(/\r?\n/);
    rest = found.pop();
    yield* found;
  }
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Lost("The server sent something that is no part of an answer.");
  }
}
