"""Comparisons in a store: as they were asked for, with what has ended of them, and their pages in `polyak serve`."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polyak.lab import Store, compare, report, words
from polyak.lab.compare.budget import Budget
from polyak.lab.compare.comparison import Comparison
from polyak.lab.compare.page import page
from polyak.lab.compare.record import Record
from polyak.lab.compared import Compared, Shelf
from polyak.lab.database import FILE
from polyak.lab.pages import Pages
from polyak.lab.report import Live
from polyak.lab.store import InFlight

from .tasks_for_tests import REGRESSION, SAMPLING, write

pytestmark = pytest.mark.xdist_group("browser")  # the worker that draws the pages makes the comparison, once

ARMS = "adamw,adan:betas=(0.9, 0.9, 0.99),sgd:momentum=0.9:lr=0.1:weight_decay=0"
GIVEN: dict[str, Any] = {"budget": "20steps", "seeds": 2, "trials": 3, "points": 4, "jobs": 2, "progress": False}
TOTAL = 3 * 2 * 2 + 2 * 3  # nothing is tuned of SGD


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tasks"), REGRESSION, name="line.py")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, task: Path) -> tuple[Path, Comparison]:
    home = tmp_path_factory.mktemp("home")
    return home, compare(task, ARMS, store=home, **GIVEN)


@pytest.fixture
def home(whole: tuple[Path, Comparison], tmp_path: Path) -> Path:
    """A store of this test's own that holds the comparison."""
    shutil.copytree(whole[0], tmp_path / "home")
    return tmp_path / "home"


def change(home: Path, *statements: str) -> None:
    database = sqlite3.connect(home / FILE)
    with database:
        for statement in statements:
            database.execute(statement)
    database.close()


def read(home: Path, shelf: Shelf | None = None) -> list[Compared]:
    with Store(home) as store:
        return (shelf or Shelf()).read(store)


def pages(home: Path) -> Pages:
    return Pages(home, {}, lambda slug: {})


def text(of: Pages, target: str) -> str:
    body = re.sub(r"<(script|style)\b.*?</\1>", "", of.answer(target).body.decode(), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def main(page: str) -> str:
    return page[page.index("<main>") : page.index("</main>")]


def test_a_store_gives_back_what_was_found(whole):
    home, found = whole
    [compared] = read(home)
    assert (compared.done, compared.failed, compared.total, compared.complete) == (TOTAL, 0, TOTAL, True)
    assert list(compared.arms.values()) == ["AdamW", "Adan (betas (0.9, 0.9, 0.99))", "SGD (momentum 0.9, lr 0.1, …)"]
    assert compared.result.to_json() == found.to_json()
    assert compared.record.title == "line"
    assert compared.finished == max(date for _, date in compared.states.values()) != ""
    assert compared.seconds == pytest.approx(sum(t.seconds for t in found.task().result.trials))


def test_a_record_comes_back_as_it_was_and_holds_no_folder(whole, task):
    with Store(whole[0]) as store:
        [noted] = store.comparisons()
    record = Record.from_json(noted.data)
    assert record.slug == noted.slug
    assert json.dumps(record.to_json()) == json.dumps(noted.data)
    assert str(task.parent) not in json.dumps(noted.data)
    with pytest.raises(ValueError, match="version must be 2, got 3"):
        Record.from_json({**noted.data, "version": 3})


def test_the_command_runs_nothing_that_is_stored(whole, task):
    home, found = whole
    [compared] = read(home)
    said = shlex.split(compared.record.command)
    assert said[:3] == ["polyak", "compare", "line.py"]
    given = dict(zip(said[3::2], said[4::2], strict=True))
    assert given == {"--arms": ARMS, "--budget": "20steps", "--seeds": "2", "--trials": "3", "--points": "4"}
    news: list[Any] = []
    again = compare(
        task, given["--arms"], budget=given["--budget"], seeds=int(given["--seeds"]), trials=int(given["--trials"]),
        points=int(given["--points"]), store=home, on_progress=news.append,
    )  # fmt: skip
    assert (news[-1].cached, news[-1].total) == (TOTAL, TOTAL)
    assert again.answer == found.answer
    assert [c.record.slug for c in read(home)] == [compared.record.slug]  # the same, asked for again


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cpu", ""),
        ("NVIDIA H200", " --device cuda"),
        ("2 × cpu", " --nproc-per-trial 2"),
        ("4 × NVIDIA H200", " --device cuda --nproc-per-trial 4"),
    ],
)
def test_the_command_names_device_and_processes(whole, device, said):
    [compared] = read(whole[0])
    record = replace(compared.record, setup=replace(compared.record.setup, device=device))
    assert record.command == compared.record.command + said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": "1m"}, "--budget 60s"),
        ({"budget": "2s/trial", "jobs": 2}, "--budget 2s/trial --seeds 2 --trials 3 --points 4 --jobs 2"),
        ({"target": 0.25}, "--target 0.25"),
    ],
)
@pytest.mark.usefixtures("clock")
def test_what_is_asked_for_otherwise_is_another_comparison(home, task, monkeypatch, changes, said):
    """Only what was asked for is looked at: the trials are not run."""

    class Asked(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Asked

    monkeypatch.setattr(sys.modules["polyak.lab.compare.main"], "carry_out", stop)
    before = read(home)[0].record.slug
    with pytest.raises(Asked):
        compare(task, ARMS, store=home, **{**GIVEN, **changes})
    latest, other = read(home)
    assert other.record.slug == before != latest.record.slug
    assert said in latest.record.command
    assert latest.complete == ("target" in changes)  # whose trials are the same


def test_an_arm_that_cannot_be_used_leaves_no_record(tmp_path, task):
    with pytest.raises(ValueError, match="cannot be made"):
        compare(task, "adamw,sgd:nesterov=True:momentum=0", store=tmp_path, **GIVEN)
    assert read(tmp_path) == []


def test_what_is_missing_is_counted_and_drawn_and_nothing_is_judged(home, whole):
    change(
        home,
        "DELETE FROM trials WHERE purpose = 'report' AND arm LIKE 'adan%'",
        "UPDATE trials SET state = 'failed' WHERE purpose = 'report' AND arm = 'adamw' AND seed = 1",
    )
    [compared] = read(home)
    assert (compared.done, compared.failed, compared.total, compared.complete) == (TOTAL - 3, 1, TOTAL, False)
    assert compared.result.task().result.criteria == ()
    of = pages(home)
    runs = text(of, "/runs.html")
    assert (
        f"line 20 steps for each trial AdamW, Adan (betas (0.9, 0.9, 0.99)), SGD (momentum 0.9, lr 0.1, …) {TOTAL - 3} of {TOTAL} "
        in runs
    )
    assert "1 could not run" in runs
    shown = text(of, f"/{compared.record.slug}.html")
    assert f"{TOTAL - 3} of {TOTAL} trials have ended; 1 could not run ." in shown
    assert "Nothing runs it now" in shown
    assert "polyak compare line.py --arms" in shown
    [first] = [t.values["distance"] for t in whole[1].task().trials("adamw") if t.seed == 0]
    assert re.search(r"AdamW (\S+) 1 of 2 6 of 6 \S+ lr = ", shown)[1] == words.number(first)
    assert re.search(r"Adan \(betas \(0.9, 0.9, 0.99\)\) 0 of 2 6 of 6 \S+ lr = \S+, weight_decay = \S+ SGD", shown)
    assert re.search(r" SGD \(momentum 0.9, lr 0.1, …\) \S+ 2 of 2 nothing Distance", shown)
    html = of.answer(f"/{compared.record.slug}.html").body.decode()
    assert html.count("<svg") - html.count('class="swatch"') == 4  # two curves over two places, the loss, sensitivity
    assert "beats" not in shown
    assert "undecided" not in shown


def test_the_page_in_serve_is_the_page_that_was_written(home, whole):
    of = pages(home)
    [compared] = read(home)
    assert whole[1].answer in text(of, "/runs.html")
    runs = of.answer("/runs.html").body.decode()
    assert f'<a href="{compared.record.slug}.html">line</a>' in runs
    served = of.answer(f"/{compared.record.slug}.html").body.decode()
    command = f"<dt>Command</dt><dd><code>{shlex_escaped(compared.record.command)}</code></dd>"
    assert command in served
    bare = re.sub(r"\s+", " ", main(served).replace(command, ""))
    assert bare == re.sub(r"\s+", " ", main(page(whole[1])))
    assert '<a href="runs.html">Runs</a>' in served
    assert of.answer("/compare-0123456789abcdef.html").status == 404


def shlex_escaped(command: str) -> str:
    return command.replace("'", "&#39;")


def test_what_another_version_wrote_is_left_out(home):
    change(home, "UPDATE comparisons SET data = json_set(data, '$.version', 9)")
    assert read(home) == []
    change(home, "UPDATE comparisons SET data = json_remove(data, '$.version')")
    assert read(home) == []
    assert "The store is empty" in text(pages(home), "/runs.html")


def test_a_store_of_before_is_read_and_written(home, task):
    change(home, "DROP TABLE comparisons")
    reader = Store.reader(home)
    assert reader is not None
    with reader:
        assert reader.comparisons() == []
    compare(task, ARMS, store=home, **GIVEN)
    assert len(read(home)) == 1


def test_other_libraries_are_marked(home):
    change(home, "UPDATE comparisons SET data = json_set(data, '$.versions.polyak', '0.0.1')")
    assert "other versions" not in text(pages(home), "/runs.html")
    change(home, "UPDATE comparisons SET data = json_set(data, '$.versions.torch', '1.0')")
    [compared] = read(home)
    assert compared.done == 0  # its trials would have been other ones
    assert "other versions torch 1.0 " in text(pages(home), "/runs.html")


def test_what_has_not_changed_is_not_read_again(home):
    shelf = Shelf()
    [first], [second] = read(home, shelf), read(home, shelf)
    assert second is first
    change(home, "DELETE FROM trials WHERE purpose = 'report' AND seed = 1 AND arm = 'adamw'")
    [third] = read(home, shelf)
    assert (third.done, first.done) == (TOTAL - 1, TOTAL)


def test_a_comparison_in_flight_is_one_panel_with_its_number_of_trials(home):
    change(home, "DELETE FROM trials WHERE purpose = 'report' AND arm != 'adamw'")
    [compared] = read(home)
    missing = [t for t in compared.plans[0].known() if t.purpose == "report" and t.arm != "adamw"]
    with Store(home) as store:
        for trial in missing[:2]:
            assert store.claim_trial(trial) == "mine"
        [one, *_] = store.in_flight()
        assert compared.goes_on(one)
        assert not compared.goes_on(InFlight(**{**vars(one), "digest": "another"}))
        of = pages(home)
        [seen] = json.loads(of.answer("/progress.json").body)["runs"]
        assert (seen["name"], seen["where"]) == ("The comparison on line", "20 steps for each trial, cpu")
        assert (seen["done"], seen["failed"], seen["total"]) == (TOTAL - 4, 0, TOTAL)
        assert seen["href"] == f"{compared.record.slug}.html"
        said = sorted(f"{compared.arms[t.arm]} on line, seed {t.seed}" for t in missing[:2])
        assert sorted(seen["running"]) == said
        assert said[0].startswith("Adan (betas (0.9, 0.9, 0.99)) on")
        assert seen["latest"] == []  # of this process
        runs = text(of, "/runs.html")
        assert "The comparison on line is running 20 steps for each trial, cpu, for " in runs
        assert f"{TOTAL - 4} of {TOTAL} trials have ended. Running now: " in runs
        assert "line ● running 20 steps" in runs
        own = json.loads(of.answer(f"/progress.json?claim={compared.record.slug}").body)
        assert len(own["runs"]) == 1
        shown = text(of, f"/{compared.record.slug}.html")
        assert "Nothing runs it now" not in shown
        assert "The answer comes with the last trial" in shown
        assert "is running" in shown
        result = whole_result(compared)
        store.finish(missing[0], result, {})
        later = json.loads(of.answer(f"/progress.json?claim={compared.record.slug}").body)
        assert later["revision"] != own["revision"]
        [run] = later["runs"]
        assert (run["done"], [t["arm"] for t in run["latest"]]) == (TOTAL - 3, [compared.arms[missing[0].arm]])


def whole_result(compared: Compared) -> Any:
    return next(s.result for s in compared.plans[0].found.values() if s.result.purpose == "report")


def test_the_first_page_begins_with_the_latest_comparisons(home, whole, task, tmp_path):
    of, said = pages(home), main(pages(home).answer("/").body.decode())
    [compared] = read(home)
    assert f'<a href="{compared.record.slug}.html">line</a>' in said
    assert "20 steps for each trial" in said
    assert whole[1].answer in html.unescape(said)
    assert "All " not in said
    for seeds in (1, 3, 4):
        compare(task, ARMS, store=home, **{**GIVEN, "seeds": seeds, "trials": 1})
    said = text(of, "/")
    assert "All 4 comparisons" in said
    assert said.count("20 steps for each trial") == 3
    change(home, "DELETE FROM trials WHERE purpose = 'report' AND seed = 3")
    assert re.search(r"line 20 steps for each trial; \d+ of \d+ trials have ended", text(of, "/"))
    assert "Latest comparisons" not in text(pages(tmp_path / "none"), "/")


def test_of_several_tasks_and_of_samplers(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("one.py", "two.py"):
        write(folder, SAMPLING, name=name)
    home = tmp_path / "home"
    found = compare(folder, "ddim,heun", budget="8nfe", seeds=2, trials=1, store=home, progress=False)
    [compared] = read(home)
    assert compared.record.title == "one and two"
    assert compared.result.to_json() == found.to_json()
    found_trials = sum(len(t.result.trials) for t in found.tasks)
    of = pages(home)
    assert "Which helps on 2 tasks?" in text(of, f"/{compared.record.slug}.html")
    change(home, "DELETE FROM trials WHERE task = 'two' AND seed = 1")
    assert f"one and two 8 evaluations for each trial DDIM, Heun {found_trials - 2} of {found_trials} " in text(
        of, "/runs.html"
    )


def test_a_time_for_all_samplers_holds_the_drawings_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["polyak.lab.compare.main"], "carry_out", lambda *_, **__: None)
    monkeypatch.setattr(Record, "comparison", lambda self, plans: self)
    task = write(tmp_path, SAMPLING)
    asked = compare(
        task, "ddim,heun,dpmsolver:order=1..3", budget="97s", seeds=5, trials=4, store=tmp_path, progress=False
    )
    # Four tuning trials of each seed draw once, fifteen reported ones with 1/8, 1/4, 1/2 and all of the budget.
    assert asked.setup.budget.amount == pytest.approx(97 / (5 * 4 + 15 * 1.875), rel=0.02)
    single = compare(task, "ddim,euler", budget="1nfe", seeds=1, trials=1, store=tmp_path, progress=False)
    assert single.setup.budget.words == "1 evaluation for each trial"


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("part", ["complete", "so far"])
def test_in_a_browser(chromium, home, served: Callable[[Pages], Any], width, part):
    if part == "so far":
        change(home, "DELETE FROM trials WHERE purpose = 'report' AND seed = 1")
    [compared] = read(home)
    errors: list[str] = []
    page = chromium.new_page(viewport={"width": width, "height": 844})
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    of = served(pages(home))
    for target in ("", "runs.html"):
        page.goto(of.url + target)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    table = page.locator(".compared table").bounding_box()
    assert table["x"] + table["width"] <= width
    page.get_by_role("link", name="line").click()
    page.wait_for_url(f"**/{compared.record.slug}.html")
    assert page.locator("h1").inner_text() == "Which helps on line?"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".plots svg").count() == 4
    asked = "AdamW" if part == "complete" else f"{TOTAL - 3} of {TOTAL} trials have ended"
    assert asked in page.locator(".answer").inner_text()
    assert errors == []
    page.close()


@pytest.mark.browser
def test_a_budget_of_many_words_fits_a_phone(chromium, whole, tmp_path):
    [compared] = read(whole[0])
    compared.result  # noqa: B018 (made before the budget is another)
    setup = replace(compared.record.setup, budget=Budget("seconds", 3.0, total=60.0))
    row = {
        "of": compared,
        "setup": setup,
        "name": "a_task_with_a_long_name",
        "href": "",
        "running": True,
        "current": False,
    }
    file = tmp_path / "runs.html"
    page = chromium.new_page(viewport={"width": 390, "height": 844})
    for template, facts in {
        "runs.html": {"rows": []},
        "index.html": {"entries": [], "tiles": [], "counts": {}, "order": [], "total": 0, "linked": [], "more": 4},
    }.items():
        file.write_text(report.render(template, live=Live(), compared=[row], **facts), encoding="utf-8")
        page.goto(file.as_uri())
        assert "3 s for each trial (1 min 00 s for the whole comparison)" in page.locator("main").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, template
    page.close()
