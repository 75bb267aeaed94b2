"""Copies of hub repositories in folders, read by their files.

`datasets` keeps what it has read of a folder under the folder's last name alone, so that `a/mmvp` and `b/mmvp` would be
one data set to it. Its cache of named files tells them apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def split_files(directory: Path, config: str | None = None) -> dict[str, list[str]]:
    """The files of every split, found as for the hub repository that the folder is a copy of.

    Raises:
        ValueError, OSError: What `datasets` says of a folder that it cannot read.
    """
    from datasets import load_dataset_builder

    found = load_dataset_builder(str(directory), name=config).config.data_files or {}
    return {str(split): [str(file) for file in files] for split, files in found.items()}


def load_parquet(directory: Path, files: dict[str, list[str]], config: str | None = None) -> Any:
    """A `DatasetDict` of splits in Parquet files, with the features that the folder's README declares, if it does.

    Raises:
        ValueError, OSError: As `split_files`.
    """
    from datasets import load_dataset, load_dataset_builder

    features = load_dataset_builder(str(directory), name=config).info.features
    return load_dataset("parquet", data_files=files, features=features)
