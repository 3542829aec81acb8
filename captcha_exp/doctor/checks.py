"""From what was seen to what is said of it, one line for each thing."""

from collections.abc import Iterator

from captcha_exp.doctor.gpu_checks import check_gpus
from captcha_exp.doctor.machine_info import DirectoryInfo, Finding, MachineInfo, StoreInfo

MIB = 2**20
DISK_FULL, DISK_LOW = 100 * MIB, 1024 * MIB
MEMORY_LOW = 1024 * MIB  # the quickstart alone takes 929 MiB
MAX_RUNS_NAMED = 5


def run_checks(info: MachineInfo) -> list[Finding]:
    """What is well, what to know, and what to mend; in the order in which one would mend it."""
    return [
        *_check_versions(info),
        *check_gpus(info),
        *_check_device(info),
        *_check_cpu(info),
        *_check_memory(info),
        *_check_directories(info),
        *_check_store(info),
        *_check_runs(info),
        *_check_fonts(info),
        *_check_git(info),
        *(_unavailable_finding(what, why) for what, why in info.unavailable),
    ]


def _unavailable_finding(what: str, why: str) -> Finding:
    # A checkout that was put on the path by hand says nowhere what it needs.
    remedy = "python -m pip install --editable ." if why.startswith("PackageNotFoundError") else ""
    return Finding("note", f"{what} could not be looked at: {why}", remedy)


def _check_versions(facts: MachineInfo) -> Iterator[Finding]:
    if facts.is_python_supported:
        if facts.python_version:
            yield Finding("ok", f"Python {facts.python_version}")
    else:
        yield Finding(
            "problem",
            f"Python {facts.python_version} is not supported, {facts.python_specifier} is",
            "rm -r .venv && make PYTHON=python3.12 test",
        )
    for package in facts.packages:
        if package.is_supported:
            continue
        is_here = f"{package.installed} is here" if package.installed else "is not installed"
        wanted = f'"{package.name}{package.specifier}"'
        which = " (which build: pytorch.org, 'Get started')" if package.name == "torch" else ""
        yield Finding(
            "problem",
            f"{package.name} {is_here}, supported is {package.specifier or 'any version'}",
            f"python -m pip install {wanted}{which}",
        )
    if facts.packages and all(package.is_supported for package in facts.packages):
        main = ("torch", "hydra-core", "omegaconf", "mlflow")
        named = ", ".join(f"{p.name} {p.installed}" for p in facts.packages if p.name in main)
        yield Finding("ok", f"{len(facts.packages)} packages in supported versions: {named} ...")


def _check_device(facts: MachineInfo) -> Iterator[Finding]:
    if not facts.devices:
        return  # torch could not be imported, which is told already
    name, here = facts.device_name, ", ".join(facts.devices)
    if name == "auto":
        yield Finding("ok", f"device.name=auto takes {facts.devices[0]}; here are {here}")
    elif name in facts.devices:
        yield Finding("ok", f"device.name={name} is here")
    else:
        reason = facts.unavailable_reason.get(name.split(":")[0], f"this machine has no {name}")
        others = f"device.name=auto (takes {facts.devices[0]}), or one of {here}"
        yield Finding("problem", f"device.name={name} is not here: {reason}", others)


def _check_cpu(facts: MachineInfo) -> Iterator[Finding]:
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
    if facts.torch is None or facts.cpu_flags is None or not _trains_on_cpu(facts):
        return
    vectors, flags = facts.torch.cpu_capability, facts.cpu_flags
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


def _trains_on_cpu(facts: MachineInfo) -> bool:
    return facts.device_name == "cpu" or (facts.device_name == "auto" and facts.devices[:1] == ("cpu",))


def _check_memory(facts: MachineInfo) -> Iterator[Finding]:
    if facts.available_memory_bytes is None:
        return
    free = f"memory: {facts.available_memory_bytes // MIB:,} MiB available"
    if facts.image_bytes > facts.available_memory_bytes:
        yield Finding(
            "problem",
            f"{free}, the prepared pictures of this config take {facts.image_bytes // MIB:,} MiB",
            "a smaller data.count, captcha.width or captcha.height; captcha.channels=1",
        )
    elif facts.available_memory_bytes < MEMORY_LOW:
        yield Finding("note", f"{free}, which is little", "end other programs; data.workers=1")
    else:
        yield Finding("ok", free)


def _check_directories(facts: MachineInfo) -> Iterator[Finding]:
    for folder in facts.directories:
        if folder.write_error and folder.free_bytes >= DISK_FULL:
            text = f"{folder.path}: nothing can be written there: {folder.write_error}"
            yield Finding("problem", text, _write_remedy(folder))
    for folder in {folder.device_id: folder for folder in reversed(facts.directories)}.values():
        text = f"{folder.path}: {folder.free_bytes / 1024 / MIB:,.1f} GiB free"
        remedy = f'make room: du -sh "{folder.path}"/* | sort -h; or CAPTCHA_EXP_ROOT=FOLDER elsewhere'
        if folder.free_bytes < DISK_FULL:
            left = f"{folder.path}: the disk is full, {folder.free_bytes // MIB} MiB are free"
            yield Finding("problem", left, remedy)
        elif folder.free_bytes < DISK_LOW:
            left = f"{folder.path}: the disk is nearly full, {folder.free_bytes // MIB} MiB are free"
            yield Finding("note", left, remedy)
        elif not folder.write_error:
            yield Finding("ok", text)


def _write_remedy(folder: DirectoryInfo) -> str:
    elsewhere = "CAPTCHA_EXP_ROOT=FOLDER for a folder of your own"
    match folder.write_error:
        case "Not a directory":
            return f'mv "{folder.path}" "{folder.path}.old"'
        case "Read-only file system":
            return elsewhere
        case "No space left on device":  # though there is: of files, there can be too many
            return f'df -i "{folder.path}", and delete files that nobody needs; or {elsewhere}'
        case _:
            return f'chmod u+rwx "{folder.path}", or {elsewhere}'


def _check_store(facts: MachineInfo) -> Iterator[Finding]:
    if facts.store is None:
        if not any(what == "the MLflow store" for what, _ in facts.unavailable):
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
            what, remedy = _describe_store_problem(store, facts)
            yield Finding("problem", f"tracking.uri={store.uri}: {what}{detail}", remedy)


def _describe_store_problem(store: StoreInfo, facts: MachineInfo) -> tuple[str, str]:
    otherwise = "or train with tracking=none"
    match store.state:
        case "older":
            path = store.uri.removeprefix("sqlite:///")
            copy = f'cp "{path}" "{path}.old" && ' if path != store.uri else "make a copy of it, then: "
            return "was made by an older MLflow", f'{copy}mlflow db upgrade "{store.uri}"'
        case "newer":
            allowed = next((p.specifier for p in facts.packages if p.name == "mlflow"), "")
            remedy = f'python -m pip install --upgrade "mlflow{allowed}", or another tracking.uri'
            return "was made by a newer MLflow", remedy
        case "locked":
            remedy = "end what has it open (captcha-exp ui, a database browser), " + otherwise
            return "is locked by another process", remedy
        case "deleted":
            remedy = "mlflow experiments restore --help shows how; or another tracking.experiment"
            return "the experiment of this config was deleted in it", remedy
        case "unreachable":
            return "does not answer", "start the server, mend the address in tracking.uri, " + otherwise
        case _:
            remedy = "mend it or move it away (a new one is made), " + otherwise
            if not store.uri.startswith("sqlite"):
                remedy = "mend tracking.uri, or log in (MLFLOW_TRACKING_TOKEN), " + otherwise
            if store.detail.startswith("No module named"):
                remedy = "python -m pip install that module (psycopg2-binary, pymysql), " + otherwise
            return "cannot be used", remedy


def _check_runs(facts: MachineInfo) -> Iterator[Finding]:
    for folder, pid in facts.stale_runs[:MAX_RUNS_NAMED]:
        yield Finding(
            "note",
            f"{folder}: says RUNNING, but its process {pid} is gone: the run died",
            "captcha-exp runs, or the next train, closes it as KILLED; what it wrote stays in its folder",
        )
    if (more := len(facts.stale_runs) - MAX_RUNS_NAMED) > 0:
        yield Finding(
            "note", f"{more} more runs died in the same way", "captcha-exp runs closes and lists them"
        )
    for line in facts.unreadable_runs[:MAX_RUNS_NAMED]:
        yield Finding("note", line, "move its folder out of outputs/")


def _check_fonts(facts: MachineInfo) -> Iterator[Finding]:
    if facts.fonts_error:
        remedy = "data.fonts=[DejaVuSans.ttf] or a font of your own; or another captcha.alphabet"
        yield Finding("problem", facts.fonts_error, remedy)
    elif facts.fonts is not None:
        yield Finding("ok", f"fonts have every character of the alphabet: {facts.fonts}")


def _check_git(facts: MachineInfo) -> Iterator[Finding]:
    if facts.git is None:
        return
    if facts.git.commit:
        yield Finding("ok", f"git: runs note commit {facts.git.commit[:12]}")
    elif facts.git.checkout_dir is None:
        yield Finding("ok", "git: an installed package, runs note its version and no commit")
    elif not facts.git.is_installed:
        yield Finding(
            "note",
            "git is not on this machine: runs will not note the commit of the code",
            "install git (apt install git, brew install git, or git-scm.com)",
        )
    else:
        yield Finding(
            "note",
            f"git tells no commit of {facts.git.checkout_dir}: runs will not note it",
            f'git config --global --add safe.directory "{facts.git.checkout_dir}", and commit once',
        )
