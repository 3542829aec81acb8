"""What became of each point of a sweep, as the table of its verdict has it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from captcha_exp.memory.plan import Between, Fits

Became: TypeAlias = Literal["finished", "oom", "unfit", "failed", "killed", "not run"]
"""oom: too little memory; unfit: foretold not to fit, and so not trained; both are results"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One point of a sweep: what it was, and what its last attempt came to."""

    number: int
    """from 1, in the order of the grid"""
    name: str
    """by what was swept, as in batch_size=64 seed=1"""
    swept: Mapping[str, str]
    """full key -> value as typed, in the order of the command; a conf group (model) is a key as any other"""
    became: Became
    error: str | None
    """one line, where it failed"""
    attempts: int
    batch_size: int | None
    """pictures in a step; None while it is auto and has not been found out"""
    micro_batch_size: int | None
    """of the last attempt, where a batch was split"""
    device: str
    """cpu, cuda ..."""
    budget_mib: Between | None
    """what there is of a card; None: nobody says"""
    predicted_mib: Between | None
    """of the whole process on the card"""
    fits: Fits | None
    measured_mib: float | None
    """peak of the process: of the card on CUDA, else of the machine's memory, which is another thing"""
    pictures_per_second: float | None
    """in training: the median of the epochs, without the first where there are more"""
    val_accuracy: float | None
    """of the best epoch; whole labels"""
    seconds_to_best: float | None
    """from the start of the first epoch to the end of the best"""
    test_accuracy: float | None
    folder: str | None
    run_id: str | None
    """of MLflow"""
    weights_sha256: str | None
