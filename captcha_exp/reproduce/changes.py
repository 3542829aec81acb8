"""What is not as it was when the run was trained: versions, code, machine, environment variables."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from captcha_exp.reproduce.reference import ABSENT, ReferenceRun, RunResult

Affects: TypeAlias = Literal["nothing", "images", "numbers"]

IMAGE_PACKAGES = {"pillow", "captcha", "wheezy.captcha"}
RECORD_ONLY_PACKAGES = {"mlflow", "hydra-core", "omegaconf", "pydantic", "safetensors"}
"""packages that carry or check values, and compute none: what they carried is compared itself"""

NO_EFFECT_KEYS = (
    *("name", "tracking.", "sweep.", "card."),  # how a run is called, reported and planned
    *("data.cache", "data.workers", "data.path"),  # where pictures are and who draws them; they are compared
    *("device.preload_limit_mib", "device.vram_budget_mib"),  # where they lie; how much is allowed
    *("train.checkpoint_every", "train.max_minutes", "train.on_oom", "train.sanity_check_steps"),
)
"""keys of a config, or their beginnings, that no result depends on"""

NO_EFFECT_CODE = (
    *("captcha_exp/cli/", "captcha_exp/doctor/", "captcha_exp/reproduce/", "captcha_exp/sweep/"),
    *(
        "captcha_exp/tracking/",
        "captcha_exp/runtime/console.py",
        "captcha_exp/model/predict.py",
        "captcha_exp/report/figures.py",
    ),
    "conf/",
)
"""code that computes nothing of a training; of conf/, a saved config has all that it took"""

DEVICE_FIELDS = {
    "cpu": ("CPU", "numbers"),
    "cpu_capability": ("CPU capability", "numbers"),
    "cores": ("cores", "nothing"),  # device.threads says how many are used
    "gpu": ("gpu", "numbers"),
    "gpu_capability": ("card's capability", "numbers"),
    "gpu_bytes": ("card's memory", "nothing"),
    "cuda": ("CUDA", "numbers"),
    "cudnn": ("cuDNN", "numbers"),
}
"""keys of environment.json's device, beside its name and threads, which are the config's"""

EQUIVALENT_SOURCES = {"variable ATEN_CPU_CAPABILITY": "CPU capability"}
"""what acts through another thing that is compared, too"""


@dataclass(frozen=True)
class Change:
    """One thing that is not as it was."""

    name: str
    before: Any
    after: Any
    affects: Affects
    """what can come out otherwise by it"""
    is_input: bool = False
    """whether it is a part of what was asked to run: a key, a picture, a label"""
    is_headline: bool = True
    """whether a verdict of one line names it"""

    @property
    def source(self) -> str:
        """What it acts through."""
        return EQUIVALENT_SOURCES.get(self.name, self.name)

    @property
    def is_name_only(self) -> bool:
        """Whether `what` says it all."""
        return self.before is self.after is None

    def describe(self) -> str:
        """As a sentence has it."""
        if self.is_name_only:
            return self.name
        return f"{self.name} {to_short_text(self.before)} -> {to_short_text(self.after)}"


def from_config(changes: Mapping[str, tuple[Any, Any]]) -> list[Change]:
    """What another value of a key of the config can do."""
    return [
        Change(
            key,
            *pair,
            affects="nothing" if has_no_effect(key) else "numbers",
            is_input=True,
            is_headline=not key.startswith(("name", "tracking.")),
        )
        for key, pair in changes.items()
    ]


def has_no_effect(key: str) -> bool:
    """Whether no result depends on this key of a config."""
    return key in NO_EFFECT_KEYS or key.startswith(tuple(k for k in NO_EFFECT_KEYS if k.endswith(".")))


def from_images(description: str) -> Change:
    """What pictures that are not as they were can do."""
    return Change(description, None, None, "numbers", is_input=True)


def from_record(reference: ReferenceRun) -> list[Change]:
    """What was not as it should be with the run itself: files that were changed, so that what is compared
    with is not what came out, and what changed while it was interrupted."""
    named = [
        name for name in reference.changed_files if name in ("metrics.jsonl", "test.json", "dataset.json")
    ]
    found = [Change(f"the run's {name}", "as it ended", "changed since", "numbers") for name in named]
    if reference.config_file_status == "other values, maybe":
        found.append(Change("the run's config.yaml", "as it began", "changed since", "numbers"))
    for again in reference.state.get("resumed") or ():
        for key, pair in _as_mapping(_as_mapping(again).get("changed")).items():
            then, now = pair if isinstance(pair, list) and len(pair) == 2 else (None, pair)
            found.append(Change(f"when the run went on: {key}", then, now, _affects(key), is_headline=False))
    return found


def from_environment(reference: RunResult, rerun: RunResult) -> list[Change]:
    """Everything that environment.json, code.json and the pictures' origin say otherwise, the code first."""
    old, new = reference.environment, rerun.environment
    found = [
        *_code_changes(reference, rerun),
        *_package_changes(old, new),
        *_origin_changes(reference, rerun),
    ]
    if old.get("python") != new.get("python"):
        found.append(Change("python", old.get("python"), new.get("python"), "numbers"))
    devices = _as_mapping(old.get("device")), _as_mapping(new.get("device"))
    for key, (what, touches) in DEVICE_FIELDS.items():
        before, after = (device.get(key, ABSENT) for device in devices)
        if before != after:
            kind: Affects = "numbers" if touches == "numbers" else "nothing"
            found.append(Change(what, before, after, kind, is_headline=kind != "nothing"))
    if "variables" in old:
        found += _variable_changes(_as_mapping(old["variables"]), _as_mapping(new.get("variables")))
    # It names the C library, whose functions have versions too.
    if old.get("platform") != new.get("platform"):
        found.append(Change("platform", old.get("platform"), new.get("platform"), "numbers"))
    if old.get("host") != new.get("host"):
        found.append(Change("host", old.get("host"), new.get("host"), "nothing", is_headline=False))
    return found


def _package_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    packages = _as_mapping(old.get("packages")), _as_mapping(new.get("packages"))
    for name in dict.fromkeys([*packages[0], *packages[1]]):
        before, after = (versions.get(name) or ABSENT for versions in packages)
        if before == after:
            continue
        yield Change(name, before, after, _affects(f"packages.{name}"))


def _origin_changes(then: RunResult, now: RunResult) -> Iterator[Change]:
    """Libraries below the packages that make pictures: those that draw letters and decode files."""
    origins = [_as_mapping(_as_mapping(o.dataset.get("provenance")).get("dependencies")) for o in (then, now)]
    for name in dict.fromkeys([*origins[0], *origins[1]]):
        before, after = (origin.get(name) or ABSENT for origin in origins)
        if before != after and name not in IMAGE_PACKAGES:
            yield Change(f"pictures' {name}", before, after, "images")


def _variable_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for name in dict.fromkeys([*old, *new]):
        before, after = (variables.get(name, ABSENT) for variables in (old, new))
        if before == after:
            continue
        kind = _affects(f"variables.{name}")
        yield Change(f"variable {name}", before, after, kind, is_headline=kind != "nothing")


def _affects(key: str) -> Affects:
    """What another value of a leaf of environment.json can change."""
    group, _, name = key.partition(".")
    if group == "packages" and name in (*IMAGE_PACKAGES, *RECORD_ONLY_PACKAGES):
        return "images" if name in IMAGE_PACKAGES else "nothing"
    # The config's threads are set over these; other variables of the same libraries are not.
    if group == "variables" and name.endswith("_NUM_THREADS"):
        return "nothing"
    if key == "variables.FREETYPE_PROPERTIES":
        return "images"
    return "nothing" if group == "device" and DEVICE_FIELDS.get(name, ("", ""))[1] == "nothing" else "numbers"


# -- code ----------------------------------------------------------------------------------------------------


def changed_files(reference: RunResult, current_code: Mapping[str, str]) -> list[str] | None:
    """Source files that are not the same, those that compute first; None where the run has not kept them."""
    if not reference.code_hashes:
        return None
    changed = [
        name
        for name in {*reference.code_hashes, *current_code}
        if reference.code_hashes.get(name) != current_code.get(name)
    ]
    return sorted(changed, key=lambda name: (name.startswith(NO_EFFECT_CODE), name))


def _code_changes(then: RunResult, now: RunResult) -> Iterator[Change]:
    files = changed_files(then, now.code_hashes)
    pair = describe_code(then.environment), describe_code(now.environment)
    if files:
        inert = all(name.startswith(NO_EFFECT_CODE) for name in files)
        named = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        yield Change(f"code ({named})", *pair, affects="nothing" if inert else "numbers")
    elif pair[0] != pair[1]:  # equal files at another commit are the same code
        yield Change(
            "commit", *pair, affects="numbers" if files is None else "nothing", is_headline=files is None
        )


def describe_code(environment: Mapping[str, Any]) -> str:
    """The version or the commit of the code, in a few words."""
    git = _as_mapping(environment.get("git"))
    commit = str(git.get("commit") or "")[:8]
    if not commit:
        return f"version {environment.get('captcha_exp') or 'unknown'}"
    return f"{commit} with changes" if git.get("dirty") else commit


def _as_mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def to_short_text(value: Any) -> str:
    """A value on one line, as YAML and JSON both write it."""
    whole = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return whole if len(whole) <= 100 else f"{whole[:100]}..."
