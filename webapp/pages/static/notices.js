// What the page says to the person: in the announcer, for those who listen, and in the notice above the box.

const announcer = document.getElementById("announcer");
const notice = document.getElementById("notice");
const noticeText = notice.querySelector("p");

notice.querySelector("button").addEventListener("click", hideNotice);

/** Say a change of state to assistive technology; tokens are never announced. */
export function announce(text) {
  announcer.textContent = text;
}

/** Show what went wrong, until it is dismissed or the next thing is tried. */
export function showNotice(text) {
  // Said once, however often it is tried again.
  if (noticeText.textContent === text && !notice.hidden) return;
  noticeText.textContent = text;
  notice.hidden = false;
}

export function hideNotice() {
  notice.hidden = true;
}
