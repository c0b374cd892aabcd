"""The command line's application, on which each command registers from a module of its own."""

import logging
import os
import sys
from typing import Annotated

import typer

from finealign import __version__
from finealign.cli.streams import StreamError, protect_streams, tell, tell_escaped
from finealign.runtime.home import ensure_home

app = typer.Typer(
    name="finealign",
    help="Adapt a CLIP-like model to your classes from unlabelled images and class names.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line."""
    # open_clip logs to the root logger, which prints every line to the screen if it has no handler.
    logging.basicConfig(handlers=[logging.NullHandler()])
    protect_streams()
    ensure_home()
    code = _exit_code()
    if "LOCAL_RANK" in os.environ:  # an interpreter that shuts down is sometimes aborted by gloo's threads
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _exit_code() -> int:
    """Run the command and write all of its output. Returns the exit code."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
            tell_escaped()
    except StreamError as error:
        return tell(error)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
