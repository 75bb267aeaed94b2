"""`dcr-mllm import-open-clip ARCH CHECKPOINT OUT`: an open_clip ViT as a Hugging Face CLIP that every stage takes.

Nothing is written unless both models agree on random images and texts to 1e-5.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dcr_mllm.cli import run_main
from dcr_mllm.errors import UserError
from dcr_mllm.open_clip_names import to_hugging_face
from dcr_mllm.runs import PROVENANCE_FILE, atomic_directory, sha256_file, write_json_atomic

if TYPE_CHECKING:
    from transformers import CLIPModel

TOLERANCE = 1e-5
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def import_open_clip(architecture: str, checkpoint: str | Path, out: str | Path) -> Path:
    """Convert a checkpoint of an open_clip CLIP (ViT image side, open_clip's own text side).

    Args:
        architecture: open_clip's name, such as `ViT-L-14-quickgelu`.
        checkpoint: Its weights on disk: safetensors, or a state dict that `weights_only` loading accepts.
        out: Directory to write; must not exist.

    Returns:
        `out`: a `CLIPModel` in fp32 with tokenizer and image processor.

    Raises:
        UserError: An unknown architecture, or a part that a Hugging Face CLIP does not have; names it.
    """
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None:
        raise UserError(f"open_clip knows no architecture {architecture!r}; see open_clip.list_models()")
    if not Path(checkpoint).is_file():
        raise UserError(f"checkpoint {checkpoint} does not exist; give the file of the open_clip weights")
    _check_supported(architecture, config)
    source = open_clip.create_model(architecture, pretrained=str(checkpoint), precision="fp32").eval()
    tokenizer = _tokenizer(config["text_cfg"].get("context_length", 77))
    model = _empty_clip(config, tokenizer)
    missing, unexpected = model.load_state_dict(to_hugging_face(source.state_dict()), strict=False)
    wrong = [name for name in missing if not name.endswith("position_ids")] + list(unexpected)
    if wrong:
        raise UserError(f"{architecture} has a part that a Hugging Face CLIP has not: {wrong[0]}")
    difference = output_difference(source, model.eval())
    if difference > TOLERANCE:
        raise UserError(
            f"the converted {architecture} differs from open_clip's by {difference:.1e}, more than {TOLERANCE:.0e}; "
            "is it the architecture of this checkpoint (with -quickgelu or without)?"
        )
    with atomic_directory(out) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _image_processor(source).save_pretrained(temporary)
        facts = {"path": str(checkpoint), "sha256": sha256_file(checkpoint), "architecture": architecture}
        write_json_atomic(temporary / PROVENANCE_FILE, {"open_clip": facts, "output_difference": difference})
    return Path(out)


@torch.inference_mode()
def output_difference(source: Any, model: CLIPModel, num_inputs: int = 4) -> float:
    """Largest difference of normalised embeddings between an open_clip model and a CLIPModel, on random inputs."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.vision_config.image_size
    pixels = torch.randn(num_inputs, 3, size, size, generator=generator)
    length = model.config.text_config.max_position_embeddings
    text = model.config.text_config
    ids = torch.randint(1, text.vocab_size - 2, (num_inputs, length), generator=generator)
    if model.config.model_type == "clip":  # SigLIP has no marks and reads its last position
        ids[:, 0], ids[:, length // 2 :] = text.bos_token_id, 0
        ids[:, length // 2] = text.eos_token_id if text.eos_token_id != 2 else text.vocab_size - 1
    pairs = [
        (source.encode_image(pixels), model.get_image_features(pixel_values=pixels).pooler_output),
        (source.encode_text(ids), model.get_text_features(input_ids=ids).pooler_output),
    ]
    normal = torch.nn.functional.normalize
    return max(float((normal(a, dim=-1) - normal(b, dim=-1)).abs().max()) for a, b in pairs)


def _check_supported(architecture: str, config: dict[str, Any]) -> None:
    vision, text = config["vision_cfg"], config["text_cfg"]
    known_vision = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
    known_text = {"context_length", "vocab_size", "width", "heads", "layers"}
    odd = [f"vision_cfg.{key}" for key in vision if key not in known_vision]
    odd += [f"text_cfg.{key}" for key in text if key not in known_text]
    odd += [key for key in config if key not in {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}]
    if odd or not isinstance(vision.get("layers"), int):
        part = odd[0] if odd else "vision_cfg.layers"
        raise UserError(
            f"{architecture} has {part}, which a Hugging Face CLIP has not; use a plain ViT architecture, or weights "
            "that are published as a transformers model"
        )


def _empty_clip(config: dict[str, Any], tokenizer: Any) -> CLIPModel:
    from transformers import CLIPConfig, CLIPModel

    vision, text = config["vision_cfg"], config["text_cfg"]
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    shared = {"hidden_act": activation, "projection_dim": config["embed_dim"], "layer_norm_eps": 1e-5}
    return CLIPModel(
        CLIPConfig(
            projection_dim=config["embed_dim"],
            vision_config={
                **shared,
                "hidden_size": vision["width"],
                "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
                "num_hidden_layers": vision["layers"],
                "num_attention_heads": vision["width"] // vision.get("head_width", 64),
                "image_size": vision["image_size"],
                "patch_size": vision["patch_size"],
            },
            text_config={
                **shared,
                "hidden_size": text["width"],
                "intermediate_size": text["width"] * 4,
                "num_hidden_layers": text["layers"],
                "num_attention_heads": text["heads"],
                "max_position_embeddings": text.get("context_length", 77),
                "vocab_size": text["vocab_size"],
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
        )
    )


def open_clip_vocabulary() -> dict[str, int]:
    """open_clip's own vocabulary, with CLIP's names for the two marks."""
    from open_clip.tokenizer import SimpleTokenizer

    names = {"<start_of_text>": BOS, "<end_of_text>": EOS}
    return {names.get(token, token): index for token, index in SimpleTokenizer().encoder.items()}


def _tokenizer(context_length: int) -> Any:
    """open_clip's own vocabulary in CLIP's Hugging Face tokenizer."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    ranks = SimpleTokenizer().bpe_ranks
    merges = sorted(ranks, key=ranks.get)
    return CLIPTokenizer(vocab=open_clip_vocabulary(), merges=merges, model_max_length=context_length)


def _image_processor(source: Any) -> Any:
    from transformers import CLIPImageProcessor

    size = source.visual.image_size
    side = size[0] if isinstance(size, (tuple, list)) else size
    cfg = source.visual.preprocess_cfg
    return CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(cfg["mean"]),
        image_std=list(cfg["std"]),
    )


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="dcr-mllm import-open-clip", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("architecture", metavar="ARCH", help="open_clip's name, e.g. ViT-L-14-quickgelu")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file with its weights")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    options = parser.parse_args(argv)
    return run_main(lambda: print(import_open_clip(options.architecture, options.checkpoint, options.out)))
