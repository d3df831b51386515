// All tabs' streams over one connection. A tab says {follow: sessionId, key}, {leave: key} or {wake: true}, and is told
// {key, type, data}.

import { StreamConnection } from "./connection.js";

// After which a tab hears no more of a stream, and says no more of it.
const LAST = new Set(["done", "missed", "lost"]);

const connection = new StreamConnection();

addEventListener("connect", ({ ports: [port] }) => {
  const leaving = new Map();

  function leave(key) {
    leaving.get(key)?.();
    leaving.delete(key);
  }

  port.addEventListener("message", ({ data }) => {
    if (data.follow) {
      const tell = ({ type, data: told }) => {
        if (LAST.has(type)) leaving.delete(data.key);
        port.postMessage({ key: data.key, type, data: told, at: now() });
      };
      leaving.set(data.key, connection.follow(data.follow, tell));
    } else if (data.leave) {
      leave(data.leave);
    } else if (data.wake) {
      connection.wake();
    } else if (data.lock) {
      // A tab holds its lock for as long as it lives, and says nothing when it crashes.
      navigator.locks.request(data.lock, () => leaving.forEach((_, key) => leave(key)));
    }
  });
  port.start();
});

/** Milliseconds on a clock that tabs and worker share. */
function now() {
  return performance.timeOrigin + performance.now();
}
