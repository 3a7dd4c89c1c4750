/** Uploads: chosen, dropped or pasted files with a preview. */

import { call } from "./api.js";
import { el, icon, iconButton, size } from "./dom.js";
import { Field, baseType } from "./field.js";

const ACCEPT = { image: "image/*", video: "video/*", audio: "audio/*", tensor: ".safetensors" };

/** Whether an input is filled by files. */
export const isMedia = (schema) => baseType(schema) in ACCEPT;

/** Whether a dragged or pasted thing is a file. */
const holdsFiles = (transfer) => [...(transfer?.types ?? [])].includes("Files");

export class MediaField extends Field {
  makeControl() {
    this.type = baseType(this.schema);
    this.many = this.schema.type === "array";
    this.files = [];
    this.shown = el("ul", { class: "files" });
    return el("input", {
      type: "file",
      id: this.id,
      accept: ACCEPT[this.type],
      multiple: this.many,
      onchange: () => this.add(this.control.files),
    });
  }

  makeNode() {
    const text = this.many ? "Choose files, or drop them here" : "Choose a file, or drop it here";
    // The real input covers the drop zone invisibly: it keeps its keyboard, its name and the browser's own dropping.
    this.zone = el("div", { class: "drop" }, icon("up"), el("span", { textContent: text }), this.control);
    const node = el("div", { class: "field" }, this.makeLabel(), this.zone, this.shown, this.hint, this.faultText);
    node.addEventListener("dragover", (event) => this.drag(event, true));
    node.addEventListener("dragleave", (event) => this.drag(event, false));
    node.addEventListener("drop", (event) => {
      this.drag(event, false);
      this.add(event.dataTransfer.files);
    });
    return node;
  }

  drag(event, over) {
    if (!holdsFiles(event.dataTransfer)) return;
    event.preventDefault();
    this.zone.classList.toggle("over", over);
  }

  add(files) {
    const given = [...files];
    const fit = given.filter((file) => this.type === "tensor" || file.type.startsWith(`${this.type}/`));
    this.control.value = ""; // so that choosing the same file again is a change
    this.showFault(fit.length < given.length ? `${this.title()} takes files of the type ${this.type} only.` : "");
    if (fit.length) this.files = this.many ? [...this.files, ...fit] : fit.slice(0, 1);
    this.show();
  }

  show() {
    for (const old of this.shown.querySelectorAll("[src]")) URL.revokeObjectURL(old.src);
    this.shown.replaceChildren(...this.files.map((file, index) => this.item(file, index)));
  }

  item(file, index) {
    const remove = () => {
      this.files = this.files.filter((other) => other !== file);
      this.show();
      this.control.focus();
    };
    const src = URL.createObjectURL(file);
    const alt = `${this.title()} ${index + 1}`;
    const preview = {
      image: () => el("img", { src, alt }),
      video: () => el("video", { src, controls: true, "aria-label": alt }),
      audio: () => el("audio", { src, controls: true, "aria-label": alt }),
      tensor: () => null,
    }[this.type]();
    const name = el("span", { class: "file-name" }, `${file.name}, ${size(file.size)}`);
    return el("li", {}, preview, name, iconButton("close", `Remove ${file.name}`, remove));
  }

  fault() {
    const most = Number(document.querySelector('meta[name="omni-max-media-bytes"]').content);
    const large = this.files.find((file) => file.size > most);
    return large ? `${large.name} has ${size(large.size)}; the server takes at most ${size(most)}.` : super.fault();
  }

  read() {
    return this.files.length ? this.files : undefined;
  }

  write() {
    this.files = [];
    this.show();
  }

  /** Fetch the media of an earlier job again, so that the request can be sent as it was. */
  async load(paths) {
    const files = paths.map(async (path, index) => {
      const content = await (await call(path)).blob();
      return new File([content], `${this.name}-${index + 1}.${content.type.split("/")[1] ?? "bin"}`, { type: content.type });
    });
    this.files = await Promise.all(files);
    this.show();
  }
}
