"""The page of a sweep: conclusions, table, figures, and links to the pages of its runs."""

import os
import re
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import Call
from support.pages import Page, open_in_browser
from test_summary import BATCH, at, make_result

from captcha_exp.config import Config
from captcha_exp.memory.interval import MiBRange
from captcha_exp.sweep.page import SWEEP_PAGE, write_page
from captcha_exp.sweep.record import Job, Sweep, create_sweep
from captcha_exp.sweep.results import JobResult
from captcha_exp.sweep.summary import SweepSummary

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture
def sweep(tiny: Config) -> Sweep:
    """A sweep of two batch sizes that has not run."""
    jobs = [
        Job(number=n, swept={BATCH: str(size)}, choices={}, requested=tiny)
        for n, size in enumerate((32, 64), 1)
    ]
    return create_sweep("grid", jobs, [None, None], 1)


def written(sweep: Sweep, results: list[JobResult], path: Path | None = None) -> tuple[Page, SweepSummary]:
    path = path or sweep.run_dir / SWEEP_PAGE
    summary = SweepSummary(results)
    write_page(sweep, summary, path)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(https?:)?//", text)
    return Page(text), summary


def with_page(sweep: Sweep, name: str) -> str:
    """Return the directory of a run that has a page."""
    run_dir = sweep.run_dir / name
    (run_dir / "report").mkdir(parents=True)
    (run_dir / "report" / "run.html").write_text("<p>the run</p>")
    return str(run_dir)


def sizes(sweep: Sweep) -> list[JobResult]:
    return [
        at(32, 1000.0, 0.97, number=1, test_accuracy=0.96, run_dir=with_page(sweep, "1-batch_size=32")),
        at(64, 1500.0, 0.95, number=2, run_dir=str(sweep.run_dir / "2-batch_size=64")),
        at(4096, None, None, number=3, predicted_mib=MiBRange(4000, 5000), run_dir=None),
    ]


def test_the_page_has_the_conclusions_the_table_and_links(sweep: Sweep) -> None:
    page, summary = written(sweep, sizes(sweep))
    for sentence in (summary.title, *summary.conclusions):
        assert sentence in page.text
    header, *rows = page.tables["groups"]
    assert (header[0], header[-1]) == ("batch_size", "status")
    assert [row[0] for row in rows] == ["32", "64", "4096"]
    assert [row[header.index("validation")] for row in rows] == ["97.00%", "95.00%", ""]
    assert [row[header.index("images/s")] for row in rows] == ["1,000", "1,500", ""]
    assert page.tables["jobs"][1:] == [
        ["1", "job 1", "finished", "97.00%", "96.00%"],
        ["2", "job 2", "finished", "95.00%", ""],
        ["3", "job 3", "skipped", "", ""],
    ]
    assert page.links == ["./1-batch_size%3D32/report/run.html"]
    assert page.tags.count("svg") == 3  # accuracy, speed, predicted memory


def test_the_links_of_a_page_elsewhere_lead_to_the_runs(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    page, _ = written(sweep, sizes(sweep), tmp_path / "pages" / "grid.html")
    (link,) = page.links
    assert (
        link
        == f"./../outputs/{sweep.run_dir.parent.name}/{sweep.run_dir.name}/1-batch_size%3D32/report/run.html"
    )


def test_groups_that_are_no_batch_sizes_are_rows(sweep: Sweep) -> None:
    results = [
        make_result(n, swept={"model": name, "seed": str(n)}, val_accuracy=accuracy, name=f"model={name}")
        for n, (name, accuracy) in enumerate([(SCRIPT, 0.9), (SCRIPT, 0.92), ("b", 0.8), ("b", 0.81)], 1)
    ]
    page, summary = written(sweep, results)
    assert "svg" not in page.tags
    assert "script" not in page.tags
    assert not {name for name in page.attributes if name.startswith("on")}
    assert page.text.count(SCRIPT) >= 4
    assert summary.conclusions[0] in page.text


def test_a_sweep_without_results_has_a_page(sweep: Sweep) -> None:
    nothing: dict[str, Any] = {"outcome": "failed", "error": f"a {SCRIPT}\nb", "predicted_mib": None}
    page, _ = written(sweep, [at(32, None, None, **nothing), at(64, None, None, **nothing)])
    assert "no job finished: 2 jobs (2 failed)" in page.text
    assert f"failed: a {SCRIPT}\\nb" in page.text


def test_the_command_finds_a_sweep(sweep: Sweep, call: Call) -> None:
    path = sweep.run_dir / "summary.html"
    assert call("report", str(sweep.run_dir)) == (0, f"{path}\n", "")
    page = Page(path.read_text())
    assert "no job finished: 2 jobs (2 not run)" in page.text
    assert [row[1] for row in page.tables["jobs"][1:]] == ["batch_size=32", "batch_size=64"]
    assert f"captcha-exp train -m --resume {sweep.run_dir.parent.name}/{sweep.run_dir.name}" in page.text


@pytest.mark.ui
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(
    sweep: Sweep, width: int, scheme: Literal["light", "dark"], tmp_path: Path
) -> None:
    _, summary = written(sweep, sizes(sweep))
    screenshots = Path(os.environ.get("CAPTCHA_EXP_SCREENSHOTS", tmp_path))
    target = screenshots / f"sweep-{width}-{scheme}.png"
    seen = open_in_browser(sweep.run_dir / SWEEP_PAGE, width, target, scheme)
    assert (seen.requests, seen.messages) == ([], [])
    assert seen.overflow <= 0
    assert seen.smallest_text >= 10
    for sentence in summary.conclusions:
        assert sentence in seen.text
    assert "97.00%" in seen.text
