"""The interactive loop of `captcha-exp predict`: ask for an image and print its text."""

import contextlib
import os
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from captcha_exp.cli.output import to_json
from captcha_exp.model.predict import Predictor, expand_path
from captcha_exp.runtime.text import escape_unprintable


def prompt_loop(predictor: Predictor, as_json: bool) -> None:
    """Predict one path per line until end of input (Ctrl-D). Errors do not end the loop."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 - adds history and line editing to input()
        print("Enter the path of an image, or drop a file here. Press Ctrl-D to exit.", file=sys.stderr)
    while True:
        try:
            line = input("image: " if is_terminal else "")
        except EOFError:
            if is_terminal:
                print(file=sys.stderr)
            return
        except UnicodeDecodeError:
            print("invalid text in this terminal's encoding; type the path again", file=sys.stderr)
            continue
        path = parse_path(line)
        if path is None:
            continue
        (prediction,) = predictor.predict([path])
        if as_json:
            print(to_json(prediction.to_json()), flush=True)
        elif prediction.error:
            print(escape_unprintable(f"{path}: {prediction.error}"), file=sys.stderr)
        else:
            print(prediction.to_line(), flush=True)


def parse_path(line: str) -> Path | None:
    """Return the path in a typed, pasted or dropped line: plain, quoted, a file: URL, or with `~`."""
    text = line.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if text.startswith("file://"):
        with contextlib.suppress(ValueError):  # an invalid URL is reported as a missing file
            text = unquote(urlsplit(text).path)
    else:
        spaced = text.replace("\\ ", " ")  # a space as the shell escapes it
        if not os.path.exists(text) and os.path.exists(spaced):  # noqa: PTH110 - pathlib's raises on long names
            text = spaced
    return expand_path(text) if text else None
