"""`dcr-mllm COMMAND ...`: the sub-commands that the stages register, each loaded only when it is called.

A stage adds an entry point to the group `dcr_mllm.commands`; it names a `main(argv: list[str] | None) -> int`.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable

from dcr_mllm import __version__
from dcr_mllm.config import nearest
from dcr_mllm.errors import UserError
from dcr_mllm.log import rank
from dcr_mllm.stopping import Stopped

GROUP = "dcr_mllm.commands"


def commands() -> dict[str, importlib.metadata.EntryPoint]:
    """The registered sub-commands by name, not loaded."""
    return {point.name: point for point in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda p: p.name)}


def run_main(function: Callable[[], int | None]) -> int:
    """Runs an entry point: a `UserError` becomes one line on stderr and exit status 2, an interruption 130.

    A run that has stopped as it was told says so, and has not failed.
    """
    try:
        return function() or 0
    except Stopped as stopped:
        if rank() == 0:
            print(stopped, flush=True)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def main(argv: list[str] | None = None) -> int:
    """Entry point of `dcr-mllm`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = commands()
    names = ", ".join(known) or "none"
    usage = f"usage: dcr-mllm COMMAND [arguments]\n\ncommands: {names}\n`dcr-mllm COMMAND --help` says more."
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, *rest = arguments

    def call() -> int | None:
        if name not in known:
            raise UserError(f"unknown command {name!r}{nearest(name, known)}")
        return known[name].load()(rest)

    return run_main(call)


if __name__ == "__main__":
    sys.exit(main())
