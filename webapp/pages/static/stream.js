// Following a stream: over the connection that all tabs share, or over this tab's own where there is no shared worker.

import { StreamConnection } from "./connection.js";

const followed = new Map(); // key: {sessionId, on}
let nextKey = 1;
let transport = null;

/**
 * Follow a session from the start of its text; `on` has a function for each event: session, phase, thinking, content,
 * done, connected, disconnected, missed and lost (see `StreamConnection.follow`). Returns what ends it.
 */
export function followStream(sessionId, on) {
  const key = nextKey++;
  followed.set(key, { sessionId, on });
  transport ??= sharedIfPossible();
  transport.follow(key, sessionId);
  return () => {
    if (followed.delete(key)) transport.leave(key);
  };
}

function tell(key, { type, data }) {
  const one = followed.get(key);
  if (!one) return;
  if (type === "done" || type === "missed" || type === "lost") followed.delete(key);
  one.on[type]?.(data);
}

function sharedIfPossible() {
  try {
    return "SharedWorker" in self ? shared() : own();
  } catch {
    return own(); // a browser that lets no site keep anything
  }
}

function shared() {
  const worker = new SharedWorker(workerUrl(), { type: "module", name: "sluicegate-streams" });
  const { port } = worker;
  port.addEventListener("message", ({ data }) => tell(data.key, data));
  worker.addEventListener("error", () => {
    port.close();
    transport = own();
    for (const [key, { sessionId }] of followed) transport.follow(key, sessionId);
  });
  port.start();
  holdLock(port);
  // A page that the browser keeps, to go back to, holds nothing meanwhile.
  addEventListener("pagehide", () => followed.forEach((_, key) => port.postMessage({ leave: key })));
  addEventListener("pageshow", ({ persisted }) => persisted && location.reload()); // what is in the box is kept
  return {
    follow: (key, sessionId) => port.postMessage({ follow: sessionId, key }),
    leave: (key) => port.postMessage({ leave: key }),
    wake: () => port.postMessage({ wake: true }),
    suspend() {},
  };
}

/** Where the page's policy lets scripts be loaded by no address but what a policy of ours made, as this one. */
function workerUrl() {
  const policy = { createScriptURL: () => new URL("./shared_worker.js", import.meta.url).href };
  return (self.trustedTypes?.createPolicy("sluicegate", policy) ?? policy).createScriptURL("");
}

/** By which the worker sees this tab go, however it goes; browsers have locks only over HTTPS and on localhost. */
function holdLock(port) {
  const name = `sluicegate-tab-${Date.now()}-${Math.random()}`;
  navigator.locks?.request(name, () => {
    port.postMessage({ lock: name });
    return new Promise(() => {});
  });
}

function own() {
  const connection = new StreamConnection();
  const leaving = new Map();
  return {
    follow: (key, sessionId) => leaving.set(key, connection.follow(sessionId, (event) => tell(key, event))),
    leave: (key) => {
      leaving.get(key)?.();
      leaving.delete(key);
    },
    wake: () => connection.wake(),
    // A tab that nobody looks at leaves its connection to those that are.
    suspend: () => connection.suspend(),
  };
}

document.addEventListener("visibilitychange", () => (document.hidden ? transport?.suspend() : transport?.wake()));
addEventListener("online", () => transport?.wake());
