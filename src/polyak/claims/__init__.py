"""The catalogue of claims: one module for each system, found by walking this package. Nothing is registered by hand.

A room is a folder here, a system a module in it (or a folder, if it needs more than one file); modules whose name starts with
``_`` are what systems of a room share. Claims are light, so that listing them imports neither torch nor matplotlib.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

from polyak.core.checks import suggestion
from polyak.lab.claim import Claim, Kind
from polyak.lab.result import ClaimResult


def _modules() -> dict[str, str]:
    """Slug -> module, by room and slug."""
    rooms = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg and not m.name.startswith("_"))
    found: dict[str, str] = {}
    for room in rooms:
        name = f"{__name__}.{room}"
        systems = pkgutil.iter_modules(importlib.import_module(name).__path__)
        for slug in sorted(m.name for m in systems if not m.name.startswith("_")):
            if slug in found:
                raise ValueError(f"two claims share the slug {slug!r}: {found[slug]} and {name}.{slug}")
            found[slug] = f"{name}.{slug}"
    return found


def slugs() -> list[str]:
    """Every system's slug, by room."""
    return list(_modules())


def load(slug: str) -> Claim:
    """The claim of one system. LookupError, with a near name, where there is none."""
    modules = _modules()
    if slug not in modules:
        raise LookupError(f"there is no system {slug!r}{suggestion(slug, modules)} (`polyak list` shows all)")
    return importlib.import_module(modules[slug]).CLAIM


def catalogue() -> dict[str, Claim]:
    """Slug -> claim, for every system."""
    return {slug: importlib.import_module(module).CLAIM for slug, module in _modules().items()}


def verdict_path(slug: str, scale: str = "small") -> Path:
    """Where a system's published verdict at a scale is kept: ``<slug>.<scale>.verdict.json`` in its room."""
    module = _modules()[slug]
    room = importlib.import_module(module.rpartition(".")[0])
    return Path(next(iter(room.__path__))) / f"{slug}.{scale}.verdict.json"


def published(slug: str, scale: str = "small") -> ClaimResult | None:
    """The verdict at a scale that came with this version of polyak (without trials), if there is one."""
    path = verdict_path(slug, scale)
    if not path.exists():
        return None
    kinds: dict[str, Kind] = {c.name: c.kind for c in load(slug).criteria}
    return ClaimResult.from_json(json.loads(path.read_text(encoding="utf-8")), kinds=kinds)


def published_at(slug: str) -> dict[str, ClaimResult]:
    """The published verdicts by scale, in the order of the claim's scales."""
    found = {scale.name: published(slug, scale.name) for scale in load(slug).scales}
    return {scale: result for scale, result in found.items() if result is not None}
