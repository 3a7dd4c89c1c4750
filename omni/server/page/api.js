/** Omni's HTTP API: JSON calls, errors, the API key, and the events of a job with resume. */

const KEY = "omni.key";
/** States that a job does not leave, and the types of the events that say so. */
export const FINAL = new Set(["done", "failed", "aborted"]);
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 8000;
/** The server sends a comment every 15 s, so a connection that is silent for longer is dead. */
const SILENCE_MS = 45000;
const ATTEMPTS = 3;

/** A refused call: `message` says what and how to mend it, `param` names the input, `status` is HTTP's. */
export class ApiError extends Error {
  constructor(status, error = {}) {
    super(error.message ?? `The server answered ${status}.`);
    this.status = status;
    this.param = error.param ?? null;
    this.code = error.code ?? null;
  }
}

/** Relative to the page, so that a server behind a path of a proxy works too. */
const address = (path) => new URL(path, document.baseURI);

/** What the server's clock is ahead of ours, in seconds; its Date header knows whole ones only. */
let ahead = 0;
const CLOCKS_AGREE_SECONDS = 2;

/** Seconds since 1970 by the server's clock. */
export const serverNow = () => Date.now() / 1000 + (Math.abs(ahead) > CLOCKS_AGREE_SECONDS ? ahead : 0);

let askForKey = async () => null;
let asking = null;

/** `ask` shows the question for an API key and gives the answer, or null. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** Ask once, however many calls were refused at the same time. True when there is another key to try. */
async function newKey(refused) {
  if (sessionStorage.getItem(KEY) !== refused) return true;
  asking ??= askForKey(refused !== null).finally(() => {
    asking = null;
  });
  const key = await asking;
  if (key) setKey(key);
  return Boolean(key);
}

/** fetch with the API key. Raises ApiError for everything but 2xx. */
export async function call(path, options = {}) {
  for (;;) {
    const headers = new Headers(options.headers);
    const key = sessionStorage.getItem(KEY);
    if (key !== null) headers.set("Authorization", `Bearer ${key}`);
    const response = await fetch(address(path), { ...options, headers });
    ahead = (Date.parse(response.headers.get("Date")) - Date.now()) / 1000 || 0;
    if (response.ok) return response;
    if (response.status === 401 && (await newKey(key))) continue;
    const body = await response.json().catch(() => null);
    throw new ApiError(response.status, body?.error);
  }
}

/** JSON by GET; a lost connection is tried again. */
async function get(path, signal) {
  return patiently(async () => (await call(path, { signal, cache: "no-store" })).json());
}

/** Do `work` again when the connection was lost, up to ATTEMPTS times. */
async function patiently(work) {
  for (let attempt = 1; ; attempt++) {
    try {
      return await work();
    } catch (error) {
      if (!(error instanceof TypeError) || attempt === ATTEMPTS) throw error;
      await pause(FIRST_WAIT_MS * attempt);
    }
  }
}

const query = (fields) => new URLSearchParams(Object.entries(fields).filter(([, value]) => value)).toString();

export const listGraphs = async () => (await get("v1/graphs")).data;
export const getGraph = (name) => get(`v1/graphs/${encodeURIComponent(name)}`);
export const listJobs = (filter) => get(`v1/jobs?${query(filter)}`);
export const getJob = (id, signal) => get(`v1/jobs/${encodeURIComponent(id)}`, signal);
export const deleteJob = (id) => call(`v1/jobs/${encodeURIComponent(id)}`, { method: "DELETE" });
export const planPath = (graph) => `v1/graphs/${encodeURIComponent(graph)}/plan.svg`;
export const inputPath = (id, name, index) =>
  `v1/jobs/${encodeURIComponent(id)}/inputs/${encodeURIComponent(name)}?index=${index}`;
/** Whether a job's object names an input without its content, since it is long. */
const isLong = (value) => ["text", "json"].includes(value?.type) && Object.keys(value).length === 1;

/** The inputs of a job, the long ones too. */
export async function wholeInputs(job) {
  const whole = async ([name, value]) => {
    if (!isLong(value)) return [name, value];
    const answer = await call(inputPath(job.id, name, 0));
    return [name, await (value.type === "text" ? answer.text() : answer.json())];
  };
  return Object.fromEntries(await Promise.all(Object.entries(job.inputs).map(whole)));
}

export const outputPath = (id, name, index) =>
  `v1/jobs/${encodeURIComponent(id)}/outputs/${encodeURIComponent(name)}?index=${index}`;

/** A URL for `src`: direct without a key (so that a video is read in ranges), else of a copy in memory. */
export async function mediaUrl(path, signal) {
  if (!hasKey()) return address(path).href;
  return URL.createObjectURL(await (await call(path, { signal })).blob());
}

/**
 * Start a job. `request` is its JSON, `files` are pairs of an input's name and a File.
 * A lost connection is tried again under the same Idempotency-Key, so that it never makes two jobs.
 */
export async function startJob(graph, request, files) {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  const headers = { "Idempotency-Key": [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("") };
  let body = JSON.stringify(request);
  if (files.length) {
    const form = new FormData();
    form.append("request", body);
    for (const [name, file] of files) form.append(name, file);
    body = form;
  } else headers["Content-Type"] = "application/json";
  const path = `v1/graphs/${encodeURIComponent(graph)}/jobs`;
  return patiently(async () => (await call(path, { method: "POST", headers, body })).json());
}

/** Wait; a machine that comes back online ends the wait. */
function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const end = () => {
      clearTimeout(timer);
      window.removeEventListener("online", end);
      signal?.removeEventListener("abort", end);
      if (signal?.aborted) reject(signal.reason);
      else resolve();
    };
    const timer = setTimeout(end, ms);
    window.addEventListener("online", end);
    signal?.addEventListener("abort", end);
  });
}

/**
 * The events of a job as {id, type, data}, each once, up to the final one. A lost connection is made again from the
 * last event heard; `onConnection(true or false)` is told. Raises ApiError when the server refuses.
 */
export async function* jobEvents(id, signal, onConnection) {
  let last = 0;
  let wait = FIRST_WAIT_MS;
  for (;;) {
    const connection = new AbortController();
    const leave = () => connection.abort(signal.reason);
    signal.addEventListener("abort", leave);
    try {
      const headers = last ? { "Last-Event-ID": String(last) } : {};
      const path = `v1/jobs/${encodeURIComponent(id)}/events`;
      const response = await call(path, { headers, signal: connection.signal, cache: "no-store" });
      onConnection(true);
      if (response.status === 204) return;
      for await (const event of readEvents(response.body, connection)) {
        if (event.id <= last) continue;
        last = event.id;
        wait = FIRST_WAIT_MS;
        yield event;
        if (FINAL.has(event.type)) return;
      }
    } catch (error) {
      if (signal.aborted) throw error;
      if (error instanceof ApiError && error.status < 500 && error.status !== 429) throw error;
    } finally {
      signal.removeEventListener("abort", leave);
      connection.abort();
    }
    onConnection(false);
    await pause(wait, signal);
    wait = Math.min(wait * 2, LONGEST_WAIT_MS);
  }
}

/** Server-sent events of a body (the browser's EventSource can send no key). A silent connection is given up. */
async function* readEvents(body, connection) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = {};
  for (;;) {
    const silence = setTimeout(() => connection.abort(), SILENCE_MS);
    const { value, done } = await reader.read().finally(() => clearTimeout(silence));
    if (done) return;
    const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (event.data !== undefined) yield { id: Number(event.id), type: event.event, data: JSON.parse(event.data) };
        event = {};
        continue;
      }
      const [, field, text] = /^([^:]*):? ?(.*)$/.exec(line);
      if (field === "data" && event.data !== undefined) event.data += `\n${text}`;
      else if (field) event[field] = text;
    }
  }
}
