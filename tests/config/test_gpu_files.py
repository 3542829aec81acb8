"""Test that the GPU files of conf/gpu have plausible figures, each with a source."""

import re

import pytest

from captcha_exp.config import Bounds, GpuSpec, load_gpu
from captcha_exp.runtime.paths import conf_dir

FILES = sorted((conf_dir() / "gpu").glob("*.yaml"))
GPUS = {path.stem: load_gpu(path) for path in FILES}
FIGURES = (
    "total_mib",
    "other_processes_mib",
    "context_mib",
    "cublas_workspace_mib",
    "cudnn_workspace_mib",
    "fp16_speedup",
    "bf16_speedup",
)
EXPECTED_GIB = {  # nominal
    "gtx1060": 6,
    "gtx1650": 4,
    "gtx1660ti": 6,
    "rtx2060": 6,
    "rtx3050": 8,
    "rtx3060": 12,
    "rtx3090": 24,
    "rtx4060": 8,
    "rtx4090": 24,
    "t4": 16,
    "a10": 24,
    "l4": 24,
    "a100": 40,
    "a100-80gb": 80,
    "h100": 80,
    "h200": 141,
}
GENERATIONS = {
    "6.0": "Pascal",
    "6.1": "Pascal",
    "7.5": "Turing",
    "8.0": "Ampere",
    "8.6": "Ampere",
    "8.9": "Ada",
    "9.0": "Hopper",
}
WIDEST = "the widest interval of its generation"


def test_all_expected_gpus_have_a_file() -> None:
    assert set(EXPECTED_GIB) | {"generic"} == set(GPUS)


def test_gpu_names_are_unique() -> None:
    names = [gpu.name for gpu in GPUS.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("stem", GPUS)
def test_every_figure_has_a_source(stem: str) -> None:
    for figure in (getattr(GPUS[stem], name) for name in FIGURES):
        assert figure is None or len(figure.source) >= len("as fp16")
        assert figure is None or figure.source == figure.source.strip()


@pytest.mark.parametrize("stem", EXPECTED_GIB)
def test_total_memory_is_slightly_below_nominal(stem: str) -> None:
    total, nominal = GPUS[stem].total_mib, EXPECTED_GIB[stem] * 1024
    assert total is not None
    assert 0.89 * nominal < total.min <= total.max <= nominal


@pytest.mark.parametrize("stem", EXPECTED_GIB)
def test_context_and_workspaces_leave_memory_for_training(stem: str) -> None:
    gpu = GPUS[stem]
    assert gpu.total_mib is not None
    assert 40 <= gpu.context_mib.min < gpu.context_mib.max <= 1000
    assert gpu.context_mib.max + gpu.cublas_workspace_mib.max < gpu.total_mib.min / 2
    assert 0.05 <= gpu.bf16_speedup.min <= gpu.bf16_speedup.max <= 3.3


@pytest.mark.parametrize("stem", EXPECTED_GIB)
def test_bf16_is_emulated_below_compute_capability_8(stem: str) -> None:
    gpu = GPUS[stem]
    assert gpu.compute_capability is not None
    emulated = float(gpu.compute_capability) < 8
    assert ("emulated below compute capability 8" in gpu.bf16_speedup.source) == emulated
    assert (gpu.bf16_speedup.max <= 1) == emulated


def generation(gpu: GpuSpec) -> str:
    assert gpu.compute_capability is not None
    return GENERATIONS[gpu.compute_capability]


def test_an_unpublished_context_has_the_widest_bounds_of_the_generation() -> None:
    unpublished = {stem for stem in EXPECTED_GIB if WIDEST in GPUS[stem].context_mib.source}
    assert unpublished == {"gtx1660ti", "rtx2060", "rtx3050"}
    for stem in unpublished:
        gpu = GPUS[stem]
        assert generation(gpu) in gpu.context_mib.source
        others = {
            other: GPUS[other].context_mib
            for other in EXPECTED_GIB
            if other not in unpublished and generation(GPUS[other]) == generation(gpu)
        }
        assert others
        assert gpu.context_mib.min == min(each.min for each in others.values())
        assert gpu.context_mib.max == max(each.max for each in others.values())


@pytest.mark.parametrize("stem", EXPECTED_GIB)
def test_published_contexts_are_within_the_bounds_with_a_margin(stem: str) -> None:
    """Compare with the MiB in the source, without issue numbers and GiB."""
    context: Bounds = GPUS[stem].context_mib
    if WIDEST in context.source:
        return
    text = re.sub(r"issue \d+|GTX \d+|gtx\d+|\d+ GB|[\d.]+ GiB|capability [\d.]+|A10G?", "", context.source)
    published = [int(number) for number in re.findall(r"\b\d{2,3}\b", text)]
    assert published
    assert context.min <= min(published)
    assert max(published) * 1.25 < context.max
