"""Turn the information about a machine into findings, one line each."""

from collections.abc import Iterator

from captcha_exp.config import precision_of_cpu
from captcha_exp.doctor.gpu_checks import check_gpus
from captcha_exp.doctor.machine_info import DirectoryInfo, Finding, MachineInfo
from captcha_exp.tracking.problems import describe_problem

MIB = 2**20
DISK_FULL, DISK_LOW = 100 * MIB, 1024 * MIB
MEMORY_LOW = 1024 * MIB  # the quickstart needs 929 MiB
MAX_RUNS_NAMED = 5  # of each kind
UNUSED_VARIABLES = {  # set for other programs
    "MPLBACKEND": "figures are only written to files",
    "MLFLOW_EXPERIMENT_NAME": "tracking.experiment selects the experiment",
    "MLFLOW_EXPERIMENT_ID": "tracking.experiment selects the experiment",
    "MLFLOW_RUN_ID": "each training has a run of its own",
}


def run_checks(info: MachineInfo) -> list[Finding]:
    """Return the findings, in the order in which to fix them."""
    return [
        *_check_versions(info),
        *check_gpus(info),
        *_check_device(info),
        *_check_cpu(info),
        *_check_memory(info),
        *_check_environment(info),
        *_check_directories(info),
        *_check_store(info),
        *_check_runs(info),
        *_check_fonts(info),
        *_check_git(info),
        *(_unavailable_finding(query, reason) for query, reason in info.unavailable),
    ]


def _unavailable_finding(query: str, reason: str) -> Finding:
    # A checkout on PYTHONPATH is not installed, so its requirements are unknown.
    remedy = "python -m pip install --editable ." if reason.startswith("PackageNotFoundError") else ""
    return Finding("info", f"cannot check {query}: {reason}", remedy)


def _check_versions(info: MachineInfo) -> Iterator[Finding]:
    problems = []
    for requirement, installed in info.versions:
        name, specifier = requirement.name, requirement.specifier
        if installed is not None and specifier.contains(installed, prereleases=True):
            continue
        state = f"{installed} is not supported" if installed else "is not installed"
        which = " (which build: pytorch.org, 'Get started')" if name == "torch" else ""
        remedy = f'python -m pip install "{name}{specifier}"{which}'
        if name == "Python":
            remedy = "rm -r .venv && make PYTHON=python3.12 test"
        text = f"{name} {state}; supported: {specifier or 'any version'}"
        problems.append(Finding("problem", text, remedy))
    yield from problems
    if info.versions and not problems:
        main = ("Python", "torch", "hydra-core", "omegaconf", "mlflow")
        versions = ", ".join(f"{r.name} {installed}" for r, installed in info.versions if r.name in main)
        yield Finding("ok", f"supported versions of all {len(info.versions)} requirements: {versions} ...")


def _check_device(info: MachineInfo) -> Iterator[Finding]:
    if not info.devices:
        return  # torch cannot be imported: a finding of its own
    name, available = info.device_name, ", ".join(info.devices)
    if name == "auto":
        yield Finding("ok", f"device.name=auto selects {info.devices[0]}; available: {available}")
    elif name in info.devices:
        yield Finding("ok", f"device.name={name} is available")
    else:
        reason = info.unavailable_reason.get(name.split(":")[0], f"this machine has no {name}")
        remedy = f"device.name=auto (selects {info.devices[0]}), or one of {available}"
        yield Finding("problem", f"device.name={name} is not available: {reason}", remedy)


def _check_cpu(info: MachineInfo) -> Iterator[Finding]:
    if info.cores is None:
        return
    threads = info.cores if info.threads == "auto" else int(info.threads)
    text = f"{info.cores} cores, device.threads={info.threads}"
    if info.cpu_quota is not None and info.cpu_quota < threads:
        limit = max(1, int(info.cpu_quota))
        text += f": the container is limited to {info.cpu_quota:g} of them"
        yield Finding("info", text, f"device.threads={limit} data.workers={limit}")
    elif threads > info.cores:
        yield Finding("info", f"{text}: more threads than cores are slower", "device.threads=auto")
    else:
        yield Finding("ok", text)
    trains_on_cpu = "cpu" in (info.device_name, *(info.devices[:1] if info.device_name == "auto" else ()))
    if info.torch is None or not info.torch.cpu_flags or not trains_on_cpu:
        return
    fast = precision_of_cpu(info.torch.cpu_flags)
    text = f"CPU: {info.torch.cpu_capability}, {'AMX' if fast == 'bf16' else 'no AMX'}: device.precision="
    if info.precision in ("auto", fast):
        yield Finding("ok", f"{text}auto is {fast}")
    else:
        yield Finding("info", f"{text}{info.precision} is slower than {fast}", "device.precision=auto")


def _check_memory(info: MachineInfo) -> Iterator[Finding]:
    if info.available_memory_bytes is None:
        return
    free = f"memory: {info.available_memory_bytes // MIB:,} MiB available"
    if info.image_bytes > info.available_memory_bytes:
        text = f"{free}, but the decoded images of this config need {info.image_bytes // MIB:,} MiB"
        remedy = "a smaller data.count, captcha.width or captcha.height; captcha.channels=1"
        yield Finding("problem", text, remedy)
    elif info.available_memory_bytes < MEMORY_LOW:
        yield Finding("info", f"{free}, which is low", "close other programs; data.workers=1")
    else:
        yield Finding("ok", free)


def _check_environment(info: MachineInfo) -> Iterator[Finding]:
    if info.figures_error:
        text = f"cannot import matplotlib, which draws the reports: {info.figures_error}"
        yield Finding("problem", text, "python -m pip install --force-reinstall matplotlib")
    for name, text in info.filled_in.items():
        yield Finding("info", text, f"set {name} to choose it yourself; trainings work either way")
    for name, value in info.unused_variables.items():
        text = f"{name}={value} is not used: {UNUSED_VARIABLES[name]}"
        yield Finding("info", text, f"unset {name} to be rid of this line; trainings work either way")


def _check_directories(info: MachineInfo) -> Iterator[Finding]:
    for text in info.broken_links:
        problem, _, remedy = text.partition("; ")
        yield Finding("problem", problem, remedy)
    for directory in info.directories:
        if directory.write_error and directory.free_bytes >= DISK_FULL:
            text = f"{directory.path}: not writable: {directory.write_error}"
            yield Finding("problem", text, _write_remedy(directory))
    for directory in {each.device_id: each for each in reversed(info.directories)}.values():
        path, free = directory.path, directory.free_bytes
        if free < DISK_LOW:
            is_full = free < DISK_FULL
            text = f"{path}: the disk is {'full' if is_full else 'nearly full'}, {free // MIB} MiB free"
            remedy = f'free up space: du -sh "{path}"/* | sort -h; or set CAPTCHA_EXP_ROOT to another disk'
            yield Finding("problem" if is_full else "info", text, remedy)
        elif not directory.write_error:
            yield Finding("ok", f"{path}: {free / 1024 / MIB:,.1f} GiB free")


def _write_remedy(directory: DirectoryInfo) -> str:
    elsewhere = "set CAPTCHA_EXP_ROOT to a directory of your own"
    remedies = {
        "Not a directory": f'mv "{directory.path}" "{directory.path}.old"',
        "Read-only file system": elsewhere,
        "File too large": "raise the limit of this shell: ulimit -f unlimited",
        # Although there is: out of inodes.
        "No space left on device": f'df -i "{directory.path}", and delete unneeded files; or {elsewhere}',
    }
    return remedies.get(directory.write_error, f'chmod u+rwx "{directory.path}", or {elsewhere}')


def _check_store(info: MachineInfo) -> Iterator[Finding]:
    store = info.store
    if info.store_error:
        yield Finding("problem", info.store_error, "train with tracking=none until this is solved")
        return
    if store is None:
        if not any(query == "the MLflow store" for query, _ in info.unavailable):
            yield Finding("ok", f"tracking=none: runs are recorded in {info.root}/outputs only")
        return
    where = f"runs are recorded in {info.root}/outputs and in MLflow at {store.uri} ({store.source})"
    if store.state == "new":
        yield Finding("ok", f"{where}: no store yet, the first run creates it")
    elif store.state == "current":
        yield Finding("ok", where)
    else:
        yield Finding("problem", *describe_problem(store.uri, store.state, store.detail))
    for directory in store.moved_from:
        text = f"{store.uri}: was moved; MLflow searches for artifacts in {directory}"
        yield Finding("info", text, "the next captcha-exp train or ui corrects it")


def _check_runs(info: MachineInfo) -> Iterator[Finding]:
    for run_dir, pid in info.stale_runs[:MAX_RUNS_NAMED]:
        remedy = "the next captcha-exp runs or train marks it KILLED; its files are kept"
        yield Finding("info", f"{run_dir}: status RUNNING, but process {pid} has exited", remedy)
    if (more := len(info.stale_runs) - MAX_RUNS_NAMED) > 0:
        yield Finding("info", f"{more} more stale runs", "captcha-exp runs closes and lists them")
    for line in info.unreadable_runs[:MAX_RUNS_NAMED]:
        yield Finding("info", line)


def _check_fonts(info: MachineInfo) -> Iterator[Finding]:
    if info.fonts_error:
        remedy = "data.fonts=[DejaVuSans.ttf] or a font of your own, or another captcha.alphabet"
        yield Finding("problem", info.fonts_error, remedy)
    elif info.fonts is not None:
        yield Finding("ok", f"fonts cover the alphabet: {info.fonts}")


def _check_git(info: MachineInfo) -> Iterator[Finding]:
    git = info.git
    if git is None:
        return
    if git.commit:
        yield Finding("ok", f"git: runs record commit {git.commit[:12]}")
    elif git.checkout_dir is None:
        yield Finding("ok", "git: installed package, runs record its version instead of a commit")
    elif git.is_installed:
        text = f"git: no commit of {git.checkout_dir} is readable, so runs cannot record it"
        remedy = f'git config --global --add safe.directory "{git.checkout_dir}", then commit once'
        yield Finding("info", text, remedy)
    else:
        text = "git is not installed: runs cannot record the commit of the code"
        yield Finding("info", text, "install git (apt install git, brew install git, or git-scm.com)")
