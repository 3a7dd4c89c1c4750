/** What all controls of the form share: a label, a hint, and what is wrong with the value. */

import { el } from "./dom.js";

let count = 0;

/** The type of an input in its graph, without `list[...]`: text, image, video, audio, tensor, json or any. */
export const baseType = (schema) => schema["x-type"].replace(/^list\[(.*)\]$/, "$1");

/** The control for one input. Kinds of it make the control and say how its value is read and written. */
export class Field {
  constructor(name, schema, required) {
    this.name = name;
    this.schema = schema;
    this.required = required;
    this.id = `input-${++count}`;
    this.hint = el("p", { class: "hint", id: `${this.id}-hint`, textContent: this.hintText() });
    this.faultText = el("p", { class: "fault", id: `${this.id}-fault`, hidden: true });
    this.control = this.makeControl();
    this.control.setAttribute("aria-describedby", `${this.hint.id} ${this.faultText.id}`);
    if (required) this.control.setAttribute("aria-required", "true");
    this.node = this.makeNode();
    this.node.addEventListener("input", () => this.showFault(""));
    this.write(undefined);
  }

  title() {
    const words = this.schema.title ?? this.name.replaceAll("_", " ");
    return words.charAt(0).toUpperCase() + words.slice(1);
  }

  hintText() {
    return this.schema.description ?? "";
  }

  makeLabel() {
    const needed = this.required && el("span", { class: "needed", textContent: "required" });
    return el("label", { for: this.id }, this.title(), " ", needed);
  }

  makeNode() {
    return el("div", { class: "field" }, this.makeLabel(), this.control, this.hint, this.faultText);
  }

  /** Show the message under the control; empty: nothing is wrong. */
  showFault(message) {
    this.faultText.textContent = message;
    this.faultText.hidden = !message;
    if (message) this.control.setAttribute("aria-invalid", "true");
    else this.control.removeAttribute("aria-invalid");
  }

  /** What is wrong with what is entered, or nothing. */
  fault() {
    return this.required && this.read() === undefined ? `${this.title()} is needed.` : "";
  }

  /** What goes into the request; undefined: the field is left out. */
  read() {
    return this.control.value === "" ? undefined : this.control.value;
  }

  /** Show a value; undefined: the default. */
  write(value) {
    this.control.value = value ?? this.schema.default ?? "";
  }
}
