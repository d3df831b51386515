// Light or dark: as the system is set, unless somebody chooses here. The server reads the cookie, so that a page comes in
// the right colours from its first moment.

const COOKIE_SECONDS = 365 * 24 * 3600;

const choice = document.getElementById("theme");

choice.value = document.documentElement.dataset.theme ?? "system";
choice.addEventListener("change", () => {
  const { value } = choice;
  if (value === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = value;
  const seconds = value === "system" ? 0 : COOKIE_SECONDS;
  document.cookie = `sluicegate_theme=${value}; path=/; max-age=${seconds}; SameSite=Lax`;
});
