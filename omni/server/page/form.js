/** The form of a graph: its inputs by their JSON Schema, the rare ones folded away. */

import { el } from "./dom.js";
import { baseType } from "./field.js";
import { makeField } from "./fields.js";
import { MediaField } from "./media.js";

/** Which inputs are shown at once: those that a request needs, and what it is about. The rest is for tuning. */
function isBasic(name, schema, required) {
  const about = ["text", "image", "video", "audio"].includes(baseType(schema));
  return required || (about && !/^(negative_|mask_)/.test(name));
}

export class Form {
  constructor(graph) {
    const { properties = {}, required = [] } = graph.inputs;
    this.fields = Object.entries(properties).map(([name, schema]) => makeField(name, schema, required.includes(name)));
    const first = this.fields.filter((field) => isBasic(field.name, field.schema, field.required));
    this.shown = first.length ? first : this.fields;
    this.folded = this.fields.filter((field) => !this.shown.includes(field));
  }

  /** Put the controls into `basic`, and the rare ones into `advanced`, a <details>. */
  mount(basic, advanced) {
    this.advanced = advanced;
    basic.replaceChildren(...this.shown.map((field) => field.node));
    if (!this.fields.length) basic.append(el("p", { class: "hint", textContent: "This graph takes no inputs." }));
    advanced.querySelector(".fields").replaceChildren(...this.folded.map((field) => field.node));
    advanced.querySelector(".count").textContent = this.folded.length;
    advanced.hidden = !this.folded.length;
  }

  /** Show what is wrong; the first faulty control gets the focus. True when all is well. */
  check() {
    const faults = this.fields.map((field) => [field, field.fault()]);
    for (const [field, fault] of faults) field.showFault(fault);
    const [wrong] = faults.find(([, fault]) => fault) ?? [];
    if (wrong) this.reveal(wrong);
    return !wrong;
  }

  /** Show a message of the server at the input that it is about. False when it is about none. */
  showFault(param, message) {
    const field = this.fields.find(({ name }) => param && param.split(/[.[]/).includes(name));
    if (!field) return false;
    field.showFault(message);
    this.reveal(field);
    return true;
  }

  reveal(field) {
    if (this.folded.includes(field)) this.advanced.open = true;
    field.control.focus();
  }

  /** The inputs as JSON, and the files as pairs of name and File. */
  read() {
    const inputs = {};
    const files = [];
    for (const field of this.fields) {
      const value = field.read();
      if (field instanceof MediaField) files.push(...(value ?? []).map((file) => [field.name, file]));
      else if (value !== undefined) inputs[field.name] = value;
    }
    return { inputs, files };
  }

  /** Fill in the inputs of an earlier job; `mediaPaths(name, value)` says where its media are. */
  async fill(inputs, mediaPaths) {
    for (const field of this.fields) {
      field.showFault("");
      field.write(field instanceof MediaField ? undefined : inputs[field.name]);
      const tuned = field.name in inputs && inputs[field.name] !== field.schema.default;
      if (tuned && this.folded.includes(field)) this.advanced.open = true;
    }
    const media = this.fields.filter((field) => field instanceof MediaField && inputs[field.name]);
    await Promise.all(media.map((field) => field.load(mediaPaths(field.name, inputs[field.name]))));
  }

  focus() {
    this.fields[0]?.control.focus();
  }
}
