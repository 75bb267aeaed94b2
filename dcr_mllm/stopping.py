"""Stopping when told to: SIGTERM, or the SIGUSR1 that Slurm can send ahead, ends a run at its next optimizer step.

The signal is only noted. `StreamTrainer` makes all processes agree on the step after which they save and stop, and the
command exits with 0: the same command goes on. transformers' own `JITCheckpointCallback` is not used, because each of
its processes decides for itself, some seconds after its own signal: several would save at different steps, or wait for
each other for ever; and it saves before the optimizer step, with half of an accumulation done.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Set by `dcr_mllm.torchrun` once it was told to stop: workers that its agent restarts after that have nothing to do.
TOLD_TO_STOP = "DCR_MLLM_TOLD_TO_STOP"

_received = 0


class Stopped(Exception):
    """The run has stopped as it was told, everything is saved: exit with 0."""


def received() -> int:
    """Number of the signal that this process has got while it is `listening`, 0 for none."""
    return _received


@contextmanager
def listening() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 are noted in place of ending the process.

    Raises:
        Stopped: The launcher was told to stop before this process began.
    """
    global _received
    if TOLD_TO_STOP in os.environ:
        raise Stopped("stopped before anything began; the same command goes on")
    _received = 0

    def note(number: int, _frame: Any) -> None:
        global _received
        _received = number

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        _received = 0
        for number, handler in before.items():
            signal.signal(number, handler)


def deaf(init: Callable[[int], None] | None = None) -> Callable[[int], None]:
    """A `worker_init_fn` that leaves signals to the main process, after another one.

    Slurm and DeepSpeed's launcher signal data loading workers as well, and a dead worker is an error in training.
    """
    return _Deaf(init)


class _Deaf:
    """A class, since workers may be spawned and get it pickled."""

    def __init__(self, init: Callable[[int], None] | None):
        self.init = init

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        # Not ignored: it is also how the main process ends its workers, and would wait for one that does not listen.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()
        if self.init is not None:
            self.init(worker)


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
