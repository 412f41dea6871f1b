"""The documentation: every block of code in it runs. (``test_site.py`` is about the site that is made of it.)

A page says with a comment what its code finds there already, ``<!-- code: model, pipe -->`` (functions below); its blocks then
run in order in one namespace. Before a block that cannot run stands ``<!-- not run: why -->``.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import typer

from polyak import claims
from polyak.cli import main
from polyak.cli.app import app
from polyak.cli.compare import EXAMPLES
from polyak.lab import versions

ROOT = Path(__file__).parents[1]
LIMIT_S = 2000  # for one block: a block that hangs is told, a busy machine is not
NOT_RUN: dict[str, int] = {"docs/cluster.md": 1}  # page -> how many of its blocks are marked as not run


def _load_hooks() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = _load_hooks()


# -------------------------------------------------------------------------------------------------------------- the blocks


@dataclass
class Block:
    language: str
    code: str
    line: int
    not_run: str  # why, where it is marked so


_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n+)?^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_GIVEN = re.compile(r"<!-- code: ([\w, ]+) -->")


def blocks(text: str) -> list[Block]:
    found = [
        Block(
            language=m["language"].strip(),
            code=inspect.cleandoc("\n" + m["code"]) if m["indent"] else m["code"],
            line=text[: m.start("code")].count("\n") + 1,
            not_run=(m["why"] or "").strip(),
        )
        for m in _FENCE.finditer(text)
    ]
    assert len(re.findall(r"^ *```", text, flags=re.MULTILINE)) == 2 * len(found), "a fence is not closed"
    return found


def written() -> list[str]:
    """Every Markdown file that a person wrote and a user reads; a system's fragment is tested as a part of its page."""
    found = {str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")}
    found -= {f"docs/systems/{slug}.md" for slug in claims.slugs()}
    return sorted(found | {"README.md", "CONTRIBUTING.md", "bench/README.md"})


def made() -> list[str]:
    return [f"systems/{slug}.md" for slug in claims.slugs()]


def text_of(page: str) -> str:
    if page not in made():
        return (ROOT / page).read_text(encoding="utf-8")
    pytest.importorskip("griffe")
    return hooks.system_page(claims.load(Path(page).stem))


# ------------------------------------------------------------------------------------------------------- what code finds


def model() -> dict[str, Any]:
    """A model in training: batches, and the loss of the first."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    data = [(torch.randn(16, 4), torch.randn(16, 1)) for _ in range(3)]
    loss = torch.nn.functional.mse_loss(net(data[0][0]), data[0][1])
    return {"model": net, "batches": data, "loss": loss}


def network() -> dict[str, Any]:
    """A network that predicts the noise."""
    return {"network": lambda x, t: x * 0.5}


def pipe() -> dict[str, Any]:
    """A pipeline of diffusers, with a tokenizer that knows one sentence."""
    from .generate.generate_cases import stable_diffusion

    class Tokenizer:
        model_max_length = 8
        added_tokens_encoder: ClassVar[dict[str, int]] = {}

        def tokenize(self, prompt: str) -> list[str]:
            return prompt.split()

        def __call__(self, prompt: Any, **options: Any) -> Any:
            return types.SimpleNamespace(input_ids=torch.zeros(1, 8, dtype=torch.long), attention_mask=None)

    return {"pipe": stable_diffusion(tokenizer=Tokenizer())}


def checkpoints() -> dict[str, Any]:
    """A small generator, five of its checkpoints in a folder, and what a measure of its samples needs."""
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 4)
    Path("checkpoints").mkdir()
    for step in range(5):
        torch.save({k: v + 0.1 * torch.randn_like(v) for k, v in net.state_dict().items()}, f"checkpoints/{step}.pt")
    return {
        "model": net,
        "sampler": lambda model, n, generator: model(torch.randn(n // 20, 2, generator=generator)),  # to be quick
        "data": torch.randn(500, 4),
        "network": lambda x: x,
    }


TASK = """import torch
from torch import nn


def task(seed, device):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 3, generator=generator)
    y = x.sum(1, keepdim=True)
    model = nn.Linear(3, 1).to(device)
    loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    return {"model": model, "batches": [(x, y)], "loss": loss, "evaluate": lambda model: {"loss": loss(model, (x, y))}}
"""


def workers() -> dict[str, Any]:
    """A model, and connections to four other workers, which send what this one does."""
    from polyak.optim.monna import Peers

    class Five:
        rank, size = 0, 5

        def exchange(self, vector: torch.Tensor, patience: Any) -> list[torch.Tensor]:
            return [vector] * self.size

        def serve(self, vector: torch.Tensor, patience: Any, server: int, mix: Any) -> torch.Tensor:
            return mix(self.exchange(vector, patience))

    mock.patch.object(Peers, "connect", return_value=Five()).start()  # until the page has run
    return model()


def task_file() -> dict[str, Any]:
    """A task file of little work."""
    Path("task.py").write_text(TASK, encoding="utf-8")
    return {}


def example_task() -> dict[str, Any]:
    """What `polyak init-task optim` writes."""
    shutil.copy(EXAMPLES / "optim_task.py", "task.py")
    return {}


def engine() -> dict[str, Any]:
    """What an optimizer's file imports."""
    from polyak.core import checks
    from polyak.core.elementwise import axpy, sign
    from polyak.core.momentum import ema
    from polyak.optim._engine import RuleOptimizer

    return {"checks": checks, "axpy": axpy, "sign": sign, "ema": ema, "RuleOptimizer": RuleOptimizer}


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    f.__name__: f for f in (model, network, pipe, checkpoints, workers, task_file, example_task, engine)
}
IN_ROOM = {"optim": ("model",), "generate": ("network",)}  # what a claim's lines of use find, if its page says nothing


def given(page: str, text: str) -> dict[str, Any]:
    names = [name.strip() for found in _GIVEN.findall(text) for name in found.split(",")]
    if page in made() and not names:
        names = list(IN_ROOM.get(claims.load(Path(page).stem).room, ()))
    namespace: dict[str, Any] = {"__name__": "a_page"}
    for name in names:
        assert name in GIVEN, f"{page}: nothing is called {name!r}; there is {', '.join(GIVEN)}"
        namespace |= GIVEN[name]()
    return namespace


# --------------------------------------------------------------------------------------------------------------- running it


@contextmanager
def limit(seconds: float, what: str) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"{what} took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_page(page: str, shell: Callable[[str], None]) -> dict[str, Any]:
    """Run all blocks of a page; the namespace that is left."""
    text = text_of(page)
    found = blocks(text)
    try:
        namespace = given(page, text) if any(b.language == "python" for b in found) else {}
        _run_blocks(page, found, namespace, shell)
    finally:
        mock.patch.stopall()
    return namespace


def _run_blocks(page: str, found: list[Block], namespace: dict[str, Any], shell: Callable[[str], None]) -> None:
    for block in found:
        if block.not_run:
            continue
        where = f"{page}, line {block.line}"
        with limit(LIMIT_S, where):
            if block.language == "python":
                exec(compile(block.code, where, "exec"), namespace)  # in the order of the page
            elif block.language in ("", "sh", "bash", "console"):
                for command in commands(block.code):
                    shell(command)
            else:
                pytest.fail(f"{where}: a block of {block.language!r} is neither run nor marked as not run")


def commands(code: str) -> list[str]:
    """A shell block's commands. With prompts, what has none is output."""
    lines = code.replace("\\\n", " ").splitlines()
    prompted = [line[2:] for line in lines if line.startswith("$ ")]
    return [line.strip() for line in prompted or lines if line.strip() and not line.startswith("#")]


class Checked(BaseException):
    """A command's arguments are right: it would run now."""


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys) -> Callable[[str], None]:
    """Runs a command that only reads; checks all of another's arguments, up to where it would begin its work."""
    monkeypatch.setenv("POLYAK_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("webbrowser.open", lambda address: True)

    def begin(*_: Any, **__: Any) -> None:
        raise Checked

    monkeypatch.setattr(importlib.import_module("polyak.lab.run"), "run_many", begin)

    kind = versions.device_kind
    # A page may name a device that is not here.
    monkeypatch.setattr(versions, "device_kind", lambda device: device if device == "cuda" else kind(device))

    def polyak(arguments: list[str]) -> None:
        group: Any = typer.main.get_command(app)
        name, *rest = arguments
        assert name in group.commands, f"polyak has no command {name!r}"
        command = group.commands[name]
        with group.make_context("polyak", [name, "--help"], resilient_parsing=True) as context:
            command.make_context(name, list(rest), parent=context)
        if name in ("list", "show", "report"):
            with pytest.raises(SystemExit) as left:
                main(arguments)
            assert left.value.code in (0, None)
            assert capsys.readouterr().out
        elif name == "reproduce":
            with pytest.raises(Checked):
                main(arguments)
        elif name in ("record", "scoreboard"):  # these would write into this checkout
            assert [slug for slug in rest if not slug.startswith("-") and slug not in claims.slugs()] == []

    def run(line: str) -> None:
        program, *arguments = shlex.split(line, comments=True)
        if program == "polyak":
            polyak(arguments)
        elif program == "make":
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert set(arguments) <= set(targets)
        elif program == "pip":
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            assert arguments[0] == "install"
            for what in arguments[1:]:
                extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", what)
                assert extras, f"not this project: {what}"
                assert set((extras[1] or "lab").split(",")) <= set(project["optional-dependencies"])
        elif program == "python":
            script = ROOT / arguments[0]
            shown = subprocess.run(
                [sys.executable, script, "--help"], capture_output=True, text=True, env=environment()
            )
            assert shown.returncode == 0, shown.stderr
            assert set(re.findall(r"--[a-z-]+", line)) <= set(re.findall(r"--[a-z-]+", shown.stdout))
        else:
            pytest.fail(f"what is {line!r}?")

    return run


def environment() -> dict[str, str]:
    """Of a process that imports the polyak that this one has imported."""
    return {**os.environ, "PYTHONPATH": str(Path(claims.__file__).parents[2]), "NO_MKDOCS_2_WARNING": "1"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("page", [*written(), *made()])
def test_every_block_runs(page, shell, in_process):
    namespace = run_page(page, shell)
    assert sum(bool(b.not_run) for b in blocks(text_of(page))) == NOT_RUN.get(page, 0)
    if page == "CONTRIBUTING.md":
        its_example_is_lion(namespace["Lion"])


def its_example_is_lion(example: type) -> None:
    """The optimizer that the guide builds takes the same steps as the library's."""
    from polyak.optim import Lion

    ends = []
    for make in (
        lambda params: Lion(params, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1),
        lambda params: example(params, {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}),
    ):
        made = model()
        optimizer = make(made["model"].parameters())
        for inputs, targets in made["batches"]:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(made["model"](inputs), targets).backward()
            optimizer.step()
        ends.append(torch.nn.utils.parameters_to_vector(made["model"].parameters()))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_no_page_lost_its_code():
    """The pages that are there to show code have some."""
    least = {"README.md": 5, "CONTRIBUTING.md": 3, "docs/index.md": 2, "docs/quickstart.md": 6}
    rooms = {claims.load(slug).room for slug in claims.slugs()}
    for page, count in (least | {f"docs/rooms/{room}.md": 2 for room in rooms}).items():
        assert len(blocks(text_of(page))) >= count, page


def test_what_the_tests_do_not_understand_is_not_passed_over(shell, monkeypatch):
    monkeypatch.setitem(globals(), "text_of", lambda page: page)
    monkeypatch.setitem(globals(), "made", list)
    for text, error in {
        "```python\n1 / 0\n```": ZeroDivisionError,
        "```python\nmodel\n```": NameError,
        "```rust\nfn\n```": pytest.fail.Exception,
        "```sh\npolyak show nosuch\n```": (SystemExit, AssertionError),
        "```sh\npolyak reproduce adan --seed 3\n```": Exception,
        "```sh\npolyak reproduce adan --scale huge\n```": (SystemExit, AssertionError, pytest.fail.Exception),
        "```sh\nmake nothing\n```": AssertionError,
        "```sh\npip install '.[nothing]'\n```": AssertionError,
        "```\n$ curl it\noutput\n```": pytest.fail.Exception,
        "<!-- code: nothing -->\n```python\n1\n```": AssertionError,
    }.items():
        with pytest.raises(error):
            run_page(text, shell)
    run_page(
        "<!-- not run: it says why -->\n\n```rust\nfn\n```\n\n```python\nx = 1\n```\n\n```python\nx + 1\n```", shell
    )
    monkeypatch.setitem(globals(), "LIMIT_S", 0.05)
    with pytest.raises(TimeoutError):
        run_page("```python\nwhile True:\n    pass\n```", shell)


def test_the_ten_lines_are_a_task(tmp_path: Path) -> None:
    from polyak.lab.compare.examine import examine
    from polyak.lab.compare.rehearsal import try_arms

    [block, same] = [
        b for page in ("docs/compare.md", "README.md") for b in blocks(text_of(page)) if "def task(" in b.code
    ]
    assert block.code == same.code
    path = tmp_path / "ten_lines.py"
    path.write_text(block.code, encoding="utf-8")
    facts = examine(str(path), "cpu")
    assert not isinstance(facts, str), facts
    assert facts.better == {"mse": "lower"}
    assert not facts.warnings
    arm = {"class": "torch.optim:AdamW", "fixed": {}, "tuned": ["lr"], "lr": 1e-3}
    assert try_arms(str(path), "cpu", [("adamw", arm)]) is None
