/** A form that draws, steps 1 and 3: from its fields to a request, its code, and pictures. */

import { bodyOf, Problem } from "./api.js";
import { find, on } from "./dom.js";
import { Fields, show } from "./fields.js";
import { previewsOf, Result } from "./result.js";
import { Code } from "./snippets.js";

/**
 * @typedef {object} Given what one step has of its own
 * @property {string} path
 * @property {(sampler: string) => boolean} offered
 * @property {() => Record<string, any>} more fields that stand elsewhere
 * @property {() => import("./noise.js").Source | undefined | null} image to start from; null: it is not there yet
 * @property {HTMLElement[]} roots where else fields stand
 * @property {(image: any, answer: any, fields: any) => string | undefined} link
 * @property {(source: import("./noise.js").Source) => void} onNoise
 * @property {() => unknown} onDrawn awaited: what it puts elsewhere is there before anything else is asked for
 */

export class Drawing {
  /** @param {HTMLElement} section @param {Given} given */
  constructor(section, given) {
    Object.assign(this, { given, form: find("form", section), code: new Code(find(".code", section)) });
    this.go = find(".go", section);
    this.fields = new Fields(this.form, given.offered);
    this.result = new Result(find(".result", section), given.onNoise);
    this.show = (problem) => show(problem, [this.form, ...given.roots], find(".problem", section));
    on(this.form, "input", ({ target }) => this.fields.allow(target));
    on(this.form, "submit", () => this.submit());
    on(section, "keydown", ({ key }) => key === "Escape" && this.result.cancel());
    this.result.rest(this.fields.inputs.n.valueAsNumber, [1, 28, 28]);
  }

  /** @param {any} model @param {any} limits @param {boolean} several models to choose from */
  configure(model, limits, several) {
    Object.assign(this, { model, limits, several });
    this.fields.configure(model, limits);
    this.update();
  }

  #read() {
    const { given, fields, model } = this;
    return { ...(this.several && { model: model.name }), ...given.more(), ...fields.read() };
  }

  /** What to show it on; the service judges how many there may be. */
  #tiles({ n = 1 }) {
    return { n: Math.min(Math.max(Math.trunc(n), 1), this.limits.n), shape: this.model.image_shape };
  }

  /** Something on the screen has changed. */
  update() {
    if (!this.model) return;
    const image = this.given.image();
    this.go.disabled = image === null;
    try {
      const fields = this.#read();
      const { n, shape } = this.#tiles(fields);
      this.result.rest(n, shape);
      this.code.show(image === null ? null : { path: this.given.path, image, fields, n });
    } catch {
      this.code.show(null); // a field is no number: submit() tells
    }
  }

  async submit() {
    this.show(null);
    try {
      const { path, link, onDrawn } = this.given;
      const image = this.given.image();
      if (image === null) throw new Problem("It needs a picture in step 2.");
      const fields = this.#read();
      const most = (fields.t ?? this.model.num_train_steps - 1) + 1;
      const previews = previewsOf(Math.min(fields.steps ?? this.fields.sampler.steps, most));
      const answer = await this.result.run({
        path,
        request: bodyOf({ ...fields, previews }, image?.blob),
        ...this.#tiles(fields),
        names: this.model.class_names,
        link: (one, whole) => link(one, whole, fields),
      });
      if (answer) await onDrawn();
    } catch (error) {
      this.show(error);
    }
  }
}
