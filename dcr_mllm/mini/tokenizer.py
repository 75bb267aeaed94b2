"""The miniature's CLIP tokenizer: byte-pair merges learned on the world's own captions, in CLIP's on-disk layout."""

from __future__ import annotations

import json

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from dcr_mllm.mini.world import coarse_caption, full_caption, random_scene

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(max_length: int, num_captions: int = 4000, seed: int = 0) -> CLIPTokenizer:
    """Learn merges until every word of the world is one token; any other ASCII text falls back to bytes.

    Args:
        max_length: The `model_max_length` that is saved with the tokenizer.
        num_captions: Captions to learn from; enough that each word occurs.
        seed: Of the caption generator.
    """
    rng = np.random.default_rng(seed)
    captions = []
    for _ in range(num_captions):
        scene = random_scene(rng)
        captions += [coarse_caption(scene, rng), full_caption(scene, rng)]
    model = Tokenizer(BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=1200, initial_alphabet=alphabet, end_of_word_suffix="</w>", min_frequency=2, show_progress=False
    )
    model.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(model.to_str())["model"]["merges"]]
    # Every byte also as the last of a word, so that unseen words still have tokens.
    pieces = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(merge) for merge in merges)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    for special in (BOS, EOS):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)
