"""A run's folder: begun by one process (`beginning`), written atomically and hashed (`files`), with what it
ran on (`environment`) and the code that it ran (`code`), closed by another process when its own is gone
(`closing`), and gone on with (`unfinished`)."""

from captcha_exp.runs.create import create as create
from captcha_exp.runs.create import new_folder as new_folder
from captcha_exp.runs.create import remove_abandoned as remove_abandoned
from captcha_exp.runs.create import reopen as reopen
from captcha_exp.runs.run import CHECKPOINTS as CHECKPOINTS
from captcha_exp.runs.run import MetricsRow as MetricsRow
from captcha_exp.runs.run import Run as Run
from captcha_exp.runs.run import Status as Status
from captcha_exp.runs.run import check_file as check_file
from captcha_exp.runs.run import checkpoints_in as checkpoints_in
from captcha_exp.runs.run import config_sha256 as config_sha256
from captcha_exp.runs.run import find as find
from captcha_exp.runs.run import linked as linked
from captcha_exp.runs.run import now_ms as now_ms
from captcha_exp.runs.run import place_of as place_of
from captcha_exp.runs.run import read_rows as read_rows
from captcha_exp.runs.run import runs as runs
from captcha_exp.runs.source_code import code_sha256 as code_sha256
from captcha_exp.runs.stale import Left as Left
from captcha_exp.runs.stale import alone as alone
from captcha_exp.runs.stale import left_in as left_in
from captcha_exp.runs.stale import left_open as left_open
from captcha_exp.runs.stale import read_left as read_left
