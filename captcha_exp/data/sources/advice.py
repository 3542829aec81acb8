"""Advice about the labels of a folder as a whole: which mistake explains what is odd, and the words to type.

A running number in the file names is easily taken for the label. It differs from labels that happen to be
numbers by its neighbors: of labels drawn at random, few differ by one.
"""

import contextlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence, Set
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from captcha_exp.config import CaptchaConfig
from captcha_exp.data.alphabet import Alphabet
from captcha_exp.data.sources import labels, tables
from captcha_exp.data.sources.files import TABLE_SUFFIXES, Files
from captcha_exp.data.sources.labels import Candidate
from captcha_exp.errors import UserError, one_line
from captcha_exp.runtime.text import escape_unprintable

MIN_NEIGHBORS = 9  # pairs of labels; fewer may be neighbors by chance
MAX_TABLES = 10  # files that are searched for the names of the images
MAX_TABLE_BYTES = 64 * 2**20
NUM_SAMPLED = 20  # images whose names are searched for
_NUMBER = re.compile(r"(\D*)([0-9]+)(\D*)")

Pair: TypeAlias = tuple[str, str]
"""the folder of an image, and a part of its name"""


def advise(
    files: Files,
    candidates: Sequence[Candidate],
    pattern: re.Pattern[str] | None,
    others: Sequence[str] | None,
    captcha: CaptchaConfig,
) -> list[str]:
    """Return what is odd about the labels of a folder, and what to do about it.

    Args:
        files: The files of the folder.
        candidates: Its images with their labels, as found.
        pattern: data.filename_pattern if the labels are in the file names, else None.
        others: Names of the files that are not images; None if data.labels says where the labels are.
        captcha: Alphabet and length of the labels.
    """
    images = [each for each in candidates if each.label and not each.is_row]
    if not images:
        return []
    alphabet, fits = Alphabet(captcha.alphabet), _label_check(captcha)
    are_invalid = 2 * sum(fits(each.label) for each in images) < len(images)
    is_running = is_running_number((_parent(each), each.label) for each in images)
    texts = [each.label for each in images if each.label.isdigit()] or [each.label for each in images]
    bounds = [bound(texts, key=lambda text: (len(text), text)) for bound in (min, max)]
    numbers = f"the labels are consecutive numbers, {' to '.join(bounds)}, as of a running number"
    if pattern is None:
        advice = f"{numbers}; if they are not what the images show, the table has the wrong column"
        return [advice] if is_running else []
    is_odd = is_running or are_invalid
    if others is not None and (table := _find_table(files, images, others, is_odd)):
        return [f"{numbers}; {table}" if is_running else table]
    part = _find_label_part(images, alphabet, fits)
    if part is not None:
        example, text, other_pattern = part
        read = f"{escape_unprintable(example.name)} is read as {example.label!r}"
        words = f"add \"data.filename_pattern='{other_pattern}'\""
        if is_running:
            return [f"{numbers}; {read}; if the label is {text!r}, {words}"]
        if are_invalid:
            return [f"{read}; if the label is {text!r}, {words}"]
        if pattern.fullmatch(example.label):  # a pattern that requires the other part was chosen on purpose
            return [f"{read}, but {text!r} looks like a label, too; if it is the label, {words}"]
    if is_running:
        table = "write them to labels.csv in the folder, with the columns file and label"
        return [f"{numbers}; if they are not what the images show, {table}"]
    return _advise_captcha(images, alphabet, captcha) if are_invalid else []


def is_running_number(pairs: Iterable[Pair]) -> bool:
    """Return whether the texts of each folder are consecutive numbers, perhaps with gaps or after a word.

    Of k out of S possible numbers, drawn at random, k (k - 1) / S pairs of neighbors are expected.
    """
    groups: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    num_texts = num_numbers = 0
    for folder, text in pairs:
        num_texts += 1
        if match := _NUMBER.fullmatch(text):
            num_numbers += 1
            groups[folder, match[1], match[3]].add(match[2])
    num_pairs, num_neighbors, expected, variance = 0, 0, 0.0, 0.0
    for texts in groups.values():
        numbers = sorted({int(text) for text in texts})
        num_neighbors += sum(b - a == 1 for a, b in pairwise(numbers))
        share = len(numbers) / _num_possible(texts)
        num_pairs += len(numbers) - 1
        expected += (len(numbers) - 1) * share
        variance += (len(numbers) - 1) * share * (1 - share)
    if num_numbers < 0.9 * num_texts or num_pairs < MIN_NEIGHBORS:
        return False
    return num_neighbors >= 0.6 * num_pairs and num_neighbors > expected + 6 * math.sqrt(variance) + 2


def _num_possible(texts: Set[str]) -> float:
    """Return how many numbers are possible if the digits were drawn from those that occur."""
    digits, first = set("".join(texts)), {text[0] for text in texts}
    lengths = set(map(len, texts))
    if len(lengths) > 1 and "0" not in first:  # not padded, as no label of fixed length is
        return math.inf
    num_first = len(digits) - (first | {"0"} == digits and "0" not in first)
    return float(num_first * len(digits) ** (max(lengths) - 1))


def _label_check(captcha: CaptchaConfig) -> Callable[[str], bool]:
    """Return a function that checks whether a text can be a label."""
    known = set(captcha.alphabet)
    if captcha.case == "fold":
        known |= set(captcha.alphabet.lower() + captcha.alphabet.upper())
    return lambda text: captcha.shortest_length <= len(text) <= captcha.length and known >= set(text)


def _parent(candidate: Candidate) -> str:
    return PurePosixPath(candidate.name).parent.as_posix()


# -- the parts of the file names -----------------------------------------------------------------------------


def _find_label_part(
    images: Sequence[Candidate], alphabet: Alphabet, fits: Callable[[str], bool]
) -> tuple[Candidate, str, str] | None:
    """Return an image, the part of its name that varies like a label, and a pattern for that part.

    None if no part other than the current label does.
    """
    separators = "".join(c for c in "_-.,;~@#()[] " if c not in alphabet.characters)
    split = re.compile(f"([{re.escape(separators)}]+)").split
    parts = [split(labels.stem(each.name)) for each in images]
    skeleton, _ = Counter(tuple(each[1::2]) for each in parts).most_common(1)[0]
    chosen = [(each, part) for each, part in zip(images, parts, strict=True) if tuple(part[1::2]) == skeleton]
    if len(chosen) < 0.9 * len(images) or not skeleton:
        return None
    columns = list(zip(*(part[::2] for _, part in chosen), strict=True))
    num_labels = len({each.label for each, _ in chosen})
    for number, column in enumerate(columns):
        is_current = sum(text == each.label for text, (each, _) in zip(column, chosen, strict=True))
        varies = len(set(column)) >= max(3, min(1000, num_labels // 2))
        if 2 * is_current >= len(chosen) or not varies or sum(map(fits, column)) < 0.95 * len(chosen):
            continue
        if is_running_number(zip((_parent(each) for each, _ in chosen), column, strict=True)):
            continue
        pattern = _pattern_of(columns, skeleton, number)
        matches = [re.fullmatch(pattern, labels.stem(each.name)) for each, _ in chosen]
        if all(m and m["label"] == text for m, text in zip(matches, column, strict=True)):
            return chosen[0][0], column[0], pattern
    return None


def _pattern_of(columns: Sequence[Sequence[str]], separators: Sequence[str], label: int) -> str:
    """Return the regular expression of names with these parts, one of which is the label."""
    pattern = ""
    for number, (column, separator) in enumerate(zip(columns, [*separators, ""], strict=True)):
        if number == label:
            pattern += "(?P<label>.+)" if number == len(columns) - 1 else "(?P<label>.+?)"
        elif all(re.fullmatch("[0-9]+", text) for text in column):
            pattern += r"\d+"
        else:
            pattern += column[0] if len(set(column)) == 1 and column[0].isalnum() else ".*?"
        pattern += re.sub(r"[^\w-]", r"\\\g<0>", separator)
    return pattern


# -- tables of other names -----------------------------------------------------------------------------------


def _find_table(files: Files, images: Sequence[Candidate], others: Sequence[str], is_odd: bool) -> str:
    """Return what to do with a table in or next to the folder that names the images; "" if there is none.

    A table that has the labels of the file names is not worth mentioning. One that cannot be read as it is,
    or is next to the folder, is only mentioned if the labels are odd.
    """
    stems = {labels.stem(each.name) for each in images}
    names = [name for name in others if PurePosixPath(name).stem not in stems]  # not a text for each image
    if is_odd:
        with contextlib.suppress(OSError):
            names += [f"../{path.name}" for path in sorted(files.path.parent.iterdir())]
    suffixes = (*TABLE_SUFFIXES, ".json", ".txt")
    for name in [name for name in names if name.lower().endswith(suffixes)][:MAX_TABLES]:
        table = files.path / name
        if not _names_images(table, images):
            continue
        shown = escape_unprintable(name)
        found = f"{shown} names these images"
        if table.suffix.lower() not in TABLE_SUFFIXES:
            if is_odd:
                return f"{found}; labels can be read from a .csv, .tsv or .jsonl file: see data.labels"
            continue
        find = labels.index_by_name([each.name for each in images])
        by_name = {each.name: each.label for each in images}
        try:
            read = tables.read_rows(files, table, tables.FILE_COLUMNS, tables.LABEL_COLUMNS)
            rows = [(find(file), label) for _, (file, label) in read]
        except UserError as error:
            if is_odd:
                return f"{found}, but {one_line(error)}; correct it, and add data.labels={shown}"
            continue
        differing = sum(file is not None and by_name[file] != label for file, label in rows)
        if 2 * differing >= len(images):
            return f"{found} with other labels; add data.labels={shown}, or data.labels=names for these"
    return ""


def _names_images(table: Path, images: Sequence[Candidate]) -> bool:
    """Return whether at least half of some images are named in a file."""
    try:
        if not table.is_file() or table.stat().st_size > MAX_TABLE_BYTES:
            return False
        content = table.read_bytes()
    except OSError:
        return False
    sample = [PurePosixPath(each.name) for each in images[:: max(1, len(images) // NUM_SAMPLED)]]
    cell = rb'(?m)(^|[\\/",;\t])%s["]?[ ]*[,;\t]'  # without its suffix
    hits = (
        path.name.encode(errors="replace") in content
        or re.search(cell % re.escape(path.stem.encode(errors="replace")), content)
        for path in sample
    )
    return 2 * sum(map(bool, hits)) >= len(sample)


# -- another alphabet or length ------------------------------------------------------------------------------


def _advise_captcha(images: Sequence[Candidate], alphabet: Alphabet, captcha: CaptchaConfig) -> list[str]:
    """Return the captcha options that would accept most labels."""
    advice, total = [], len(images)
    ((length, num_labels),) = Counter(len(each.label) for each in images).most_common(1)
    if length != captcha.length and 2 * num_labels > total:
        have = f"{num_labels:,} of {total:,} labels have {length} characters, not {captcha.length}"
        advice.append(f"{have}; to accept them, add captcha.length={length}")
    texts = [alphabet.fold_case(each.label) if captcha.case == "fold" else each.label for each in images]
    known = set(alphabet.characters)
    num_labels = sum(not known >= set(text) for text in texts)
    unknown = "".join(
        sorted(set("".join(texts).lower() if captcha.case == "fold" else "".join(texts)) - known)
    )
    if 2 * num_labels > total and re.fullmatch(r"\w{1,62}", unknown):
        have = f"{num_labels:,} of {total:,} labels have characters that are not in captcha.alphabet"
        advice.append(f"{have}; to accept them, add captcha.alphabet={alphabet.characters}{unknown}")
    return advice
