"""Predict on the CPU what gpu_session will measure: plans of trainings and largest batch sizes.

Predictions are made for several GPU configs, since the GPU may not be known in advance; the config that
matches the device name is used (`gpu_comparison.gpu_config_of`). They contain the hash of the code.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch
from gpu_cases import STREAMED, Case, code_sha256, make_config

from captcha_exp.config import Config
from captcha_exp.memory.plan import Planner, PlannerCache
from captcha_exp.runtime.paths import conf_dir

SplitSizes = Mapping[str, int]
LARGEST_SPLIT_SIZES = {"train": 12_288, "validation": 250}
ARTICLE_GPU = "gtx1650"  # conf/gpu/ file of the article's GPU


def gpu_configs() -> list[str]:
    """Return the names of the GPU configs that plans are predicted for."""
    return [name for name in ("h100", "h200") if (conf_dir() / "gpu" / f"{name}.yaml").is_file()]


def predictions(
    cases: Sequence[tuple[Case, SplitSizes]],
    budgets: Sequence[int],
    variants: Sequence[str],
    budget_mib: int,
    workers: int,
) -> dict[str, Any]:
    """Return, for each GPU config, the plan of every case and the largest batch that fits per variant."""
    names = gpu_configs()
    if workers == 1:  # starting a process takes longer than some cases
        plans = [predict_case(case, split_sizes, budgets, names) for case, split_sizes in cases]
        largest = [predict_largest(name, budget_mib, [*names, ARTICLE_GPU]) for name in variants]
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            # The searches take longest: submit them first.
            searches = [
                pool.submit(predict_largest, name, budget_mib, [*names, ARTICLE_GPU]) for name in variants
            ]
            tasks = [
                pool.submit(predict_case, case, split_sizes, budgets, names) for case, split_sizes in cases
            ]
            plans = [task.result() for task in tasks]
            largest = [task.result() for task in searches]
    case_names = [Case(*case).name for case, _ in cases]
    return {
        "torch": torch.__version__,
        "code_sha256": code_sha256(),
        "plans": {
            gpu: {name: plan[gpu] for name, plan in zip(case_names, plans, strict=True)} for gpu in names
        },
        "largest": {
            gpu: {name: found[gpu] for name, found in zip(variants, largest, strict=True)}
            for gpu in [*names, ARTICLE_GPU]
        },
    }


def predict_case(
    case: Case, split_sizes: SplitSizes, budgets: Sequence[int], gpus: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return, for each GPU config, the plan of a case as JSON and its verdict for each budget (MiB)."""
    case = Case(*case)
    cache, found = _cache(case, split_sizes), {}
    for gpu in gpus:
        config = make_config(case, "cuda", gpu=gpu)
        plan = Planner(config, split_sizes, cache=cache).plan_for(case.batch)
        verdicts = {
            str(budget): Planner(_with_budget(config, budget), split_sizes, cache=cache)
            .plan_for(case.batch)
            .fits
            for budget in budgets
        }
        found[gpu] = {
            "case": list(case),
            "images": dict(split_sizes),
            "plan": plan.to_json(),
            "verdicts": verdicts,
        }
    return found


def predict_largest(variant: str, budget_mib: int, gpus: Sequence[str]) -> dict[str, int | None]:
    """Return, for each GPU config, the largest batch of the article's network that is predicted to fit."""
    case = Case("resnet18", variant, 100)
    cache, found = _cache(case, LARGEST_SPLIT_SIZES, STREAMED), {}
    for gpu in gpus:
        config = _with_budget(make_config(case, "cuda", STREAMED, gpu=gpu), budget_mib)
        found[gpu] = Planner(config, LARGEST_SPLIT_SIZES, cache=cache).max_batch_size() or None
    return found


def _cache(case: Case, split_sizes: SplitSizes, *more: str) -> PlannerCache:
    """Return the cached traces of a case, which depend neither on the GPU config nor on the budget."""
    return PlannerCache(make_config(case, "cuda", *more), split_sizes)


def _with_budget(config: Config, budget_mib: int) -> Config:
    return replace(config, device=replace(config.device, vram_budget_mib=budget_mib))
