"""What is said of a scene: captions, questions and answers, conversations; English and Chinese."""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from yivl.tiny.world.scenes import Scene, Sign, Thing
from yivl.tiny.world.words import (
    ANIMALS,
    BOTTOM,
    EATING,
    KINDS,
    LEFT,
    MIDDLE,
    NUMBERS,
    PLAYING,
    READING,
    RIGHT,
    SLEEPING,
    TOP,
    Kind,
    Language,
    Word,
)

QuestionKind = Literal[
    "presence", "count", "kind", "kinds", "activity", "food", "colour", "place", "places", "sign", "caption", "detail"
]


@dataclass(frozen=True)
class Question:
    """A question about a scene, and its one right answer."""

    kind: QuestionKind
    text: str
    answer: str
    value: str
    """What the answer says, the same in both languages."""
    about: Kind | None = None
    """The kind of thing it asks for."""


_PLACES: Final = {
    TOP: Word("at the top", "上边"),
    LEFT: Word("on the left", "左边"),
    MIDDLE: Word("in the middle", "中间"),
    RIGHT: Word("on the right", "右边"),
    BOTTOM: Word("at the bottom", "下边"),
}
_DOING: Final = {
    EATING: Word("eating", "吃东西"),
    PLAYING: Word("playing", "玩球"),
    SLEEPING: Word("sleeping", "睡觉"),
    READING: Word("reading", "看书"),
}
# With what; {} is the food.
_DOING_WITH: Final = {
    EATING: (Word("eating {} from a bowl", "吃碗里的{}"), Word("eating {} from bowls", "吃碗里的{}")),
    PLAYING: (Word("playing with a ball", "玩球"), Word("playing with balls", "玩球")),
    SLEEPING: (Word("sleeping on a bed", "在床上睡觉"), Word("sleeping on beds", "在床上睡觉")),
    READING: (Word("reading a book", "看书"), Word("reading books", "看书")),
}


def detail(scene: Scene, language: Language) -> str:
    """Return all there is to say of a scene."""
    sentences = [_sentences(group, language) for group in _groups(scene)]
    if scene.sign:
        where = _where([scene.sign], language)
        sentences.append(
            f"A sign {where} says {scene.sign.text}."
            if language == "en"
            else f"{where}有一块牌子，上面写着{scene.sign.text}。"
        )
    sentences.append(_background(scene, language))
    return _space(language).join(sentences)


def caption(scene: Scene, language: Language) -> str:
    """Return one short sentence: what there is, and what it is doing."""
    parts = []
    for group in _groups(scene):
        part = _counted(group[0].kind, len(group), language)
        if group[0].activity:
            doing = _doing_with(group, language)
            part += f" {doing}" if language == "en" else f"在{doing.removeprefix('在')}"
        parts.append(part)
    if scene.sign:
        text = scene.sign.text
        parts.append(f"a sign that says {text}" if language == "en" else f"一块写着{text}的牌子")
    if language == "en":
        sentence = _join(parts, language) + "."
        return sentence[0].upper() + sentence[1:]
    return "，".join(parts) + "。"


def json_answer(scene: Scene, language: Language) -> tuple[str, str]:
    """Return a question for an answer in JSON, and that answer: how many of each kind, and how many things in all.

    A skill that no stage teaches: something to fine-tune for. A kind stands behind a number and a blank, as words do
    everywhere else; right behind a quotation mark it would be another token, which the language model has never used.
    """
    counted = [f"{len(scene.of_kind(kind))} {_say(kind, language)}" for kind in scene.kinds]
    fields = {_pick(language, "things", "东西"): counted, _pick(language, "total", "总数"): len(scene.things)}
    question = _pick(language, "Answer in JSON: what is in the image?", "用JSON回答：图片里有什么？")
    return question, json.dumps(fields, ensure_ascii=False)


Ask = Callable[[Scene, Language, random.Random], Question | None]


def _ask_presence(scene: Scene, language: Language, rng: random.Random) -> Question | None:
    absent = rng.random() < 0.5
    kinds = [kind for kind in KINDS if (kind in scene.shown) != absent]
    if not kinds:
        return None
    kind = rng.choice(kinds)
    name = _say(kind, language)
    text = _choose(
        rng,
        language,
        (f"Is there {_one(kind)}?", f"Do you see {_one(kind)}?", f"Is there {_one(kind)} in the image?"),
        (f"有{name}吗？", f"图片里有{name}吗？", f"你看到{name}了吗？"),
    )
    if kind in scene.shown:
        return Question("presence", text, _pick(language, "Yes.", "有。"), "yes", kind)
    return Question("presence", text, _pick(language, "No.", "没有。"), "no", kind)


def _ask_count(scene: Scene, language: Language, rng: random.Random) -> Question | None:
    if rng.random() < 0.2:
        kind = rng.choice([kind for kind in KINDS if kind not in scene.shown])
    elif scene.kinds:  # what animals use is not counted
        # Single things are most frequent; weighted so, all counts are asked for about equally often.
        kind = rng.choices(scene.kinds, [len(scene.of_kind(kind)) ** 3 for kind in scene.kinds])[0]
    else:
        return None
    text = _choose(
        rng,
        language,
        (f"How many {kind.plural} are there?", f"How many {kind.plural} do you see?", f"Count the {kind.plural}."),
        (
            f"有几{kind.measure}{kind.zh}？",
            f"图片里有几{kind.measure}{kind.zh}？",
            f"数一数有几{kind.measure}{kind.zh}。",
        ),
    )
    number = NUMBERS[len(scene.of_kind(kind))]
    if number is NUMBERS[0]:
        return Question("count", text, _pick(language, "None.", "没有。"), "none", kind)
    answer = _pick(language, f"{number.en.capitalize()}.", f"{number.zh}{kind.measure}。")
    return Question("count", text, answer, number.en, kind)


def _ask_kinds(scene: Scene, language: Language, rng: random.Random) -> Question | None:
    if not scene.kinds:
        return None
    text = _choose(
        rng,
        language,
        ("What kinds of things are there?", "Name the things in the image.", "Which things do you see?"),
        ("有哪些东西？", "说出图片里的东西。", "你看到哪些东西？"),
    )
    names = [_say(kind, language) for kind in scene.kinds]
    value = " ".join(kind.en for kind in scene.kinds)
    return Question("kind" if len(names) == 1 else "kinds", text, _pick(language, ", ", "、").join(names), value)


def _ask_activity(scene: Scene, language: Language, rng: random.Random) -> Question | None:
    groups = [group for group in _groups(scene) if group[0].kind in ANIMALS]
    acting = [group for group in groups if group[0].activity]
    if not groups or (not acting and rng.random() < 0.6):
        return None  # most animals do nothing; they are asked about less often
    group = rng.choice(acting if acting and rng.random() < 0.8 else groups)
    kind, number, activity = group[0].kind, len(group), group[0].activity
    # "They" only where there is no doubt who is meant.
    named = len(groups) > 1 or rng.random() < 0.5
    en = (f"the {kind.en if number == 1 else kind.plural}") if named else ("it" if number == 1 else "they")
    zh = kind.zh if named else ("它" if number == 1 else "它们")
    verb = "is" if number == 1 else "are"
    text = _choose(rng, language, (f"What {verb} {en} doing?",), (f"{zh}在做什么？", f"{zh}在干什么？"))
    who = _pick(language, f"{_pronoun(number, 'en').capitalize()} {verb}", _pronoun(number, "zh"))
    if activity is None:
        return Question(
            "activity", text, _pick(language, f"{who} not doing anything.", f"{who}什么也没做。"), "none", kind
        )
    answer = _pick(language, f"{who} {_DOING[activity].en}.", f"{who}在{_DOING[activity].zh}。")
    return Question("activity", text, answer, activity.en, kind)


def _ask_food(scene: Scene, language: Language, rng: random.Random) -> Question | None:
    group = next((group for group in _groups(scene) if group[0].activity is EATING), None)
    if group is None:
        return None
    kind, number = group[0].kind, len(group)
    named = rng.random() < 0.5
    en = (f"the {kind.en if number == 1 else kind.plural}") if named else ("it" if number == 1 else "they")
    zh = kind.zh if named else _pronoun(number, "zh")
    verb = "is" if number == 1 else "are"
    text = _choose(rng, language, (f"What {verb} {en} eating?",), (f"{zh}在吃什么？",))
    who = _pronoun(number, language)
    food = group[0].food
    assert food is not None
    answer = (
        f"{who.capitalize()} {verb} eating {_food(group, language)}." if language == "en" else f"{who}在吃{food.zh}。"
    )
    return Question("food", text, answer, food.en)


def _ask_colour(scene: Scene, language: Language, rng: random.Random) -> Question | None:
    text = _choose(
        rng,
        language,
        ("What color is the floor?", "What colour is the floor?", "Which color does the floor have?"),
        ("地板是什么颜色？", "地板是什么颜色的？", "地面是什么颜色？"),
    )
    answer = _pick(language, f"{scene.floor.en.capitalize()}.", f"{scene.floor.zh}。")
    return Question("colour", text, answer, scene.floor.en)


def _ask_place(scene: Scene, language: Language, rng: random.Random) -> Question | None:
    if not scene.kinds:
        return None
    kind = rng.choice(scene.kinds)
    things = scene.of_kind(kind)
    en = f"is the {kind.en}" if len(things) == 1 else f"are the {kind.plural}"
    text = _choose(
        rng,
        language,
        (f"Where {en}?", f"Where in the image {en}?"),
        (f"{kind.zh}在哪里？", f"{kind.zh}在图片的哪里？"),
    )
    answer = _sentence(_where(things, language), language)
    return Question(
        "place" if len(things) == 1 else "places", text, answer, " ".join(thing.place.en for thing in things), kind
    )


def _ask_sign(scene: Scene, language: Language, rng: random.Random) -> Question | None:
    if scene.sign is None and rng.random() < 0.8:
        return None  # rarely, so that most answers are read
    text = _choose(
        rng,
        language,
        ("What does the sign say?", "Read the sign.", "What is written on the sign?"),
        ("牌子上写着什么？", "读一下牌子。", "牌子上写了什么？"),
    )
    if scene.sign is None:
        return Question("sign", text, _pick(language, "There is no sign.", "没有牌子。"), "none")
    return Question("sign", text, scene.sign.text, scene.sign.text)


def _ask_caption(scene: Scene, language: Language, rng: random.Random) -> Question | None:
    text = _choose(
        rng,
        language,
        ("What is in this image?", "What is in the image?", "What do you see?", "Describe the image."),
        ("图片里有什么？", "这张图片里有什么？", "你看到了什么？", "描述一下图片。"),
    )
    return Question("caption", text, caption(scene, language), caption(scene, "en"))


def _ask_detail(scene: Scene, language: Language, rng: random.Random) -> Question | None:
    actors = [group for group in _groups(scene) if group[0].activity]
    if actors and rng.random() < 0.4:
        group = actors[0]
        kind, one = group[0].kind, len(group) == 1
        text = _pick(
            language,
            f"Describe the {kind.en} and what it is doing in detail."
            if one
            else f"Describe the {kind.plural} and what they are doing in detail.",
            f"详细描述{kind.zh}以及{_pronoun(len(group), 'zh')}在做什么。",
        )
        said = (_sentences(group, language), _background(scene, language))
        return Question("detail", text, _space(language).join(said), "")
    text = _choose(
        rng,
        language,
        ("Describe the image in detail.", "Describe this image in detail.", "Describe the picture in detail."),
        ("详细描述这张图片。", "请详细描述图片。", "详细描述一下这张图片。"),
    )
    return Question("detail", text, detail(scene, language), "")


ASK: Final[dict[str, Ask]] = {
    "presence": _ask_presence,
    "count": _ask_count,
    "kinds": _ask_kinds,
    "activity": _ask_activity,
    "food": _ask_food,
    "colour": _ask_colour,
    "place": _ask_place,
    "sign": _ask_sign,
    "caption": _ask_caption,
    "detail": _ask_detail,
}
# How often each is tried, as long as a scene allows it. The slow skills more often.
_WEIGHTS: Final = {
    "presence": 4,
    "count": 4,
    "kinds": 2,
    "activity": 2,
    "food": 6,
    "colour": 1,
    "place": 4,
    "sign": 3,
    "caption": 2,
    "detail": 1,
}
_MOST: Final = 2  # questions of one kind in a conversation


def conversation(scene: Scene, language: Language, rng: random.Random, length: int) -> list[Question]:
    """Return at most ``length`` questions about a scene in random order, none twice, with follow-ups.

    A follow-up says "it" of what the question before asked for, so it needs the history.
    """
    asked: list[Question] = []
    used: Counter[str] = Counter()
    names, weights = list(_WEIGHTS), list(_WEIGHTS.values())
    for _ in range(8 * length):
        if len(asked) >= length:
            break
        name = rng.choices(names, weights)[0]
        question = ASK[name](scene, language, rng) if used[name] < _MOST else None
        if question is None or any((one.kind, one.about) == (question.kind, question.about) for one in asked):
            continue
        asked.append(question)
        used[name] += 1
        if rng.random() < 0.4 and (follow_up := _follow_up(scene, language, question)):
            asked.append(follow_up)
    return asked[:length]


# What people type instead, by the words it replaces.
_OTHER_WORDS: Final = (
    (" are there?", "?"),
    ("the image", "the picture"),
    ("this image", "the photo"),
    ("the image", "this picture"),
    ("What is", "What's"),
    ("Is there", "Can you see"),
    ("图片里", "图中"),
    ("图片", "照片"),
    ("几", "多少"),
    ("什么颜色", "哪种颜色"),
)


def casually(question: str, rng: random.Random) -> str:
    """Return a question the way people type it: now and then in other words, in small letters, without its mark."""
    if rng.random() < 0.3:
        old, new = rng.choice(_OTHER_WORDS)
        question = question.replace(old, new)
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    return question.rstrip("?.？。") if rng.random() < 0.15 else question


def _follow_up(scene: Scene, language: Language, question: Question) -> Question | None:
    """Return "where is it?" after a question whose answer is that there is exactly one."""
    if question.kind not in ("presence", "count") or question.about not in scene.kinds:
        return None
    things = scene.of_kind(question.about)
    if len(things) != 1:
        return None
    text = _pick(language, "Where is it?", "它在哪里？")
    return Question("place", text, _sentence(_where(things, language), language), things[0].place.en, question.about)


def _groups(scene: Scene) -> list[list[Thing]]:
    """Return the things of each kind, in reading order."""
    return [scene.of_kind(kind) for kind in scene.kinds]


def _sentences(group: Sequence[Thing], language: Language) -> str:
    kind, number, activity = group[0].kind, len(group), group[0].activity
    places = _where(group, language)
    counted = _counted(kind, number, language)
    if language == "en":
        said = f"There {'is' if number == 1 else 'are'} {counted} {places}."
        if activity:
            said += (
                f" {_pronoun(number, 'en').capitalize()} {'is' if number == 1 else 'are'} {_doing_with(group, 'en')}."
            )
        return said
    said = f"{counted}{places}。"
    return said + f"{_pronoun(number, 'zh')}在{_doing_with(group, 'zh').removeprefix('在')}。" if activity else said


def _where(things: Sequence[Thing | Sign], language: Language) -> str:
    places = _join([_say(_PLACES[thing.place], language) for thing in things], language)
    return _pick(language, places, f"在{places}")


def _background(scene: Scene, language: Language) -> str:
    if language == "en":
        return f"The floor is {scene.floor.en} and the wall is {scene.wall.en}."
    return f"地板是{scene.floor.zh}，墙是{scene.wall.zh}。"


def _doing_with(group: Sequence[Thing], language: Language) -> str:
    activity = group[0].activity
    assert activity is not None
    said = _say(_DOING_WITH[activity][len(group) > 1], language)
    return said.format(_food(group, language)) if activity is EATING else said


def _food(group: Sequence[Thing], language: Language) -> str:
    food = group[0].food
    assert food is not None
    return food.zh if language == "zh" else _one(food) if len(group) == 1 else food.plural


def _counted(kind: Kind, number: int, language: Language) -> str:
    if language == "zh":
        return f"{NUMBERS[number].zh}{kind.measure}{kind.zh}"
    return _one(kind) if number == 1 else f"{NUMBERS[number].en} {kind.plural}"


def _one(kind: Kind) -> str:
    return f"{'an' if kind.en[0] in 'aeio' or kind.en == 'umbrella' else 'a'} {kind.en}"


def _pronoun(number: int, language: Language) -> str:
    return _pick(language, "it" if number == 1 else "they", "它" if number == 1 else "它们")


def _join(parts: Sequence[str], language: Language) -> str:
    *first, last = parts
    if not first:
        return last
    return f"{', '.join(first)} and {last}" if language == "en" else f"{'、'.join(first)}和{last}"


def _sentence(text: str, language: Language) -> str:
    return f"{text[0].upper()}{text[1:]}." if language == "en" else f"{text}。"


def _say(word: Word, language: Language) -> str:
    return word.en if language == "en" else word.zh


def _pick(language: Language, en: str, zh: str) -> str:
    return en if language == "en" else zh


def _space(language: Language) -> str:
    return _pick(language, " ", "")


def _choose(rng: random.Random, language: Language, en: Sequence[str], zh: Sequence[str]) -> str:
    return rng.choice(en if language == "en" else zh)
