"""`polyak serve`: what it answers, what it refuses, what it shows of a run in another process, how it ends."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import claims_for_tests as examples
import pytest

from polyak.lab import Store, StoreError, run
from polyak.lab.database import FILE
from polyak.lab.pages import Pages
from polyak.lab.serve import Server, serve

from .test_run import drive, until

SLOW = {"seeds": 3, "sleep": 0.05}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a complete run."""
    home = tmp_path_factory.mktemp("full")
    with Store(home) as store:
        run(examples.make(), store=store, jobs=2)
    return home


def make_pages(home: Path) -> Pages:
    claims = {c.slug: c for c in (examples.make(), examples.slow(**SLOW), examples.make("idle"))}
    return Pages(home, claims, lambda slug: {})


@pytest.fixture
def paused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Runs in other processes wait with their fourth trial until this is called."""
    monkeypatch.setenv("POLYAK_TEST_JOURNAL", str(tmp_path / "journal"))
    monkeypatch.setenv("POLYAK_TEST_HANGS_AFTER", "3")
    return (tmp_path / "go").touch


@pytest.fixture
def serving(served: Callable[[Pages], Server]) -> Callable[[Path], Server]:
    """Starts servers of stores, and ends them."""
    return lambda home: served(make_pages(home))


def ask(server: Server, target: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=3000)
    connection.request(method, target, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer, text


def plain(page: str) -> str:
    body = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def content(home: Path) -> dict[str, bytes]:
    """All files of a store, but those by which SQLite's readers and writers know of each other."""
    files = {str(p): p.read_bytes() for p in sorted(home.rglob("*")) if p.is_file() and not p.name.endswith("-shm")}
    return {name: data for name, data in files.items() if data or not name.endswith("-wal")}


# ------------------------------------------------------------------------------------------------------------------ the pages


def test_pages_of_a_complete_run(full, serving):
    server, before = serving(full), content(full)
    answer, index = ask(server, "/")
    assert answer.status == 200
    assert "Effect: 1 ✓ holds 2 – not run" in plain(index)
    assert index.count('href="parabola.html"') == 1
    _, page = ask(server, "/parabola.html")
    assert "Effect: ✓ holds, 1 of 1 at scale small, on 5 seeds" in plain(page)
    assert page.count('class="strip"') == 2
    assert "So far" not in page
    _, runs = ask(server, "/runs.html")
    assert 'href="parabola.html?scale=small&amp;device=cpu"' in runs
    assert "the present code" in plain(runs)
    assert re.search(r"Parabola small cpu 40 0 ", plain(runs))
    _, named = ask(server, "/parabola.html?scale=small&device=cpu")
    assert "Effect: ✓ holds" in plain(named)
    _, other = ask(server, "/parabola.html?scale=paper")
    assert "– Not run" in plain(other)
    assert content(full) == before


def test_a_run_with_more_seeds_than_declared_is_shown_with_all_that_are_complete(tmp_path):
    with Store(tmp_path) as store:
        run(examples.make(), store=store, jobs=2, seeds=7)
        pages = make_pages(tmp_path)
        assert "on 7 seeds" in plain(pages.answer("/parabola.html").body.decode())
        store._db.execute("DELETE FROM trials WHERE seed = 6 AND arm = 'plain'")
    assert "on 6 seeds" in plain(pages.answer("/parabola.html").body.decode())


def test_a_run_of_other_code_is_listed_and_no_verdict(full, tmp_path):
    shutil.copytree(full, tmp_path / "home")
    database = sqlite3.connect(tmp_path / "home" / FILE)
    with database:
        database.execute("UPDATE trials SET versions = json_set(versions, '$.fingerprint', 'other')")
    database.close()
    pages = make_pages(tmp_path / "home")
    runs = pages.answer("/runs.html").body.decode()
    assert "other code or versions" in plain(runs)
    assert "parabola.html" not in runs
    assert "Effect: 3 – not run" in plain(pages.answer("/").body.decode())


def test_a_store_that_does_not_exist_is_shown_as_empty_and_not_made(tmp_path, serving):
    server = serving(tmp_path / "none")
    assert "3 systems. Mechanism: 3 – not run Effect: 3 – not run" in plain(ask(server, "/")[1])
    assert "The store is empty" in plain(ask(server, "/runs.html")[1])
    assert json.loads(ask(server, "/progress.json")[1])["runs"] == []
    assert list(tmp_path.iterdir()) == []
    with Store(tmp_path / "none") as store:  # and is seen once it is there
        run(examples.make(), store=store, jobs=2)
    assert "1 ✓ holds" in plain(ask(server, "/")[1])


def test_a_store_of_a_newer_polyak_gives_one_message(full, tmp_path, serving):
    shutil.copytree(full, tmp_path / "home")
    server = serving(tmp_path / "home")
    database = sqlite3.connect(tmp_path / "home" / FILE)
    database.execute("PRAGMA user_version = 99")
    database.close()
    for target in ("/", "/parabola.html", "/progress.json"):
        answer, page = ask(server, target)
        assert answer.status == 503
        assert "was written by a newer polyak (schema 99, this one knows 1): update polyak" in plain(page)
    with pytest.raises(StoreError, match="newer polyak"):
        serve(make_pages(tmp_path / "home"), ready=lambda url: pytest.fail("it must not start"))


# ------------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_nothing_but_reading_is_answered(full, serving, method):
    answer, _ = ask(serving(full), "/", method)
    assert answer.status == 405
    assert answer.headers["Allow"] == "GET, HEAD"


def test_head_is_get_without_its_body(full, serving):
    server = serving(full)
    got, text = ask(server, "/runs.html")
    head, nothing = ask(server, "/runs.html", "HEAD")
    assert (head.status, nothing) == (200, "")
    assert head.headers["Content-Length"] == got.headers["Content-Length"] == str(len(text.encode()))


def test_only_its_own_name_is_answered(full, serving):
    server = serving(full)
    port = server.server_port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        assert ask(server, "/", Host=host)[0].status == 200
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1",
        f"127.0.0.1:{port}.evil.example",
        f"127.0.0.1:{port + 1}",
        "",
    ):
        for method in ("GET", "HEAD", "POST"):
            answer, text = ask(server, "/", method, Host=host)
            assert answer.status == 403
            assert "systems" not in text
    with socket.create_connection(("127.0.0.1", port), timeout=3000) as raw:  # two names, or none
        raw.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nHost: evil.example\r\n\r\n".encode())
        assert raw.makefile("rb").readline().split()[1] == b"403"
    with socket.create_connection(("127.0.0.1", port), timeout=3000) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert raw.makefile("rb").readline().split()[1] == b"403"


def test_it_listens_on_loopback_alone(full, serving):
    assert serving(full).server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "target",
    ["/../../etc/passwd", "/..%2f..%2fetc%2fpasswd", "//etc/passwd", f"/{FILE}", "/polyak.lock", "/%00", "/style.css",
     "/parabola", "/nothing.html", "/templates/base.html", "/parabola.json", "/<script>alert(1)</script>.html"],
)  # fmt: skip
def test_no_address_is_a_file(full, serving, target):
    answer, text = ask(serving(full), target)
    assert answer.status == 404
    assert "root:" not in text
    assert "alert" not in text


def test_headers_forbid_all_but_the_pages_own(full, serving):
    server = serving(full)
    for target, method in (
        ("/", "GET"),
        ("/parabola.html", "GET"),
        ("/none", "GET"),
        ("/", "POST"),
        ("/progress.json", "GET"),
    ):
        answer, text = ask(server, target, method)
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "frame-ancestors 'none'" in policy
        assert "'unsafe-inline'" not in re.search(r"script-src ([^;]*);", policy)[1]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert not re.search(r"https?://(?!arxiv)", text)


def test_an_error_of_ours_is_told_without_its_details(full, serving, monkeypatch, capsys):
    server = serving(full)
    monkeypatch.setattr(server.pages, "published", lambda slug: 1 / 0)
    answer, text = ask(server, "/")
    assert answer.status == 500
    assert "ZeroDivisionError" not in text
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert ask(server, "/runs.html")[0].status == 200


# ------------------------------------------------------------------------------------------------------------ a run under way


def test_a_run_in_another_process_is_seen_from_its_first_trial_to_its_verdict(tmp_path, serving, paused):
    home = tmp_path / "home"
    server = serving(home)

    def progress(query: str = "") -> dict[str, Any]:
        return json.loads(ask(server, f"/progress.json{query}")[1])

    nothing = progress()
    assert nothing["runs"] == []
    other = drive(home, "slow", jobs=1, **SLOW)
    began = time.monotonic()
    try:
        until(lambda: progress()["runs"])
        news = progress()
        [seen] = news["runs"]
        assert news["revision"] != nothing["revision"]
        assert {k: seen[k] for k in ("claim", "name", "scale", "device", "total", "failed")} == {
            "claim": "slow", "name": "Slow", "scale": "small", "device": "cpu", "total": 6, "failed": 0,
        }  # fmt: skip
        assert re.fullmatch(r"(Plain|Quick) on Parabola, seed \d", seen["running"][0])
        assert 0 <= seen["elapsed"] <= time.monotonic() - began + 1
        until(lambda: any(r["done"] == 3 for r in progress()["runs"]))
        [seen] = progress("?claim=slow")["runs"]
        latest = seen["latest"][0]
        assert latest["arm"] in ("Plain", "Quick")
        assert (latest["task"], latest["what"][:5]) == ("Parabola", "seed ")
        assert dict(latest["values"])["loss"]
        assert latest["seconds"] >= SLOW["sleep"]
        assert progress("?claim=idle")["runs"] == []
        page = plain(ask(server, "/slow.html")[1])
        assert "Slow is running" in page
        assert re.search(r"So far 3 trials of the run at scale small on cpu have ended", page)
        assert "● running" in plain(ask(server, "/runs.html")[1])
        paused()
        assert other.wait() == 0
    finally:
        other.kill()
        other.communicate()
    assert progress()["runs"] == []
    assert "Effect: ✓ holds, 1 of 1 at scale small, on 3 seeds" in plain(ask(server, "/slow.html")[1])


def test_a_killed_run_is_in_flight_no_more(tmp_path, serving):
    server = serving(tmp_path)
    other = drive(tmp_path, "slow", jobs=1, seeds=3, sleep=6000.0)
    try:
        until(lambda: json.loads(ask(server, "/progress.json")[1])["runs"])
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    before = content(tmp_path)
    until(lambda: not json.loads(ask(server, "/progress.json")[1])["runs"])
    assert content(tmp_path) == before  # its marks are for the next run to clear away


def test_trials_that_could_not_run_are_told(tmp_path):
    with Store(tmp_path) as store:
        from polyak.lab import TrialError

        with pytest.raises(TrialError):
            run(examples.bad("raise"), store=store, jobs=1)
    pages = Pages(tmp_path, {"bad": examples.bad("raise")}, lambda slug: {})
    assert re.search(r"Bad small cpu \d 1 ", plain(pages.answer("/runs.html").body.decode()))


def test_the_reader_cannot_write(full):
    store = Store.reader(full)
    assert store is not None
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        store._db.execute("DELETE FROM trials")
    store.close()
    assert Store.reader(full / "none") is None


# ------------------------------------------------------------------------------------------------------------- the command


def start(home: Path, *options: str) -> subprocess.Popen[str]:
    """`polyak serve` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from polyak.cli import main; main()", "serve", "--home", str(home), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_and_frees_its_port(tmp_path, number):
    server = start(tmp_path)
    assert server.stdout is not None
    port = int(re.fullmatch(r"Serving http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends it\)\n", server.stdout.readline())[1])
    with socket.create_connection(("127.0.0.1", port), timeout=3000):  # one that is still open
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3000)
        connection.request("GET", "/runs.html")  # the index would draw pictures first
        assert connection.getresponse().status == 200
        server.send_signal(number)
        _, errors = server.communicate()
    assert (server.returncode, errors) == (0, "")
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
        again.listen()
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_and_a_store_that_cannot_be_read_are_one_message_each(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = start(tmp_path, "--port", str(port))
        _, errors = server.communicate()
    assert server.returncode == 3
    assert errors.startswith(f"polyak: port {port} cannot be used")
    (tmp_path / FILE).write_text("no database at all, but longer than a header of one would have to be " * 3)
    server = start(tmp_path)
    _, errors = server.communicate()
    assert server.returncode == 3
    assert errors.count("\n") == 1
    assert "damaged or no database" in errors
    server = start(tmp_path / FILE)
    _, errors = server.communicate()
    assert (server.returncode, errors.count("\n")) == (3, 1)
    assert "is a file, not the folder of a store" in errors


# -------------------------------------------------------------------------------------------------------------- in a browser


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
def test_progress_in_a_browser(chromium, tmp_path, serving, paused):
    home = tmp_path / "home"
    server = serving(home)
    page = chromium.new_page(viewport={"width": 390, "height": 844})
    troubles, requests = [], []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(server.url + "slow.html")
    assert page.locator(".verdict").inner_text() == "– Not run"
    page.evaluate("window.marked = true")  # gone if the page were loaded again
    other = drive(home, "slow", jobs=1, **SLOW)
    try:
        page.locator(".run progress").wait_for()
        assert "Slow is running" in page.locator("#live").inner_text()
        page.locator(".run progress[max='6']:not([value='0'])").wait_for()
        assert page.locator(".latest tbody tr").count() >= 1
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        paused()
        page.locator(".verdict", has_text="✓ holds, 1 of 1 at scale small, on 3 seeds").wait_for()
        assert other.wait() == 0
    finally:
        other.kill()
        other.communicate()
    page.locator("#live:empty").wait_for(state="attached")
    assert page.evaluate("window.marked") is True
    assert page.title() == "Slow: effect holds, 1 of 1"
    page.locator("summary", has_text="6 trials").click()
    page.locator("table.trials th", has_text="Seed").get_by_role("button").click()  # what was put in sorts, too
    assert page.locator("table.trials tbody td:nth-child(3)").all_inner_texts() == ["0", "0", "1", "1", "2", "2"]
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "slow.small.json"
    for target in ("index.html", "runs.html", "idle.html"):
        page.goto(server.url + target)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, target
    assert troubles == []
    assert {url.split("/")[2] for url in requests if not url.startswith("blob:")} == {f"127.0.0.1:{server.server_port}"}
    page.close()


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
def test_the_page_says_when_the_server_has_ended(chromium, full):
    server = start(full)
    assert server.stdout is not None
    page = chromium.new_page()
    try:
        page.goto(server.stdout.readline().split()[1] + "runs.html")
    finally:
        server.terminate()
        server.communicate()
    page.locator("body.lost").wait_for()
    assert page.locator("table.runs").is_visible()
    page.close()
