"""Embeddings of images and texts by a tower, as fp32 NumPy arrays, in one pass per image set.

A tower is a dual encoder on disk: model, image processor and tokenizer in one directory. Which class loads it follows
from `model_type` in its config, never from its path.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from dcr_mllm.errors import UserError
from dcr_mllm.hardware import exact_fp32
from dcr_mllm.headers import TowerSummary
from dcr_mllm.log import get_logger

logger = get_logger(__name__)


class Picture(Protocol):
    """An encoded image: a file, or a part of one. Its `str` says where it is."""

    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What differs between the families of dual encoders.

    Attributes:
        has_class_token: Whether token 0 is a class token; SigLIP pools by attention instead.
        pad_to_max_length: SigLIP was trained on texts padded to full length, reads its last position and never saw a
            mask; CLIP reads the end-of-text token, so its padding does not matter.
        lower_case: Whether it was trained on lower-cased texts. SigLIP's tokenizer and CLIP's see to that themselves,
            the Gemma tokenizer of SigLIP 2 does not.
    """

    has_class_token: bool
    pad_to_max_length: bool
    lower_case: bool


KINDS = {
    "clip": Kind(has_class_token=True, pad_to_max_length=False, lower_case=False),
    "metaclip_2": Kind(has_class_token=True, pad_to_max_length=False, lower_case=False),
    "siglip": Kind(has_class_token=False, pad_to_max_length=True, lower_case=True),
}


@dataclass(frozen=True, kw_only=True)
class TokenSample:
    """Hidden states of M images at every layer, from which drift is measured.

    Attributes:
        class_tokens: [L+1, M, H], None without a class token. Layer 0 is the input of the first block.
        patch_tokens: [L+1, M, P, H], P patches per image at positions that depend only on the image's index.
    """

    class_tokens: np.ndarray | None
    patch_tokens: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    """What one pass over N images yields.

    Attributes:
        projected: [N, D] the embedding whose cosine with a text's is the contrastive logit; not normalised.
        pooled: [N, H] the pooled feature before the projection (the same as `projected` for SigLIP).
        tokens: Hidden states of the first `num_token_images` images, None if none were asked for.
        unreadable: Positions of images that could not be decoded; black ones stand in for them.
    """

    projected: np.ndarray
    pooled: np.ndarray
    tokens: TokenSample | None
    unreadable: tuple[int, ...] = ()


def pick_device(device: str) -> torch.device:
    """The device that `auto|cpu|cuda` stands for."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is '{device}'; use auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch sees no CUDA device; use device auto or cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _check_tokenizer(path: Path, tokenizer: Any, vocab_size: int) -> None:
    # Without its files transformers 5 makes up a tokenizer of two or three tokens and says nothing: near-chance scores.
    if not 0.9 * vocab_size <= len(tokenizer) <= vocab_size:
        raise UserError(
            f"{path}: its tokenizer has {len(tokenizer)} tokens, but text_config.vocab_size is {vocab_size}; "
            "copy the tokenizer files of the base tower into it."
        )


def _check_images(path: Path, processor: Any, image_size: int, patch_size: int) -> None:
    if image_size < patch_size:
        raise UserError(f"{path}: vision_config.image_size {image_size} is smaller than its patch_size {patch_size}.")
    pixels = processor([Image.new("RGB", (3 * image_size // 2, image_size))], return_tensors="pt")["pixel_values"]
    if tuple(pixels.shape[-2:]) != (image_size, image_size):
        raise UserError(
            f"{path}: its image processor makes images of {tuple(pixels.shape[-2:])} pixels, but "
            f"vision_config.image_size is {image_size}; mend preprocessor_config.json."
        )


def _open_rgb(picture: Picture) -> Image.Image:
    try:
        with Image.open(io.BytesIO(picture.read_bytes())) as image:
            return image.convert("RGB")
    # Pillow's decoders raise more than OSError on damage, and a warning of too many pixels may be an error.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{picture} is not a readable image: {error}.") from error


class DualEncoder:
    """A CLIP- or SigLIP-like tower in fp32 and eval mode.

    Args:
        summary: What `headers.tower_summary` read of the directory.
        device: `auto`, `cpu` or `cuda`.
        batch_size: Images or texts per forward pass; the same for every tower that is compared.
    """

    def __init__(self, summary: TowerSummary, *, device: str = "auto", batch_size: int = 256) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.path = summary.path
        self.kind = KINDS[summary.model_type]
        self.device = pick_device(device)
        self.batch_size = batch_size
        self._tokenizer = AutoTokenizer.from_pretrained(self.path)
        # Pillow resizes with antialiasing on every machine alike; the torchvision one differs between releases.
        self._processor = AutoImageProcessor.from_pretrained(self.path, backend="pil")
        self._model = AutoModel.from_pretrained(self.path, dtype=torch.float32, use_safetensors=True)
        self._model.to(self.device).eval().requires_grad_(False)
        config = self._model.config
        self.vision_config, self.text_config = config.vision_config, config.text_config
        _check_tokenizer(self.path, self._tokenizer, self.text_config.vocab_size)
        _check_images(self.path, self._processor, self.vision_config.image_size, self.vision_config.patch_size)
        self.description = {
            "path": str(self.path),
            "model_type": summary.model_type,
            "image_size": summary.image_size,
            "patch_size": summary.patch_size,
            "num_layers": summary.num_layers,
            "hidden_size": summary.hidden_size,
            "image_mean": list(summary.image_mean),
            "image_std": list(summary.image_std),
            "image_processor": type(self._processor).__name__,
            "tokenizer_length": len(self._tokenizer),
            "device": str(self.device),
        }

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """[N, D] L2-normalised text embeddings."""
        max_length = self.text_config.max_position_embeddings
        if self.kind.lower_case:
            texts = [text.lower() for text in texts]
        unique = list(dict.fromkeys(texts))  # statements repeat, at least in drawn sets
        embeddings, num_cut = [], 0
        for start in range(0, len(unique), self.batch_size):
            batch = unique[start : start + self.batch_size]
            encoded = self._tokenizer(
                batch,
                padding="max_length" if self.kind.pad_to_max_length else True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
            num_cut += sum(len(ids) > max_length for ids in self._tokenizer(batch, verbose=False)["input_ids"])
            inputs = {"input_ids": encoded["input_ids"].to(self.device)}
            if not self.kind.pad_to_max_length:
                inputs["attention_mask"] = encoded["attention_mask"].to(self.device)
            with exact_fp32():
                pooled = self._model.get_text_features(**inputs).pooler_output
            embeddings.append(normalize(pooled, dim=-1).cpu().numpy())
        if num_cut:
            logger.warning("%s: %d of %d texts are cut at %d tokens.", self.path, num_cut, len(unique), max_length)
        row = {text: index for index, text in enumerate(unique)}
        return np.concatenate(embeddings)[[row[text] for text in texts]]

    def pixel_batches(self, files: Sequence[Picture], unreadable: list[int] | None = None) -> Iterator[Tensor]:
        """Images as the tower sees them, [up to batch_size, 3, S, S] on the CPU.

        Args:
            files: N images.
            unreadable: Collects positions of images that cannot be decoded, which become black; None: raises instead.

        Raises:
            UserError: An image cannot be decoded.
        """
        for start in range(0, len(files), self.batch_size):
            images = []
            for position, file in enumerate(files[start : start + self.batch_size], start=start):
                try:
                    images.append(_open_rgb(file))
                except UserError:
                    if unreadable is None:
                        raise
                    unreadable.append(position)
                    images.append(Image.new("RGB", (self.vision_config.image_size,) * 2))
            yield self._processor(images, return_tensors="pt")["pixel_values"]

    def embed_images(
        self,
        files: Sequence[Picture],
        *,
        num_token_images: int = 0,
        num_patches: int = 8,
        seed: int = 0,
        skip_unreadable: bool = False,
    ) -> ImageFeatures:
        """Embed images in one pass.

        Args:
            files: N images of any mode and size, files or parts of them.
            num_token_images: M, of how many images (the first ones) the hidden states are kept.
            num_patches: P, how many patch tokens of each of them.
            seed: Of the choice of patches; the same seed gives the same patches for every tower of one shape.
            skip_unreadable: List images that cannot be decoded instead of raising.

        Raises:
            UserError: An image cannot be decoded.
        """
        unreadable: list[int] | None = [] if skip_unreadable else None
        features = self.embed_pixels(
            self.pixel_batches(files, unreadable), num_token_images=num_token_images, num_patches=num_patches, seed=seed
        )
        return dataclasses.replace(features, unreadable=tuple(unreadable or ()))

    @torch.inference_mode()
    def embed_pixels(
        self, batches: Iterable[Tensor], *, num_token_images: int = 0, num_patches: int = 8, seed: int = 0
    ) -> ImageFeatures:
        """As `embed_images`, on what `pixel_batches` made."""
        rng = np.random.default_rng(seed)
        projected, pooled, classes, patches = [], [], [], []
        done = 0
        with exact_fp32():
            for batch in batches:
                pixels = batch.to(self.device)
                num_kept = min(max(num_token_images - done, 0), len(pixels))
                output = self._model.vision_model(pixel_values=pixels, output_hidden_states=num_kept > 0)
                feature = output.pooler_output
                projection = getattr(self._model, "visual_projection", None)
                projected.append((feature if projection is None else projection(feature)).cpu().numpy())
                pooled.append(feature.cpu().numpy())
                if num_kept:
                    class_part, patch_part = self._sample_tokens(output.hidden_states, num_kept, num_patches, rng)
                    classes.append(class_part)
                    patches.append(patch_part)
                done += len(pixels)
        tokens = None
        if patches:
            class_tokens = np.concatenate(classes, axis=1) if self.kind.has_class_token else None
            tokens = TokenSample(class_tokens=class_tokens, patch_tokens=np.concatenate(patches, axis=1))
        return ImageFeatures(projected=np.concatenate(projected), pooled=np.concatenate(pooled), tokens=tokens)

    def drop_text_side(self) -> None:
        """Free the memory of the text side; `embed_texts` cannot be used any more."""
        del self._model.text_model

    @torch.no_grad()
    def overwrite(self, weights: Mapping[str, Tensor]) -> None:
        """Replace weights, by their names in the full model."""
        own = dict(self._model.named_parameters())
        for name, value in weights.items():
            own[name].copy_(value)

    def _sample_tokens(
        self, hidden_states: Sequence[Tensor], num_kept: int, num_patches: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of the first K images, class tokens [L+1, K, H] (width 0 without one) and patch tokens [L+1, K, P, H]."""
        first = int(self.kind.has_class_token)
        available = hidden_states[0].shape[1] - first
        chosen = np.stack([rng.permutation(available)[:num_patches] for _ in range(num_kept)]) + first
        index = torch.from_numpy(chosen).to(self.device)
        rows = torch.arange(num_kept, device=self.device)[:, None]
        patch_tokens = torch.stack([state[rows, index] for state in hidden_states]).cpu().numpy()
        class_tokens = torch.stack([state[:num_kept, :first] for state in hidden_states]).flatten(2).cpu().numpy()
        return class_tokens, patch_tokens
