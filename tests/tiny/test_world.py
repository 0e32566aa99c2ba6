"""The world of pictures: the same everywhere, splits that hold out what they say, texts that agree with the scene."""

import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from yivl.data.rows import parse_row, read_rows
from yivl.data.streaming import open_shards, read_shards
from yivl.tiny.world.drawing import draw
from yivl.tiny.world.exam import EXAM_KINDS, examine
from yivl.tiny.world.examples import EXAMPLES
from yivl.tiny.world.language import caption, casually, conversation, detail, json_answer
from yivl.tiny.world.scenes import MAX_THINGS, SPLITS, is_held_out, sample_scene
from yivl.tiny.world.words import ACTIVITIES, EATING, KIND, KINDS, LANGUAGES, PLACES, SIGN, SIGN_TEXTS, Language

ROOT = Path(__file__).parents[2]
SCENES = {split: [sample_scene(split, number) for number in range(300)] for split in SPLITS}


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "yivl.tiny.world", *arguments], cwd=ROOT, text=True, capture_output=True, timeout=120
    )


def test_the_held_out_scenes_are_the_same_on_every_machine() -> None:
    """The evaluation set is published as its seed: this is the set."""
    described = json.dumps([asdict(scene) for split in SPLITS for scene in SCENES[split]], sort_keys=True)
    asked = [
        (task.question.text, task.question.answer)
        for kind in EXAM_KINDS
        for language in LANGUAGES
        for task in examine("scenes", kind, language, 40)
    ]
    assert hashlib.sha256(described.encode()).hexdigest()[:16] == "1dafdbc0972f8dda"
    assert hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16] == "cf1c6fc54eeeb695"


def test_pictures_are_the_same_every_time() -> None:
    scene = sample_scene("scenes", 3)
    assert np.array_equal(draw(scene, 96).image, draw(scene, 96).image)


def test_the_world_is_as_large_as_it_says() -> None:
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
def test_patches_name_what_is_there(grid: int) -> None:
    shown = missing = 0
    for scene in SCENES["scenes"][:100]:
        patches = draw(scene, grid * 16).patches(grid)
        assert len(patches) == grid * grid
        named = {word for patch in patches for word in patch}
        assert (SIGN in named) == (scene.sign is not None)
        for thing in scene.things:
            seen = any(thing.kind in patch and thing.place in patch for patch in patches)
            shown, missing = shown + seen, missing + (not seen)
        assert not named & set(KINDS) - scene.shown
    # What stands in front may hide a small thing.
    assert missing <= 0.02 * shown


def test_a_scene_in_words() -> None:
    cats = EXAMPLES["cats.jpg"]
    assert caption(cats, "en") == "Three cats eating fish from bowls."
    assert caption(cats, "zh") == "三只猫在吃碗里的鱼。"
    assert detail(cats, "en") == (
        "There are three cats on the left, on the right and at the bottom. They are eating fish from bowls. "
        "The floor is grey and the wall is blue."
    )
    assert detail(cats, "zh") == "三只猫在左边、右边和下边。它们在吃碗里的鱼。地板是灰色，墙是蓝色。"
    assert caption(EXAMPLES["exit.jpg"], "en") == "A dog playing with a ball, an umbrella and a sign that says 出口."
    assert caption(EXAMPLES["exit.jpg"], "zh") == "一只狗在玩球，一把雨伞，一块写着出口的牌子。"
    assert json_answer(cats, "en")[1] == '{"things": ["3 cat"], "total": 3}'


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_agree_with_the_scene(language: Language) -> None:
    rng = random.Random(0)
    kinds: Counter[str] = Counter()
    follow_ups = 0
    for scene in SCENES["train"]:
        questions = conversation(scene, language, rng, 8)
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


def test_people_type_questions_in_many_ways() -> None:
    rng = random.Random(0)
    typed = {casually("How many cats are there?", rng) for _ in range(300)}
    assert typed == {f"{first}ow many cats{rest}" for first in "Hh" for rest in (" are there?", " are there", "?", "")}
    assert "图中有多少只猫" in {casually("图中有几只猫？", rng) for _ in range(300)}


@pytest.mark.parametrize("kind", EXAM_KINDS)
def test_examinations_are_balanced(kind: str) -> None:
    tasks = list(examine("scenes", kind, "en", 100))
    assert len(tasks) == 100
    most = Counter(task.question.value for task in tasks).most_common(1)[0][1]
    shares = {"presence": 50, "count": 20, "place": 20, "activity": 20, "colour": 10, "food": 13, "kind": 2}
    assert most <= shares.get(kind, 20)


def test_files_are_what_training_reads(tmp_path: Path) -> None:
    for what, *flags in (["captions"], ["dialogues"], ["examination", "--split", "sizes"]):
        done = run(what, "--output_dir", str(tmp_path / what), "--number", "6", "--side", "64", *flags)
        assert done.returncode == 0, done.stderr
    captioned = list(read_shards(open_shards([str(tmp_path / "captions/00000.tar")])))
    assert len(captioned) == 6
    assert {row.turns[0].question for row in captioned} == {""}
    for what, number in (("dialogues", 6), ("examination", 6 * len(EXAM_KINDS) * 2)):
        rows = [
            parse_row(fields, origin, tmp_path / what) for origin, fields in read_rows(tmp_path / what / "rows.json")
        ]
        assert len(rows) == number
        assert all(Path(row.images[0]).is_file() for row in rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["examination", "--output_dir", "x"], "--split belongs to an examination"),
        (["captions", "--output_dir", "x", "--split", "scenes"], "--split belongs to an examination"),
        (["captions", "--output_dir", "x", "--number", "0"], "--number is at least 1"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], message: str) -> None:
    done = run(*flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_examination_ends_where_a_split_lacks_values() -> None:
    """Only some kinds have a combination of their own that was never trained, so those are asked for more often."""
    tasks = list(examine("combinations", "kind", "en", 100))
    asked = Counter(task.question.value for task in tasks)
    assert len(tasks) == 100
    assert 15 < len(asked) < 45
    assert max(asked.values()) <= 5
