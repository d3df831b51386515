// A box that stays at the end of its growing content, until the reader scrolls up.

const NEAR_PIXELS = 32;
// What is laid out anew moves as well; only what comes with a hand on wheel, screen, keys or bar, or goes to what is focused, is the reader's doing.
const HAND_MILLISECONDS = 500;
const HANDS = {
  wheel: ({ deltaY }) => deltaY < 0,
  touchmove: () => true,
  keydown: ({ key }) => key === "ArrowUp" || key === "PageUp" || key === "Home" || key === " ",
  pointerdown: ({ target, currentTarget, offsetX }) => target === currentTarget && offsetX >= target.clientWidth,
  pointermove: ({ buttons }) => buttons > 0,
  focusin: () => true,
};

/** Follow the end of `content` in `box`; `button` shows while it does not, and leads back. */
export function followEnd(box, content, button) {
  let following = true;
  let lastTop = 0;
  let handAt = -Infinity;

  function toEnd() {
    following = true;
    button.hidden = true;
    box.scrollTop = box.scrollHeight;
  }

  box.addEventListener("scroll", () => {
    const top = box.scrollTop;
    const end = box.scrollHeight - box.clientHeight;
    if (end - top <= NEAR_PIXELS && top >= lastTop) following = true;
    else if (top < lastTop && performance.now() - handAt < HAND_MILLISECONDS) following = false;
    lastTop = top;
    button.hidden = following;
  });
  for (const [type, isHand] of Object.entries(HANDS)) {
    box.addEventListener(type, (event) => isHand(event) && (handAt = performance.now()), { passive: true });
  }
  button.addEventListener("click", toEnd);

  const observer = new ResizeObserver(() => {
    if (following) toEnd();
  });
  observer.observe(content);
  observer.observe(box);
  return { toEnd };
}
