// Keeps a served page up to date: its panel every second or so, and the rest when there is something new to show.
const panel = document.getElementById("live");
const EVERY = 1500, REST = 4000; // milliseconds between looks at the panel, and at least between two copies of the page
let shownAt = Date.now();
let said = "";

async function look() {
  try {
    if (!document.hidden) {
      const answer = await fetch(`progress.json?claim=${encodeURIComponent(panel.dataset.claim)}`);
      const news = await answer.json();
      if (news.panel !== said) panel.innerHTML = said = news.panel;
      if (news.revision !== panel.dataset.revision && Date.now() - shownAt >= REST) await renew();
      document.body.classList.remove("lost");
    }
  } catch {
    document.body.classList.add("lost"); // the server has ended, or cannot read its store
  }
  setTimeout(look, EVERY);
}

async function renew() {
  const answer = await fetch(location.href);
  if (!answer.ok) throw new Error(answer.statusText);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  const open = [...document.querySelectorAll("main details")].map((part) => part.open);
  for (const part of ["header", "main"]) {
    const [old, made] = [document.querySelector(part), fresh.querySelector(part)];
    if (old && made) old.replaceWith(made);
  }
  const folds = document.querySelectorAll("main details");
  if (folds.length === open.length) folds.forEach((part, i) => (part.open = open[i]));
  prepare(document.querySelector("main"));
  document.title = fresh.title;
  panel.dataset.revision = fresh.getElementById("live").dataset.revision;
  shownAt = Date.now();
}

if (panel) setTimeout(look, EVERY);
