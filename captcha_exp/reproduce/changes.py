"""What is not as it was when the run was trained: versions, code, machine, environment variables."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from captcha_exp.reproduce.reference import ABSENT, Original, Outcome

Touches: TypeAlias = Literal["nothing", "pictures", "numbers"]

MAKE_PICTURES = {"pillow", "captcha", "wheezy.captcha"}
ONLY_RECORD = {"mlflow", "hydra-core", "omegaconf", "pydantic", "safetensors"}
"""packages that carry or check values, and compute none: what they carried is compared itself"""

INERT_KEYS = (
    *("name", "tracking.", "sweep.", "card."),  # how a run is called, reported and planned
    *("data.cache", "data.workers", "data.path"),  # where pictures are and who draws them; they are compared
    *("device.resident_limit_mib", "device.vram_budget_mib"),  # where they lie; how much is allowed
    *("train.checkpoint_every", "train.stop_after_minutes", "train.on_oom", "train.chance_after_steps"),
)
"""keys of a config, or their beginnings, that no result depends on"""

INERT_CODE = (
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

MACHINE = {
    "cpu": ("CPU", "numbers"),
    "cpu_capability": ("CPU capability", "numbers"),
    "cores": ("cores", "nothing"),  # device.threads says how many are used
    "card": ("card", "numbers"),
    "card_capability": ("card's capability", "numbers"),
    "card_bytes": ("card's memory", "nothing"),
    "cuda": ("CUDA", "numbers"),
    "cudnn": ("cuDNN", "numbers"),
}
"""keys of environment.json's device, beside its name and threads, which are the config's"""

SAME_SOURCE = {"variable ATEN_CPU_CAPABILITY": "CPU capability"}
"""what acts through another thing that is compared, too"""


@dataclass(frozen=True)
class Drift:
    """One thing that is not as it was."""

    what: str
    then: Any
    now: Any
    touches: Touches
    """what can come out otherwise by it"""
    ran: bool = False
    """whether it is a part of what was asked to run: a key, a picture, a label"""
    headline: bool = True
    """whether a verdict of one line names it"""

    @property
    def source(self) -> str:
        """What it acts through."""
        return SAME_SOURCE.get(self.what, self.what)

    @property
    def is_bare(self) -> bool:
        """Whether `what` says it all."""
        return self.then is self.now is None

    def words(self) -> str:
        """As a sentence has it."""
        if self.is_bare:
            return self.what
        return f"{self.what} {text(self.then)} -> {text(self.now)}"


def of_config(changes: Mapping[str, tuple[Any, Any]]) -> list[Drift]:
    """What another value of a key of the config can do."""
    return [
        Drift(
            key,
            *pair,
            touches="nothing" if is_inert(key) else "numbers",
            ran=True,
            headline=not key.startswith(("name", "tracking.")),
        )
        for key, pair in changes.items()
    ]


def is_inert(key: str) -> bool:
    """Whether no result depends on this key of a config."""
    return key in INERT_KEYS or key.startswith(tuple(k for k in INERT_KEYS if k.endswith(".")))


def of_pictures(words: str) -> Drift:
    """What pictures that are not as they were can do."""
    return Drift(words, None, None, "numbers", ran=True)


def of_record(original: Original) -> list[Drift]:
    """What was not as it should be with the run itself: files that were changed, so that what is compared
    with is not what came out, and what changed while it was interrupted."""
    named = [name for name in original.changed if name in ("metrics.jsonl", "test.json", "dataset.json")]
    found = [Drift(f"the run's {name}", "as it ended", "changed since", "numbers") for name in named]
    if original.config_file == "other values, maybe":
        found.append(Drift("the run's config.yaml", "as it began", "changed since", "numbers"))
    for again in original.state.get("resumed") or ():
        for key, pair in _mapping(_mapping(again).get("changed")).items():
            then, now = pair if isinstance(pair, list) and len(pair) == 2 else (None, pair)
            found.append(Drift(f"when the run went on: {key}", then, now, _touches(key), headline=False))
    return found


def of_environment(then: Outcome, now: Outcome) -> list[Drift]:
    """Everything that environment.json, code.json and the pictures' origin say otherwise, the code first."""
    old, new = then.environment, now.environment
    found = [*_of_code(then, now), *_of_packages(old, new), *_of_origin(then, now)]
    if old.get("python") != new.get("python"):
        found.append(Drift("python", old.get("python"), new.get("python"), "numbers"))
    devices = _mapping(old.get("device")), _mapping(new.get("device"))
    for key, (what, touches) in MACHINE.items():
        before, after = (device.get(key, ABSENT) for device in devices)
        if before != after:
            kind: Touches = "numbers" if touches == "numbers" else "nothing"
            found.append(Drift(what, before, after, kind, headline=kind != "nothing"))
    if "variables" in old:
        found += _of_variables(_mapping(old["variables"]), _mapping(new.get("variables")))
    # It names the C library, whose functions have versions too.
    if old.get("platform") != new.get("platform"):
        found.append(Drift("platform", old.get("platform"), new.get("platform"), "numbers"))
    if old.get("host") != new.get("host"):
        found.append(Drift("host", old.get("host"), new.get("host"), "nothing", headline=False))
    return found


def _of_packages(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Drift]:
    packages = _mapping(old.get("packages")), _mapping(new.get("packages"))
    for name in dict.fromkeys([*packages[0], *packages[1]]):
        before, after = (versions.get(name) or ABSENT for versions in packages)
        if before == after:
            continue
        yield Drift(name, before, after, _touches(f"packages.{name}"))


def _of_origin(then: Outcome, now: Outcome) -> Iterator[Drift]:
    """Libraries below the packages that make pictures: those that draw letters and decode files."""
    origins = [_mapping(_mapping(o.dataset.get("made_from")).get("origin")) for o in (then, now)]
    for name in dict.fromkeys([*origins[0], *origins[1]]):
        before, after = (origin.get(name) or ABSENT for origin in origins)
        if before != after and name not in MAKE_PICTURES:
            yield Drift(f"pictures' {name}", before, after, "pictures")


def _of_variables(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Drift]:
    for name in dict.fromkeys([*old, *new]):
        before, after = (variables.get(name, ABSENT) for variables in (old, new))
        if before == after:
            continue
        kind = _touches(f"variables.{name}")
        yield Drift(f"variable {name}", before, after, kind, headline=kind != "nothing")


def _touches(key: str) -> Touches:
    """What another value of a leaf of environment.json can change."""
    group, _, name = key.partition(".")
    if group == "packages" and name in (*MAKE_PICTURES, *ONLY_RECORD):
        return "pictures" if name in MAKE_PICTURES else "nothing"
    # The config's threads are set over these; other variables of the same libraries are not.
    if group == "variables" and name.endswith("_NUM_THREADS"):
        return "nothing"
    if key == "variables.FREETYPE_PROPERTIES":
        return "pictures"
    return "nothing" if group == "device" and MACHINE.get(name, ("", ""))[1] == "nothing" else "numbers"


# -- code ----------------------------------------------------------------------------------------------------


def changed_files(then: Outcome, now: Mapping[str, str]) -> list[str] | None:
    """Source files that are not the same, those that compute first; None where the run has not kept them."""
    if not then.code:
        return None
    changed = [name for name in {*then.code, *now} if then.code.get(name) != now.get(name)]
    return sorted(changed, key=lambda name: (name.startswith(INERT_CODE), name))


def _of_code(then: Outcome, now: Outcome) -> Iterator[Drift]:
    files = changed_files(then, now.code)
    pair = code_words(then.environment), code_words(now.environment)
    if files:
        inert = all(name.startswith(INERT_CODE) for name in files)
        named = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        yield Drift(f"code ({named})", *pair, touches="nothing" if inert else "numbers")
    elif pair[0] != pair[1]:  # equal files at another commit are the same code
        yield Drift(
            "commit", *pair, touches="numbers" if files is None else "nothing", headline=files is None
        )


def code_words(environment: Mapping[str, Any]) -> str:
    """The version or the commit of the code, in a few words."""
    git = _mapping(environment.get("git"))
    commit = str(git.get("commit") or "")[:8]
    if not commit:
        return f"version {environment.get('captcha_exp') or 'unknown'}"
    return f"{commit} with changes" if git.get("dirty") else commit


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def text(value: Any) -> str:
    """A value on one line, as YAML and JSON both write it."""
    whole = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return whole if len(whole) <= 100 else f"{whole[:100]}..."
