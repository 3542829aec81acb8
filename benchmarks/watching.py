"""Count the false alarms of `captcha-exp watch` and the changes that it finds, over many sequences.

The statistics of each image are computed once; a sequence is drawn from them without replacement. Prints
one JSON line for each case, with 95% intervals: unchanged images (the share with an alarm within 200 images;
designed: at most 2%) and changed ones (the share that is found within 60 images).

    python benchmarks/watching.py MODEL.onnx                              of experiment=quickstart
    python benchmarks/watching.py MODEL.onnx --same DIR --other DIR ...   of a folder; DIR: not trained on

With folders, --sorted also follows all images of --same once in the order of their names, that is, labels.
"""

import argparse
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import captcha.image
import numpy as np
import numpy.typing as npt
from PIL import Image

from captcha_exp import OnnxPredictor, compose, load
from captcha_exp.cli.predict_onnx import expand_folders
from captcha_exp.config import (
    CaptchaConfig,
    CaptchaLibraryConfig,
    Config,
    GeneratorConfig,
    WheezyLibraryConfig,
)
from captcha_exp.data import images
from captcha_exp.data.sources import get_renderer_spec
from captcha_exp.data.sources.generators import image_rng
from captcha_exp.export.image_statistics import MAX_ROWS, describe_all, read_reference
from captcha_exp.export.predictor import to_pixels
from captcha_exp.export.watch import ALPHA, compare
from captcha_exp.model.proportions import wilson_interval

Pixels = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.float64]
SAME_TRIALS, SAME_IMAGES, SAME_POOL = 200, 200, 2400
OTHER_TRIALS, OTHER_IMAGES, OTHER_POOL = 100, 60, 400
OTHER_SEED = 7  # of images that are not in the training


def load_config(*overrides: str) -> tuple[Config, GeneratorConfig]:
    """Return the config of the experiment with overrides, and a data group with another seed."""
    config = load(compose("experiment=quickstart", "tracking=none", *overrides))
    assert isinstance(config.data, CaptchaLibraryConfig | WheezyLibraryConfig)
    return config, replace(config.data, seed=OTHER_SEED)


def render(count: int, *overrides: str) -> list[Pixels]:
    """Render images in this process, so that the generator can be patched."""
    config, data = load_config(*overrides)
    spec = get_renderer_spec(data)
    draw = spec.make_renderer()
    captcha_config: CaptchaConfig = config.captcha
    found = []
    for index in range(count):
        rng = image_rng(data, index)
        found.append(images.to_array(draw(spec.sample_label(captcha_config, rng), rng), 3))
    return found


@contextmanager
def patched(target: Any, name: str, value: Any) -> Iterator[None]:
    original = vars(target)[name]  # of a static method, not its function
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, original)


def with_dots(number: int) -> list[Pixels]:
    """Render with another number of dots than the 30 of the package."""
    original = captcha.image.ImageCaptcha.create_noise_dots

    def draw(image: Image.Image, color: Any, width: int = 3, _: int = 30) -> Image.Image:
        return original(image, color, width, number)

    with patched(captcha.image.ImageCaptcha, "create_noise_dots", staticmethod(draw)):
        return render(OTHER_POOL)


def with_colors(change: Callable[[int, int], tuple[int, int]]) -> list[Pixels]:
    """Render with other limits of the random colors: 238 to 255 of the background, 10 to 200 of the text."""
    original = captcha.image.random_color

    def draw(start: int, end: int, *opacity: Any) -> Any:
        return original(*change(start, end), *opacity)

    with patched(captcha.image, "random_color", draw):
        return render(OTHER_POOL)


def converted(change: Callable[[Image.Image], Image.Image]) -> list[Pixels]:
    """Render as in the training, then change each image."""
    return [
        images.to_array(change(Image.fromarray(pixels)).convert("RGB"), 3) for pixels in render(OTHER_POOL)
    ]


def as_jpeg(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=50)
    return Image.open(io.BytesIO(stream.getvalue()))


def with_noise(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image, np.float64)
    noise = np.random.default_rng(int(pixels.sum())).normal(0, 8, pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


CHANGES: dict[str, Callable[[], list[Pixels]]] = {
    "font: DejaVuSerif-Bold": lambda: render(OTHER_POOL, "data.fonts=[DejaVuSerif-Bold.ttf]"),
    "font: DejaVuSansMono": lambda: render(OTHER_POOL, "data.fonts=[DejaVuSansMono.ttf]"),
    "noise: 60 dots instead of 30": lambda: with_dots(60),
    "noise: 15 dots instead of 30": lambda: with_dots(15),
    "noise: normal, sigma 8": lambda: converted(with_noise),
    "color: background 215 to 235": lambda: with_colors(lambda a, b: (215, 235) if a == 238 else (a, b)),
    "color: text 90 to 200": lambda: with_colors(lambda a, b: (90, 200) if a == 10 else (a, b)),
    "color: gray": lambda: converted(lambda image: image.convert("L")),
    "size: 200x75": lambda: converted(lambda image: image.resize((200, 75))),
    "compression: JPEG, quality 50": lambda: converted(as_jpeg),
    "generator: wheezy": lambda: render(OTHER_POOL, "data=wheezy"),
}


def read_folder(folder: str) -> list[Pixels]:
    return [to_pixels(name) for name in expand_folders([folder])]


def report(case: str, references: list[Rows], pool: Rows, trials: int, num_images: int) -> None:
    """Run the trials of a case, with the references in turn, and print its line."""
    found, first = [], Counter[str]()
    for trial in range(trials):
        rng = np.random.default_rng([trial, 1])
        chosen = pool[rng.choice(len(pool), min(num_images, len(pool)), replace=False)]
        result = compare(references[trial % len(references)], chosen)
        if result.found_at is not None:
            found.append(result.found_at)
            first[result.moved[0]] += 1
    low, high = wilson_interval(len(found), trials)
    values = {
        "benchmark": "watching",
        "case": case,
        "alpha": ALPHA,
        "trials": trials,
        "images": min(num_images, len(pool)),
        "pool": len(pool),
        "reference": len(references[0]),
        "alarms": len(found),
        "share": round(len(found) / trials, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "median_images": float(np.median(found)) if found else None,
        "p95_images": float(np.quantile(found, 0.95)) if found else None,
        "first": dict(first.most_common()),
    }
    print(json.dumps(values), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--same", metavar="DIR")
    parser.add_argument("--other", metavar="DIR", nargs="*", default=[])
    parser.add_argument("--sorted", action="store_true")
    parser.add_argument("--only", metavar="TEXT", help="only the rendered changes whose names have this")
    arguments = parser.parse_args()
    predictor = OnnxPredictor(arguments.model)
    reference = read_reference(predictor.manifest.reference)

    def describe(arrays: list[Pixels]) -> Rows:
        return describe_all(predictor, arrays)

    if arguments.only is not None:
        for case, make in CHANGES.items():
            if arguments.only in case:
                report(f"quickstart -> {case}", [reference], describe(make()), OTHER_TRIALS, OTHER_IMAGES)
        return
    name = Path(arguments.same).name if arguments.same else "quickstart"
    same = describe(read_folder(arguments.same) if arguments.same else render(SAME_POOL))
    num_same = min(SAME_IMAGES, len(same) // 2)
    report(f"{name}: unchanged, reference of the model", [reference], same, SAME_TRIALS, num_same)
    if len(same) > 2 * MAX_ROWS:
        # One half is for references, the other for sequences.
        order = np.random.default_rng(0).permutation(len(same))
        half = len(same) // 2
        rng = np.random.default_rng(0)
        redrawn = [same[order[:half]][rng.permutation(half)[:MAX_ROWS]] for _ in range(SAME_TRIALS)]
        report(f"{name}: unchanged, a reference for each", redrawn, same[order[half:]], SAME_TRIALS, num_same)
    if arguments.sorted:
        result = compare(reference, same)
        print(json.dumps({"benchmark": "watching", "case": f"{name}: in order of names", **result.to_json()}))
    if arguments.same:
        for folder in arguments.other:
            case = f"{name} -> {Path(folder).name}"
            report(case, [reference], describe(read_folder(folder)), OTHER_TRIALS, OTHER_IMAGES)
        return
    for case, make in CHANGES.items():
        report(f"{name} -> {case}", [reference], describe(make()), OTHER_TRIALS, OTHER_IMAGES)


if __name__ == "__main__":
    main()
