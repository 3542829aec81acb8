"""Test the table in README.md and the planner's docstring, with committed and fake GPU sessions."""

import json
import shutil
from pathlib import Path
from typing import Any

import article_table
import planner_error
import pytest

from captcha_exp import memory

PROJECT = Path(__file__).parents[2]

H200 = "NVIDIA H200"


def training_part(seconds: float, speed: float, **more: Any) -> dict[str, Any]:
    return {"figures": {"seconds_per_1000": seconds, "training_images_per_second": speed, **more}}


def session(gpu: str | None = H200, **parts: Any) -> dict[str, Any]:
    return {
        "benchmark": "gpu_session",
        "date": "2027-01-01",
        "machine": {
            "gpu": gpu,
            "cores": 16,
            "torch": "2.11.0+cu130",
            "driver": "580.65",
            "date": "2027-01-02",
        },
        "parts": {name.replace("_", "-"): part for name, part in parts.items()},
    }


SESSION = session(
    auto_cuda=training_part(0.0512, 30_000, precision="bf16", process_peak_mib=1200.4),
    ours_cuda_bf16=training_part(0.05, 31_234.5, precision="bf16", process_peak_mib=1100),
    ours_cuda_fp16={"error": "took more than 120 s"},
    article_cuda=training_part(0.4, 2500, process_mib=None),
    ours_cpu_fp32=training_part(4.0, 210, precision="fp32", process_peak_mib=900.6),
    article_cpu=training_part(5.0, 180, peak_rss_mib=1500),
    speed_compact_fp32={"figures": {"rows": []}},
)
ROWS = [
    "| the article | its CPU | fp32 | 13.60 | | |",
    "| the article | GTX 1650 | fp32 | 1.90 | | 2,915 |",
    "| the article's loop | NVIDIA H200 | fp32 | 0.400 | 2,500 | unknown |",
    "| captcha-exp | NVIDIA H200 | bf16 | 0.050 | 31,234 | 1,100 |",
]


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{article_table.BEGIN}\nold\n{article_table.END}\nafter\n")
    return path


def results(folder: Path, **files: Any) -> Path:
    made = folder / "results"
    made.mkdir()
    for name, content in files.items():
        (made / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return made


def test_the_table_in_readme_is_up_to_date() -> None:
    assert article_table.main(["--check"]) == 0


def test_the_table_has_a_row_per_training_in_order(tmp_path: Path, readme: Path) -> None:
    folder = results(
        tmp_path, one=SESSION, dry=session(None, article_cpu=training_part(1, 1)), other={"benchmark": "x"}
    )
    options = ["--results", str(folder), "--readme", str(readme)]
    before = readme.read_text()
    assert article_table.main([*options, "--check"]) == 1
    assert readme.read_text() == before
    assert article_table.main(options) == 0
    lines = readme.read_text().splitlines()
    assert lines[:2] == ["before", article_table.BEGIN]
    assert lines[4:8] == ROWS
    assert lines[8:] == [
        "",
        "Measured in `benchmarks/results/`: `one.json` (torch 2.11.0+cu130, driver 580.65).",
        article_table.END,
        "after",
    ]
    assert article_table.main([*options, "--check"]) == 0
    readme.write_text(readme.read_text().replace("0.400", "0.300"))
    assert article_table.main([*options, "--check"]) == 1


def test_without_a_session_the_table_has_only_the_article(tmp_path: Path, readme: Path) -> None:
    assert article_table.main(["--results", str(results(tmp_path)), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert ROWS[:2] == [line for line in text.splitlines() if line.startswith("| the article")]
    assert "No GPU has been measured yet" in text
    assert "captcha-exp" not in text


def test_two_sessions_are_sorted_by_file_name(tmp_path: Path) -> None:
    h100 = session("NVIDIA H100 80GB HBM3", article_cuda=training_part(1, 1000, process_mib=3000))
    found = article_table.sessions(results(tmp_path, b=SESSION, a=h100))
    assert list(found) == ["a.json", "b.json"]
    lines = article_table.block(found).splitlines()
    assert "NVIDIA H100 80GB HBM3" in lines[4]
    assert lines[5:7] == ROWS[2:]
    assert "a.json" in lines[-1]
    assert ", `b.json`" in lines[-1]


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        article_table.BEGIN,
        f"{article_table.END}{article_table.BEGIN}",
        f"{article_table.BEGIN}{article_table.END}{article_table.END}",
    ],
)
def test_a_readme_without_markers_is_rejected(text: str) -> None:
    with pytest.raises(SystemExit, match=r"^README\.md: must have <!-- .+ once each; restore them$"):
        article_table.insert_table(text, "table")


def test_a_truncated_session_is_named(tmp_path: Path) -> None:
    folder = results(tmp_path, cut=json.dumps(SESSION)[:-9])
    with pytest.raises(SystemExit, match=r"cut\.json: cannot be read: .+; restore it with git checkout$"):
        article_table.sessions(folder)


def test_a_session_without_machine_is_named_and_a_dry_run_is_ignored(tmp_path: Path) -> None:
    folder = results(tmp_path, odd={**SESSION, "machine": {"gpu": "x"}})
    with pytest.raises(SystemExit, match=r"odd\.json: has no machine or no parts of a session"):
        article_table.sessions(folder)
    other = tmp_path / "other"
    other.mkdir()
    assert article_table.sessions(results(other, dry={**SESSION, "dry_run": True})) == {}


def test_a_missing_readme_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"README\.md: no such file; name the README with --readme$"):
        article_table.main(["--readme", str(tmp_path / "README.md")])


# -- the planner's docstring ---------------------------------------------------------------------------------


def summary(**more: Any) -> dict[str, Any]:
    return {
        "gpu": H200,
        "plans": 12,
        "process_error_median": 0.0123,
        "process_error_worst": 0.0456,
        "allocated_error_worst": -0.0031,
        "false_fits": 0,
    } | more


def test_the_docstring_is_up_to_date() -> None:
    assert planner_error.main(["--check"]) == 0
    assert memory.__doc__ is not None
    assert planner_error.current_paragraph(memory.__doc__) == planner_error.measured()


def test_without_a_plan_the_paragraph_says_not_measured() -> None:
    for summaries in ({}, {"a.json": None}, {"a.json": {"plans": 0}}):
        assert planner_error.paragraph(summaries) == "On a GPU: not measured yet."


def test_the_paragraph_has_gpu_number_of_trainings_errors_and_file() -> None:
    summaries = {"a.json": summary(), "b.json": None, "c.json": summary(gpu="X", false_fits=2)}
    first, second = planner_error.paragraph(summaries).split(" X, ")
    assert first == (
        "On a GPU: NVIDIA H200, 12 trainings: the middle of the predicted bounds is off the measured process "
        "peak by 1.2% (median) and 4.6% (worst), no false *fits*, allocated bytes at most 0.3% outside the "
        "bounds (benchmarks/results/a.json)."
    )
    assert "2 false *fits*" in second
    assert second.endswith("(benchmarks/results/c.json).")


def test_the_docstring_is_updated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    header = tmp_path / "header.py"
    shutil.copy(planner_error.HEADER, header)
    text = planner_error.paragraph({"a.json": summary()})
    monkeypatch.setattr(planner_error, "measured", lambda _: text)
    options = ["--header", str(header)]
    assert planner_error.main([*options, "--check"]) == 1
    assert planner_error.main([*options, "--write"]) == 0
    assert planner_error.main([*options, "--check"]) == 0
    assert planner_error.main(options) == 0
    assert capsys.readouterr().out == f"{text}\n"
    written = header.read_text()
    assert max(map(len, written.splitlines())) <= 110
    assert planner_error.current_paragraph(written) == text
    old = planner_error.HEADER.read_text()
    assert written.split("On a GPU")[0] == old.split("On a GPU")[0]
    assert written.split("Bounds of workspaces")[1] == old.split("Bounds of workspaces")[1]


def test_a_docstring_without_the_paragraph_is_rejected() -> None:
    with pytest.raises(SystemExit, match="add it"):
        planner_error.current_paragraph('"""Nothing."""')
