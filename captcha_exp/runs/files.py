"""The files of a run directory and their hashes."""

from pathlib import Path

from captcha_exp.runtime.files import sha256_of


def list_run_files(run_dir: Path) -> list[Path]:
    """Return all files of a run or sweep, sorted; the files of the jobs of a sweep belong to the jobs."""
    job_dirs = {record.parent for record in run_dir.glob("*/run.json")}
    return sorted(p for p in run_dir.rglob("*") if p.is_file() and job_dirs.isdisjoint(p.parents))


def hash_files(run_dir: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a run by its path, except run.json, which stores them."""
    files = (path for path in list_run_files(run_dir) if path.name != "run.json")
    return {path.relative_to(run_dir).as_posix(): sha256_of(path) for path in files}
