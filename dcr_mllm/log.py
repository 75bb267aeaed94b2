"""One logger for everything, aware of its rank: rank 0 speaks at INFO, the others only at WARNING."""

from __future__ import annotations

import logging
import os
import sys

_ROOT = "dcr_mllm"


def rank() -> int:
    """The global rank of this process as the launcher set it, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


class _StderrHandler(logging.StreamHandler):
    """Looks `sys.stderr` up at each record, so that a progress bar or a test that swaps the stream sees the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Format(logging.Formatter):
    """Plain lines at INFO; level and rank only where they carry something."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if rank() > 0:
            text = f"[rank {rank()}] {text}"
        return text if record.levelno == logging.INFO else f"{record.levelname.lower()}: {text}"


def get_logger(name: str = _ROOT) -> logging.Logger:
    """Returns the logger of a module.

    Args:
        name: usually `__name__`; names outside the package are put below its root, so that one switch rules them all.
    """
    root = logging.getLogger(_ROOT)
    if not root.handlers:
        handler = _StderrHandler()
        handler.setFormatter(_Format("%(message)s"))
        root.addHandler(handler)
    root.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    return logging.getLogger(name if name == _ROOT or name.startswith(_ROOT + ".") else f"{_ROOT}.{name}")
