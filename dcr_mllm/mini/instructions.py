"""Instruction data of the drawn world in LLaVA's JSON: captions to align with, conversations to tune on, held-out ones.

Every answer follows from a scene's attributes, so that all data are right by construction. They are balanced as well:
without the image nobody can answer a question about it better than by chance. Training data come from training scenes,
held-out questions from test scenes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dcr_mllm.conversation import IMAGE_TOKEN
from dcr_mllm.mini.data import _QUESTIONS, _draw_once, _write_csv
from dcr_mllm.mini.groups import LABELS, Group, Label, draw_group, is_there, random_group, similar_labels
from dcr_mllm.mini.world import ATTRIBUTES, COLOURS, KINDS, Scene, draw, full_caption, random_scene, statement

CLASS_QUESTIONS = {
    "colour": "What colour is the object in the middle?",
    "kind": "What is the object in the middle?",
}
FORMS = ("short", "yesno", "choice", "existence")  # how a closed question may be put
SHORT_SUFFIX = "\nAnswer the question using a single word or phrase."  # LLaVA's, and that of lmms-eval
CHOICE_SUFFIX = "\nAnswer with the option's letter from the given choices directly."

# What may be asked of a scene, and the words for each value: the nine details, and what coarse captions name as well.
_VALUES: dict[str, dict[str, str]] = {
    **ATTRIBUTES,
    "colour": {name: name for name in COLOURS},
    "kind": {name: name for name in KINDS},
}
# The question itself would be one of yes or no; a short answer is to name the value.
_NAMING_QUESTIONS = {
    "presence": "Is the {} plain or does it have a spot?",
    "state": "Is the {} glowing or dull?",
}
_THINGS = ("presence", "quantity", "position", "text")  # details that are things of their own
_DESCRIPTION_REQUESTS = ("Describe the image.", "What does the image show?", "Give a description of the image.")


class Question(NamedTuple):
    """One question about a scene with its only right answer; `attribute` and `form` say what it asks and how."""

    text: str
    answer: str
    attribute: str
    form: str


def ask(scene: Scene, attribute: str, form: str, affirm: bool, rng: np.random.Generator) -> Question:
    """A closed question about one attribute of a scene.

    Args:
        scene: What the question is about.
        attribute: One of the nine, or `colour` or `kind`.
        form: One of `FORMS`.
        affirm: Whether the answer is `Yes`, or `A` where two options are offered; no matter for short answers.
        rng: Draws the wrong value that is asked after or offered, and the wording.
    """
    value = getattr(scene, attribute)
    phrases = _VALUES[attribute]
    others = [other for other in phrases if other != value]
    other = others[int(rng.integers(len(others)))]
    question = {**_QUESTIONS, **CLASS_QUESTIONS}[attribute].format(scene.label)
    if form == "short":
        text = _NAMING_QUESTIONS.get(attribute, question).format(scene.label)
        return Question(text + SHORT_SUFFIX, value.lower(), attribute, form)
    if form == "choice":
        options = [phrases[value], phrases[other]] if affirm else [phrases[other], phrases[value]]
        return _choice(question, options, 0 if affirm else 1, attribute)
    asked = value if affirm else other
    text = _yes_no(scene, attribute, asked) if form == "yesno" else _existence(scene, attribute, asked, rng)
    return Question(text + SHORT_SUFFIX, "Yes" if affirm else "No", attribute, form)


def ask_among_all(scene: Scene, attribute: str, rng: np.random.Generator) -> Question:
    """A question that offers every value of an attribute in random order, for its letter."""
    values = [str(value) for value in rng.permutation(list(ATTRIBUTES[attribute]))]
    options = [ATTRIBUTES[attribute][value] for value in values]
    question = _QUESTIONS[attribute].format(scene.label)
    return _choice(question, options, values.index(getattr(scene, attribute)), attribute)


def ask_for_description(scene: Scene, rng: np.random.Generator) -> Question:
    """A request for the full caption, in one of several wordings."""
    text = _DESCRIPTION_REQUESTS[int(rng.integers(len(_DESCRIPTION_REQUESTS)))]
    return Question(text, full_caption(scene, rng), "all", "description")


def ask_about_world(rng: np.random.Generator) -> Question:
    """A question that needs no scene: what is a colour, what is a kind of object, which number is larger."""
    colour, kind = _pick(rng, list(COLOURS)), _pick(rng, list(KINDS))
    topic = int(rng.integers(3))
    if topic == 0:
        word, answer = ((colour, "Yes"), (kind, "No"))[int(rng.integers(2))]
        return Question(f"Is {word} a colour?{SHORT_SUFFIX}", answer, "world", "yesno")
    if topic == 1:
        options = [colour, kind] if rng.random() < 0.5 else [kind, colour]
        wanted, name = ((colour, "a colour"), (kind, "a kind of object"))[int(rng.integers(2))]
        return _choice(f"Which of these is {name}?", options, options.index(wanted), "world")
    numbers = list(ATTRIBUTES["quantity"])  # in ascending order
    first, second = rng.permutation(len(numbers))[:2]
    text = f"Which number is larger, {numbers[first]} or {numbers[second]}?"
    return Question(text + SHORT_SUFFIX, numbers[max(first, second)], "world", "short")


def draw_questions(scene: Scene, rng: np.random.Generator, num_turns: int, class_share: float = 0.3) -> list[Question]:
    """Questions about one scene for the turns of a conversation, none of them answered by an earlier turn.

    The object's class comes first or never, because every other question names it; each detail is asked after once; a
    description, which tells everything, comes last.

    Args:
        scene: What they are about.
        rng: Draws them.
        num_turns: At most so many.
        class_share: How often the object's class is asked after.
    """
    plan: list[tuple[str, str]] = []
    if rng.random() < class_share:
        names = [str(name) for name in rng.permutation(list(CLASS_QUESTIONS))]
        if rng.random() < 0.4:
            plan = [(names[0], "existence")]  # names an object, so that no other question of class may follow
        else:
            plan = [(name, _pick(rng, FORMS[:3])) for name in names[: 1 + int(rng.integers(2))]]
    plan += [(str(name), _pick(rng, FORMS)) for name in rng.permutation(list(ATTRIBUTES))]
    questions = []
    for attribute, form in plan[:num_turns]:
        if form == "choice" and len(_VALUES[attribute]) in (3, 4) and rng.random() < 0.3:
            questions.append(ask_among_all(scene, attribute, rng))
        else:
            questions.append(ask(scene, attribute, form, bool(rng.random() < 0.5), rng))
    if rng.random() < 0.2:
        questions[-1] = ask_for_description(scene, rng)
    return questions


def draw_group_questions(group: Group, rng: np.random.Generator, num_turns: int) -> list[Question]:
    """POPE's questions about different objects, each by a fair coin about one that is there or about one that is not.

    Of the absent ones half resemble one that is there. When all that are there have been asked after, no further
    question follows: its answer could only be no.
    """
    present = _in_random_order(list(group.labels), rng)
    absent = _in_random_order([label for label in LABELS if label not in present], rng)
    similar = set(similar_labels(group.labels))
    questions: list[Question] = []
    while present and len(questions) < num_turns:
        if rng.random() < 0.5:
            label, answer = present.pop(), "Yes"
        else:
            wanted = [label for label in absent if label in similar] if rng.random() < 0.5 else absent
            label, answer = wanted[0], "No"
            absent.remove(label)
        questions.append(Question(is_there(label) + SHORT_SUFFIX, answer, "objects", "existence"))
    return questions


def conversation(questions: Sequence[Question], context: str = "") -> list[dict[str, str]]:
    """Questions and answers as LLaVA's `conversations`; what they are about stands before the first question."""
    turns = []
    for index, question in enumerate(questions):
        text = f"{context}\n{question.text}" if index == 0 and context else question.text
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
    return turns


def align_samples(num_samples: int, seed: int = 0) -> list[tuple[dict[str, Any], Scene]]:
    """Image and short caption, for alignment: samples of LLaVA's JSON with the training scenes they show.

    Short as LLaVA's own captions are: class and one detail. In a full caption most of what is to be predicted is the
    order of its phrases, which no image tells.
    """
    rng = np.random.default_rng((seed, 0))
    samples = []
    for index in range(num_samples):
        scene = random_scene(rng, "train")
        request = ask_for_description(scene, rng)
        caption = statement(scene, _pick(rng, list(ATTRIBUTES)))
        samples.append((_sample(f"align-{index:05d}", [request._replace(answer=caption)]), scene))
    return samples


def instruct_samples(num_samples: int, seed: int = 0) -> list[tuple[dict[str, Any], Scene | Group | None]]:
    """Conversations about images of training scenes, most of three to five turns.

    One in eight shows a group of objects. One in twelve has no image: a description in words stands in for it, or the
    questions need none (None).
    """
    rng = np.random.default_rng((seed, 1))
    samples: list[tuple[dict[str, Any], Scene | Group | None]] = []
    for index in range(num_samples):
        identifier = f"instruct-{index:05d}"
        num_turns = 1 if rng.random() < 0.25 else int(rng.integers(3, 7))
        kind = rng.random()
        if kind < 0.02:
            questions = [ask_about_world(rng) for _ in range(num_turns)]
            samples.append(({"id": identifier, "conversations": conversation(questions)}, None))
            continue
        if kind > 7 / 8:
            group = random_group(rng, "train", int(rng.integers(2, 5)))
            samples.append((_sample(identifier, draw_group_questions(group, rng, num_turns)), group))
            continue
        scene = random_scene(rng, "train")
        if kind < 1 / 12:
            questions = draw_questions(scene, rng, num_turns)
            turns = conversation(questions, context=f"The image shows {full_caption(scene, rng)}.")
            samples.append(({"id": identifier, "conversations": turns}, scene))
        else:
            samples.append((_sample(identifier, _questions_on_image(scene, rng)), scene))
    return samples


def _questions_on_image(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Mostly colour and kind, which a model that is new to images can learn first, then one to three details."""
    details = draw_questions(scene, rng, int(rng.integers(1, 4)), class_share=0.0)
    if rng.random() < 0.2:
        return details
    forms = ["short" if rng.random() < 0.7 else _pick(rng, FORMS[:3]) for _ in CLASS_QUESTIONS]
    names = [str(name) for name in rng.permutation(list(CLASS_QUESTIONS))]
    first = [ask(scene, name, form, bool(rng.random() < 0.5), rng) for name, form in zip(names, forms, strict=True)]
    return [*first, *details]


def heldout_questions(num_per_cell: int, split: str = "test", seed: int = 0) -> list[tuple[Question, Scene]]:
    """Closed questions with the scenes of a split that they are about, as many for each attribute and form.

    Within a cell the values take turns, and so do `Yes` and `No` or the letters, for each value alike.
    """
    rng = np.random.default_rng((seed, 2))
    questions = []
    for attribute, phrases in _VALUES.items():
        values = list(phrases)
        for form in FORMS:
            for index in range(num_per_cell):
                scene = random_scene(rng, split)
                while getattr(scene, attribute) != values[index % len(values)]:
                    scene = random_scene(rng, split)
                # With an even number of values, each of their rounds starts with the other answer.
                affirm = (index + (index // len(values) if len(values) % 2 == 0 else 0)) % 2 == 0
                questions.append((ask(scene, attribute, form, affirm, rng), scene))
    return questions


def heldout_samples(num_per_cell: int, seed: int = 0) -> list[tuple[dict[str, Any], Scene]]:
    """`heldout_questions` on images of test scenes, of one turn each, with attribute and form as extra keys.

    Short answers five times as often as the other forms: guessing gets least of them right, so that they tell most.
    """
    several = [pair for pair in heldout_questions(5 * num_per_cell, "test", seed) if pair[0].form == "short"]
    others = [pair for pair in heldout_questions(num_per_cell, "test", seed + 1) if pair[0].form != "short"]
    samples = []
    for index, (question, scene) in enumerate([*several, *others]):
        sample = _sample(f"heldout-{index:05d}", [question])
        samples.append(({**sample, "attribute": question.attribute, "form": question.form}, scene))
    return samples


def write_instruction_data(
    directory: Path, num_align: int = 4000, num_instruct: int = 6000, num_heldout_per_cell: int = 12, seed: int = 2
) -> Path:
    """Draw `align.json`, `instruct.json`, `heldout.json` and the images that they name, unless they are there.

    Beside them, `scenes.csv` and `groups.csv` tell what each sample shows, for tests and analyses; nothing trains on
    them.

    Args:
        directory: The folder; images are named relative to it.
        num_align: Captions, all on scenes of their own.
        num_instruct: Conversations, all on scenes of their own.
        num_heldout_per_cell: Questions for each of eleven attributes (class included) in each of four forms, short
            answers five times as many.
        seed: Of everything.
    """

    def write(temporary: Path) -> None:
        (temporary / "images").mkdir(parents=True)
        rows: list[tuple] = []
        groups: list[tuple] = []
        for name, samples in (
            ("align", align_samples(num_align, seed)),
            ("instruct", instruct_samples(num_instruct, seed)),
            ("heldout", heldout_samples(num_heldout_per_cell, seed)),
        ):
            for sample, shown in samples:
                if isinstance(shown, Group):
                    labels = [" ".join(label) if label else "" for label in shown.quarters]
                    groups.append((sample["id"], *labels, shown.ground, shown.jitter))
                    draw_group(shown).save(temporary / sample["image"], compress_level=1)
                elif shown is not None:
                    rows.append((sample["id"], *shown.content(), shown.jitter))
                    if "image" in sample:
                        draw(shown).save(temporary / sample["image"], compress_level=1)
            text = json.dumps([sample for sample, _ in samples], indent=1)
            (temporary / f"{name}.json").write_text(text + "\n")
        _write_csv(temporary / "scenes.csv", ("id", "kind", "colour", *ATTRIBUTES, "jitter"), rows)
        quarters = ("upper left", "upper right", "lower left", "lower right")
        _write_csv(temporary / "groups.csv", ("id", *quarters, "ground", "jitter"), groups)

    _draw_once(directory, write)
    return directory


def _sample(identifier: str, questions: Sequence[Question]) -> dict[str, Any]:
    turns = conversation(questions, context=IMAGE_TOKEN)
    return {"id": identifier, "image": f"images/{identifier}.png", "conversations": turns}


def _choice(question: str, options: Sequence[str], correct: int, attribute: str) -> Question:
    listed = "".join(f"\n{chr(ord('A') + index)}. {option}" for index, option in enumerate(options))
    return Question(f"{question}{listed}{CHOICE_SUFFIX}", chr(ord("A") + correct), attribute, "choice")


def _yes_no(scene: Scene, attribute: str, value: str) -> str:
    if attribute == "colour":
        return f"Is the object in the middle {value}?"
    if attribute == "kind":
        return f"Is the object in the middle {_a(value)}?"
    phrase = ATTRIBUTES[attribute][value]
    if phrase.startswith("with "):
        return f"Does the {scene.label} have {phrase.removeprefix('with ')}?"
    return f"Is the {scene.label} {'dull' if value == 'dull' else phrase}?"  # `not glowing` would invite a double no


def _existence(scene: Scene, attribute: str, value: str, rng: np.random.Generator) -> str:
    """Asks whether the image has the object, or the detail, as `value` would have it."""
    if attribute in CLASS_QUESTIONS:
        labels = {"colour": scene.colour, "kind": scene.kind, attribute: value}
        if value != getattr(scene, attribute) and rng.random() < 1 / 3:  # one in three differs in both
            second = "kind" if attribute == "colour" else "colour"
            labels[second] = _pick(rng, [name for name in _VALUES[second] if name != labels[second]])
        return is_there((labels["colour"], labels["kind"]))
    phrase = ATTRIBUTES[attribute][value]
    if attribute in _THINGS and value != "plain" and rng.random() < 0.5:
        verb = "Are" if value in ("two", "three") else "Is"
        return f"{verb} there {phrase.split(' ', 1)[1]} in the image?"
    return f"Is there {_a(scene.label)} {phrase} in the image?"


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _in_random_order(labels: list[Label], rng: np.random.Generator) -> list[Label]:
    return [labels[int(k)] for k in rng.permutation(len(labels))]


def _pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    return values[int(rng.integers(len(values)))]
