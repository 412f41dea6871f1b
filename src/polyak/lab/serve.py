"""`polyak serve`: the store's claims, runs and live progress as pages of this machine alone, for reading.

The server is the standard library's ``ThreadingHTTPServer``. There is one reader, five addresses and nothing to write, so that
what a library would add (routing, an event loop, sessions, TLS) has no use here; and what matters on a loopback port is short
enough to be read below: no address is a path of the disk, requests under another host's name are refused (a page of the web
whose name is pointed at 127.0.0.1 learns nothing), only GET and HEAD are answered, and no page may load or run anything else.
Live pages poll one small JSON address: no connection stays open, so that Ctrl-C ends the server at once.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from polyak.lab import report, words
from polyak.lab import versions as facts
from polyak.lab.claim import Claim
from polyak.lab.compare.task import OWN
from polyak.lab.compared import Compared, budget_words, comparisons
from polyak.lab.report import Entry, Live
from polyak.lab.result import ClaimResult
from polyak.lab.store import COMPARISON, InFlight, Run, Store, StoreError
from polyak.lab.tuning import Plan

HOST = "127.0.0.1"
_BESIDE = {*OWN} - {
    "validation",
    "train_loss",
    "steps",
}  # what the lab measures of a comparison's trial beside the point
LATEST = 3  # ended trials that are shown of a run in flight
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
    """What a store holds: the runs of claims, and of comparisons, the latest last; and comparisons, the latest first."""

    runs: Sequence[Run] = ()
    compared_runs: Sequence[Run] = ()  # one for each state of an arm's code
    comparisons: Sequence[Compared] = ()


class Pages:
    """What the server says, from the store as it is at each request.

    Args:
        home: the store's folder, as for :class:`Store`. It need not exist, and is not made.
        claims: the catalogue.
        published: the verdict that came with polyak, by slug.
    """

    def __init__(
        self, home: Path | str | None, claims: Mapping[str, Claim], published: Callable[[str], ClaimResult | None]
    ) -> None:
        self.home, self.claims, self.published = home, claims, published
        self._versions: dict[str, dict[str, str]] = {}  # of the present code, by slug
        self._judged: dict[Place, tuple[list[Run], Plan]] = {}  # the runs that a plan was loaded from, and the plan
        self._results: dict[Place, ClaimResult] = {}
        self._listed: tuple[Any, Listed] | None = None  # the state of the store's files, and what it holds
        self._drawing = threading.Lock()  # matplotlib's settings are every thread's

    def check(self) -> None:
        """StoreError where there is a store that cannot be read."""
        store = Store.reader(self.home)
        if store is not None:
            store.close()

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
            return _message(HTTPStatus.SERVICE_UNAVAILABLE, "The store cannot be read", str(error))

    def _answer(self, store: Store | None, page: str, query: Mapping[str, str]) -> Answer:
        slug = query.get("claim", "") if page == "progress.json" else page.removesuffix(".html")
        claim = self.claims.get(slug) if page.endswith((".html", ".json")) else None
        if claim is None and page not in ("index.html", "runs.html", "progress.json"):
            return _message(HTTPStatus.NOT_FOUND, "Not found", "There is no such page here.")
        listed = self._list(store) if store else Listed()
        runs = listed.runs
        flying = store.in_flight() if store else []
        progress = self._progress(store, listed, flying, claim) if store else []
        live = Live(
            panel=report.render("panel.html", runs=progress),
            claim=claim.slug if claim else "",
            revision=_revision([*runs, *listed.compared_runs], progress, claim),
        )
        if page == "progress.json":
            data = {"revision": live.revision, "runs": progress, "panel": live.panel}
            return Answer(HTTPStatus.OK, JSON, json.dumps(data, allow_nan=False).encode())
        with self._drawing:
            if page == "runs.html":
                rows = [self._row(run, progress) for run in reversed(runs)]
                compared = [self._compared_row(c, flying) for c in listed.comparisons]
                text = report.render("runs.html", live=live, rows=rows, compared=compared)
            elif claim is None:
                entries = [self._entry(store, c, runs) for c in self.claims.values()]
                text = report.index_page(entries, linked=self.claims, live=live)
            else:
                text = self._claim_page(store, claim, runs, query, live)
        return Answer(HTTPStatus.OK, HTML, text.encode())

    def _list(self, store: Store) -> Listed:
        """What the store holds; read again only where its files have changed, since that reads all of a large table."""
        files = [store.path, store.path.with_name(f"{store.path.name}-wal")]
        stamps = [path.stat().st_mtime_ns for path in files if path.exists()]
        state = (len(stamps), max(stamps, default=0))
        if self._listed is None or self._listed[0] != state:
            runs = store.runs()
            compared = [r for r in runs if _is_compared(r)]
            listed = Listed(
                runs=[r for r in runs if not _is_compared(r)],
                compared_runs=compared,
                comparisons=comparisons(store.compared()) if compared else (),
            )
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
            so_far = _so_far(self._plan(store, claim, mine))
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

    def _compared_row(self, compared: Compared, flying: Sequence[InFlight]) -> dict[str, Any]:
        """A comparison in the list of runs. Of its code nobody here knows the present state; of the libraries one does."""
        present = facts.versions()
        return {
            "of": compared,
            "running": any(compared.goes_on(trial) for trial in flying),
            "current": all(present.get(name) == version for name, version in compared.versions.items()),
        }

    # -- results ---------------------------------------------------------------------------------------------------------

    def _entry(self, store: Store | None, claim: Claim, runs: Sequence[Run]) -> Entry:
        """A claim with its latest complete result of the present code among these runs, else as it was published."""
        mine = [run for run in runs if run.claim == claim.slug and self._current(run)]
        found = []
        for place in dict.fromkeys(map(_place, mine)):
            if store and (plan := self._plan(store, claim, [run for run in mine if _place(run) == place])).complete:
                if place not in self._results:
                    self._results[place] = plan.result()
                found.append(self._results[place])
        if found:
            return Entry(claim, max(found, key=lambda result: result.date))
        published = self.published(claim.slug)
        return Entry(claim, published, published=published is not None)

    def _plan(self, store: Store, claim: Claim, runs: Sequence[Run]) -> Plan:
        """What is stored where the latest of these runs was made: with all seeds that are complete, or those declared."""
        run = runs[-1]
        place, made_from = _place(run), [r for r in runs if _place(r) == _place(run)]
        if place in self._judged and self._judged[place][0] == made_from:
            return self._judged[place][1]
        declared = claim.scale(run.scale).seeds
        most = max(declared, *(store.seeds(r) for r in made_from))
        for seeds in range(most, declared - 1, -1):
            plan = self._empty_plan(claim, run, seeds)
            plan.load(store)
            if plan.complete or seeds == declared:
                self._judged[place] = made_from, plan
                self._results.pop(place, None)
                return plan
        raise AssertionError("the declared seeds are the last that are tried")

    def _empty_plan(self, claim: Claim, run: Run, seeds: int) -> Plan:
        return Plan(claim, scale=run.scale, seeds=seeds, device=run.device, versions=self._present(claim))

    def _present(self, claim: Claim) -> dict[str, str]:
        """The versions that the present code's results are stored under."""
        if claim.slug not in self._versions:
            self._versions[claim.slug] = {**facts.versions(), "fingerprint": facts.fingerprint(claim)}
        return self._versions[claim.slug]

    def _current(self, run: Run) -> bool:
        """Whether a run is of the present code and libraries, and of a claim and scale that there are."""
        claim = self.claims.get(run.claim)
        if claim is None or run.scale not in [s.name for s in claim.scales]:
            return False
        present = self._present(claim)
        return all(run.versions.get(name) == version for name, version in present.items() if name != "polyak")

    # -- progress --------------------------------------------------------------------------------------------------------

    def _progress(
        self, store: Store, listed: Listed, flying: Sequence[InFlight], claim: Claim | None
    ) -> list[dict[str, Any]]:
        """The runs in flight (of one claim, if one is named): what a page shows of each."""
        trials: dict[Any, list[InFlight]] = {}
        for trial in flying:
            if claim is None or trial.claim == claim.slug:
                # Of a comparison every arm has a fingerprint of its own.
                key = trial.owner if _is_compared(trial) else str(sorted(trial.versions.items()))
                trials.setdefault((_place(trial), key), []).append(trial)
        return [
            self._comparison_in_flight(store, listed, group)
            if _is_compared(group[0])
            else self._run_in_flight(store, listed.runs, group)
            for group in trials.values()
        ]

    def _comparison_in_flight(self, store: Store, listed: Listed, trials: Sequence[InFlight]) -> dict[str, Any]:
        """What one command has run of a comparison. How many trials it plans is not stored."""
        first, now = trials[0], time.time()
        compared = next((c for c in listed.comparisons if c.goes_on(first)), None)
        ended = [t for t in compared.trials if t.owner == first.owner] if compared else []
        done = sum(t.state == "done" for t in ended)
        return {
            "claim": first.claim,
            "name": f"The comparison on {first.claim.removeprefix(COMPARISON)}",
            "href": "",
            "scale": first.scale,
            "device": first.device,
            "where": f"{budget_words(first.scale)}, {first.device}",
            "done": done,
            "failed": len(ended) - done,
            "total": None,
            "running": [trial.label for trial in trials],
            "elapsed": max(0.0, now - first.since),
            "latest": [_ended(None, stored, now) for stored in store.latest(first, LATEST)],
        }

    def _run_in_flight(self, store: Store, runs: Sequence[Run], trials: Sequence[InFlight]) -> dict[str, Any]:
        first = trials[0]
        known = {"claim": first.claim, "scale": first.scale, "device": first.device, "versions": first.versions}
        none_yet = Run(**known, done=0, failed=0, seconds=0.0, finished="")
        run = next((r for r in runs if _place(r) == _place(first) and r.versions == first.versions), none_yet)
        claim = self.claims.get(run.claim)
        total = None
        if claim is not None and self._current(run):
            total = self._empty_plan(claim, run, max(claim.scale(run.scale).seeds, store.seeds(run))).total
        now = time.time()
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
            "running": [trial.label for trial in trials],
            "elapsed": max(0.0, now - first.since),
            "latest": [_ended(claim, stored, now) for stored in store.latest(run, LATEST)],
        }


def _ended(claim: Claim | None, stored: Any, now: float) -> dict[str, Any]:
    """A trial that has ended: what it was, what it measured (with units), how long ago."""
    trial = stored.result
    arms = {arm.name: arm.label for arm in claim.arms} if claim else {}
    tasks = {task.name: task.label for task in claim.tasks} if claim else {}
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


def _so_far(plan: Plan) -> ClaimResult:
    """The trials of a run that has not ended, for its curves; nothing is judged."""
    stored = list(plan.found.values())
    return ClaimResult(
        slug=plan.claim.slug,
        scale=plan.scale,
        device=plan.device,
        verdict="undecided",
        criteria=(),
        trials=tuple(s.result for s in stored),
        chosen={},
        seeds=plan.seeds,
        tuning_seeds=(),
        date=max((s.finished for s in stored), default=""),
        seconds=sum(s.result.seconds for s in stored),
        versions=plan.versions,
        machine={},
    )


def _is_compared(of: Run | InFlight) -> bool:
    return of.claim.startswith(COMPARISON)  # no slug does


def _place(of: Run | InFlight) -> Place:
    return of.claim, of.scale, of.device


def _revision(runs: Sequence[Run], progress: Sequence[Mapping[str, Any]], claim: Claim | None) -> str:
    """Changes when a page has something new to show beside its panel: on a claim's page with each trial, else with each run."""
    flying = {(p["claim"], p["scale"], p["device"]) for p in progress}
    mine = [run for run in runs if claim is None or run.claim == claim.slug]
    shown = [(*_place(r), *((r.done, r.failed) if claim or _place(r) not in flying else ())) for r in mine]
    return report.digest(json.dumps([sorted(flying), shown]))


def _message(status: HTTPStatus, title: str, text: str) -> Answer:
    return Answer(status, HTML, report.render("message.html", live=Live(), title=title, text=text).encode())


# -- over HTTP -------------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Pages at 127.0.0.1. Port 0 takes one that is free; ``with`` gives it back."""

    daemon_threads = True  # an answer under way keeps nothing from ending
    allow_reuse_address = os.name != "nt"  # where it lets another program take the port

    def __init__(self, pages: Pages, port: int = 0) -> None:
        self.pages = pages
        super().__init__((HOST, port), _Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's looks up the machine's name, which may take long
        self.server_name, self.server_port = HOST, self.server_address[1]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "polyak", ""
    timeout = 30

    def do_GET(self) -> None:
        if self._is_asked_for_here():
            try:
                answer = self.server.pages.answer(self.path)
            except Exception:
                traceback.print_exc()
                text = "This is an error of polyak; its traceback is where the server was started."
                answer = _message(HTTPStatus.INTERNAL_SERVER_ERROR, "Something went wrong", text)
            self._send(answer)

    do_HEAD = do_GET

    def _refuse(self) -> None:
        self.close_connection = True  # a body may follow, which nobody reads
        if self._is_asked_for_here():
            self._send(Answer(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"only GET and HEAD\n"), Allow="GET, HEAD")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def _is_asked_for_here(self) -> bool:
        """Whether the request names this server; else it is refused (a name of the web may be made to point here)."""
        port = self.server.server_port
        names = [f"{HOST}:{port}", f"localhost:{port}", *([HOST, "localhost"] if port == 80 else [])]
        if (self.headers.get_all("Host") or [""]) in [[name] for name in names]:
            return True
        self.close_connection = True
        self._send(Answer(HTTPStatus.FORBIDDEN, "text/plain", f"ask for {self.server.url}\n".encode()))
        return False

    def _send(self, answer: Answer, **headers: str) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def end_headers(self) -> None:
        for name, value in {
            "Content-Security-Policy": report.served_policy(),
            "Cache-Control": "no-store",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is not a log."""


def serve(pages: Pages, *, port: int = 0, ready: Callable[[str], None]) -> None:
    """Serve pages until KeyboardInterrupt. ``ready`` is told the address once it can be opened.

    Raises:
        OSError: the port is taken.
        StoreError: there is a store, and it cannot be read.
    """
    pages.check()
    with Server(pages, port) as server:
        try:
            ready(server.url)
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            pass
