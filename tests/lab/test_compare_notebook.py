"""A comparison in a real notebook: its bar, its result, its figure, and what a notebook cannot do."""

from __future__ import annotations

from typing import Any

import pytest

from .tasks_for_tests import REGRESSION

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("ipywidgets")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("notebook")]  # one worker runs it, once

CELLS = [
    "%%writefile task.py\n" + REGRESSION,
    """from polyak.lab import compare
arms = ["adamw:lr=0.01:weight_decay=0", "sgd:lr=0.01:weight_decay=0"]
options = dict(budget="10steps", seeds=2, points=2, jobs=1, store="home")
result = compare("task.py", arms, **options)""",
    "result",
    'result.figure("curves")',
    "compare(lambda seed, device: {}, arms, **options)",
    "class Mine: pass\ncompare('task.py', ['adamw', Mine], **options)",
]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Any]]:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS])
    for cell in notebook.cells[4:]:
        cell.metadata.tags = ["raises-exception"]
    folder = tmp_path_factory.mktemp("notebook")
    client = nbclient.NotebookClient(
        notebook, timeout=None, startup_timeout=3000, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return notebook, [cell.outputs for cell in notebook.cells]


def test_the_bar_is_one_widget_that_ends_full(cells: tuple[Any, list[Any]]) -> None:
    notebook, outputs = cells
    [shown] = outputs[1]
    assert "application/vnd.jupyter.widget-view+json" in shown.data
    states = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    [bar] = [s["state"] for s in states if s["model_name"] == "FloatProgressModel"]
    assert (bar["value"], bar["max"]) == (4, 4)


def test_the_result_shows_itself(cells: tuple[Any, list[Any]]) -> None:
    [shown] = cells[1][2]
    assert "<table" in shown.data["text/html"]
    assert "2 seeds cannot decide anything" in shown.data["text/html"]
    assert len(shown.data["text/plain"]) < 2000
    [figure] = cells[1][3]
    assert {"image/svg+xml", "image/png"} & figure.data.keys()


def test_what_a_notebook_alone_has_is_refused_with_a_way_out(cells: tuple[Any, list[Any]]) -> None:
    for cell, says in ((4, "%%writefile task.py"), (5, "%%writefile mine.py")):
        [error] = [output for output in cells[1][cell] if output.output_type == "error"]
        assert says in error.evalue
