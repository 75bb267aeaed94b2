"""The GPU benchmark on tiny models and a CPU: its cells and its file, what does not fit, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import benchmark_gpu
from stage1_dcr.hardware import choose_attention

TINY = ["--device", "cpu", "--tiny", "--steps", "1", "--batch-sizes", "2,3"]


@pytest.fixture(autouse=True)
def kernels():
    yield
    choose_attention("auto")


def cells(*arguments: str, out: Path, code: int = 0) -> list[dict[str, Any]]:
    assert benchmark_gpu.main([*TINY, *arguments, "--out", str(out)]) == code
    return json.loads(out.read_text())["cells"]


def test_every_cell_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = cells("--variants", "eager,channels_last+math", out=tmp_path / "a" / "out.json")
    order = [(cell["variant"], cell["batch_size"], cell["side"]) for cell in found]
    assert order == [
        (variant, batch_size, side)
        for variant in ("eager", "channels_last+math")
        for batch_size in (2, 3)
        for side in ("dense", "row-wise", "step")
    ]
    for cell in found:
        assert cell["status"] == "ok" and cell["seconds"] > 0
        assert cell["images_per_second"] == cell["batch_size"] / cell["seconds"]
        assert (
            cell["hardware"]["channels_last"] == (cell["hardware"]["attention"] == "math") == ("+" in cell["variant"])
        )
    # Both ways compute the same thing, or the comparison of their times would say nothing; so do both variants.
    loss = {(cell["variant"], cell["batch_size"], cell["side"]): cell["loss"] for cell in found}
    for batch_size in (2, 3):
        values = [
            loss[variant, batch_size, side]
            for variant in ("eager", "channels_last+math")
            for side in ("dense", "row-wise")
        ]
        assert values == pytest.approx(values[:1] * 4, rel=1e-4)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith(("dense", "row-wise", "step"))]) == 12


def test_what_does_not_fit_is_a_cell_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    real = benchmark_gpu.case_of

    def scarce(models: Any, side: str, batch_size: int, rows: int) -> Any:
        def out_of_memory() -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        def broken() -> None:
            raise RuntimeError("something else")

        if side == "dense":
            return out_of_memory if batch_size == 3 else broken
        return real(models, side, batch_size, rows)

    monkeypatch.setattr(benchmark_gpu, "case_of", scarce)
    found = cells("--variants", "eager", "--sides", "dense,row-wise", out=tmp_path / "out.json", code=1)
    assert [cell["status"] for cell in found] == ["failed", "ok", "oom", "ok"]
    printed = capsys.readouterr()
    assert "failed: RuntimeError: something else" in printed.out and "Traceback" in printed.err
    assert printed.out.count("OOM") == 1


def test_dense_is_not_recorded(tmp_path: Path):
    """A recording is of the row-wise call; on a CPU the setting is inert."""
    found = cells(
        "--variants", "cuda_graphs", "--sides", "dense,row-wise", "--batch-sizes", "2", out=tmp_path / "out.json"
    )
    assert [cell["side"] for cell in found] == ["row-wise"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--variants", "eager,fast"], "--variants has 'fast'"),
        (["--batch-sizes", "1"], "--batch-sizes must be at least 2"),
        (["--sides", "sparse"], "--sides has 'sparse'"),
        (["--out", __file__], "exists; give another --out"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert benchmark_gpu.main([*TINY, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark_gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("error: no CUDA device is visible")


def test_random_models_have_the_architecture_they_name():
    """Parameter counts of Stable Diffusion 2.1-base's UNet and of ViT-L/14's vision side with its projection."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"):
        unet = UNet2DConditionModel(**benchmark_gpu.UNET)
        vae = AutoencoderKL(**benchmark_gpu.VAE)
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**benchmark_gpu.TOWER))
    counts = [sum(p.numel() for p in model.parameters()) for model in (unet, vae, tower)]
    assert counts == [865_910_724, 83_653_863, 303_966_208]
