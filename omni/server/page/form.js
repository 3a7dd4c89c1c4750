/** The form of a graph: its inputs by their JSON Schema, the rare ones folded away. */

import { el } from "./dom.js";
import { makeField } from "./fields.js";
import { MediaField } from "./media.js";

/** Which inputs are shown at once: those that a request needs, and what it is about. The rest is for tuning. */
function isBasic(name, schema, required) {
  const about = schema["x-omni-type"] !== undefined && !/^(negative_|mask)/.test(name);
  return required || about;
}

export class Form {
  /** Builds the controls inside `basic` and `advanced`, the content of a <details>. */
  constructor(graph, basic, advanced) {
    const { properties = {}, required = [] } = graph.inputs;
    this.fields = Object.entries(properties).map(([name, schema]) => makeField(name, schema, required.includes(name)));
    const first = this.fields.filter((field) => isBasic(field.name, field.schema, field.required));
    const shown = first.length ? first : this.fields;
    const folded = this.fields.filter((field) => !shown.includes(field));
    this.advanced = advanced;
    basic.replaceChildren(...shown.map((field) => field.node));
    if (!this.fields.length) basic.append(el("p", { class: "hint", textContent: "This graph takes no inputs." }));
    advanced.querySelector(".fields").replaceChildren(...folded.map((field) => field.node));
    advanced.querySelector(".count").textContent = folded.length;
    advanced.hidden = !folded.length;
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
    if (this.advanced.contains(field.node)) this.advanced.open = true;
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
      if (!field.required && field.name in inputs && inputs[field.name] !== field.schema.default) {
        if (this.advanced.contains(field.node)) this.advanced.open = true;
      }
    }
    const media = this.fields.filter((field) => field instanceof MediaField && inputs[field.name]);
    await Promise.all(media.map((field) => field.load(mediaPaths(field.name, inputs[field.name]))));
  }

  focus() {
    this.fields[0]?.control.focus();
  }
}
