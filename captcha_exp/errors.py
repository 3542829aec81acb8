"""Errors that the user can fix: reported as one line each, without a traceback; the texts of errors."""


def one_line(error: BaseException | str) -> str:
    """Return the message of an error on one line, or the name of its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class UserError(Exception):
    """An error reported to the user, one line per problem: which key or file, the problem, the fix."""

    exit_code = 2

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class ConfigError(UserError):
    """All errors of a config at once, one line each; raised before anything is created."""


class DamagedFile(UserError):
    """A file of a run or sweep that is missing, damaged, or edited; the line says what still works."""


class RunFailed(UserError):
    """A run that cannot continue; its record is marked FAILED with these lines as the reason."""

    exit_code = 1
