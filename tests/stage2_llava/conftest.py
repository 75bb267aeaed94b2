"""Fixtures of stage 2: tiny language models, LLaVAs and instruction data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stage2_llava.data import write_data


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
def llava_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `align.json`, `instruct.json` and `images/`."""
    return write_data(tmp_path_factory.mktemp("data"))
