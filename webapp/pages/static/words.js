// What the server's codes mean, in words for people.

const REASONS = {
  length: "Cut off at the model’s length limit",
  user: "Stopped",
  admin: "Stopped by an administrator",
  superseded: "Stopped: a newer message took its place",
  conversation_deleted: "Stopped: the conversation was deleted",
  revoked: "Stopped by an operator",
  abandoned: "Stopped: nobody was watching",
  queue_timeout: "Timed out: no worker was free in time",
  first_token_timeout: "Timed out: the model did not begin to answer",
  idle_timeout: "Timed out: the model fell silent",
  max_duration: "Timed out: the answer took too long",
  shutdown: "Stopped: the server was shut down",
  upstream_error: "Failed: the model’s server reported an error",
  worker_lost: "Failed: the worker that wrote it was lost",
  internal: "Failed: an error on our side",
};

const STATUSES = { TERMINATED: "Stopped", ERROR: "Failed" };

/** The label of an answer that has ended; empty for one that simply finished. */
export function endingLabel({ status, reason, detail }) {
  const label = REASONS[reason] ?? STATUSES[status] ?? "";
  return label && detail ? `${label} (${detail})` : label;
}

/** The name of a model; the one that is bundled must not be taken for a real one. */
export function modelLabel(name) {
  return name === "demo" ? "demo (no language model)" : name;
}

/** What an answer is waiting for; empty while it is being written. */
export function phaseLabel({ phase, position, attempt }) {
  if (phase === "QUEUED") return position ? `Waiting in the queue, ${position} ahead` : "Waiting in the queue";
  if (phase === "LOADING") return attempt > 1 ? "Going on with another worker…" : "Loading the model…";
  return "";
}

/** The name that a conversation goes by. */
export function titleOf(conversation) {
  return conversation?.title || "New conversation";
}
