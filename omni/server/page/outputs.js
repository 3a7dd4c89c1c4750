/** What a finished job gave: pictures, clips, sounds, text, JSON and files, each with a link to keep it. */

import { call, mediaUrl, outputPath } from "./api.js";
import { el, icon, iconButton, size } from "./dom.js";

const LONGEST_SHOWN_CHARS = 200000;

/** Revoke the copies in memory that elements of `node` show. */
export function release(node) {
  for (const shown of node.querySelectorAll('[src^="blob:"], [href^="blob:"]')) URL.revokeObjectURL(shown.src ?? shown.href);
}

/** Elements for all outputs of a job; one that cannot be read says so. */
export function showOutputs(job, signal) {
  const all = Object.entries(job.outputs).flatMap(([name, values]) => values.map((value, index) => ({ name, value, index })));
  return Promise.all(all.map((output) => showOutput(job, output, all.length, signal)));
}

/** The first picture of a job, for the history: a path, or undefined. */
export function firstPicture(job) {
  for (const [name, values] of Object.entries(job.outputs)) {
    if (values[0]?.type === "image") return outputPath(job.id, name, 0);
  }
  return undefined;
}

async function showOutput(job, { name, value, index }, num, signal) {
  const path = outputPath(job.id, name, index);
  const title = job.outputs[name].length > 1 ? `${name} ${index + 1}` : name;
  const show = SHOW[value.type] ?? (() => unseen("This value has no picture."));
  const shown = await show({ path, value, title, job, signal }).catch((error) => unseen(`${title} cannot be read: ${error.message}`));
  const file = `${job.graph}-${job.seed}-${title.replace(" ", "-")}.${suffix(value.media_type)}`;
  const caption = el(
    "figcaption",
    {},
    el("span", { class: "name", textContent: title }),
    el("span", { class: "hint", textContent: `${value.media_type.split(";")[0]}, ${size(value.bytes)}` }),
    shown.copy && iconButton("copy", `Copy ${title}`, () => navigator.clipboard?.writeText(shown.copy)),
    el("a", { class: "button", href: shown.href ?? (await mediaUrl(path, signal)), download: file }, icon("down"), "Download"),
  );
  return el("figure", { class: `output ${value.type} ${num > 1 ? "several" : ""}` }, shown.node, caption);
}

const SHOW = {
  async image({ path, title, job, signal }) {
    const href = await mediaUrl(path, signal);
    const img = el("img", { src: href, alt: `${title} of ${job.graph}, seed ${job.seed}` });
    await img.decode().catch(() => null); // a picture that cannot be shown keeps its text and its download
    return { node: el("a", { href, target: "_blank", rel: "noopener", "aria-label": `${title} in full size` }, img), href };
  },
  async video({ path, title, signal }) {
    const href = await mediaUrl(path, signal);
    return { node: el("video", { src: href, controls: true, loop: true, playsinline: true, "aria-label": title }), href };
  },
  async audio({ path, title, signal }) {
    const href = await mediaUrl(path, signal);
    return { node: el("audio", { src: href, controls: true, "aria-label": title }), href };
  },
  async text({ path, value, signal }) {
    const text = value.text ?? (await (await call(path, { signal })).text());
    return { node: el("p", { class: "text", textContent: text.slice(0, LONGEST_SHOWN_CHARS) }), copy: text };
  },
  async json({ path, value, signal }) {
    const text = pretty(value.text ?? (await (await call(path, { signal })).text()));
    return { node: el("pre", { tabindex: "0", textContent: text.slice(0, LONGEST_SHOWN_CHARS) }), copy: text };
  },
};

const unseen = async (reason) => ({ node: el("p", { class: "hint", textContent: reason }) });

/** JSON with one value a line; what is no JSON as it is. */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

const suffix = (mediaType) =>
  ({ "image/jpeg": "jpg", "text/plain": "txt", "audio/x-wav": "wav", "application/octet-stream": "bin" })[mediaType.split(";")[0]] ??
  mediaType.split(";")[0].split("/")[1];
