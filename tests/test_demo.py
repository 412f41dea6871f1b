"""``polyak demo``: what it prints, what the README shows of that, and the page that it leaves."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from polyak import claims
from polyak.cli import demo
from polyak.cli.app import app

README = Path(__file__).parents[1] / "README.md"
SHOWN = ("dpm_solver", "lion")  # of all systems: one that the page names, and one with a picture
SOLVERS = ("DDIM", "Heun", "DPM-Solver++")


class Shown(NamedTuple):
    printed: str
    folder: Path
    page: str


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, in_process: None) -> Any:
    """A demo of little work, as `make demo` asks for it."""
    folder, out = tmp_path_factory.mktemp("demo"), io.StringIO()
    catalogue = {slug: claims.load(slug) for slug in SHOWN}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folder)
        patch.setattr(claims, "catalogue", lambda: catalogue)
        for name, value in {"STEPS": 6, "SEEDS": 3, "TRIALS": 1, "IMAGES": 40, "SAMPLES": 4}.items():
            patch.setattr(demo, name, value)
        demo.demo(out=Path("demo"))
    return Shown(out.getvalue(), folder / "demo", (folder / "demo/report/demo.html").read_text(encoding="utf-8"))


def lines(text: str) -> list[str]:
    """Without the numbers, which every run finds anew, and without the answers that are made of them."""
    text = re.sub(r"^   (?:The nearest:|Keep|Use) .*?\n\n", "\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?<![\w-])−?\d+(?:\.\d+)?(?![\w.])", "#", text)
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def test_the_readme_shows_what_is_printed(shown: Shown) -> None:
    readme = README.read_text(encoding="utf-8")
    found = re.search(r"<!-- transcript -->\n```\n\$ make demo\n(.*?)```\n<!-- /transcript -->", readme, re.DOTALL)
    assert found is not None
    printed = lines(shown.printed)
    for line in lines(found[1]):
        assert line == "  ..." or any(own.startswith(line) for own in printed), f"this is not printed: {line}"
    heads = [line for line in found[1].splitlines() if line[:1].strip()]
    assert [head.split()[0] for head in heads] == ["1.", "2.", "Pictures,", "Try"]
    assert all(re.search(rf"^   {re.escape(name)} +\d", found[1], flags=re.MULTILINE) for name in SOLVERS)
    commands = [command for command, _ in demo.next_steps(Path("demo/digits.py"))]
    assert [line.strip() for line in found[1].splitlines() if line.startswith("   polyak ")] == commands
    assert f"Each gets {demo.STEPS} steps on {demo.SEEDS} seeds." in found[1]
    assert f"tuned on {demo.TRIALS} runs of their own" in found[1]


def test_each_answer_is_printed_as_it_is_known(shown: Shown) -> None:
    text = shown.printed
    [nearest] = re.findall(r"^   The nearest: with 10 ", text, flags=re.MULTILINE)
    [answer] = re.findall(r"^   (?:Keep|Use) \w+: ", text, flags=re.MULTILINE)
    order = ["1. One model, three solvers.", *SOLVERS, nearest, "2. One model, three optimizers.", answer, "Try next:"]
    assert sorted(order, key=text.index) == order
    heard = re.findall(r"^   (AdamW|Adan|Lion) +seed (\d): [\d.]+ % of new digits right", text, flags=re.MULTILINE)
    assert sorted(heard) == [(name, str(seed)) for name in ("AdamW", "Adan", "Lion") for seed in range(3)]
    assert text.index(heard[-1][0]) < text.index(answer)


def test_the_page_opens_with_two_pictures_and_an_answer(shown: Shown) -> None:
    opening, _, rest = shown.page.partition("<h2>")
    assert len(re.findall(r"<figure[ >]", opening)) == opening.count("<svg ") == 2
    assert 'aria-label="Answer"' in opening
    assert "The nearest: with 10 " in opening
    assert all(name in rest for name in SOLVERS)


def test_links_of_the_page_lead_somewhere(shown: Shown) -> None:
    targets = set(re.findall(r'<a [^>]*href="([^"#]+)', shown.page))
    assert {"index.html", "gallery.html", "dpm_solver.html", "lion.html", "compare-digits.html"} <= targets
    for target in targets:
        assert (shown.folder / "report" / target).is_file(), target


def parsed(command: str) -> dict[str, Any]:
    """A command's arguments, understood by the command line, which does not run it."""
    group: Any = typer.main.get_command(app)
    program, name, *rest = shlex.split(command)
    assert program == "polyak"
    with group.make_context("polyak", [name, "--help"], resilient_parsing=True) as context:
        return group.commands[name].make_context(name, rest, parent=context).params


def test_what_to_try_next_can_be_tried(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = re.findall(r"^   (polyak .*?)(?: {2,}| [a-z ]+: )", shown.printed, flags=re.MULTILINE)
    paged = [unescape(command) for command in re.findall(r"<code>(polyak .*?)</code>", shown.page)]
    assert len(printed) == len(paged) == 4
    monkeypatch.chdir(shown.folder.parent)
    for command in paged:
        given = parsed(command)
        for task in given.get("tasks", ()):
            assert task.is_file()
        for slug in [*(given.get("slugs") or ()), *filter(None, [given.get("slug")])]:
            assert slug in claims.slugs()


@pytest.mark.parametrize("command", ["polyak nosuch", "polyak list --nosuch", "polyak compare task.py --arm adamw"])
def test_a_command_that_there_is_not_would_be_seen(command: str) -> None:
    with pytest.raises(Exception, match=r"nosuch|--arm"):
        parsed(command)
