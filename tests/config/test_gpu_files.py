"""Files of GPUs: plausible figures, each with a source, and intervals that are those of a generation."""

import re

import pytest

from captcha_exp.config import Card, Interval, load_card
from captcha_exp.runtime.paths import conf

FILES = sorted((conf() / "card").glob("*.yaml"))
CARDS = {path.stem: load_card(path) for path in FILES}
FIGURES = (
    "total_mib",
    "others_mib",
    "context_mib",
    "cublas_workspace_mib",
    "cudnn_workspace_mib",
    "fp16_speed",
    "bf16_speed",
)
EXPECTED_GIB = {  # as on the box
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


def test_the_gpus_that_people_have_are_there() -> None:
    assert set(EXPECTED_GIB) | {"generic"} == set(CARDS)


def test_no_two_files_are_of_one_gpu() -> None:
    names = [card.name for card in CARDS.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("stem", CARDS)
def test_each_figure_has_a_source(stem: str) -> None:
    for figure in (getattr(CARDS[stem], name) for name in FIGURES):
        assert figure is None or len(figure.source) >= len("as fp16")
        assert figure is None or figure.source == figure.source.strip()


@pytest.mark.parametrize("stem", EXPECTED_GIB)
def test_a_gpu_s_memory_is_somewhat_below_what_its_box_says(stem: str) -> None:
    total, box = CARDS[stem].total_mib, EXPECTED_GIB[stem] * 1024
    assert total is not None
    assert 0.89 * box < total.least <= total.most <= box


@pytest.mark.parametrize("stem", EXPECTED_GIB)
def test_the_figures_of_a_gpu_leave_room_for_a_training(stem: str) -> None:
    card = CARDS[stem]
    assert card.total_mib is not None
    assert 40 <= card.context_mib.least < card.context_mib.most <= 1000
    assert card.context_mib.most + card.cublas_workspace_mib.most < card.total_mib.least / 2
    assert 0.05 <= card.bf16_speed.least <= card.bf16_speed.most <= 3.3


@pytest.mark.parametrize("stem", EXPECTED_GIB)
def test_bf16_is_said_to_be_emulated_below_compute_capability_8(stem: str) -> None:
    card = CARDS[stem]
    assert card.compute_capability is not None
    emulated = float(card.compute_capability) < 8
    assert ("emulated below compute capability 8" in card.bf16_speed.source) == emulated
    assert (card.bf16_speed.most <= 1) == emulated


def generation(card: Card) -> str:
    assert card.compute_capability is not None
    return GENERATIONS[card.compute_capability]


def test_a_gpu_without_published_context_has_the_widest_of_its_generation() -> None:
    unpublished = {stem for stem in EXPECTED_GIB if WIDEST in CARDS[stem].context_mib.source}
    assert unpublished == {"gtx1660ti", "rtx2060", "rtx3050"}
    for stem in unpublished:
        card = CARDS[stem]
        assert generation(card) in card.context_mib.source
        others = {
            other: CARDS[other].context_mib
            for other in EXPECTED_GIB
            if other not in unpublished and generation(CARDS[other]) == generation(card)
        }
        assert others
        assert card.context_mib.least == min(each.least for each in others.values())
        assert card.context_mib.most == max(each.most for each in others.values())


@pytest.mark.parametrize("stem", EXPECTED_GIB)
def test_a_published_context_lies_within_its_bounds_with_room_above(stem: str) -> None:
    """The MiB that a source names, without the numbers of issues and the GiB of GPUs."""
    context: Interval = CARDS[stem].context_mib
    if WIDEST in context.source:
        return
    text = re.sub(r"issue \d+|GTX \d+|gtx\d+|\d+ GB|[\d.]+ GiB|capability [\d.]+|A10G?", "", context.source)
    said = [int(number) for number in re.findall(r"\b\d{2,3}\b", text)]
    assert said
    assert context.least <= min(said)
    assert max(said) * 1.25 < context.most
