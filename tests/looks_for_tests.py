"""What is wrong with the looks of a page, as a browser sees it."""

from __future__ import annotations

FAULTS = """() => {
  const faults = [], width = document.documentElement.clientWidth;
  const fault = (what, element) => faults.push(`${what}: ${(element.textContent || element.className).trim().slice(0, 60)}`);
  const style = (element) => getComputedStyle(element);
  const scrolls = (element) => ["auto", "scroll"].includes(style(element).overflowX);
  const overflows = (element) => element.clientWidth > 0 && element.scrollWidth > element.clientWidth + 1;
  if (document.documentElement.scrollWidth > width) fault("the page scrolls sideways", document.querySelector("h1"));
  for (const element of document.querySelectorAll(":is(.md-content, body > main, body > header:not(.md-header)) *")) {
    if (!overflows(element) || element.closest("svg, math, pre") || style(element).display === "inline") continue;
    if (style(element).overflowX === "hidden") fault("clipped", element);
    if (!scrolls(element)) continue;
    if (!style(element).backgroundImage.includes("gradient")) fault("scrolls without a shade that says so", element);
    if (element.tabIndex < 0) fault("cannot be scrolled by the keyboard", element);
    for (let up = element.parentElement; up; up = up.parentElement) {
      if (scrolls(up) && overflows(up)) fault("scrolls within what scrolls", element);
    }
  }
  for (const cell of document.querySelectorAll("td, th")) {
    const box = cell.getBoundingClientRect();
    if (!box.width || !box.height) continue;
    let scroller = cell.parentElement;
    while (scroller && !(scrolls(scroller) && overflows(scroller))) scroller = scroller.parentElement;
    if (!scroller && box.right > width) fault("cut off at the page's edge", cell);
    if (overflows(cell)) fault("says more than it has room for", cell);
    const text = document.createRange();
    text.selectNodeContents(cell);
    const bottoms = [...text.getClientRects()].map((r) => r.bottom).sort((a, b) => a - b);
    const lines = bottoms.filter((bottom, i) => !i || bottom - bottoms[i - 1] > parseFloat(style(cell).fontSize) / 2).length;
    if (box.width < 160 && lines > 7) fault(`${lines} lines in ${Math.round(box.width)} pixels`, cell);
  }
  return faults;
}"""


def faults(page) -> list[str]:
    """Whatever is clipped, cut off or squeezed on a page that Playwright shows, its folded parts opened; [] where all is well.

    A table may scroll in a box of its own that shows that it does; its cells are never narrow columns of many lines.
    """
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    return page.evaluate(FAULTS)


def scrolling(page) -> list[str]:
    """The tables that do not fit and scroll: the beginnings of what they say."""
    return page.evaluate(
        """() => [...document.querySelectorAll("table")].filter((table) => {
          const box = table.closest(".wide, .scroll");
          return box && box.scrollWidth > box.clientWidth + 1;
        }).map((table) => table.className + ": " + table.tHead.textContent.trim().slice(0, 60))"""
    )
