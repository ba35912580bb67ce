"""The two kinds of failure a user can meet; both carry one sentence and never a traceback."""


class GrowmoeError(Exception):
    """Something failed while working (exit code 1). The message names the file, key or line."""

    exit_code = 1


class UsageError(GrowmoeError):
    """The request itself is wrong (exit code 2): an option, a recipe, a missing input."""

    exit_code = 2
