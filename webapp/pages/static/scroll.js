// A box that stays at the end of its growing content, until the reader scrolls up.

const NEAR_PIXELS = 32;

/** Follow the end of `content` in `box`; `button` shows while it does not, and leads back. */
export function followEnd(box, content, button) {
  let following = true;
  let lastTop = 0;
  let lastEnd = 0;

  function toEnd() {
    following = true;
    button.hidden = true;
    box.scrollTop = box.scrollHeight;
  }

  box.addEventListener("scroll", () => {
    const top = box.scrollTop;
    const end = box.scrollHeight - box.clientHeight;
    // Upwards, by however little, is the reader's doing, unless there is less to scroll than before.
    if (top < lastTop && end >= lastEnd) following = false;
    else if (end - top <= NEAR_PIXELS) following = true;
    lastTop = top;
    lastEnd = end;
    button.hidden = following;
  });
  button.addEventListener("click", toEnd);

  const observer = new ResizeObserver(() => {
    if (following) toEnd();
  });
  observer.observe(content);
  observer.observe(box);
  return { toEnd };
}
