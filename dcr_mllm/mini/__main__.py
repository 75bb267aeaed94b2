"""Build the miniature, or draw its benchmarks.

python -m dcr_mllm.mini build --out DIR [--part tower|denoiser|llm|card|all] [--clip-steps N] ...
python -m dcr_mllm.mini benchmarks --out DIR [--split test|validation] [--pairs-per-pattern 100]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m dcr_mllm.mini", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="train the miniature's weights from nothing")
    build.add_argument("--out", type=Path, required=True, help="folder for tower/, denoiser/, llm/ and the card")
    build.add_argument("--part", choices=("tower", "denoiser", "llm", "card", "all"), default="all")
    build.add_argument("--clip-steps", type=int)
    build.add_argument("--detail-steps", type=int)
    build.add_argument("--vae-steps", type=int)
    build.add_argument("--unet-steps", type=int)
    build.add_argument("--llm-steps", type=int)
    build.add_argument("--seed", type=int, default=0)
    build.add_argument("--device", default="cpu", help="where the mini CLIP trains (default %(default)s)")
    build.add_argument("--num-workers", type=int, default=0, help="processes that draw its scenes")
    benchmarks = commands.add_parser("benchmarks", help="draw mmvp_vlm/, mmvp/ and labelled/")
    benchmarks.add_argument("--out", type=Path, required=True)
    benchmarks.add_argument("--split", choices=("test", "validation"), default="test")
    benchmarks.add_argument("--pairs-per-pattern", type=int, default=100)
    options = parser.parse_args(argv)

    if options.command == "benchmarks":
        from dcr_mllm.mini.data import write_benchmarks

        print(write_benchmarks(options.out, options.split, options.pairs_per_pattern))
        return 0

    from dcr_mllm.mini import build as builder

    if options.part in ("tower", "all"):
        clip_steps = options.clip_steps or builder.CLIP_STEPS
        detail_steps = options.detail_steps or builder.DETAIL_STEPS
        where = {"device": options.device, "num_workers": options.num_workers}
        builder.build_tower(options.out, clip_steps, detail_steps, options.seed, **where)
    if options.part in ("denoiser", "all"):
        vae_steps, unet_steps = options.vae_steps or builder.VAE_STEPS, options.unet_steps or builder.UNET_STEPS
        builder.build_denoiser(options.out, vae_steps, unet_steps, options.seed)
    if options.part in ("llm", "all"):
        builder.build_language_model(options.out, options.llm_steps or builder.LLM_STEPS, options.seed)
    if options.part in ("card", "all"):
        print(builder.write_card(options.out)["quality"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
