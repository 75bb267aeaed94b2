"""`dcr-mllm export-open-clip TOWER OUT`: a Hugging Face CLIP or SigLIP as open_clip reads it.

`OUT` is what open_clip's own repositories on the hub hold, so `open_clip.create_model_and_transforms("local-dir:OUT")`
loads it. Nothing is written unless both models agree on random images and texts to 1e-5.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcr_mllm.cli import run_main
from dcr_mllm.errors import UserError
from dcr_mllm.headers import read_json, resolve_weights, tower_summary
from dcr_mllm.open_clip_config import architecture_config, image_config, tower_config
from dcr_mllm.push import HUB_NAME
from dcr_mllm.runs import PROVENANCE_FILE, atomic_directory, hash_directory, write_json_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE, WEIGHT_FILE = "open_clip_config.json", "open_clip_model.safetensors"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "spiece.model", "tokenizer.model",
)  # fmt: skip


def export_open_clip(
    tower: str | Path, out: str | Path, architecture: str | None = None, *, allow_activation: bool = False
) -> Path:
    """Write a tower in open_clip's layout.

    Args:
        tower: CLIP or SigLIP directory with its text side.
        out: Directory to write; must not exist.
        architecture: open_clip's name that the tower has to be, such as `ViT-L-14-336-quickgelu`, for use as
            `create_model(ARCH, pretrained="OUT/open_clip_model.safetensors")`. None describes the tower itself.
        allow_activation: Export although open_clip's architecture computes the exact GELU where the tower has its tanh
            approximation. The difference of the outputs is measured and recorded.

    Returns:
        `out`: `open_clip_config.json`, `open_clip_model.safetensors` (in the tower's own types), tokenizer, provenance.

    Raises:
        UserError: A part that open_clip has not; names it.
    """
    from safetensors.torch import save_file

    from dcr_mllm.open_clip_import import TOLERANCE, output_difference
    from dcr_mllm.open_clip_names import to_open_clip
    from dcr_mllm.towers import load_full_model, stored_tensors

    tower = Path(tower)
    summary = tower_summary(tower)
    if summary.model_type not in ("clip", "siglip"):
        raise UserError(f"{tower} is of model_type {summary.model_type}; clip and siglip can be exported to open_clip")
    if not summary.has_text_side:
        raise UserError(f"{tower} has no text side, which open_clip needs; give the full model with its text tower")
    try:
        state = to_open_clip(stored_tensors(tower), summary.model_type)
    except KeyError as error:
        raise UserError(f"{tower} has the tensor {error.args[0]}, which open_clip's towers have not") from None
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    config = architecture_config(architecture) if architecture else tower_config(tower, shapes)
    config["text_cfg"] = {**config["text_cfg"], **_tokenizer_config(tower, summary.model_type)}
    model = load_full_model(tower).eval()
    with atomic_directory(out) as temporary:
        written = {"model_cfg": config, "preprocess_cfg": image_config(tower, summary)}
        (temporary / CONFIG_FILE).write_text(json.dumps(written, indent=4) + "\n", encoding="utf-8")
        save_file(state, temporary / WEIGHT_FILE, metadata={"format": "pt"})
        for name in _TOKENIZER_FILES:
            if (tower / name).is_file():
                shutil.copyfile(tower / name, temporary / name)
        made = _load(temporary, state, architecture)
        difference = output_difference(made, model)
        other = None
        if difference > TOLERANCE:
            other = _other_activation(made, model)
            if other is None or output_difference(made, other) > TOLERANCE:
                raise UserError(
                    f"open_clip's model differs from {tower} by {difference:.1e}, more than {TOLERANCE:.0e}"
                    + (f"; is it a {architecture} (with -quickgelu or without)?" if architecture else "")
                )
            if not allow_activation:
                theirs = config["vision_cfg"].get("timm_model_name", architecture)
                raise UserError(
                    f"open_clip's {theirs} computes the exact GELU, {tower} has its tanh approximation: features "
                    f"would differ by {difference:.1e}; --allow-activation exports it all the same, as open_clip's own "
                    "repositories of SigLIP are"
                )
        facts = {"path": str(tower), "sha256": hash_directory(tower), "architecture": architecture}
        record: dict[str, Any] = {"exported": facts, "output_difference": difference}
        if other is not None:
            record["activation"] = "exact GELU in place of its tanh approximation"
        if (tower / PROVENANCE_FILE).is_file():
            record["tower"] = read_json(tower / PROVENANCE_FILE)
        write_json_atomic(temporary / PROVENANCE_FILE, record)
        (temporary / "README.md").write_text(_card(difference, other is not None), encoding="utf-8")
    return Path(out)


def _tokenizer_config(tower: Path, model_type: str) -> dict[str, Any]:
    """Which tokenizer open_clip is to use: its own for CLIP's usual vocabulary, otherwise the files beside it."""
    from dcr_mllm.open_clip_import import EOS, open_clip_vocabulary

    if model_type == "siglip":
        return {"hf_tokenizer_name": HUB_NAME, "tokenizer_kwargs": {"clean": "canonicalize"}}
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tower, local_files_only=True).get_vocab()
    if own == open_clip_vocabulary():
        return {}
    if EOS not in own:
        raise UserError(f"the tokenizer of {tower} has no {EOS}, by which open_clip finds a text's end")
    return {"hf_tokenizer_name": HUB_NAME}


def _load(directory: Path, state: dict[str, Any], architecture: str | None) -> Any:
    """open_clip's model with these weights.

    Shapes are compared here: open_clip's own loading would resize positions that do not fit.
    """
    import open_clip

    made = open_clip.create_model(f"local-dir:{directory}", precision="fp32", load_weights=False).eval()
    theirs = {name: tuple(value.shape) for name, value in made.state_dict().items()}
    ours = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(theirs | ours):
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"the tower does not fit open_clip's {architecture or 'model'}: {name} is {ours.get(name)} in the "
                f"tower and {theirs.get(name)} there"
            )
    made.load_state_dict(state)
    return made


def _other_activation(made: Any, model: PreTrainedModel) -> PreTrainedModel | None:
    """The tower with the exact GELU wherever it has the tanh approximation and open_clip's model has not."""
    import copy

    from torch import nn
    from transformers.activations import ACT2FN

    trunk = getattr(made.visual, "trunk", None)
    first = trunk.blocks[0].mlp.act if trunk is not None else made.visual.transformer.resblocks[0].mlp.gelu
    sides = {"vision": first, "text": getattr(made, "text", made).transformer.resblocks[0].mlp.gelu}
    wrong = [
        side
        for side, theirs in sides.items()
        if getattr(model.config, f"{side}_config").hidden_act == "gelu_pytorch_tanh"
        and isinstance(theirs, nn.GELU)
        and theirs.approximate == "none"
    ]
    if not wrong:
        return None
    other = copy.deepcopy(model)
    for side in wrong:
        for module in getattr(other, f"{side}_model").modules():
            if hasattr(module, "activation_fn"):
                module.activation_fn = ACT2FN["gelu"]
    return other


def _card(difference: float, other_activation: bool) -> str:
    lines = ["---", "library_name: open_clip", "pipeline_tag: zero-shot-image-classification", "tags: [clip, dcr]"]
    lines += ["---", "# A vision tower for open_clip", ""]
    lines += [
        "Image and text side of a tower, converted from its Hugging Face layout. Normalised features differ from the "
        f"original's by at most {difference:.1e} on random inputs."
    ]
    if other_activation:
        lines += [
            "",
            "This architecture computes the exact GELU where the tower was trained with its tanh approximation; with "
            "the exact one on both sides they agree to 1e-5.",
        ]
    lines += ["", "```python", "import open_clip", f'name = "hf-hub:{HUB_NAME}"  # or "local-dir:PATH"']
    lines += ["model, _, preprocess = open_clip.create_model_and_transforms(name)"]
    lines += ["tokenizer = open_clip.get_tokenizer(name)", "```", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="dcr-mllm export-open-clip", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tower", metavar="TOWER", help="CLIP or SigLIP directory, or the id of a downloaded one")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument("--architecture", metavar="ARCH", help="open_clip's name that it has to be")
    parser.add_argument(
        "--allow-activation", action="store_true", help="export a SigLIP although open_clip's GELU is another one"
    )
    options = parser.parse_args(argv)

    def call() -> None:
        tower = resolve_weights(options.tower, "tower")
        print(export_open_clip(tower, options.out, options.architecture, allow_activation=options.allow_activation))

    return run_main(call)


if __name__ == "__main__":
    raise SystemExit(main())
