"""Profiles: the recipe, and the choices of the published code for whoever wants to compare with it.

A profile is a set of config values below the config file: what the file or the command line says, wins. Where a choice
is known to be wrong, the run says so before it trains and in its provenance, whoever made it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcr_mllm.denoiser_headers import DenoiserSummary
    from dcr_mllm.headers import TowerSummary
    from stage1_dcr.config import Stage1Config

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

# boyuh/DCR@c16d885: train_OpenAICLIP_stage1.py, train_SigLIP_stage1.py, clip_models/CLIP_bank.py.
PROFILES: dict[str, dict[str, Any]] = {
    "recipe": {},
    "published": {
        "prediction_type": "velocity",
        "normalisation": "openai",
        "views": {"space": "normalised", "interpolation": "bilinear", "horizontal_flip": 0.5, "vertical_flip": 0.5},
    },
}


def profile_values(config: Stage1Config) -> dict[str, Any]:
    """The values that the config's profile sets, to be laid below its file and overrides."""
    return PROFILES[config.profile]


def known_defects(config: Stage1Config, tower: TowerSummary, denoiser: DenoiserSummary) -> list[str]:
    """One sentence per choice of a config that is known to be wrong for these models."""
    defects = []
    if config.prediction_type == "velocity" and denoiser.prediction_type == "epsilon":
        defects.append(
            "the target is the velocity, but this UNet predicts the noise: at time t even the true noise comes no "
            "closer to it than a cosine of sqrt(abar_t)"
        )
    views = config.views
    if views.space == "normalised":
        defects.append(
            "views are made of normalised pixels and clamped to [0, 1]: all that is darker than the mean is lost"
        )
    if views.horizontal_flip or views.vertical_flip:
        defects.append(
            f"positives are mirrored (probability {views.horizontal_flip:g}) and upside down "
            f"({views.vertical_flip:g}): this teaches the tower to ignore orientation, which MMVP asks about"
        )
    if config.normalisation == "openai" and not _near(tower.image_mean + tower.image_std, OPENAI_MEAN + OPENAI_STD):
        defects.append(
            f"pixels are normalised with OpenAI's mean and std, but this tower was trained with "
            f"{list(tower.image_mean)} and {list(tower.image_std)}, which its exported processor keeps"
        )
    return [f"known defect: {text}" for text in defects]


def _near(values: tuple[float, ...], others: tuple[float, ...]) -> bool:
    return all(abs(value - other) < 0.005 for value, other in zip(values, others, strict=True))
