"""Mistakes that a person can put right: one line each, and no traceback."""


class UserError(Exception):
    """Lines for the person at the keyboard: each names the thing, what is wrong, what is allowed or what to
    do."""

    exit_code = 2

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class ConfigError(UserError):
    """Every mistake of a config at once, one line each; nothing has been created yet."""


class RunFailed(UserError):
    """A run that cannot go on; its record says FAILED and the lines say why."""

    exit_code = 1
