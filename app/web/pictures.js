/** Pictures as bytes: from the API's base64, to a file or the clipboard; and noise to begin with. */

import { make } from "./dom.js";

/** @param {string} b64 */
export const dataUrl = (b64) => `data:image/png;base64,${b64}`;

/** The very bytes that the service sent, facts and all. @param {string} b64 */
export const blob = (b64) => new Blob([Uint8Array.from(atob(b64), (byte) => byte.charCodeAt(0))], { type: "image/png" });

/** @param {Blob} file @returns {Promise<string>} base64 */
export async function b64(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
}

/** @param {Blob} file @param {string} name */
export function save(file, name) {
  const url = URL.createObjectURL(file);
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** @param {Blob} file */
export async function copy(file) {
  if (!window.ClipboardItem) throw new Error("Browsers copy pictures on https pages alone: save it instead");
  await navigator.clipboard.write([new ClipboardItem({ [file.type]: file })]);
}

/** Gaussian noise, as pictures start from; not the service's own. @param {number[]} shape */
export function noise([channels, height, width]) {
  const canvas = make("canvas", { width, height });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const first = normal();
    for (let c = 0; c < 3; c++) pixels.data[i + c] = c && channels > 1 ? normal() : first;
    pixels.data[i + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  return canvas.toDataURL();
}

const normal = () => 127.5 * (1 + Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random()));
