"""The ``prunec`` command: its sub-commands, and what each kind of failure looks like."""

from __future__ import annotations

import errno
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import prunec
from prunec.cli import (
    analyze,
    check,
    compare,
    demo,
    evaluate,
    export,
    prune,
    recipes,
    recover,
    trace,
)
from prunec.errors import PrunecError

FAILED, INTERRUPTED = 2, 130


class _Commands(TyperGroup):
    """Sub-commands whose user errors are one message on stderr, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PrunecError as error:
            _fail(str(error), FAILED)
        except KeyboardInterrupt:
            _fail("interrupted", INTERRUPTED)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            _fail(_os_error(error), FAILED)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            _fail(_OUT_OF_MEMORY, FAILED)


def _fail(text: str, code: int) -> None:
    sys.stderr.write(text if code == INTERRUPTED else f"error: {text}")
    sys.stderr.write("\n")
    raise SystemExit(code)


_OUT_OF_MEMORY = """there is not enough memory
  so   nothing was written
  fix  give fewer or shorter samples; prunec prune: add --out-of-core and --activations disk"""


def _is_out_of_memory(error: BaseException) -> bool:
    """Also as torch says it, on the CPU and on a GPU."""
    named = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or named or "can't allocate memory" in str(error)


def _os_error(error: OSError) -> str:
    what = error.strerror or str(error)
    return f"{what}: {error.filename}" if error.filename else what


app = typer.Typer(
    cls=_Commands,
    name="prunec",
    help="A structured-pruning compiler: trace a model, slice it for real, write a smaller one.",
    epilog="Example: prunec prune smollm2 -o smaller --ratio 0.2",
    no_args_is_help=True,
    rich_markup_mode=None,  # help that costs a tenth of a second, not half of one
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("trace")(trace.trace)
app.command("analyze")(analyze.analyze)
app.command("prune")(prune.prune)
app.command("export")(export.export)
app.command("check")(check.check)
app.command("recover")(recover.recover)
app.command("report")(compare.report)
app.command("compare")(compare.compare)
app.command("eval")(evaluate.evaluate)
app.command("demo")(demo.demo)
app.add_typer(recipes.app, name="recipes")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"prunec {prunec.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options of the command itself; typer acts on them before this runs."""


def run() -> None:
    """Run the command line and exit with its code: 0, 1, 2 for a user error, 130 for Ctrl-C."""
    # An ordinary kill cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
