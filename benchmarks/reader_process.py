"""Read images with one reader on one core, for `against_readers.py`; a request and an answer per line.

Runs where only the reader is installed: imports nothing of this project, except for a model of it.

    python reader_process.py KIND MODEL IMAGES CORE

KIND is `captcha_exp`, with the ONNX file MODEL, or `ddddocr`, whose MODEL is `default` or `beta`. IMAGES is
a file of JSON lines: the label, and the content of the image file in base64. A request is {"start":
"encoded" or "decoded", "batch_size": 1, "count": 100}; the answer has the seconds and the texts.
"""

import base64
import importlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Read = Callable[[Sequence[Any]], list[str]]


def make_captcha_exp(path: str) -> tuple[Read, Callable[[bytes], Any], int]:
    """Return a function that reads a batch, one that decodes an image for it, and the size of the model."""
    from captcha_exp import OnnxPredictor
    from captcha_exp.export.predictor import to_pixels

    predictor = OnnxPredictor(path, num_threads=1)
    return lambda batch: [each.text for each in predictor(batch)], to_pixels, len(predictor.content)


def make_ddddocr(model: str) -> tuple[Read, Callable[[bytes], Any], int]:
    """Return the same for ddddocr, which takes one image at a time and images of Pillow."""
    import onnxruntime
    from PIL import Image

    # ddddocr has no option for the threads.
    class OneThread(onnxruntime.InferenceSession):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self, path: str, **options: Any) -> None:
            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = settings.inter_op_num_threads = 1
            sizes.append(Path(path).stat().st_size)
            super().__init__(path, settings, **options)

    sizes: list[int] = []
    onnxruntime.InferenceSession = OneThread
    reader = importlib.import_module("ddddocr").DdddOcr(show_ad=False, beta=model == "beta")

    def decode(content: bytes) -> Any:
        image = Image.open(io.BytesIO(content))
        image.load()
        return image

    return lambda batch: [reader.classification(each) for each in batch], decode, sizes[0]


def main() -> None:
    kind, model, images, core = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})  # before any thread is started
    rows = [json.loads(line) for line in Path(images).read_text().splitlines()]
    encoded = [base64.b64decode(row["image"]) for row in rows]
    read, decode, size = (make_captcha_exp if kind == "captcha_exp" else make_ddddocr)(model)
    starts = {"encoded": encoded, "decoded": [decode(each) for each in encoded]}
    packages = ("onnxruntime", "numpy", "pillow", *([kind] if kind == "ddddocr" else []))
    print(
        json.dumps(
            {"model": Path(model).name, "bytes": size, "versions": {name: version(name) for name in packages}}
        ),
        flush=True,
    )
    for line in sys.stdin:
        request = json.loads(line)
        batch = request["batch_size"]
        chosen = starts[request["start"]][: request["count"]]
        texts = []
        wall, cpu = time.perf_counter(), time.process_time()
        for start in range(0, len(chosen), batch):
            texts += read(chosen[start : start + batch])
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps({"texts": texts, **seconds}), flush=True)


if __name__ == "__main__":
    main()
