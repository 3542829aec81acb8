"""MLflow's UI as a person sees it, in a real browser. Needs Debian's chromium and the package playwright.

Each test leaves a picture of its page; CAPTCHA_EXP_SCREENSHOTS=FOLDER keeps them.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
SIZES = (16, 32)
CURVES = [
    "val/accuracy",
    "val/loss",
    "memory/process_peak_mib",
    "train/accuracy",
    "train/loss",
    "speed/images_per_second",
]


@dataclass(frozen=True)
class Served:
    """A store with a sweep and a single run, served by `captcha-exp ui`."""

    root: Path
    addresses: dict[str, str]
    """label -> address, as printed"""
    server: "subprocess.Popen[str]"

    @property
    def sweep(self) -> Path:
        (found,) = self.root.glob("outputs/2*/*/sweep.json")
        return found.parent

    @property
    def single(self) -> Path:
        (found,) = (path.parent for path in self.root.glob("outputs/2*/*/run.json"))
        return found

    @property
    def points(self) -> dict[str, Path]:
        """name in MLflow -> folder"""
        folders = sorted(path.parent for path in self.sweep.glob("*/run.json"))
        return {folder.name.split("-", 1)[1]: folder for folder in folders}

    @property
    def runs(self) -> dict[str, Path]:
        """The newest first."""
        return {self.single.name: self.single} | dict(reversed(self.points.items()))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("ui")
    environment = os.environ | {"CAPTCHA_EXP_ROOT": str(root)}
    command = [sys.executable, "-m", "captcha_exp"]
    words = [*TINY, f"data.cache={cache}"]
    swept = [word for word in words if not word.startswith("train.batch_size=")]
    sizes = f"train.batch_size={','.join(map(str, SIZES))}"
    subprocess.run([*command, "train", "-m", *swept, sizes], env=environment, check=True)
    subprocess.run([*command, "train", *words], env=environment, check=True)
    server = subprocess.Popen([*command, "ui"], env=environment, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    lines = iter(server.stderr.readline, "Ctrl-C ends it\n")
    addresses = dict(line.split() for line in lines if "http" in line)
    yield Served(root, addresses, server)
    server.terminate()
    server.communicate(timeout=30)


@pytest.fixture(scope="module")
def context(served: Served) -> Iterator[Any]:
    """A browser as it is from the second visit on: MLflow's assistant is shut, and stays so."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=[*FLAGS])
        # Wide enough for all columns, for MLflow leaves out of the page what nobody can see.
        context = browser.new_context(viewport={"width": 1900, "height": 1100})
        context.set_default_timeout(30_000)
        page = context.new_page()
        page.goto(served.addresses["runs"].split("#")[0])
        page.locator("[aria-label=Close]").last.click()
        page.close()
        yield context
        browser.close()


@pytest.fixture
def page(context: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    page = context.new_page()
    yield page
    folder = Path(os.environ.get("CAPTCHA_EXP_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{request.node.name}.png")
    page.close()


def logged(folder: Path) -> dict[str, list[float]]:
    """metric -> its values by step, out of the run's folder."""
    found: dict[str, list[float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        for metric, value in json.loads(line)["metrics"].items():
            found.setdefault(metric, []).append(value)
    return found


def wait_for(read: Callable[[], Any], done: Callable[[Any], bool]) -> Any:
    """What is read once it is done, or at the last try."""
    for _ in range(200):
        if done(found := read()):
            break
        time.sleep(0.1)
    return found


def rows_of(page: Any) -> list[dict[str, str]]:
    """Column -> text, for each row of the list of runs from the top; a row stands in several parts."""
    cells = page.evaluate(
        """[...document.querySelectorAll('.ag-row [col-id]')].map(cell => [
            Number(cell.closest('.ag-row').getAttribute('row-index')),
            cell.getAttribute('col-id'), cell.innerText])"""
    )
    rows: dict[int, dict[str, str]] = {}
    for row, column, text in cells:
        rows.setdefault(row, {})[column.replace("`", "")] = text.splitlines()[-1] if text else ""
    return [rows[row] for row in sorted(rows)]


def charts_of(page: Any) -> dict[str, dict[str, Any]]:
    """Title -> the points of each run by its name (or None), and how many lines or dots are drawn."""
    return dict(
        page.evaluate(
            """[...document.querySelectorAll('[data-testid=experiment-view-compare-runs-card]')]
            .filter(card => card.querySelector('.js-plotly-plot')?.data)
            .map(card => {
                const plot = card.querySelector('.js-plotly-plot')
                const drawn = plot.querySelectorAll('path.js-line[d], path.point[d], .bars path[d]').length
                const runs = Object.fromEntries(plot.data.map(run => [run.name ?? null, [run.x, run.y]]))
                return [card.innerText.split('\\n')[0], {runs, drawn}]
            })"""
        )
    )


def test_every_run_has_a_row_with_its_figures(served: Served, page: Any) -> None:
    page.goto(served.addresses["runs"])
    rows = wait_for(lambda: rows_of(page), lambda found: any("metrics.val/accuracy" in row for row in found))

    assert [row["attributes.Run Name"] for row in rows] == [*served.runs, served.sweep.name]
    assert [row["params.train.batch_size"] for row in rows] == ["64", "32", "16", "16, 32"]
    assert [row["params.model.name"] for row in rows] == ["compact"] * 4
    for row, folder in zip(rows, served.runs.values(), strict=False):
        for metric in (
            "val/accuracy",
            "test/accuracy",
            "memory/process_peak_mib",
            "memory/predicted_peak_mib",
            "speed/images_per_second",
        ):
            assert float(row[f"metrics.{metric}"]) == logged(folder)[metric][-1], (folder.name, metric)


def test_the_curves_of_all_runs_are_drawn(served: Served, page: Any) -> None:
    page.goto(served.addresses["curves"])
    charts = wait_for(
        lambda: charts_of(page),
        lambda found: [title for title in found if len(found[title]["runs"]) == 3][:6] == CURVES,
    )

    assert list(charts)[:6] == CURVES
    for metric in CURVES:
        assert charts[metric]["drawn"] >= 3
        assert charts[metric]["runs"] == {
            name: [[1, 2], logged(folder)[metric]] for name, folder in served.runs.items()
        }


def test_the_sweeps_page_has_memory_accuracy_and_speed_by_batch_size(served: Served, page: Any) -> None:
    page.goto(served.addresses["sweep"])
    titles = [
        f"train.batch_size vs. {metric}"
        for metric in ("memory/process_peak_mib", "val/accuracy", "speed/images_per_second")
    ]
    charts = wait_for(lambda: charts_of(page), lambda found: {*titles} <= {*found})

    assert list(charts)[:3] == titles
    for title in titles:
        ((sizes, values),) = charts[title]["runs"].values()
        metric = title.removeprefix("train.batch_size vs. ")
        assert dict(zip(map(int, sizes), values, strict=True)) == {
            size: logged(folder)[metric][-1]
            for size, folder in zip(SIZES, served.points.values(), strict=True)
        }
        assert charts[title]["drawn"] == len(SIZES)
    page.get_by_text(f"{len(SIZES)} matching runs").wait_for()
    assert page.locator(".ag-row a").all_inner_texts() == ["batch_size=32", "batch_size=16"]


def test_the_sweeps_run_tells_its_verdict(served: Served, page: Any) -> None:
    page.goto(served.addresses["verdict"])
    page.get_by_text("Show more").click()
    table = page.locator("table").first.inner_text()
    verdict = json.loads((served.sweep / "summary.json").read_text())

    assert [line.split("\t")[0] for line in table.splitlines()] == ["batch_size", "16", "32"]
    assert table.count("finished") == 2
    text = page.inner_text("body")
    assert verdict["title"] in text
    for sentence in verdict["conclusions"]:
        assert sentence in text
    assert served.sweep.name in text


def test_the_sweeps_own_metrics_are_lines_over_the_batch_size(served: Served, page: Any) -> None:
    page.goto(served.addresses["verdict"])
    page.get_by_role("tab", name="Model metrics").click()
    charts = wait_for(lambda: charts_of(page), lambda found: "images_per_second" in found)

    steps, _ = charts["images_per_second"]["runs"][served.sweep.name]
    assert steps == list(SIZES)
    assert charts["images_per_second"]["drawn"] >= 1
    steps, mib = charts["measured_mib"]["runs"][served.sweep.name]
    assert steps == list(SIZES)
    assert mib == [logged(folder)["memory/process_peak_mib"][-1] for folder in served.points.values()]


def test_the_sweeps_picture_is_shown(served: Served, page: Any) -> None:
    page.goto(served.addresses["verdict"])
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("summary.png").first.click()
    picture = page.locator("img[src^=blob]:visible")
    picture.wait_for()

    width = wait_for(lambda: picture.evaluate("image => image.naturalWidth"), lambda found: found > 0)
    assert width > 100


def test_the_compare_page_has_the_points_side_by_side(served: Served, page: Any) -> None:
    page.goto(served.addresses["compare"])
    page.get_by_text("Show diff only").first.wait_for()
    rows = page.evaluate(
        "[...document.querySelectorAll('tr')].map(row => row.innerText.split(/\\s*\\t\\s*/))"
    )
    metrics = ("memory/process_peak_mib", "val/accuracy")
    for metric in metrics:  # MLflow starts with the first param that differs and the first metric
        page.get_by_role("combobox").nth(1).click()
        page.keyboard.type(metric)
        page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    axes = wait_for(
        lambda: dict(
            page.evaluate(
                """[...document.querySelectorAll('.js-plotly-plot')].flatMap(plot =>
                plot.data[0].dimensions.map(axis => [axis.label, axis.values]))"""
            )
        ),
        lambda found: {*metrics} <= {*found},
    )

    assert ["train.batch_size", "16", "32"] in rows
    assert ["Run Name:", *served.points] in rows
    assert axes["train.batch_size"] == list(SIZES)
    for metric in metrics:
        assert axes[metric] == [logged(folder)[metric][-1] for folder in served.points.values()]


def test_a_view_that_is_not_there_leaves_mlflows_own_page(served: Served, page: Any) -> None:
    page.goto(served.addresses["runs"] + "-of-another-version")
    page.get_by_text("Model training").wait_for()
    page.goto(served.addresses["runs"].split("&viewStateShareKey")[0])
    names = wait_for(lambda: [row.get("attributes.Run Name") for row in rows_of(page)], bool)
    assert names == [served.single.name, served.sweep.name]  # as MLflow has it: the points are hidden


def test_the_pages_ask_nobody_but_this_machine(served: Served, context: Any, page: Any) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(served.addresses["curves"])
    page.get_by_text("val/accuracy").first.wait_for()

    server = served.addresses["runs"].split("#")[0]
    assert asked
    assert not [url for url in asked if not url.startswith((server, "data:", f"blob:{server}"))]


def test_it_listens_on_this_machine_alone_and_leaves_nothing_behind(served: Served) -> None:
    parent = psutil.Process(served.server.pid)
    processes = [parent, *parent.children(recursive=True)]
    listening = {
        c.laddr for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN
    }
    found = re.search(r"127\.0\.0\.1:(\d+)/", served.addresses["runs"])
    assert found is not None
    port = int(found[1])

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
