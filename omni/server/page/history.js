/** The jobs that the server remembers, newest first. */

import { FINAL, listJobs, mediaUrl } from "./api.js";
import { askOnce, byId, el, icon, iconButton, short } from "./dom.js";
import { firstPicture, release } from "./outputs.js";

const PAGE = 12;
const POLL_MS = 3000;
const WORDS = { queued: "queued", running: "running", done: "done", failed: "failed", aborted: "aborted" };

/** What a job was about: its first text, or its name. */
export function titleOf(job) {
  const texts = Object.values(job.inputs).filter((value) => typeof value === "string" && value.trim());
  return texts.length ? short(texts[0]) : job.graph;
}

/** `14:05`, or the day and month too when it was not today. */
function when(seconds) {
  const date = new Date(seconds * 1000);
  const today = date.toDateString() === new Date().toDateString();
  const day = today ? {} : { day: "numeric", month: "short" };
  return date.toLocaleString([], { ...day, hour: "2-digit", minute: "2-digit" });
}

export class History {
  /** `actions` are `open(job)`, `again(job)`, `remove(job)`, and `attempt(work)`, which shows the errors of `work`. */
  constructor(actions) {
    this.actions = actions;
    this.jobs = [];
    this.items = new Map();
    this.current = "";
    this.loading = 0;
    byId("history-graph").addEventListener("change", () => actions.attempt(() => this.load()));
    byId("more").addEventListener("click", () => actions.attempt(() => this.more()));
    setInterval(() => this.poll(), POLL_MS);
  }

  filter() {
    return { graph: byId("history-graph").value, limit: PAGE };
  }

  /** Load the newest jobs of the chosen graph. */
  async load() {
    const loading = ++this.loading;
    const { data, has_more: more } = await listJobs(this.filter());
    if (loading !== this.loading) return;
    this.jobs = data;
    byId("more").hidden = !more;
    this.draw();
  }

  async more() {
    const { data, has_more: more } = await listJobs({ ...this.filter(), after: this.jobs.at(-1)?.id });
    const first = data.find((job) => !this.items.has(job.id));
    this.jobs.push(...data.filter((job) => !this.items.has(job.id)));
    byId("more").hidden = !more;
    this.draw();
    this.items.get(first?.id)?.open.focus();
  }

  /** Look again while a job that nobody follows is under way. */
  async poll() {
    const waits = this.jobs.some((job) => !FINAL.has(job.state) && job.id !== this.current);
    if (!waits || document.hidden) return;
    const loading = this.loading;
    const { data } = await listJobs(this.filter()).catch(() => ({ data: [] })); // the next look may do better
    if (loading !== this.loading) return;
    for (const job of data) if (job.id !== this.current && this.items.has(job.id)) this.set(job);
  }

  /** Show the new state of a job; one that was not there comes first. */
  set(job) {
    const at = this.jobs.findIndex(({ id }) => id === job.id);
    const { graph } = this.filter();
    if (at >= 0) this.jobs[at] = job;
    else if (!graph || graph === job.graph) this.jobs.unshift(job);
    this.draw();
  }

  /** Take a job out; the focus goes to its neighbour. */
  drop(id) {
    const at = this.jobs.findIndex((job) => job.id === id);
    const held = this.items.get(id)?.node.contains(document.activeElement);
    this.jobs = this.jobs.filter((job) => job.id !== id);
    this.draw();
    if (held) (this.items.get((this.jobs[at] ?? this.jobs.at(-1))?.id)?.open ?? byId("history-title")).focus();
  }

  /** Mark the job that is looked at. */
  mark(id) {
    this.current = id;
    this.draw();
  }

  draw() {
    const old = this.items;
    this.items = new Map(this.jobs.map((job) => [job.id, this.itemOf(job, old.get(job.id))]));
    for (const [id, { node }] of old) {
      if (this.items.get(id)?.node === node) continue;
      release(node);
      node.remove();
    }
    const list = byId("jobs");
    let last = null;
    for (const { node, open } of this.items.values()) {
      const place = last ? last.nextSibling : list.firstChild;
      if (node !== place) list.insertBefore(node, place); // moving an element would lose its focus
      last = node;
      const current = node.id === `history-${this.current}`;
      if (current) open.setAttribute("aria-current", "true");
      else open.removeAttribute("aria-current");
    }
    byId("no-jobs").hidden = this.jobs.length > 0;
  }

  /** The item of a job: the one that is there, or another when what it shows has changed. */
  itemOf(job, old) {
    if (old && old.job.state === job.state && firstPicture(old.job) === firstPicture(job)) return old;
    const item = this.makeItem(job);
    if (old?.node.contains(document.activeElement)) {
      old.node.replaceWith(item.node);
      item.open.focus();
    }
    return item;
  }

  makeItem(job) {
    const title = titleOf(job);
    const open = el(
      "button",
      { type: "button", class: "open", onclick: () => this.actions.open(job) },
      this.thumbnail(job),
      el(
        "span",
        { class: "about" },
        el("span", { class: "title", textContent: title }),
        el("span", { class: "facts" }, stateWord(job), `, ${when(job.created_at)}, ${job.graph}`),
      ),
    );
    const final = FINAL.has(job.state);
    const buttons = el(
      "span",
      { class: "buttons" },
      iconButton("again", `Same again: ${title}`, () => this.actions.again(job)),
      final
        ? askOnce(iconButton("bin", `Delete: ${title}`), "Delete?", () => this.actions.remove(job))
        : iconButton("stop", `Abort: ${title}`, () => this.actions.remove(job)),
    );
    const node = el("li", { id: `history-${job.id}` }, open, buttons);
    return { job, node, open };
  }

  thumbnail(job) {
    const path = job.state === "done" && firstPicture(job);
    const holder = el("span", { class: "thumbnail" });
    if (!path) {
      holder.append(icon({ failed: "close", aborted: "stop", done: "done" }[job.state] ?? "play"));
      return holder;
    }
    const img = el("img", { alt: "", loading: "lazy", decoding: "async" });
    mediaUrl(path).then((src) => Object.assign(img, { src }), () => holder.replaceChildren(icon("close")));
    holder.append(img);
    return holder;
  }
}

const stateWord = (job) => el("span", { class: "state", "data-state": job.state, textContent: WORDS[job.state] });
