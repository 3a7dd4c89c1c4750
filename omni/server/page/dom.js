/** Elements without HTML text: nothing that a server or a user says can become markup. */

const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "textContent", "open"]);
const SVG = "http://www.w3.org/2000/svg";

/** Paths of the icons, 16 units wide, drawn as strokes in the colour of the text. */
const ICONS = {
  play: "M4.5 2.8v10.4L13 8z",
  stop: "M4 4h8v8H4z",
  again: "M13 8a5 5 0 1 1-1.5-3.6M13 2v3h-3",
  bin: "M3 4.5h10M6.5 4.5v-2h3v2M4.5 4.5l.6 9h5.8l.6-9M6.8 7v4M9.2 7v4",
  dice: "M3.5 2.5h9a1 1 0 0 1 1 1v9a1 1 0 0 1-1 1h-9a1 1 0 0 1-1-1v-9a1 1 0 0 1 1-1zM5.5 5.5h0M10.5 5.5h0M8 8h0M5.5 10.5h0M10.5 10.5h0",
  down: "M8 2.5v7.5M4.8 7.2 8 10.4l3.2-3.2M3 13.5h10",
  up: "M8 10.5V3M4.8 5.8 8 2.6l3.2 3.2M3 13.5h10",
  done: "M3 8.5 6.5 12 13 4.5",
  close: "M4 4l8 8M12 4l-8 8",
  copy: "M6 5.5h7v8H6zM10 5.5v-3H3v8h3",
  key: "M9.8 9.2a3.2 3.2 0 1 0-3-3L2.5 10.5v3h3v-2h2v-1.8zM10.6 5.4h0",
  auto: "M2 3.5h12v7.5H2zM5.5 13.5h5",
  light: "M8 5a3 3 0 1 0 0 6 3 3 0 0 0 0-6M8 1.5v1M8 13.5v1M1.5 8h1M13.5 8h1M3.4 3.4l.7.7M11.9 11.9l.7.7M3.4 12.6l.7-.7M11.9 4.1l.7-.7",
  dark: "M13 9.5A5.5 5.5 0 0 1 6.5 3 5.5 5.5 0 1 0 13 9.5z",
};

/** An element. `props` are attributes, some properties, and listeners (`onclick`); null and false leave one out. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (PROPERTIES.has(name)) node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** One of ICONS; it says nothing to a screen reader, so its button needs a label. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button that shows an icon only; `label` is its name and its tool tip. */
export function iconButton(name, label, onclick, props = {}) {
  return el("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...props }, icon(name));
}

/**
 * Let a button ask once before it does what cannot be undone: the first press changes its words to `question`, the
 * second acts; leaving the button takes the question back.
 */
export function askOnce(button, question, act) {
  const before = { nodes: [...button.childNodes], label: button.getAttribute("aria-label") };
  const reset = () => {
    button.classList.remove("sure");
    button.replaceChildren(...before.nodes);
    if (before.label) button.setAttribute("aria-label", before.label);
  };
  button.addEventListener("blur", reset);
  button.addEventListener("click", () => {
    if (button.classList.contains("sure")) {
      reset();
      act();
      return;
    }
    button.classList.add("sure");
    button.removeAttribute("aria-label");
    button.replaceChildren(question);
    button.focus();
  });
  return button;
}

/** The element of index.html with this id. */
export const byId = (id) => document.getElementById(id);

/** Seconds for people: `0.42 s`, `12.3 s`, `2 min 05 s`. */
export function duration(seconds) {
  if (seconds < 1) return `${seconds.toFixed(2)} s`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
}

/** Bytes for people: `812 B`, `14 KiB`, `2.1 MiB`. */
export function size(bytes) {
  if (bytes < 1024) return `${bytes} B`;
  const power = Math.min(3, Math.floor(Math.log2(bytes) / 10));
  const value = bytes / 1024 ** power;
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ${["B", "KiB", "MiB", "GiB"][power]}`;
}

/** The first line of a text, at most `most` characters. */
export function short(text, most = 80) {
  const line = text.trim().split("\n", 1)[0];
  return line.length > most ? `${line.slice(0, most - 1)}\u2026` : line;
}
