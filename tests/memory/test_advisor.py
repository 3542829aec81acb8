"""Advice is compared with its own plan, with one micro-batch fewer, and with a real step."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import pytest
from support.profiling import real_peaks, run_for_real

from captcha_exp import compose, load
from captcha_exp.config import Config
from captcha_exp.memory import advisor
from captcha_exp.memory.advisor import MICRO_BATCH_COUNTS, Advice, advise
from captcha_exp.memory.plan import Plan, Planner

pytestmark = pytest.mark.usefixtures("one_thread")

MIB = 2**20
GPU = ("device.name=cpu", "device.precision=fp32", "gpu=gtx1650")
ARTICLE = ("experiment=article", *GPU, "train.batch_size=1000", "device.vram_budget_mib=3908")
SPLIT_SIZES = {"train": 80_000, "validation": 10_000, "test": 10_000}
SMALL_SPLITS = {"train": 256, "validation": 32, "test": 32}
# No context and no workspaces.
TENSORS_ONLY = (
    "tracking=none",
    *("gpu.context_mib.min=0", "gpu.context_mib.max=0"),
    *("gpu.cublas_workspace_mib.max=0", "gpu.cudnn_workspace_mib.max=0"),
)
SMALL = (*GPU, *TENSORS_ONLY, "train.batch_size=128", "train.eval_batch_size=16")
FEW_MICRO_BATCH_COUNTS = (1, 2, 3, 4, 5)  # gives the same advice in less time
BUDGET = 45  # MiB; the whole batch takes 69


def load_config(*overrides: str) -> Config:
    return load(compose(*overrides))


def plan_of(config: Config, split_sizes: Mapping[str, int]) -> Plan:
    return Planner(config, split_sizes).plan_for(int(config.train.batch_size))


def advise_for(*overrides: str, split_sizes: Mapping[str, int] = SMALL_SPLITS) -> list[Advice]:
    return advise(load_config(*overrides), split_sizes, None)


def override_keys(advice: Advice) -> set[str]:
    return {override.partition("=")[0] for override in advice.overrides}


@pytest.fixture(scope="module")
def article() -> list[Advice]:
    """The advice for batches of 1000 in the article's memory, computed once because it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advisor, "MICRO_BATCH_COUNTS", FEW_MICRO_BATCH_COUNTS)
        return advise_for(*ARTICLE, split_sizes=SPLIT_SIZES)


@pytest.fixture(scope="module")
def small() -> list[Advice]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advisor, "MICRO_BATCH_COUNTS", FEW_MICRO_BATCH_COUNTS)
        return advise_for(*SMALL, f"device.vram_budget_mib={BUDGET}")


each_network = pytest.mark.parametrize(
    ("name", "base", "split_sizes"),
    [
        pytest.param("article", ARTICLE, SPLIT_SIZES, marks=pytest.mark.long),
        ("small", (*SMALL, f"device.vram_budget_mib={BUDGET}"), SMALL_SPLITS),
    ],
    ids=["article", "small"],
)
"""the fixture of the advice, its config, and the sizes of its splits"""


# -- the article's network with ten times its batch ----------------------------------------------------------


@pytest.mark.long
def test_several_settings_make_a_batch_of_1000_fit(article: list[Advice]) -> None:
    assert len(article) >= 2
    for each in article:
        assert each.overrides
        assert each.plan.fits == "fits"
        assert each.plan.process_mib.max <= 3908
        assert each.plan.batch_size == 1000


@pytest.mark.long
def test_the_fastest_comes_first(article: list[Advice]) -> None:
    times = [each.relative_time for each in article]
    assert times == sorted(times)
    assert times[0] > 1.0  # micro-batches are slower


@pytest.mark.long
def test_each_override_makes_a_combination_faster(article: list[Advice], small: list[Advice]) -> None:
    for found in (article, small):
        for one, other in itertools.permutations(found, 2):
            if set(one.overrides) < set(other.overrides):
                assert other.relative_time < one.relative_time


@pytest.mark.long
@each_network
def test_the_overrides_give_the_same_plan(
    name: str, base: tuple[str, ...], split_sizes: Mapping[str, int], request: pytest.FixtureRequest
) -> None:
    found: list[Advice] = request.getfixturevalue(name)
    assert found
    for each in found:
        assert plan_of(load_config(*base, *each.overrides), split_sizes) == each.plan


@pytest.mark.long
@each_network
def test_the_number_of_micro_batches_is_minimal(
    name: str, base: tuple[str, ...], split_sizes: Mapping[str, int], request: pytest.FixtureRequest
) -> None:
    """With one micro-batch fewer, and the other overrides as advised, it does not fit."""
    found: list[Advice] = request.getfixturevalue(name)
    with_micro_batches = [each for each in found if "train.micro_batch_size" in override_keys(each)]
    assert with_micro_batches
    for each in with_micro_batches:
        config = load_config(*base, *each.overrides)
        batch, micro = int(config.train.batch_size), config.train.micro_batch_size
        assert micro is not None
        larger = min(-(-batch // passes) for passes in MICRO_BATCH_COUNTS if -(-batch // passes) > micro)
        one_fewer = replace(config, train=replace(config.train, micro_batch_size=larger))
        assert plan_of(one_fewer, split_sizes).fits != "fits"


@pytest.mark.long
def test_notes_describe_the_consequences(article: list[Advice]) -> None:
    for each in article:
        notes = " | ".join(each.notes)
        assert ("batch norm statistics" in notes) == ("train.micro_batch_size" in override_keys(each))
        assert ("a third more computation" in notes) == (
            "train.activation_checkpointing" in override_keys(each)
        )
        assert ("0.12 to 1.1 times as fast as fp32" in notes) == ("device.precision" in override_keys(each))
        if micro := [x.partition("=")[2] for x in each.overrides if x.startswith("train.micro")]:
            assert f"batch norm statistics are computed over {micro[0]} images" in each.notes


@pytest.mark.long
def test_advice_can_be_written_as_json(article: list[Advice]) -> None:
    values = json.loads(json.dumps([asdict(each) for each in article]))
    assert [tuple(each["overrides"]) for each in values] == [each.overrides for each in article]
    assert all(set(each) == {"overrides", "relative_time", "notes", "plan"} for each in values)
    assert all(each["plan"]["fits"] == "fits" for each in values)


# -- a small network -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", ["gtx1650", "h200"])
def test_a_config_that_fits_unchanged_comes_first(gpu: str) -> None:
    """Although 16 bits may be faster on that GPU."""
    found = advise_for(*SMALL, f"gpu={gpu}", "device.vram_budget_mib=4000")
    assert found[0].overrides == ()
    assert found[0].relative_time == 1.0
    assert found[0].notes == ()
    assert found[0].plan.fits == "fits"
    assert all(each.relative_time < 1.0 for each in found[1:])
    assert (len(found) > 1) == (gpu == "h200")


def test_there_is_no_advice_if_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advisor, "MICRO_BATCH_COUNTS", (1, 2))  # more take longer
    assert advise_for(*SMALL, "device.vram_budget_mib=21") == []


def test_a_16_bit_precision_is_not_changed() -> None:
    found = advise_for(
        *SMALL, "device.precision=bf16", "train.micro_batch_size=32", f"device.vram_budget_mib={BUDGET}"
    )
    assert found
    assert all("device.precision" not in override_keys(each) for each in found)


@pytest.mark.long
def test_a_requested_micro_batch_size_is_not_increased(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advisor, "MICRO_BATCH_COUNTS", FEW_MICRO_BATCH_COUNTS)
    base = (*SMALL, "train.micro_batch_size=90", f"device.vram_budget_mib={BUDGET}")
    found = advise_for(*base)
    assert found
    for each in found:
        micro = load_config(*base, *each.overrides).train.micro_batch_size
        assert micro is not None
        assert micro <= 90


@pytest.mark.long
def test_a_speedup_of_zero_is_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(advisor, "MICRO_BATCH_COUNTS", FEW_MICRO_BATCH_COUNTS)
    zero = ("gpu.fp16_speedup.min=0", "gpu.bf16_speedup.min=0")
    found = advise_for(*SMALL, f"device.vram_budget_mib={BUDGET}", *zero)
    assert found
    assert found[0].relative_time < 2
    advise_for(*SMALL, "device.vram_budget_mib=4000", "device.precision=fp16", *zero)


LARGE_EVALUATION = (*GPU, *TENSORS_ONLY, "train.batch_size=2", "train.eval_batch_size=256")


@pytest.mark.long
@pytest.mark.parametrize(
    ("split_sizes", "budget_mib"),
    [
        ({"train": 20, "validation": 300, "test": 10}, 50),
        ({"train": 20, "validation": 300, "test": 300}, 50),
        ({"train": 20, "validation": 300}, 50),
    ],
    ids=["validation", "validation and test", "no test"],
)
def test_an_evaluation_batch_that_does_not_fit_is_reduced(
    split_sizes: dict[str, int], budget_mib: int
) -> None:
    """It is halved no more often than needed."""
    overrides = (*LARGE_EVALUATION, f"device.vram_budget_mib={budget_mib}")
    assert plan_of(load_config(*overrides), split_sizes).fits != "fits"

    found = advise_for(*overrides, split_sizes=split_sizes)

    matching = [each for each in found if override_keys(each) == {"train.eval_batch_size"}]
    assert len(matching) == 1
    config = load_config(*overrides, *matching[0].overrides)
    assert plan_of(config, split_sizes).fits == "fits"
    size = config.train.eval_batch_size
    larger = replace(config, train=replace(config.train, eval_batch_size=2 * size))
    assert plan_of(larger, split_sizes).fits != "fits"


# -- real steps ----------------------------------------------------------------------------------------------


def check_real_step(base: tuple[str, ...], each: Advice, split_sizes: Mapping[str, int], record: Any) -> None:
    """Check that the tensors of a real step on the CPU have the planned size.

    fp16 is replaced by bf16, which has the same size and is 29 times as fast on a CPU.
    """
    config = load_config(*base, *(text.replace("=fp16", "=bf16") for text in each.overrides))
    size = int(config.train.batch_size)
    run = {"train": size, "validation": 2}
    moments = run_for_real(replace(config, train=replace(config.train, epochs=1)), run)
    captcha = config.captcha
    image_bytes = captcha.height * captcha.width * captcha.channels + 8 * captcha.length + 8
    # On the CPU the splits are always in device memory.
    needed = (real_peaks(moments, False)["step"] - sum(run.values()) * image_bytes) / MIB
    planned = each.plan.tensors_mib - 8 * (split_sizes["train"] - size) / MIB  # the order of an epoch
    record(" ".join(each.overrides), f"planned {planned:.1f} MiB, needed {needed:.1f}")
    assert needed == pytest.approx(planned, rel=0.02)


@pytest.mark.long
def test_a_real_step_of_each_combination_needs_the_planned_memory(
    small: list[Advice], record_property: Any
) -> None:
    assert small
    for each in small:
        check_real_step(SMALL, each, SMALL_SPLITS, record_property)


@pytest.mark.slow
def test_a_real_step_of_1000_images_needs_the_planned_memory(
    article: list[Advice], record_property: Any
) -> None:
    """Four steps of ResNet-18 on one core: five minutes, and 3 GiB."""
    assert advise_for(*ARTICLE, split_sizes=SPLIT_SIZES) == article
    for each in article:
        check_real_step(ARTICLE, each, SPLIT_SIZES, record_property)
