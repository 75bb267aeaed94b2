"""torchrun that ends well when it is told to stop: the same options, `python -m dcr_mllm.torchrun ...`.

torchrun itself passes SIGTERM on to its workers, kills those that have not ended after 30 seconds, and exits with 1
whatever they did. Here SIGTERM and SIGUSR1 are passed on and nothing else happens: the workers save, end with 0, and so
does this. Who sent the signal decides how long that may take. Workers that fail after it are not trained on, and with
`--max-restarts` the workers of every attempt find each other.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from dcr_mllm.stopping import SIGNALS, TOLD_TO_STOP


def main(argv: list[str] | None = None) -> None:
    """As torchrun's own, with other signal handlers."""
    import psutil

    def pass_on(number: int, _frame: Any) -> None:
        os.environ[TOLD_TO_STOP] = "1"  # workers that are started from now on inherit it
        for worker in psutil.Process().children():
            try:
                worker.send_signal(number)
            except psutil.NoSuchProcess:
                pass  # it has ended by itself

    for number in SIGNALS:
        signal.signal(number, pass_on)
    # Default of an option; torchrun would otherwise put its own handler in place of this one.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
    # A store for each attempt. Torch 2.14 keeps one for all of them, in which workers that were started again find the
    # addresses of the dead.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    from torch.distributed.run import main as torchrun

    torchrun(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
