"""Fixtures of stage 2: instruction data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stage2_llava.data import write_data


@pytest.fixture(scope="session")
def llava_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `align.json`, `instruct.json` and `images/`."""
    return write_data(tmp_path_factory.mktemp("data"))
