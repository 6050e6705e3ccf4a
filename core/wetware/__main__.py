"""`python -m wetware` is `ww`."""

from wetware.cli import main

main()
