"""A browser opens hostile reports: nothing of theirs runs or is fetched, and the page's own script runs."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest

from hasten.report import render

from .hostile import DO, PAYLOADS, hostile

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="no chromium on this machine")


def _open(page: str, folder: Path, name: str) -> str:
    """Return the document as it stands after the browser has loaded ``page`` and run what it runs."""
    path = folder / f"{name}.html"
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    quiet = ("gpu", "quic", "background-networking", "component-update", "sync")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        *(f"--disable-{name}" for name in quiet),
    ]
    command.append("--virtual-time-budget=2000")
    command += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    return done.stdout.decode(errors="replace")


@pytest.fixture
def listener() -> Iterator[tuple[int, list[str]]]:
    """Yield a port on this machine and the list of connections made to it, each closed at once."""
    made: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                connection, address = server.accept()
                connection.close()
                if stopping.is_set():
                    return
                made.append(str(address))

        stopping = threading.Event()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1], made
        stopping.set()
        socket.create_connection(server.getsockname()).close()
        thread.join(10)


def test_hostile_reports_run_nothing_and_fetch_nothing(
    tmp_path: Path, listener: tuple[int, list[str]]
) -> None:
    port, made = listener
    aimed = [payload.replace("PORT", str(port)) for payload in PAYLOADS]
    turn = cycle(aimed)
    together = "".join(aimed)
    pages = {
        "mixed": render(hostile(lambda: next(turn), seeds=2, shares=(0.5, 1.0))),
        "together": render(hostile(lambda: together, seeds=1, shares=(0.5, 1.0))),
    }
    for name, page in pages.items():
        dom = _open(page, tmp_path, name)
        title = dom[dom.index("<title>") : dom.index("</title>")]
        assert "· hasten" in title, "a script of the data changed the title"
        assert '<html lang="en" class="live">' in dom, "the page's own script did not run"
        assert 'class="tip"' in dom
    assert made == []


def test_the_browser_test_can_fail(tmp_path: Path, listener: tuple[int, list[str]]) -> None:
    """The same script and request, let through, are seen: the other test needs a browser that works."""
    port, made = listener
    dom = _open(
        f"<title>calm</title><script>{DO}</script><img src=http://127.0.0.1:{port}/x>", tmp_path, "open"
    )
    assert "<title>PWNED</title>" in dom
    assert made
