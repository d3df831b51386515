// What the operations page asks the server, and how often.

const TIMEOUT_MILLISECONDS = 15_000;
const LONGEST_PAUSE_MILLISECONDS = 8_000;

/** What went wrong, in words for a person; `status` is 0 where no answer came. */
export class Refusal extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const overview = () => ask("GET", "/api/operations");
export const history = (minutes) => ask("GET", `/api/operations/history?minutes=${minutes}`);
export const terminate = (sessionId) => ask("POST", "/api/operations/terminate", { sessionId });

async function ask(method, url, body) {
  const headers = { Accept: "application/json" };
  if (body) {
    headers["Content-Type"] = "application/json";
    headers["X-CSRFToken"] = document.querySelector('meta[name="csrf-token"]').content;
  }
  const signal = AbortSignal.timeout(TIMEOUT_MILLISECONDS);
  let response;
  try {
    response = await fetch(url, { method, headers, body: body && JSON.stringify(body), signal });
    if (response.ok) return await response.json();
  } catch {
    throw new Refusal("Sluicegate cannot be reached");
  }
  const { code, detail } = await response.json().catch(() => ({}));
  // Who is signed out, or is no operator any more, is told so by the page itself.
  if (response.status === 401 || code === "forbidden") location.assign(location.pathname);
  const message = code === "csrf_failed" ? "This page is out of date: reload it" : detail;
  throw new Refusal(message || `The server answered ${response.status}`, response.status);
}

/**
 * Do something at once, and again after each pause, for as long as the page is seen; after failures less and less often.
 * Returns a function that does it now.
 */
export function poll(work, pauseMilliseconds, onFailure) {
  let timer = 0;
  let failures = 0;
  let running = false;
  let wanted = false;

  async function turn() {
    clearTimeout(timer);
    wanted = running;
    if (running || document.hidden) return;
    running = true;
    try {
      await work();
      failures = 0;
    } catch (error) {
      failures += 1;
      onFailure(error);
    }
    running = false;
    const pause = Math.min(pauseMilliseconds * 2 ** failures, Math.max(LONGEST_PAUSE_MILLISECONDS, pauseMilliseconds));
    timer = setTimeout(turn, wanted ? 0 : pause);
  }

  document.addEventListener("visibilitychange", turn);
  turn();
  return turn;
}
