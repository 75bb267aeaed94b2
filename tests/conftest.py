"""Fixtures that several test modules share: tiny models on disk and tiny image shards."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny CLIP directory."""
    from tests.tiny_models import save_tiny_clip

    path = tmp_path_factory.mktemp("models") / "clip"
    save_tiny_clip(path)
    return path


@pytest.fixture(scope="session")
def tiny_siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny SigLIP directory."""
    from tests.tiny_models import save_tiny_siglip

    path = tmp_path_factory.mktemp("models") / "siglip"
    save_tiny_siglip(path)
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Llama in Vicuna's layout."""
    from tests.tiny_llms import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Qwen2 with ChatML."""
    from tests.tiny_llms import save_tiny_qwen

    return save_tiny_qwen(tmp_path_factory.mktemp("models") / "qwen")


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path, tiny_llama: Path) -> Path:
    """A LLaVA on `tiny_clip` and `tiny_llama`, projector untrained."""
    from stage2_llava.assemble import assemble
    from stage2_llava.export import save_llava

    path = tmp_path_factory.mktemp("models") / "llava"
    model, processor, _ = assemble(tiny_clip, tiny_llama, template="vicuna_v1")
    path.mkdir()
    save_llava(model, processor, path, {"phase": "test"})
    return path


@pytest.fixture(scope="session")
def tiny_denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Stable Diffusion directory."""
    from tests.tiny_models import save_tiny_denoiser

    path = tmp_path_factory.mktemp("models") / "denoiser"
    save_tiny_denoiser(path)
    return path


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pattern of four WebDataset shards with 16 noise images each."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for shard in range(4):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for index in range(16):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, format="PNG")
                entry = tarfile.TarInfo(f"{shard:05d}{index:04d}.png")
                entry.size = buffer.tell()
                buffer.seek(0)
                archive.addfile(entry, buffer)
    return str(folder / "{00000..00003}.tar")
