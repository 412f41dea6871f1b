"""``polyak serve``: the stored results as pages in the browser."""

import signal
import threading
import webbrowser
from typing import Annotated

import typer

from polyak import claims
from polyak.cli.shared import Home, stop


def serve(
    home: Home = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The port (default: one that is free).", show_default=False)
    ] = None,
    show_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Show what is stored and what is running, live in the browser.

    At 127.0.0.1, for this machine alone and for reading only, until Ctrl-C.
    """
    from polyak.lab.pages import Pages
    from polyak.lab.serve import serve as serve_pages

    def ready(url: str) -> None:
        print(f"Serving {url} (Ctrl-C ends it)", flush=True)
        if show_it:
            webbrowser.open(url)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    pages = Pages(home, claims.catalogue(), claims.published_at)
    threading.Thread(target=pages.draw_pictures, daemon=True).start()
    try:
        serve_pages(pages, port=port or 0, ready=ready)
    except OSError as error:
        if port is None:
            raise
        stop(f"port {port} cannot be used ({error.strerror}): name another, or leave --port out")
