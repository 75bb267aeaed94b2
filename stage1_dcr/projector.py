"""The projector: from a tower's class embedding to one condition vector for the denoiser."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dcr_mllm.errors import UserError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


class Projector(nn.Module):
    """``LayerNorm -> Linear -> GELU -> Linear``, as published.

    Args:
        input_width: Width of the tower's class embedding.
        output_width: Cross-attention width of the denoiser.
        hidden_width: Width in between.
        denoiser_hash: Hash of the denoiser that the projector was trained for; its output means nothing to another.
    """

    def __init__(
        self, input_width: int, output_width: int, *, hidden_width: int = 1024, denoiser_hash: str | None = None
    ) -> None:
        super().__init__()
        self.input_width = input_width
        self.output_width = output_width
        self.hidden_width = hidden_width
        self.denoiser_hash = denoiser_hash
        self.norm = nn.LayerNorm(input_width)
        self.up = nn.Linear(input_width, hidden_width)
        self.act = nn.GELU()
        self.out = nn.Linear(hidden_width, output_width)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Maps embeddings ``[B, input_width]`` to conditions ``[B, output_width]``."""
        return self.out(self.act(self.up(self.norm(embeddings))))

    def config(self) -> dict[str, int | str | None]:
        return {
            "input_width": self.input_width,
            "hidden_width": self.hidden_width,
            "output_width": self.output_width,
            "denoiser_hash": self.denoiser_hash,
        }

    def save(self, directory: Path | str, *, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes ``model.safetensors`` (fp32) and ``config.json``.

        Args:
            directory: Created if needed.
            state_dict: The weights, where they are not in the module itself (gathered from ZeRO-3 shards).
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict() if state_dict is None else state_dict
        wrong = [name for name, value in self._shapes().items() if name not in weights or weights[name].shape != value]
        if wrong:
            # An emptied ZeRO-3 shard looks like a tensor; it must not end up in a checkpoint.
            raise ValueError(f"projector weights are incomplete ({', '.join(wrong)}): gather them before saving.")
        weights = {name: weights[name].detach().to("cpu", torch.float32).contiguous() for name in self._shapes()}
        save_file(weights, directory / WEIGHTS_NAME, metadata={"format": "pt"})
        (directory / CONFIG_NAME).write_text(json.dumps(self.config(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path | str) -> Projector:
        """Reads what :meth:`save` wrote; every weight must be there and fit."""
        directory = Path(directory)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (directory / name).is_file():
                raise UserError(
                    f"{directory} is not a projector directory: {name} is missing; train one, or fix the path."
                )
        config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
        try:
            projector = cls(
                config["input_width"],
                config["output_width"],
                hidden_width=config["hidden_width"],
                denoiser_hash=config.get("denoiser_hash"),
            )
        except KeyError as error:
            raise UserError(f"{directory / CONFIG_NAME} has no {error}: it was not written by this project.") from None
        try:
            projector.load_state_dict(load_file(directory / WEIGHTS_NAME), strict=True)
        except RuntimeError as error:
            detail = " ".join(str(error).split())
            raise UserError(f"{directory / WEIGHTS_NAME} does not fit its config.json: {detail}") from None
        return projector

    def _shapes(self) -> dict[str, torch.Size]:
        i, h, o = self.input_width, self.hidden_width, self.output_width
        shapes = {"norm.weight": [i], "norm.bias": [i], "up.weight": [h, i], "up.bias": [h]}
        return {k: torch.Size(v) for k, v in {**shapes, "out.weight": [o, h], "out.bias": [o]}.items()}
