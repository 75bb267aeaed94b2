"""The command line that both stages share: `[CONFIG] [key=value ...] [--print-config | --dry-run]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dcr_mllm.config import available_configs, load_config, resolve_config_path
from dcr_mllm.errors import UserError

Config = TypeVar("Config")


def parse_stage(
    argv: list[str],
    cls: type[Config],
    configs: Path,
    *,
    prog: str,
    description: str,
    values_below: Callable[[Config], Mapping[str, Any]] | None = None,
) -> tuple[argparse.Namespace, Config]:
    """Arguments and the resolved config of a stage; without a config, `mini`.

    Args:
        argv: Without the program's name.
        cls: The stage's config dataclass.
        configs: Folder of its shipped YAML files.
        prog: Script name for the usage line.
        description: Its help text.
        values_below: What a config implies where neither its file nor the command line says otherwise (a profile).

    Raises:
        UserError: Two configs, or what `load_config` refuses.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"shipped configs: {', '.join(available_configs(configs))}\nkeys: see --print-config",
    )
    parser.add_argument("arguments", nargs="*", metavar="[CONFIG] key=value", help="a config, then overrides")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--dry-run", action="store_true", help="check and resolve everything, train nothing")
    options = parser.parse_intermixed_args(argv)
    names = [argument for argument in options.arguments if "=" not in argument]
    overrides = [argument for argument in options.arguments if "=" in argument]
    if len(names) > 1:
        raise UserError(f"One config at most, found {' and '.join(names)}; overrides are written key=value.")
    path = resolve_config_path(names[0] if names else "mini", configs)
    config = load_config(cls, path, overrides)
    below = values_below(config) if values_below is not None else {}
    return options, load_config(cls, path, overrides, base=below) if below else config
