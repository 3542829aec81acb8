"""MLflow's UI as a person sees it, in a real browser. Needs Debian's chromium and the package playwright."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import TINY

pytestmark = pytest.mark.ui

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-sync",
    "--no-first-run",
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[tuple[str, str, int]]:
    """The two addresses that `captcha-exp ui` prints after a training, and its process id."""
    environment = os.environ | {"CAPTCHA_EXP_ROOT": str(tmp_path_factory.mktemp("ui"))}
    command = [sys.executable, "-m", "captcha_exp"]
    subprocess.run([*command, "train", *TINY, f"data.cache={cache}"], env=environment, check=True)
    server = subprocess.Popen([*command, "ui"], env=environment, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    addresses = [re.search(r"http://\S+", server.stderr.readline()) for _ in range(2)]
    assert all(addresses)
    yield addresses[0][0], addresses[1][0], server.pid  # type: ignore[index]  # just asserted
    server.terminate()
    server.communicate(timeout=30)


def text_of(address: str, wanted: str) -> str:
    """What the page says once the wanted words are on it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=[*FLAGS])
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.goto(address)
        page.get_by_text(wanted).first.wait_for(timeout=60_000)
        text: str = page.inner_text("body")
        browser.close()
    return text


def test_the_first_address_lists_the_runs_with_their_dataset(served: tuple[str, str, int]) -> None:
    text = text_of(served[0], "-tiny")

    assert "1 matching run" in text
    assert "captcha (" in text


def test_the_second_address_shows_the_curves(served: tuple[str, str, int]) -> None:
    text = text_of(served[1], "-tiny (speed/images_per_second)")  # more are drawn when scrolled to

    assert "-tiny (memory/process_peak_mib)" in text


def test_it_listens_on_this_machine_alone_and_leaves_nothing_behind(served: tuple[str, str, int]) -> None:
    address, _, pid = served
    parent = psutil.Process(pid)
    processes = [parent, *parent.children(recursive=True)]
    listening = {
        c.laddr for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN
    }
    port = int(address.split(":")[2].split("/")[0])

    assert listening == {("127.0.0.1", port)}
    parent.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(processes[1:], timeout=15)
    assert not alive
    with socket.socket() as probe:
        for _ in range(50):
            if probe.connect_ex(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        else:
            pytest.fail("the server is still there")
