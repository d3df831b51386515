// A person who opened the printed link has already said what they want: press the button for them.
// Without scripts, and for whatever only fetches links, the button stays unpressed.

import { tabs } from "./tabs.js";

const form = document.getElementById("sign-in");

// Other tabs may show what nobody is signed in for any more.
if ("nobody" in form.dataset) tabs.postMessage({ user: null });

function submitAtOnce() {
  // "Back" must not lead to a link that is used up.
  history.replaceState(null, "", location.pathname);
  form.requestSubmit();
}

if ("submitAtOnce" in form.dataset) {
  if (document.prerendering) document.addEventListener("prerenderingchange", submitAtOnce, { once: true });
  else submitAtOnce();
}
