"""The command line: verbs parse, check, and call a stage. Importing this imports no torch."""

import errno
import sys
from typing import Annotated

import typer

from growmoe.cli import looking, making, talking
from growmoe.errors import GrowmoeError

app = typer.Typer(
    name="growmoe",
    help="Grow a dense language model into a mixture of experts, train it and talk to it, "
    "with proof at every seam that nothing was lost.",
    epilog="Errors are one sentence (exit code 2: wrong use, 1: failure); --debug after any verb "
    "shows the traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from growmoe import __version__

        print(f"growmoe {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


# in the order that --help shows them
for _verb in (
    making.run, making.prepare, making.train, making.grow, making.upcycle, making.export,
    looking.verify, looking.evaluate,
    talking.generate, talking.chat, talking.bench,
    looking.inspect, looking.plan, looking.report, looking.doctor,
):  # fmt: skip
    app.command()(_verb)


def main(argv: list[str] | None = None) -> None:
    """Entry point: turns every failure into one sentence and an exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(args=arguments, standalone_mode=False)
    except Exception as error:
        if debug:
            raise
        sys.exit(_explain(error))
    except KeyboardInterrupt:
        print("\ngrowmoe: stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> int:
    """Print one sentence about `error`; returns the exit code."""
    if isinstance(error, GrowmoeError):
        for line in str(error).splitlines():
            print(f"growmoe: {line}", file=sys.stderr)
        return error.exit_code
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's own, any copy
        print(f"growmoe: {error.format_message()}", file=sys.stderr)
        return int(error.exit_code)
    if type(error).__name__ == "Abort":
        print("growmoe: stopped", file=sys.stderr)
        return 130
    if isinstance(error, OSError):
        place = f" ({error.filename})" if error.filename else ""
        reasons = {errno.ENOSPC: "the disk is full", errno.EFBIG: "the file size limit is reached"}
        reason = reasons.get(error.errno or 0, error.strerror or str(error))
        print(f"growmoe: {reason}{place}; nothing was published", file=sys.stderr)
        return 1
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        print("growmoe: out of memory; nothing was published", file=sys.stderr)
        return 1
    detail = str(error).splitlines()[0] if str(error) else "no message"
    print(
        f"growmoe: unexpected {type(error).__name__}: {detail} (run again with --debug)",
        file=sys.stderr,
    )
    return 1
