/** The fields of a request: filled from what the model offers, read as JSON, marked where the service found fault. */

import { Problem } from "./api.js";
import { all, find, make } from "./dom.js";

/** What the API takes where a field is left out: so it is left out. */
const DEFAULTS = { n: 1, sampler: "balanced", eta: 0, guidance_scale: 1, scale: 1 };
const NUMBERS = ["n", "steps", "eta", "guidance_scale", "seed", "scale"];
const NAMES = ["sampler", ...NUMBERS];
const SEEDS = 1_000_000; // random ones are short enough to be told

export const randomSeed = () => Math.floor(Math.random() * SEEDS);

/** The fields of one form that draws. */
export class Fields {
  /** @param {HTMLFormElement} form @param {(sampler: string) => boolean} offered of the model's samplers */
  constructor(form, offered) {
    Object.assign(this, { form, offered, inputs: form.elements });
  }

  /** Takes what a model offers; what was chosen stays, as far as it is there. @param {any} model @param {any} limits */
  configure(model, limits) {
    this.model = model;
    this.inputs.n.max = limits.n;
    this.inputs.scale.max = limits.scale;
    const names = Array.from({ length: model.num_classes }, (_, i) => [i, model.class_names[i] ?? i]);
    if (model.unlabelled) names.unshift(["null", "any"]);
    const choices = find(".choices", this.form);
    const chosen = this.labels;
    choices.parentElement.hidden = !model.num_classes;
    choices.replaceChildren(
      ...names.map(([value, text]) => {
        const box = make("input", { type: "checkbox", name: "label", value });
        return make("label", {}, box, make("span", { textContent: text }));
      }),
    );
    this.labels = chosen;
    const { sampler } = this.inputs;
    const was = sampler.value || DEFAULTS.sampler;
    const samplers = model.samplers.filter(({ name }) => this.offered(name));
    const group = (label, preset) =>
      make("optgroup", { label }, ...samplers.filter((one) => one.preset === preset).map(({ name }) => new Option(name)));
    sampler.replaceChildren(group("Presets", true), group("Samplers", false));
    if (samplers.some(({ name }) => name === was)) sampler.value = was;
    this.allow();
  }

  /** @returns {string[]} "null" for any */
  get labels() {
    return all("[name=label]:checked", this.form).map(({ value }) => value);
  }
  set labels(values) {
    const boxes = all("[name=label]", this.form);
    for (const box of boxes) box.checked = values.includes(box.value);
    if (boxes.length && !this.labels.length) boxes[0].checked = true;
  }

  get sampler() {
    return this.model.samplers.find(({ name }) => name === this.inputs.sampler.value);
  }

  /** The request. @returns {Record<string, any>} @throws {Problem} a field is no number */
  read() {
    /** @type {Record<string, any>} */
    const body = {};
    const labels = this.labels.filter((value) => value !== "null").map(Number);
    const n = number(this.inputs.n) ?? DEFAULTS.n;
    if (labels.length > 1) body.label = Array.from({ length: n }, (_, i) => labels[i % labels.length]);
    else if (labels.length) [body.label] = labels;
    for (const name of NAMES) {
      const input = this.inputs[name];
      if (!input || input.disabled) continue;
      const value = name === "sampler" ? input.value : number(input);
      if (value !== undefined && value !== DEFAULTS[name]) body[name] = value;
    }
    return body;
  }

  /** For a link. @param {string} prefix of the names @returns {[string, string][]} */
  state(prefix) {
    const given = NAMES.filter((name) => this.inputs[name]?.value && !this.inputs[name].disabled);
    return [["label", this.labels.join()], ...given.map((name) => [name, this.inputs[name].value])].map(
      ([name, value]) => [prefix + name, value],
    );
  }

  /** @param {URLSearchParams} state @param {string} prefix */
  restore(state, prefix) {
    this.labels = state.get(`${prefix}label`)?.split(",") ?? this.labels;
    for (const name of NAMES) {
      const input = this.inputs[name];
      const value = state.get(prefix + name);
      const offered = !input?.options || [...input.options].some((option) => option.value === value);
      if (input && value !== null && offered) input.value = value; // a link of another model may want what is not here
    }
    this.allow();
  }

  /** "any" goes with no other label, and what cannot be asked for cannot be filled in. @param {Element} [changed] */
  allow(changed) {
    if (!this.model) return;
    if (changed?.name === "label") {
      const fits = (value) => !changed.checked || (value === "null") === (changed.value === "null");
      this.labels = this.labels.filter(fits);
    }
    const { guidance_scale, eta, steps } = this.inputs;
    const { name, sampler, steps: own, steps_allowed: only } = this.sampler;
    guidance_scale.disabled = !this.model.guidance || this.labels.every((value) => value === "null");
    eta.disabled = name !== "ddim" || only !== null;
    steps.disabled = only?.length === 1;
    steps.placeholder = this.offered(sampler) ? own : "its own";
  }
}

/**
 * What stands in a field, which the service judges; only what is no number never gets there.
 * @param {HTMLInputElement} input
 * @returns {number | undefined}
 */
export function number(input) {
  const text = input.value.trim();
  if (input.validity.badInput || Number.isNaN(Number(text))) throw Problem.at(input.name, "a number is needed");
  return text === "" ? undefined : Number(text);
}

/**
 * Shows a problem: at the fields that it names, the rest below.
 * @param {Error | null} problem null: all is well
 * @param {HTMLElement[]} roots that may have the fields
 * @param {HTMLElement} below
 */
export function show(problem, roots, below) {
  for (const root of roots) {
    all(".error", root).forEach((old) => old.remove());
    for (const input of all("[aria-invalid]", root)) {
      input.removeAttribute("aria-invalid");
      input.removeAttribute("aria-describedby");
    }
  }
  const errors = problem?.errors ?? [];
  const rest = errors.filter(({ field, detail }) => {
    const places = roots.flatMap((root) => all(`[data-field="${field.split(".")[0]}"]:not([hidden])`, root));
    places.slice(0, 1).forEach((place) => mark(place, detail));
    return !places.length;
  });
  below.textContent = errors.length ? rest.map(({ field, detail }) => `${field}: ${detail}`).join("; ") : (problem?.message ?? "");
  below.hidden = !below.textContent;
  find("[aria-invalid]:enabled", roots[0])?.focus();
}

let marks = 0;

/** @param {Element} place @param {string} detail */
function mark(place, detail) {
  const error = make("p", { className: "error", id: `error-${++marks}`, textContent: detail });
  place.append(error);
  for (const input of all("input, select, canvas", place)) {
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-describedby", error.id);
  }
}
