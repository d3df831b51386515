// Following one stream to its end, whatever happens to the connection on the way.
//
// EventSource reconnects by itself, with Last-Event-ID, when a connection breaks. It gives up for good on
// any answer but 200, and it never notices a connection that died in silence; both are seen to here, and
// both go on from the cursor. The cursor is opaque: it is kept and sent back, never looked into.

const LONGEST_PAUSE_MILLISECONDS = 15_000;
// The server's keep-alive comments do not reach scripts, so silence is all there is to go by.
// To resume is exact and cheap, so a needless one does no harm.
const SILENCE_MILLISECONDS = 45_000;

/**
 * Follow the stream at `url`; `on` has a function for each event: session, phase, thinking, content, done;
 * and `connected`, `disconnected`, `missed` (the session ended while the stream could not be read) and `lost`
 * (an error after which it makes no sense to go on). `check` answers the session, or rejects with an ApiError.
 */
export function followStream(url, check, on) {
  let source = null;
  let cursor = "";
  let failures = 0;
  let retryTimer = 0;
  let silenceTimer = 0;
  let ended = false;

  function open() {
    disconnect();
    source = new EventSource(cursor ? `${url}?${new URLSearchParams({ lastEventId: cursor })}` : url);
    source.addEventListener("open", () => {
      failures = 0;
      on.connected();
    });
    source.addEventListener("error", () => {
      on.disconnected();
      if (source.readyState === EventSource.CLOSED) retryLater();
    });
    hear("session", (data) => on.session(data));
    hear("phase", (data) => on.phase(data));
    hear("thinking", (data) => on.thinking(data.content));
    hear("message", (data) => on.content(data.content));
    hear("done", (data) => {
      close();
      on.done(data);
    });
    watchForSilence();
  }

  function hear(type, act) {
    source.addEventListener(type, (event) => {
      cursor = event.lastEventId || cursor;
      watchForSilence();
      act(JSON.parse(event.data));
    });
  }

  function watchForSilence() {
    clearTimeout(silenceTimer);
    silenceTimer = setTimeout(open, SILENCE_MILLISECONDS);
  }

  function retryLater() {
    disconnect();
    const pause = Math.min(500 * 2 ** failures, LONGEST_PAUSE_MILLISECONDS) * (0.75 + Math.random() / 2);
    failures += 1;
    retryTimer = setTimeout(retry, pause);
  }

  async function retry() {
    const { session, error } = await check().then((session) => ({ session }), (error) => ({ error }));
    if (ended) return;
    if (error?.status === 401 || error?.status === 404) {
      close();
      on.lost(error);
    } else if (session && session.status !== "ACTIVE") {
      close();
      on.missed();
    } else if (!document.hidden) {
      if (session) open();
      else retryLater();
    }
  }

  // A browser opens six connections to one origin, for all of its tabs together. A tab that nobody looks at
  // gives its own back, so that a Stop in another one never waits for it, and catches up when it is shown.
  function followVisibility() {
    if (document.hidden) disconnect();
    else open();
  }

  function disconnect() {
    source?.close();
    clearTimeout(retryTimer);
    clearTimeout(silenceTimer);
  }

  function close() {
    ended = true;
    disconnect();
    document.removeEventListener("visibilitychange", followVisibility);
  }

  document.addEventListener("visibilitychange", followVisibility);
  if (!document.hidden) open();
  return { close };
}
