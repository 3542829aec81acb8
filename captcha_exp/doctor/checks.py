"""From what was seen to what is said of it, one line for each thing."""

from collections.abc import Iterator

from captcha_exp.doctor.gpu_checks import of_cards
from captcha_exp.doctor.machine_info import Facts, Finding, Folder, Store

MIB = 2**20
DISK_FULL, DISK_LOW = 100 * MIB, 1024 * MIB
MEMORY_LOW = 1024 * MIB  # the quickstart alone takes 929 MiB
RUNS_NAMED = 5


def findings(facts: Facts) -> list[Finding]:
    """What is well, what to know, and what to mend; in the order in which one would mend it."""
    return [
        *_versions(facts),
        *of_cards(facts),
        *_device(facts),
        *_processor(facts),
        *_memory(facts),
        *_folders(facts),
        *_store(facts),
        *_runs(facts),
        *_fonts(facts),
        *_git(facts),
        *(_unseen(what, why) for what, why in facts.unseen),
    ]


def _unseen(what: str, why: str) -> Finding:
    # A checkout that was put on the path by hand says nowhere what it needs.
    remedy = "python -m pip install --editable ." if why.startswith("PackageNotFoundError") else ""
    return Finding("note", f"{what} could not be looked at: {why}", remedy)


def _versions(facts: Facts) -> Iterator[Finding]:
    if facts.python_fits:
        if facts.python:
            yield Finding("ok", f"Python {facts.python}")
    else:
        yield Finding(
            "problem",
            f"Python {facts.python} is not supported, {facts.python_allowed} is",
            "rm -r .venv && make PYTHON=python3.12 test",
        )
    for package in facts.packages:
        if package.fits:
            continue
        is_here = f"{package.installed} is here" if package.installed else "is not installed"
        wanted = f'"{package.name}{package.allowed}"'
        which = " (which build: pytorch.org, 'Get started')" if package.name == "torch" else ""
        yield Finding(
            "problem",
            f"{package.name} {is_here}, supported is {package.allowed or 'any version'}",
            f"python -m pip install {wanted}{which}",
        )
    if facts.packages and all(package.fits for package in facts.packages):
        main = ("torch", "hydra-core", "omegaconf", "mlflow")
        named = ", ".join(f"{p.name} {p.installed}" for p in facts.packages if p.name in main)
        yield Finding("ok", f"{len(facts.packages)} packages in supported versions: {named} ...")


def _device(facts: Facts) -> Iterator[Finding]:
    if not facts.devices:
        return  # torch could not be imported, which is told already
    name, here = facts.device_name, ", ".join(facts.devices)
    if name == "auto":
        yield Finding("ok", f"device.name=auto takes {facts.devices[0]}; here are {here}")
    elif name in facts.devices:
        yield Finding("ok", f"device.name={name} is here")
    else:
        reason = facts.why_not.get(name.split(":")[0], f"this machine has no {name}")
        others = f"device.name=auto (takes {facts.devices[0]}), or one of {here}"
        yield Finding("problem", f"device.name={name} is not here: {reason}", others)


def _processor(facts: Facts) -> Iterator[Finding]:
    if facts.cores is None:
        return
    threads = facts.cores if facts.threads == "auto" else int(facts.threads)
    text = f"{facts.cores} cores, device.threads={facts.threads}"
    if facts.cpu_quota is not None and facts.cpu_quota < threads:
        share = max(1, int(facts.cpu_quota))
        yield Finding(
            "note",
            f"{text}: the container is given the time of {facts.cpu_quota:g} of them",
            f"device.threads={share} data.workers={share}",
        )
    elif threads > facts.cores:
        yield Finding("note", f"{text}: threads wait for each other", "device.threads=auto")
    else:
        yield Finding("ok", text)
    if facts.torch is None or facts.cpu_flags is None or not _trains_on_the_cpu(facts):
        return
    vectors, flags = facts.torch.cpu, facts.cpu_flags
    without = f"CPU: {vectors}, without instructions for bf16:"
    if {"amx_tile", "amx_bf16"} <= flags:
        yield Finding("ok", f"CPU: {vectors} and AMX: device.precision=bf16 is faster than fp32 here")
    elif flags & {"avx512_bf16", "bf16"}:
        yield Finding("ok", f"CPU: {vectors} and bf16, no AMX: device.precision=bf16 is not measured")
    elif facts.precision in ("fp32", "auto"):
        yield Finding("ok", f"{without} 16 bits would be slower here")
    else:
        text = f"{without} device.precision={facts.precision} is slower"
        yield Finding("note", text, "device.precision=fp32")


def _trains_on_the_cpu(facts: Facts) -> bool:
    return facts.device_name == "cpu" or (facts.device_name == "auto" and facts.devices[:1] == ("cpu",))


def _memory(facts: Facts) -> Iterator[Finding]:
    if facts.memory is None:
        return
    free = f"memory: {facts.memory // MIB:,} MiB available"
    if facts.pictures > facts.memory:
        yield Finding(
            "problem",
            f"{free}, the prepared pictures of this config take {facts.pictures // MIB:,} MiB",
            "a smaller data.count, captcha.width or captcha.height; captcha.channels=1",
        )
    elif facts.memory < MEMORY_LOW:
        yield Finding("note", f"{free}, which is little", "end other programs; data.workers=1")
    else:
        yield Finding("ok", free)


def _folders(facts: Facts) -> Iterator[Finding]:
    for folder in facts.folders:
        if folder.refusal and folder.free >= DISK_FULL:
            text = f"{folder.path}: nothing can be written there: {folder.refusal}"
            yield Finding("problem", text, _writable(folder))
    for folder in {folder.disk: folder for folder in reversed(facts.folders)}.values():
        text = f"{folder.path}: {folder.free / 1024 / MIB:,.1f} GiB free"
        remedy = f'make room: du -sh "{folder.path}"/* | sort -h; or CAPTCHA_EXP_ROOT=FOLDER elsewhere'
        if folder.free < DISK_FULL:
            left = f"{folder.path}: the disk is full, {folder.free // MIB} MiB are free"
            yield Finding("problem", left, remedy)
        elif folder.free < DISK_LOW:
            left = f"{folder.path}: the disk is nearly full, {folder.free // MIB} MiB are free"
            yield Finding("note", left, remedy)
        elif not folder.refusal:
            yield Finding("ok", text)


def _writable(folder: Folder) -> str:
    elsewhere = "CAPTCHA_EXP_ROOT=FOLDER for a folder of your own"
    match folder.refusal:
        case "Not a directory":
            return f'mv "{folder.path}" "{folder.path}.old"'
        case "Read-only file system":
            return elsewhere
        case "No space left on device":  # though there is: of files, there can be too many
            return f'df -i "{folder.path}", and delete files that nobody needs; or {elsewhere}'
        case _:
            return f'chmod u+rwx "{folder.path}", or {elsewhere}'


def _store(facts: Facts) -> Iterator[Finding]:
    if facts.store is None:
        if not any(what == "the MLflow store" for what, _ in facts.unseen):
            yield Finding("ok", "tracking=none: the run's folder is the record")
        return
    store = facts.store
    match store.state:
        case "new":
            yield Finding("ok", f"tracking.uri={store.uri}: no store yet, it is made at the first run")
        case "current":
            yield Finding("ok", f"tracking.uri={store.uri}: is there and takes runs")
        case _:
            detail = f" ({store.detail})" if store.detail else ""
            what, remedy = _store_trouble(store, facts)
            yield Finding("problem", f"tracking.uri={store.uri}: {what}{detail}", remedy)


def _store_trouble(store: Store, facts: Facts) -> tuple[str, str]:
    otherwise = "or train with tracking=none"
    match store.state:
        case "older":
            path = store.uri.removeprefix("sqlite:///")
            copy = f'cp "{path}" "{path}.old" && ' if path != store.uri else "make a copy of it, then: "
            return "was made by an older MLflow", f'{copy}mlflow db upgrade "{store.uri}"'
        case "newer":
            allowed = next((p.allowed for p in facts.packages if p.name == "mlflow"), "")
            remedy = f'python -m pip install --upgrade "mlflow{allowed}", or another tracking.uri'
            return "was made by a newer MLflow", remedy
        case "locked":
            remedy = "end what has it open (captcha-exp ui, a database browser), " + otherwise
            return "is locked by another process", remedy
        case "deleted":
            remedy = "mlflow experiments restore --help shows how; or another tracking.experiment"
            return "the experiment of this config was deleted in it", remedy
        case "silent":
            return "does not answer", "start the server, mend the address in tracking.uri, " + otherwise
        case _:
            remedy = "mend it or move it away (a new one is made), " + otherwise
            if not store.uri.startswith("sqlite"):
                remedy = "mend tracking.uri, or log in (MLFLOW_TRACKING_TOKEN), " + otherwise
            if store.detail.startswith("No module named"):
                remedy = "python -m pip install that module (psycopg2-binary, pymysql), " + otherwise
            return "cannot be used", remedy


def _runs(facts: Facts) -> Iterator[Finding]:
    for folder, pid in facts.dead_runs[:RUNS_NAMED]:
        yield Finding(
            "note",
            f"{folder}: says RUNNING, but its process {pid} is gone: the run died",
            "captcha-exp runs, or the next train, closes it as KILLED; what it wrote stays in its folder",
        )
    if (more := len(facts.dead_runs) - RUNS_NAMED) > 0:
        yield Finding(
            "note", f"{more} more runs died in the same way", "captcha-exp runs closes and lists them"
        )
    for line in facts.unreadable_runs[:RUNS_NAMED]:
        yield Finding("note", line, "move its folder out of outputs/")


def _fonts(facts: Facts) -> Iterator[Finding]:
    if facts.fonts_error:
        remedy = "data.fonts=[DejaVuSans.ttf] or a font of your own; or another captcha.alphabet"
        yield Finding("problem", facts.fonts_error, remedy)
    elif facts.fonts is not None:
        yield Finding("ok", f"fonts have every character of the alphabet: {facts.fonts}")


def _git(facts: Facts) -> Iterator[Finding]:
    if facts.git is None:
        return
    if facts.git.commit:
        yield Finding("ok", f"git: runs note commit {facts.git.commit[:12]}")
    elif facts.git.checkout is None:
        yield Finding("ok", "git: an installed package, runs note its version and no commit")
    elif not facts.git.here:
        yield Finding(
            "note",
            "git is not on this machine: runs will not note the commit of the code",
            "install git (apt install git, brew install git, or git-scm.com)",
        )
    else:
        yield Finding(
            "note",
            f"git tells no commit of {facts.git.checkout}: runs will not note it",
            f'git config --global --add safe.directory "{facts.git.checkout}", and commit once',
        )
