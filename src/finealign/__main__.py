"""Run the command line as ``python -m finealign``."""

from finealign.cli import main

main()
