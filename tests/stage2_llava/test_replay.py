"""A bad step of stage 2 is kept, and can be computed again from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dcr_mllm.bad_step import read_step
from stage2_llava import phase as phases
from stage2_llava import replay
from stage2_llava.__main__ import main


class Poisoned:
    """A loader whose first image is infinite in one batch."""

    def __init__(self, loader: Any, number: int):
        self.loader, self.number = loader, number

    def __iter__(self) -> Any:
        for index, batch in enumerate(self.loader):
            if index == self.number and "pixel_values" in batch:
                batch["pixel_values"][0] = float("inf")
            yield batch


@pytest.mark.parametrize("phase", ["align", "instruct"])
def test_bad_step(
    tmp_path: Path,
    tiny_clip: Path,
    tiny_llama: Path,
    llava_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    phase: str,
):
    shared = {"images": str(llava_data), "batch_size": 4, "micro_batch_size": 2, "max_steps": 2}
    config = {
        "run": "test",
        "runs_dir": str(tmp_path),
        "towers": {"base": str(tiny_clip)},
        "llm": str(tiny_llama),
        "template": "vicuna_v1",
        "max_length": 256,
        "align": {**shared, "data": str(llava_data / "align.json")},
        "instruct": {**shared, "data": str(llava_data / "instruct.json"), "lora_rank": 4, "group_by_modality": False},
        "num_workers": 0,
        "report_to": "none",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    real = phases._loader

    def loader(config: Any, settings: Any, *arguments: Any) -> Any:
        poisoned = hasattr(settings, "lora_rank") == (phase == "instruct")
        return Poisoned(real(config, settings, *arguments), 2 if poisoned else -1)

    monkeypatch.setenv("NPROC", "1")
    monkeypatch.setattr(phases, "_loader", loader)
    assert main([str(tmp_path / "config.yaml")]) == 2
    assert f"step 2 of the {phase} phase" in capsys.readouterr().err
    directory = tmp_path / "test" / "base" / "bad-step-2"
    bad, good = read_step(directory)["losses"][0]
    assert bad != bad and good == good

    assert replay.main([str(directory), "--rank", "0"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert rows[0][-1] == "pixel_values" and rows[1][2] == rows[1][3] == f"{good:.6g}"
