// The service's API. Addresses are relative to this file, so the page works below any path prefix.

const at = (path) => new URL(`../${path}`, import.meta.url);

const ADVICE = {
  invalid_api_key: "Enter an API key of this service at the top of the page.",
  permission_denied: "Choose a mode or expert that this API key may use.",
  rate_limit_exceeded: "Wait a moment, then run it again.",
  overloaded: "The service is busy: wait a moment, then run it again.",
  engine_unavailable: "The engine is starting or recovering: wait a moment, then run it again.",
  request_timeout: "Ask for fewer tokens, or try again when the service is less busy.",
  context_length_exceeded: "Shorten the prompt, or lower Max tokens.",
  model_not_found: "The experts may have changed: reload the page.",
  body_too_large: "Shorten the prompt.",
};

/** What went wrong, and what its reader can do about it. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = "", retryAfter = "" } = {}) {
    super(status ? `${message} (${status}${code ? `, ${code}` : ""})` : message);
    this.code = code;
    this.status = status;
    const wait = retryAfter ? ` It may be asked again in ${retryAfter} s.` : "";
    this.advice = (ADVICE[code] ?? (status >= 500 ? "The service's log says more." : "")) + wait;
  }
}

const unreachable = (error) =>
  Object.assign(new ApiError(`The service cannot be reached: ${error.message}`), { advice: "Is it still running?" });

async function call(path, key, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(at(path), { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw unreachable(error);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  const body = await response.json().catch(() => ({}));
  const { message = response.statusText || "The call failed", code = "" } = body.error ?? {};
  return new ApiError(message, {
    status: response.status,
    code,
    retryAfter: response.headers.get("retry-after") ?? "",
  });
}

/** Names that requests may give as their model, as far as this key may use them. */
export async function listModels(key) {
  return (await (await call("v1/models", key)).json()).data.map((model) => model.id);
}

export async function listExamples() {
  return (await call("playground/examples.json", "")).json();
}

/** Chunks of a chat completion, as they arrive. */
export async function* streamChat(body, key, signal) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  const response = await call("v1/chat/completions", key, options);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, { status: response.status, code: chunk.error.code });
    yield chunk;
  }
  throw new ApiError("The stream was cut off before its end.");
}

/** The data of server-sent events. An event ends with an empty line; a read may end anywhere. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
