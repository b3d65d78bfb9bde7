/** What is served and whether it is ready, asked every few seconds while somebody looks. */

import { Problem, send } from "./api.js";
import { find, on } from "./dom.js";

const EVERY_MS = 2500;
const SOON_MS = 1000; // while it is not ready

const BANNERS = {
  starting: "The model is loading. Drawing is possible in a moment.",
  draining: "The service is shutting down. It takes no new work.",
  failed: "The engine has failed. The service must be restarted.",
  unreachable: "The service cannot be reached. Trying again.",
};

/** @param {string} status @param {any} [answer] of /health */
function show(status, answer) {
  const banner = find("#banner");
  const text = BANNERS[status] ?? "";
  if (banner.textContent !== text) banner.textContent = text;
  banner.classList.toggle("shown", text !== "");
  document.body.dataset.status = status;
  const parts = [status === "ok" ? "ready" : status];
  if (answer?.device) {
    const { device, engine, model, models, version } = answer;
    const sum = (name) => models.reduce((total, one) => total + one.engine[name], 0);
    parts.push(models.length > 1 ? `${models.length} models` : model, device, engine.exact ? "exact" : "not exact");
    parts.push(`${sum("slots_running")} running, ${sum("slots_waiting")} waiting`);
    find("#exactness").textContent = `${version} · ${engine.runtime} · ${engine.exactness}`;
  }
  find("#state").textContent = parts.join(" · ");
}

/**
 * Watches the service.
 * @param {() => Promise<void>} onReady called when it has become ready, again until that succeeds
 * @returns {() => void} looks at once
 */
export function watch(onReady) {
  let timer = 0;
  let ready = false;
  async function look() {
    clearTimeout(timer);
    if (document.hidden) return;
    let again = true;
    try {
      const answer = await (await send("health", { cache: "no-store" }, 503)).json();
      show(answer.status, answer);
      if (answer.status === "ok" && !ready) await onReady();
      ready = answer.status === "ok";
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      ready = false;
      show(error.status === 401 ? "key needed" : "unreachable");
      again = error.status !== 401; // the key's form looks again
    } finally {
      if (again) timer = setTimeout(look, ready ? EVERY_MS : SOON_MS);
    }
  }
  on(document, "visibilitychange", look);
  look();
  return look;
}
