"""The base of every error that is the user's to mend: the command line prints it as one line and exits with 2."""

from __future__ import annotations


class UserError(ValueError):
    """Says what was wrong, where, and what to do."""
