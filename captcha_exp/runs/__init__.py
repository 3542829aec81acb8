"""Run directories: create, read, close and resume them.

`create` makes a run directory, `info` has the types of run.json and sweep.json, `content` those of the other
JSON files, `run` writes the directory, `saved` reads and verifies it, `environment` and `source_code` record
the machine and the code, `fields` gives access by key, `speed` has the training speed, `stale` closes runs
whose process has exited, and `claim` finds the run to continue and claims it.
"""

from captcha_exp.runs.create import create_run as create_run
from captcha_exp.runs.create import make_run_dir as make_run_dir
from captcha_exp.runs.create import remove_partial_runs as remove_partial_runs
from captcha_exp.runs.create import reopen_run as reopen_run
from captcha_exp.runs.info import WEIGHTS as WEIGHTS
from captcha_exp.runs.info import Lineage as Lineage
from captcha_exp.runs.info import RecordedDir as RecordedDir
from captcha_exp.runs.info import RunEnd as RunEnd
from captcha_exp.runs.info import RunInfo as RunInfo
from captcha_exp.runs.info import RunLink as RunLink
from captcha_exp.runs.info import Status as Status
from captcha_exp.runs.info import SweepInfo as SweepInfo
from captcha_exp.runs.info import check_has_no_links as check_has_no_links
from captcha_exp.runs.run import CHECKPOINT_DIR as CHECKPOINT_DIR
from captcha_exp.runs.run import Run as Run
from captcha_exp.runs.run import config_sha256 as config_sha256
from captcha_exp.runs.run import find_linked as find_linked
from captcha_exp.runs.run import find_run as find_run
from captcha_exp.runs.run import list_checkpoints as list_checkpoints
from captcha_exp.runs.run import list_runs as list_runs
from captcha_exp.runs.run import now_ms as now_ms
from captcha_exp.runs.run import resolve_dir as resolve_dir
from captcha_exp.runs.saved import MetricsRow as MetricsRow
from captcha_exp.runs.saved import SavedRun as SavedRun
from captcha_exp.runs.saved import load as load
from captcha_exp.runs.saved import read_metrics_rows as read_metrics_rows
from captcha_exp.runs.source_code import code_sha256 as code_sha256
from captcha_exp.runs.speed import training_speed as training_speed
from captcha_exp.runs.stale import StaleRun as StaleRun
from captcha_exp.runs.stale import find_stale as find_stale
from captcha_exp.runs.stale import stale_in as stale_in
from captcha_exp.runs.stale import stale_lock as stale_lock
