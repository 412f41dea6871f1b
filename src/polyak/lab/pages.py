"""The pages of ``polyak serve``: a store's claims, comparisons, runs and live progress, made at each request."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from polyak.lab import kept, pictures, report, words
from polyak.lab import versions as facts
from polyak.lab.claim import Claim
from polyak.lab.compare import page as comparison_page
from polyak.lab.compare.task import OWN
from polyak.lab.compared import Compared, Shelf
from polyak.lab.report import Entry, Live
from polyak.lab.result import ClaimResult
from polyak.lab.store import COMPARISON, InFlight, Run, Store, Stored, StoreError
from polyak.lab.tuning import Plan

# What the lab measures of a comparison's trial beside the point.
_BESIDE = {*OWN} - {"validation", "train_loss", "steps"}
LATEST = 3  # ended trials that are shown of a run in flight, and comparisons on the first page
HTML, JSON = "text/html; charset=utf-8", "application/json"
Place = tuple[str, str, str]  # claim, scale, device kind


@dataclass(frozen=True)
class Answer:
    """What is sent: a status, a media type, and the body."""

    status: HTTPStatus
    kind: str
    body: bytes


@dataclass(frozen=True)
class Listed:
    """What a store holds: the runs of claims, the latest last; and comparisons, the latest first."""

    runs: Sequence[Run] = ()
    comparisons: Sequence[Compared] = ()


class Pages:
    """What the server says, from the store as it is at each request.

    Args:
        home: the store's folder, as for :class:`Store`. It need not exist, and is not made.
        claims: the catalogue.
        published: the verdicts that came with polyak, by scale, of a slug.
    """

    def __init__(
        self,
        home: Path | str | None,
        claims: Mapping[str, Claim],
        published: Callable[[str], Mapping[str, ClaimResult]],
    ) -> None:
        self.home, self.claims, self.published = home, claims, published
        self._fingerprints: dict[str, str] = {}  # of the present code, by slug
        self._judged: dict[kept.Made, tuple[list[Run], Plan]] = {}  # the runs that a plan was loaded from, and the plan
        self._results: dict[kept.Made, ClaimResult] = {}
        self._listed: tuple[Any, Listed] | None = None  # the state of the store's files, and what it holds
        self._shelf, self._reading = Shelf(), threading.Lock()
        self._drawing = threading.Lock()  # matplotlib's settings are every thread's

    def check(self) -> None:
        """StoreError where there is a store that cannot be read."""
        store = Store.reader(self.home)
        if store is not None:
            store.close()

    def draw_pictures(self) -> None:
        """Draw the pictures that are not drawn yet, one by one; pages show those that are there."""
        for claim in self.claims.values():
            with self._drawing:
                pictures.drawn(claim)

    def answer(self, target: str) -> Answer:
        """The answer to a request for an address, such as ``/adan.html?scale=small``."""
        parts = urlsplit(target)
        page, query = unquote(parts.path).removeprefix("/") or "index.html", dict(parse_qsl(parts.query))
        try:
            store = Store.reader(self.home)
            try:
                return self._answer(store, page, query)
            finally:
                if store is not None:
                    store.close()
        except StoreError as error:
            return message(HTTPStatus.SERVICE_UNAVAILABLE, "The store cannot be read", str(error))

    def _answer(self, store: Store | None, page: str, query: Mapping[str, str]) -> Answer:
        slug = query.get("claim", "") if page == "progress.json" else page.removesuffix(".html")
        claim = self.claims.get(slug) if page.endswith((".html", ".json")) else None
        listed = self._list(store) if store else Listed()
        compared = next((c for c in listed.comparisons if c.record.slug == slug), None)
        if not (claim or compared or page in ("index.html", "gallery.html", "runs.html", "progress.json")):
            return message(HTTPStatus.NOT_FOUND, "Not found", "There is no such page here.")
        runs = listed.runs
        only = slug if claim or compared else ""
        flying = store.in_flight() if store else []
        progress = self._progress(store, listed, flying, only) if store else []
        live = Live(
            panel=report.render("panel.html", runs=progress),
            claim=only,
            revision=_revision(listed, progress, only),
        )
        if page == "progress.json":
            data = {"revision": live.revision, "runs": progress, "panel": live.panel}
            return Answer(HTTPStatus.OK, JSON, json.dumps(data, allow_nan=False).encode())
        with self._drawing:
            if compared:
                text = _comparison_page(compared, live, running=bool(progress))
            elif page == "runs.html":
                rows = [self._row(run, progress) for run in reversed(runs)]
                comparisons = [_compared_row(c, progress) for c in listed.comparisons]
                text = report.render("runs.html", live=live, rows=rows, compared=comparisons)
            elif page == "gallery.html":
                entries = [Entry(c, None) for c in self.claims.values()]
                text = report.gallery_page(entries, linked=self.claims, live=live)
            elif claim is None:
                entries = [self._entry(store, c, runs) for c in self.claims.values()]
                latest = [_compared_row(c, progress) for c in listed.comparisons[:LATEST]]
                text = report.index_page(
                    entries, linked=self.claims, live=live, compared=latest, comparisons=len(listed.comparisons)
                )
            else:
                text = self._claim_page(store, claim, runs, query, live)
        return Answer(HTTPStatus.OK, HTML, text.encode())

    def _list(self, store: Store) -> Listed:
        """What the store holds; read again only where its files have changed, since that reads all of a large table."""
        files = [store.path, store.path.with_name(f"{store.path.name}-wal")]
        stamps = [path.stat().st_mtime_ns for path in files if path.exists()]
        state = (len(stamps), max(stamps, default=0))
        if self._listed is None or self._listed[0] != state:
            runs = [run for run in store.runs() if not run.claim.startswith(COMPARISON)]  # no slug does
            with self._reading:
                listed = Listed(runs=runs, comparisons=self._shelf.read(store))
            # Within a second of a change another may follow that a coarse clock cannot tell from it.
            self._listed = (state, listed) if time.time_ns() - state[1] > 1e9 else None
            return listed
        return self._listed[1]

    def _claim_page(
        self, store: Store | None, claim: Claim, runs: Sequence[Run], query: Mapping[str, str], live: Live
    ) -> str:
        asked = [
            run
            for run in runs
            if query.get("scale", run.scale) == run.scale and query.get("device", run.device) == run.device
        ]
        entry, so_far = self._entry(store, claim, asked), None
        mine = [run for run in asked if run.claim == claim.slug and self._current(run)]
        if store and mine and (entry.result is None or entry.published):
            so_far = self._plan(store, claim, mine).so_far()
        return report.claim_page(entry, so_far=so_far, live=live)

    def _row(self, run: Run, progress: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A run in the list of them."""
        claim, current = self.claims.get(run.claim), self._current(run)
        place = urlencode({"scale": run.scale, "device": run.device})
        return {
            "run": run,
            "name": claim.name if claim else run.claim,
            "href": f"{quote(run.claim)}.html?{place}" if current else "",
            "current": current,
            "running": any(_place(run) == (p["claim"], p["scale"], p["device"]) for p in progress) and current,
        }

    # -- results ---------------------------------------------------------------------------------------------------------

    def _entry(self, store: Store | None, claim: Claim, runs: Sequence[Run]) -> Entry:
        """A claim with its latest complete result of the present code among these runs, else as it was published; and, beside
        it, those of other scales."""
        mine = [run for run in runs if run.claim == claim.slug and self._current(run)]
        found = []
        for made in dict.fromkeys(map(kept.made, mine)):
            if store and (plan := self._plan(store, claim, [run for run in mine if kept.made(run) == made])).complete:
                if made not in self._results:
                    self._results[made] = plan.result()
                found.append(self._results[made])
        found.sort(key=lambda result: result.date)
        return report.entry(claim, found, self.published(claim.slug), scale=found[-1].scale if found else None)

    def _plan(self, store: Store, claim: Claim, runs: Sequence[Run]) -> Plan:
        """What is stored of the experiment that the latest of these runs is of."""
        made = kept.made(runs[-1])
        made_from = [run for run in runs if kept.made(run) == made]
        if made not in self._judged or self._judged[made][0] != made_from:
            self._judged[made] = made_from, kept.loaded(claim, store, made_from)
            self._results.pop(made, None)
        return self._judged[made][1]

    def _current(self, run: Run) -> bool:
        """Whether a run is of the present code, and of a claim and scale that there are."""
        claim = self.claims.get(run.claim)
        if claim is None:
            return False
        if claim.slug not in self._fingerprints:
            self._fingerprints[claim.slug] = facts.fingerprint(claim)
        return kept.is_current(claim, run, self._fingerprints[claim.slug])

    # -- progress --------------------------------------------------------------------------------------------------------

    def _progress(self, store: Store, listed: Listed, flying: Sequence[InFlight], only: str) -> list[dict[str, Any]]:
        """The runs in flight (of one claim or comparison, if one is named): what a page shows of each."""
        runs: dict[Any, list[InFlight]] = {}
        for trial in flying:
            if not trial.claim.startswith(COMPARISON) and only in ("", trial.claim):
                runs.setdefault((_place(trial), str(sorted(trial.versions.items()))), []).append(trial)
        compared: dict[str, tuple[Compared, list[InFlight]]] = {}
        for trial in flying:
            # A trial may be of several, of which the latest is the one that runs it.
            of = next((c for c in listed.comparisons if not c.complete and c.goes_on(trial)), None)
            if of and only in ("", of.record.slug):
                compared.setdefault(of.record.slug, (of, []))[1].append(trial)
        return [
            *(self._run_in_flight(store, listed.runs, group) for group in runs.values()),
            *(_comparison_in_flight(store, of, group) for of, group in compared.values()),
        ]

    def _run_in_flight(self, store: Store, runs: Sequence[Run], trials: Sequence[InFlight]) -> dict[str, Any]:
        first = trials[0]
        known = {"claim": first.claim, "scale": first.scale, "device": first.device, "versions": first.versions}
        none_yet = Run(**known, done=0, failed=0, seconds=0.0, finished="")
        run = next((r for r in runs if _place(r) == _place(first) and r.versions == first.versions), none_yet)
        claim = self.claims.get(run.claim)
        total = None
        if claim is not None and self._current(run):
            total = kept.empty(claim, run, max(claim.scale(run.scale).seeds, store.seeds(run))).total
        now, (arms, tasks) = time.time(), _labels(claim)
        return {
            "claim": run.claim,
            "name": claim.name if claim else run.claim,
            "href": f"{quote(run.claim)}.html" if claim else "",
            "scale": run.scale,
            "device": run.device,
            "where": f"scale {run.scale}, {run.device}",
            "done": run.done,
            "failed": run.failed,
            "total": total,
            "running": [trial.label(arms, tasks) for trial in trials],
            "elapsed": max(0.0, now - first.since),
            "latest": [_ended(claim, stored, now, arms, tasks) for stored in store.latest(run, LATEST)],
        }


def _labels(claim: Claim | None) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """What arms and tasks are called, by name."""
    if claim is None:
        return {}, {}
    return {arm.name: arm.label for arm in claim.arms}, {task.name: task.label for task in claim.tasks}


def _ended(
    claim: Claim | None, stored: Stored, now: float, arms: Mapping[str, str], tasks: Mapping[str, str]
) -> dict[str, Any]:
    """A trial that has ended: what it was, what it measured (with units), how long ago."""
    trial = stored.result
    metrics = {metric.name: metric for metric in claim.metrics} if claim else {}
    values = []
    for name, value in trial.values.items():
        if claim is None and name in _BESIDE:
            continue
        metric = metrics.get(name)
        unit = f" {metric.unit}" if metric and metric.unit else ""
        values.append((metric.label if metric else name.replace("_", " "), words.number(value) + unit))
    return {
        "arm": arms.get(trial.arm, trial.arm),
        "task": tasks.get(trial.task, trial.task),
        "what": f"seed {trial.seed}" if trial.purpose == "report" else f"tuning, {words.options(trial.point)}",
        "values": values,
        "diverged": trial.diverged,
        "seconds": trial.seconds,
        "ago": max(0.0, now - datetime.fromisoformat(stored.finished).timestamp()),
    }


def _comparison_page(compared: Compared, live: Live, *, running: bool) -> str:
    if compared.complete:
        return comparison_page.page(compared.result, live=live, command=compared.record.command)
    return comparison_page.so_far(
        compared.result,
        live=live,
        command=compared.record.command,
        done=compared.done,
        failed=compared.failed,
        total=compared.total,
        running=running,
    )


def _compared_row(compared: Compared, progress: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A comparison in the list of runs. Of its code nobody here knows the present state; of the libraries one does."""
    present, setup = facts.versions(), compared.record.setup
    return {
        "of": compared,
        "setup": setup,
        "name": compared.record.title,
        "href": f"{compared.record.slug}.html",
        "running": any(compared.record.slug == p["claim"] for p in progress),
        "current": all(present.get(n) == version for n, version in setup.versions.items() if n != "polyak"),
    }


def _comparison_in_flight(store: Store, compared: Compared, trials: Sequence[InFlight]) -> dict[str, Any]:
    """What a page shows of a comparison that is run."""
    first, now, setup = trials[0], time.time(), compared.record.setup
    return {
        "claim": compared.record.slug,
        "name": f"The comparison on {compared.record.title}",
        "href": f"{compared.record.slug}.html",
        "scale": first.scale,
        "device": first.device,
        "where": f"{setup.budget.words}, {first.device}",
        "done": compared.done,
        "failed": compared.failed,
        "total": compared.total,
        "running": [trial.label(compared.arms, {}) for trial in trials],
        "elapsed": max(0.0, now - first.since),
        "latest": [_ended(None, stored, now, compared.arms, {}) for stored in store.latest(first, LATEST)],
    }


def _place(of: Run | InFlight) -> Place:
    return of.claim, of.scale, of.device


def _revision(listed: Listed, progress: Sequence[Mapping[str, Any]], only: str) -> str:
    """Changes when a page has something new to show beside its panel: on the page of one with each trial, else with each run."""
    flying = {(p["claim"], p["scale"], p["device"]) for p in progress}
    shown = [
        (*_place(r), *((r.done, r.failed) if only or _place(r) not in flying else ()))
        for r in listed.runs
        if only in ("", r.claim)
    ]
    running = {p["claim"] for p in progress}
    compared = [
        (c.record.slug, c.asked, *((c.done, c.failed) if only or c.record.slug not in running else ()))
        for c in listed.comparisons
        if only in ("", c.record.slug)
    ]
    return report.digest(json.dumps([sorted(flying), shown, compared]))


def message(status: HTTPStatus, title: str, text: str) -> Answer:
    return Answer(status, HTML, report.render("message.html", live=Live(), title=title, text=text).encode())
