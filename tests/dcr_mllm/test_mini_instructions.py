"""The miniature's instruction data are right, balanced and kept apart; its language model reads and answers."""

from __future__ import annotations

import collections
import csv
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcr_mllm.conversation import TEMPLATES, VICUNA_SYSTEM, Turn, pieces, prompt
from dcr_mllm.mini import build, data, instructions, llm, world
from dcr_mllm.mini.groups import Group, draw_group, group_split, random_group
from dcr_mllm.runs import hash_directory

QUARTERS = ("upper left", "upper right", "lower left", "lower right")
PACKAGED = Path(world.__file__).parent / "weights"

# What each phrase says, written down once more so that answers are checked by other means than they are made by.
FACTS = {
    "facing right": ("orientation", "right"),
    "facing left": ("orientation", "left"),
    "a spot": ("presence", "spot"),
    "without a spot": ("presence", "plain"),
    "glowing": ("state", "glowing"),
    "not glowing": ("state", "dull"),
    "dull": ("state", "dull"),
    "one star": ("quantity", "one"),
    "two stars": ("quantity", "two"),
    "three stars": ("quantity", "three"),
    "a ball on the left": ("position", "left"),
    "a ball on the right": ("position", "right"),
    "a ball below": ("position", "below"),
    "on dark ground": ("color", "dark"),
    "on light ground": ("color", "light"),
    "on teal ground": ("color", "teal"),
    "a solid body": ("structure", "solid"),
    "a striped body": ("structure", "striped"),
    "letter a": ("text", "A"),
    "letter t": ("text", "T"),
    "letter o": ("text", "O"),
    "letter x": ("text", "X"),
    "from the front": ("viewpoint", "front"),
    "from above": ("viewpoint", "above"),
}
CLUES = {  # a word that only the short question of this attribute has
    "face": "orientation",
    "plain": "presence",
    "glowing": "state",
    "stars": "quantity",
    "ball": "position",
    "ground": "color",
    "body": "structure",
    "letter": "text",
    "seen": "viewpoint",
    "colour": "colour",
    "What is the object": "kind",
}


def facts_in(text: str) -> set[tuple[str, str]]:
    """What a text says of the nine details, the longest phrases first."""
    found = set()
    for phrase in sorted(FACTS, key=len, reverse=True):
        if re.search(rf"\b{phrase}\b", text):
            found.add(FACTS[phrase])
            text = re.sub(rf"\b{phrase}\b", "", text)
    return found


def holds(scene: world.Scene, fact: tuple[str, str]) -> bool:
    return getattr(scene, fact[0]) == fact[1]


def right_answer(scene: world.Scene, question: str) -> str:
    """The answer to a closed question about a scene, derived from the words of the question."""
    text, *rest = question.split("\n")
    if rest[-1].startswith("Answer with"):
        right = []
        for option in rest[:-1]:
            letter, words = option.split(". ", 1)
            facts = facts_in(words)
            if facts:
                assert len(facts) == 1
                correct = holds(scene, facts.pop())
            else:
                correct = words in (scene.colour, scene.kind)
            right += [letter] if correct else []
        assert len(right) == 1
        return right[0]
    assert rest == ["Answer the question using a single word or phrase."]
    either = re.fullmatch(r"Is the .* (plain or does it have a spot|glowing or dull)\?", text)
    if text.startswith(("Is ", "Does ", "Are ")) and not either:
        bare = re.fullmatch(r"Is the object in the middle (?:an? )?(\w+)\?", text)
        if bare:
            return "Yes" if bare[1] in (scene.colour, scene.kind) else "No"
        labelled = re.fullmatch(r"Is there an? (\w+ \w+) in the image\?", text)
        if labelled and labelled[1].split()[-1] in world.KINDS:
            return "Yes" if labelled[1] == scene.label else "No"
        (fact,) = facts_in(text)
        return "Yes" if holds(scene, fact) else "No"
    attribute = next(attribute for clue, attribute in CLUES.items() if clue in text)
    return getattr(scene, attribute).lower()


def check_caption(scene: world.Scene, text: str) -> None:
    assert scene.label in text
    facts = facts_in(text)
    assert {attribute for attribute, _ in facts} == set(world.ATTRIBUTES) and len(facts) == 9
    assert all(holds(scene, fact) for fact in facts)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return instructions.write_instruction_data(tmp_path_factory.mktemp("mini") / "data", 8, 80, 1, seed=4)


def read(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())


def test_files_have_the_layout_of_llava(drawn: Path):
    assert [len(read(drawn, name)) for name in ("align", "instruct", "heldout")] == [8, 80, 88]
    samples = [sample for name in ("align", "instruct", "heldout") for sample in read(drawn, name)]
    assert len({sample["id"] for sample in samples}) == len(samples)
    for sample in samples:
        assert set(sample) <= {"id", "image", "conversations", "attribute", "form"}
        turns = sample["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert all(set(turn) == {"from", "value"} and turn["value"] for turn in turns)
        assert turns[0]["value"].startswith("<image>\n") == ("image" in sample)
        assert not any("<image>" in turn["value"] for turn in turns[1:])
        if "image" in sample:
            assert Image.open(drawn / sample["image"]).size == (world.IMAGE_SIZE, world.IMAGE_SIZE)
    assert {len(sample["conversations"]) for sample in read(drawn, "heldout")} == {2}
    assert {sample["attribute"] for sample in read(drawn, "heldout")} == {*world.ATTRIBUTES, "colour", "kind"}
    assert {sample["form"] for sample in read(drawn, "heldout")} == set(instructions.FORMS)
    assert len(list((drawn / "images").iterdir())) == sum("image" in sample for sample in samples)


def test_images_show_the_scenes_that_are_listed(drawn: Path):
    """`scenes.csv` is what the other tests go by, so it has to be what was drawn."""
    with (drawn / "scenes.csv").open() as file:
        scenes = {row.pop("id"): world.Scene(**{**row, "jitter": int(row["jitter"])}) for row in csv.DictReader(file)}
    with (drawn / "groups.csv").open() as file:
        groups = {row["id"]: row for row in csv.DictReader(file)}
    for name, split in (("align", "train"), ("instruct", "train"), ("heldout", "test")):
        for sample in read(drawn, name):
            if sample["id"] in groups:
                assert sample["id"] not in scenes
            elif "image" in sample:
                scene = scenes[sample["id"]]
                assert np.array_equal(np.asarray(Image.open(drawn / sample["image"])), np.asarray(world.draw(scene)))
                assert world.split_of(scene) == split
    assert len(groups) > 3
    for name, row in groups.items():
        quarters = tuple(tuple(row[where].split()) or None for where in QUARTERS)
        group = Group(quarters=quarters, ground=row["ground"], jitter=int(row["jitter"]))
        assert np.array_equal(np.asarray(Image.open(drawn / "images" / f"{name}.png")), np.asarray(draw_group(group)))
        assert group_split(group) == "train"


def test_same_seed_same_data(drawn: Path, tmp_path: Path):
    again = instructions.write_instruction_data(tmp_path / "again", 8, 80, 1, seed=4)
    other = instructions.write_instruction_data(tmp_path / "other", 8, 80, 1, seed=5)
    files = sorted(path.relative_to(drawn) for path in drawn.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((drawn / file).read_bytes() == (again / file).read_bytes() for file in files)
    assert (drawn / "heldout.json").read_bytes() != (other / "heldout.json").read_bytes()
    before = (again / "align.json").stat().st_mtime_ns
    instructions.write_instruction_data(again, 8, 80, 1, seed=6)
    assert (again / "align.json").stat().st_mtime_ns == before  # drawn once


def test_training_shows_no_scene_of_a_benchmark(tmp_path: Path):
    """By what the scenes show: of thousands of training scenes none is in the pairs, labels or questions held out."""
    training = {scene.content() for _, scene in instructions.align_samples(2000)}
    instruct = [shown for _, shown in instructions.instruct_samples(2000)]
    training |= {scene.content() for scene in instruct if isinstance(scene, world.Scene)}
    benchmarks = {scene.content() for _, scene in instructions.heldout_samples(12)}
    for split in ("validation", "test"):
        benchmarks |= {scene.content() for _, *pair in data._pairs(split, 30, 0) for scene in pair}
        data.write_labelled(tmp_path / split, split, num_train=0, num_test=200)
        with (tmp_path / split / "labels.csv").open() as file:
            for row in csv.DictReader(file):
                colour, kind = row["class"].split()
                benchmarks.add((kind, colour, *(row[attribute] for attribute in world.ATTRIBUTES)))
    assert len(training) > 3500 and len(benchmarks) > 1800
    assert not training & benchmarks
    groups = [group for group in instruct if isinstance(group, Group)]
    assert len(groups) > 200 and {group_split(group) for group in groups} == {"train"}


def test_every_answer_is_right():
    """Each answer of each kind of sample follows from the scene; descriptions name everything, rightly."""
    samples = [*instructions.instruct_samples(1500), *instructions.heldout_samples(12)]
    seen: collections.Counter = collections.Counter()
    for sample, scene in samples:
        if not isinstance(scene, world.Scene):
            continue
        values = [turn["value"] for turn in sample["conversations"]]
        context, values[0] = values[0].split("\n", 1)
        if "image" not in sample:
            check_caption(scene, context)
        for question, answer in zip(values[::2], values[1::2], strict=True):
            if "\n" not in question:
                check_caption(scene, answer)
                seen["description"] += 1
            else:
                assert answer == right_answer(scene, question), question
                seen[answer if answer in ("Yes", "No", "A", "B", "C", "D") else "short"] += 1
    assert set(seen) == {"description", "Yes", "No", "A", "B", "C", "D", "short"}


def test_questions_on_groups_are_right_and_fair_to_the_last():
    """Whatever was answered before, the next answer is yes or no with equal chance."""
    rng = np.random.default_rng(2)
    after: dict[tuple[str, ...], collections.Counter] = collections.defaultdict(collections.Counter)
    similar = []
    for _ in range(3000):
        group = random_group(rng, "train", int(rng.integers(2, 5)))
        there = {" ".join(label) for label in group.labels}
        answers: tuple[str, ...] = ()
        asked = []
        for question in instructions.draw_group_questions(group, rng, 4):
            match = re.fullmatch(r"Is there an? (\w+ \w+) in the image\?\nAnswer the question.*", question.text)
            assert match and (question.answer == "Yes") == (match[1] in there)
            colour, kind = match[1].split()
            if question.answer == "No":
                similar.append(any(label[0] == colour or label[1] == kind for label in group.labels))
            asked.append(match[1])
            after[answers][question.answer] += 1
            answers += (question.answer,)
        assert len(set(asked)) == len(asked)
    for before in [(), ("Yes",), ("No",), ("Yes", "No"), ("No", "No")]:
        assert abs(after[before]["Yes"] / after[before].total() - 0.5) < 0.05, before
    assert 0.55 < np.mean(similar) < 0.85  # a good part of all objects share a colour or a kind by chance


def test_captions_name_the_class_and_one_detail():
    details = set()
    for sample, scene in instructions.align_samples(300):
        question, caption = (turn["value"] for turn in sample["conversations"])
        assert question.startswith("<image>\n")
        phrases = {f"a {scene.label} {world.detail_phrase(scene, name)}": name for name in world.ATTRIBUTES}
        details.add(phrases[caption])
    assert details == set(world.ATTRIBUTES)


def test_answers_about_the_world_are_right():
    rng = np.random.default_rng(0)
    for _ in range(300):
        question = instructions.ask_about_world(rng)
        text, *rest = question.text.split("\n")
        if match := re.fullmatch(r"Is (\w+) a colour\?", text):
            assert question.answer == ("Yes" if match[1] in world.COLOURS else "No")
        elif match := re.fullmatch(r"Which number is larger, (\w+) or (\w+)\?", text):
            assert question.answer == max(match.groups(), key=("one", "two", "three").index)
        else:
            wanted = world.COLOURS if "a colour" in text else world.KINDS
            chosen = dict(option.split(". ") for option in rest[:-1])[question.answer]
            assert chosen in wanted and sum(option[3:] in wanted for option in rest[:-1]) == 1


def test_heldout_questions_are_balanced_within_each_cell():
    cells: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    for question, _ in instructions.heldout_questions(24):
        cells[question.attribute, question.form][question.answer] += 1
    assert len(cells) == 11 * 4
    for (attribute, form), answers in cells.items():
        num_answers = len({**world.ATTRIBUTES, "colour": world.COLOURS, "kind": world.KINDS}[attribute])
        assert len(answers) == (num_answers if form == "short" else 2), (attribute, form)
        assert set(answers.values()) == {24 // len(answers)}, (attribute, form)


def test_the_words_of_a_question_do_not_give_its_answer_away():
    """Learning by heart which answer goes with which words, label aside, is of no use on other questions."""
    halves = []
    for seed in (1, 2):
        halves.append(
            [
                (re.sub(rf"\b({'|'.join(world.COLOURS)}) ({'|'.join(world.KINDS)})\b", "it", question.text), question)
                for question, _ in instructions.heldout_questions(32, seed=seed)
            ]
        )
    votes: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for text, question in halves[0]:
        votes[text][question.answer] += 1
    hits = [
        question.answer == votes[text].most_common(1)[0][0]
        for text, question in halves[1]
        if question.form != "short" and text in votes
    ]
    assert len(hits) > 800
    assert abs(np.mean(hits) - 0.5) < 0.06


def test_training_answers_are_balanced():
    answers: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    rng = np.random.default_rng(0)
    for _ in range(1500):
        for question in instructions.draw_questions(world.random_scene(rng, "train"), rng, 5):
            two_options = question.form != "choice" or "\nC. " not in question.text
            answers[question.form if two_options else "choice of more"][question.answer] += 1
    for form, pair in (("yesno", ("Yes", "No")), ("existence", ("Yes", "No")), ("choice", ("A", "B"))):
        assert set(answers[form]) == set(pair)
        assert 0.46 < answers[form][pair[0]] / answers[form].total() < 0.54, form
    assert answers["description"].total() / sum(counter.total() for counter in answers.values()) < 0.06


def test_instruct_mixes_turns_and_text():
    samples = [sample for sample, _ in instructions.instruct_samples(2000)]
    num_turns = collections.Counter(len(sample["conversations"]) // 2 for sample in samples)
    assert set(num_turns) == {1, 2, 3, 4, 5, 6}
    assert sum(num_turns[count] for count in (3, 4, 5)) / 2000 > 0.7
    assert 0.06 < sum("image" not in sample for sample in samples) / 2000 < 0.105


def test_no_turn_answers_a_later_one():
    """Each detail is asked after once, the class before anything names it, and the description ends a conversation."""
    rng = np.random.default_rng(3)
    orders = collections.Counter()
    for _ in range(1000):
        scene = world.random_scene(rng, "train")
        questions = instructions.draw_questions(scene, rng, 6)
        attributes = [question.attribute for question in questions]
        assert len(set(attributes)) == len(attributes) == 6
        for index, question in enumerate(questions):
            if question.attribute in ("colour", "kind"):
                before = " ".join(f"{earlier.text} {earlier.answer}" for earlier in questions[:index])
                assert getattr(scene, question.attribute) not in re.findall(r"\w+", before)
                assert question.form != "existence" or index == 0
                orders[question.form] += 1
            if question.form == "description":
                assert index == 5
    assert set(orders) == set(instructions.FORMS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """The tokenizer as a user gets it: saved, and loaded by its folder alone."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    llm.build_llm_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_tokenizer_is_like_vicunas(tokenizer, tmp_path: Path):
    assert tokenizer.is_fast
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.chat_template is None and tokenizer.pad_token is None
    ids = tokenizer("a red fish").input_ids
    assert ids[0] == 1 and ids.count(1) == 1 and ids[-1] != 2  # starts, does not end
    assert tokenizer("left</s>").input_ids[-1] == 2
    assert len(tokenizer) < 1000
    tokenizer.save_pretrained(tmp_path)  # as a part of something else
    assert type(tokenizer).from_pretrained(tmp_path)("a red fish").input_ids == ids


def test_every_word_of_the_world_is_one_token(tokenizer):
    """Words of captions, questions and the system text, behind a space, and behind a line feed where they begin one."""
    rng = np.random.default_rng(9)
    words = set(re.sub(r"[.,]", "", VICUNA_SYSTEM).split())
    for _ in range(300):
        scene = world.random_scene(rng)
        texts = [world.full_caption(scene, rng)]
        texts += [question.text for question in instructions.draw_questions(scene, rng, 9)]
        texts += [instructions.ask_about_world(rng).text]
        words |= set(re.sub(r"[.,?]|Answer", "", " ".join(texts)).split())
    assert len(words) > 120
    assert [word for word in words if len(tokenizer(word, add_special_tokens=False).input_ids) != 1] == []
    for opening in ("\nAnswer", "\nWhich", "\nIs", "\nDoes", "\nHow", "\nA", "\nB", "</s>USER"):
        assert len(tokenizer(f"fish{opening}", add_special_tokens=False).input_ids) == 3, opening


@pytest.mark.parametrize(
    "text", ["Zebra, 42 % of them!", "na\u00efve \u4e16\u754c \U0001f41f", "two  spaces\n\nand lines"]
)
def test_unseen_text_survives_as_bytes(tokenizer, text: str):
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert 0 not in encoded.input_ids
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == text
    assert max(end for _, end in encoded.offset_mapping) == len(text)


def test_only_answers_and_their_ends_have_labels(tokenizer):
    turns = [
        Turn("user", "a red fish\nIs it red?"),
        Turn("assistant", "Yes"),
        Turn("user", "b"),
        Turn("assistant", "left"),
    ]
    ids, labels = llm.encode(tokenizer, pieces(TEMPLATES["vicuna_v1"], turns))
    kept = [tokenizer.decode([token]) for token in labels[labels != -100]]
    assert [word.strip() for word in kept] == ["Yes", "</s>", "left", "</s>"]
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    padded_ids, padded_labels = llm.collate([(ids, labels), (ids[:5], labels[:5])])
    assert padded_ids.shape == padded_labels.shape == (2, len(ids))
    assert (padded_labels[1, 5:] == -100).all()


def test_descriptions_keep_what_they_say():
    rng = np.random.default_rng(6)
    for _ in range(300):
        scene = world.random_scene(rng)
        words = llm.describe(scene, rng).split()
        named = {*scene.label.split(), scene.orientation, scene.color, scene.structure, scene.quantity, "star", "spot"}
        named |= {scene.text.lower(), scene.viewpoint, "ball", scene.position, "glowing"}
        assert named <= {"star" if word == "stars" else word for word in words}
        assert ("without" in words) == (scene.presence == "plain")
        assert ("not" in words) == (scene.state == "dull")
    told = llm.describe(scene, rng, ["state"])
    assert {attribute for attribute, _ in facts_in(told)} == {"state"}


def test_conversations_tell_of_training_scenes_what_they_ask(monkeypatch: pytest.MonkeyPatch):
    """What is asked after is in the description: otherwise training would teach to guess."""
    splits, told, asked = [], [], []

    def draw_scene(rng, split=None):
        splits.append(split)
        return world.random_scene(rng, split)

    def draw_questions(scene, rng, num_turns):
        questions = instructions.draw_questions(scene, rng, num_turns)
        asked.append({question.attribute for question in questions})
        return questions

    def describe(scene, rng, attributes):
        told.append(set(attributes))
        return " ".join(world.detail_phrase(scene, name) for name in attributes)

    monkeypatch.setattr(llm, "random_scene", draw_scene)
    monkeypatch.setattr(llm, "draw_questions", draw_questions)
    monkeypatch.setattr(llm, "describe", describe)
    monkeypatch.setattr(llm, "_draw_caption", lambda scene, rng: [])
    rng = np.random.default_rng(0)
    for _ in range(200):
        llm.draw_conversation(rng, 3)
    assert set(splits) == {"train"}
    assert len(asked) == len(told) > 150
    for attributes, described in zip(asked, told, strict=True):
        assert attributes - {"colour", "kind", "all"} <= described
        assert "all" not in attributes or described == set(world.ATTRIBUTES)
    assert {len(described) for described in told} >= set(range(2, 10))


def described_scene(text: str) -> tuple[set[str], set[tuple[str, str]]]:
    """Words of class, and details, of a description that may lack joining words."""
    words = text.split()
    found = {("presence", "plain" if "without" in words else "spot")} if "spot" in words else set()
    found |= {("state", "dull" if "not" in words else "glowing")} if "glowing" in words else set()
    rest = re.sub(r"(ball|facing)( on)?( the)? ", r"\1-", text.replace("letter ", "letter-")).split()
    for word in rest:
        found |= {("orientation", word[7:])} if word.startswith("facing-") else set()
        found |= {("position", word[5:])} if word.startswith("ball-") else set()
        found |= {("text", word[7:].upper())} if word.startswith("letter-") else set()
        for attribute in ("quantity", "color", "structure", "viewpoint"):
            found |= {(attribute, word)} if word in world.ATTRIBUTES[attribute] else set()
    return {word for word in words if word in {*world.COLOURS, *world.KINDS}}, found


@pytest.mark.parametrize("lesson", llm.LESSONS)
def test_drills_can_be_answered_from_their_description(lesson: llm.Lesson, monkeypatch: pytest.MonkeyPatch):
    """Words alone decide: the answer that follows from the description is the one that is learned."""
    splits, asked = [], []
    draw_scene, ask = llm.random_scene, llm.ask
    monkeypatch.setattr(llm, "random_scene", lambda rng, split: splits.append(split) or draw_scene(rng, split))

    def remember(scene, *args):
        question = ask(scene, *args)
        asked.append((scene, question))
        return question

    monkeypatch.setattr(llm, "ask", remember)
    rng = np.random.default_rng(3)
    numbers, told_yes = set(), []
    for _ in range(300):
        rendered = llm.draw_drill(rng, lesson)
        before, answer = ("".join(piece.text for piece in rendered if piece.learned == learned) for learned in (0, 1))
        scene, question = asked[-1]
        description, rest = before.removeprefix("USER: ").split("\n", 1)
        classes, details = described_scene(description)
        assert classes == {scene.colour, scene.kind}
        assert question.attribute in {"colour", "kind", *(attribute for attribute, _ in details)}
        assert all(holds(scene, detail) for detail in details)
        assert right_answer(scene, question.text) == question.answer == answer.removesuffix("</s>")
        assert rest == question.text.rsplit("\nAnswer", 1)[0] + " ASSISTANT: "
        numbers.add(len(details))
        told_yes.append(question.answer == "Yes")
    assert set(splits) == {"train"}
    assert numbers == set(range(1, lesson.max_details + 1))
    assert {question.form for _, question in asked} == set(lesson.forms)
    assert {question.attribute for _, question in asked} == {*world.ATTRIBUTES, "colour", "kind"}
    if "short" not in lesson.forms and "choice" not in lesson.forms:
        assert 0.4 < np.mean(told_yes) < 0.6


def test_captions_say_what_their_description_says():
    rng = np.random.default_rng(5)
    lengths = set()
    for _ in range(200):
        scene = world.random_scene(rng, "train")
        described, caption = llm._draw_caption(scene, rng)
        assert (described.learned, caption.learned) == (False, True)
        assert described.text.endswith("\n") and caption.text.endswith("\n") and scene.label in caption.text
        details = facts_in(caption.text)
        assert details <= described_scene(described.text)[1]
        lengths.add(len(details))
    assert lengths == {1, 9}


def test_lessons_come_in_order_and_then_conversations(tokenizer, monkeypatch: pytest.MonkeyPatch):
    drawn = []
    draw_drill, draw_conversation = llm.draw_drill, llm.draw_conversation
    monkeypatch.setattr(llm, "draw_drill", lambda rng, lesson: drawn.append(lesson) or draw_drill(rng, lesson))
    monkeypatch.setattr(llm, "draw_conversation", lambda rng, n: drawn.append(n) or draw_conversation(rng, n))
    rng = np.random.default_rng(0)
    ends = [lesson.until for lesson in llm.LESSONS]
    assert ends == sorted(ends) and ends[-1] < 1
    for lesson in llm.LESSONS:
        drawn.clear()
        batch = llm.draw_batch(rng, tokenizer, lesson.until, 100)
        assert drawn == [lesson] * len(batch)
        assert 100 <= sum(len(ids) for ids, _ in batch) < 200
    kinds = []
    for _ in range(60):
        drawn.clear()
        llm.draw_batch(rng, tokenizer, 0.9, 1)
        (kind,) = drawn
        kinds.append(kind)
    turns = [kind for kind in kinds if isinstance(kind, int)]
    assert set(turns) == set(range(1, 7)) and 30 < len(turns) < 54
    assert {kind for kind in kinds if not isinstance(kind, int)} == {llm.LESSONS[-1]}


def test_a_few_steps_lower_the_loss_and_are_repeatable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llm, "text_accuracy", lambda *_: {})
    model, tokenizer, curve = llm.train_llm(steps=12, seed=1, tokens_per_step=300, learning_rate=2e-2)
    assert curve == llm.train_llm(steps=12, seed=1, tokens_per_step=300, learning_rate=2e-2)[2]
    rng = np.random.default_rng(8)
    ids, labels = llm.collate([llm.encode(tokenizer, llm.draw_conversation(rng, 2)) for _ in range(16)])
    torch.manual_seed(1)
    with torch.inference_mode():
        before = llm.answer_and_text_loss(llm.build_llm(tokenizer), ids, labels)
        after = llm.answer_and_text_loss(model, ids, labels)
    assert after[0] < 0.8 * before[0] and after[1] < 0.9 * before[1]


def test_build_of_the_llm_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command leaves what transformers loads by itself, a curve, and a card of the parts that are there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dcr_mllm.mini.__main__ import main

    assert main(["build", "--out", str(tmp_path), "--part", "llm", "--llm-steps", "2"]) == 0
    assert {file.name for file in (tmp_path / "llm").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((tmp_path / "curves" / "llm.json").read_text())["steps"] == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    assert model.dtype == torch.float16 and 1_800_000 < model.num_parameters() < 2_600_000
    assert len(AutoTokenizer.from_pretrained(tmp_path / "llm")) == model.config.vocab_size
    monkeypatch.setattr(build, "text_accuracy", functools.partial(llm.text_accuracy, num_per_cell=1))
    card = build.write_card(tmp_path)
    assert card["steps"] == {"llm": 2} and card["seeds"] == {"llm": 0}
    assert set(card["quality"]) == {f"text_{form}" for form in instructions.FORMS}
    assert card["hashes"] == {"llm": hash_directory(tmp_path / "llm")}
    readme = (tmp_path / "README.md").read_text()
    assert "| mini LLM | 2 steps" in readme and "VAE" not in readme


@pytest.mark.skipif(not (PACKAGED / "llm").is_dir(), reason="the packaged weights are not there")
def test_packaged_llm_answers_about_described_scenes():
    """It is the model of the card, and generates right answers as often as the card says, form by form."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    card = json.loads((PACKAGED / "card.json").read_text())
    assert hash_directory(PACKAGED / "llm") == card["hashes"]["llm"]
    assert sum(file.stat().st_size for file in (PACKAGED / "llm").iterdir()) < 6 * 2**20
    model = AutoModelForCausalLM.from_pretrained(PACKAGED / "llm", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(PACKAGED / "llm")
    rng = np.random.default_rng(1)
    right: dict[str, list[bool]] = collections.defaultdict(list)
    for question, scene in instructions.heldout_questions(6, "test", seed=77):
        turns = [Turn("user", f"{llm.describe(scene, rng)}\n{question.text}")]
        ids = tokenizer(prompt(TEMPLATES["vicuna_v1"], turns), return_tensors="pt").input_ids
        with torch.inference_mode():
            answer = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        right[question.form].append(tokenizer.decode(answer, skip_special_tokens=True).strip() == question.answer)
    for form, hits in right.items():  # 66 questions a form: three standard errors are 18 points
        assert abs(100 * np.mean(hits) - card["quality"][f"text_{form}"]) < 18, form
        assert np.mean(hits) > 0.8, form  # it reads and compares: guessing gives 50 % or less
