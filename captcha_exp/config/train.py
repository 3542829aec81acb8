"""The `augment` and `train` groups of the config schema."""

import re
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from captcha_exp.config.gpu import STRICT

Fraction: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
Auto: TypeAlias = Literal["auto"]
BatchSize: TypeAlias = Annotated[int, Field(ge=1, le=1_000_000)]

CHECKPOINT_EVERY_PATTERN = re.compile(r"^([1-9][0-9]{0,8}) (step|epoch|minute)s?$")
"""format of train.checkpoint_every: a number and a unit"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of training images; each is uniform in [-value, value], and 0 disables it."""

    translate: Fraction
    """fraction of the height by which an image is moved, horizontally and vertically"""
    scale: Fraction
    """fraction by which width and height are stretched or shrunk, independently"""
    rotate: Annotated[float, Field(ge=0, le=180)]
    """degrees of rotation, in either direction"""
    shear: Annotated[float, Field(ge=0, le=60)]
    """degrees of horizontal shear"""
    elastic: Fraction
    """fraction of the height by which each point of a 3 by 5 grid is moved; interpolated in between"""
    color_jitter: Fraction
    """relative change of contrast, and change of brightness as a fraction of 255, per channel"""
    invert_p: Annotated[float, Field(ge=0, le=1)]
    """probability that an image is inverted"""
    warmup_fraction: Fraction
    """fraction of the epochs over which all of these grow linearly from 0 to their values"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TrainConfig:
    """Optimization: batches, duration, optimizer, schedule, checkpoints."""

    batch_size: BatchSize | Auto
    """images per optimizer step; auto measures on the training device and takes the smallest size that fits
    and comes close to the highest images per second"""
    micro_batch_size: BatchSize | None
    """images per forward and backward pass, for batches that do not fit in memory: gradients are accumulated,
    and batch norm uses the statistics of each micro-batch; null: the whole batch"""
    activation_checkpointing: bool
    """store only the input of each block and recompute its activations in the backward pass: less memory,
    about a third more compute, identical results"""
    eval_batch_size: BatchSize
    """images per evaluation step"""
    epochs: Annotated[int, Field(ge=1, le=1_000_000)]
    """maximum number of passes over the training split"""
    patience: Annotated[int, Field(ge=1)] | None
    """epochs without improvement of the validation accuracy before stopping early: stops after more than this
    many, as in the article (Keras and Lightning stop at this many); null disables early stopping"""
    optimizer: Literal["adam", "adamw", "sgd"]
    """sgd uses Nesterov momentum 0.9"""
    optimizer_impl: Literal["fused", "foreach", "for_loop"]
    """implementation of the optimizer step in torch: fused is the fastest and needs no extra memory; foreach
    and for_loop need temporary copies of weights and state"""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """learning rate at the peak of the schedule"""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """applied to weights with two or more dimensions, not to biases and batch norms"""
    schedule: Literal["constant", "onecycle"]
    """onecycle rises linearly to the peak and falls linearly to zero at the last step"""
    warmup_fraction: Fraction
    """fraction of all steps in which onecycle rises"""
    label_smoothing: Fraction
    """fraction of each target that is spread over all classes; training loss only"""
    deterministic: bool
    """use deterministic algorithms: the same seed gives bitwise identical results on the same hardware"""
    checkpoint_every: Annotated[str, Field(pattern=CHECKPOINT_EVERY_PATTERN)] | None
    """how often a checkpoint is saved from which an interrupted run resumes, such as 500 steps, 1 epoch or
    10 minutes; null: only when the run is stopped, and at its end"""
    max_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None
    """minutes after which the run saves a checkpoint and stops as KILLED; the same command resumes it; null:
    no limit"""
    sanity_check_steps: Annotated[int, Field(ge=1)]
    """steps after which a training accuracy still at chance level is reported"""
    on_oom: Literal["record", "split", "fail"] | Auto
    """what to do when memory runs out. record: save it as the result of the run; split: restart in a new
    process with half the micro-batch or evaluation batch; fail: fail the run; auto: record in a sweep, else
    fail"""

    @model_validator(mode="after")
    def _check_micro_batch_size(self) -> "TrainConfig":
        micro, batch = self.micro_batch_size, self.batch_size
        if micro is not None and batch != "auto" and micro > batch:
            raise ValueError(
                f"micro_batch_size={micro} is greater than batch_size={batch}; it must be at most batch_size"
            )
        return self
