"""``python -m finealign`` is ``finealign``."""

from finealign.cli import main

main()
