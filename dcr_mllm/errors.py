"""The one exception that stands for a mistake of the user."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user, told in one sentence: what was found, where, and what to do.

    Entry points catch it, print ``error: <sentence>`` to stderr and exit with 2: a typing error needs no traceback.
    """
