"""A run's folder: begun by one process (`beginning`), written atomically and hashed (`files`), with what it
ran on (`environment`) and the code that it ran (`code`), closed by another process when its own is gone
(`closing`), and gone on with (`unfinished`)."""

from captcha_exp.record.beginning import create as create
from captcha_exp.record.beginning import new_folder as new_folder
from captcha_exp.record.beginning import remove_abandoned as remove_abandoned
from captcha_exp.record.beginning import reopen as reopen
from captcha_exp.record.closing import Left as Left
from captcha_exp.record.closing import alone as alone
from captcha_exp.record.closing import left_in as left_in
from captcha_exp.record.closing import left_open as left_open
from captcha_exp.record.closing import read_left as read_left
from captcha_exp.record.code import code_sha256 as code_sha256
from captcha_exp.record.files import own_files as own_files
from captcha_exp.record.files import sha256_of as sha256_of
from captcha_exp.record.files import write_atomically as write_atomically
from captcha_exp.record.process import identity as identity
from captcha_exp.record.process import is_alive as is_alive
from captcha_exp.record.process import is_elsewhere as is_elsewhere
from captcha_exp.record.run import CHECKPOINTS as CHECKPOINTS
from captcha_exp.record.run import MetricsRow as MetricsRow
from captcha_exp.record.run import Run as Run
from captcha_exp.record.run import Status as Status
from captcha_exp.record.run import check_file as check_file
from captcha_exp.record.run import checkpoints_in as checkpoints_in
from captcha_exp.record.run import config_sha256 as config_sha256
from captcha_exp.record.run import find as find
from captcha_exp.record.run import linked as linked
from captcha_exp.record.run import now_ms as now_ms
from captcha_exp.record.run import place_of as place_of
from captcha_exp.record.run import read_rows as read_rows
from captcha_exp.record.run import runs as runs
