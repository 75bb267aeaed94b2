"""Exports for the original LLaVA give its forward our logits; old Hugging Face layouts are written and read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from dcr_mllm.errors import UserError
from dcr_mllm.llava import load_llava, load_processor
from dcr_mllm.llava_names import part_of
from stage2_llava.export_llava import export_original, export_tower, export_transformers4, main
from stage2_llava.legacy import text_config, write_tokenizer
from stage2_llava.swap import swap
from tests.tiny_models import save_tiny_clip

IMAGE_TOKEN_INDEX = -200


def picture() -> Image.Image:
    """Noise, wider than high."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def inputs_for(path: Path) -> Any:
    processor = load_processor(path)
    image = picture()
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it red?"}]}],
        add_generation_prompt=True,
    )
    return processor(images=image, text=text, return_tensors="pt")


@torch.inference_mode()
def logits(path: Path) -> torch.Tensor:
    return load_llava(path)(**inputs_for(path)).logits[0]


class OriginalLlava:
    """The original's forward, written anew from its description: Llama, `mlp2x_gelu`, a CLIP's patches at -200."""

    def __init__(self, path: Path):
        from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

        self.config = json.loads((path / "config.json").read_text())
        assert self.config["architectures"] == ["LlavaLlamaForCausalLM"] and self.config["model_type"] == "llava_llama"
        assert self.config["mm_projector_type"] == "mlp2x_gelu" and self.config["mm_vision_select_feature"] == "patch"
        state: dict[str, torch.Tensor] = {}
        for file in path.glob("*.safetensors"):
            state |= load_file(file)
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        names += ("num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings")
        self.llama = LlamaForCausalLM(LlamaConfig(**{name: self.config[name] for name in names})).eval()
        mine = {name: value for name, value in state.items() if "mm_projector" not in name}
        self.llama.load_state_dict(mine, strict=True)
        width, hidden = self.config["mm_hidden_size"], self.config["hidden_size"]
        self.projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        prefix = "model.mm_projector."
        self.projector.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        self.tower = CLIPVisionModel.from_pretrained(self.config["mm_vision_tower"]).eval()

    @torch.inference_mode()
    def __call__(self, ids: list[int], pixels: torch.Tensor) -> torch.Tensor:
        """Token ids with one -200 and pixels [1, 3, S, S] -> logits [N, vocabulary]."""
        states = self.tower(pixels, output_hidden_states=True).hidden_states
        image = self.projector(states[self.config["mm_vision_select_layer"]][:, 1:])[0]
        at = ids.index(IMAGE_TOKEN_INDEX)
        embed = self.llama.model.embed_tokens
        before, after = (embed(torch.tensor(part)) for part in (ids[:at], ids[at + 1 :]))
        return self.llama(inputs_embeds=torch.cat([before, image, after])[None]).logits[0]


def spliced(inputs: Any, image_token: int) -> list[int]:
    """The ids of our processor with its run of image tokens as the one -200 of the original."""
    ids = inputs.input_ids[0].tolist()
    first = ids.index(image_token)
    return [*ids[:first], IMAGE_TOKEN_INDEX, *(token for token in ids[first:] if token != image_token)]


@pytest.fixture(scope="module")
def sharded(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llava` in three shards, as a 7B one lies on disk."""
    path = tmp_path_factory.mktemp("models") / "llava-sharded"
    load_llava(tiny_llava).save_pretrained(path, max_shard_size="80KB")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tiny_llava / name, path / name)
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def test_the_original_forward_on_the_export_gives_our_logits(sharded: Path, tmp_path: Path):
    assert main([str(sharded), str(tmp_path / "my-llava")]) == 0
    out = tmp_path / "my-llava"
    original = OriginalLlava(out)
    assert original.config["mm_vision_tower"] == str(out / "vision_tower")
    assert original.config["image_aspect_ratio"] == "pad" and original.config["mm_vision_select_layer"] == -2
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = {name: file.name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == stored
    inputs = inputs_for(sharded)
    ids = spliced(inputs, json.loads((sharded / "config.json").read_text())["image_token_index"])
    torch.testing.assert_close(original(ids, inputs.pixel_values), logits(sharded), atol=1e-5, rtol=1e-5)


def test_its_tower_takes_the_pixels_of_the_original(sharded: Path, tmp_path: Path):
    """Padding with the mean colour and CLIP's own processor, from the exported files."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    out = export_original(sharded, tmp_path / "llava")
    processor = CLIPImageProcessorPil.from_pretrained(out / "vision_tower")
    square = Image.new("RGB", (40, 40), tuple(int(value * 255) for value in processor.image_mean))
    square.paste(picture(), (0, 5))
    theirs = processor(square, return_tensors="pt").pixel_values
    torch.testing.assert_close(theirs, inputs_for(sharded).pixel_values, atol=1e-6, rtol=0)


def test_a_tower_for_the_original(tiny_clip: Path, tmp_path: Path):
    from transformers import CLIPVisionModel

    assert main([str(tiny_clip), str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "clip_vision_model" and config["torch_dtype"] == "float32" and "dtype" not in config
    image = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert image["image_processor_type"] == "CLIPImageProcessor" and image["size"] == {"shortest_edge": 32}
    assert image["crop_size"] == {"height": 32, "width": 32} and image["resample"] == 3
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = (
            CLIPVisionModel.from_pretrained(path).eval()(pixels, output_hidden_states=True).hidden_states[-2]
            for path in (tiny_clip, tmp_path / "out")
        )
    assert torch.equal(ours, theirs)


def test_what_the_original_has_not_is_refused(
    tiny_siglip: Path, tiny_clip: Path, tiny_llava: Path, tiny_llama: Path, tiny_qwen: Path, tmp_path: Path
):
    from stage2_llava.assemble import assemble
    from stage2_llava.export import save_llava

    with pytest.raises(UserError, match="is a siglip.*loads every tower as a CLIP.*LLaVA-NeXT"):
        export_tower(tiny_siglip, tmp_path / "out")
    for tower, llm, template, words in (
        (tiny_siglip, tiny_llama, "vicuna_v1", "siglip_vision_model"),
        (tiny_clip, tiny_qwen, "chatml", "'qwen2'"),
    ):
        path = tmp_path / f"{tower.name}-{llm.name}"
        path.mkdir()
        model, processor, _ = assemble(tower, llm, template=template)
        save_llava(model, processor, path, {})
        with pytest.raises(UserError, match=words):
            export_original(path, tmp_path / "llava-out")
    with pytest.raises(UserError, match="must have 'llava' in it"):
        export_original(tiny_llava, tmp_path / "model")
    for key, value, words in (
        ("projector_hidden_act", "relu", "projector_hidden_act 'relu'"),
        ("text_config", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "'yarn'"),
    ):
        odd = shutil.copytree(tiny_llava, tmp_path / key)
        config = json.loads((odd / "config.json").read_text())
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
        (odd / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=words):
            export_original(odd, tmp_path / "llava-out")
    assert not (tmp_path / "llava-out").exists()


def test_rope_and_defaults_are_written_in_the_old_terms():
    old = text_config({"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5}, "float16")
    assert old["rope_theta"] == 10000.0 and old["rope_scaling"] is None and old["hidden_size"] == 4096
    assert old["torch_dtype"] == "float16" and not {"dtype", "rope_parameters"} & set(old)
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    old = text_config({"model_type": "llama", "rope_parameters": scaled}, "float16")
    assert old["rope_theta"] == 5e5 and old["rope_scaling"]["type"] == "linear" and old["rope_scaling"]["factor"] == 4


def test_every_naming_of_the_same_tensor_is_one_tensor():
    expected = {
        ("language", "model.layers.0.mlp.up_proj.weight"): (
            "language_model.model.layers.0.mlp.up_proj.weight",
            "model.language_model.layers.0.mlp.up_proj.weight",
        ),
        ("language", "lm_head.weight"): ("language_model.lm_head.weight", "lm_head.weight"),
        ("projector", "linear_1.bias"): (
            "multi_modal_projector.linear_1.bias",
            "model.multi_modal_projector.linear_1.bias",
        ),
        ("tower", "pre_layrnorm.bias"): tuple(
            f"{prefix}pre_layrnorm.bias"
            for prefix in (
                "vision_tower.",
                "vision_tower.vision_model.",
                "model.vision_tower.",
                "model.vision_tower.vision_model.",
            )
        ),
    }
    for part, names in expected.items():
        assert {part_of(name) for name in names} == {part}
    with pytest.raises(UserError, match="image_newline"):
        part_of("image_newline")


@pytest.fixture(scope="module")
def hub_llava(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path, tiny_llama: Path) -> Path:
    """A LLaVA laid out as `llava-hf/llava-1.5-7b-hf` is: written by transformers 4.36, patched since.

    Old tensor names in three fp16 shards, a config that leaves out what equals the defaults of its time, rows padded to
    a multiple of 64, CLIP's image processor (which does not pad) and no patch size in the processor.
    """
    from stage2_llava.assemble import assemble

    path = tmp_path_factory.mktemp("hub") / "llava-1.5-7b-hf"
    path.mkdir()
    model, processor, _ = assemble(tiny_clip, tiny_llama, template="vicuna_v1", dtype=torch.float16)
    tensors = {
        name.replace("model.language_model.", "language_model.model.")
        .replace("lm_head.", "language_model.lm_head.")
        .replace("model.vision_tower.", "vision_tower.vision_model.")
        .replace("model.multi_modal_projector.", "multi_modal_projector."): value.contiguous()
        for name, value in model.state_dict().items()
    }
    index = {}
    for number, names in enumerate((sorted(tensors)[:20], sorted(tensors)[20:40], sorted(tensors)[40:]), start=1):
        shard = f"model-0000{number}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names}, path / shard, metadata={"format": "pt"})
        index.update(dict.fromkeys(names, shard))
    total = sum(value.nbytes for value in tensors.values())
    vision, text = model.config.vision_config, model.config.text_config
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": model.config.image_token_index,
        "model_type": "llava",
        "pad_token_id": model.config.pad_token_id,
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": 2048,
            "model_type": "llama",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "rms_norm_eps": text.rms_norm_eps,
            "torch_dtype": "float16",
            "vocab_size": 704,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0",
        "vision_config": {
            "hidden_size": vision.hidden_size,
            "image_size": 32,
            "intermediate_size": vision.intermediate_size,
            "model_type": "clip_vision_model",
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "patch_size": 8,
            "projection_dim": 24,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 704,
    }
    image = json.loads((tiny_clip / "preprocessor_config.json").read_text())
    template = "USER: <image>\n{{ messages[0]['content'][1]['text'] }} ASSISTANT:"
    for name, data in (
        ("config.json", config),
        ("model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index}),
        ("preprocessor_config.json", {**image, "processor_class": "LlavaProcessor"}),
        ("processor_config.json", {"image_token": "<image>", "processor_class": "LlavaProcessor"}),
        ("chat_template.json", {"chat_template": template}),
        ("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 700}),
    ):
        (path / name).write_text(json.dumps(data))
    write_tokenizer(_saved(processor.tokenizer, path.parent / "tokenizer"), path)
    stored = json.loads((path / "tokenizer_config.json").read_text())
    stored |= {"tokenizer_class": "LlamaTokenizer", "processor_class": "LlavaProcessor", "pad_token": "<pad>"}
    (path / "tokenizer_config.json").write_text(json.dumps(stored))
    return path


def _saved(tokenizer: Any, path: Path) -> Path:
    tokenizer.save_pretrained(path)
    return path


def test_a_hub_repository_of_old_loads_whole_and_counts_its_image_tokens(hub_llava: Path, tiny_llava: Path):
    """The same weights as `tiny_llava` but for fp16: every tensor arrives, and logits are the same to its precision."""
    from transformers import LlavaForConditionalGeneration

    _, report = LlavaForConditionalGeneration.from_pretrained(hub_llava, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = load_processor(hub_llava)
    assert (processor.patch_size, processor.vision_feature_select_strategy) == (8, "default")
    inputs = inputs_for(tiny_llava)
    with torch.inference_mode():
        old, new = (load_llava(path, torch.float32)(**inputs).logits for path in (hub_llava, tiny_llava))
    torch.testing.assert_close(old, new, atol=5e-3, rtol=5e-3)
    assert (inputs_for(hub_llava).input_ids == processor.image_token_id).sum() == 16


def test_its_tower_can_be_swapped_and_it_goes_to_the_original(hub_llava: Path, tmp_path: Path):
    other = save_tiny_clip(tmp_path / "clip", seed=5)
    swapped = swap(hub_llava, other, tmp_path / "swapped")
    assert (logits(swapped) - logits(hub_llava)).abs().max() > 1e-3
    before = {name: value for file in hub_llava.glob("*.safetensors") for name, value in load_file(file).items()}
    after = {name: value for file in swapped.glob("*.safetensors") for name, value in load_file(file).items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("vision_tower."))
    out = export_original(hub_llava, tmp_path / "llava", mm_vision_tower="openai/clip-vit-large-patch14-336")
    config = json.loads((out / "config.json").read_text())
    assert config["mm_vision_tower"] == "openai/clip-vit-large-patch14-336" and config["image_aspect_ratio"] == "square"
    assert config["num_attention_heads"] == 4 and config["torch_dtype"] == "float16" and config["rope_theta"] == 10000.0


def test_transformers4_layout_is_the_same_model(sharded: Path, tmp_path: Path):
    assert main([str(sharded), str(tmp_path / "out"), "--layout", "transformers4"]) == 0
    out = tmp_path / "out"
    names = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    prefixes = (
        "vision_tower.vision_model.",
        "multi_modal_projector.",
        "language_model.model.",
        "language_model.lm_head.",
    )
    assert all(name.startswith(prefixes) for name in names)
    config = json.loads((out / "config.json").read_text())
    for part in (config["text_config"], config["vision_config"]):
        assert not {"dtype", "rope_parameters", "_name_or_path"} & set(part)
    image = json.loads((out / "preprocessor_config.json").read_text())
    assert image["image_processor_type"] == "LlavaImageProcessor" and image["do_pad"] is True
    assert torch.equal(logits(out), logits(sharded))


def test_a_siglip_llava_in_the_transformers4_layout(tiny_siglip: Path, tiny_llama: Path, tmp_path: Path):
    from stage2_llava.assemble import assemble
    from stage2_llava.export import save_llava

    (tmp_path / "llava").mkdir()
    model, processor, _ = assemble(tiny_siglip, tiny_llama, template="vicuna_v1")
    save_llava(model, processor, tmp_path / "llava", {})
    out = export_transformers4(tmp_path / "llava", tmp_path / "out")
    assert torch.equal(logits(out), logits(tmp_path / "llava"))
    with pytest.raises(UserError, match="not overwritten"):
        export_transformers4(tmp_path / "llava", tmp_path / "out")


@pytest.mark.parametrize("splits", [False, True])
def test_the_old_tokenizer_file_gives_the_same_ids(tiny_llava: Path, tmp_path: Path, splits: bool):
    from transformers import AutoTokenizer

    write_tokenizer(tiny_llava, tmp_path, splits=splits)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    assert all(isinstance(merge, str) for merge in stored["model"]["merges"])
    assert (stored["pre_tokenizer"] is None) == splits and (splits or stored["pre_tokenizer"]["add_prefix_space"])
    old, new = (AutoTokenizer.from_pretrained(path) for path in (tmp_path, tiny_llava))
    assert old.model_max_length == new.model_max_length and old.pad_token == new.pad_token
    for text in ("Is it red? ASSISTANT:", "No.</s>", "naïve  two", *(() if splits else ("USER: <image>\nIs it red?",))):
        assert old(text).input_ids == new(text).input_ids


def test_the_language_models_own_tokenizer_is_taken_if_it_is_the_same(
    tiny_llava: Path, tiny_llama: Path, tmp_path: Path
):
    llm = shutil.copytree(tiny_llama, tmp_path / "llm")
    arguments = [str(tiny_llava), str(tmp_path / "llava"), "--tokenizer", str(llm)]
    assert main(arguments) == 2  # it has no tokenizer.model
    (llm / "tokenizer.model").write_bytes(b"sentencepiece")
    assert main(arguments) == 0
    assert (tmp_path / "llava/tokenizer.model").read_bytes() == b"sentencepiece"
    assert not (tmp_path / "llava/tokenizer.json").exists()
    tokens = json.loads((llm / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (llm / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(UserError, match="another vocabulary"):
        export_original(tiny_llava, tmp_path / "llava-2", tokenizer=llm)
