/** Waiting: for a moment, or until the service lets one in. */

/** @param {number} ms @param {AbortSignal} signal ends it early, as an error @returns {Promise<void>} */
export function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    setTimeout(() => (signal.aborted ? reject(signal.reason) : resolve()), ms);
  });
}

/**
 * Calls again for as long as the service is full or not ready: its answer says in how many seconds.
 * @template T
 * @param {() => Promise<T>} call
 * @param {AbortSignal} signal
 * @param {(text: string, first: boolean) => void} tell told every second
 * @returns {Promise<T>}
 */
export async function patiently(call, signal, tell) {
  for (;;) {
    try {
      return await call();
    } catch (error) {
      if (!error.retryAfter) throw error;
      for (let left = error.retryAfter; left > 0; left--) {
        tell(`${error.message}; again in ${left} s`, left === error.retryAfter);
        await sleep(1000, signal);
      }
    }
  }
}

/** A call that starts when no other has come for a while. @param {number} ms @param {() => unknown} call */
export function lately(ms, call) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(call, ms);
  };
}
