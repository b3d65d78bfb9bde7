/** The few words that all modules say to the document. */

/** @type {(selector: string, root?: ParentNode) => any} */
export const find = (selector, root = document) => root.querySelector(selector);

/** @type {(selector: string, root?: ParentNode) => any[]} */
export const all = (selector, root = document) => [...root.querySelectorAll(selector)];

/** @type {(tag: string, properties: object, ...children: Node[]) => any} */
export function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** @type {(target: EventTarget, kinds: string, call: (event: any) => unknown) => void} */
export const on = (target, kinds, call) => kinds.split(" ").forEach((kind) => target.addEventListener(kind, call));

/** Tells those who do not see it. @param {string} text */
export const announce = (text) => (find("#live").textContent = text);
