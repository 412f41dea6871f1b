"""What a result depends on beside the claim's numbers: library versions, the machine, and the code that was run.

The fingerprint is taken from source files alone, so that asking for it imports no part (and with it no torch).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import platform
import re
import sys
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from polyak import __version__
from polyak.lab.claim import Claim

# The lab carries trials out and judges them; of it only the data decides what a trial yields. Pictures decide nothing.
_LAB, _LAB_DATA = "polyak.lab", "polyak.lab.data"
_PICTURES = "polyak.claims._pictures"
_CHECKS = "polyak.core.checks"
# What a claim says in words, for people: no trial reads it.
_WORDS = frozenset(("summary", "says", "paper", "departures", "errata", "picture", "usage"))
# Their versions are stored in any case, or their code counts.
_KNOWN = frozenset(("torch", "numpy", "polyak"))


def versions() -> dict[str, str]:
    """The versions that results depend on: python, torch, numpy, polyak. Imports none of them."""
    installed = {name: metadata.version(name) for name in ("torch", "numpy")}
    return {"python": platform.python_version(), **installed, "polyak": __version__}


def cores() -> int:
    """How many cores this process may use: affinity and container limits count."""
    import joblib

    return joblib.cpu_count()


def device_kind(device: str) -> str:
    """What results and timings are stored under: "cpu", or the accelerator's name.

    Raises:
        ValueError: the device is not "cpu", "cuda" or "cuda:N", or there is no such device here.
    """
    if device == "cpu":
        return device
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(device.partition(":")[2] or 0) >= there:
        raise ValueError(f"device must be one that torch sees, got {device!r}; it sees {there} CUDA devices")
    return torch.cuda.get_device_name(device)


def times(count: int, kind: str) -> str:
    """What trials of several processes are stored under: "2 × cpu"."""
    return kind if count == 1 else f"{count} × {kind}"


def apart(device: str) -> tuple[int, str]:
    """The inverse of :func:`times`: how many processes, on a device of which kind."""
    count, _, kind = device.rpartition(" × ")
    return int(count or 1), kind


def machine(device: str = "cpu") -> dict[str, str]:
    """The machine in words, without host's or user's name; ``device`` is the one that is used."""
    kind = device_kind(device)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(cores()),
        "accelerator": "none" if kind == "cpu" else kind,
    }


def kind_of(machine: Mapping[str, str]) -> str:
    """The :func:`device_kind` that was used on a :func:`machine`."""
    used = machine["accelerator"]
    return "cpu" if used == "none" else used


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def fingerprint(claim: Claim) -> str:
    """A digest of the code that decides the claim's results.

    It covers the modules of the trial function and of the part, ``claim.sources``, and all modules that these import from
    polyak (or from the package that they are in), directly or not. Where a package is named, all of its files count; where a
    name is taken from a package, only the file that defines it does, so that a room's list of re-exports ties no system to
    another. The lab does not count, except for its data, nor do the checks of arguments (``polyak.core.checks``), which refuse
    and compute nothing: a new kind of argument would make all systems' results old. Comments, docstrings, layout, the claim's
    words for people and its picture change nothing, nor does the version of Python that reads the files.
    """
    return _digest(_closure(claim))


def _digest(closure: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(closure.items()):
        digest.update(f"{name} {_read(path).digest}\n".encode())
    return digest.hexdigest()[:16]


def code_of_file(path: Path) -> str:
    """A digest of a file that is no module of a package, and of what it imports from polyak and from beside itself.

    What is beside it is found where its folder is on ``sys.path``. The versions of installed packages that it and the files beside
    it import follow.
    """
    return _with_packages(_follow([(path.stem, path)], _Near({"polyak"}, path.parent)))


def code_of(target: str) -> str:
    """What decides the behaviour of ``module:Name``: the version of the package that brings it, else a digest of its code.

    Its code is the module's, and that of what it imports from its package or from beside itself; the versions of other installed
    packages that these import follow. A package that is installed to be edited has code, too. PyTorch's needs none: its version is
    stored in any case.
    """
    module, _, name = target.partition(":")
    top = module.partition(".")[0]
    if top == "torch":
        return ""
    brought = _packages().get(top)
    if top != "polyak" and brought and not _is_edited(brought[0]):
        return f"{brought[0]} {metadata.version(brought[0])}"
    source = _locate(top)
    # Of a module that is in no package what is beside it counts.
    folder = source.parent if source is not None and source.name != "__init__.py" else None
    return _with_packages(_follow(_taken(module, name), _Near({top}, folder)))


def _with_packages(closure: Mapping[str, Path]) -> str:
    """A digest of files, and the versions of the installed packages that those import which are not polyak's own."""
    own = [path for name, path in closure.items() if name.partition(".")[0] != "polyak"]
    tops = {top for path in own for top in _read(path).tops} - _KNOWN - sys.stdlib_module_names
    brought = sorted({package for top in tops for package in _packages().get(top, ())} - _KNOWN)
    return ", ".join([_digest(closure), *(f"{package} {metadata.version(package)}" for package in brought)])


def _packages() -> Mapping[str, list[str]]:
    """The installed packages that bring a top-level module, by its name."""
    return _looked_up(tuple((folder, _changed(folder)) for folder in sys.path))


@lru_cache(maxsize=1)
def _looked_up(_folders: tuple[tuple[str, int], ...]) -> Mapping[str, list[str]]:
    """Read anew, half a second for 200 packages, only where something was installed or removed since."""
    found = metadata.packages_distributions()
    return {top: [name for name in dict.fromkeys(names) if name] for top, names in found.items()}


def _changed(folder: str) -> int:
    try:
        return Path(folder).stat().st_mtime_ns
    except OSError:
        return 0


def _is_edited(package: str) -> bool:
    """Whether an installed package is its source folder (``pip install -e``), whose code changes and whose version stays."""
    said = json.loads(metadata.distribution(package).read_text("direct_url.json") or "{}")
    return bool(said.get("dir_info", {}).get("editable"))


class _Near:
    """Top-level names whose code counts: those given, and those of what is found in a folder."""

    def __init__(self, names: Collection[str], folder: Path | None) -> None:
        self._names, self._folder = names, folder

    def __contains__(self, top: object) -> bool:
        if top in self._names or self._folder is None:
            return top in self._names
        if _namespace(str(top)) == [self._folder.resolve() / str(top)]:
            return True
        own = (self._folder / f"{top}.py", self._folder / str(top) / "__init__.py")
        found = _locate(str(top)) if any(path.exists() for path in own) else None
        return found is not None and found.resolve() in [path.resolve() for path in own]


def libraries(claim: Claim) -> tuple[str, ...]:
    """Which of numpy and torch the claim's code uses."""
    used = {top for path in _closure(claim).values() for top in _read(path).tops}
    return tuple(name for name in ("numpy", "torch") if name in used)


@dataclass(frozen=True)
class _Source:
    """What a source file says: a digest of its code, what it imports ("a.b" or "a.b" + names), what it defines."""

    digest: str
    imports: tuple[tuple[int, str, tuple[tuple[str, str], ...]], ...]  # level, module, (name, name here)
    defines: frozenset[str]

    @property
    def tops(self) -> set[str]:
        return {module.partition(".")[0] for level, module, _ in self.imports if not level}


def _closure(claim: Claim) -> dict[str, Path]:
    """Module -> file, of all modules that decide the claim's results."""
    start = [claim.trial.__module__, claim.part.partition(":")[0], *claim.sources]
    tops = {"polyak", *(name.partition(".")[0] for name in start)}
    return _follow([pair for name in start for pair in _files(name, must=f"claim {claim.slug!r}")], tops)


def _follow(waiting: list[tuple[str, Path]], tops: Container[str]) -> dict[str, Path]:
    """Module -> file, of these and all that they import from the packages ``tops``."""
    found: dict[str, Path] = {}
    while waiting:
        name, path = waiting.pop()
        own = name == _LAB_DATA or not _within(name, _LAB)
        if own and not _within(name, _PICTURES) and name not in found:
            found[name] = path
            waiting += _imported(name, path, tops)
    return found


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _imported(name: str, path: Path, tops: Container[str]) -> list[tuple[str, Path]]:
    """The modules that a file's imports lead to."""
    found: list[tuple[str, Path]] = []
    for level, module, names in _read(path).imports:
        source = _absolute(name, path, level, module)
        if source.partition(".")[0] not in tops or _within(source, _CHECKS):
            continue
        if not names and source != "polyak":
            # "import polyak" alone names the house, not all that is in it. "import a.b" runs a, too, and may use all of it.
            whole = source if source.startswith("polyak.") else source.partition(".")[0]
            found += _files(whole) or _files(source)  # a folder without an __init__.py is run by no import
        for taken, _ in names:
            found += _taken(source, taken)
    return [(name, path) for name, path in found if not _within(name, _CHECKS)]


def _taken(module: str, name: str) -> list[tuple[str, Path]]:
    """The files that ``from module import name`` leads to."""
    if submodule := _files(f"{module}.{name}"):
        return submodule
    path = _locate(module)
    if path is None or path.name != "__init__.py" or name == "*":
        return _files(module)
    for level, source, names in _read(path).imports:
        for taken, here in names:
            if here == name:
                return _taken(_absolute(module, path, level, source), taken)
    beside = [
        (f"{module}.{file.stem}", file)
        for file in sorted(path.parent.glob("*.py"))
        if file != path and name in _read(file).defines
    ]
    return beside or [(module, path)]


def _files(module: str, *, must: str = "") -> list[tuple[str, Path]]:
    """A module's file, or all files of a package; none where there is no such module, unless it must be there."""
    path = _locate(module)
    if path is None:
        if must:
            raise ValueError(f"{must}: there is no source file of module {module!r}")
        return []
    if path.name != "__init__.py":
        return [(module, path)]
    files = sorted(path.parent.rglob("*.py"))
    return [(".".join([module, *file.relative_to(path.parent).with_suffix("").parts]), file) for file in files]


def _locate(module: str) -> Path | None:
    """A module's source file, found without importing it or the packages it is in."""
    top, _, rest = module.partition(".")
    if top == "__main__":
        origin = getattr(sys.modules[top], "__file__", None)
        return Path(origin) if origin and not rest else None
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        base = Path(folder, *rest.split("."))
        for path in (base.with_name(base.name + ".py"), base / "__init__.py"):
            if path.exists():
                return path
    return None


def _namespace(top: str) -> list[Path]:
    """Where a package without an ``__init__.py`` is; nowhere if there is no such package."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return []
    if spec is None or spec.origin or not spec.submodule_search_locations:
        return []
    return [Path(folder).resolve() for folder in spec.submodule_search_locations]


def _absolute(name: str, path: Path, level: int, module: str) -> str:
    """The module that an import of file ``name`` refers to; ``level`` counts its leading dots."""
    if not level:
        return module
    package = name.removesuffix(".__init__").split(".")
    if path.name == "__init__.py":
        level -= 1
    return ".".join([*package[: len(package) - level], *([module] if module else [])])


def _read(path: Path) -> _Source:
    stat = path.stat()
    return _parse(path, stat.st_mtime_ns, stat.st_size)


@cache
def _parse(path: Path, _changed: int, _size: int) -> _Source:
    tree = ast.parse(path.read_bytes(), filename=str(path))
    imports: list[tuple[int, str, tuple[tuple[str, str], ...]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [(0, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = tuple((alias.name, alias.asname or alias.name) for alias in node.names)
            imports.append((node.level, node.module or "", names))
        elif isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            node.body[0] = ast.Expr(ast.Constant(""))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Claim":
            node.keywords = [word for word in node.keywords if word.arg not in _WORDS]
    code = hashlib.sha256(_plainly(tree).encode()).hexdigest()
    return _Source(code, tuple(imports), frozenset(_defined(tree)))


def _plainly(node: Any) -> str:
    """A syntax tree in text, the same by every version of Python: empty fields, which later versions added, are left out."""
    if isinstance(node, ast.AST):
        if isinstance(node, ast.JoinedStr):  # Python 3.12 ends some f-strings with an empty constant
            node.values = [v for v in node.values if not (isinstance(v, ast.Constant) and v.value == "")]
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return f"{type(node).__name__}({', '.join(f'{name}={_plainly(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{', '.join(map(_plainly, node))}]"
    return repr(node)


def _defined(tree: ast.Module) -> Iterable[str]:
    """The names that a module defines itself, at its top level."""
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
