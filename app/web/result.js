/** Where pictures form: the tiles, the progress of a request from start to end, and what a picture is good for. */

import { access, draw, send } from "./api.js";
import { all, announce, find, make, on } from "./dom.js";
import { patiently, sleep } from "./patience.js";
import { blob, copy, dataUrl, noise, save } from "./pictures.js";

const WATCH_MS = 700; // a chain that is over sooner is shown at this pace
const FRAMES = 40; // previews of one chain

/**
 * @typedef {object} Job
 * @property {string} path
 * @property {{body: BodyInit, headers?: object}} request
 * @property {number} n
 * @property {number[]} shape of a picture
 * @property {string[]} names of the labels, where they have any
 * @property {(image: any, answer: any) => string | undefined} link a picture's permanent URL
 */

const still = matchMedia("(prefers-reduced-motion)");

/** Every how many steps to ask for previews. @param {number} steps of the chain */
export const previewsOf = (steps) => Math.max(1, Math.ceil(steps / (still.matches ? 4 : FRAMES)));

let results = 0;

export class Result {
  #name = `picture-${++results}`;

  /** @param {HTMLElement} root @param {(source: import("./noise.js").Source) => void} onNoise */
  constructor(root, onNoise) {
    Object.assign(this, { root, onNoise, tiles: find(".tiles", root), caption: find(".caption", root) });
    on(find(".cancel", root), "click", () => this.cancel());
    on(find(".chosen", root), "click", (event) => this.#act(event));
    on(this.tiles, "change", () => this.#choose());
    new ResizeObserver(() => this.#arrange()).observe(this.tiles.parentElement);
  }

  /** Tiles of noise, until there are pictures. @param {number} n @param {number[]} shape */
  rest(n, shape) {
    if (!this.attempt && !this.images) this.#lay({ n, shape });
  }

  /** Draws, instead of what is being drawn. @param {Job} job @returns {Promise<any>} the answer; undefined: cancelled */
  async run(job) {
    this.cancel();
    const attempt = (this.attempt = Object.assign(new AbortController(), { job, begun: "" }));
    const { signal } = attempt;
    this.#say("asking", true);
    announce(job.n === 1 ? "drawing a picture" : `drawing ${job.n} pictures`);
    const once = () => draw(job.path, job.request, signal, (progress) => this.#progress(progress, attempt));
    try {
      const answer = await patiently(once, signal, (text, first) => {
        this.#say(text, true);
        if (first) announce(text);
      });
      if (this.attempt !== attempt) return;
      this.#done(answer, job);
      return answer;
    } catch (error) {
      if (this.attempt !== attempt) return;
      this.#say("not drawn");
      throw error;
    } finally {
      if (this.attempt === attempt) this.attempt = null;
    }
  }

  cancel() {
    const { attempt } = this;
    if (!attempt) return;
    this.attempt = null;
    attempt.abort();
    this.#say(`cancelled${attempt.begun}`);
    announce("cancelled");
  }

  #lay({ n, shape: [channels, height, width] }) {
    this.images = null;
    const tile = (_, i) => {
      const input = make("input", { type: "radio", name: this.#name, value: i, checked: !i, disabled: true });
      const image = { src: noise([channels, height, width]), alt: `noise ${i + 1}`, width, height };
      return make("label", { className: "tile" }, input, make("img", image));
    };
    this.tiles.replaceChildren(...Array.from({ length: n }, tile));
    this.#arrange();
    this.#choose();
  }

  /** As many columns as make the tiles largest. */
  #arrange() {
    const { clientWidth: width, clientHeight: height } = this.tiles.parentElement;
    const n = this.tiles.childElementCount;
    const side = (columns) => Math.min(width / columns, height / Math.ceil(n / columns));
    let best = 1;
    for (let columns = 2; columns <= n; columns++) if (side(columns) > side(best)) best = columns;
    this.tiles.style.setProperty("--columns", best);
    this.tiles.style.setProperty("--rows", Math.ceil(n / best));
  }

  /** @param {any} progress @param {any} attempt */
  async #progress({ step, steps, queue_position, eta_s, previews }, attempt) {
    if (this.attempt !== attempt) return;
    if (!attempt.begun) this.#lay(attempt.job); // not before: a refused request leaves the pictures of the last one
    attempt.begun = ` at step ${step} of ${steps}`;
    const where = queue_position ? `${queue_position} before this one` : `step ${step} of ${steps}`;
    this.#say(`${where} · ${seconds(eta_s)} left`, true, step / steps);
    for (const { index, b64_json } of previews) this.#picture(index).src = dataUrl(b64_json);
    if (previews.length && !still.matches && !document.hidden) await sleep(WATCH_MS / Math.min(Math.max(steps, 6), FRAMES), attempt.signal);
  }

  #done(answer, job) {
    if (this.tiles.childElementCount !== answer.images.length) this.#lay(job);
    this.images = answer.images.map((image) => ({
      ...image,
      url: job.link(image, answer),
      words: `${image.seed}, label ${job.names[image.label] ?? image.label ?? "any"}`,
    }));
    this.images.forEach(({ b64_json, words }, i) => {
      const alt = `seed ${words}`;
      Object.assign(this.#picture(i), { src: dataUrl(b64_json), alt }).previousElementSibling.disabled = false;
    });
    const [first, last] = [this.images[0].seed, this.images.at(-1).seed];
    const seeds = first === last ? `seed ${first}` : `seeds ${first} to ${last}`;
    this.#say(`${seeds} · ${answer.sampler}, ${answer.steps} step${answer.steps === 1 ? "" : "s"}`, false, 1);
    announce(`done, ${seeds}`);
    this.#choose();
  }

  /** @param {string} text @param {boolean} running @param {number} share done */
  #say(text, running = false, share = 0) {
    find(".said", this.root).textContent = text;
    find("progress", this.root).value = share;
    const cancel = find(".cancel", this.root);
    if (!running && document.activeElement === cancel) find(".go", this.root.closest("section")).focus();
    cancel.hidden = !running;
    this.tiles.setAttribute("aria-busy", running);
  }

  /** @param {number} index @returns {HTMLImageElement} */
  #picture(index) {
    return find("img", this.tiles.children[index]);
  }

  /** A picture as x_0: at its own size its URL has no scale. @returns {import("./noise.js").Source} */
  source({ b64_json, url } = this.images[0]) {
    return { blob: blob(b64_json), url: url?.replace(/[?&]scale=\d+/, "") };
  }

  get #chosen() {
    return this.images?.[find(":checked", this.tiles)?.value];
  }

  #choose() {
    const image = this.#chosen;
    for (const button of all(".chosen button", this.root)) button.disabled = !image;
    const open = find(".chosen a", this.root);
    if (image?.url) open.href = image.url;
    else open.removeAttribute("href");
    this.caption.textContent = image ? `Seed ${image.words}` : "";
  }

  /** @param {MouseEvent} event */
  async #act(event) {
    const image = this.#chosen;
    const what = image && event.target.closest("[data-do]")?.dataset.do;
    if (what === "save") save(blob(image.b64_json), `seed-${image.seed}.png`);
    if (what === "noise") this.onNoise(this.source(image));
    if (what === "copy") this.#tell(copy(blob(image.b64_json)).then(() => "Copied"));
    if (what === "open" && access.key) {
      event.preventDefault();
      this.#tell(openWithKey(image.url));
    }
  }

  /** What came of a button. @param {Promise<string>} outcome */
  async #tell(outcome) {
    this.caption.textContent = await outcome.catch((error) => error.message);
    announce(this.caption.textContent);
  }
}

/** A link sends no key: the picture is fetched, and its bytes are shown. @param {string} url */
async function openWithKey(url) {
  const tab = window.open(); // now: after the answer it would be a pop-up
  try {
    tab.location = URL.createObjectURL(await (await send(url)).blob());
    return "Opened";
  } catch (error) {
    tab?.close();
    throw error;
  }
}

/** @param {number} s */
const seconds = (s) => (s < 9.5 ? `${s.toFixed(1)} s` : s < 90 ? `${Math.round(s)} s` : `${Math.round(s / 60)} min`);
