/** How much of x_t is picture and how much is noise, over t. */

const [LEFT, TOP, WIDTH, HEIGHT] = [8, 12, 304, 152];
const SHARES = { noise: (abar) => Math.sqrt(1 - abar), picture: Math.sqrt };

/** @param {string} tag @param {Record<string, any>} attributes @param {string} text */
function svg(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

/**
 * @param {SVGElement} element
 * @param {{t: number, alpha_bar: number}[]} known in the order of t
 * @param {{t: number, alpha_bar: number}} now
 * @param {number} last T - 1
 */
export function plot(element, known, now, last) {
  const x = (t) => LEFT + (WIDTH * t) / last;
  const y = (share) => TOP + HEIGHT * (1 - share);
  const curves = Object.entries(SHARES).flatMap(([name, share]) => [
    svg("polyline", { class: name, points: known.map((one) => `${x(one.t)},${y(share(one.alpha_bar))}`).join(" ") }),
    svg("circle", { class: name, cx: x(now.t), cy: y(share(now.alpha_bar)), r: 4 }),
  ]);
  const right = { x: LEFT + WIDTH, "text-anchor": "end" };
  element.replaceChildren(
    svg("path", { class: "axis", d: `M${LEFT} ${y(1)}h${WIDTH}M${LEFT} ${y(0)}h${WIDTH}` }),
    svg("path", { class: "now", d: `M${x(now.t)} ${y(1)}V${y(0)}` }),
    ...curves,
    svg("text", { x: LEFT, y: y(0) + 16 }, "t = 0"),
    svg("text", { ...right, y: y(0) + 16 }, last),
    svg("text", { x: LEFT, y: y(1) + 20, class: "picture" }, "picture"),
    svg("text", { ...right, y: y(1) + 20 }, "noise"),
  );
}
