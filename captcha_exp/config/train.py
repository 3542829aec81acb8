"""What can be set about a training: how pictures are changed, and in which steps it goes."""

import re
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from captcha_exp.config.gpu import STRICT

Fraction: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
Auto: TypeAlias = Literal["auto"]
BatchSize: TypeAlias = Annotated[int, Field(ge=1, le=1_000_000)]

CHECKPOINT_EVERY_PATTERN = re.compile(r"([1-9][0-9]{0,8}) (step|epoch|minute)s?")
"""train.checkpoint_every: how many, of what"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class AugmentConfig:
    """How far a training picture may go from itself; even between minus and plus, and 0 is off."""

    translate: Fraction
    """share of the height by which a picture moves, right or left and down or up"""
    scale: Fraction
    """share by which it gets wider or narrower, and on its own taller or lower"""
    rotate: Annotated[float, Field(ge=0, le=180)]
    """degrees, either way"""
    shear: Annotated[float, Field(ge=0, le=60)]
    """degrees by which what stands upright leans"""
    elastic: Fraction
    """share of the height by which each of 3 by 5 points is pulled, with all that lies between them"""
    color_jitter: Fraction
    """share by which contrast changes, and of 255 by which brightness does, in each channel on its own"""
    invert_p: Annotated[float, Field(ge=0, le=1)]
    """share of the pictures that become their own negative"""
    warmup_fraction: Fraction
    """share of the epochs in which all of this grows from nothing to what is written here"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TrainConfig:
    """How long, in which steps, and with what."""

    batch_size: BatchSize | Auto
    """pictures in one training step; auto measures on the device that trains: the smallest that fits and
    comes near the most pictures per second"""
    micro_batch_size: BatchSize | None
    """pictures that pass through the network at a time, where a whole batch takes too much memory: the
    gradients of a batch are added up, its batch norms see one such part alone; null: all of the batch"""
    activation_checkpointing: bool
    """keep what enters each block of the network and compute what lies inside again in the backward pass:
    less memory, a third more work, the same numbers"""
    eval_batch_size: BatchSize
    """pictures in one step of an evaluation"""
    epochs: Annotated[int, Field(ge=1, le=1_000_000)]
    """passes over the training split, at most"""
    patience: Annotated[int, Field(ge=1)] | None
    """epochs without a better validation accuracy that are borne, one more stops; null never stops early"""
    optimizer: Literal["adam", "adamw", "sgd"]
    """sgd has Nesterov momentum 0.9"""
    optimizer_impl: Literal["fused", "foreach", "for_loop"]
    """torch's ways to do the step: fused is the fastest and takes no memory of its own; foreach and loop copy
    weights and state in each step"""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """at the peak of the schedule"""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """on weights of two and more axes, not on biases and batch norms"""
    schedule: Literal["constant", "onecycle"]
    """onecycle climbs linearly to the peak and falls linearly to zero at the last step"""
    warmup_fraction: Fraction
    """share of all steps in which onecycle climbs"""
    label_smoothing: Fraction
    """share of each target that is spread over all classes; in the training loss alone"""
    deterministic: bool
    """the same seed gives the same bits on the same kind of machine"""
    checkpoint_every: str | None
    """how often all that a training has reached is saved, so that an interrupted one goes on from there:
    500 steps, 1 epoch, 10 minutes, or the like; null: when it is asked to stop, and at its end"""
    max_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    """minutes after which it saves and ends, KILLED, to be gone on with by the next call: for machines that
    are lent for a time; null is no limit"""
    sanity_check_steps: Annotated[int, Field(ge=1)]
    """steps after which characters that are still read at chance are reported as trouble"""
    on_oom: Literal["record", "split", "fail"] | Auto
    """what too little memory is. record: a result of the run; split: a reason to start again with half the
    micro-batch, or half the evaluation batch, in a fresh process; fail: a failure; auto: a result in a sweep,
    else a failure"""

    @field_validator("checkpoint_every")
    @classmethod
    def _check_checkpoint_every(cls, value: str | None) -> str | None:
        if value is not None and not CHECKPOINT_EVERY_PATTERN.fullmatch(value):
            raise ValueError("must be a whole number of steps, epochs or minutes, as in 500 steps, or null")
        return value

    @model_validator(mode="after")
    def _check_micro_batch_size(self) -> "TrainConfig":
        micro, whole = self.micro_batch_size, self.batch_size
        if micro is not None and whole != "auto" and micro > whole:
            raise ValueError(
                f"micro_batch_size={micro} is more than batch_size={whole}: no part is more than all"
            )
        return self
