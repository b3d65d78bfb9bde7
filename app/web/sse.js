/** Server-sent events of a fetch: EventSource can neither POST nor send a key. */

/**
 * The events of a stream, as this service writes them: lines end in "\n", `data` is one line of JSON.
 * @param {ReadableStream<Uint8Array>} stream
 * @returns {AsyncGenerator<{event: string, data: any}>}
 */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      let from = Math.max(0, rest.length - 1); // a large event comes in many pieces: none is searched twice
      rest += value;
      for (let end; (end = rest.indexOf("\n\n", from)) >= 0; from = 0) {
        const { event, data } = Object.fromEntries(rest.slice(0, end).split("\n").map(field));
        rest = rest.slice(end + 2);
        if (data) yield { event, data: JSON.parse(data) };
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops listening leaves, and the service stops drawing
  }
}

/** @param {string} line a comment has no name */
function field(line) {
  const colon = line.indexOf(":");
  return [line.slice(0, colon), line.slice(colon + 1).trim()];
}
