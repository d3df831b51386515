// Whether the text on the screen is the text that the server has committed.

/** The number of Unicode code points, as the server counts; `length` would count UTF-16 units. */
export function codePoints(text) {
  let count = 0;
  for (const _ of text) count += 1;
  return count;
}

/** Whether both texts are those of an ending (`done` or a receipt): lengths, and the hash where it can be had. */
export async function isWhatWasSaved({ thinking, content }, ending) {
  if (codePoints(content) !== ending.length) return false;
  if (codePoints(thinking) !== ending.thinkingLength) return false;
  // Browsers offer hashing only over HTTPS and on localhost.
  return !crypto.subtle || (await sha256(content)) === ending.sha256;
}

async function sha256(text) {
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
