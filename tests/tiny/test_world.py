"""The synthetic world: determinism, held-out splits, texts and labels that agree with the scene."""

import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yivl.data.rows import parse_row, read_rows
from yivl.data.streaming import open_shards, read_shards
from yivl.tiny.world.evaluation_set import EVALUATED_KINDS, balanced_questions
from yivl.tiny.world.example_images import EXAMPLE_SCENES
from yivl.tiny.world.language import QuestionKind, caption, detail, dialogue, json_answer, paraphrase
from yivl.tiny.world.rendering import render
from yivl.tiny.world.scenes import MAX_THINGS, SPLITS, is_held_out, sample_scene
from yivl.tiny.world.words import ACTIVITIES, EATING, KIND, KINDS, LANGUAGES, PLACES, SIGN, SIGN_TEXTS, Language

ROOT = Path(__file__).parents[2]
SCENES = {split: [sample_scene(split, number) for number in range(300)] for split in SPLITS}


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "yivl.tiny.world", *arguments], cwd=ROOT, text=True, capture_output=True, timeout=120
    )


def test_the_held_out_scenes_are_the_same_on_every_machine() -> None:
    """The evaluation set is published as its seed; the hashes pin its content."""

    def name_words(fields: list[tuple[str, Any]]) -> Any:
        return dict(fields).get("en", dict(fields))

    scenes = [asdict(scene, dict_factory=name_words) for split in SPLITS for scene in SCENES[split]]
    asked = [
        (question.text, question.answer)
        for kind in EVALUATED_KINDS
        for language in LANGUAGES
        for _, question in balanced_questions("scenes", kind, language, 40)
    ]
    assert hashlib.sha256(json.dumps(scenes, sort_keys=True).encode()).hexdigest()[:16] == "f0cfa05c7b2e79f4"
    assert hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16] == "cf1c6fc54eeeb695"


def test_images_are_deterministic() -> None:
    scene = sample_scene("scenes", 3)
    assert np.array_equal(render(scene, 96).image, render(scene, 96).image)


def test_the_world_has_the_documented_size() -> None:
    assert len(KINDS) == len({kind.en for kind in KINDS}) == len({kind.zh for kind in KINDS}) == 52
    assert len(SIGN_TEXTS) == 130
    counts = Counter(len(scene.things) for scene in SCENES["train"])
    assert set(counts) <= set(range(MAX_THINGS + 1))
    assert {thing.activity for scene in SCENES["train"] for thing in scene.things} == {None, *ACTIVITIES}


@pytest.mark.parametrize("split", SPLITS)
def test_no_two_things_share_a_place_and_reading_order_holds(split: str) -> None:
    for scene in SCENES[split]:
        places = [PLACES.index(thing.place) for thing in scene.things]
        assert places == sorted(set(places))
        assert scene.sign is None or PLACES.index(scene.sign.place) not in places


def test_held_out_combinations_are_never_trained() -> None:
    trained = {one for scene in SCENES["train"] for one in scene.combinations}
    assert not any(is_held_out(*one) for one in trained)
    assert all(any(is_held_out(*one) for one in scene.combinations) for scene in SCENES["combinations"])
    every = [(kind, activity, count) for kind in KINDS for activity in (None, *ACTIVITIES) for count in (1, 2, 3, 4)]
    assert 0.08 < sum(is_held_out(*one) for one in every) / len(every) < 0.16
    assert not any(is_held_out(kind, None, 1) for kind in KINDS)


def test_held_out_sizes_are_never_trained() -> None:
    sizes = {split: [thing.size for scene in SCENES[split] for thing in scene.things] for split in ("train", "sizes")}
    assert min(sizes["train"]) >= 0.21
    assert max(sizes["train"]) <= 0.36
    acting = [thing.size for scene in SCENES["sizes"] for thing in scene.things if thing.activity]
    others = [thing.size for scene in SCENES["sizes"] for thing in scene.things if not thing.activity]
    assert all(size < 0.2 or size > 0.29 for size in acting)
    assert all(size < 0.2 or size > 0.37 for size in others)


@pytest.mark.parametrize("grid", [6, 12])
def test_patch_labels_agree_with_the_scene(grid: int) -> None:
    shown = missing = 0
    for scene in SCENES["scenes"][:100]:
        patches = render(scene, grid * 16).patch_labels(grid)
        assert len(patches) == grid * grid
        named = {word for patch in patches for word in patch}
        assert (SIGN in named) == (scene.sign is not None)
        for thing in scene.things:
            seen = any(thing.kind in patch and thing.place in patch for patch in patches)
            shown, missing = shown + seen, missing + (not seen)
        assert not named & set(KINDS) - scene.shown
    # A near object may hide a small one.
    assert missing <= 0.02 * shown


def test_captions_and_descriptions_of_the_example_scenes() -> None:
    cats, sign = EXAMPLE_SCENES["cats.jpg"], EXAMPLE_SCENES["exit.jpg"]
    assert caption(cats, "en") == "Three cats eating fish from bowls."
    assert caption(cats, "zh") == "三只猫在吃碗里的鱼。"
    assert detail(cats, "en") == (
        "There are three cats on the left, on the right and at the bottom. They are eating fish from bowls. "
        "The floor is grey and the wall is blue."
    )
    assert detail(cats, "zh") == "三只猫在左边、右边和下边。它们在吃碗里的鱼。地板是灰色，墙是蓝色。"
    assert caption(sign, "en") == "A dog playing with a ball, an umbrella and a sign that says 出口."
    assert caption(sign, "zh") == "一只狗在玩球，一把雨伞，一块写着出口的牌子。"
    assert json_answer(cats, "en")[1] == '{"things": ["3 cat"], "total": 3}'


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_agree_with_the_scene(language: Language) -> None:
    rng = random.Random(0)
    kinds: Counter[str] = Counter()
    follow_ups = 0
    for scene in SCENES["train"]:
        questions = dialogue(scene, language, rng, 8)
        follow_ups += any(one.text in ("Where is it?", "它在哪里？") for one in questions)
        for one in questions:
            kinds[one.kind] += 1
            if one.kind == "presence":
                assert (one.value == "yes") == (one.about in scene.shown)
            if one.kind == "count":
                assert one.about is not None
                assert ["none", "one", "two", "three", "four"].index(one.value) == len(scene.of_kind(one.about))
            if one.kind == "place":
                assert one.about is not None
                assert [thing.place.en for thing in scene.of_kind(one.about)] == [one.value]
                assert one.value in {"left", "right", "top", "bottom", "middle"}
            if one.kind == "food":
                assert {thing.food for thing in scene.things if thing.activity is EATING} == {KIND[one.value]}
        asked = [(one.kind, one.about) for one in questions if one.text not in ("Where is it?", "它在哪里？")]
        assert len(asked) == len(set(asked))
    assert min(kinds.values()) > 30
    assert follow_ups > 50


def test_questions_are_paraphrased() -> None:
    rng = random.Random(0)
    typed = {paraphrase("How many cats are there?", rng) for _ in range(300)}
    assert typed == {f"{first}ow many cats{rest}" for first in "Hh" for rest in (" are there?", " are there", "?", "")}
    assert "图中有多少只猫" in {paraphrase("图中有几只猫？", rng) for _ in range(300)}


@pytest.mark.parametrize("kind", EVALUATED_KINDS)
def test_answers_of_the_evaluation_set_are_balanced(kind: QuestionKind) -> None:
    questions = [question for _, question in balanced_questions("scenes", kind, "en", 100)]
    assert len(questions) == 100
    most = Counter(question.value for question in questions).most_common(1)[0][1]
    shares = {"presence": 50, "count": 20, "place": 20, "activity": 20, "colour": 10, "food": 13, "kind": 2}
    assert most <= shares.get(kind, 20)


def test_training_reads_the_generated_files(tmp_path: Path) -> None:
    for what, *flags in (["captions"], ["dialogues"], ["examination", "--split", "sizes"]):
        done = run(what, "--output_dir", str(tmp_path / what), "--number", "6", "--side", "64", *flags)
        assert done.returncode == 0, done.stderr
    captioned = list(read_shards(open_shards([str(tmp_path / "captions/00000.tar")])))
    assert len(captioned) == 6
    assert {row.turns[0].question for row in captioned} == {""}
    for what, number in (("dialogues", 6), ("examination", 6 * len(EVALUATED_KINDS) * 2)):
        rows = [
            parse_row(fields, origin, tmp_path / what) for origin, fields in read_rows(tmp_path / what / "rows.json")
        ]
        assert len(rows) == number
        assert all(Path(row.images[0]).is_file() for row in rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["examination", "--output_dir", "x"], "--split is required for examination"),
        (["captions", "--output_dir", "x", "--split", "scenes"], "--split is required for examination"),
        (["captions", "--output_dir", "x", "--number", "0"], "--number must be at least 1"),
    ],
)
def test_wrong_flags_are_reported_on_one_line(flags: list[str], message: str) -> None:
    done = run(*flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_evaluation_set_is_complete_where_a_split_lacks_answers() -> None:
    """Only some kinds have a held-out combination with a single kind, so those exceed their share."""
    questions = [question for _, question in balanced_questions("combinations", "kind", "en", 100)]
    asked = Counter(question.value for question in questions)
    assert len(questions) == 100
    assert 15 < len(asked) < 45
    assert max(asked.values()) <= 5
