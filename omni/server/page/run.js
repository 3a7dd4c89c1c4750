/** What the events of a job say, as one state: stages with their steps, the preview, the end. Pure. */

/** Before any event; `stages` are the graph's, in the order of their run, `state` is the job's. */
export function newRun(stages, state) {
  return {
    state,
    stages: new Map(stages.map((name) => [name, { state: "waiting", text: "" }])),
    preview: null,
    note: "",
  };
}

/** Take one event in. Returns the sentence to announce, or an empty string. */
export function hear(run, { type, data }) {
  const stage = data.stage && (run.stages.get(data.stage) ?? run.stages.set(data.stage, { text: "" }).get(data.stage));
  const handlers = {
    stage_started() {
      Object.assign(stage, { state: "running", since: performance.now() });
      run.state = "running";
      return `${data.stage} has started`;
    },
    progress() {
      const quarter = Math.floor((4 * data.step) / data.num_steps);
      const news = quarter > Math.floor((4 * (stage.step ?? 0)) / data.num_steps);
      const { step, num_steps: num, unit } = data;
      Object.assign(stage, { state: "running", step, num, unit });
      return news && step < num ? `${data.stage}: ${unit} ${step} of ${num}` : "";
    },
    text() {
      stage.text += data.text;
      return "";
    },
    preview() {
      run.preview = { src: data.image, stage: data.stage, step: data.step };
      return "";
    },
    stage_finished() {
      Object.assign(stage, { state: "done", seconds: data.seconds, bytes: data.bytes });
      return `${data.stage} is done`;
    },
    restarted() {
      Object.assign(run, newRun([...run.stages.keys()], "queued"), { note: `Started again (attempt ${data.attempt}): ${data.reason}` });
      return run.note;
    },
    done() {
      run.state = "done";
      return "Done";
    },
    failed() {
      Object.assign(run, { state: "failed" });
      return "";
    },
    aborted() {
      Object.assign(run, { state: "aborted", note: data.reason });
      return "Aborted";
    },
  };
  return handlers[type]?.() ?? "";
}
