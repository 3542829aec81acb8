"""The report of a scan: what was inferred, ignored, rejected or repeated, before anything is created."""

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from captcha_exp.config import Config, FolderConfig
from captcha_exp.data import duplicates, sources
from captcha_exp.data.sources import ScanResult, Source
from captcha_exp.data.sources.labels import is_row
from captcha_exp.data.splits import count_by_share, split_images
from captcha_exp.errors import UserError
from captcha_exp.runtime.text import escape_unprintable, preview

logger = logging.getLogger(__name__)

KINDS = ("invalid", "conflict", "duplicate")  # of rejected images; data.on_KIND is the policy
MAX_REJECTED_SHOWN = 50  # rows of the table of rejected images
MAX_SAME_REASON = 10  # images with the same reason that have a row each


def report_scan(scan: ScanResult, source: Source, config: Config) -> None:
    """Report every file of a folder that is ignored, rejected, or used with a remark, and odd labels.

    Raises:
        UserError: images cannot be used, and the policy for their kind is error; fix or remove them, or set
            it to skip.
    """
    data = config.data
    assert isinstance(data, FolderConfig)
    for each in source.inferences:
        logger.info(f"{each.key}: {each.value}, inferred ({each.evidence})")
    if source.corrections:
        counts = Counter(each["action"] for each in source.corrections)
        shown = ", ".join(f"{action} {count:,}" for action, count in counts.items())
        logger.info(f"Corrected by corrections.csv ({len(source.corrections):,}): {shown}")
    for remark, names in scan.remarks.items():
        logger.info(f"Used ({len(names):,}): {remark} ({preview(names)})")
    if source.ignored:
        logger.info(f"Ignored, not images ({len(source.ignored):,}): {preview(source.ignored)}")
    _report_duplicates(scan, data)
    if not scan.rejected:
        for advice in source.advice:
            logger.warning(f"{data.path_text}: {advice}")
        return
    rows = [(name, reason) for name, reason in scan.rejected if is_row(name)]
    files = [(name, reason) for name, reason in scan.rejected if not is_row(name)]
    num_good = len(scan.labels)
    problems = [f"{len(files):,} of {len(files) + num_good:,} images"] if files else []
    tables = Counter(name.rpartition(", row ")[0] for name, _ in rows)
    problems += [f"{count:,} row{'s' * (count > 1)} of {table}" for table, count in tables.items()]
    problem = f"{data.path_text}: {' and '.join(problems)} cannot be used"
    can_skip = _has_all_splits(scan, config)
    lines = [*source.advice, *_rejected_table(rows, files, can_skip)]
    policies = {kind: getattr(data, f"on_{kind}") for kind in KINDS}
    kinds = [kind for kind in KINDS if any(scan.kind_of(name) == kind for name, _ in scan.rejected)]
    blocking = [kind for kind in kinds if policies[kind] == "error"]
    if blocking or not num_good:
        words = " ".join(f"data.on_{kind}=skip" for kind in blocking)
        skip = f", or train on the other {num_good:,} with {words}" if can_skip else ""
        raise UserError(f"{problem}; fix or remove them{skip}", *lines)
    chosen = ", ".join(f"data.on_{kind}=skip" for kind in kinds)
    logger.warning(f"{problem}; training on the other {num_good:,} ({chosen})")
    for line in lines:
        logger.info(line)


def _report_duplicates(scan: ScanResult, data: FolderConfig) -> None:
    """Report images that occur several times, and nearly equal ones with different labels."""
    names = [name for name, _ in scan.files]
    for kind, what in duplicates.KINDS.items():
        groups = [group.indices for group in scan.duplicates if group.kind == kind]
        if not groups:
            continue
        example = " and ".join(escape_unprintable(names[n]) for n in groups[0][:2])
        total = sum(map(len, groups))
        logger.info(f"{what}: {total:,} images in {len(groups):,} groups, kept in one split ({example})")
        if odd := [group for group in groups if len({scan.labels[n] for n in group}) > 1]:
            pair = " and ".join(f"{escape_unprintable(names[n])} as {scan.labels[n]!r}" for n in odd[0][:2])
            logger.warning(
                f"{data.path_text}: {len(odd):,} groups of {what} have different labels, such as "
                f"{pair}; correct the wrong ones"
            )


def check_splits(scan: ScanResult, splits: Mapping[str, Sequence[int]], config: Config) -> None:
    """Check that no image is in two splits, and report labels that are, which only given splits allow.

    Raises:
        UserError: equal images are in different splits; remove one of them.
    """
    split_of = {index: name for name, indices in splits.items() for index in indices}
    groups = [group for group in scan.duplicates if len({split_of[n] for n in group.indices}) > 1]
    if groups:
        names = [escape_unprintable(name) for name, _ in scan.files]
        lines = []
        for group in groups[:MAX_SAME_REASON]:
            one = group.indices[0]
            other = next(n for n in group.indices if split_of[n] != split_of[one])
            what = duplicates.KINDS[group.kind]
            lines.append(f"  {names[one]} ({split_of[one]}) and {names[other]} ({split_of[other]}): {what}")
        if len(groups) > MAX_SAME_REASON:
            lines.append(f"  and {len(groups) - MAX_SAME_REASON:,} more")
        count = f"{len(groups):,} images are" if len(groups) > 1 else "1 image is"
        raise UserError(
            f"{getattr(config.data, 'path_text', '')}: {count} in more than one of the splits that it "
            "gives, so the test accuracy would be too high; leave out one of the equal images, or split by "
            "label with data.split_by=label",
            *lines,
        )
    if scan.splits and config.data.folds is None:
        labels = {name: {scan.labels[n] for n in indices} for name, indices in splits.items()}
        logger.info(f"splits as given: {', '.join(f'{name} {len(each):,}' for name, each in splits.items())}")
        if common := labels["test"] & labels["train"]:
            logger.info(f"{len(common):,} labels of the test split are also in the training split")


def check_shares(training_files: Sequence[str], data: FolderConfig) -> None:
    """Check that every folder of data.shares is shown in training, and report how much of each is.

    Raises:
        UserError: one is not; leave it out, or change data.shares.
    """
    if len(data.paths) == 1:
        return
    counts, total = Counter(sources.folder_number(name) for name in training_files), len(training_files)
    shown = count_by_share(data.shares or (), total)
    for number, path in enumerate(data.paths, 1):
        share = f"{counts[number] / total:.1%}"
        if data.shares is not None:
            if not counts[number]:
                raise UserError(
                    f"data.shares={list(data.shares)}: {path} has no images in the training split to draw "
                    "from; leave it out of data.path, or set data.shares=null"
                )
            if not shown[number - 1]:
                raise UserError(
                    f"data.shares={list(data.shares)}: none of the {total:,} images of an epoch would be "
                    f"from {path}; give it a larger share, or leave it out of data.path"
                )
            share += f"; an epoch shows {shown[number - 1]:,} images of it, {shown[number - 1] / total:.1%}"
        logger.info(f"folder {number}, {path}: {counts[number]:,} training images, {share}")


def _has_all_splits(scan: ScanResult, config: Config) -> bool:
    try:
        return bool(split_images(scan.labels, scan.splits, config))
    except UserError:
        return False


def _rejected_table(
    rows: Sequence[tuple[str, str]], files: Sequence[tuple[str, str]], can_skip: bool
) -> list[str]:
    """Return a line for each rejected row and file, or for many files with the same reason."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in files:
        by_reason[reason].append(name)
    pairs = rows if len(rows) <= MAX_SAME_REASON else []  # the advice has the reason
    for reason, names in by_reason.items():
        if len(names) > MAX_SAME_REASON:
            pairs = [*pairs, (f"{len(names):,} images", f"{reason} ({preview(names)})")]
    pairs = [*pairs, *(pair for pair in files if len(by_reason[pair[1]]) <= MAX_SAME_REASON)]
    if not pairs:
        return []
    width = min(40, max(len(escape_unprintable(name)) for name, _ in pairs))
    table = [
        f"  {escape_unprintable(name):<{width}}  {reason}" for name, reason in pairs[:MAX_REJECTED_SHOWN]
    ]
    if len(pairs) > MAX_REJECTED_SHOWN:
        lists_all = "; captcha-exp data --json data.on_invalid=skip ... lists all" if can_skip else ""
        table.append(f"  and {len(pairs) - MAX_REJECTED_SHOWN:,} more{lists_all}")
    return table
