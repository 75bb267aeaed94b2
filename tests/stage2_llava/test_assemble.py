"""Tower and language model become a LLaVA: token counts, new rows, and parity with LLaVA-1.5's image code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from dcr_mllm.conversation import Turn, pieces
from dcr_mllm.errors import UserError
from dcr_mllm.llava import image_processor, load_llava, load_processor
from dcr_mllm.llava_headers import llava_summary, llm_summary, vision_summary
from stage2_llava.assemble import assemble
from stage2_llava.export import save_llava
from stage2_llava.labels import encode


def pad_to_square(image: Image.Image, mean: list[float]) -> Image.Image:
    """What LLaVA-1.5 does before CLIP's processor: a square of the mean colour with the image in its middle."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def noise_image(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(params=[("clip", "llama"), ("siglip", "llama"), ("clip", "qwen"), ("siglip", "qwen")], ids="-".join)
def parts(request: pytest.FixtureRequest) -> tuple[str, Path, str, Path]:
    tower, llm = request.param
    return tower, request.getfixturevalue(f"tiny_{tower}"), llm, request.getfixturevalue(f"tiny_{llm}")


def test_saved_llava_loads_and_its_processor_makes_the_training_ids(parts: tuple[str, Path, str, Path], tmp_path: Path):
    """32 px in patches of 8: 16 tokens an image for CLIP (class token dropped) and for SigLIP (which has none)."""
    tower, tower_path, llm, llm_path = parts
    model, processor, template = assemble(tower_path, llm_path, template="vicuna_v1" if llm == "llama" else "auto")
    save_llava(model, processor, tmp_path, {"phase": "test"})
    summary = llava_summary(tmp_path)
    assert summary.image_tokens == 16 and summary.select_strategy == ("default" if tower == "clip" else "full")

    loaded, saved = load_llava(tmp_path), load_processor(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    turns = [Turn("user", "Is it red?\n<image>"), Turn("assistant", "Yes.")]
    text = "".join(piece.text for piece in pieces(template, turns))
    inputs = saved(images=noise_image(40, 28), text=text, return_tensors="pt")
    assert inputs.input_ids[0].tolist() == encode(turns, template, saved.tokenizer, image_tokens=16).input_ids
    # As everybody else loads it, with what is in the file and nothing completed.
    theirs = AutoProcessor.from_pretrained(tmp_path)(images=noise_image(40, 28), text=text, return_tensors="pt")
    for ids in (inputs.input_ids, theirs.input_ids):
        assert (ids == loaded.config.image_token_index).sum() == 16
    with torch.no_grad():
        logits = loaded(**inputs).logits
    assert logits.isfinite().all() and logits.shape[-1] % 64 == 0


def test_new_rows_are_the_mean_and_old_ones_untouched(tiny_clip: Path, tiny_llama: Path):
    model, processor, _ = assemble(tiny_clip, tiny_llama, template="vicuna_v1")
    old = load_file(tiny_llama / "model.safetensors")
    for name, new in (
        ("model.embed_tokens.weight", model.get_input_embeddings().weight),
        ("lm_head.weight", model.lm_head.weight),
    ):
        rows = old[name].shape[0]
        assert torch.equal(new[:rows], old[name])
        torch.testing.assert_close(new[rows:], old[name].mean(dim=0).expand(len(new) - rows, -1))
    assert new.shape[0] % 64 == 0 and new.shape[0] >= len(processor.tokenizer)
    assert processor.tokenizer.pad_token not in (processor.tokenizer.eos_token, processor.tokenizer.unk_token)


def test_projector_is_pytorchs_default_under_the_seed(tiny_clip: Path, tiny_llama: Path):
    def projector(seed: int) -> torch.Tensor:
        model, _, _ = assemble(tiny_clip, tiny_llama, template="vicuna_v1", seed=seed)
        return model.model.multi_modal_projector.linear_1.weight

    torch.manual_seed(3)
    expected = torch.nn.Linear(32, 32).weight
    assert torch.equal(projector(3), expected)
    assert not torch.equal(projector(3), projector(4))


def test_tied_embeddings_stay_tied(tiny_clip: Path, tiny_qwen: Path):
    model, _, _ = assemble(tiny_clip, tiny_qwen)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_generation_ends_where_the_template_does(tiny_clip: Path, tiny_qwen: Path, tmp_path: Path):
    """Base models end texts with another token than ChatML ends answers with: both have to stop generation."""
    import shutil

    from transformers import AutoTokenizer, GenerationConfig

    shutil.copytree(tiny_qwen, tmp_path / "qwen")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "qwen")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "qwen")
    GenerationConfig(eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path / "qwen")
    model, processor, template = assemble(tiny_clip, tmp_path / "qwen")
    expected = processor.tokenizer.convert_tokens_to_ids([template.end, "<|endoftext|>"])
    assert template.end == "<|im_end|>" and sorted(model.generation_config.eos_token_id) == sorted(expected)
    assert model.generation_config.do_sample is False


def test_padding_is_bit_exact_with_llavas(tiny_clip: Path):
    """LLaVA-1.5: expand2square with the mean colour, then CLIP's own Pillow code."""
    from transformers import AutoImageProcessor

    own = AutoImageProcessor.from_pretrained(tiny_clip, backend="pil")
    for size in ((20, 61), (61, 20), (32, 32), (3, 200)):
        image = noise_image(*size)
        expected = own(pad_to_square(image, own.image_mean), return_tensors="pt").pixel_values
        assert torch.equal(image_processor(tiny_clip, "pad")(image, return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize("tower", ["tiny_clip", "tiny_siglip"])
def test_square_is_the_towers_own_processing(tower: str, request: pytest.FixtureRequest):
    from transformers import AutoImageProcessor

    path = request.getfixturevalue(tower)
    own = AutoImageProcessor.from_pretrained(path, backend="pil")
    for size in ((40, 61), (61, 40)):
        image = noise_image(*size)
        expected = own(image, return_tensors="pt").pixel_values
        assert torch.equal(image_processor(path, "square")(image, return_tensors="pt").pixel_values, expected)


def test_saved_processor_pads_on_the_same_backend(tiny_llava: Path, tiny_clip: Path):
    image = noise_image(20, 50)
    expected = image_processor(tiny_clip, "pad")(image, return_tensors="pt").pixel_values
    assert torch.equal(load_processor(tiny_llava).image_processor(image, return_tensors="pt").pixel_values, expected)


def test_vision_only_directory_serves_as_tower(tiny_clip: Path, tiny_llama: Path, tmp_path: Path):
    from transformers import AutoImageProcessor, CLIPVisionModel

    CLIPVisionModel.from_pretrained(tiny_clip).save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(tiny_clip).save_pretrained(tmp_path)
    assert vision_summary(tmp_path).model_type == "clip"
    small, _, _ = assemble(tmp_path, tiny_llama, template="vicuna_v1")
    full, _, _ = assemble(tiny_clip, tiny_llama, template="vicuna_v1")
    for a, b in zip(small.model.vision_tower.parameters(), full.model.vision_tower.parameters(), strict=True):
        assert torch.equal(a, b)


def test_siglip_in_a_folder_called_clip_is_a_siglip(tiny_siglip: Path, tmp_path: Path):
    (tmp_path / "clip-vit-large").symlink_to(tiny_siglip)
    assert vision_summary(tmp_path / "clip-vit-large").select_strategy == "full"


def test_wrong_strategy_is_refused(tiny_llava: Path, tmp_path: Path):
    import json
    import shutil

    shutil.copytree(tiny_llava, tmp_path / "llava")
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    config["vision_feature_select_strategy"] = "full"
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="image features and image tokens would not match; set it to 'default'"):
        llava_summary(tmp_path / "llava")


def test_other_models_are_refused_as_language_model(tiny_clip: Path, tiny_llava: Path):
    with pytest.raises(UserError, match="built like Llama"):
        llm_summary(tiny_clip)
    with pytest.raises(UserError, match="is a LLaVA"):
        llm_summary(tiny_llava)


def test_published_processors_are_completed_and_pad(tiny_llava: Path, tiny_clip: Path, tmp_path: Path):
    """Older repositories: CLIP's image processor, and a processor that does not know the number of image tokens."""
    import json
    import shutil

    from transformers import AutoImageProcessor

    shutil.copytree(tiny_llava, tmp_path / "llava")
    (tmp_path / "llava" / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor"}))
    AutoImageProcessor.from_pretrained(tiny_clip).save_pretrained(tmp_path / "llava")
    processor = load_processor(tmp_path / "llava")
    text = "USER: <image>\nWhat? ASSISTANT:"
    assert (processor(images=noise_image(32, 32), text=text, return_tensors="pt").input_ids == 699).sum() == 16
    padded = image_processor(tmp_path / "llava", "pad")(noise_image(20, 50), return_tensors="pt").pixel_values
    expected = load_processor(tiny_llava).image_processor(noise_image(20, 50), return_tensors="pt").pixel_values
    assert torch.equal(padded, expected)
