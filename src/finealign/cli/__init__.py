"""The command line, one module per command. Heavy imports are inside the commands, so that --help answers at once."""

# isort: off
from finealign.cli import adapt, describe, predict, evaluate, review, report, serve, export
from finealign.cli import demo, benchmark, reproduce, lists, doctor

# isort: on
from finealign.cli.app import app, main

__all__ = ["VERBS", "app", "main"]

# A command registers itself when its module is imported, so the order of the import above is that of the help.
VERBS = (adapt, describe, predict, evaluate, review, report, serve, export, demo, benchmark, reproduce, lists, doctor)
