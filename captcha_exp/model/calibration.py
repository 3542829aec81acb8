"""Fitting a calibration on the validation split, whose images the weights were not fitted to.

Axes: N images, T positions in the longest label.
"""

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captcha_exp.config import Config
from captcha_exp.data.dataset import Split
from captcha_exp.model.confidence import Calibration, logit, operating_points
from captcha_exp.model.heads import Head
from captcha_exp.model.networks import Recognizer
from captcha_exp.runtime import device as devices

MAX_IMAGES = 4096  # of the validation split
MAX_TEMPERATURE = 10.0
PRIOR_DEVIATION = np.array([0.5, 1.0])  # of slope and intercept around 1 and 0


@torch.inference_mode()
def calibrate(model: Recognizer, validation: Split, config: Config) -> Calibration:
    """Return the calibration of a trained model in fp32; its mode is restored afterwards."""
    config = devices.in_fp32(config)
    was_training = model.training
    model.eval()
    logits, targets = [], []
    for batch in validation.batches(config.train.eval_batch_size):
        logits.append(model(batch.images).float().cpu())
        targets.append(batch.targets.cpu())
        if len(targets) * config.train.eval_batch_size >= MAX_IMAGES:
            break
    model.train(was_training)
    return fit(model.head, torch.cat(logits), torch.cat(targets))


def fit(head: Head, logits: Tensor, targets: Tensor) -> Calibration:
    """Fit a calibration to logits (N, ...) of labels (N, T)."""
    temperature = fit_temperature(head, logits, targets)
    decoded = head.decode(logits / temperature)
    is_correct = (decoded.ids == targets).all(dim=1)
    return fit_confidence(temperature, decoded.text_confidence.numpy(), is_correct.numpy())


def fit_temperature(head: Head, logits: Tensor, targets: Tensor) -> float:
    """Return the temperature with the largest likelihood of the labels.

    That of a label has a lower bound, which a wrong label reaches: few of these do not decide. The logarithm
    has a normal prior around 0: where all labels are predicted, the temperature does not fall to its limit.
    """

    from scipy.optimize import minimize_scalar  # not before the first step of a training

    def loss(log_temperature: float) -> float:
        likelihood = head.log_likelihood(logits / math.exp(log_temperature), targets)
        return log_temperature**2 / 2 - float(likelihood.double().sum())

    limit = math.log(MAX_TEMPERATURE)
    found = minimize_scalar(loss, bounds=(-limit, limit), method="bounded", options={"xatol": 0.01})
    return math.exp(float(found.x))


def fit_confidence(
    temperature: float, probabilities: npt.ArrayLike, is_correct: npt.ArrayLike
) -> Calibration:
    """Fit the confidence to probabilities (N,) of predicted texts, and to whether (N,) these are right.

    Slope and intercept have a normal prior around 1 and 0. As in Platt's method, n right answers make the
    next one right with probability (n + 1) / (n + 2), not with certainty.
    """
    from scipy.optimize import minimize

    odds, found = logit(probabilities), np.asarray(is_correct, np.bool_)
    num_right = int(found.sum())
    right = np.where(found, (num_right + 1) / (num_right + 2), 1 / (len(found) - num_right + 2))

    def loss(weights: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        scores = weights[0] * odds + weights[1]
        distance = (weights - (1, 0)) / PRIOR_DEVIATION
        total = np.logaddexp(0, scores).sum() - (right * scores).sum() + (distance**2).sum() / 2
        error = 1 / (1 + np.exp(-scores)) - right
        gradient = np.array([(error * odds).sum(), error.sum()]) + distance / PRIOR_DEVIATION
        return float(total), gradient

    slope, intercept = minimize(loss, np.array([1.0, 0.0]), jac=True, method="BFGS").x
    fitted = Calibration(temperature, float(slope), float(intercept), len(odds))
    return replace(fitted, points=operating_points(fitted.confidence(probabilities)))
