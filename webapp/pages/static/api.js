// Calls to the server: JSON both ways, the CSRF token, and problem documents turned into one kind of error.

const TIMEOUT_MILLISECONDS = 20_000;
const RETRY_AFTER_MILLISECONDS = [400, 1200];
const MAYBE_PASSING = new Set([0, 502, 503, 504]);

export class ApiError extends Error {
  /** `status` is 0 where no answer came; `code` is the problem document's. */
  constructor(detail, { status = 0, code = "unreachable", retryAfterSeconds = null } = {}) {
    super(detail);
    this.status = status;
    this.code = code;
    this.retryAfterSeconds = retryAfterSeconds;
  }
}

export const listConversations = ({ cursor, limit, search }) => {
  const query = new URLSearchParams({ limit, ...(cursor && { cursor }), ...(search && { search }) });
  return request("GET", `/api/conversations?${query}`);
};
export const getConversation = (id) => request("GET", `/api/conversations/${id}`);
export const renameConversation = (id, title) => request("PATCH", `/api/conversations/${id}`, { title });
export const deleteConversation = (id) => request("DELETE", `/api/conversations/${id}`);
export const listMessages = (id) => request("GET", `/api/conversations/${id}/messages`);
export const listMembers = (id) => request("GET", `/api/conversations/${id}/members`);
export const setMember = (id, name, role) =>
  request("PUT", `/api/conversations/${id}/members/${encodeURIComponent(name)}`, { role });
export const removeMember = (id, name) =>
  request("DELETE", `/api/conversations/${id}/members/${encodeURIComponent(name)}`);
export const listModels = () => request("GET", "/api/models");

/** The key makes a repeat harmless, so that a lost answer to this call can simply be asked for again. */
export const sendMessage = (message, idempotencyKey) =>
  persistently(() => request("POST", "/api/stream-message", message, { "Idempotency-Key": idempotencyKey }));

/** `action`: `continue` or `retry`. */
export const runAgain = (action, sessionId, idempotencyKey) =>
  persistently(() =>
    request("POST", `/api/streams/${sessionId}/${action}`, undefined, { "Idempotency-Key": idempotencyKey }),
  );

/** The receipt is the same however often it is asked for. */
export const terminateStream = (sessionId, conversationId) =>
  persistently(() => request("POST", "/api/terminate-stream", { sessionId, conversationId }), { patiently: true });

async function request(method, url, body, headers = {}) {
  let response;
  try {
    response = await fetch(url, {
      method,
      headers: {
        Accept: "application/json",
        ...(method !== "GET" && { "X-CSRFToken": csrfToken() }),
        ...(body !== undefined && { "Content-Type": "application/json" }),
        ...headers,
      },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: AbortSignal.timeout(TIMEOUT_MILLISECONDS),
    });
    if (response.ok) return response.status === 204 ? null : await response.json();
  } catch {
    throw new ApiError("The server cannot be reached.");
  }
  if (response.status === 401) signInAgain();
  throw await problem(response);
}

async function problem(response) {
  const { code = "unknown", title, detail } = await response.json().catch(() => ({}));
  // Who signs in anew in another tab gets a new token there.
  const message = code === "csrf_failed" ? "This page is out of date. Reload it, and try again." : detail || title;
  return new ApiError(message || `The server answered ${response.status}.`, {
    status: response.status,
    code,
    retryAfterSeconds: Number(response.headers.get("Retry-After")) || null,
  });
}

/**
 * Try again where that may help; a server that names the time to wait leaves the choice to the person, unless they want
 * it `patiently`: a stop that is on record already, whose receipt is still to come.
 */
async function persistently(call, { patiently = false } = {}) {
  for (const pause of RETRY_AFTER_MILLISECONDS) {
    let waitMilliseconds = pause;
    try {
      return await call();
    } catch (error) {
      if (!MAYBE_PASSING.has(error.status) || (error.retryAfterSeconds && !patiently)) throw error;
      waitMilliseconds = Math.max(pause, 1000 * (error.retryAfterSeconds ?? 0));
    }
    await new Promise((resolve) => setTimeout(resolve, waitMilliseconds));
  }
  return call();
}

function csrfToken() {
  return document.querySelector('meta[name="csrf-token"]').content;
}

/** Lead to the sign-in page, and from there back to here. */
export function signInAgain() {
  location.assign(`/sign-in?${new URLSearchParams({ next: location.pathname })}`);
}
