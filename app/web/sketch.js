/** The picture x_0 on its canvas, pixel for pixel in the model's shape: drawn by hand, or put there and drawn over. */

import { on } from "./dom.js";

const KEPT = 50; // states to go back to
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** Dispatches "stroke" when somebody has changed the picture. */
export class Sketch extends EventTarget {
  blank = true;
  #kept = [];
  #pen = { x: 14, y: 14, down: false };

  /** @param {HTMLCanvasElement} canvas its cursor is beside it @param {HTMLFormElement} form with the tools */
  constructor(canvas, form) {
    super();
    Object.assign(this, { canvas, tools: form.elements });
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    on(canvas, "pointerdown", (event) => {
      if (event.button) return;
      canvas.setPointerCapture(event.pointerId);
      this.#lower(...this.#at(event));
    });
    on(canvas, "pointermove", (event) => {
      if (!canvas.hasPointerCapture(event.pointerId)) return;
      for (const one of event.getCoalescedEvents?.() ?? [event]) this.#line(...this.#at(one));
    });
    on(canvas, "pointerup pointercancel", () => this.#lift());
    on(canvas, "keydown", (event) => this.#key(event));
  }

  /** @param {number[]} shape of the model's pictures */
  resize([channels, height, width]) {
    this.grey = channels === 1;
    this.tools.colour.hidden = this.grey;
    if (this.canvas.width === width && this.canvas.height === height) return;
    Object.assign(this.canvas, { width, height });
    this.#kept = [];
    this.#fill();
  }

  clear() {
    this.#keep();
    this.#fill();
    this.#changed();
  }

  undo() {
    const last = this.#kept.pop();
    if (!last) return;
    this.context.putImageData(last.pixels, 0, 0);
    this.blank = last.blank;
    this.#changed();
  }

  /** Puts a picture there, in the canvas's size. @param {Blob} file @param {boolean} foreign may have colours */
  async put(file, foreign) {
    const picture = await createImageBitmap(file).catch(() => null);
    const { context, canvas } = this;
    this.#keep();
    if (!picture) return this.#fill(); // the service may read what browsers cannot
    context.imageSmoothingEnabled = picture.width % canvas.width !== 0; // ours, enlarged, come back as they were
    context.filter = foreign && this.grey ? "grayscale(1)" : "none";
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    context.filter = "none";
    this.blank = false;
  }

  /** @returns {Promise<Blob>} */
  png() {
    return new Promise((resolve) => this.canvas.toBlob(resolve));
  }

  #changed() {
    this.dispatchEvent(new Event("stroke"));
  }

  #fill() {
    this.context.fillStyle = "#000";
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.blank = true;
  }

  #keep() {
    const { width, height } = this.canvas;
    this.#kept.push({ pixels: this.context.getImageData(0, 0, width, height), blank: this.blank });
    this.#kept.splice(0, this.#kept.length - KEPT);
  }

  /** @param {PointerEvent} event */
  #at(event) {
    const box = this.canvas.getBoundingClientRect();
    const share = this.canvas.width / box.width;
    return [(event.clientX - box.left) * share, (event.clientY - box.top) * share];
  }

  #lower(x, y) {
    this.#keep();
    Object.assign(this.#pen, { x, y, down: true });
    this.#line(x, y);
  }

  #lift() {
    this.#pen.down = false;
    this.#changed();
  }

  /** Space lifts and lowers the pen, arrows move it. @param {KeyboardEvent} event */
  #key(event) {
    const pen = this.#pen;
    const { width, height } = this.canvas;
    const [dx, dy] = MOVES[event.key] ?? [];
    if (event.key !== " " && !MOVES[event.key]) return;
    event.preventDefault();
    if (event.key === " ") pen.down ? this.#lift() : this.#lower(pen.x, pen.y);
    else this.#line(Math.min(Math.max(pen.x + dx, 1), width - 1), Math.min(Math.max(pen.y + dy, 1), height - 1));
    const cursor = this.canvas.nextElementSibling;
    cursor.style.left = `${(100 * pen.x) / width}%`;
    cursor.style.top = `${(100 * pen.y) / height}%`;
    cursor.classList.toggle("down", pen.down);
  }

  /** Moves the pen, which draws when it is down. */
  #line(x, y) {
    const { context, tools } = this;
    const pen = this.#pen;
    if (pen.down) {
      context.lineWidth = (tools.brush.valueAsNumber * this.canvas.width) / 28; // as wide in any size
      context.lineCap = "round";
      context.strokeStyle = tools.colour.value;
      context.beginPath();
      context.moveTo(pen.x, pen.y);
      context.lineTo(x, y);
      context.stroke();
      this.blank = false;
    }
    Object.assign(pen, { x, y });
  }
}
