"""Calibration: bounds from made-up measurements, and measuring on the CPU with fake GPU counters."""

import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CPU, infos, make_batch, warnings, with_train
from hypothesis import given, settings
from hypothesis import strategies as st

from captcha_exp import compose, load
from captcha_exp.cli import main
from captcha_exp.config import Bounds, Config, Machine, Precision, gpu_to_yaml, load_gpu
from captcha_exp.errors import ConfigError, RunFailed, UserError
from captcha_exp.memory import calibrate as calibration
from captcha_exp.memory import gpu_probe
from captcha_exp.memory.gpu_profile import (
    CONTEXT_MARGIN_MIB,
    FIRST_TRAINING_STAGE,
    ConvWorkspace,
    GpuMeasurements,
    MemoryStage,
    TimingRound,
    build_gpu_spec,
)
from captcha_exp.runtime import cpu_time, device
from captcha_exp.runtime.console import ProgressBar
from captcha_exp.runtime.paths import conf_dir

MIB = 2**20
GTX = "NVIDIA GeForce GTX 1650"
MACHINE = Machine(("cuda", "cuda:0", "cpu"), 2, Path("/"), {"cuda": "this machine has 1 CUDA GPU"})
GENERIC = load(compose("tracking=none")).gpu

# Other processes use 400 MiB; this one uses 100, 120, 150 and 180 MiB outside its allocator.
STAGES = (
    MemoryStage("the first tensor", 502, 2, 102),
    MemoryStage("the first matrix products", 560, 40, 160),
    MemoryStage("the first convolution in fp32", 630, 80, 230),
    MemoryStage("the first convolution in fp16", 660, 80, 260),
)
MEASUREMENTS = GpuMeasurements(
    name=GTX,
    totals_mib=(3711.25, 3711.25),
    free_before_mib=3311.25,
    stages=STAGES,
    cublas_mib=64.0,
    cublas_config=":4096:8",
    transients=(
        ConvWorkspace("compact", "fp32", 16, 3.5),
        ConvWorkspace("resnet18", "fp32", 64, 90.0),
        ConvWorkspace("resnet18", "fp16", 64, 120.25),
    ),
    deterministic=True,
    rounds=(
        TimingRound("resnet18", 100, {"fp32": 0.2, "bf16": 0.4, "fp16": 0.8}),
        TimingRound("resnet18", 100, {"fp32": 0.2, "bf16": 0.5, "fp16": 0.7}),
        TimingRound("compact", 100, {"fp32": 0.01, "bf16": 0.011, "fp16": 0.009}),
    ),
)


def without_process_memory(stages: tuple[MemoryStage, ...] = STAGES) -> tuple[MemoryStage, ...]:
    """Return the stages as if NVML did not report the process."""
    return tuple(replace(stage, process_mib=None) for stage in stages)


def bounds(figure: Bounds | None) -> tuple[float, float]:
    assert figure is not None
    return figure.min, figure.max


# -- bounds from measurements --------------------------------------------------------------------------------


def test_bounds_match_a_manual_calculation() -> None:
    gpu = build_gpu_spec(MEASUREMENTS, GENERIC)
    assert gpu.name == GTX
    assert bounds(gpu.total_mib) == (3711, 3712)
    assert bounds(gpu.other_processes_mib) == (400, 400)
    assert bounds(gpu.context_mib) == (150, 180 + CONTEXT_MARGIN_MIB)
    assert bounds(gpu.cublas_workspace_mib) == (0, 64)
    assert bounds(gpu.cudnn_workspace_mib) == (3, 121)
    assert bounds(gpu.fp16_speedup) == (0.25, 1.12)
    assert bounds(gpu.bf16_speedup) == (0.4, 0.91)


def test_a_workspace_that_grows_to_the_largest_batch_has_no_measured_maximum() -> None:
    """On an H200 it was 0.34 MiB per image up to 1,024, the largest: 352, which made *fits* wrong."""

    def cudnn_bounds(*mib: float) -> Bounds:
        workspaces = [ConvWorkspace("resnet18", "fp32", 16 * 4**n, each) for n, each in enumerate(mib)]
        measurements = replace(MEASUREMENTS, transients=tuple(workspaces))
        return build_gpu_spec(measurements, GENERIC).cudnn_workspace_mib

    growing = cudnn_bounds(5.5, 22, 88, 352)
    assert bounds(growing) == (5, GENERIC.cudnn_workspace_mib.max)
    assert growing.source.endswith(f"so max is not measured: {GENERIC.cudnn_workspace_mib.source}")
    assert bounds(cudnn_bounds(5.5, 22, 88, 88)) == (5, 88)
    assert bounds(cudnn_bounds(5.5, 9000)) == (5, 9000)
    assert bounds(cudnn_bounds(5.5)) == (5, 6)


def test_sources_describe_the_measurements() -> None:
    gpu = build_gpu_spec(MEASUREMENTS, GENERIC)
    assert gpu.context_mib.source == (
        "measured by NVML for the process, 100 after the first tensor, 120 after the first matrix "
        "products, 150 after the first convolution in fp32, 180 after the first convolution in fp16; "
        f"max includes {CONTEXT_MARGIN_MIB} for kernels loaded later"
    )
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in gpu.cublas_workspace_mib.source
    assert (
        "4 (compact, fp32, batch size 16) to 120 (resnet18, fp16, batch size 64)"
        in gpu.cudnn_workspace_mib.source
    )
    assert "batch sizes 16 to 64, train.deterministic=true" in gpu.cudnn_workspace_mib.source
    assert gpu.fp16_speedup.source == (
        "measured in training steps, 0.25 to 0.29 (resnet18, batch size 100); "
        "1.11 to 1.11 (compact, batch size 100)"
    )


def test_without_process_memory_the_increase_in_use_is_the_context() -> None:
    gpu = build_gpu_spec(replace(MEASUREMENTS, stages=without_process_memory()), GENERIC)
    assert bounds(gpu.other_processes_mib) == (400, 400)
    assert bounds(gpu.context_mib) == (150, 180 + CONTEXT_MARGIN_MIB)
    assert "as the increase of the memory in use on the GPU" in gpu.context_mib.source


def test_without_nvml_the_initial_memory_may_belong_to_any_process() -> None:
    """500 MiB are in use after the start, of any process."""
    gpu = build_gpu_spec(
        replace(MEASUREMENTS, stages=without_process_memory(), free_before_mib=None), GENERIC
    )
    assert bounds(gpu.other_processes_mib) == (0, 500)
    assert bounds(gpu.context_mib) == (50, 580 + CONTEXT_MARGIN_MIB)
    assert "50 to 550 after the first convolution in fp32" in gpu.context_mib.source


def test_varying_memory_of_other_processes_gives_a_range() -> None:
    busier = (*STAGES, MemoryStage("training steps", 1660, 80, 260))
    gpu = build_gpu_spec(replace(MEASUREMENTS, stages=busier), GENERIC)
    assert bounds(gpu.other_processes_mib) == (400, 1400)
    assert bounds(gpu.context_mib) == (150, 180 + CONTEXT_MARGIN_MIB)


def test_inconsistent_driver_figures_give_no_negative_memory() -> None:
    stages = (MemoryStage("a", 100, 90, 80), MemoryStage("b", 100, 90, 80), MemoryStage("c", 100, 120, 80))
    gpu = build_gpu_spec(replace(MEASUREMENTS, stages=stages, free_before_mib=3800.0), GENERIC)
    assert bounds(gpu.other_processes_mib) == (0, 20)
    assert bounds(gpu.context_mib) == (0, CONTEXT_MARGIN_MIB)


def test_unmeasured_figures_keep_the_fallback_bounds() -> None:
    rounds = (TimingRound("resnet18", 100, {"fp32": 0.2, "fp16": 0.1}),)
    gpu = build_gpu_spec(replace(MEASUREMENTS, transients=(), rounds=rounds), GENERIC)
    assert bounds(gpu.fp16_speedup) == (2, 2)
    for figure, known in (
        (gpu.bf16_speedup, GENERIC.bf16_speedup),
        (gpu.cudnn_workspace_mib, GENERIC.cudnn_workspace_mib),
    ):
        assert bounds(figure) == bounds(known)
        assert figure.source == f"not measured, because it failed or was disturbed; {known.source}"


mib = st.floats(0, 200_000)
stages = st.builds(MemoryStage, st.just("it"), mib, mib, st.none() | mib)


@settings(deadline=None)
@given(
    st.builds(
        GpuMeasurements,
        name=st.just(GTX),
        totals_mib=st.tuples(mib, mib),
        free_before_mib=st.none() | mib,
        stages=st.lists(stages, min_size=3, max_size=6).map(tuple),
        cublas_mib=mib,
        cublas_config=st.just(":4096:8"),
        transients=st.lists(
            st.builds(ConvWorkspace, st.just("net"), st.just("fp32"), st.integers(1, 9), mib)
        ).map(tuple),
        deterministic=st.booleans(),
        rounds=st.lists(
            st.builds(TimingRound, st.just("net"), st.just(1), st.just({"fp32": 0.1, "fp16": 0.3}))
        ).map(tuple),
    )
)
def test_bounds_contain_any_measurements(measurements: GpuMeasurements) -> None:
    """GpuSpec itself rejects negative bounds and a min above the max."""
    gpu = build_gpu_spec(measurements, GENERIC)
    assert gpu.cublas_workspace_mib.max >= measurements.cublas_mib
    assert all(gpu.cudnn_workspace_mib.max >= each.mib for each in measurements.transients)
    for stage in measurements.stages:
        if stage.process_mib is not None:
            assert gpu.context_mib.max >= stage.process_mib - stage.reserved_mib + CONTEXT_MARGIN_MIB
            assert bounds(gpu.other_processes_mib)[1] >= stage.used_mib - stage.process_mib


# -- the file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file"),
    [
        (GTX, "nvidia-geforce-gtx-1650"),
        ("Tesla V100-SXM2-16GB", "tesla-v100-sxm2-16gb"),
        ("NVIDIA A100 80GB PCIe (MIG 1g.5gb)", "nvidia-a100-80gb-pcie-mig-1g-5gb"),
    ],
)
def test_the_file_is_named_after_the_gpu(name: str, file: str, tmp_path: Path) -> None:
    path = calibration.gpu_file_path(name, None, str(tmp_path), force=False)
    assert path == tmp_path / "gpu" / f"{file}.yaml"


@pytest.mark.parametrize("path", sorted((conf_dir() / "gpu").glob("*.yaml")), ids=lambda path: path.stem)
def test_gpu_files_round_trip_line_by_line(path: Path, tmp_path: Path) -> None:
    gpu = load_gpu(path)
    written = tmp_path / "gpu.yaml"
    written.write_text(gpu_to_yaml(gpu))
    assert load_gpu(written) == gpu
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert written.read_text().splitlines() == [re.sub(r": (\d+)\.0$", r": \1", line) for line in lines]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("name: NVIDIA H200", "name: ''", "name=.*: must be .+"),
        ("min: 500", "min: 5000", "context_mib: min=5000 is greater than max=1000"),
        ("min: 500", "mni: 500", "context_mib.mni=500: .+"),
        ("bf16_speedup:", "speed:", "bf16_speedup: is missing; .+|speed: .+"),
    ],
)
def test_an_error_in_a_gpu_file_names_file_and_key(tmp_path: Path, old: str, new: str, line: str) -> None:
    path = tmp_path / "h200.yaml"
    path.write_text((conf_dir() / "gpu/h200.yaml").read_text().replace(old, new))
    with pytest.raises(ConfigError) as error:
        load_gpu(path)
    assert all(
        re.fullmatch(f"{re.escape(str(path))}: ({line}|.+: is missing; .+)", x) for x in error.value.lines
    )


@pytest.fixture
def measure_calls(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[Any]:
    """A machine with one GPU, of which 3,311 MiB are free; returns the calls of `measure`."""
    calls: list[Any] = []

    def measure(configs: Any, on: torch.device, free_before_mib: float | None) -> GpuMeasurements:
        calls.append((configs, on, free_before_mib))
        return replace(MEASUREMENTS, free_before_mib=free_before_mib)

    properties = SimpleNamespace(name=GTX, uuid="1234", total_memory=3711 * MIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(device, "nvml_free_bytes", lambda: {"1234": 3311 * MIB, "5678": 7 * MIB})
    monkeypatch.setattr(device, "driver_version", lambda: "550.54.14")
    monkeypatch.setattr(device, "detect_machine", lambda **_: MACHINE)
    monkeypatch.setattr(calibration, "measure", measure)
    return calls


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run `captcha-exp calibrate` in this process; return exit code, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["captcha-exp", "calibrate", *arguments])
        with pytest.raises(SystemExit) as raised:
            main.main()
        return int(raised.value.code or 0), *capsys.readouterr()

    return run


def test_calibrate_writes_a_file_that_training_can_select(
    call: Call, measure_calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    code, out, _ = call("--config-dir", str(tmp_path), "seed=3")
    path = tmp_path / "gpu/nvidia-geforce-gtx-1650.yaml"
    assert code == 0
    assert load(compose("gpu=nvidia-geforce-gtx-1650", config_dir=str(tmp_path))).gpu == load_gpu(path)
    first, second, third = path.read_text().splitlines()[:3]
    assert re.fullmatch(
        rf"# {GTX}, measured on \d{{4}}-\d\d-\d\d with torch 2\S+, CUDA \S+, "
        r"cuDNN 91002, driver 550\.54\.14",
        first,
    )
    assert second == f"# Command: captcha-exp calibrate --config-dir {tmp_path} seed=3"
    assert third == f"name: {GTX}"
    assert not re.search(r"""source: ['">|]""", path.read_text())  # plain scalars, as in hand-written files
    assert [path.name for path in (tmp_path / "gpu").iterdir()] == [path.name]  # no temporary file is left
    assert re.search(r"context_mib +│ 150 +│ 244 +│ measured by NVML for", out)
    assert f"file {path}\n" in out
    assert out.endswith(f"use it with --config-dir {tmp_path} gpu=nvidia-geforce-gtx-1650\n")


def test_calibrate_prints_json(call: Call, measure_calls: list[Any], tmp_path: Path) -> None:
    code, out, _ = call("--json", "--config-dir", str(tmp_path), "--name", "mine")
    result = json.loads(out)
    assert (code, set(result)) == (0, {"path", "gpu"})
    assert result["path"] == str(tmp_path / "gpu/mine.yaml")
    assert result["gpu"]["context_mib"]["max"] == 244
    assert load_gpu(Path(result["path"])).name == result["gpu"]["name"] == GTX


def test_both_networks_are_measured_with_the_article_experiment(
    call: Call, measure_calls: list[Any], tmp_path: Path
) -> None:
    assert call("--config-dir", str(tmp_path), "train.batch_size=32")[0] == 0
    ((configs, on, free),) = measure_calls
    assert [config.model.name for config in configs] == ["resnet18", "compact"]
    assert {config.name for config in configs} == {"article"}
    assert {config.train.batch_size for config in configs} == {32}
    assert {(config.device.name, config.device.precision) for config in configs} == {("cuda", "fp32")}
    assert all(isinstance(config.device.threads, int) for config in configs)
    assert (on, free) == (torch.device("cuda"), 3311)


@pytest.mark.parametrize(
    ("arguments", "networks"),
    [
        (["model=compact"], ["compact"]),
        (["experiment=quickstart"], ["compact", "compact"]),
        (["experiment=quickstart", "model=resnet18"], ["resnet18"]),
    ],
)
def test_overrides_select_the_measured_networks(
    call: Call, measure_calls: list[Any], tmp_path: Path, arguments: list[str], networks: list[str]
) -> None:
    assert call("--config-dir", str(tmp_path), *arguments)[0] == 0
    assert [config.model.name for config in measure_calls[0][0]] == networks


def test_a_file_is_overwritten_only_with_force(call: Call, measure_calls: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "gpu/mine.yaml"
    path.parent.mkdir()
    path.write_text("other content")
    arguments = ("--config-dir", str(tmp_path), "--name", "mine")
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert err == f"{path}: exists already; use --force to overwrite it, or another --name\n"
    assert measure_calls == []  # rejected before the measurements, which take minutes
    assert path.read_text() == "other content"
    assert call(*arguments, "--force")[0] == 0
    assert load_gpu(path).name == GTX


@pytest.mark.long
@pytest.mark.parametrize("name", ["../x", "a/b", "1650", "null", "all", "a.b", "", "a b", "-x", "é", "a\n"])
def test_an_invalid_name_is_rejected(call: Call, measure_calls: list[Any], tmp_path: Path, name: str) -> None:
    code, out, err = call("--config-dir", str(tmp_path), f"--name={name}")
    assert (code, out) == (2, "")
    assert "must be a letter, then letters, digits, _ and -" in err
    assert measure_calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_a_one_line_error(
    call: Call, measure_calls: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "gpu").write_text("a file")
    code, out, err = call("--config-dir", str(tmp_path))
    assert (code, out) == (2, "")
    assert re.fullmatch(r".+gtx-1650\.yaml: cannot be written: .+", err.splitlines()[-1])


def test_a_checkout_has_its_gpu_files_in_conf(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibration.gpu_file_path(GTX, "mine", None, force=False) == conf_dir() / "gpu/mine.yaml"
    monkeypatch.setattr(calibration, "checkout_dir", lambda: None)
    with pytest.raises(UserError, match=r"belongs to the installed package; .+ --config-dir DIR"):
        calibration.gpu_file_path(GTX, "mine", None, force=False)


@pytest.mark.parametrize("arguments", [[], ["device.name=cuda"], ["--json", "device.name=cuda:1"]])
def test_without_a_gpu_one_line_names_an_alternative(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = call("--config-dir", str(tmp_path), *arguments)
    assert (code, out) == (2, "")
    line = r"device\.name=\S+: no CUDA GPU to measure \(.*CUDA.*\); use cuda, or .* gpu=generic or .+\n"
    assert re.fullmatch(line, err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["cpu", "mps"])
def test_only_a_cuda_gpu_can_be_measured(
    call: Call, measure_calls: list[Any], tmp_path: Path, name: str
) -> None:
    code, out, err = call("--config-dir", str(tmp_path), f"device.name={name}")
    assert (code, out) == (2, "")
    assert err.startswith(
        f"device.name={name}: no CUDA GPU to measure (this machine has 1 CUDA GPU); use cuda"
    )


def test_config_errors_are_reported_as_in_other_commands(call: Call, measure_calls: list[Any]) -> None:
    code, out, err = call("captcha.widht=3", "train.epochs=0")
    assert (code, out) == (2, "")
    assert sorted(line.split(":")[0] for line in err.splitlines()) == ["captcha.widht=3", "train.epochs=0"]


# -- measuring -----------------------------------------------------------------------------------------------


class FakeGpu:
    """The counters of a GPU of 4,000 MiB, 1,000 of them in use; the tensors are on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated = self.peak = 0
        for name, value in {
            "mem_get_info": lambda _: (3000 * MIB, 4000 * MIB),
            "memory_reserved": lambda _: self.allocated + 2 * MIB,
            "memory_allocated": lambda _: self.allocated,
            "max_memory_allocated": lambda _: self.peak,
            "reset_peak_memory_stats": self.reset,
            "synchronize": lambda _: None,
            "empty_cache": lambda: None,
            "get_device_properties": lambda _: SimpleNamespace(
                name=GTX, total_memory=4001 * MIB, major=7, minor=5
            ),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(device, "nvml_process_bytes", lambda _: 600 * MIB)

    def reset(self, _: torch.device) -> None:
        self.peak = self.allocated

    def allocate(self, mib: int) -> None:
        self.allocated += mib * MIB
        self.peak = max(self.peak, self.allocated)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    monkeypatch.setattr(gpu_probe, "BATCH_SIZES", (2, 4, 8))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return FakeGpu(monkeypatch)


class RecordingBar(ProgressBar):
    """A bar that adds up its progress."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def advance(self, amount: int, status: str = "") -> None:
        self.done += amount


@pytest.mark.long
def test_measure_runs_completely_on_the_cpu(
    tiny: Config,
    fake_gpu: FakeGpu,
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bars: list[RecordingBar] = []

    def progress_bar(_: str, total: int) -> AbstractContextManager[ProgressBar]:
        bars.append(RecordingBar(total))
        return nullcontext(bars[-1])

    monkeypatch.setattr(gpu_probe, "progress_bar", progress_bar)
    config = replace(tiny, device=replace(tiny.device, threads=1))
    measurements = gpu_probe.measure([with_train(config, batch_size=8)], CPU, 3500.0)
    assert [stage.after for stage in measurements.stages] == [
        "the first tensor",
        "the first matrix products",
        "the first convolution in fp32",
        "the first convolution in bf16",
        "the first convolution in fp16",
        "training steps in every precision",
    ]
    assert {(s.used_mib, s.reserved_mib, s.process_mib) for s in measurements.stages} == {(1000, 2, 600)}
    assert measurements.stages[FIRST_TRAINING_STAGE].after == "the first convolution in fp32"
    assert list(measurements.totals_mib) == [4000, 4001]
    assert (
        build_gpu_spec(measurements, GENERIC).compute_capability == measurements.compute_capability == "7.5"
    )
    assert [(t.precision, t.batch_size, t.mib) for t in measurements.transients] == [
        (precision, size, 0) for precision in ("fp32", "bf16", "fp16") for size in (2, 4, 8)
    ]
    assert [(each.batch_size, set(each.seconds)) for each in measurements.rounds] == [
        (8, {"fp32", "bf16", "fp16"})
    ] * gpu_probe.NUM_ROUNDS
    (bar,) = bars
    assert bar.done == bar.total
    assert (warnings(caplog), len(infos(caplog))) == ([], len(measurements.stages))
    assert bounds(build_gpu_spec(measurements, GENERIC).context_mib) == (598, 598 + CONTEXT_MARGIN_MIB)


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_deterministic_cublas_workspace_is_measured(
    tiny: Config, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, deterministic: bool, one_thread: None
) -> None:
    monkeypatch.setattr(gpu_probe, "_measure_conv_workspaces", lambda *_: [])
    monkeypatch.setattr(gpu_probe, "_time_rounds", lambda *_: [])
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    config = with_train(tiny, deterministic=deterministic)
    measurements = gpu_probe.measure([config], CPU, None)
    assert measurements.cublas_config == os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert measurements.deterministic == deterministic
    device.setup_device(tiny)


def test_memory_that_matrix_products_keep_is_the_cublas_workspace(
    fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpu.allocate(10)
    monkeypatch.setattr(
        gpu_probe, "_run_matmul", lambda dtype, _: fake_gpu.allocate(32 if dtype != torch.bfloat16 else 1)
    )
    assert gpu_probe._cublas_workspace(CPU) == 65


def test_a_matrix_product_runs_forward_and_backward() -> None:
    gpu_probe._run_matmul(torch.float32, CPU)


def test_each_distinct_convolution_is_listed_once() -> None:
    article = gpu_probe.list_conv_layers(load(compose("experiment=article")))
    assert [conv.input_requires_grad for conv in article] == [False] + [True] * 10
    assert [tuple(conv.input_shape) for conv in article[:2]] == [(3, 24, 56), (64, 24, 56)]
    assert [tuple(conv.input_shape) for conv in article].count((512, 3, 7)) == 1
    compact = gpu_probe.list_conv_layers(load(compose("experiment=article", "model=compact")))
    assert [type(conv.layer).__name__ for conv in compact] == ["Conv2d"] * 6


def test_transient_bytes_are_the_peak_minus_the_remaining_memory(fake_gpu: FakeGpu) -> None:
    """30 MiB for the result and 70 more at the peak; an earlier peak does not count."""
    fake_gpu.allocate(500)
    fake_gpu.allocate(-400)

    def work() -> str:
        fake_gpu.allocate(100)
        fake_gpu.allocate(-70)
        return "result"

    assert gpu_probe._measure_transient_bytes(work, CPU) == ("result", 70 * MIB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_convolution_computes_its_output_and_each_gradient_separately(
    tiny: Config, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    results: list[Any] = []
    transient_bytes = count(1)

    def measure_transient_bytes(work: Callable[[], Any], _: torch.device) -> tuple[Any, int]:
        results.append(work())
        return results[-1], next(transient_bytes)

    monkeypatch.setattr(gpu_probe, "_measure_transient_bytes", measure_transient_bytes)
    stem, second = gpu_probe.list_conv_layers(tiny)[:2]
    assert gpu_probe._conv_workspace_bytes(stem, 3, dtype, CPU) == 2  # images have no gradient
    out, (weight,) = results
    assert (out.shape, weight.shape, out.dtype) == ((3, 4, 8, 16), stem.layer.weight.shape, dtype)
    assert out.is_contiguous(memory_format=torch.channels_last)
    results.clear()
    assert gpu_probe._conv_workspace_bytes(second, 3, dtype, CPU) == 5
    _, (weight,), (image_grad,) = results
    assert (weight.shape, image_grad.shape) == (second.layer.weight.shape, (3, *second.input_shape))
    assert second.layer.weight.dtype == torch.float32  # a copy was measured


def raise_out_of_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_larger_batches_are_skipped_after_one_that_does_not_fit(
    tiny: Config, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def max_conv_workspace(convs: Any, size: int, dtype: torch.dtype, on: torch.device) -> float:
        return raise_out_of_memory() if size * dtype.itemsize >= 16 else float(size)

    monkeypatch.setattr(gpu_probe, "_max_conv_workspace", max_conv_workspace)
    bar = RecordingBar(total=9)
    found = list(gpu_probe._measure_conv_workspaces(tiny, [], CPU, bar))
    measured: list[tuple[Precision, int]] = [(each.precision, each.batch_size) for each in found]
    assert measured == [("fp32", 2), ("bf16", 2), ("bf16", 4), ("fp16", 2), ("fp16", 4)]
    assert (bar.done, warnings(caplog)) == (9, [])


def test_an_unsupported_precision_is_skipped_with_a_warning(
    tiny: Config, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def time_step(config: Config, _: Any) -> float:
        if config.device.precision == "bf16":
            raise RuntimeError("no\nengine")
        return {"fp32": 0.3, "fp16": 0.1}[config.device.precision]

    monkeypatch.setattr(gpu_probe, "_time_step", time_step)
    bar = RecordingBar(total=9)
    found = list(gpu_probe._time_rounds(with_train(tiny, batch_size=4), CPU, bar))
    assert found == [TimingRound("compact", 4, {"fp32": 0.3, "fp16": 0.1})] * gpu_probe.NUM_ROUNDS
    assert (
        warnings(caplog)
        == ["compact, bf16, training steps of batch size 4 fails: no engine"] * gpu_probe.NUM_ROUNDS
    )
    assert bar.done == 3 * gpu_probe.NUM_ROUNDS


@pytest.mark.parametrize(
    ("batch_size", "limit", "fits"), [(64, 64, 64), (64, 20, 16), (100, 1, 1), ("auto", 500, 256)]
)
def test_a_batch_is_halved_until_it_fits(
    tiny: Config, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, batch_size: Any, limit: int, fits: int
) -> None:
    def time_step(_: Config, batch: Any) -> float:
        return raise_out_of_memory() if len(batch.indices) > limit else 0.1

    monkeypatch.setattr(gpu_probe, "_time_step", time_step)
    batch = gpu_probe._find_fitting_batch(with_train(tiny, batch_size=batch_size), CPU)
    assert {len(part) for part in batch} == {fits}
    assert batch.images.shape[1:] == (16, 32, 3)
    assert int(batch.targets.max()) < 5


def test_a_gpu_too_small_for_one_image_is_a_one_line_error(
    tiny: Config, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_probe, "_time_step", raise_out_of_memory)
    with pytest.raises(
        RunFailed, match=r"^compact: one image does not fit on this GPU; .+ the processes that use it$"
    ):
        gpu_probe._find_fitting_batch(tiny, CPU)


def test_a_failure_in_fp32_is_a_one_line_error(
    tiny: Config, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("CUDA error:\nno kernel image is available")

    monkeypatch.setattr(gpu_probe, "_conv_workspace_bytes", fails)
    monkeypatch.setattr(gpu_probe, "_time_step", fails)
    with pytest.raises(RunFailed, match=r"in fp32 fails on this GPU") as error:
        gpu_probe.measure([tiny], CPU, None)
    assert len(error.value.lines) == 1
    assert "\n" not in error.value.lines[0]
    device.setup_device(tiny)


def test_a_disturbed_step_time_is_left_out_with_a_warning(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, one_thread: None
) -> None:
    monkeypatch.setattr(cpu_time, "is_disturbed", lambda *_: True)
    monkeypatch.setattr(gpu_probe, "_time_steps", lambda *_: [1.0] * 7)
    assert gpu_probe._time_step(tiny, make_batch(tiny, 4)) is None
    assert warnings(caplog) == [
        "compact, fp32: other processes took cores of the CPU during the training steps; left out, measure "
        "again with --force when they are idle"
    ]


def test_the_step_time_is_the_median_after_warmup(
    tiny: Config, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm-up steps of 100 and 90 s, then 5, 1, 4, 2, 30."""
    durations = [100, 90, 5, 1, 4, 2, 30]
    clock = iter([0.0] + [float(sum(durations[: n // 2 + n % 2])) for n in range(1, 2 * len(durations))])
    monkeypatch.setattr(gpu_probe, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert gpu_probe._time_step(tiny, make_batch(tiny, 4)) == 4
