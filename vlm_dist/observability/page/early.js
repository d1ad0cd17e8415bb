// Before the page is painted: the theme that the reader chose, where the browser keeps it.
try {
  const theme = localStorage.getItem("vlm-dist-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch (error) {
  console.debug("the theme is not remembered here", error);
}
