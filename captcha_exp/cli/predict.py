"""The command `predict` with a run or its weights."""

import argparse
import logging

from captcha_exp.cli import interactive
from captcha_exp.cli.parser import reading_options
from captcha_exp.errors import UserError
from captcha_exp.model.predict import Prediction, Predictor, find_images, resolve_weights

logger = logging.getLogger(__name__)


def predict(arguments: argparse.Namespace) -> list[Prediction]:
    """Return the predictions of images; without images, prompt for them until end of input.

    Raises:
        UserError: the run has no weights, the device is not available, or a folder has no images.
    """
    if arguments.self_test:
        raise UserError(f"--self-test: proves a file of captcha-exp export, not {arguments.run}")
    weights = resolve_weights(arguments.run)
    predictor = Predictor(weights, arguments.device, reading_options(arguments))
    images = find_images(arguments.images)
    if arguments.run == "latest":
        logger.info(f"Using {weights.parent}")
    if not arguments.images:
        interactive.prompt_loop(predictor, arguments.json)
    return list(predictor.predict_all(images)) if images else []
