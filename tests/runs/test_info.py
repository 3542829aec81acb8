"""The records run.json and sweep.json: types, round trip, and damaged files."""

import json
import math
import os
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from conftest import edit_record, sweep_info, write_record

from captcha_exp.errors import UserError
from captcha_exp.runs import Lineage, RecordedDir, RunInfo, RunLink, SweepInfo, find_stale, list_runs
from captcha_exp.runs.content import PlannedMemory
from captcha_exp.runs.info import (
    CHECKSUM_KEY,
    DAMAGED_HINT,
    InfoT,
    JobInfo,
    MlflowRef,
    OutOfMemory,
    Record,
    ResultSummary,
    Resumption,
    Skipped,
    TimeLimit,
    now,
)
from captcha_exp.runtime.files import sha256_of_json
from captcha_exp.runtime.process import identify_process

KINDS: tuple[type[Record], ...] = (RunInfo, SweepInfo)
OF_TWO_FIELDS = sha256_of_json({"format": 2, "status": "RUNNING"})
ODD_NAME = "caf\udce9 \u2028 \U0001f600.png"
"""a file name that is not valid UTF-8"""
WINTER = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=timezone(timedelta(hours=-3)))
MLFLOW = MlflowRef(uri=f"sqlite:///{ODD_NAME}", experiment_id="1", run_id=None, closed=False)


def full_run_info() -> RunInfo:
    """Return a record in which every field differs from its default."""
    return RunInfo(
        **dict(identify_process()),
        status="KILLED",
        stop_reason="time limit",
        error=ODD_NAME,
        name="tiny",
        started=WINTER,
        ended=WINTER,
        mlflow=MLFLOW,
        config_sha256="ab",
        num_metrics_rows=7,
        lineage=Lineage(
            extends=RunLink(run_dir=f"/{ODD_NAME}", run_id="x"),
            reproduces=RunLink(run_dir=None, run_id="y", store="sqlite:///a.db"),
        ),
        resumed=[
            Resumption(at=WINTER, host="a"),
            Resumption(at=WINTER, host="b", changed={"python": ("3.11", None)}),
        ],
        tags={"reproduces": ODD_NAME},
        warnings=[ODD_NAME],
        result=ResultSummary(
            epochs=3,
            best_epoch=2,
            val_accuracy=0.1 + 0.2,
            test_accuracy=1.0,
            weights_sha256="ef",
            seconds=1e-9,
            process_peak_mib=0.0,
        ),
        oom=OutOfMemory(
            during="evaluation", epoch=1, step=2, peak_mib=3.5, predicted_mib=(1.0, 2.0), remedies=["a=1"]
        ),
        skipped=Skipped(remedies=["b=2"]),
        files={ODD_NAME: "01"},
    )


def full_sweep_info() -> SweepInfo:
    """Return a record in which every field differs from its default."""
    return SweepInfo(
        **dict(identify_process()),
        status="FAILED",
        error=ODD_NAME,
        name="grid",
        started=WINTER,
        ended=WINTER,
        mlflow=MLFLOW,
        time_limit=TimeLimit(max_minutes=1.5, deadline=WINTER),
        code_sha256="ab",
        predicted=[None, PlannedMemory(fits="unsure", process_mib=(1.0, 2.0), budget_mib=(3.0, 4.0))],
        parallelism=2,
        jobs=[
            JobInfo(
                number=n,
                name=ODD_NAME,
                swept={"data.path": ODD_NAME},
                choices={"model": "compact"},
                sha256="cd",
            )
            for n in (1, 2)
        ],
    )


def make_record(directory: Path, kind: type[InfoT]) -> Path:
    """Write a record of this kind in a new directory."""
    info = full_run_info() if kind is RunInfo else full_sweep_info()
    directory.mkdir(parents=True)
    RecordedDir(directory, info).save()
    assert (directory / kind.filename).is_file()
    return directory


# -- round trip ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("info", [full_run_info(), full_sweep_info()], ids=["run", "sweep"])
def test_a_record_round_trips(tmp_path: Path, info: Record) -> None:
    RecordedDir(tmp_path, info).save()
    loaded = type(info).load(tmp_path)
    assert loaded == info


@pytest.mark.parametrize("kind", KINDS)
def test_a_time_keeps_its_zone_and_its_microseconds(tmp_path: Path, kind: type[Record]) -> None:
    directory = make_record(tmp_path / "a", kind)
    text = json.loads((directory / kind.filename).read_text())["started"]
    assert text == "2026-01-02T03:04:05.000006-03:00"
    assert kind.load(directory).started.utcoffset() == timedelta(hours=-3)


@pytest.mark.parametrize("kind", KINDS)
def test_fields_of_a_later_version_are_kept(tmp_path: Path, kind: type[Record]) -> None:
    directory = make_record(tmp_path / "a", kind)
    values = json.loads((directory / kind.filename).read_text())
    ref = values["mlflow"] | {"later": [1]}
    edit_record(directory, kind.filename, later={"a": [None, ODD_NAME]}, mlflow=ref)

    recorded = RecordedDir(directory, kind.load(directory))
    recorded.update_mlflow(closed=True)
    recorded.update(status="FINISHED")

    saved = json.loads((directory / kind.filename).read_text())
    assert saved == values | {
        "status": "FINISHED",
        "later": {"a": [None, ODD_NAME]},
        "mlflow": ref | {"closed": True},
        "checksum": saved["checksum"],
    }


def test_fields_that_an_earlier_version_did_not_write_have_a_default(tmp_path: Path) -> None:
    keys = ("format", "name", "status", "started", "host", "pid", "process_started")
    values = full_run_info().model_dump(include=set(keys))
    write_record(tmp_path, "run.json", values)
    info = RunInfo.load(tmp_path)
    assert (info.stop_reason, info.oom, info.skipped, info.result) == (None, None, None, None)
    assert (info.lineage, info.files, info.mlflow) == (Lineage(), {}, None)


def test_numbers_that_are_not_finite_round_trip(tmp_path: Path) -> None:
    directory = make_record(tmp_path / "a", RunInfo)
    result = full_run_info().model_dump()["result"] | {"val_accuracy": math.nan, "seconds": math.inf}
    edit_record(directory, result=result)
    loaded = RunInfo.load(directory).result
    assert loaded is not None
    assert math.isnan(loaded.val_accuracy)
    assert loaded.seconds == math.inf


# -- damaged files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read: Expecting value: line 1 column 1 (char 0)"),
        ("{", "cannot be read: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[" * 100_000, "cannot be read: more than 64 levels of nesting"),
        ("[" * 65 + "]" * 65, "cannot be read: more than 64 levels of nesting"),
        ('{"pid": 1e400}', "cannot be read: the number 1e400 is too large"),
        (f'{{"pid": {"1" * 400}}}', "cannot be read: an integer of 400 digits"),
        ("\udcff", "cannot be read: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ("[]", "cannot be read: not an object with keys and values"),
        ("5", "cannot be read: not an object with keys and values"),
        ("null", "cannot be read: not an object with keys and values"),
        ("{}", "cannot be read: has no checksum: it was edited, or is damaged"),
        ('{"format": 2, "status": "RUNNING"}', "cannot be read: has no checksum: it was edited"),
        ('{"checksum": 5}', "cannot be read: does not match its checksum: it was edited, or is damaged"),
        (
            json.dumps({"status": "RUNNING", "format": 2} | {CHECKSUM_KEY: OF_TWO_FIELDS}),
            "is not a valid NAME: host: Field required; pid: Field required; ",
        ),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, kind: type[Record], text: str, message: str) -> None:
    path = tmp_path / kind.filename
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as caught:
        kind.load(tmp_path)
    (line,) = caught.value.lines
    assert line.startswith(f"{path}: {message.replace('NAME', kind.filename)}")
    assert len(line.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no FIFOs")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["FIFO", "directory", "/dev/zero"])
def test_only_a_regular_file_is_read(tmp_path: Path, kind: type[Record], target: str) -> None:
    path = tmp_path / kind.filename
    if target == "FIFO":
        os.mkfifo(path)
    elif target == "directory":
        path.mkdir()
    else:
        path.symlink_to(target)
    with pytest.raises(
        UserError, match=rf"{kind.filename}: cannot be read: (not a regular file|.*directory)"
    ):
        kind.load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: Path, kind: type[Record]) -> None:
    path = make_record(tmp_path / "a", kind) / kind.filename
    content, expected = path.read_bytes(), kind.load(path.parent)
    found = 0
    offsets = range(0, len(content), 7)
    for offset in offsets:
        flipped = bytearray(content)
        flipped[offset] ^= 1 << offset % 8
        path.write_bytes(flipped)
        try:
            assert kind.load(path.parent) == expected
        except UserError as error:
            found += "record format" not in str(error) and "0.1" not in str(error)
    assert found > len(offsets) // 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_one_line(tmp_path: Path, kind: type[Record]) -> None:
    with pytest.raises(UserError, match=rf"{kind.filename}: cannot be read: .*No such file or directory"):
        kind.load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["name", "started", "host", "pid", "process_started"])
def test_a_missing_field_is_named(tmp_path: Path, kind: type[Record], key: str) -> None:
    path = make_record(tmp_path / "a", kind) / kind.filename
    values = json.loads(path.read_text())
    del values[key], values["mlflow"]["uri"]
    write_record(path.parent, path.name, values)
    with pytest.raises(UserError) as caught:
        kind.load(path.parent)
    mistakes = f"{key}: Field required; mlflow.uri: Field required"
    (line,) = caught.value.lines
    assert line == f"{path}: is not a valid {kind.filename}: {mistakes}; {DAMAGED_HINT}"


WRONG_TYPES = [
    ("name", 1, "name: Input should be a valid string"),
    ("mlflow", "x", "mlflow: Input should be a valid dictionary or instance of MlflowRef"),
    (
        "mlflow",
        {"run_id": 12},
        "mlflow.uri: Field required; mlflow.run_id: Input should be a valid string",
    ),
    ("mlflow", MLFLOW.model_dump() | {"run_id": 12}, "mlflow.run_id: Input should be a valid string"),
    ("pid", "7", "pid: Input should be a valid integer"),
    ("pid", -1, "pid: Input should be greater than 0"),
    ("process_started", None, "process_started: Input should be a valid number"),
    ("host", [1] * 99, "host: Input should be a valid string"),
    ("status", "DIED", "status: Input should be 'RUNNING', 'FINISHED', 'FAILED' or 'KILLED'"),
    ("stop_reason", "x", "stop_reason: Input should be 'SIGINT', 'SIGTERM', 'time limit' or 'killed'"),
    ("error", 5, "error: Input should be an instance of str"),
    ("started", None, "started: Input should be a valid datetime"),
    ("started", "a\nb", "started: Input should be a valid datetime or date, input is too short"),
    ("started", "2026-01-01T00:00:00", "started: Input should have timezone info"),
    (
        "ended",
        "\udcff",
        "ended: Input should be a valid string, unable to parse raw data as a unicode string",
    ),
]


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        *((kind, *case) for kind in KINDS for case in WRONG_TYPES),
        (RunInfo, "result", [1], "result: Input should be a valid dictionary or instance of ResultSummary"),
        (RunInfo, "result", 0, "result: Input should be a valid dictionary or instance of ResultSummary"),
        (RunInfo, "lineage", ["a"], "lineage: Input should be a valid dictionary or instance of Lineage"),
        (RunInfo, "lineage", None, "lineage: Input should be a valid dictionary or instance of Lineage"),
        (RunInfo, "config_sha256", None, "config_sha256: Input should be a valid string"),
        (RunInfo, "warnings", ["a", 5], "warnings.1: Input should be an instance of str"),
        (RunInfo, "files", {"a": None}, "files.a: Input should be a valid string"),
        (SweepInfo, "jobs", {}, "jobs: Input should be a valid list"),
        (
            SweepInfo,
            "jobs",
            [{}],
            "jobs.0.number: Field required; jobs.0.name: Field required; "
            "jobs.0.swept: Field required; jobs.0.choices: Field required; jobs.0.sha256: Field required",
        ),
        (
            SweepInfo,
            "predicted",
            [1],
            "predicted.0: Input should be a valid dictionary or instance of PlannedMemory",
        ),
        (SweepInfo, "predicted", [None], "content: Value error, 1 plans of 2 jobs"),
        (SweepInfo, "jobs", [], "jobs: List should have at least 1 item after validation, not 0"),
        (SweepInfo, "parallelism", True, "parallelism: Input should be a valid integer"),
        (SweepInfo, "time_limit", {"max_minutes": 1}, "time_limit.deadline: Field required"),
    ],
)
def test_a_field_of_the_wrong_type_is_one_line(
    tmp_path: Path, kind: type[Record], key: str, value: object, message: str
) -> None:
    directory = make_record(tmp_path / "a", kind)
    edit_record(directory, kind.filename, **{key: value})
    with pytest.raises(UserError) as caught:
        kind.load(directory)
    path = directory / kind.filename
    assert caught.value.lines == (f"{path}: is not a valid {path.name}: {message}; {DAMAGED_HINT}",)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [1, 3, "2"])
def test_a_record_of_another_format_is_rejected(tmp_path: Path, kind: type[Record], value: object) -> None:
    directory = make_record(tmp_path / "a", kind)
    edit_record(directory, kind.filename, format=value)
    with pytest.raises(UserError) as caught:
        kind.load(directory)
    assert caught.value.lines == (
        f"{directory}: was written by a version with record format {value!r}, which this version cannot "
        f"read; train again, or use a version with record format {value!r}",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_of_version_0_1_is_rejected(tmp_path: Path, kind: type[Record]) -> None:
    path = make_record(tmp_path / "a", kind) / kind.filename
    values = json.loads(path.read_text())
    del values["format"], values["started"], values["checksum"]
    path.write_text(json.dumps(values))
    with pytest.raises(
        UserError, match=r"a: was written by captcha_exp 0\.1, which this version cannot read"
    ):
        kind.load(path.parent)


@pytest.mark.parametrize("value", ["\udcff", math.nan, [[[]]], {"a": {"b": None}}])
@pytest.mark.parametrize("kind", KINDS)
def test_any_value_of_an_unknown_field_can_be_written_back(
    root: Path, kind: type[Record], value: object
) -> None:
    nested = value
    for _ in range(50):
        nested = [nested]
    directory = make_record(root / "outputs" / "2026-01-02" / "030405-a", kind)
    edit_record(directory, kind.filename, status="RUNNING", process_started=1.0, x=value, y=nested)
    (stale,) = find_stale()
    stale.finalize()
    assert kind.load(directory).status == "KILLED"
    assert repr(json.loads((directory / kind.filename).read_text())["x"]) == repr(value)


# -- many runs -----------------------------------------------------------------------------------------------


def test_damaged_records_are_warnings_and_the_others_are_listed(root: Path) -> None:
    day = root / "outputs" / "2026-01-02"
    directories = [make_record(day / f"00000{number}-a", RunInfo) for number in range(4)]
    edit_record(directories[1], pid="x")
    (directories[2] / "run.json").write_text("[" * 100_000)
    (day / "grid").mkdir()
    write_record(day / "grid", "sweep.json", sweep_info(jobs=5))
    warnings: list[str] = []
    found = sorted(run.run_dir for run in list_runs(warnings.append))
    assert found == [directories[0], directories[3]]
    assert [line.partition(": ")[0] for line in sorted(warnings)] == [
        str(directory / "run.json") for directory in directories[1:3]
    ]
    owed = [directories[0], directories[3]]  # to MLflow
    assert [stale.run_dir for stale in find_stale()] == owed


def test_only_fields_of_the_record_can_be_updated(tmp_path: Path) -> None:
    recorded = RecordedDir(make_record(tmp_path / "a", RunInfo), full_run_info())
    with pytest.raises(AssertionError):
        recorded.update(stattus="FINISHED")


def test_close_writes_status_end_and_reason(tmp_path: Path) -> None:
    for kind in KINDS:
        directory = make_record(tmp_path / kind.filename, kind)
        recorded: RecordedDir[Any] = RecordedDir(directory, kind.load(directory))
        before = now()
        recorded.close("KILLED", stop_reason="SIGINT")
        info = kind.load(directory)
        assert (info.status, info.error, info.stop_reason) == ("KILLED", None, "SIGINT")
        assert info.ended is not None
        assert before <= info.ended <= now()
        assert info.pid == os.getpid()
