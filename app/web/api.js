/** Every request of the page: the key goes along, an error is a Problem. Paths are relative to the page's own. */

import { events } from "./sse.js";

/** An answer that is an error (RFC 9457), or no answer. */
export class Problem extends Error {
  /**
   * @param {string} detail for a person
   * @param {{status?: number, errors?: {field: string, detail: string}[], retryAfter?: number}} [more] in seconds
   */
  constructor(detail, { status = 0, errors = [], retryAfter = 0 } = {}) {
    super(detail);
    Object.assign(this, { status, errors, retryAfter });
  }

  /** @param {string} field @param {string} detail */
  static at = (field, detail) => new Problem(detail, { errors: [{ field, detail }] });
}

const KEY = "ddpm-key";

/** The API key: of this tab, never in a URL. "wanted" is dispatched when the service asks for one. */
export const access = Object.assign(new EventTarget(), {
  key: sessionStorage.getItem(KEY) ?? "",
  /** @param {string} key */
  use(key) {
    this.key = key;
    sessionStorage.setItem(KEY, key);
  },
});

/**
 * @param {string} path
 * @param {RequestInit} [options]
 * @param {number} [good] a status that is an answer, beside 2xx
 * @returns {Promise<Response>}
 * @throws {Problem}
 */
export async function send(path, options = {}, good = 200) {
  const headers = { ...options.headers, ...(access.key && { Authorization: `Bearer ${access.key}` }) };
  const response = await fetch(path, { ...options, headers }).catch(lost("The service cannot be reached."));
  const { ok, status } = response;
  if (ok || status === good) return response;
  const { detail, errors } = await response.json().catch(() => ({ detail: `The answer was ${status}, and no more.` }));
  if (status === 401) access.dispatchEvent(new CustomEvent("wanted", { detail }));
  throw new Problem(detail, { status, errors, retryAfter: Number(response.headers.get("Retry-After")) });
}

/** What a failed fetch is to a person. @param {string} detail */
const lost = (detail) => (error) => {
  throw error instanceof TypeError ? new Problem(detail) : error;
};

/** The body of a request: JSON, or a form where there is an image. @param {object} fields @param {Blob} [image] */
export function bodyOf(fields, image) {
  if (!image) return { body: JSON.stringify(fields), headers: { "Content-Type": "application/json" } };
  const body = new FormData();
  body.set("image", image, "x_0.png");
  for (const [name, value] of Object.entries(fields)) body.set(name, value);
  return { body };
}

/** 16 random bytes; crypto.randomUUID is for https alone. */
const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

/**
 * Draws.
 * @param {string} path
 * @param {{body: BodyInit, headers?: object}} request
 * @param {AbortSignal} signal ends it: told to the service by its id, and no longer listened to
 * @param {(progress: any) => Promise<void>} onProgress
 * @returns {Promise<any>} the completed answer
 */
export async function draw(path, { body, headers }, signal, onProgress) {
  const id = newId();
  const both = new AbortController();
  const end = () => send(`requests/${id}`, { method: "DELETE" }).catch(() => {}).then(() => both.abort(signal.reason));
  signal.addEventListener("abort", end);
  let at = "before the first step";
  let told;
  try {
    const all = { ...headers, Accept: "text/event-stream", "X-Request-Id": id };
    told = events((await send(path, { method: "POST", body, headers: all, signal: both.signal })).body);
    for (;;) {
      const { value, done } = await told.next().catch(lost(`The connection was lost ${at}.`));
      if (done) throw new Problem(`The connection was lost ${at}.`);
      const { event, data } = value;
      if (event === "completed") return data;
      if (event === "error") throw new Problem(data.detail, data);
      at = `at step ${data.step} of ${data.steps}`;
      await onProgress(data);
    }
  } finally {
    signal.removeEventListener("abort", end);
    told?.return();
  }
}
