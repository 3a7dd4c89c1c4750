/** The kinds of control, one for each kind of JSON Schema: text, number, choice, yes or no, JSON, media. */

import { el } from "./dom.js";
import { Field } from "./field.js";
import { MediaField, isMedia } from "./media.js";

class TextField extends Field {
  makeControl() {
    const rows = this.name.endsWith("prompt") ? 3 : 2;
    return el("textarea", { id: this.id, rows, maxlength: this.schema.maxLength });
  }
}

class NumberField extends Field {
  makeControl() {
    const { minimum: min, maximum: max, multipleOf } = this.schema;
    const whole = this.schema.type === "integer";
    // The browser counts steps from `min`, JSON Schema counts multiples from 0.
    const step = multipleOf && (min ?? 0) % multipleOf === 0 ? multipleOf : whole ? 1 : "any";
    return el("input", { type: "number", id: this.id, min, max, step, inputmode: whole ? "numeric" : "decimal" });
  }

  hintText() {
    const { description, minimum: min, maximum: max, multipleOf } = this.schema;
    const bounds = max === undefined ? `at least ${min}` : min === undefined ? `at most ${max}` : `${min} to ${max}`;
    const bounded = min !== undefined || max !== undefined;
    const grid = multipleOf > 1 && `in steps of ${multipleOf}`;
    return [description, bounded && bounds, grid].filter(Boolean).join(", ");
  }

  fault() {
    const { minimum, maximum, multipleOf, type } = this.schema;
    if (this.control.validity.badInput) return `${this.title()} must be a number.`;
    const value = this.read();
    if (value === undefined) return super.fault();
    if (minimum !== undefined && value < minimum) return `${this.title()} must be at least ${minimum}.`;
    if (maximum !== undefined && value > maximum) return `${this.title()} must be at most ${maximum}.`;
    if (type === "integer" && !Number.isInteger(value)) return `${this.title()} must be a whole number.`;
    const parts = value / (multipleOf ?? 1);
    const off = multipleOf !== undefined && Math.abs(parts - Math.round(parts)) > 1e-9;
    return off ? `${this.title()} must be a multiple of ${multipleOf}.` : "";
  }

  read() {
    return Number.isNaN(this.control.valueAsNumber) ? undefined : this.control.valueAsNumber;
  }
}

/** One of several values; also yes or no where the schema has no default, so that it can be left out. */
class ChoiceField extends Field {
  choices() {
    return this.schema.enum ?? [true, false];
  }

  makeControl() {
    const free = !this.required && this.schema.default === undefined;
    const words = (choice) => (choice === true ? "yes" : choice === false ? "no" : String(choice));
    const options = this.choices().map((choice, index) => el("option", { value: String(index), textContent: words(choice) }));
    return el("select", { id: this.id }, free && el("option", { value: "", textContent: "not set" }), ...options);
  }

  read() {
    return this.control.value === "" ? undefined : this.choices()[Number(this.control.value)];
  }

  write(value) {
    const index = this.choices().indexOf(value ?? this.schema.default);
    this.control.value = index >= 0 ? String(index) : this.control.options[0].value;
  }
}

class SwitchField extends Field {
  makeControl() {
    return el("input", { type: "checkbox", id: this.id });
  }

  makeNode() {
    return el("div", { class: "field switch" }, this.control, this.makeLabel(), this.hint, this.faultText);
  }

  read() {
    return this.control.checked;
  }

  write(value) {
    this.control.checked = Boolean(value ?? this.schema.default);
  }
}

class JsonField extends Field {
  makeControl() {
    return el("textarea", { id: this.id, rows: 2, class: "code", spellcheck: "false", autocapitalize: "off" });
  }

  hintText() {
    return [this.schema.description, 'JSON: 1.5, "text", [1, 2] or {"key": 1}'].filter(Boolean).join("; ");
  }

  fault() {
    try {
      return super.fault() || (this.read(), "");
    } catch (error) {
      return `${this.title()} is not JSON: ${error.message}`;
    }
  }

  read() {
    return this.control.value.trim() === "" ? undefined : JSON.parse(this.control.value);
  }

  write(value) {
    const shown = value ?? this.schema.default;
    this.control.value = shown === undefined ? "" : JSON.stringify(shown);
  }
}

function kindOf(schema) {
  if (isMedia(schema)) return MediaField;
  if (schema.enum) return ChoiceField;
  if (schema.type === "string") return TextField;
  if (schema.type === "number" || schema.type === "integer") return NumberField;
  if (schema.type === "boolean") return schema.default === undefined ? ChoiceField : SwitchField;
  return JsonField;
}

/** The control for one input. */
export function makeField(name, schema, required) {
  return new (kindOf(schema))(name, schema, required);
}
