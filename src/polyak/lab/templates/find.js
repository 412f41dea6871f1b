// Puts a search field above what has data-find: only rows and items that have all of its words are then shown.
for (const part of document.querySelectorAll("[data-find]")) {
  const label = document.createElement("label");
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = part.dataset.find;
  label.className = "find";
  label.append("Find ", field);
  part.before(label);
  const items = [...part.querySelectorAll("tbody > tr, :scope > li, .systems > li")];
  const groups = [...part.querySelectorAll("[data-room]")];
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const room = (item) => item.closest("[data-room]")?.dataset.room ?? "";
    for (const item of items) {
      const text = `${item.textContent} ${room(item)}`.toLowerCase();
      item.hidden = !words.every((word) => text.includes(word));
    }
    for (const group of groups) group.hidden = !items.some((item) => group.contains(item) && !item.hidden);
  });
}
