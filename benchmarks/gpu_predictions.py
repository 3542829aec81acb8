"""Predict what gpu_session will measure: plans of trainings and largest batches, on the CPU alone.

The predictions are made for several card files, as it may not be known which GPU will be at hand; the file
that matches the device's name is used (`gpu_judging.card_of`). They carry the hash of the code behind them.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch
from gpu_cases import SENT, Case, code_sha256, config_of

from captcha_exp.config import Config
from captcha_exp.memory.plan import Planner, PlannerCache
from captcha_exp.runtime.paths import conf_dir

Pictures = Mapping[str, int]
LARGEST_PICTURES = {"train": 12_288, "validation": 250}
ARTICLE_CARD = "gtx1650"  # the card file whose figures predict the largest batch on the article's GPU


def cards() -> list[str]:
    """Return the card files that plans are predicted with."""
    return [name for name in ("h100", "h200") if (conf_dir() / "gpu" / f"{name}.yaml").is_file()]


def predictions(
    cases: Sequence[tuple[Case, Pictures]],
    budgets: Sequence[int],
    variants: Sequence[str],
    budget_mib: int,
    workers: int,
) -> dict[str, Any]:
    """Return, for each card, the plan of every case and the largest batch of each variant that fits."""
    known = cards()
    if workers == 1:  # no new process: a start takes longer than some cases
        plans = [predict_case(case, pictures, budgets, known) for case, pictures in cases]
        largest = [predict_largest(name, budget_mib, [*known, ARTICLE_CARD]) for name in variants]
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            # The searches take longest, and go first.
            searches = [
                pool.submit(predict_largest, name, budget_mib, [*known, ARTICLE_CARD]) for name in variants
            ]
            tasks = [pool.submit(predict_case, case, pictures, budgets, known) for case, pictures in cases]
            plans = [task.result() for task in tasks]
            largest = [task.result() for task in searches]
    names = [Case(*case).name for case, _ in cases]
    return {
        "torch": torch.__version__,
        "code_sha256": code_sha256(),
        "plans": {
            card: {name: plan[card] for name, plan in zip(names, plans, strict=True)} for card in known
        },
        "largest": {
            card: {name: found[card] for name, found in zip(variants, largest, strict=True)}
            for card in [*known, ARTICLE_CARD]
        },
    }


def predict_case(
    case: Case, pictures: Pictures, budgets: Sequence[int], cards: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return, for each card, the plan of a case as JSON and its verdict for each budget (MiB)."""
    case = Case(*case)
    shared, found = _shared(case, pictures), {}
    for card in cards:
        config = config_of(case, "cuda", gpu=card)
        plan = Planner(config, pictures, cache=shared).plan_for(case.batch)
        verdicts = {
            str(budget): Planner(_budgeted(config, budget), pictures, cache=shared).plan_for(case.batch).fits
            for budget in budgets
        }
        found[card] = {
            "case": list(case),
            "images": dict(pictures),
            "plan": plan.to_json(),
            "verdicts": verdicts,
        }
    return found


def predict_largest(variant: str, budget_mib: int, cards: Sequence[str]) -> dict[str, int | None]:
    """Return, for each card, the largest batch of the article's network that is predicted to fit."""
    case = Case("resnet18", variant, 100)
    shared, found = _shared(case, LARGEST_PICTURES, SENT), {}
    for card in cards:
        config = _budgeted(config_of(case, "cuda", SENT, gpu=card), budget_mib)
        found[card] = Planner(config, LARGEST_PICTURES, cache=shared).max_batch_size() or None
    return found


def _shared(case: Case, pictures: Pictures, *more: str) -> PlannerCache:
    """Return the traces of a case: neither card nor budget changes what a training allocates."""
    return PlannerCache(config_of(case, "cuda", *more), pictures)


def _budgeted(config: Config, budget_mib: int) -> Config:
    return replace(config, device=replace(config.device, vram_budget_mib=budget_mib))
