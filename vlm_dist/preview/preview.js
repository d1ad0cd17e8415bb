// Which token is this: shown where the reader points, or walks with the arrow keys.
(() => {
  "use strict";
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  document.body.append(tip);

  const shownText = (piece) => {
    const text = piece.textContent.replaceAll("↵\n", "\\n");
    return text.length > 60 ? text.slice(0, 60) + "…" : text;
  };
  const describe = (piece) => {
    const { n, c, i } = piece.dataset;
    const first = Number(n), count = Number(c);
    const place = count > 1 ? `tokens ${first} to ${first + count - 1}` : `token ${first}`;
    const ids = i ? i.split(" ") : [];
    const named = ids.length ? `${ids.length > 1 ? "ids" : "id"} ${ids.slice(0, 8).join(" ")}${ids.length > 8 ? " …" : ""}` : "";
    const loss = piece.closest("mark.loss") ? "carries loss" : "no loss";
    return [`“${shownText(piece)}”`, place, named, loss].filter(Boolean).join(" · ");
  };
  const show = (piece) => {
    tip.textContent = describe(piece);
    tip.hidden = false;
    const box = piece.getClientRects()[0] || piece.getBoundingClientRect();
    const left = Math.min(Math.max(box.left, 8), document.documentElement.clientWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(above > 4 ? above : box.bottom + 6) + scrollY}px`;
  };
  const hide = () => { tip.hidden = true; };

  for (const strip of document.querySelectorAll(".tokens[tabindex]")) {
    const pieces = () => [...strip.querySelectorAll(".p")];
    let at = 0;
    const go = (to) => {
      const all = pieces();
      if (!all.length) return;
      all[at]?.classList.remove("at");
      at = Math.min(Math.max(to, 0), all.length - 1);
      all[at].classList.add("at");
      all[at].scrollIntoView({ block: "nearest" });
      show(all[at]);
    };
    strip.addEventListener("mouseover", (event) => {
      const piece = event.target.closest(".p");
      if (piece) show(piece); else hide();
    });
    strip.addEventListener("mouseleave", hide);
    strip.addEventListener("scroll", hide);
    strip.addEventListener("focus", () => { if (strip.matches(":focus-visible")) go(at); });
    strip.addEventListener("blur", () => { pieces()[at]?.classList.remove("at"); hide(); });
    strip.addEventListener("keydown", (event) => {
      const moves = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: Infinity };
      if (!(event.key in moves)) return;
      event.preventDefault();
      event.stopPropagation();
      go(event.key === "End" ? pieces().length - 1 : moves[event.key]);
    });
  }
})();
