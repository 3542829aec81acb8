"""The MLflow UI in a real browser. Needs Debian's chromium and the package playwright.

Each test saves a screenshot of its page; CAPTCHA_EXP_SCREENSHOTS=DIR keeps them.
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
    urls: dict[str, str]
    """Label -> URL, as printed."""
    server: "subprocess.Popen[str]"

    @property
    def sweep(self) -> Path:
        (path,) = self.root.glob("outputs/2*/*/sweep.json")
        return path.parent

    @property
    def single(self) -> Path:
        (run_dir,) = (path.parent for path in self.root.glob("outputs/2*/*/run.json"))
        return run_dir

    @property
    def jobs(self) -> dict[str, Path]:
        """Return name in MLflow -> run directory."""
        run_dirs = sorted(path.parent for path in self.sweep.glob("*/run.json"))
        return {run_dir.name.split("-", 1)[1]: run_dir for run_dir in run_dirs}

    @property
    def runs(self) -> dict[str, Path]:
        """Return name in MLflow -> run directory, newest first."""
        return {self.single.name: self.single} | dict(reversed(self.jobs.items()))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("ui")
    environment = os.environ | {"CAPTCHA_EXP_ROOT": str(root)}
    command = [sys.executable, "-m", "captcha_exp"]
    args = [*TINY, f"data.cache={cache}"]
    swept = [arg for arg in args if not arg.startswith("train.batch_size=")]
    sizes = f"train.batch_size={','.join(map(str, SIZES))}"
    subprocess.run([*command, "train", "-m", *swept, sizes], env=environment, check=True)
    subprocess.run([*command, "train", *args], env=environment, check=True)
    server = subprocess.Popen([*command, "ui"], env=environment, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    lines = iter(server.stderr.readline, "Press Ctrl-C to stop\n")
    urls = dict(line.split() for line in lines if "http" in line)
    yield Served(root, urls, server)
    server.terminate()
    server.communicate(timeout=30)


@pytest.fixture(scope="module")
def context(served: Served) -> Iterator[Any]:
    """Return a browser context in which MLflow's assistant is closed."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=[*FLAGS])
        # Wide enough for all columns, since MLflow does not render columns outside the viewport.
        context = browser.new_context(viewport={"width": 1900, "height": 1100})
        context.set_default_timeout(30_000)
        page = context.new_page()
        page.goto(served.urls["runs"].split("#")[0])
        page.locator("[aria-label=Close]").last.click()
        page.close()
        yield context
        browser.close()


@pytest.fixture
def page(context: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    page = context.new_page()
    yield page
    screenshot_dir = Path(os.environ.get("CAPTCHA_EXP_SCREENSHOTS", tmp_path))
    screenshot_dir.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=screenshot_dir / f"{request.node.name}.png")
    page.close()


def logged(run_dir: Path) -> dict[str, list[float]]:
    """Return metric -> values by step, from metrics.jsonl."""
    values: dict[str, list[float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        for metric, value in json.loads(line)["metrics"].items():
            values.setdefault(metric, []).append(value)
    return values


def wait_for(get_value: Callable[[], Any], is_ready: Callable[[Any], bool]) -> Any:
    """Return the value once it is ready, or the last one after 20 s."""
    for _ in range(200):
        if is_ready(value := get_value()):
            break
        time.sleep(0.1)
    return value


def rows_of(page: Any) -> list[dict[str, str]]:
    """Return column -> text for each row of the run table; the grid splits a row into several elements."""
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
    """Return title -> data of each run by its name (or None), and the number of lines or points drawn."""
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


def test_every_run_has_a_row_with_its_metrics(served: Served, page: Any) -> None:
    page.goto(served.urls["runs"])
    rows = wait_for(lambda: rows_of(page), lambda found: any("metrics.val/accuracy" in row for row in found))

    assert [row["attributes.Run Name"] for row in rows] == [*served.runs, served.sweep.name]
    assert [row["params.train.batch_size"] for row in rows] == ["64", "32", "16", "16, 32"]
    assert [row["params.model.name"] for row in rows] == ["compact"] * 4
    for row, run_dir in zip(rows, served.runs.values(), strict=False):
        for metric in (
            "val/accuracy",
            "test/accuracy",
            "memory/process_peak_mib",
            "memory/predicted_peak_mib",
            "speed/images_per_second",
        ):
            assert float(row[f"metrics.{metric}"]) == logged(run_dir)[metric][-1], (run_dir.name, metric)


def test_the_curves_of_all_runs_are_drawn(served: Served, page: Any) -> None:
    page.goto(served.urls["curves"])
    charts = wait_for(
        lambda: charts_of(page),
        lambda found: [title for title in found if len(found[title]["runs"]) == 3][:6] == CURVES,
    )

    assert list(charts)[:6] == CURVES
    for metric in CURVES:
        assert charts[metric]["drawn"] >= 3
        assert charts[metric]["runs"] == {
            name: [[1, 2], logged(run_dir)[metric]] for name, run_dir in served.runs.items()
        }


def test_the_sweep_page_has_memory_accuracy_and_speed_by_batch_size(served: Served, page: Any) -> None:
    page.goto(served.urls["sweep"])
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
            size: logged(run_dir)[metric][-1]
            for size, run_dir in zip(SIZES, served.jobs.values(), strict=True)
        }
        assert charts[title]["drawn"] == len(SIZES)
    page.get_by_text(f"{len(SIZES)} matching runs").wait_for()
    assert page.locator(".ag-row a").all_inner_texts() == ["batch_size=32", "batch_size=16"]


def test_the_sweep_run_shows_the_summary(served: Served, page: Any) -> None:
    page.goto(served.urls["summary"])
    page.get_by_text("Show more").click()
    table = page.locator("table").first.inner_text()
    summary = json.loads((served.sweep / "summary.json").read_text())

    assert [line.split("\t")[0] for line in table.splitlines()] == ["batch_size", "16", "32"]
    assert table.count("finished") == 2
    text = page.inner_text("body")
    assert summary["title"] in text
    for sentence in summary["conclusions"]:
        assert sentence in text
    assert served.sweep.name in text


def test_the_metrics_of_the_sweep_are_lines_over_the_batch_size(served: Served, page: Any) -> None:
    page.goto(served.urls["summary"])
    page.get_by_role("tab", name="Model metrics").click()
    needed = {"images_per_second", "measured_mib"}
    charts = wait_for(lambda: charts_of(page), lambda found: needed <= found.keys())

    steps, _ = charts["images_per_second"]["runs"][served.sweep.name]
    assert steps == list(SIZES)
    assert charts["images_per_second"]["drawn"] >= 1
    steps, mib = charts["measured_mib"]["runs"][served.sweep.name]
    assert steps == list(SIZES)
    assert mib == [logged(run_dir)["memory/process_peak_mib"][-1] for run_dir in served.jobs.values()]


def test_the_figure_of_the_sweep_is_shown(served: Served, page: Any) -> None:
    page.goto(served.urls["summary"])
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("summary.png").first.click()
    figure = page.locator("img[src^=blob]:visible")
    figure.wait_for()

    width = wait_for(lambda: figure.evaluate("image => image.naturalWidth"), lambda value: value > 0)
    assert width > 100


def test_the_compare_page_shows_the_jobs(served: Served, page: Any) -> None:
    page.goto(served.urls["compare"])
    page.get_by_text("Show diff only").first.wait_for()
    rows = page.evaluate(
        "[...document.querySelectorAll('tr')].map(row => row.innerText.split(/\\s*\\t\\s*/))"
    )
    metrics = ("memory/process_peak_mib", "val/accuracy")
    for metric in metrics:  # by default MLflow selects one param and one metric
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
    assert ["Run Name:", *served.jobs] in rows
    assert axes["train.batch_size"] == list(SIZES)
    for metric in metrics:
        assert axes[metric] == [logged(run_dir)[metric][-1] for run_dir in served.jobs.values()]


def test_a_missing_view_shows_the_default_page(served: Served, page: Any) -> None:
    page.goto(served.urls["runs"] + "-of-another-version")
    page.get_by_text("Model training").wait_for()
    page.goto(served.urls["runs"].split("&viewStateShareKey")[0])
    names = wait_for(lambda: [row.get("attributes.Run Name") for row in rows_of(page)], bool)
    assert names == [served.single.name, served.sweep.name]  # MLflow nests the jobs by default


def test_the_pages_send_no_requests_to_other_hosts(served: Served, context: Any, page: Any) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(served.urls["curves"])
    page.get_by_text("val/accuracy").first.wait_for()

    server = served.urls["runs"].split("#")[0]
    assert requests
    assert not [url for url in requests if not url.startswith((server, "data:", f"blob:{server}"))]


def test_the_server_listens_only_on_localhost_and_exits_with_its_parent(served: Served) -> None:
    parent = psutil.Process(served.server.pid)
    processes = [parent, *parent.children(recursive=True)]
    listening = {
        c.laddr for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN
    }
    match = re.search(r"127\.0\.0\.1:(\d+)/", served.urls["runs"])
    assert match is not None
    port = int(match[1])

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
            pytest.fail("the server is still listening")
