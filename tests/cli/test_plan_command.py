"""`captcha-exp plan`: tables, JSON, advice, mistakes, and the JSON schema."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Call
from pydantic import ValidationError

from captcha_exp import compose, load
from captcha_exp.cli import plan_json, plan_report
from captcha_exp.config import to_dict
from captcha_exp.memory.plan import Plan
from captcha_exp.runtime.paths import conf_dir

WORDS = ("plan", *TINY, "tracking=none")
SIZES = ("--batch-sizes", "8,16")
GPU_FILE = (conf_dir() / "gpu/gtx1650.yaml").read_text()


def unwrap(text: str) -> str:
    """Remove the line breaks of a narrow terminal."""
    return " ".join(text.split())


# -- output -------------------------------------------------------------------------------------------------


def test_json_has_every_field_with_its_type(shell: Call, root: Path) -> None:
    code, out, err = shell(*WORDS, *SIZES, "--json", "device.vram_budget_mib=2000")
    assert (code, err) == (0, "")
    values = json.loads(out)
    assert list(values) == ["gpu", "precision", "images", "budget_mib", "plans", "max_batch_size"]
    assert values["gpu"] == to_dict(load(compose()).gpu)
    assert values["precision"] == "fp32"
    assert set(values["images"]) == {"train", "validation", "test"}
    assert sum(values["images"].values()) == 300
    assert values["budget_mib"] == [2000, 2000]
    assert values["max_batch_size"] == values["images"]["train"]
    assert [plan["batch_size"] for plan in values["plans"]] == [8, 16]
    for plan in values["plans"]:
        assert set(plan) == set(Plan.__dataclass_fields__)
        assert type(plan["batch_size"]) is int
        for key in ("tensors_mib", "state_mib", "activations_mib", "images_mib"):
            assert type(plan[key]) is float
        for key in ("workspace_mib", "reserved_mib", "process_mib"):
            low, high = plan[key]
            assert 0 <= low <= high
        for kind in ("training", "evaluation"):
            assert set(plan[kind]) == {"allocated_mib", "reserved_mib"}
        assert plan["fits"] == "fits"
    assert list(root.iterdir()) == []


def test_table_has_a_row_for_each_batch_size_and_the_largest(shell: Call, root: Path) -> None:
    code, out, err = shell(*WORDS, *SIZES, "device.vram_budget_mib=2000", COLUMNS="120")
    assert (code, err) == (0, "")
    assert out.startswith("tiny in fp32 on any CUDA GPU, 2,000 MiB for the process\n")
    assert re.findall(r"│ +(\d+) │.*│ fits +│", out) == ["8", "16"]
    assert re.search(r"the whole training split, \d+ images, fits in one batch", out)
    assert list(root.iterdir()) == []


def test_without_a_budget_there_is_no_verdict(call: Call) -> None:
    code, out, _ = call(*WORDS, *SIZES)
    assert code == 0
    assert "no verdict" in out
    assert "device.vram_budget_mib=MIB or --gpu" in unwrap(out)
    assert "largest" not in out
    values = json.loads(call(*WORDS, *SIZES, "--json")[1])
    assert values["budget_mib"] is values["max_batch_size"] is None
    assert [plan["fits"] for plan in values["plans"]] == [None, None]


def test_advise_is_suggested_if_nothing_fits(call: Call) -> None:
    code, out, _ = call(*WORDS, "--batch-sizes", "8", "device.vram_budget_mib=10")
    assert code == 0
    assert "no batch size fits; captcha-exp plan --advise suggests other overrides" in unwrap(out)


def test_unsure_is_explained(call: Call) -> None:
    out = call(*WORDS, "--batch-sizes", "8", "device.vram_budget_mib=400")[1]
    assert "unsure is treated as does not fit" in out
    assert "unsure" not in call(*WORDS, "--batch-sizes", "8", "device.vram_budget_mib=2000")[1]


@pytest.mark.parametrize(
    ("text", "batch_size", "sizes"),
    [
        (None, 64, [16, 32, 64, 128, 256, 512]),
        (None, "auto", [16, 32, 64, 128, 256, 512]),
        (None, 1, [1, 2, 4, 8]),
        ("16,8,16", 64, [16, 8]),
        ("1000000", 64, [1_000_000]),
    ],
)
def test_batch_sizes_of_the_flag_or_around_that_of_the_config(
    text: str | None, batch_size: int | str, sizes: list[int]
) -> None:
    assert plan_report.parse_batch_sizes(text, batch_size) == sizes


INVALID_SIZES = ["", "0", "-8", "8,", ",8", "8;16", "8, 16", "8.0", "1e3", "eight", "1000001", "08", "8,0"]


@pytest.mark.parametrize("text", INVALID_SIZES)
def test_invalid_batch_sizes_are_one_line(call: Call, root: Path, text: str) -> None:
    code, out, err = call(*WORDS, f"--batch-sizes={text}")
    assert (code, out) == (2, "")
    assert err.startswith(f"--batch-sizes={text}: must be whole numbers from 1 to 1000000")
    assert err.count("\n") == 1
    assert list(root.iterdir()) == []


# -- GPUs ----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_gpu_is_a_name_or_a_file_with_overrides(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GPU_FILE.replace("NVIDIA GeForce GTX 1650", "mine").replace("max: 950", "max: 800"))

    def plan(*words: str) -> tuple[str, list[float]]:
        code, out, err = call(*WORDS, "--batch-sizes", "8", "--json", *words)
        assert (code, err) == (0, "")
        values = json.loads(out)
        return values["gpu"]["name"], values["budget_mib"]

    assert plan("--gpu", "gtx1650") == ("NVIDIA GeForce GTX 1650", [3707 - 950, 3911])
    assert plan("gpu=gtx1650", "gpu.other_processes_mib.max=0") == ("NVIDIA GeForce GTX 1650", [3707, 3911])
    assert plan("--gpu", str(file)) == plan(f"gpu={file}") == ("mine", [3707 - 800, 3911])
    assert plan(f"gpu={file}", "gpu.other_processes_mib.max=0") == ("mine", [3707, 3911])
    assert plan("gpu.other_processes_mib.max=0", "--gpu", str(file)) == ("mine", [3707, 3911])
    assert plan("gpu=h200", "--gpu", str(file)) == ("mine", [3707 - 800, 3911])


@pytest.mark.parametrize(
    "name", ["my card.yaml", "a,b.yaml", "a(b).yml", "a=b.yaml", "it's.yaml", "ü[1].yaml"]
)
def test_special_characters_in_a_path(call: Call, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(GPU_FILE)
    words = ("--gpu", str(tmp_path / name), "gpu.name=mine")
    code, out, err = call(*WORDS, "--batch-sizes", "8", "--json", *words)
    assert (code, err) == (0, "")
    assert json.loads(out)["budget_mib"] == [3707 - 950, 3911]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, r".*mine\.yaml: no such file"),
        ("a: [1", r".*mine\.yaml: cannot be read as a config: .+"),
        ("- 1\n- 2\n", r".*mine\.yaml: gpu=\[1, 2\]: is a group of keys; .+"),
        (GPU_FILE + "colour: red\n", r'.*mine\.yaml: gpu\.colour="red": unknown key; valid keys: .+'),
        (
            GPU_FILE.replace("other_processes_mib", "other_mib"),
            r".*mine\.yaml: gpu\.other_processes_mib.+\n.*mine\.yaml: gpu\.other_mib: unknown key; .+",
        ),
        (
            GPU_FILE.replace("min: 50", "min: 500"),
            r".*mine\.yaml: gpu\.context_mib: min=500 is greater than max=300",
        ),
        (GPU_FILE.replace("min: 50", "min: -1"), r".*mine\.yaml: gpu\.context_mib\.min=-1: must be .+"),
        (GPU_FILE.replace("min: 50", "min: much"), r'.*mine\.yaml: gpu\.context_mib\.min="much": must be .+'),
    ],
    ids=["missing", "broken", "a list", "unknown key", "misspelled key", "order", "negative", "text"],
)
def test_an_invalid_gpu_file_is_one_line(
    call: Call, root: Path, tmp_path_factory: pytest.TempPathFactory, content: str | None, line: str
) -> None:
    file = tmp_path_factory.mktemp("gpus") / "mine.yaml"
    if content is not None:
        file.write_text(content)
    for words in (["--gpu", str(file)], [f"gpu={file}", "gpu.name=mine"]):
        code, out, err = call(*WORDS, *SIZES, *words)
        assert (code, out) == (2, "")
        assert re.fullmatch(line + "\n", err)
    assert list(root.iterdir()) == []


def test_override_of_a_gpu_file_that_is_a_list(call: Call, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("[1, 2]\n")
    code, _, err = call(*WORDS, *SIZES, "--gpu", str(tmp_path / "mine.yaml"), "gpu.other_processes_mib.max=0")
    assert code == 2
    assert "mine.yaml: gpu=[1, 2]: is a group of keys" in err


def test_an_unknown_gpu_suggests_the_closest_name(call: Call) -> None:
    code, out, err = call(*WORDS, "--gpu", "gtx1659")
    assert (code, out) == (2, "")
    assert err.startswith("gpu=gtx1659: no such file in conf/gpu; did you mean gtx1650? one of ")
    assert err.count("\n") == 1


# -- advice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            [],
            "plan --advise: the memory size is unknown; add device.vram_budget_mib=MIB, or --gpu",
        ),
        (
            ["device.vram_budget_mib=2000", "train.batch_size=auto"],
            "plan --advise: train.batch_size=auto is not a number",
        ),
        (
            ["device.vram_budget_mib=2000", "--batch-sizes", "4,8"],
            "plan --advise: uses train.batch_size only; remove --batch-sizes",
        ),
    ],
)
def test_advice_needs_a_budget_and_a_number(call: Call, root: Path, words: list[str], line: str) -> None:
    code, out, err = call(*WORDS, "--advise", *words)
    assert (code, out) == (2, "")
    assert err.startswith(line)
    assert err.count("\n") == 1
    assert list(root.iterdir()) == []


@pytest.mark.long
def test_advice_without_changes(call: Call) -> None:
    """Also on a GPU that is faster in 16 bits."""
    words = (*WORDS, "--advise", "device.vram_budget_mib=4000", "--gpu", "h200")
    code, out, _ = call(*words)
    assert code == 0
    assert out.endswith("batch size 64 fits without changes\n")
    values = json.loads(call(*words, "--json")[1])
    assert set(values) == {"gpu", "precision", "images", "budget_mib", "batch_size", "advice"}
    assert values["batch_size"] == 64
    assert values["advice"][0]["overrides"] == []


NO_WORKSPACES = ("gpu.cublas_workspace_mib.max=0", "gpu.cudnn_workspace_mib.max=0")
TIGHT = ("train.batch_size=128", "train.eval_batch_size=16", "--gpu", "gtx1650", *NO_WORKSPACES)


def test_advice_is_a_table_of_overrides(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ("plan", "tracking=none", "data.count=300", *TIGHT, "--advise", "device.vram_budget_mib=350")
    code, out, _ = call(*words)
    assert code == 0
    assert "batch size 128 fits with one of these; MiB" in out
    assert "train.micro_batch_size=" in out
    assert "batch norm statistics" in out


# -- independence of the GPU --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps", "auto"])
def test_the_planned_device_may_be_missing(call: Call, root: Path, name: str) -> None:
    code, _, err = call(*WORDS, "--batch-sizes", "8", f"device.name={name}")
    assert (code, err) == (0, "")
    assert list(root.iterdir()) == []


def test_batch_size_auto_is_planned_in_micro_batches(call: Call) -> None:
    words = ("train.batch_size=auto", "train.micro_batch_size=8", "--json")
    code, out, err = call(*WORDS, *SIZES, *words)
    assert (code, err) == (0, "")
    eight, sixteen = (plan["activations_mib"] for plan in json.loads(out)["plans"])
    assert sixteen < 1.5 * eight


def test_a_plan_does_not_use_cuda(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a plan must not use CUDA")

    names = ("current_device", "get_device_properties", "mem_get_info", "init", "_lazy_init", "synchronize")
    for name in (*names, "memory_reserved", "max_memory_reserved", "empty_cache", "set_device"):
        monkeypatch.setattr(torch.cuda, name, forbidden)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in (["device.name=cuda"], ["device.name=cuda:1", "--gpu", "h200"]):
        assert call(*WORDS, "--batch-sizes", "8", *words)[0] == 0


def test_a_missing_device_index_has_no_memory_size(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a simulated machine with one GPU."""

    def properties(device: torch.device) -> None:
        raise AssertionError("Invalid device id")

    monkeypatch.setattr("captcha_exp.runtime.device._is_cuda_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    code, out, _ = call(*WORDS, "--batch-sizes", "8", "device.name=cuda:1", "--json")
    assert code == 0
    assert json.loads(out)["budget_mib"] is None


# -- several GPUs --------------------------------------------------------------------------------------------

MANY = ("plan", *TINY, "tracking=none", "train.batch_size=8")
OTHERS = "gpu.other_processes_mib.max=0"
COMMITTED = conf_dir().parent / "docs/plan.schema.json"


def json_of(call: Call, *words: str) -> dict[str, Any]:
    code, out, err = call(*MANY, "--json", *words)
    assert (code, err) == (0, "")
    plan_json.OUTPUT.validate_json(out)
    values: dict[str, Any] = json.loads(out)
    return values


def test_all_is_every_gpu_except_generic(call: Call, tmp_path: Path) -> None:
    (tmp_path / "gpu").mkdir()
    own = GPU_FILE.replace("NVIDIA GeForce GTX 1650", "mine")
    (tmp_path / "gpu/mine.yaml").write_text(own)
    names = {path.stem for path in (conf_dir() / "gpu").glob("*.yaml")} - {"generic"}
    assert {each["name"] for each in json_of(call, "--gpu", "all")["gpus"]} == names
    found = json_of(call, "--gpu", "all", "--config-dir", str(tmp_path))["gpus"]
    assert {each["name"] for each in found} == names | {"mine"}
    order = [(each["memory_mib"][1], each["gpu"]["name"]) for each in found]
    assert order == sorted(order)
    (tmp_path / "gpu/gtx1650.yaml").write_text(own)  # takes precedence over conf/
    found = json_of(call, "--gpu", "gtx1650,h200", "--config-dir", str(tmp_path))["gpus"]
    assert [each["gpu"]["name"] for each in found] == ["mine", "NVIDIA H200"]


@pytest.mark.long
def test_a_row_equals_the_plan_of_one_gpu(call: Call, tmp_path: Path) -> None:
    """Also with overrides of the GPU, the precision and the budget, and for a file."""
    file = tmp_path / "mine.yaml"
    file.write_text(GPU_FILE.replace("NVIDIA GeForce GTX 1650", "mine"))
    words = ("--batch-sizes", "8,16", "device.precision=bf16", "device.vram_budget_mib=420", OTHERS)
    many = json_of(call, "--gpu", f"h200,{file},h200", *words)
    assert [each["name"] for each in many["gpus"]] == [str(file), "h200"]
    for each in many["gpus"]:
        one = json_of(call, "--gpu", each["name"], *words)
        assert (one["gpu"], one["precision"]) == (each["gpu"], each["precision"]) == (each["gpu"], "bf16")
        assert one["images"] == many["images"]
        assert [one[key] for key in ("budget_mib", "plans", "max_batch_size")] == [
            each[key] for key in ("budget_mib", "plans", "max_batch_size")
        ]


def test_several_gpus_are_a_table(call: Call, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    words = ("--gpu", "h200,gtx1650", "device.precision=fp16")
    code, out, err = call(*MANY, *words, "device.vram_budget_mib=40")
    assert (code, err) == (0, "")
    assert out.startswith("tiny\n")
    rows = re.findall(
        r"│ (NVIDIA .*?) +│ +([\d,]+ to [\d,]+) │ fp16 +│ +8 │.*│ (.*?) +│ +(\S+) │ (.*?) +│", out
    )
    assert rows == [
        ("NVIDIA GeForce GTX 1650", "3,707 to 3,911", "does not fit", "none", "0.12 to 1.1"),
        ("NVIDIA H200", "143,073 to 143,771", "does not fit", "none", "0.7 to 2.8"),
    ]
    assert "NVIDIA GeForce GTX 1650: GTX 1660 Ti in training 0.13 to 0.22" in out
    assert "unsure is treated as does not fit" in unwrap(out)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--gpu", ""], "--gpu=: a name is empty; separate names or files with "),
        (["--gpu", "gtx1650,,h200"], "--gpu=gtx1650,,h200: a name is empty; separate names or files with "),
        (
            ["--gpu", "gtx1659,h200"],
            "gpu=gtx1659: no such file in conf/gpu; did you mean gtx1650? ",
        ),
        (["--gpu", "all", "--advise"], "plan --advise: works for one GPU, but --gpu=all names several; "),
        (["--gpu", "h200,none.yaml"], "none.yaml: no such file"),
        (["--gpu", "all", "gpu.colour=red"], "gpu.colour=red: unknown key"),
        (["--gpu", "all", "--config-dir", "none"], "--config-dir=none: no such directory"),
    ],
)
def test_a_mistake_in_a_list_of_gpus_is_one_line(call: Call, words: list[str], line: str) -> None:
    code, out, err = call(*MANY, *words)
    assert (code, out) == (2, "")
    assert err.startswith(line)
    assert err.count("\n") == 1


@pytest.mark.parametrize("json_flag", [(), pytest.param(("--json",), marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("words", "misfits"),
    [
        (("--gpu", "gtx1650", "device.vram_budget_mib=2000"), []),
        (("--gpu", "gtx1650,h200"), []),
        (("--gpu", "gtx1650", "device.vram_budget_mib=40"), ["8 on NVIDIA GeForce GTX 1650 (does not fit)"]),
        (("--gpu", "h200,gtx1650", "device.vram_budget_mib=600"), ["8 on NVIDIA H200 (unsure)"]),
        (
            ("--gpu", "h200", "--batch-sizes", "4,8", "device.vram_budget_mib=600"),
            ["4 on NVIDIA H200 (unsure)", "8 on NVIDIA H200 (unsure)"],
        ),
    ],
)
def test_must_fit_has_an_exit_code(
    call: Call, words: tuple[str, ...], misfits: list[str], json_flag: tuple[str, ...]
) -> None:
    """The misfits are one line, including unsure, and the plan is printed in any case."""
    code, out, err = call(*MANY, "--must-fit", *json_flag, *words)
    assert code == (3 if misfits else 0)
    found = re.findall(r"batch (\d+ on [^:]+): needs [^;(]+ available [^;(]+(\([^)]+\))", err)
    assert [" ".join(each) for each in found] == misfits
    assert err.count("\n") == (1 if misfits else 0)
    if json_flag:
        plan_json.OUTPUT.validate_json(out)
    else:
        assert "verdict" in out
    assert call(*MANY, *json_flag, *words)[0] == 0


def test_must_fit_checks_train_batch_size_by_default(call: Call) -> None:
    words = ("--gpu", "gtx1650", "--must-fit", "device.vram_budget_mib=2000")
    code, out, err = call(*MANY, *words, "--json")
    assert (code, err) == (0, "")
    assert [plan["batch_size"] for plan in json.loads(out)["plans"]] == [2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "plan --must-fit: the memory size of any CUDA GPU is unknown; add device.vram_budget_mib=MIB"),
        (["--gpu", "gtx1650,generic"], "plan --must-fit: the memory size of generic is unknown; add "),
        (
            ["--gpu", "h200", "train.batch_size=auto"],
            "plan --must-fit: train.batch_size=auto is not a number",
        ),
    ],
)
def test_must_fit_without_a_decision_is_a_mistake(call: Call, words: list[str], line: str) -> None:
    code, out, err = call(*MANY, "--must-fit", *words)
    assert (code, out) == (2, "")
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_must_fit_and_advise_exclude_each_other(call: Call) -> None:
    code, out, err = call(*MANY, "--must-fit", "--advise")
    assert (code, out) == (2, "")
    assert "argument --advise: not allowed with argument --must-fit" in err


def test_auto_is_the_precision_of_the_gpu_of_the_plan(call: Call) -> None:
    code, out, _ = call(*MANY, "--gpu", "h200,gtx1650,t4", "device.precision=auto", "--json")
    precisions = {row["name"]: row["precision"] for row in json.loads(out)["gpus"]}
    assert (code, precisions) == (0, {"gtx1650": "fp32", "t4": "fp16", "h200": "bf16"})
    assert json_of(call, *SIZES, "--gpu", "gtx1650", "device.precision=auto")["precision"] == "fp32"
    assert json_of(call, *SIZES, "--gpu", "h200", "device.precision=auto")["precision"] == "bf16"
    assert json_of(call, *SIZES, "device.precision=auto")["precision"] == "fp32"


def test_assumptions_are_printed(call: Call) -> None:
    words = ("device.precision=auto", "train.micro_batch_size=2", "train.batch_size=auto", "data.count=200")
    code, out, _ = call("plan", "--gpu", "gtx1650,h200", *words, "--batch-sizes", "4,1000000")

    assert code == 0
    text = unwrap(out)
    assert "train.batch_size=auto is planned as the batch sizes above" in text
    assert "a batch is limited to the training split" in text
    assert "largest is searched up to 16 micro-batches, 32 images" in text


# -- the schema ----------------------------------------------------------------------------------------------


def test_the_committed_schema_matches_the_types() -> None:
    assert json.loads(COMMITTED.read_text()) == json.loads(json.dumps(plan_json.schema()))


def test_output_for_one_gpu_and_advice_is_valid(call: Call) -> None:
    assert json_of(call, *SIZES)["max_batch_size"] is None
    assert json_of(call, *SIZES, "--gpu", "gtx1650")["max_batch_size"] is not None
    assert json_of(call, "--advise", "device.vram_budget_mib=4000")["advice"]


def test_output_with_an_unknown_field_is_invalid(call: Call) -> None:
    values = json_of(call, "--gpu", "h200,gtx1650")
    values["gpus"][0]["plans"][0]["unknown"] = 1
    with pytest.raises(ValidationError):
        plan_json.OUTPUT.validate_json(json.dumps(values))


def test_the_documentation_lists_every_field() -> None:
    page = (conf_dir().parent / "docs/plan.md").read_text()
    for name, definition in plan_json.schema()["$defs"].items():
        for field in definition.get("properties", ()) if name != "GpuSpec" else []:
            assert f"`{field}`" in page
