/** The page put together: three steps, the service's state, the key, and the link to what is on the screen. */

import { access, Problem, send } from "./api.js";
import { all, find, on } from "./dom.js";
import { Drawing } from "./drawing.js";
import { randomSeed, show } from "./fields.js";
import { Noise } from "./noise.js";
import { lately } from "./patience.js";
import { Code } from "./snippets.js";
import { watch } from "./status.js";

for (const place of all("[data-clone]")) place.replaceWith(find(`#draw .${place.dataset.clone}`).cloneNode(true));
on(document, "submit", (event) => event.preventDefault());

const noise = new Noise(find("#noise"));
const code = new Code(find("#noise .code"));

const draw = new Drawing(find("#draw"), {
  path: "generate",
  offered: () => true,
  more: () => ({}),
  image: () => undefined,
  roots: [],
  link({ seed, label }, { model, sampler, steps }, { eta, guidance_scale, scale }) {
    const given = Object.entries({ eta, guidance_scale: label === null ? undefined : guidance_scale, scale });
    const query = new URLSearchParams(given.filter(([, value]) => value !== undefined)).toString();
    return `images/${model}/${sampler}-${steps}/${label ?? "none"}/${seed}.png${query && `?${query}`}`;
  },
  onNoise: toNoise,
  onDrawn: () => (noise.own ? update() : noise.put(draw.result.source(), false)),
});

const denoise = new Drawing(find("#denoise"), {
  path: "denoise",
  offered: (sampler) => sampler !== "learned", // its plans start from pure noise
  more: () => ({ t: noise.t, ...noise.seed }),
  image: () => (noise.blank ? null : noise.source),
  roots: [noise.form],
  link: () => undefined,
  onNoise: toNoise,
  onDrawn: update,
});

/** @param {import("./noise.js").Source} source */
async function toNoise(source) {
  await noise.put(source);
  noise.section.scrollIntoView();
  noise.slider.focus({ preventScroll: true });
}

const { model, seed, scale, dice } = draw.form.elements;
seed.value = randomSeed();
denoise.form.elements.n.value = 4;
on(dice, "click", () => {
  seed.value = randomSeed();
  draw.submit();
});

/** What is on the screen has changed: so have the code and the link. */
function update() {
  draw.update();
  denoise.update();
  denoise.go.textContent = `Redraw from t = ${noise.t}`;
  find("#denoise .hint").hidden = !noise.blank;
  try {
    if (noise.source) code.show({ path: "noise", image: noise.source, fields: noise.fields, n: 1 });
  } catch {
    code.show(null); // its seed is no number
  }
  link();
}

on(find("main"), "input submit click", update);
on(noise, "change", update);

// ---- the link: the fragment says what is on the screen, and no server ever sees it

const PREFIXES = [[draw, ""], [denoise, "to_"]];

const link = lately(300, async () => {
  if (!served) return;
  const state = [...PREFIXES.flatMap(([step, prefix]) => step.fields.state(prefix)), ...(await noise.state())];
  if (served.models.length > 1) state.push(["model", model.value]);
  for (const { result, given } of [draw, denoise]) if (result.images) state.push([given.path, ""]);
  history.replaceState(null, "", `#${new URLSearchParams(state)}`);
});

async function restore() {
  const state = new URLSearchParams(location.hash.slice(1));
  model.value = state.get("model") ?? model.value;
  choose();
  for (const [step, prefix] of PREFIXES) step.fields.restore(state, prefix);
  await noise.restore(state);
  update();
  for (const step of [draw, denoise]) if (state.has(step.given.path)) await step.submit();
}

on(window, "hashchange", restore);

// ---- the model

/** @type {any} the answer of /capabilities */
let served;

/** The model that is chosen is the one that all steps speak of. */
function choose() {
  const { models, limits } = served;
  const chosen = models.find(({ name }) => name === model.value) ?? models[0];
  for (const step of [draw, noise, denoise]) step.configure(chosen, limits, models.length > 1);
  model.value = chosen.name;
  const without = find(".without");
  without.hidden = chosen.denoise;
  without.nextElementSibling.hidden = !chosen.denoise;
  without.textContent = `${chosen.name} is distilled: it draws from pure noise in few steps, and cannot start in between.`;
}

on(model, "change", choose);

const look = watch(async () => {
  const first = !served;
  served = await (await send("capabilities")).json();
  keys.hidden = true;
  find("#forget").hidden = !access.key;
  model.replaceChildren(...served.models.map(({ name }) => new Option(name)));
  model.closest(".field").hidden = served.models.length === 1;
  if (!first) return choose();
  const [, height] = served.models[0].image_shape;
  for (const input of [scale, denoise.form.elements.scale]) {
    if (input.value === input.defaultValue) input.value = Math.min(8, Math.ceil(256 / height));
  }
  await restore();
});

// ---- the key, where the service asks for one

const keys = find("#key");
on(access, "wanted", ({ detail }) => {
  keys.hidden = false;
  show(access.key ? Problem.at("key", detail) : null, [keys], find(".problem", keys));
  keys.elements.key.focus();
});
on(keys, "submit", () => {
  access.use(keys.elements.key.value.trim());
  keys.reset();
  look();
});
on(find("#forget"), "click", () => {
  access.use("");
  location.reload();
});
