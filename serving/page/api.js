// Talking to the service: the key, one request, and every failure in words.

const KEY = "triptych-api-key";

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const keepKey = (key) => sessionStorage.setItem(KEY, key);
export const forgetKey = () => sessionStorage.removeItem(KEY);

/** A failure: `title` and `detail` are for the reader, `status` is HTTP's, 0 where there was no answer. */
export class Failure extends Error {
  constructor(status, title, detail = "") {
    super(title);
    Object.assign(this, { status, title, detail });
  }
}

/**
 * The JSON answer of `path`, the headers that name the version, and the time it took in ms.
 * Throws Failure, or AbortError where `signal` ended it.
 */
export async function ask(path, { body, version, signal } = {}) {
  const headers = {};
  if (hasKey()) headers.authorization = `Bearer ${sessionStorage.getItem(KEY)}`;
  if (version) headers["x-triptych-version"] = version;
  if (body) headers["content-type"] = "application/json";
  const began = performance.now();
  let reply, text;
  try {
    const sent = body ? { method: "POST", body: JSON.stringify(body) } : { method: "GET" };
    reply = await fetch(path, { ...sent, headers, signal, cache: "no-store" });
    text = await reply.text();
  } catch (error) {
    if (signal?.aborted || error.name === "AbortError") throw error;
    throw new Failure(0, "The service cannot be reached.", "Check that it is running and that this device is online.");
  }
  const data = parsed(text);
  if (!reply.ok) throw inWords(reply, data?.error ?? {}, body);
  if (data === undefined) {
    const cause = "Something between this page and the service changed it.";
    throw new Failure(reply.status, "The answer was not understood.", cause);
  }
  return {
    data,
    model: reply.headers.get("x-triptych-model") ?? "",
    space: reply.headers.get("x-triptych-space") ?? "",
    milliseconds: performance.now() - began,
  };
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

function inWords(reply, error, body) {
  const detail = typeof error.message === "string" ? error.message : "";
  const { status, headers } = reply;
  const other = status >= 500 ? "Something went wrong in the service." : "The service refused this request.";
  const known = TITLES[status]?.({ image: Boolean(body?.image), detail, wait: seconds(headers), code: error.code ?? "" });
  const [title, said] = known ?? [other, detail];
  return new Failure(status, title, said);
}

const again = (wait) => `Try again in ${wait === 1 ? "a second" : `${wait} seconds`}.`;
const seconds = (headers) => Math.max(1, Math.ceil(Number(headers.get("retry-after")) || 1));

const TITLES = {
  400: ({ image, detail }) => [`The service cannot ${image ? "use this image" : "answer this"}.`, detail],
  401: () => [hasKey() ? "The API key was not accepted." : "This service asks for an API key.", ""],
  404: ({ detail, code }) => MISSING[code] ?? ["The service does not have this.", detail],
  413: ({ image, detail }) => [`This ${image ? "image " : ""}is too large for the service.`, detail],
  422: ({ detail }) => ["The service did not understand the request.", detail],
  429: ({ wait }) => ["The service is full.", again(wait)],
  503: ({ wait }) => ["The service is not ready.", `It may still be loading its model. ${again(wait)}`],
  504: () => ["The service took too long.", "It gave this search up. Try again when it is less busy."],
};

const MISSING = {
  no_index: ["There is no index to search.", "Start the service with one: triptych serve MODEL --index URI."],
  version_not_found: ["This version of the model is not loaded any more.", "Choose another one above."],
  row_not_found: ["The index has no such entry.", "It may have been replaced since. Search anew."],
};
