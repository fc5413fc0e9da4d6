"""`python -m retool` is the `retool` command."""

from retool.cli import main

main()
