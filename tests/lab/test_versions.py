"""The fingerprint: what of the source decides results, found without importing it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import claims_for_tests as examples
import pytest
import torch_claim_for_tests as torch_example

from polyak.lab import versions

# A house like ours, under another name: two systems in a room, what they share, and a claim for each.
HOUSE = {
    "manor/__init__.py": "",
    "manor/core/__init__.py": "",
    "manor/core/means.py": "import numpy as np\ndef mean(x):\n    return np.mean(x)\n",
    "manor/core/unused.py": "x = 1\n",
    "manor/room/__init__.py": "from manor.room.adan import Adan\nLAZY = {'Lion': 'lion'}\n",
    "manor/room/_shared.py": "from ..core import means\n",
    "manor/room/adan.py": "from ._shared import means\nclass Adan:\n    '''A docstring.'''\n    x = 1\n",
    "manor/room/lion.py": "from manor.room._shared import means\nclass Lion:\n    x = 1\n",
    "manor/room/big/__init__.py": "from .inner import Big\n",
    "manor/room/big/inner.py": "class Big:\n    x = 1\n",
    "manor/claims/__init__.py": "",
    "manor/claims/adan.py": "def trial(t):\n    from manor.room import Adan\n    yield Adan\n",
    "manor/claims/both.py": "def trial(t):\n    from manor.room import Adan, Lion\n    yield Adan, Lion\n",
    "manor/claims/big.py": "def trial(t):\n    yield 1\n",
    "manor/claims/data.py": "from polyak.lab import claim, data\ndef trial(t):\n    yield 1\n",
}
PROBE = """
import importlib, json, sys
from polyak.lab import versions
sys.path.insert(0, sys.argv[2])
import claims_for_tests
sys.path.insert(0, sys.argv[1])
found = {}
for name, part in json.loads(sys.argv[3]).items():
    module = importlib.import_module("manor.claims." + name)
    claim = claims_for_tests.make(trial=module.trial, part=part)
    found[name] = [versions.fingerprint(claim), versions.libraries(claim), sorted(versions._closure(claim))]
print(json.dumps({"found": found, "imported": sorted(sys.modules)}))
"""
CLAIMS = {
    "adan": "manor.room.adan:Adan",
    "both": "manor.room.lion:Lion",
    "big": "manor.room.big:Big",
    "data": "manor.room.lion:Lion",
}
Probe = Callable[..., dict]


@pytest.fixture
def probe(tmp_path: Path) -> Probe:
    """Writes the house with some files changed, and looks at it from a process of its own."""
    for name, text in HOUSE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def look(**changes: str) -> dict:
        for name, text in HOUSE.items():
            (tmp_path / name).write_text(changes.get(name, text))
        command = [sys.executable, "-B", "-c", PROBE, str(tmp_path), str(Path(__file__).parent), json.dumps(CLAIMS)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    return look


def test_a_claim_stands_on_its_part_and_what_that_imports(probe: Probe) -> None:
    seen = probe()
    closures = {name: closure for name, (_, _, closure) in seen["found"].items()}
    assert closures["adan"] == ["manor.claims.adan", "manor.core.means", "manor.room._shared", "manor.room.adan"]
    assert "manor.room.lion" in closures["both"], "a name is found where the package only refers to it"
    assert closures["big"] == ["manor.claims.big", "manor.room.big.__init__", "manor.room.big.inner"]
    assert "polyak.lab.data" in closures["data"]
    assert "polyak.lab.claim" not in closures["data"]
    assert seen["found"]["adan"][1] == ["numpy"]
    assert not {"manor.room", "manor.room.adan", "numpy", "torch"} & set(seen["imported"])


def test_editing_one_system_leaves_the_others_results_alone(probe: Probe) -> None:
    def changed(name: str, text: str) -> set[str]:
        before, after = probe()["found"], probe(**{name: text})["found"]
        return {claim for claim in CLAIMS if before[claim][0] != after[claim][0]}

    adan = HOUSE["manor/room/adan.py"]
    assert changed("manor/room/adan.py", adan.replace("x = 1", "x = 2")) == {"adan", "both"}
    assert changed("manor/room/lion.py", HOUSE["manor/room/lion.py"].replace("x = 1", "x = 2")) == {"both", "data"}
    assert changed("manor/core/means.py", "def mean(x):\n    return 0\n") == {"adan", "both", "data"}
    assert changed("manor/room/big/inner.py", "class Big:\n    x = 2\n") == {"big"}
    assert changed("manor/claims/adan.py", "def trial(t):\n    from manor.room import Adan\n    yield 2\n") == {"adan"}
    assert changed("manor/core/unused.py", "x = 2\n") == set()
    assert changed("manor/room/__init__.py", HOUSE["manor/room/__init__.py"] + "more = 1\n") == set()
    assert changed("manor/room/adan.py", adan.replace("A docstring.", "Another.") + "\n# a comment\n") == set()


def test_a_part_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"claim 'parabola': there is no source file of module 'polyak.optim.absent'"):
        versions.fingerprint(examples.make(part="polyak.optim.absent:Absent"))


def test_further_sources_count() -> None:
    alone = versions.fingerprint(examples.make())
    assert versions.fingerprint(examples.make(sources=("polyak.core.momentum",))) != alone
    assert versions.fingerprint(examples.make("another name")) == alone


def test_checks_of_arguments_count_only_where_they_are_named() -> None:
    from polyak import claims

    for slug in ("lion", "dpm_solver"):
        closure = versions._closure(claims.load(slug))
        assert any(name.startswith("polyak.core.") for name in closure)
        assert not any(name.startswith("polyak.core.checks") for name in closure)
    assert versions.fingerprint(examples.make(sources=("polyak.core.checks.kinds",))) != versions.fingerprint(
        examples.make()
    )


def test_libraries_that_workers_load_first() -> None:
    assert versions.libraries(examples.make()) == ()
    assert versions.libraries(torch_example.make()) == ("torch",)


def test_versions_and_machine_name_no_host() -> None:
    import platform

    assert set(versions.versions()) == {"python", "torch", "numpy", "polyak"}
    machine = versions.machine()
    assert set(machine) == {"system", "processor", "cores", "accelerator"}
    assert machine["accelerator"] == "none"
    assert int(machine["cores"]) >= 1
    assert platform.node() not in machine.values()


def test_devices() -> None:
    assert versions.device_kind("cpu") == "cpu"
    with pytest.raises(ValueError, match="got 'cuda:99'"):
        versions.device_kind("cuda:99")
    with pytest.raises(ValueError, match="must be 'cpu', 'cuda' or 'cuda:N', got 'gpu'"):
        versions.device_kind("gpu")


def test_an_accelerator_goes_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the device {device}")
    assert versions.device_kind("cuda:1") == "the device cuda:1"
    assert versions.machine("cuda")["accelerator"] == "the device cuda"
    with pytest.raises(ValueError, match="got 'cuda:2'; it sees 2 CUDA devices"):
        versions.device_kind("cuda:2")


def test_the_lab_is_light() -> None:
    code = """
import sys
import polyak.lab, polyak.lab.claim, polyak.lab.result, polyak.lab.store, polyak.lab.run, polyak.lab.data
from polyak.lab import Store, run, run_many, collect
import polyak.lab.run
assert callable(polyak.lab.run) and polyak.lab.run is run, polyak.lab.run
print(sorted({"torch", "numpy", "scipy", "matplotlib", "optuna", "sklearn"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout == "[]\n"


def test_the_lab_s_names() -> None:
    import polyak.lab

    assert set(polyak.lab.__all__) <= set(dir(polyak.lab))
    for name in polyak.lab.__all__:
        assert getattr(polyak.lab, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = polyak.lab.absent


FOLDER = {
    "task.py": "import mine\nimport torch\ndef task(seed, device):\n    from net import Net\n    import late\n",
    "mine.py": "from deeper import x\n",
    "deeper.py": "x = 1\n",
    "late.py": "from bare.inner import x\nimport barer.inner\n",
    "bare/inner.py": "x = 1\n",
    "barer/inner.py": "x = 1\n",
    "net/__init__.py": "from .layers import Net\n",
    "net/layers.py": "class Net:\n    pass\n",
    "opt.py": "import deeper\nclass Opt:\n    pass\n",
    "unused.py": "x = 1\n",
    ".venv/torch/__init__.py": "x = 1\n",
}


@pytest.mark.parametrize("changed", list(FOLDER))
def test_what_is_beside_a_task_or_an_arm_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    for name, text in FOLDER.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        # What another test has imported by this name would be found in its place.
        monkeypatch.delitem(sys.modules, name.partition("/")[0].removesuffix(".py"), raising=False)
    monkeypatch.syspath_prepend(tmp_path)

    def digests() -> tuple[str, str]:
        return versions.code_of_file(tmp_path / "task.py"), versions.code_of("opt:Opt")

    task, arm = digests()
    (tmp_path / changed).write_text(FOLDER[changed] + "y = 2\n")
    of_task = ("task.py", "mine.py", "deeper.py", "late.py", "net/layers.py", "bare/inner.py", "barer/inner.py")
    assert (digests()[0] != task) == (changed in of_task)
    assert (digests()[1] != arm) == (changed in ("opt.py", "deeper.py"))


def install(folder: Path, package: str, version: str, module: str) -> None:
    """As pip does: what there was of it goes."""
    for old in folder.glob(f"{package}-*.dist-info"):
        shutil.rmtree(old)
    facts = folder / f"{package}-{version}.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Name: {package}\nVersion: {version}\n")
    (facts / "top_level.txt").write_text(f"{module}\n")
    (folder / f"{module}.py").write_text("x = 1\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages, which with PyTorch and NumPy are all that are installed: to look through hundreds takes seconds."""
    (folder := tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(folder)
    look, known = metadata.distributions, [metadata.distribution(name) for name in ("torch", "numpy")]
    monkeypatch.setattr(metadata, "distributions", lambda: [*look(path=[str(folder)]), *known])
    return folder


USERS = {
    "task.py": "import torch, json, numpy as np\nimport beside\ndef task(seed, device):\n    from lens_m.glass import x\n",
    "beside.py": "try:\n    import prism_m\nexcept ImportError:\n    pass\nfrom polyak.core import checks\n",
    "own.py": "import torch\nimport mirror_m\nfrom lens_m import x\nclass Opt:\n    pass\n",
}


@pytest.mark.parametrize(
    ("package", "of_task", "of_arm"),
    [("lens", True, True), ("prism", True, False), ("mirror", False, True), ("idle", False, False)],
)
def test_the_versions_of_what_a_task_and_an_arm_import_count(
    tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch, package: str, of_task: bool, of_arm: bool
) -> None:
    (folder := tmp_path / "mine").mkdir()
    for name, text in USERS.items():
        (folder / name).write_text(text)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    for name in ("lens", "prism", "mirror", "idle"):
        install(site, name, "1.0", f"{name}_m")
    monkeypatch.syspath_prepend(folder)

    def codes() -> tuple[str, str]:
        return versions.code_of_file(folder / "task.py"), versions.code_of("own:Opt")

    task, arm = codes()
    assert (task.split(", ")[1:], arm.split(", ")[1:]) == (["lens 1.0", "prism 1.0"], ["lens 1.0", "mirror 1.0"])
    install(site, package, "1.1", f"{package}_m")
    assert ((codes()[0] != task), (codes()[1] != arm)) == (of_task, of_arm)
    install(site, package, "1.0", f"{package}_m")
    assert codes() == (task, arm)


def test_what_polyak_imports_is_no_version_of_the_tasks(tmp_path: Path) -> None:
    """Its own code counts, and what it needs is no more in the task's hands than PyTorch."""
    path = tmp_path / "of_polyak.py"
    path.write_text("import torch\nfrom polyak.generate.adapters.diffusers import PolyakScheduler\n")
    assert "diffusers" in {
        top for p in versions._follow([("task", path)], {"polyak"}).values() for top in versions._read(p).tops
    }
    assert ", " not in versions.code_of_file(path)
    for name in ("trial", "sampling", "task", "generators"):
        assert ", " not in versions.code_of_file(Path(versions.__file__).parent / "compare" / f"{name}.py")


def test_packages_are_looked_through_once(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes half a second; but what is installed in the meantime, in a notebook, is seen."""
    looked, look = [], metadata.packages_distributions
    monkeypatch.setattr(metadata, "packages_distributions", lambda: looked.append(0) or look())
    path = tmp_path / "uses.py"
    path.write_text("import later_m\n")
    assert ", " not in versions.code_of_file(path)
    before = versions.code_of_file(path)
    versions.code_of("polyak.optim:Adan")
    assert len(looked) == 1
    install(site, "later", "1.0", "later_m")
    os.utime(site, ns=(0, 1))  # clocks of file systems are coarse
    assert versions.code_of_file(path) == f"{before}, later 1.0"
    assert len(looked) == 2


@pytest.mark.parametrize("edited", [True, False])
def test_a_package_that_is_installed_to_be_edited_has_code(
    tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch, edited: bool
) -> None:
    """Its version stays the same while one works on it."""
    name = f"own_lab_{edited}".lower()
    facts = site / f"{name}-1.0.dist-info"
    for folder in (facts, site / name):
        folder.mkdir()
    (facts / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
    (facts / "top_level.txt").write_text(f"{name}\n")
    (facts / "direct_url.json").write_text(json.dumps({"url": "file:///own", "dir_info": {"editable": edited}}))
    source = site / name / "__init__.py"
    source.write_text("class Opt:\n    x = 1\n")
    before = versions.code_of(f"{name}:Opt")
    source.write_text("class Opt:\n    x = 2\n")
    assert (versions.code_of(f"{name}:Opt") != before) == edited
    assert edited or before == f"{name} 1.0"


CODE = """
from polyak.claims._pictures import one as pictures
def trial(t, *, a=1):
    \"\"\"Says.\"\"\"
    return f"{t}{''}" + f"{a!r:>{t}}"
CLAIM = Claim(slug="one", summary="A.", departures=("B.",), picture=pictures.picture, errata=(), says="C.", usage="D.", metrics=M)
"""


def test_words_for_people_change_no_fingerprint(tmp_path: Path) -> None:
    def digest(code: str) -> str:
        (tmp_path / "one.py").write_text(code)
        return versions._parse.__wrapped__(tmp_path / "one.py", 0, 0).digest

    whole = digest(CODE)
    for word in ("A.", "B.", "C.", "D.", "Says."):
        assert digest(CODE.replace(word, "Other.")) == whole, word
    assert digest(CODE.replace("pictures.picture,", "pictures.other,")) == whole
    for counts in ("a=1", '"one"', "metrics=M", "{t}{", ":>{t}"):
        assert (
            digest(CODE.replace(counts, counts.replace("=", "=not ").replace("one", "two").replace("{t}", "{a}")))
            != whole
        )
    assert digest(CODE) == "8b25079c8061e3f8d10fa4e2b7413c3816d0e2a662799bed4e9b5f691811da9b", (
        "the same by every version of Python"
    )


def test_pictures_decide_no_result() -> None:
    claim = replace(examples.make(), sources=("polyak.claims._pictures.lion", "polyak.core.schedules"))
    closure = versions._closure(claim)
    assert "polyak.core.schedules" in closure
    assert not [name for name in closure if "_pictures" in name]
