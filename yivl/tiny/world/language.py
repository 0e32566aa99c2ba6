"""Captions, questions, answers and dialogues about a scene, in English and Chinese.

The texts are data: their spelling and the order of the random draws are fixed.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from yivl.tiny.world import words
from yivl.tiny.world.scenes import Scene, Sign, Thing
from yivl.tiny.world.words import Kind, Language

QuestionKind = Literal[
    "presence", "count", "kind", "kinds", "activity", "food", "colour", "place", "places", "sign", "caption", "detail"
]


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene and its only correct answer."""

    kind: QuestionKind
    text: str
    answer: str
    value: str
    """The content of the answer, the same in both languages."""
    about: Kind | None = None
    """The kind of object the question names."""


_QUESTIONS: Final[dict[QuestionKind, dict[Language, tuple[str, ...]]]] = {
    "presence": {
        "en": ("Is there {one}?", "Do you see {one}?", "Is there {one} in the image?"),
        "zh": ("有{kind.zh}吗？", "图片里有{kind.zh}吗？", "你看到{kind.zh}了吗？"),
    },
    "count": {
        "en": ("How many {kind.plural} are there?", "How many {kind.plural} do you see?", "Count the {kind.plural}."),
        "zh": ("有几{noun}？", "图片里有几{noun}？", "数一数有几{noun}。"),
    },
    "kinds": {
        "en": ("What kinds of things are there?", "Name the things in the image.", "Which things do you see?"),
        "zh": ("有哪些东西？", "说出图片里的东西。", "你看到哪些东西？"),
    },
    "activity": {"en": ("What {be} {subject} doing?",), "zh": ("{subject}在做什么？", "{subject}在干什么？")},
    "food": {"en": ("What {be} {subject} eating?",), "zh": ("{subject}在吃什么？",)},
    "colour": {
        "en": ("What color is the floor?", "What colour is the floor?", "Which color does the floor have?"),
        "zh": ("地板是什么颜色？", "地板是什么颜色的？", "地面是什么颜色？"),
    },
    "place": {
        "en": ("Where {be} the {name}?", "Where in the image {be} the {name}?"),
        "zh": ("{kind.zh}在哪里？", "{kind.zh}在图片的哪里？"),
    },
    "sign": {
        "en": ("What does the sign say?", "Read the sign.", "What is written on the sign?"),
        "zh": ("牌子上写着什么？", "读一下牌子。", "牌子上写了什么？"),
    },
    "caption": {
        "en": ("What is in this image?", "What is in the image?", "What do you see?", "Describe the image."),
        "zh": ("图片里有什么？", "这张图片里有什么？", "你看到了什么？", "描述一下图片。"),
    },
    "detail": {
        "en": ("Describe the image in detail.", "Describe this image in detail.", "Describe the picture in detail."),
        "zh": ("详细描述这张图片。", "请详细描述图片。", "详细描述一下这张图片。"),
    },
}
_LOCATIONS: Final = dict(
    zip(words.PLACES, ("at the top", "on the left", "in the middle", "on the right", "at the bottom"), strict=True)
)
_DOING_ZH: Final = {words.EATING: "吃东西", words.PLAYING: "玩球"}  # the verb alone needs an object in Chinese
# With the prop: English for one object and for several, Chinese; {} is the food.
_DOING_WITH: Final = {
    words.EATING: ("eating {} from a bowl", "eating {} from bowls", "吃碗里的{}"),
    words.PLAYING: ("playing with a ball", "playing with balls", "玩球"),
    words.SLEEPING: ("sleeping on a bed", "sleeping on beds", "在床上睡觉"),
    words.READING: ("reading a book", "reading books", "看书"),
}


def detail(scene: Scene, language: Language) -> str:
    """Return the detailed description: every group with its places and activity, the sign, the background."""
    sentences = [_describe(group, language) for group in _groups(scene)]
    if scene.sign:
        where, text = _where([scene.sign], language), scene.sign.text
        sentences.append(_pick(language, f"A sign {where} says {text}.", f"{where}有一块牌子，上面写着{text}。"))
    return _pick(language, " ", "").join([*sentences, _background(scene, language)])


def caption(scene: Scene, language: Language) -> str:
    """Return one short sentence: the objects and their activity."""
    phrases = []
    for group in _groups(scene):
        phrase = _counted(group, language)
        if group[0].activity:
            phrase += _pick(language, " ", "在") + _doing_with(group, language).removeprefix("在")
        phrases.append(phrase)
    if scene.sign:
        text = scene.sign.text
        phrases.append(_pick(language, f"a sign that says {text}", f"一块写着{text}的牌子"))
    return _sentence(_join(phrases, language) if language == "en" else "，".join(phrases), language)


def json_answer(scene: Scene, language: Language) -> tuple[str, str]:
    """Return a request for JSON and its answer: the count of each kind and the number of objects.

    No stage teaches this skill, so it can be fine-tuned. A kind follows a number and a space, as in all other texts;
    after a quotation mark it would be another token, which the language model has never seen.
    """
    counted = [f"{len(scene.of_kind(kind))} {_pick(language, kind.en, kind.zh)}" for kind in scene.kinds]
    fields = {_pick(language, "things", "东西"): counted, _pick(language, "total", "总数"): len(scene.things)}
    question = _pick(language, "Answer in JSON: what is in the image?", "用JSON回答：图片里有什么？")
    return question, json.dumps(fields, ensure_ascii=False)


def _phrase(kind: QuestionKind, language: Language, rng: random.Random, /, **fields: object) -> str:
    return rng.choice(_QUESTIONS[kind][language]).format(**fields)


def _ask_presence(scene: Scene, language: Language, rng: random.Random) -> SceneQuestion | None:
    absent = rng.random() < 0.5
    kinds = [kind for kind in words.KINDS if (kind in scene.shown) != absent]
    if not kinds:
        return None
    kind = rng.choice(kinds)
    text = _phrase("presence", language, rng, kind=kind, one=_one(kind))
    answer = _pick(language, "No.", "没有。") if absent else _pick(language, "Yes.", "有。")
    return SceneQuestion("presence", text, answer, "no" if absent else "yes", kind)


def _ask_count(scene: Scene, language: Language, rng: random.Random) -> SceneQuestion | None:
    if rng.random() < 0.2:
        kind = rng.choice([kind for kind in words.KINDS if kind not in scene.shown])
    elif scene.kinds:  # props are not counted
        # Single objects are most frequent; these weights make all counts about equally likely.
        kind = rng.choices(scene.kinds, [len(scene.of_kind(kind)) ** 3 for kind in scene.kinds])[0]
    else:
        return None
    text = _phrase("count", language, rng, kind=kind, noun=kind.measure + kind.zh)
    number = words.NUMBERS[len(scene.of_kind(kind))]
    if number is words.NUMBERS[0]:
        return SceneQuestion("count", text, _pick(language, "None.", "没有。"), "none", kind)
    answer = _pick(language, f"{number.en.capitalize()}.", f"{number.zh}{kind.measure}。")
    return SceneQuestion("count", text, answer, number.en, kind)


def _ask_kinds(scene: Scene, language: Language, rng: random.Random) -> SceneQuestion | None:
    if not scene.kinds:
        return None
    text = _phrase("kinds", language, rng)
    answer = _pick(language, ", ", "、").join(_pick(language, kind.en, kind.zh) for kind in scene.kinds)
    value = " ".join(kind.en for kind in scene.kinds)
    return SceneQuestion("kind" if len(scene.kinds) == 1 else "kinds", text, answer, value)


def _ask_activity(scene: Scene, language: Language, rng: random.Random) -> SceneQuestion | None:
    groups = [group for group in _groups(scene) if group[0].kind in words.ANIMALS]
    acting = [group for group in groups if group[0].activity]
    if not groups or (not acting and rng.random() < 0.6):
        return None  # most animals have no activity; they are asked about less often
    group = rng.choice(acting if acting and rng.random() < 0.8 else groups)
    kind, activity, be, who = group[0].kind, group[0].activity, _be(group), _it(group, language)
    # A pronoun in the question only where it is unambiguous.
    named = len(groups) > 1 or rng.random() < 0.5
    subject = _pick(language, f"the {_name(group)}", kind.zh) if named else who
    text = _phrase("activity", language, rng, be=be, subject=subject)
    if activity is None:
        answer = _pick(language, f"{who.capitalize()} {be} not doing anything.", f"{who}什么也没做。")
        return SceneQuestion("activity", text, answer, "none", kind)
    doing = _DOING_ZH.get(activity, activity.zh)
    answer = _pick(language, f"{who.capitalize()} {be} {activity.en}.", f"{who}在{doing}。")
    return SceneQuestion("activity", text, answer, activity.en, kind)


def _ask_food(scene: Scene, language: Language, rng: random.Random) -> SceneQuestion | None:
    group = next((group for group in _groups(scene) if group[0].activity is words.EATING), None)
    if group is None:
        return None
    who, be, food, eaten = _it(group, language), _be(group), group[0].food, _food(group, language)
    assert food is not None
    subject = _pick(language, f"the {_name(group)}", group[0].kind.zh) if rng.random() < 0.5 else who
    text = _phrase("food", language, rng, be=be, subject=subject)
    answer = _pick(language, f"{who.capitalize()} {be} eating {eaten}.", f"{who}在吃{eaten}。")
    return SceneQuestion("food", text, answer, food.en)


def _ask_colour(scene: Scene, language: Language, rng: random.Random) -> SceneQuestion | None:
    answer = _sentence(_pick(language, scene.floor.en, scene.floor.zh), language)
    return SceneQuestion("colour", _phrase("colour", language, rng), answer, scene.floor.en)


def _ask_place(scene: Scene, language: Language, rng: random.Random) -> SceneQuestion | None:
    if not scene.kinds:
        return None
    kind = rng.choice(scene.kinds)
    things = scene.of_kind(kind)
    text = _phrase("place", language, rng, kind=kind, be=_be(things), name=_name(things))
    value = " ".join(thing.place.en for thing in things)
    answer = _sentence(_where(things, language), language)
    return SceneQuestion("place" if len(things) == 1 else "places", text, answer, value, kind)


def _ask_sign(scene: Scene, language: Language, rng: random.Random) -> SceneQuestion | None:
    if scene.sign is None and rng.random() < 0.8:
        return None  # keep most answers readable from the image
    text = _phrase("sign", language, rng)
    if scene.sign is None:
        return SceneQuestion("sign", text, _pick(language, "There is no sign.", "没有牌子。"), "none")
    return SceneQuestion("sign", text, scene.sign.text, scene.sign.text)


def _ask_caption(scene: Scene, language: Language, rng: random.Random) -> SceneQuestion | None:
    return SceneQuestion("caption", _phrase("caption", language, rng), caption(scene, language), caption(scene, "en"))


def _ask_detail(scene: Scene, language: Language, rng: random.Random) -> SceneQuestion | None:
    group = next((group for group in _groups(scene) if group[0].activity), None)
    if group and rng.random() < 0.4:
        who, kind = _it(group, language), group[0].kind
        en = f"Describe the {_name(group)} and what {who} {_be(group)} doing in detail."
        text = _pick(language, en, f"详细描述{kind.zh}以及{who}在做什么。")
        answer = _pick(language, " ", "").join((_describe(group, language), _background(scene, language)))
        return SceneQuestion("detail", text, answer, "")
    return SceneQuestion("detail", _phrase("detail", language, rng), detail(scene, language), "")


ASK: Final[dict[str, Callable[[Scene, Language, random.Random], SceneQuestion | None]]] = {
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
"""Functions that return a question of a kind, or ``None`` where the scene allows none."""
_WEIGHTS: Final = (4, 4, 2, 2, 6, 1, 4, 3, 2, 1)  # sampling weights in the order of ASK; higher for skills learned late
_MAX_OF_KIND: Final = 2  # questions of one kind in a dialogue


def dialogue(scene: Scene, language: Language, rng: random.Random, length: int = 8) -> list[SceneQuestion]:
    """Return at most ``length`` different questions about a scene in random order, with follow-up questions.

    A follow-up refers to the object of the previous question as "it", so it needs the history.
    """
    asked: list[SceneQuestion] = []
    used: Counter[str] = Counter()
    for _ in range(8 * length):
        if len(asked) >= length:
            break
        name = rng.choices(list(ASK), _WEIGHTS)[0]
        question = ASK[name](scene, language, rng) if used[name] < _MAX_OF_KIND else None
        if question is None or any((one.kind, one.about) == (question.kind, question.about) for one in asked):
            continue
        asked.append(question)
        used[name] += 1
        if rng.random() < 0.4 and (follow_up := _follow_up(scene, language, question)):
            asked.append(follow_up)
    return asked[:length]


_PARAPHRASES: Final = (
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


def paraphrase(question: str, rng: random.Random) -> str:
    """Return a question with random variations: other words, a lowercase first letter, no punctuation at the end."""
    if rng.random() < 0.3:
        question = question.replace(*rng.choice(_PARAPHRASES))
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    return question.rstrip("?.？。") if rng.random() < 0.15 else question


def _follow_up(scene: Scene, language: Language, question: SceneQuestion) -> SceneQuestion | None:
    """Return "Where is it?" after a question about the only object of its kind."""
    things = scene.of_kind(question.about) if question.about else []
    if question.kind not in ("presence", "count") or len(things) != 1:
        return None
    text, answer = _pick(language, "Where is it?", "它在哪里？"), _sentence(_where(things, language), language)
    return SceneQuestion("place", text, answer, things[0].place.en, question.about)


def _groups(scene: Scene) -> list[list[Thing]]:
    """Return the objects by kind, in reading order."""
    return [scene.of_kind(kind) for kind in scene.kinds]


def _describe(group: Sequence[Thing], language: Language) -> str:
    places, counted, who, be = _where(group, language), _counted(group, language), _it(group, language), _be(group)
    text = _pick(language, f"There {be} {counted} {places}.", f"{counted}{places}。")
    if group[0].activity:
        doing = _doing_with(group, language)
        text += _pick(language, f" {who.capitalize()} {be} {doing}.", f"{who}在{doing.removeprefix('在')}。")
    return text


def _where(things: Sequence[Thing | Sign], language: Language) -> str:
    if language == "en":
        return _join([_LOCATIONS[thing.place] for thing in things], language)
    return "在" + _join([thing.place.zh for thing in things], language)


def _background(scene: Scene, language: Language) -> str:
    floor, wall = _pick(language, scene.floor.en, scene.floor.zh), _pick(language, scene.wall.en, scene.wall.zh)
    return _pick(language, f"The floor is {floor} and the wall is {wall}.", f"地板是{floor}，墙是{wall}。")


def _doing_with(group: Sequence[Thing], language: Language) -> str:
    activity = group[0].activity
    assert activity is not None
    one, several, zh = _DOING_WITH[activity]
    phrase = _pick(language, one if len(group) == 1 else several, zh)
    return phrase.format(_food(group, language)) if activity is words.EATING else phrase


def _food(group: Sequence[Thing], language: Language) -> str:
    food = group[0].food
    assert food is not None
    return _pick(language, _one(food) if len(group) == 1 else food.plural, food.zh)


def _counted(group: Sequence[Thing], language: Language) -> str:
    kind, number = group[0].kind, words.NUMBERS[len(group)]
    en = _one(kind) if len(group) == 1 else f"{number.en} {kind.plural}"
    return _pick(language, en, f"{number.zh}{kind.measure}{kind.zh}")


def _one(kind: Kind) -> str:
    return f"{'an' if kind.en[0] in 'aeio' or kind.en == 'umbrella' else 'a'} {kind.en}"


def _be(group: Sequence[Thing]) -> str:
    return "is" if len(group) == 1 else "are"


def _name(group: Sequence[Thing]) -> str:
    return group[0].kind.en if len(group) == 1 else group[0].kind.plural


def _it(group: Sequence[Thing], language: Language) -> str:
    return _pick(language, "it", "它") if len(group) == 1 else _pick(language, "they", "它们")


def _join(phrases: Sequence[str], language: Language) -> str:
    *first, last = phrases
    if not first:
        return last
    return _pick(language, f"{', '.join(first)} and {last}", f"{'、'.join(first)}和{last}")


def _sentence(text: str, language: Language) -> str:
    return _pick(language, f"{text[0].upper()}{text[1:]}.", f"{text}。")


def _pick(language: Language, en: str, zh: str) -> str:
    return en if language == "en" else zh
