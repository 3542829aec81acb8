"""`captcha-exp runs` and `diff`: filter, sort and print runs, and compare two of them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    Call,
    dataset_json,
    edit_record,
    environment_json,
    mlflow_ref,
    out_of_memory,
    result_summary,
    rewrite,
    with_train,
)
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from captcha_exp import runs
from captcha_exp.cli import output
from captcha_exp.cli.diff import format_difference, is_equal
from captcha_exp.cli.output import format_value
from captcha_exp.cli.runs import Condition, parse_number
from captcha_exp.config import Config
from captcha_exp.errors import UserError
from captcha_exp.runs import MetricsRow, Run
from captcha_exp.runs.fields import RunFields
from captcha_exp.runs.info import ResultSummary, Skipped

Make = Callable[..., Run]

ROWS = (
    {
        "val/accuracy": 0.5,
        "train/loss": 3.0,
        "memory/process_peak_mib": 700.0,
        "speed/images_per_second": 10.0,
    },
    {
        "val/accuracy": 0.9,
        "train/loss": 2.0,
        "memory/process_peak_mib": 900.0,
        "speed/images_per_second": 90.0,
    },
    {
        "val/accuracy": 0.8,
        "train/loss": 1.0,
        "memory/process_peak_mib": 800.0,
        "speed/images_per_second": 20.0,
    },
)
RESULT = result_summary()


@pytest.fixture
def make(tiny: Config) -> Make:
    """Return a function that creates a run, finished unless `result` is None; each starts an hour later."""
    created: list[Run] = []

    def run(
        config: Config = tiny,
        rows: tuple[Mapping[str, float], ...] = ROWS,
        result: ResultSummary | None = RESULT,
        test: float = 0.875,
        **state: Any,
    ) -> Run:
        new = runs.create_run(config, config)
        new.update(started=datetime(2026, 3, 1, len(created), tzinfo=UTC), **state)
        for step, metrics in enumerate(rows, 1):
            new.log_metrics(MetricsRow(step, step, metrics))
        if result is not None:
            new.log_metrics(MetricsRow(len(rows), 9, {"test/accuracy": test}))
            new.update(result=result.model_copy(update={"test_accuracy": test}), status="FINISHED")
        created.append(new)
        return new

    return run


def dirs_of(created: list[Run]) -> list[str]:
    return [str(run.run_dir) for run in created]


def list_dirs(call: Call, *words: str) -> list[str]:
    """Return the run directories that `runs` lists, in its order."""
    code, out, err = call("runs", "--json", *words)
    assert (code, err) == (0, "")
    return [run["run_dir"] for run in json.loads(out)]


def table(out: str) -> list[list[str]]:
    """Return the cells of each row of a table."""
    lines = [line for line in out.splitlines() if line.startswith(("│", "┃"))]
    return [[cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]] for line in lines]


# -- values of a run -----------------------------------------------------------------------------------------


def value_of(run: Run, key: str) -> Any:
    return RunFields(runs.load(run.run_dir))[key]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("val/accuracy", 0.9),
        ("train/loss", 2.0),
        ("memory/process_peak_mib", 900.0),
        ("speed/images_per_second", 20.0),
        ("test/accuracy", 0.875),
        ("train.batch_size", 64),
        ("train.patience", None),
        ("model.channels", [4, 8, 8]),
        ("captcha.alphabet", "01234"),
        ("name", "tiny"),
        ("status", "FINISHED"),
        ("best_epoch", 2),
        ("speed_disturbed", False),
        ("error", None),
        ("run_id", None),
    ],
)
def test_value_of_a_key(make: Make, key: str, value: object) -> None:
    assert value_of(make(), key) == value


def test_without_a_result_metrics_are_of_the_last_epoch(make: Make) -> None:
    run = make(result=None)
    assert value_of(run, "val/accuracy") == 0.8
    assert value_of(run, "memory/process_peak_mib") == 900.0


def test_the_last_row_of_a_repeated_epoch_counts(make: Make) -> None:
    run = make()
    run.log_metrics(MetricsRow(2, 99, {"val/accuracy": 0.75}))
    assert value_of(run, "val/accuracy") == 0.75


def test_a_metric_that_the_best_epoch_lacks_is_missing(make: Make) -> None:
    run = make(rows=({"val/accuracy": 0.5}, {"train/loss": 1.0}))
    with pytest.raises(KeyError):
        value_of(run, "val/accuracy")


@pytest.mark.parametrize(
    ("state", "key", "value"),
    [
        ({"oom": None}, "oom", False),
        ({"oom": out_of_memory()}, "oom", True),
        ({"mlflow": mlflow_ref("abc")}, "run_id", "abc"),
        ({"skipped": Skipped(remedies=[])}, "status", "skipped"),
        ({"stop_reason": None}, "stop_reason", None),
        ({"stop_reason": "time limit"}, "stop_reason", "time limit"),
    ],
)
def test_optional_fields(make: Make, state: dict[str, Any], key: str, value: object) -> None:
    assert value_of(make(**state), key) == value


def test_runs_are_selected_by_their_stop_reason(make: Make, call: Call) -> None:
    reasons = ("SIGINT", "SIGTERM", "time limit", "killed")
    killed = {reason: make(result=None, status="KILLED", stop_reason=reason) for reason in reasons}
    make(status="FINISHED")
    for reason, run in killed.items():
        assert list_dirs(call, f"stop_reason={reason}") == dirs_of([run])
    assert len(list_dirs(call, "stop_reason!=null")) == len(reasons)
    assert table(call("runs", "stop_reason=time limit", "--columns", "stop_reason")[1])[1][-1] == "time limit"


def test_a_job_is_listed_with_its_sweep(tiny: Config, root: Path, call: Call) -> None:
    sweep = root / "outputs/2026-03-01/120000-grid"
    sweep.mkdir(parents=True)
    job = runs.create_run(tiny, tiny, sweep / "1-batch_size=64")
    (sweep / "sweep.json").write_text("{")  # also of a damaged sweep
    assert value_of(job, "run_dir") == "2026-03-01/120000-grid/1-batch_size=64"
    assert value_of(job, "sweep") == "2026-03-01/120000-grid"
    assert list_dirs(call, "sweep=2026-03-01/120000-grid") == [str(job.run_dir)]
    assert table(call("runs")[1])[1][0] == "2026-03-01/120000-grid/1-batch_size=64"


def test_a_stale_run_is_closed(make: Make, call: Call) -> None:
    stale, running = make(result=None, process_started=1.0), make(result=None)
    assert "marked KILLED" in call("runs")[2]
    assert list_dirs(call, "status=KILLED") == dirs_of([stale])
    assert list_dirs(call, "status=RUNNING") == dirs_of([running])


# -- conditions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("k=64", 64, True),
        ("k=64.0", 64, True),
        ("k!=64", 64, False),
        ("k>=64", 64, True),
        ("k>64", 64, False),
        ("k<100", 64, True),
        ("k<=64", 64, True),
        ("k<9", 64, False),
        ("k=97.3%", 0.973, True),
        ("k>98%", 0.98, False),
        ("k>=98%", 0.98, True),
        ("k=1e-3", 0.001, True),
        ("k=9007199254740993", 2**53, False),
        ("k=64", "64", True),
        ("k=64.0", "64", False),
        ("k<9", "64", True),
        ("k=0123", "0123", True),
        ("k=123", "0123", False),
        ("k>2026-03", "2026-03-01T00", True),
        ("k=", "", True),
        ("k=null", None, True),
        ("k!=null", None, False),
        ("k!=null", 5, True),
        ("k=null", 5, False),
        ("k=0", None, False),
        ("k>=0", None, False),
        ("k=true", True, True),
        ("k=1", True, False),
        ("k=false", 0, False),
        ("k>=1", True, False),
        ("k=[4,8]", [4, 8], True),
        ("k=[4, 8]", [4, 8], True),
        ("k=[8,4]", [4, 8], False),
        ("k~8]", [4, 8], True),
        ("k~ick", "quick", True),
        ("k~Quick", "quick", False),
        ("k~a=b", "xa=by", True),
        ("k~n", None, False),
        ("k>=0", float("nan"), False),
        ("k < 9 ", 8, True),
        ("k=x\ny", "x\ny", True),
    ],
)
def test_comparison_by_the_type_of_the_value(text: str, value: object, holds: bool) -> None:
    assert Condition.parse(text).matches(value) is holds


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_compared_as_numbers(value: float, expected: float) -> None:
    assert Condition.parse(f"a/b>={expected!r}").matches(value) is (value >= expected)
    assert Condition.parse(f"a/b<{expected!r}").matches(value) is (value < expected)


@pytest.mark.parametrize("text", ["x", "", "=5", "train.batch_size", "<", "~quick", "a b"])
def test_invalid_conditions(text: str) -> None:
    with pytest.raises(UserError, match=r"invalid condition; write KEY OP VALUE without spaces"):
        Condition.parse(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("98%", 0.98),
        ("97.3%", 0.973),
        ("1_000", 1000),
        ("9e999", float("inf")),
        ("abc", None),
        ("%", None),
        ("", None),
        ("sNaN", None),
        ("1e9999999999999999999", None),
    ],
)
def test_parse_number(text: str, value: float | None) -> None:
    assert parse_number(text) == value


def test_all_conditions_must_hold(make: Make, call: Call, tiny: Config) -> None:
    small, large = make(with_train(tiny, batch_size=8)), make(with_train(tiny, batch_size=128), test=0.5)
    failed = make(with_train(tiny, batch_size=128), result=None, status="FAILED", error="no [memory]")
    assert list_dirs(call) == dirs_of([small, large, failed])
    assert list_dirs(call, "train.batch_size>=64") == dirs_of([large, failed])
    assert list_dirs(call, "train.batch_size>=64", "status=FINISHED") == dirs_of([large])
    assert list_dirs(call, "train.batch_size>=64", "test/accuracy>80%") == []
    assert list_dirs(call, "error~[memory]") == dirs_of([failed])
    assert list_dirs(call, "best_epoch!=7") == dirs_of(
        [small, large]
    )  # a run that lacks the key does not match


def test_conditions_after_a_flag(make: Make, call: Call) -> None:
    run = make()
    make(result=None)
    assert list_dirs(call, "name=tiny", "--limit", "1", "status=FINISHED") == dirs_of([run])
    assert list_dirs(call, "--limit", "1", "status=FINISHED") == dirs_of([run])


def test_an_unknown_key_suggests_the_closest(make: Make, call: Call) -> None:
    make()
    for words in (
        ["train.bach_size=3"],
        ["--sort", "train.bach_size"],
        ["--columns", "name,train.bach_size"],
    ):
        assert call("runs", *words) == (
            2,
            "",
            "train.bach_size: no run has this key; did you mean train.batch_size?\n",
        )
    assert call("runs", "tst/accuracy>1", "xyzzy=1")[2].splitlines() == [
        "tst/accuracy: no run has this key; did you mean test/accuracy?",
        "xyzzy: no run has this key; use a key of config.yaml, a metric, or one of name, status, started, "
        "run_dir, run_id, error, stop_reason, epochs, best_epoch, seconds, weights_sha256, "
        "speed_disturbed, oom, sweep",
    ]


def test_a_disturbed_speed_is_marked(make: Make, call: Call) -> None:
    make()
    make(result=result_summary(speed_disturbed=True))
    _, *rows = table(call("runs", "--columns", "speed/images_per_second,val/accuracy")[1])
    assert [row[-2:] for row in rows] == [["20", "90.00%"], ["20 (disturbed)", "90.00%"]]
    assert len(table(call("runs", "speed_disturbed=false")[1])) == 2


def test_an_old_key_or_status_is_answered_with_the_new_one(make: Make, call: Call) -> None:
    make()
    assert call("runs", "card.name=x", "--sort", "train.optimizer_kernel")[2].splitlines() == [
        "card.name: was renamed to gpu.name",
        "train.optimizer_kernel: was renamed to train.optimizer_impl",
    ]
    line = "status=died: must be one of RUNNING, FINISHED, FAILED, KILLED, stale, skipped\n"
    assert call("runs", "status=died") == (2, "", line)


def test_a_standard_key_may_be_missing(make: Make, call: Call) -> None:
    make(result=None)
    assert list_dirs(call, "oom=true") == []
    assert list_dirs(call, "best_epoch>1") == []


def test_a_number_is_not_compared_with_text(make: Make, call: Call) -> None:
    make()
    line = "train.batch_size is a number, but 'many' is not; write a number such as 0.98 or 98%"
    assert call("runs", "train.batch_size=many") == (2, "", f"train.batch_size=many: {line}\n")
    assert list_dirs(call, "train.batch_size=null") == []


def test_no_matching_run_is_not_an_error(make: Make, call: Call, root: Path) -> None:
    make()
    line = f"none of the 1 runs in {root / 'outputs'} matches error=[red] and name=tiny\n"
    assert call("runs", "error=[red]", "name=tiny") == (0, line, "")


# -- order ---------------------------------------------------------------------------------------------------


def test_sort_by_number_text_and_metric(make: Make, call: Call, tiny: Config) -> None:
    a = make(with_train(tiny, batch_size=9), test=0.7)
    b = make(replace(tiny, name="alpha", train=replace(tiny.train, batch_size=10)), test=0.9)
    c = make(replace(tiny, name="zeta", train=replace(tiny.train, batch_size=100)), test=0.8)
    assert list_dirs(call, "--sort", "train.batch_size") == dirs_of([a, b, c])
    assert list_dirs(call, "--sort", "name") == dirs_of([b, a, c])
    assert list_dirs(call, "--sort", "test/accuracy") == dirs_of([a, c, b])
    assert list_dirs(call, "--sort", "test/accuracy", "--reverse", "--limit", "2") == dirs_of([b, c])
    assert (
        list_dirs(call, "--reverse")
        == list_dirs(call, "--sort", "started", "--reverse")
        == dirs_of([c, b, a])
    )


def test_a_minus_sign_does_not_reverse_the_order(make: Make, call: Call) -> None:
    make()
    code, out, err = call("runs", "--sort=-test/accuracy")
    assert (code, out) == (2, "")
    assert err == "-test/accuracy: no run has this key; did you mean test/accuracy?\n"
    assert call("runs", "--sort", "-test/accuracy")[0] == 2


def test_sorting_is_stable(make: Make, call: Call) -> None:
    created = [make(), make(), make()]
    assert (
        list_dirs(call, "--sort", "seed")
        == list_dirs(call, "--sort", "seed", "--reverse")
        == dirs_of(created)
    )


def test_runs_without_a_value_come_last(make: Make, call: Call, tiny: Config) -> None:
    unlimited, unfinished = make(), make(result=None)
    patient, impatient = make(with_train(tiny, patience=9)), make(with_train(tiny, patience=2))
    diverged = make(rows=({"val/accuracy": 0.1}, {"val/accuracy": float("nan")}))
    assert list_dirs(call, "--sort", "train.patience")[:2] == dirs_of([impatient, patient])
    assert list_dirs(call, "--sort", "train.patience", "--reverse")[:2] == dirs_of([patient, impatient])
    assert list_dirs(call, "--sort", "best_epoch", "--reverse")[-1] == str(unfinished.run_dir)
    by_accuracy = dirs_of([unfinished, unlimited, patient, impatient, diverged])
    assert list_dirs(call, "--sort", "val/accuracy") == by_accuracy


def test_start_times_of_different_time_zones(make: Make, call: Call) -> None:
    first, second = make(), make()
    first.update(started=datetime.fromisoformat("2026-10-25T02:50:00+02:00"))
    second.update(started=datetime.fromisoformat("2026-10-25T02:10:00+01:00"))
    assert list_dirs(call, "--sort", "started") == dirs_of([first, second])


@pytest.mark.parametrize("limit", ["0", "-1"])
def test_limit_must_be_positive(call: Call, limit: str) -> None:
    assert call("runs", f"--limit={limit}") == (2, "", f"--limit={limit}: must be at least 1\n")


# -- the table -----------------------------------------------------------------------------------------------


def test_table_has_a_column_for_each_requested_key(make: Make, call: Call) -> None:
    run = make(mlflow=mlflow_ref("0123456789abcdef"))
    bare = make(result=None, rows=())
    words = ["status~N", "--columns", "model.name,memory/process_peak_mib,oom", "--sort", "val/accuracy"]
    code, out, err = call("runs", *words)
    assert (code, err) == (0, "")
    keys = "val/accuracy", "model.name", "memory/process_peak_mib", "oom"
    results = "3", "90.00%", "87.50%", "12", "900"
    assert table(out) == [
        ["run", "status", "epochs", "validation", "test", "seconds", "peak MiB", "MLflow id", *keys],
        [value_of(run, "run_dir"), "FINISHED", *results, "01234567", "90.00%", "compact", "900", "false"],
        [value_of(bare, "run_dir"), "RUNNING", "", "", "", "", "", "", "", "compact", "", "false"],
    ]


@pytest.mark.parametrize(("width", "framed"), [(80, False), (200, True)])
def test_a_narrow_terminal_gets_full_lines_without_a_frame(
    make: Make, call: Call, monkeypatch: pytest.MonkeyPatch, width: int, framed: bool
) -> None:
    run = make(error="too little " * 3)
    out = Console(file=StringIO(), force_terminal=True, color_system=None, width=width, soft_wrap=True)
    monkeypatch.setattr("captcha_exp.cli.output.get_console", lambda: out)
    call("runs", "--columns", "error")
    assert isinstance(out.file, StringIO)
    lines = out.file.getvalue().splitlines()
    assert ("│" in lines[-2]) is framed
    (line,) = [line for line in lines if value_of(run, "run_dir") in line]
    assert "FINISHED" in line
    assert "too little too little too little" in line


def test_markup_is_printed_as_text(make: Make, call: Call) -> None:
    make(error="[red]no[/red] [/]")
    assert table(call("runs", "--columns", "error")[1])[1][-1] == "[red]no[/red] [/]"


def test_json_has_run_json_and_the_requested_values(make: Make, call: Call) -> None:
    run = make(rows=(ROWS[0], {"train/loss": float("nan")}))
    make()
    keys = "train/loss,train.epochs,val/accuracy,test/accuracy"
    code, out, _ = call("runs", "--json", "--limit", "1", "--columns", keys)
    assert code == 0
    (values,) = json.loads(out, parse_constant=pytest.fail)
    assert values == {
        "run_dir": str(run.run_dir),
        **run.info.model_dump(mode="json"),
        "values": {"train/loss": None, "train.epochs": 2, "test/accuracy": 0.875},
    }


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("val/accuracy", 0.98765, "98.77%"),
        ("test/accuracy_low", 0.5, "50.00%"),
        ("val/char_accuracy", 1.0, "100.00%"),
        ("memory/process_peak_mib", 1234.5678, "1,235"),
        ("train.learning_rate", 1e-05, "1e-05"),
        ("train/loss", float("inf"), "inf"),
        ("train.batch_size", 1_000_000, "1000000"),
        ("train.patience", None, "null"),
        ("train.deterministic", True, "true"),
        ("model.channels", [4, 8], "[4, 8]"),
        ("captcha.alphabet", "äé", "äé"),
    ],
)
def test_format_value(key: str, value: object, text: str) -> None:
    assert format_value(key, value) == text


# -- damage --------------------------------------------------------------------------------------------------


def test_damaged_metrics_are_reported_and_ignored(make: Make, call: Call) -> None:
    run, whole = make(), make()
    path = run.run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0].replace(b"0.5", b"0.6") + b"\xff\n" + b"".join(lines[1:]))
    code, out, err = call("runs", "--json", "--sort", "val/accuracy")
    assert (code, [each["run_dir"] for each in json.loads(out)]) == (0, dirs_of([whole, run]))
    assert err.startswith(f"warning: {path}: line 1, 2 is damaged; restore it")
    path.write_bytes(lines[0])
    _, _, err = call("runs", "--json", "--sort", "val/accuracy")
    assert err.startswith(f"warning: {path}: {len(lines) - 1} of {len(lines)} lines are missing; restore it")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"seed: [1", "while parsing .+"),
        (b"", "not a mapping of keys to values"),
        (b"- 1", "not a mapping of keys to values"),
        (b"a: &a\n  b: *a", r"the alias \*a has no complete anchor before it"),
        (b"a: 2026-03-01", "Object of type date is not JSON serializable"),
        (b"a: !!python/name:os.system", "could not determine a constructor .+"),
        (b"a: " + b"[" * 100_000, "more than 64 levels of nesting"),
        (b"- " * 40_000, "more than 64 levels of nesting"),
        (b"a: \xff", ".+ codec can't decode .+"),
    ],
    ids=["cut", "empty", "list", "circle", "date", "tag", "deep", "deep list", "bytes"],
)
def test_a_damaged_config_is_reported_and_ignored(make: Make, call: Call, text: bytes, reason: str) -> None:
    run, whole = make(), make()
    rewrite(run.run_dir, "config.yaml", text)
    code, out, err = call("runs", "--json", "--sort", "train.batch_size", "--columns", "test/accuracy")
    assert code == 0
    assert [each["run_dir"] for each in json.loads(out)] == dirs_of([whole, run])
    assert json.loads(out)[1]["values"] == {"test/accuracy": 0.875}
    path = re.escape(str(run.run_dir / "config.yaml"))
    assert re.fullmatch(f"warning: {path}: cannot be read: {reason}; restore it\n", err)


def test_a_run_without_a_config_is_listed_with_a_warning(make: Make, call: Call) -> None:
    run = make()
    make()
    path = run.run_dir / "config.yaml"
    path.unlink()
    code, out, err = call("runs", "--json", "--sort", "train.batch_size")
    assert (code, err) == (
        0,
        f"warning: {path}: is missing; restore it\n",
    )
    assert json.loads(out)[-1]["run_dir"] == str(run.run_dir)


def test_unusual_values_of_run_json_are_listed(make: Make, call: Call) -> None:
    run = make(result=None)
    edit_record(run.run_dir, name="[x]", sweep="there", error="[/]\ncaf\udce9")
    words = ["--columns", "name,run_id,oom,error", "--sort", "status", "name!=x"]
    code, out, err = call("runs", *words)
    assert (code, err) == (0, "")
    label = run.run_dir.relative_to(run.run_dir.parents[1]).as_posix()
    odd = ["[x]", "null", "false", r"[/]\ncaf\xe9"]
    assert table(out)[1] == [label, "RUNNING", "", "", "", "", "", "", *odd]
    (listed,) = json.loads(call("runs", "--json")[1])
    assert (listed["error"], listed["sweep"]) == ("[/]\ncaf\udce9", "there")


def test_an_invalid_run_json_is_reported_and_not_listed(make: Make, call: Call) -> None:
    odd, good = make(result=None), make()
    edit_record(odd.run_dir, result=["[b]"])
    code, out, err = call("runs", "--json")
    assert [each["run_dir"] for each in json.loads(out)] == [str(good.run_dir)]
    assert code == 0
    assert "run.json: is not a valid run.json: result: Input should be a valid dictionary" in err


def test_files_are_read_only_if_a_key_needs_them(make: Make, call: Call) -> None:
    run = make()
    (run.run_dir / "config.yaml").write_text("{")
    (run.run_dir / "metrics.jsonl").write_text("{")
    assert list_dirs(call, "status=FINISHED", "--sort", "seconds") == dirs_of([run])


# -- diff ----------------------------------------------------------------------------------------------------


def add_files(run: Run, threads: int = 2, key: str = "k") -> Run:
    """Add the other files of a finished run."""
    device = {"threads": threads, "flags": [1, 2]}
    run.write_json("environment.json", environment_json(python="3.11", git={"commit": "abc"}, device=device))
    dataset = dataset_json(
        key=key,
        provenance={"captcha": {}, "source": {"count": 300, "fonts": []}, "dependencies": {}},
        images_sha256="cd" * 32,
        splits={"train": 150},
        files=[{"file": "a.png", "sha256": "", "label": ""}],
        rejected=[{"file": "b.png", "reason": "is cut short"}],
    )
    run.write_json("dataset.json", dataset)
    return run


def diff_json(call: Call, *words: str) -> dict[str, Any]:
    code, out, err = call("diff", "--json", *words)
    assert (code, err) == (0, "")
    values: dict[str, Any] = json.loads(out)
    return values


def test_diff_lists_differences_by_section(make: Make, call: Call, tiny: Config) -> None:
    first = add_files(make())
    second = add_files(
        make(
            with_train(tiny, batch_size=32, patience=3),
            test=0.9,
            result=result_summary(weights_sha256="ef" * 32),
        ),
        threads=1,
        key="l",
    )
    assert diff_json(call, str(first.run_dir), str(second.run_dir)) == {
        "config": {"train.batch_size": [64, 32], "train.patience": [None, 3]},
        "environment": {"device.threads": [2, 1]},
        "dataset": {"key": ["k", "l"]},
        "metrics": {"test/accuracy": [0.875, 0.9]},
        "result": {
            "status": ["FINISHED", "FINISHED"],
            "error": [None, None],
            "epochs": [3, 3],
            "best_epoch": [2, 2],
            "weights_sha256": ["ab" * 32, "ef" * 32],
        },
    }


def test_diff_with_all_lists_equal_values(make: Make, call: Call) -> None:
    first, second = add_files(make()), add_files(make())
    values = diff_json(call, "--all", str(first.run_dir), str(second.run_dir))
    assert values["config"]["train.batch_size"] == [64, 64]
    assert values["environment"]["device.flags"] == [[1, 2], [1, 2]]
    assert (
        values["dataset"] | {"provenance.source.count": [300, 300], "rejected": [1, 1]} == values["dataset"]
    )
    assert values["dataset"]["splits.train"] == [150, 150]
    assert "files" not in values["dataset"]
    assert values["metrics"]["val/accuracy"] == [0.9, 0.9]


def test_diff_of_equal_runs(make: Make, call: Call) -> None:
    add_files(make())
    equal_sections = "".join(
        f"{title}: equal\n" for title in ("config", "environment", "dataset", "metrics", "result")
    )
    assert call("diff", "latest", "latest") == (0, equal_sections, "")


def test_diff_table(make: Make, call: Call) -> None:
    first = add_files(make())
    rows = ({**ROWS[0], "val/accuracy": 0.92, "memory/eval_peak_mib": 5.0}, {"train/loss": float("nan")})
    second = add_files(make(rows=rows, result=result_summary(best_epoch=1, weights_sha256="ef" * 32)))
    code, out, err = call("diff", str(first.run_dir), str(second.run_dir))
    assert (code, err) == (0, "")
    assert out.splitlines()[:3] == ["config: equal", "environment: equal", "dataset: equal"]
    assert out.splitlines()[3].strip() == "metrics: 5 of 6 differ"
    cells = table(out)
    assert cells[0] == ["", value_of(first, "run_dir"), value_of(second, "run_dir"), "difference"]
    assert cells[1:6] == [
        ["val/accuracy", "90.00%", "92.00%", "+2 points"],
        ["train/loss", "2", "3", "+1"],
        ["memory/process_peak_mib", "900", "700", "-200.0"],
        ["speed/images_per_second", "20", "10", "-10"],
        ["memory/eval_peak_mib", "-", "5", ""],
    ]
    assert cells[-2:] == [
        ["best_epoch", "2", "1", "-1"],
        ["weights_sha256", "abababababab", "efefefefefef", ""],
    ]


def test_diff_names_missing_files(make: Make, call: Call) -> None:
    whole, early = add_files(make()), make(rows=(), result=None, status="FAILED", error="[/] no\nroom")
    code, out, err = call("diff", str(whole.run_dir), str(early.run_dir))
    assert (code, err) == (0, "")
    assert out.splitlines()[:4] == [
        "config: equal",
        *(
            f"{path.stem}: {path}: is missing; restore it; captcha-exp train --resume=never starts a new run"
            for path in (early.run_dir / "environment.json", early.run_dir / "dataset.json")
        ),
        "metrics: 5 of 5 differ",
    ]
    assert table(out)[-5:-3] == [
        ["status", "FINISHED", "FAILED", ""],
        ["error", "null", r"[/] no\nroom", ""],
    ]
    code, out, err = call("diff", "--json", str(whole.run_dir), str(early.run_dir))
    assert [title for title, values in json.loads(out).items() if values is None] == [
        "environment",
        "dataset",
    ]
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "5"])
def test_diff_reports_damaged_files(make: Make, call: Call, text: str) -> None:
    run = add_files(make())
    (run.run_dir / "environment.json").write_text(text)
    code, out, err = call("diff", "latest", "latest")
    assert (code, err) == (0, "")
    assert out.splitlines()[1].startswith(
        f"environment: {run.run_dir / 'environment.json'}: was edited, or is damaged "
    )
    assert len(out.splitlines()) == 5


def test_a_long_value_is_truncated(make: Make, call: Call, tiny: Config) -> None:
    first = make()
    second = make(replace(tiny, data=replace(tiny.data, cache="c" * 300)))
    cells = table(call("diff", str(first.run_dir), str(second.run_dir))[1])
    assert cells[1][2] == "c" * 100 + "... (300 characters)"


def test_diff_of_an_unknown_run(make: Make, call: Call) -> None:
    make()
    code, out, err = call("diff", "latest", "nosuchrun")
    assert (code, out) == (2, "")
    assert err.startswith("'nosuchrun' is not a run: ")


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        (1, 1.0, True),
        (True, 1, False),
        (None, "null", False),
        ("1", 1, False),
        (float("nan"), float("nan"), True),
        (float("nan"), 1.0, False),
        ([1, 2], [1, 2], True),
        ([1, 2], [2, 1], False),
    ],
)
def test_is_equal(first: object, second: object, equal: bool) -> None:
    assert is_equal(first, second) is equal


@pytest.mark.parametrize(
    ("key", "first", "second", "text"),
    [
        ("val/accuracy", 0.98, 0.9905, "+1.05 points"),
        ("test/accuracy_low", 0.5, 0.25, "-25 points"),
        ("memory/process_peak_mib", 1000.0, 3500.25, "+2,500.2"),
        ("train.batch_size", 64, 128, "+64"),
        ("train/loss", 1.0, float("nan"), ""),
        ("train.patience", None, 3, ""),
        ("train.deterministic", False, True, ""),
    ],
)
def test_format_difference(key: str, first: object, second: object, text: str) -> None:
    assert format_difference(key, first, second) == text


# -- the command ---------------------------------------------------------------------------------------------


def test_runs_and_diff_in_a_shell(make: Make, root: Path, tmp_path_factory: Any) -> None:
    first, second = add_files(make(test=0.9)), add_files(make(test=0.7))

    def shell(*words: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "captcha_exp", *words],
            cwd=tmp_path_factory.mktemp("cwd"),
            env={**os.environ, "CAPTCHA_EXP_ROOT": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    listing = shell("runs", "test/accuracy>80%")
    assert [row[0] for row in table(listing)[1:]] == [value_of(first, "run_dir")]
    short = [str(run.run_dir.relative_to(root / "outputs")) for run in (first, second)]
    assert json.loads(shell("diff", *short, "--json"))["metrics"] == {"test/accuracy": [0.9, 0.7]}


def test_runs_and_diff_import_neither_torch_nor_mlflow(make: Make, root: Path) -> None:
    make()
    code = (
        "import sys, contextlib, captcha_exp.cli.main\n"
        "for words in (['runs', 'train.batch_size>1', 'val/accuracy>0'], ['diff', 'latest', 'latest']):\n"
        "    sys.argv = ['captcha-exp', *words]\n"
        "    with contextlib.suppress(SystemExit): captcha_exp.cli.main.main()\n"
        "print('loaded:', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.rpartition("loaded:")[2].split()}
    assert "yaml" in loaded
    assert loaded & {"torch", "mlflow", "hydra", "matplotlib", "numpy"} == set()


def test_many_rows_are_printed_as_rich_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    columns, rows = ("run", "値", "n"), [("a", "日本", "1"), ("bcd", "", "1,000"), ("\x1b[1m", "x", "")]
    output.print_table(output.make_table(columns, rows, right=("n",)))
    expected = capsys.readouterr().out
    output.print_rows(columns, rows, right=("n",))
    assert capsys.readouterr().out == expected
    assert len(expected.splitlines()) == len(rows) + 4
