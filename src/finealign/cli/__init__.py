"""The command line, one module per command. Heavy imports are inside the commands, so that --help answers at once."""

from finealign.cli import adapt, describe, predict, evaluate, report, serve, export, demo, benchmark, lists, doctor  # isort: skip
from finealign.cli.app import app, main

__all__ = ["VERBS", "app", "main"]

# A command registers itself when its module is imported, so the order of the import above is that of the help.
VERBS = (adapt, describe, predict, evaluate, report, serve, export, demo, benchmark, lists, doctor)
