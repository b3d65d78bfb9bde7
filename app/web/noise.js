/** Step 2: a picture, and what the forward process makes of it at every t. */

import { bodyOf, Problem, send } from "./api.js";
import { find, make, on } from "./dom.js";
import { number, randomSeed, show } from "./fields.js";
import { lately, patiently } from "./patience.js";
import { b64, blob, dataUrl } from "./pictures.js";
import { plot } from "./plot.js";
import { Sketch } from "./sketch.js";

const STRIP = 31; // with the slider's own, the most t that one request may ask for
const SHOWN = 11; // of the strip, over the slider
const IN_A_LINK = 4000; // characters of a picture

/** @typedef {{blob: Blob, name?: string, url?: string}} Source x_0: a file by its name, a drawn picture by its URL */

/** Dispatches "change" when what is on the screen has changed. */
export class Noise extends EventTarget {
  /** @type {Source | undefined} blank paper at first */
  source;
  /** Whether it is somebody's own, not the first picture of step 1. */
  own = false;
  /** By t. @type {Map<number, {t: number, alpha_bar: number, snr: number, b64_json: string}>} */
  #frames = new Map();
  #failed = false;
  #strip = new AbortController();
  #exact = new AbortController();
  #exactly = lately(80, () => {
    this.#exact.abort();
    return this.#fetch([this.t], (this.#exact = new AbortController()));
  });
  #anew = lately(120, () => this.#refresh());

  /** @param {HTMLElement} section */
  constructor(section) {
    super();
    Object.assign(this, { section, form: find("form", section), slider: find("[name=t]", section) });
    this.seedInput = this.form.elements.seed;
    this.sketch = new Sketch(find("canvas", section), this.form);
    this.#listen();
  }

  /** @param {any} model @param {any} limits @param {boolean} several models to choose from */
  configure(model, limits, several) {
    Object.assign(this, { model, limits, several });
    this.slider.max = model.num_train_steps - 1;
    this.sketch.resize(model.image_shape);
    this.#redrawn();
  }

  get blank() {
    return this.sketch.blank && !this.source?.name;
  }

  get t() {
    return this.slider.valueAsNumber;
  }

  /** @throws {Problem} it is no number */
  get seed() {
    const seed = number(this.seedInput);
    return seed === undefined ? {} : { seed };
  }

  /** What /noise is asked for. */
  get fields() {
    return { t: this.t, fit: "model", ...this.seed, ...(this.several && { model: this.model.name }) };
  }

  /** @param {Source} source @param {boolean} own */
  async put(source, own = true) {
    this.own = own;
    if (own) this.#tell(null);
    await this.sketch.put(source.blob, Boolean(source.name));
    this.source = source.name ? source : { ...source, blob: await this.sketch.png() };
    await this.#refresh();
  }

  /** Takes what is on the paper. */
  async #redrawn() {
    this.source = { blob: await this.sketch.png() };
    this.#anew();
  }

  /** For a link: a small picture travels along. @returns {Promise<[string, string][]>} */
  async state() {
    const x_0 = this.own ? await b64(await this.sketch.png()) : "";
    const picture = x_0 && x_0.length < IN_A_LINK ? [["x_0", x_0]] : [];
    return [["t", this.slider.value], ["noise_seed", this.seedInput.value], ...picture];
  }

  /** @param {URLSearchParams} state */
  async restore(state) {
    this.slider.value = state.get("t") ?? this.slider.value;
    this.seedInput.value = state.get("noise_seed") ?? this.seedInput.value;
    if (!state.has("x_0")) return;
    try {
      await this.put({ blob: blob(state.get("x_0")) });
    } catch {
      this.#tell(new Problem("The picture in this link cannot be read."), false);
    }
  }

  /** Fetches what the slider passes over, all at once, and what it stands at. */
  async #refresh() {
    if (!this.model) return; // configure() comes back to it
    this.#frames.clear();
    this.slider.disabled = false;
    this.section.classList.toggle("blank", this.blank);
    const last = this.model.num_train_steps - 1;
    const strip = Array.from({ length: STRIP }, (_, i) => Math.round((last * i) / (STRIP - 1)));
    this.#strip.abort();
    this.#exact.abort(); // it may be of another picture
    await this.#fetch([...new Set([this.t, ...strip])], (this.#strip = new AbortController()));
    this.dispatchEvent(new Event("change"));
  }

  /** @param {number[]} wanted @param {AbortController} controller */
  async #fetch(wanted, { signal }) {
    const t = wanted.filter((one) => !this.#frames.has(one));
    if (!t.length) return;
    const wait = (text, first) => first && this.#tell(new Problem(text)); // an alert every second is too many
    try {
      const images = await patiently(() => this.#ask(t, signal), signal, wait);
      if (signal.aborted) return;
      for (const frame of images) this.#frames.set(frame.t, frame);
      if (this.#failed) this.#tell(null);
      this.#render();
    } catch (error) {
      if (!signal.aborted) this.#tell(error);
    }
  }

  /** @param {Error | null} problem @param {boolean} passing the next answer ends it */
  #tell(problem, passing = true) {
    this.#failed = passing && problem !== null;
    show(problem, [this.form], find(".problem", this.section));
  }

  async #ask(t, signal) {
    const { blob, name } = this.source;
    if (blob.size > this.limits.body_bytes) throw Problem.at("image", `${name} is larger than the service takes`);
    const { body } = bodyOf({ ...this.fields, t }, blob);
    const answer = await send("noise", { method: "POST", body, headers: { Accept: "application/json" }, signal });
    return (await answer.json()).images;
  }

  /** What is known of t: its own frame, or the nearest one until that is there. */
  #render() {
    const { t, section } = this;
    const known = [...this.#frames.values()].sort((a, b) => a.t - b.t);
    if (!known.length) return;
    const now = known.reduce((a, b) => (Math.abs(b.t - t) < Math.abs(a.t - t) ? b : a));
    const picture = find("#x_t", section);
    picture.src = dataUrl(now.b64_json);
    picture.dataset.t = now.t;
    const numbers = { t, alpha_bar: short(now.alpha_bar), snr: short(now.snr) };
    for (const [name, text] of Object.entries(numbers)) find(`[data-is=${name}]`, section).textContent = text;
    this.slider.setAttribute("aria-valuetext", `${t}, signal to noise ${numbers.snr}`);
    plot(find("#plot", section), known, now, this.model.num_train_steps - 1);
    const shown = Array.from({ length: SHOWN }, (_, i) => known[Math.round((i * (known.length - 1)) / (SHOWN - 1))]);
    find(".strip", section).replaceChildren(
      ...shown.map(({ b64_json }) => make("img", { src: dataUrl(b64_json), alt: "" })),
    );
  }

  #listen() {
    const { form, sketch, section } = this;
    const file = find("[type=file]", form);
    const take = (one) => one && this.put({ blob: one, name: one.name || "picture.png" });
    on(sketch, "stroke", () => {
      this.own = !sketch.blank;
      this.#tell(null);
      this.#redrawn();
    });
    on(form, "click", ({ target }) => {
      const what = target.closest("button")?.dataset.do;
      if (what === "upload") file.click();
      if (what === "undo" || what === "clear") sketch[what]();
      if (what === "dice") {
        this.seedInput.value = randomSeed();
        this.#refresh();
      }
    });
    on(file, "change", () => take(file.files[0]));
    on(this.slider, "input", () => {
      this.#render();
      this.#exactly();
    });
    on(this.seedInput, "input", this.#anew);
    on(document, "paste", ({ clipboardData }) => take(clipboardData.files[0]));
    on(section, "dragover dragleave drop", (event) => {
      event.preventDefault();
      section.classList.toggle("over", event.type === "dragover");
      if (event.type === "drop") take(event.dataTransfer.files[0]);
    });
  }
}

/** @param {number} value */
const short = (value) => (value >= 1000 || value < 0.001 ? value.toExponential(1) : value.toPrecision(3));
