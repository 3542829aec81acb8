"""The interactive loop: asks for a picture, says what stands in it, and goes on whatever happens."""

import contextlib
import json
import os
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from captcha_exp.model.predict import Predictor, expand_path


def prompt_loop(predictor: Predictor, as_json: bool) -> None:
    """Answers until the input ends (Ctrl-D); a script may write one path per line into it."""
    at_a_terminal = sys.stdin.isatty()
    if at_a_terminal:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - gives input() its history and arrow keys
        print("a picture's path, or drop a file here; Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            line = input("picture: " if at_a_terminal else "")
        except EOFError:
            if at_a_terminal:
                print(file=sys.stderr)
            return
        except UnicodeDecodeError:
            print("this line is no text in this terminal's encoding", file=sys.stderr)
            continue
        path = parse_path(line)
        if path is None:
            continue
        (reading,) = predictor.predict([path])
        if as_json:
            print(json.dumps(reading.to_json(), ensure_ascii=False), flush=True)
        elif reading.error:
            print(f"{path}: {reading.error}", file=sys.stderr)
        else:
            print(f"{reading.text}  {reading.confidence:.1%}", flush=True)


def parse_path(line: str) -> Path | None:
    """The path that a person typed, pasted or dropped: with quotes, as a file: address, with `~`; or None."""
    text = line.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if text.startswith("file://"):
        with contextlib.suppress(ValueError):  # an address with half a bracket is a missing file
            text = unquote(urlsplit(text).path)
    else:
        spaced = text.replace("\\ ", " ")  # a shell's way to write a space
        if not os.path.exists(text) and os.path.exists(spaced):  # noqa: PTH110 - pathlib's raises on long names
            text = spaced
    return expand_path(text) if text else None
