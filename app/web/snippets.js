/** The same request as curl and as Python: what they write has the bytes that are on the screen. */

import { access } from "./api.js";
import { all, announce, find, on } from "./dom.js";
import { b64 } from "./pictures.js";

const IN_CODE = 6000; // characters of a picture

/**
 * @typedef {object} Call
 * @property {string} path
 * @property {Record<string, any>} fields
 * @property {import("./noise.js").Source} [image]
 * @property {number} n pictures; several come as a ZIP of the very files
 */

const url = (path) => new URL(path, document.baseURI).href;
const quote = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const lines = (text) => text.match(/.{1,76}/g).join("\n");
const fileOf = ({ path, n }) => `${path}.${n > 1 ? "zip" : "png"}`;

/** As -F takes it. @param {string} name */
const upload = (name) =>
  /^[\w.-]+$/.test(name) ? `image=@${name}` : quote(`image=@"${name.replace(/["\\]/g, "\\$&")}"`);

/** @param {Call} call @param {string} x_0 base64 of an image that is in no file */
function curl({ path, fields, image, n }, x_0) {
  const key = access.key && ' \\\n  -H "Authorization: Bearer $DDPM_API_KEY"';
  const zip = n > 1 ? " -H 'Accept: application/zip'" : "";
  const form = Object.entries(fields).map(([name, value]) => ` -F ${name}=${value}`);
  const before = image?.url
    ? `curl ${quote(url(image.url))}${key} -o x_0.png\n`
    : x_0 && `base64 --decode > x_0.png <<END\n${lines(x_0)}\nEND\n`;
  const body = image
    ? `-F ${upload(image.name ?? "x_0.png")}${form.join("")}`
    : `-H 'Content-Type: application/json' \\\n  -d ${quote(JSON.stringify(fields))}`;
  return `${before}curl ${url(path)}${key}${zip} \\\n  ${body} \\\n  -o ${fileOf({ path, n })}`;
}

/** @param {Call} call @param {string} x_0 the same */
function python({ path, fields, image, n }, x_0) {
  const dict = (entries) => `{${entries.map(([name, value]) => `"${name}": ${JSON.stringify(value)}`).join(", ")}}`;
  const key = access.key && `"Authorization": f"Bearer {os.environ['DDPM_API_KEY']}"`;
  const headers = [key, n > 1 && '"Accept": "application/zip"'].filter(Boolean).join(", ");
  const read = image?.url
    ? `httpx.get("${url(image.url)}"${key && `, headers={${key}}`}).raise_for_status().content`
    : x_0
      ? `base64.b64decode("""\n${lines(x_0)}\n""")`
      : `Path(${JSON.stringify(image?.name ?? "x_0.png")}).read_bytes()`;
  const form = Object.entries(fields).map(([name, value]) => [name, String(value)]);
  return [
    x_0 && "import base64",
    key && "import os",
    "from pathlib import Path\n\nimport httpx\n",
    image && `x_0 = ${read}`,
    `answer = httpx.post(\n    "${url(path)}",`,
    image ? `    files={"image": x_0},\n    data=${dict(form)},` : `    json=${dict(Object.entries(fields))},`,
    headers && `    headers={${headers}},`,
    "    timeout=None,\n)\nanswer.raise_for_status()",
    `Path("${fileOf({ path, n })}").write_bytes(answer.content)`,
  ].filter(Boolean).join("\n");
}

const LANGUAGES = { curl, python };

/** A panel of code. All of them speak the same language. */
export class Code {
  static all = [];
  static language = "curl";

  /** @param {HTMLElement} root */
  constructor(root) {
    Object.assign(this, { root, code: find("code", root) });
    for (const radio of all("[type=radio]", root)) radio.name = `language-${Code.all.length}`;
    Code.all.push(this);
    on(root, "change", ({ target }) => {
      Code.language = target.value;
      for (const one of Code.all) {
        find(`[value=${Code.language}]`, one.root).checked = true;
        one.show(one.call);
      }
    });
    on(find(".copy", root), "click", async () => {
      getSelection().selectAllChildren(this.code);
      const old = () => document.execCommand("copy"); // where a page over http has no clipboard
      await (navigator.clipboard?.writeText(this.code.textContent).catch(old) ?? old());
      announce("code copied");
    });
  }

  /** @param {Call | null} call null: there is nothing to ask for yet */
  async show(call) {
    this.call = call;
    this.root.hidden = !call;
    const { name, url, blob } = call?.image ?? {};
    const text = blob && !name && !url ? await b64(blob) : "";
    if (call && call === this.call) {
      this.code.textContent = LANGUAGES[Code.language](call, text.length < IN_CODE ? text : "");
    }
  }
}
