/** The job that is looked at: progress of its stages, its preview, its result or its error. */

import { ApiError, FINAL, getGraph, getJob, jobEvents, serverNow } from "./api.js";
import { byId, duration, el, size } from "./dom.js";
import { release, showOutputs } from "./outputs.js";
import { hear, newRun } from "./run.js";

const CLOCK_MS = 200;
const WORDS = { queued: "Queued", running: "Running", done: "Done", failed: "Failed", aborted: "Aborted" };

/** The stages of a graph in the order of their run; none when the graph is not served any more. */
async function stagesOf(graph) {
  const found = await getGraph(graph).catch((error) => {
    if (error instanceof ApiError && error.status === 404) return null;
    throw error;
  });
  return found ? Object.keys(found.spec.stages) : [];
}

export class JobView {
  /** `onChange(job)` hears of each new state of a job. */
  constructor(onChange) {
    this.onChange = onChange;
    this.job = null;
    this.leaving = new AbortController();
    this.rows = new Map();
    this.clock = setInterval(() => this.job && !FINAL.has(this.job.state) && this.draw(), CLOCK_MS);
  }

  get running() {
    return this.job !== null && !FINAL.has(this.job.state);
  }

  /** Show no job. */
  clear() {
    this.leaving.abort();
    this.job = null;
    byId("job").hidden = true;
    byId("empty").hidden = false;
  }

  /** Show a job and follow it to its end. */
  async show(job) {
    this.leaving.abort();
    const leaving = (this.leaving = new AbortController());
    this.job = job;
    this.run = newRun([], job.state);
    this.since = performance.now() - 1000 * Math.max(0, serverNow() - (job.started_at ?? job.created_at));
    this.prepare();
    this.draw();
    try {
      if (FINAL.has(job.state)) await Promise.all([this.finish(leaving.signal), this.follow(leaving.signal)]);
      else await this.follow(leaving.signal);
    } catch (error) {
      if (!leaving.signal.aborted) this.showError({ cause: error.message, remedy: "" });
    }
  }

  prepare() {
    byId("empty").hidden = true;
    byId("job").hidden = false;
    byId("job-error").hidden = true;
    byId("preview").hidden = true;
    release(byId("outputs"));
    byId("outputs").replaceChildren();
    byId("stages").replaceChildren();
    this.rows.clear();
  }

  async follow(signal) {
    this.run = newRun(await stagesOf(this.job.graph), this.job.state);
    if (signal.aborted) return;
    const live = !FINAL.has(this.job.state);
    const connection = (open) => {
      byId("lost").hidden = open;
    };
    for await (const event of jobEvents(this.job.id, signal, connection)) {
      const news = hear(this.run, event);
      if (live && news) byId("announce").textContent = news;
      const { state } = this.run;
      if (live && !FINAL.has(state) && state !== this.job.state) this.update({ ...this.job, state });
      this.draw();
    }
    if (!live) return;
    this.update(await getJob(this.job.id, signal));
    await this.finish(signal);
  }

  update(job) {
    this.job = job;
    this.onChange(job);
  }

  async finish(signal) {
    this.draw();
    if (this.job.error) this.showError(this.job.error);
    const outputs = await showOutputs(this.job, signal);
    if (signal.aborted) return;
    byId("preview").hidden = true;
    byId("outputs").replaceChildren(...outputs);
  }

  showError({ stage, cause, remedy }) {
    byId("job-error-title").textContent = stage ? `The stage ${stage} failed` : "This did not work";
    byId("job-error-cause").textContent = cause;
    byId("job-error-remedy").textContent = remedy ? `What to do: ${remedy}` : "";
    byId("job-error").hidden = false;
  }

  draw() {
    const { job, run } = this;
    const state = byId("job-state");
    state.textContent = WORDS[job.state];
    state.dataset.state = job.state;
    byId("job-title").textContent = job.graph;
    byId("job-seed").textContent = `seed ${job.seed}`;
    byId("job-seconds").textContent = this.seconds();
    byId("job-note").textContent = run.note;
    byId("abort").hidden = FINAL.has(job.state);
    byId("delete").hidden = !FINAL.has(job.state);
    for (const [name, stage] of run.stages) this.drawStage(name, stage);
    if (run.preview && !FINAL.has(job.state)) {
      byId("preview").hidden = false;
      byId("preview-image").src = run.preview.src;
      byId("preview-text").textContent = `Preview of ${run.preview.stage} after step ${run.preview.step}`;
    }
  }

  seconds() {
    const { created_at: created, started_at: started, finished_at: finished } = this.job;
    if (finished) return duration(Math.max(0, finished - (started ?? created)));
    return FINAL.has(this.job.state) ? "" : duration((performance.now() - this.since) / 1000);
  }

  drawStage(name, stage) {
    const row = this.rows.get(name) ?? this.makeRow(name);
    row.item.dataset.state = stage.state;
    row.facts.textContent = stageFacts(stage);
    if (stage.state === "done") row.bar.value = 1;
    else if (stage.num) row.bar.value = stage.step / stage.num;
    else if (stage.state === "running" && !FINAL.has(this.job.state)) row.bar.removeAttribute("value");
    else row.bar.value = 0;
    row.text.textContent = stage.text;
    row.text.hidden = !stage.text;
  }

  makeRow(name) {
    const bar = el("progress", { max: 1, "aria-label": `Progress of ${name}` });
    const facts = el("span", { class: "facts" });
    const text = el("p", { class: "text", hidden: true });
    const item = el("li", {}, el("span", { class: "name", textContent: name }), facts, bar, text);
    byId("stages").append(item);
    const row = { item, bar, facts, text };
    this.rows.set(name, row);
    return row;
  }
}

function stageFacts({ state, step, num, unit, seconds, bytes, since }) {
  if (state === "done") return bytes ? `${duration(seconds)}, ${size(bytes)}` : duration(seconds);
  if (state !== "running") return "waiting";
  const time = duration((performance.now() - since) / 1000);
  return num ? `${unit} ${step} of ${num}, ${time}` : time;
}
