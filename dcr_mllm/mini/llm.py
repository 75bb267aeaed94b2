"""The mini Vicuna: a `LlamaForCausalLM` trained from nothing to answer questions about described scenes.

It knows the drawn world from text alone: in place of an image a user turn holds a description of the scene. What is
left to LLaVA's training is to put the image where the description was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from dcr_mllm.conversation import TEMPLATES, Piece, Template, Turn, pieces
from dcr_mllm.log import get_logger
from dcr_mllm.mini.clip import learning_rate_factor
from dcr_mllm.mini.instructions import (
    CHOICE_SUFFIX,
    CLASS_QUESTIONS,
    FORMS,
    SHORT_SUFFIX,
    Question,
    ask,
    ask_about_world,
    conversation,
    draw_questions,
    heldout_questions,
)
from dcr_mllm.mini.world import ATTRIBUTES, Scene, detail_phrase, full_caption, random_scene, statement

logger = get_logger(__name__)

MAX_LENGTH = 512
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
_TEMPLATE = TEMPLATES["vicuna_v1"]
_BARE = replace(_TEMPLATE, system="")
_JOINING = ("a", "the", "with", "under", "on", "near", "seen")  # words without which a description says the same
_IGNORED = -100


def build_llm_tokenizer(num_texts: int = 3000, seed: int = 0) -> LlamaTokenizer:
    """Learn merges until every word of the world and of its conversations is one token; other text falls back to bytes.

    Like Llama's, it marks spaces by Metaspace, starts with `<s>` and does not end.

    Args:
        num_texts: Conversations to learn from; enough that each word occurs.
        seed: Of the conversations.
    """
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(num_texts):
        rendered = "".join(piece.text for piece in draw_conversation(rng, num_turns=8))
        texts += rendered.split(EOS)  # a token of its own, whose characters are not to be learned from
    learner = Tokenizer(BPE())
    # Merges stay within words, and a line feed is a byte, so that it parts tokens as in Llama.
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Split(Regex(r"[.,:?]"), "isolated"),
            pre_tokenizers.Split("\n", "removed"),
        ]
    )
    learner.train_from_iterator(texts, BpeTrainer(vocab_size=4000, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    names = [UNK, BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = [tuple(merge) for merge in learned["merges"]]
    return LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, model_max_length=MAX_LENGTH)


def build_llm(tokenizer: LlamaTokenizer) -> LlamaForCausalLM:
    """A randomly initialised Llama of 4 layers x 192 with tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            head_dim=48,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            initializer_range=0.07,  # about 1 / sqrt(width): from the usual 0.02 so small a model learns slowly
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
    )


def describe(scene: Scene, rng: np.random.Generator, attributes: Sequence[str] = tuple(ATTRIBUTES)) -> str:
    """A description of a scene that stands in for its image: class and given details in random order.

    In three of ten, about half of the words that only join others are dropped.
    """
    phrases = [f"a {scene.label}", *(detail_phrase(scene, name) for name in attributes)]
    terse = rng.random() < 0.3
    words: list[str] = []
    for index in rng.permutation(len(phrases)):
        *joining, last = phrases[index].split()
        words += [word for word in joining if not (terse and word in _JOINING and rng.random() < 0.5)]
        words.append(last)
    return " ".join(words)


def draw_conversation(rng: np.random.Generator, num_turns: int) -> list[Piece]:
    """A conversation about a described training scene, its caption, or questions about the world, as rendered text.

    The description holds what is asked after, and of the other details a share that varies from none to all.
    """
    kind = rng.random()
    if kind < 0.03:
        return _render([ask_about_world(rng) for _ in range(num_turns)], "")
    scene = random_scene(rng, "train")
    if kind < 0.2:
        return _draw_caption(scene, rng)
    questions = draw_questions(scene, rng, num_turns)
    asked = {question.attribute for question in questions}
    share = rng.random()
    attributes = [name for name in ATTRIBUTES if name in asked or "all" in asked or rng.random() < share]
    return _render(questions, describe(scene, rng, attributes))


def _draw_caption(scene: Scene, rng: np.random.Generator) -> list[Piece]:
    """A description and its caption, short or full, as LLaVA's alignment has an image and its caption."""
    if rng.random() < 0.5:
        return [Piece(describe(scene, rng) + "\n", False), Piece(full_caption(scene, rng) + "\n", True)]
    name = str(rng.choice(list(ATTRIBUTES)))
    caption = statement(scene, name)
    attributes = [other for other in ATTRIBUTES if other == name or rng.random() < 0.5]
    return [Piece(describe(scene, rng, attributes) + "\n", False), Piece(caption + "\n", True)]


class Lesson(NamedTuple):
    """What is drilled until a share of the training is over.

    Attributes:
        until: That share.
        forms: How questions are put; a form that stands twice is drawn twice as often.
        max_details: At most so many details are described, beside the class.
    """

    until: float
    forms: tuple[str, ...]
    max_details: int


# The order matters: `Yes` and `No` are learned within 200 steps if they come first. Beside short answers, which only
# copy a word, they were at chance after 3,500 steps of a third of the size. Few details make comparing easy to find.
LESSONS = (
    Lesson(0.11, ("yesno",), 2),
    Lesson(0.18, ("yesno", "existence"), 2),
    Lesson(0.23, ("yesno", "existence", "choice", "choice"), 2),
    Lesson(0.30, FORMS, 2),
    Lesson(0.40, FORMS, 5),
    Lesson(0.52, FORMS, 9),
)


def draw_drill(rng: np.random.Generator, lesson: Lesson) -> list[Piece]:
    """One question about a described training scene, without system text and without a word on how to answer.

    Short texts are many texts, and it is their number that teaches to read a description.
    """
    scene = random_scene(rng, "train")
    num_details = int(rng.integers(1, lesson.max_details + 1))
    described = [str(name) for name in rng.permutation(list(ATTRIBUTES))[:num_details]]
    attribute = str(rng.choice([*described, *CLASS_QUESTIONS]))
    question = ask(scene, attribute, str(rng.choice(lesson.forms)), bool(rng.random() < 0.5), rng)
    bare = question._replace(text=question.text.removesuffix(SHORT_SUFFIX).removesuffix(CHOICE_SUFFIX))
    return _render([bare], describe(scene, rng, described), _BARE)


def draw_batch(rng: np.random.Generator, tokenizer: LlamaTokenizer, progress: float, num_tokens: int) -> list:
    """Encoded texts of at least so many tokens, for a training of which the share `progress` is over.

    Drills first; after the last lesson seven of ten batches hold conversations of one to six turns, the others drills.
    """
    lesson = next((lesson for lesson in LESSONS if progress <= lesson.until), LESSONS[-1])
    is_drill = progress <= LESSONS[-1].until or rng.random() < 0.3
    num_turns = int(rng.integers(1, 7))
    batch: list[tuple[Tensor, Tensor]] = []
    while sum(len(ids) for ids, _ in batch) < num_tokens:
        rendered = draw_drill(rng, lesson) if is_drill else draw_conversation(rng, num_turns)
        batch.append(encode(tokenizer, rendered))
    return batch


def _render(questions: Sequence[Question], context: str, template: Template = _TEMPLATE) -> list[Piece]:
    turns = [
        Turn("user" if t["from"] == "human" else "assistant", t["value"]) for t in conversation(questions, context)
    ]
    return pieces(template, turns)


def encode(tokenizer: LlamaTokenizer, rendered: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    """Token ids [L] and labels [L] of rendered text; only tokens that end within a learned piece have labels."""
    text = "".join(piece.text for piece in rendered)
    learned = [piece.learned for piece in rendered for _ in piece.text]
    encoded = tokenizer(text, return_offsets_mapping=True)
    keep = [end > start and learned[end - 1] for start, end in encoded.offset_mapping]
    ids = torch.tensor(encoded.input_ids)
    return ids, ids.masked_fill(~torch.tensor(keep), _IGNORED)


def collate(encoded: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Ids and labels, [B, L] each; padded on the right, where causal attention needs no mask."""
    ids, labels = zip(*encoded, strict=True)
    padded = torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True)
    return padded, torch.nn.utils.rnn.pad_sequence(list(labels), batch_first=True, padding_value=_IGNORED)


def answer_logits(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and targets [N] of the labelled tokens alone: most of a text is not learned."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    return model.lm_head(hidden[targets != _IGNORED]), targets[targets != _IGNORED]


@torch.inference_mode()
def text_accuracy(
    model: LlamaForCausalLM, tokenizer: LlamaTokenizer, split: str, num_per_cell: int = 24, seed: int = 0
) -> dict[str, float]:
    """Share of closed questions about described scenes of a split that greedy decoding answers exactly, by form."""
    rng = np.random.default_rng(seed)
    right: dict[str, list[bool]] = {form: [] for form in FORMS}
    questions = heldout_questions(num_per_cell, split, seed)
    for start in range(0, len(questions), 64):
        chunk = questions[start : start + 64]
        encoded = [encode(tokenizer, _render([question], describe(scene, rng))) for question, scene in chunk]
        ids, labels = collate(encoded)
        logits, targets = answer_logits(model, ids, labels)
        # Greedy decoding gives exactly the answer if, and only if, every token of it is the likeliest after the others.
        hits = (logits.argmax(dim=-1) == targets).split([int((label[1:] != _IGNORED).sum()) for _, label in encoded])
        for (question, _), hit in zip(chunk, hits, strict=True):
            right[question.form].append(bool(hit.all()))
    return {form: float(np.mean(values)) for form, values in right.items()}


def train_llm(
    steps: int, seed: int, tokens_per_step: int = 2400, learning_rate: float = 1e-3
) -> tuple[LlamaForCausalLM, LlamaTokenizer, list[dict]]:
    """Train the mini LLM on described training scenes, fresh ones at every step: `LESSONS`, then conversations.

    All tokens are learned, answers with more weight.

    Args:
        steps: Optimizer steps.
        seed: Of initialisation and texts.
        tokens_per_step: About as many tokens as a batch holds.
        learning_rate: The highest; linear warm-up, then cosine to zero.

    Returns:
        The model, its tokenizer, and the curve: step, loss of the answers, text accuracy on validation scenes by form.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = build_llm_tokenizer()
    model = build_llm(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps, 50))
    curve: list[dict] = []
    losses: list[Tensor] = []
    for step in range(1, steps + 1):
        ids, labels = collate(draw_batch(rng, tokenizer, step / steps, tokens_per_step))
        answers, others = answer_and_text_loss(model, ids, labels)
        optimizer.zero_grad(set_to_none=True)
        (answers + 0.3 * others).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(answers.detach())
        if step % 100 == 0 or step == steps:
            model.eval()
            accuracy = text_accuracy(model, tokenizer, "validation", 6)
            model.train()
            loss = float(torch.stack(losses).mean())
            curve.append({"step": step, "loss": loss, **accuracy})
            losses.clear()
            logger.info("llm step %d loss %.3f accuracy %s", step, loss, {k: round(v, 2) for k, v in accuracy.items()})
    return model.eval(), tokenizer, curve


def answer_and_text_loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean losses of the answers and of all other text but padding, from ids and labels [B, L]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    is_answer = (labels[:, 1:] != _IGNORED).flatten()
    is_other = ~is_answer & (ids[:, 1:] != 0).flatten()  # 0 is `<unk>`, which pads
    return losses[is_answer].mean(), losses[is_other].mean()
