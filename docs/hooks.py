"""What mkdocs does not do by itself: pages made from the catalogue and the sources, equations as MathML, the report's style.

Nothing here knows a system by name. A system's page comes from its claim, its published verdict and its docstrings; a file
``docs/systems/<slug>.md`` with the sections Method, Cost and Limits, each optional, adds what these do not say.
"""

from __future__ import annotations

import ast
import html
import posixpath
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from polyak import claims
from polyak.lab import report, strips, words
from polyak.lab.claim import Claim

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src"
# Files of the repository that are pages of the site as they are.
INCLUDED = {"CONTRIBUTING.md": "adding.md", "bench/README.md": "benchmarks.md", "SCOREBOARD.md": "scoreboard.md"}
# Their tables need the room of the list of contents, which the first of them is.
WIDE = ("SCOREBOARD.md",)
MADE = ("gallery.md", "errata.md")  # from the catalogue
SECTIONS = ("Method", "Cost", "Limits")
TOOLS = ("claims", "cli")  # packages of polyak that are no rooms to import from


# ------------------------------------------------------------------------------------------------------------------- events


def on_config(config: Any) -> Any:
    """The navigation's entries "systems/" and "api/" become lists; an entry whose page is not written is left out."""
    written = (
        {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")} | set(INCLUDED.values()) | set(MADE)
    )
    lists = {"systems/": _systems_nav, "api/": _api_nav}
    nav = []
    for entry in config["nav"]:
        [(title, page)] = entry.items()
        if page in lists:
            nav.append({title: lists[page]()})
        elif page in written:
            nav.append(entry)
    config["nav"] = nav
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages and the report's style sheet. A system's fragment is a part of its page, not a page."""
    from mkdocs.structure.files import File

    for file in [f for f in files if f.src_uri.startswith("systems/") and f.src_uri.endswith(".md")]:
        files.remove(file)
    for uri, content in [*pages(), ("assets/report.css", style()), ("assets/find.js", report.source("find.js"))]:
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """A mark for a strip becomes an example of one, a mark for tiles the pictures of some systems."""
    for mark, made in MARKS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, made())
    return markdown


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Equations become MathML, wide tables scroll by themselves, and no line ends within an option of a command."""
    content = re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', _equation, content, flags=re.DOTALL)
    content = re.sub(r"(?<!\S)<table>.*?</table>", _table, content, flags=re.DOTALL)
    return re.sub(r"(?<!</span>)<code>[^<]*--[^<]*</code>", _options, content)


# -------------------------------------------------------------------------------------------------------------------- pages


def pages() -> Iterator[tuple[str, str]]:
    """(address below docs/, Markdown) of every page that is made."""
    catalogue = claims.catalogue()
    for source, page in INCLUDED.items():
        yield page, included(source)
    yield "gallery.md", gallery()
    yield "errata.md", errata(catalogue)
    yield "systems/index.md", systems_index(catalogue)
    for slug, claim in catalogue.items():
        yield f"systems/{slug}.md", system_page(claim)
    for room in rooms():
        yield f"api/{room}.md", api_page(room)
    yield "api/cli.md", commands_page()


def included(source: str) -> str:
    """A file of the repository as a page: its relative links lead to the pages that its targets have become."""
    text = (ROOT / source).read_text(encoding="utf-8")
    # The scoreboard marks its sections with anchors of raw HTML; as identifiers of the headings they appear once.
    text = re.sub(r'<a id="(\w+)"></a>\n\n(#+ .*)', r"\2 {#\1}", text)

    def link(match: re.Match[str]) -> str:
        target, anchor = match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        return f"]({match[1] or ''}{INCLUDED.get(path, path.removeprefix('docs/'))}{anchor})"

    text = re.sub(r"\]\((?!\w+:|#)(/?)([^)#\s]+)(#[^)\s]*)?\)", link, text)
    return f"---\nhide: [toc]\n---\n\n{text}" if source in WIDE else text


def systems_index(catalogue: dict[str, Claim]) -> str:
    """All systems by room, with their verdicts."""
    shown = _template("systems.html").render(rooms=report.by_room(map(_entry, catalogue.values())))
    return f"# Systems\n\n{shown}\n"


def _entry(claim: Claim) -> report.Entry:
    return report.entry(claim, (), claims.published_at(claim.slug))


def gallery() -> str:
    """The pictures of all systems that have one, by room."""
    parts = ["# Gallery", "What each method does, drawn by the method itself."]
    for room, entries in report.by_room(map(_entry, claims.catalogue().values())).items():
        if drawn := [e for e in entries if e.claim.picture]:
            parts += [f"## {room}", _template("tiles.html").render(entries=drawn, large=True)]
    return "\n\n".join(parts) + "\n"


def tiles() -> str:
    """The pictures that open the start page."""
    return _template("tiles.html").render(
        entries=report.some_tiles(map(_entry, claims.catalogue().values())), large=False
    )


def errata(catalogue: dict[str, Claim]) -> str:
    """What official code gets wrong, by system, each with the test that shows it."""
    parts = [
        "# What official code gets wrong",
        "Where the code of a paper's authors departs from the paper, or a widespread implementation is wrong: what it does, "
        "what that does to results, and a test of this library that shows it.",
    ]
    for slug, claim in catalogue.items():
        if claim.errata:
            parts.append(f"## [{claim.name}](systems/{slug}.md)")
        for erratum in claim.errata:
            title = _plain(erratum.what).replace('"', "'")
            body = [_plain(erratum.effect), f"*{_plain(erratum.where)}*", _shown_by(erratum.test)]
            parts.append(f'??? bug "{title}"\n' + textwrap.indent("\n\n".join(body), "    "))
    return "\n\n".join(parts) + "\n"


def _shown_by(test: str) -> str:
    """A test's name, which opens its source."""
    path, _, name = test.partition("::")
    text = (ROOT / path).read_text(encoding="utf-8")
    found = next(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.name == name)
    lines = text.splitlines()[min(n.lineno for n in (found, *found.decorator_list)) - 1 : found.end_lineno]
    code = "\n".join(f"    {line}".rstrip() for line in ("```python", *lines, "```"))
    return f'??? quote "{test}"\n{code}'


def example_strip() -> str:
    """The strip of the published effect with the most seeds, with its words; "" where nothing is published."""
    published = [(c, r) for slug, c in claims.catalogue().items() if (r := claims.published(slug))]
    outcomes = [(c, o) for c, r in published for o in r.criteria if o.gating and o.kind == "effect" and o.low < o.high]
    if not outcomes:
        return ""
    claim, outcome = max(outcomes, key=lambda found: len(found[1].per_seed))
    compare = next(c.compare for c in claim.criteria if c.name == outcome.name)
    says = html.escape(f"{claim.name}. {outcome.says}: {outcome.verdict}.")
    return f'<div class="report"><p class="small">{says}</p>{strips.strip(outcome, compare)}</div>'


def system_page(claim: Claim) -> str:
    """The page of one system: method, use, verdict, cost, limits, reference."""
    view = report.view(_entry(claim))
    written = fragment(claim.slug)
    module = claim.part.partition(":")[0]
    parts = [
        f"# {claim.name}",
        _template("answer.html").render(view),
        "## Method",
        written.get("Method") or docstring(module),
        "## Use",
        "```python\n" + "\n".join(words.usage(claim)) + "\n```",
        "## Verdict",
        _template("verdict.html").render(view),
        "## The experiment",
        _template("experiment.html").render(view),
        f"```sh\npolyak reproduce {claim.slug}\npolyak report {claim.slug} --open\n```",
    ]
    for section in SECTIONS[1:]:
        if section in written:
            parts += [f"## {section}", written[section]]
    name = claim.part.replace(":", ".")
    parts += [
        "## Reference",
        f'??? abstract "{name.rpartition(".")[2]}: its arguments, state and errors"\n'
        f"    ::: {name}\n        options:\n          heading_level: 3\n          skip_local_inventory: true",
        f"All of `{module}` is in the [reference of `polyak.{claim.room}`](../api/{claim.room}.md).",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def fragment(slug: str) -> dict[str, str]:
    """The written sections of a system's page, by heading. ValueError where one has another heading."""
    path = ROOT / "docs" / "systems" / f"{slug}.md"
    if not path.exists():
        return {}
    head, *sections = re.split(r"^## (.+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {title.strip(): text.strip() for title, text in zip(sections[::2], sections[1::2], strict=True)}
    if head.strip() or not set(found) <= set(SECTIONS):
        raise ValueError(f"{path}: only the sections {', '.join(SECTIONS)} are part of a system's page")
    return found


def docstring(module: str) -> str:
    """A module's docstring as Markdown: its equations stand indented, which is code."""
    found = _sources()[module.removeprefix("polyak.")].docstring
    return found.value if found else ""


# --------------------------------------------------------------------------------------------------------------- reference


@cache
def _sources() -> Any:
    import griffe

    extensions = griffe.load_extensions(str(ROOT / "docs" / "docstrings.py"))
    return griffe.load("polyak", search_paths=[SOURCES], extensions=extensions)


def rooms() -> list[str]:
    """The packages of polyak that one imports from, core and lab included."""
    found = (p.parent.name for p in (SOURCES / "polyak").glob("[a-z]*/__init__.py"))
    return sorted(room for room in found if room not in TOOLS)


def api_page(room: str) -> str:
    """What a room exports, then its modules that have public names beside those."""
    package = _sources()[room]
    exported = [str(name) for name in package.exports or ()]
    named = [name for name in exported if _documented(package.members.get(name))]
    shown = {_final(package.members[name]).path for name in named}
    parts = [f"# polyak.{room}", docstring(package.path)]
    parts += [f"::: {package.path}.{name}" for name in sorted(named, key=str.lower)]
    for module in _modules(package):
        own = [n for n in _public(module) if _final(module.members[n]).path not in shown]
        if own:
            listed = "".join(f"\n        - {name}" for name in own)
            parts.append(f"::: {module.path}\n    options:\n      show_root_full_path: true\n      members:{listed}")
    return "\n\n".join(parts) + "\n"


def _modules(package: Any) -> Iterator[Any]:
    """The public modules below, in order. A package with ``__all__`` speaks for those in it."""
    for name, module in sorted(_own_modules(package).items()):
        if not name.startswith("_"):
            yield module
            if module.exports is None:
                yield from _modules(module)
            else:
                yield from (m for n, m in sorted(_own_modules(module).items()) if n in module.exports)


def _own_modules(package: Any) -> dict[str, Any]:
    """The modules in a package, without those that it imports: `import polyak` would lead around in circles."""
    return {name: m for name, m in package.members.items() if not m.is_alias and m.is_module}


def _public(module: Any) -> list[str]:
    """The names that a module defines or exports, documented, modules aside."""
    if module.exports is not None:
        names = [str(name) for name in module.exports]
    else:
        names = [n for n, member in module.members.items() if not member.is_alias and member.is_public]
    members = module.members
    return [n for n in names if n in members and _documented(members[n]) and not _final(members[n]).is_module]


def _final(item: Any) -> Any:
    return item.final_target if item.is_alias else item


def _documented(item: Any) -> bool:
    import griffe

    try:
        return item is not None and _final(item).has_docstring
    except griffe.AliasResolutionError:  # of what is assigned in a tuple griffe knows nothing
        return False


def commands_page() -> str:
    """The help of every command."""
    import typer

    from polyak.cli.app import app

    group: Any = typer.main.get_command(app)
    context = group.context_class(group, info_name="polyak")
    parts = ["# Commands", (group.help or "").strip()]
    for name, command in group.commands.items():
        own = command.context_class(command, info_name=name, parent=context)
        parts += [f"## polyak {name}", *_command(command, own)]
    return "\n\n".join(parts) + "\n"


def _command(command: Any, context: Any) -> Iterator[str]:
    usage = " ".join(["polyak", context.info_name, *command.collect_usage_pieces(context)])
    yield "\n\n".join(_plain(paragraph) for paragraph in (command.help or "").split("\n\n"))
    yield f"Usage: `{usage}`"
    rows = [record for p in command.params if (record := p.get_help_record(context)) and p.name != "help"]
    if rows:
        cells = (f"| `{option}` | {_plain(says)} |" for option, says in rows)
        yield "\n".join(["| option | |", "| --- | --- |", *cells])


def _plain(text: str) -> str:
    """One paragraph that Markdown shows as it is, but for its code."""
    return html.escape(" ".join(text.split()), quote=False).replace("[", "\\[").replace("|", "\\|")


# -------------------------------------------------------------------------------------------------------------- navigation


def _systems_nav() -> list[Any]:
    by_room: dict[str, list[Any]] = {}
    for slug, claim in claims.catalogue().items():
        by_room.setdefault(claim.room, []).append({claim.name: f"systems/{slug}.md"})
    return ["systems/index.md", *({room: systems} for room, systems in by_room.items())]


def _api_nav() -> list[Any]:
    return [*({f"polyak.{room}": f"api/{room}.md"} for room in rooms()), {"Commands": "api/cli.md"}]


# -------------------------------------------------------------------------------------------------------------------- looks


MARKS = {"<!-- strip -->": example_strip, "<!-- tiles -->": tiles}


def _template(name: str) -> Any:
    return report.templates(ROOT / "docs" / "templates").get_template(name)


def style() -> str:
    """The report's style sheet, for what stands in ``.report``; its colours follow the site's switch of light and dark."""
    sheet = (Path(report.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", sheet, flags=re.DOTALL)
    rules = sheet[sheet.index("* { box-sizing") :]
    # Rules for the report's page as a whole are not for a part of this one.
    page = r"^(?:html|body|a|h1|h2|nav|pre|code, pre) \{[^}]*\}\n|^@media \(min-width: 48rem\).*\n"
    lines = re.sub(page, "", rules, flags=re.MULTILINE).splitlines()
    # There a rem is 16 pixels, here it is 20; in a media query it is 16 in both.
    rules = "\n".join(line if line.startswith("@media") else re.sub(r"[\d.]+(?=rem)", _smaller, line) for line in lines)
    return (
        f'[data-md-color-scheme="default"] {{{light}}}\n[data-md-color-scheme="slate"] {{{dark}}}\n'
        f".report {{\n{rules}\n}}\n"
    )


def _smaller(size: re.Match[str]) -> str:
    return f"{float(size[0]) * 0.8:g}"


# In characters: a cell that never breaks, one that reads as text, one that needs no more room than this, a phone's line.
SHORT, PROSE, LONG, PHONE = 12, 24, 44, 46
CELL = re.compile(r"<(t[hd])([^>]*)>(.*?)</t[hd]>", flags=re.DOTALL)  # tag, attributes, content


def _table(match: re.Match[str]) -> str:
    """A table that scrolls by itself, and by the keyboard, where it does not fit.

    Short cells do not break; longer ones have room in proportion to what they say, within limits. On a phone a table of text
    that does not fit becomes a list of its rows (class "rows"), where each cell says what its column is; one of numbers scrolls.
    """
    rows = [CELL.findall(row) for row in match[0].split("<tr>")[1:]]
    heads, *texts = [[_words(content) for _, _, content in row] for row in rows]
    needed = sum(max(_needed(row[i][2]) for row in rows) + 2 for i in range(len(heads)))
    reads = any(len(text) > PROSE for row in texts for text in row[1:])
    kind = "wide rows" if needed > PHONE and reads else "wide"
    head, *body = [_cells(row, heads if len(heads) > 2 else []) for row in rows]
    lines = [f'<div class="{kind}" tabindex="0">', '<table class="data">']
    lines += ["<thead>", head, "</thead>", "<tbody>", *body, "</tbody>", "</table>", "</div>"]
    return "\n".join(lines)


def _cells(row: list[tuple[str, str, str]], heads: list[str]) -> str:
    """One row of a table: its cells with the width that they need and, from the second on, with their columns' names."""

    def cell(i: int, tag: str, attributes: str, content: str) -> str:
        length = len(_words(content))
        if tag == "th" or length <= SHORT:
            attributes += ' class="short"' * (tag == "td")
        else:  # the only attribute that Markdown gives is a style, for the column's side
            side = attributes.removeprefix(' style="').removesuffix('"')
            attributes = f' style="{f"{side} min-width".strip()}: {min(length, LONG) / 4:g}em"'
        if tag == "td" and i and any(heads[i : i + 1]):
            attributes += f' data-head="{html.escape(heads[i])}"'
        return f"<{tag}{attributes}>{content}</{tag}>"

    return f"<tr>{''.join(cell(i, *found) for i, found in enumerate(row))}</tr>"


def _options(match: re.Match[str]) -> str:
    return re.sub(r"(?<![\w-])--\w[\w-]*", r'<span class="whole">\g<0></span>', match[0])


def _words(content: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", content)).strip()


def _needed(content: str) -> int:
    """How many characters wide a cell is at least. Code does not break."""
    text = _words(content)
    whole = [*text.split(), *map(_words, re.findall(r"<code>(.*?)</code>", content, flags=re.DOTALL))]
    return len(text) if len(text) <= SHORT else max(min(len(text), LONG) // 2, *map(len, whole))


def _equation(match: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    block = match[1] == "div"
    latex = html.unescape(match[2]).strip()[2:-2].strip()
    made = convert(latex, display="block" if block else "inline")
    # What the converter does not know it passes on as it is; such an equation must stop the build.
    if re.search(r"\\[a-zA-Z]|<mi>&</mi>", made):
        raise ValueError(f"no MathML for {latex}")
    ElementTree.fromstring(made)
    return f'<div class="equation" tabindex="0">{made}</div>' if block else made
