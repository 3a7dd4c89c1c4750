/** The page: ties the form, the job that is looked at, the history and the address together. */

import { ApiError, FINAL, deleteJob, getJob, hasKey, inputPath, listGraphs, mediaUrl, onKeyNeeded, planPath, setKey, startJob, wholeInputs } from "./api.js";
import { askOnce, byId, el, icon } from "./dom.js";
import { Form } from "./form.js";
import { History } from "./history.js";
import { JobView } from "./job_view.js";

const LARGEST_SEED = 2 ** 32 - 1;
/** Steps from preview to preview. */
const PREVIEW_EVERY = 2;
const THEMES = ["auto", "light", "dark"];

let graphs = [];
let graph = null;
let form = null;
const forms = new Map();
let starting = false;
/** Escape was pressed before the server had answered with the job. */
let regretted = false;

const view = new JobView((job) => past.set(job));
const past = new History({ open: openJob, again, remove, attempt });

// Saying what is wrong ------------------------------------------------------------------------------------------

/** Show an error of the page itself; empty: none. */
function complain(message) {
  byId("page-error").textContent = message;
  byId("page-error").hidden = !message;
}

/** Run `work`; its error is shown, at the input that it is about when there is one. */
async function attempt(work) {
  try {
    complain("");
    return await work();
  } catch (error) {
    if (error instanceof ApiError && form?.showFault(error.param, error.message)) return undefined;
    if (error instanceof ApiError) complain(error.message);
    else if (error instanceof TypeError) complain(`The server cannot be reached: ${error.message}. Is it running?`);
    else throw error;
    return undefined;
  }
}

// The graph and its form ------------------------------------------------------------------------------------------

async function showPlan(name) {
  const shown = byId("plan-image");
  const src = await mediaUrl(planPath(name));
  if (shown.src.startsWith("blob:")) URL.revokeObjectURL(shown.src);
  shown.src = byId("plan-link").href = src;
  shown.alt = `Drawing of the plan of ${name}: its stages, and where they run`;
}

async function chooseGraph(name) {
  graph = graphs.find((known) => known.name === name) ?? graphs[0];
  byId("graph").value = graph.name;
  byId("graph-about").textContent = graph.description ?? "";
  if (!forms.has(graph)) forms.set(graph, new Form(graph));
  form = forms.get(graph);
  form.mount(byId("inputs"), byId("advanced"));
  await attempt(() => showPlan(graph.name));
}

function seed() {
  const text = byId("seed").value.trim();
  const value = Number(text);
  const wrong = text !== "" && !(Number.isInteger(value) && value >= 0 && value <= LARGEST_SEED);
  byId("seed-fault").textContent = wrong ? `The seed is a whole number from 0 to ${LARGEST_SEED}, or empty.` : "";
  byId("seed-fault").hidden = !wrong;
  byId("seed").setAttribute("aria-invalid", wrong);
  if (wrong) byId("seed").focus();
  return { wrong, value: text === "" ? undefined : value };
}

function throwDice() {
  byId("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
}

// Jobs ----------------------------------------------------------------------------------------------------------

async function run() {
  if (starting || !form) return;
  const { wrong, value } = seed();
  if (!form.check() || wrong) return;
  const { inputs, files } = form.read();
  starting = true;
  regretted = false;
  byId("run").setAttribute("aria-disabled", true);
  await attempt(async () => {
    const job = await startJob(graph.name, { inputs, seed: value, preview_every: PREVIEW_EVERY }, files);
    byId("announce").textContent = "Queued";
    past.set(job);
    openJob(job);
    if (regretted) await remove(job);
  });
  byId("run").removeAttribute("aria-disabled");
  starting = false;
}

function openJob(job, push = true) {
  const place = new URLSearchParams({ graph: job.graph, job: job.id });
  if (push) history.pushState(null, "", `?${place}`);
  past.mark(job.id);
  view.show(job);
  if (push && matchMedia("(max-width: 60rem)").matches) byId("work").scrollIntoView();
}

function closeJob() {
  history.pushState(null, "", location.pathname);
  past.mark("");
  view.clear();
}

/** Fill the form with what the job was asked, its seed too. */
async function again(job) {
  if (!graphs.some(({ name }) => name === job.graph)) {
    complain(`The graph ${job.graph} is not served any more: start the server with it to run this again.`);
    return;
  }
  await attempt(async () => {
    if (graph.name !== job.graph) await chooseGraph(job.graph);
    byId("seed").value = job.seed;
    await form.fill(await wholeInputs(job), (name, value) => [value].flat().map((_, index) => inputPath(job.id, name, index)));
    form.focus();
    byId("announce").textContent = "The form holds what this job was asked";
  });
}

/** Abort a job that is under way, delete one that is over. */
async function remove(job) {
  await attempt(async () => {
    await deleteJob(job.id);
    if (!FINAL.has(job.state)) {
      if (job.id !== view.job?.id) past.set(await getJob(job.id));
      return;
    }
    past.drop(job.id);
    if (job.id === view.job?.id) closeJob();
  });
}

/** Show what the address says: `?graph=NAME&job=ID`. */
async function followAddress() {
  const place = new URLSearchParams(location.search);
  if (place.get("graph") && place.get("graph") !== graph?.name) await chooseGraph(place.get("graph"));
  const id = place.get("job");
  if (!id) {
    past.mark("");
    view.clear();
  } else if (id !== view.job?.id) await attempt(async () => openJob(await getJob(id), false));
}

// The key and the theme -------------------------------------------------------------------------------------------

/** Ask for the API key; gives null when the question is left. */
function askForKey(refused) {
  const dialog = byId("key-dialog");
  byId("key-refused").hidden = !refused;
  byId("key-input").value = "";
  byId("key").hidden = false;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const key = dialog.returnValue === "use" ? byId("key-input").value.trim() : "";
        resolve(key || null);
      },
      { once: true },
    );
  });
}

async function changeKey() {
  const key = await askForKey(false);
  if (key === null) return;
  setKey(key);
  await start();
}

function showTheme() {
  const theme = document.documentElement.dataset.theme ?? "auto";
  const button = byId("theme");
  button.replaceChildren(icon(theme), el("span", { textContent: `Theme: ${theme}` }));
}

function nextTheme() {
  const root = document.documentElement;
  const theme = THEMES[(THEMES.indexOf(root.dataset.theme ?? "auto") + 1) % THEMES.length];
  if (theme === "auto") delete root.dataset.theme;
  else root.dataset.theme = theme;
  localStorage.setItem("omni.theme", theme);
  showTheme();
}

// Start ---------------------------------------------------------------------------------------------------------

function pressed(event) {
  if (event.isComposing) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape" && (starting || view.running) && !document.querySelector("dialog[open]")) {
    event.preventDefault();
    if (starting) regretted = true;
    else remove(view.job);
  }
}

function listen() {
  for (const button of document.querySelectorAll("[data-icon]")) button.prepend(icon(button.dataset.icon));
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  byId("graph").addEventListener("change", () => chooseGraph(byId("graph").value));
  byId("dice").addEventListener("click", throwDice);
  byId("abort").addEventListener("click", () => remove(view.job));
  askOnce(byId("delete"), "Really delete?", () => remove(view.job));
  byId("again").addEventListener("click", () => again(view.job));
  byId("theme").addEventListener("click", nextTheme);
  byId("key").addEventListener("click", changeKey);
  document.addEventListener("keydown", pressed);
  // A file that is dropped beside its place would replace the page.
  for (const type of ["dragover", "drop"]) document.addEventListener(type, (event) => event.preventDefault());
  window.addEventListener("popstate", followAddress);
  showTheme();
}

async function start() {
  byId("key").hidden = !hasKey();
  await attempt(async () => {
    graphs = await listGraphs();
    const options = () => graphs.map(({ name }) => el("option", { value: name, textContent: name }));
    byId("graph").replaceChildren(...options());
    byId("history-graph").replaceChildren(el("option", { value: "", textContent: "All graphs" }), ...options());
    if (!graphs.length) return complain("This server serves no graph. Start it with one: omni serve GRAPH");
    await chooseGraph(new URLSearchParams(location.search).get("graph"));
    await Promise.all([past.load(), followAddress()]);
    byId("form").removeAttribute("aria-busy");
    return undefined;
  });
}

onKeyNeeded(askForKey);
listen();
start();
