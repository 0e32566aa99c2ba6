"""The objects, activities, places, colors and sign texts of the synthetic world, named in English and Chinese.

Names follow Unicode CLDR (``assets/world/LICENSES.md``), shortened to everyday words.
"""

from dataclasses import dataclass
from typing import Final, Literal

Language = Literal["en", "zh"]
LANGUAGES: Final[tuple[Language, ...]] = ("en", "zh")


@dataclass(frozen=True)
class Word:
    """Name of a concept in both languages."""

    en: str
    zh: str


@dataclass(frozen=True)
class Kind(Word):
    """A class of objects, with the words needed to count them."""

    plural: str
    measure: str
    """Chinese measure word."""
    emoji: str
    """Character of the Noto Emoji font; ``scripts/make_sprites.py`` draws the sprite from it."""


def _kinds(table: str) -> tuple[Kind, ...]:
    rows = (row.split() for row in table.split(","))
    return tuple(Kind(en, zh, plural, measure, emoji) for emoji, en, plural, zh, measure in rows)


ANIMALS: Final = _kinds(
    """
    🐈 cat cats 猫 只, 🐕 dog dogs 狗 只, 🐄 cow cows 奶牛 头, 🐖 pig pigs 猪 头,
    🐎 horse horses 马 匹, 🐑 sheep sheep 绵羊 只, 🐇 rabbit rabbits 兔子 只, 🐦 bird birds 鸟 只,
    🐘 elephant elephants 大象 头, 🐒 monkey monkeys 猴子 只, 🦊 fox foxes 狐狸 只, 🐻 bear bears 熊 只,
    🐼 panda pandas 熊猫 只, 🐅 tiger tigers 老虎 只, 🦁 lion lions 狮子 只, 🦆 duck ducks 鸭子 只,
    🦉 owl owls 猫头鹰 只, 🐧 penguin penguins 企鹅 只, 🐢 turtle turtles 乌龟 只, 🐸 frog frogs 青蛙 只
    """
)
FOODS: Final = _kinds(
    """
    🐟 fish fish 鱼 条, 🍎 apple apples 苹果 个, 🍌 banana bananas 香蕉 根, 🍓 strawberry strawberries 草莓 颗,
    🥕 carrot carrots 胡萝卜 根, 🍰 cake cakes 蛋糕 块, 🍕 pizza pizzas 披萨 块, 🥚 egg eggs 鸡蛋 个
    """
)
OTHERS: Final = _kinds(
    """
    🚗 car cars 汽车 辆, 🚌 bus buses 公交车 辆, 🚂 train trains 火车 列, 🚲 bicycle bicycles 自行车 辆,
    ⛵ boat boats 帆船 艘, ✈ plane planes 飞机 架, 🚜 tractor tractors 拖拉机 辆, 🪑 chair chairs 椅子 把,
    🛏 bed beds 床 张, 🛋 sofa sofas 沙发 张, 🌳 tree trees 树 棵, 🌻 sunflower sunflowers 向日葵 朵,
    🌵 cactus cacti 仙人掌 棵, 🍄 mushroom mushrooms 蘑菇 朵, 🔨 hammer hammers 锤子 把, 🔑 key keys 钥匙 把,
    🪓 axe axes 斧头 把, ⚽ ball balls 球 个, 📖 book books 书 本, 🥣 bowl bowls 碗 个,
    ☂ umbrella umbrellas 雨伞 把, 🎩 hat hats 帽子 顶, ⏰ clock clocks 闹钟 个, 🎸 guitar guitars 吉他 把
    """
)
KINDS: Final = ANIMALS + FOODS + OTHERS
"""In the order of the sprite sheet, row by row."""
KIND: Final = {kind.en: kind for kind in KINDS}


@dataclass(frozen=True)
class Activity(Word):
    """An activity of animals, which takes a prop."""

    prop: Kind


ACTIVITIES: Final = (
    Activity("eating", "吃", KIND["bowl"]),
    Activity("playing", "玩", KIND["ball"]),
    Activity("sleeping", "睡觉", KIND["bed"]),
    Activity("reading", "看书", KIND["book"]),
)
EATING, PLAYING, SLEEPING, READING = ACTIVITIES

_PLACES: Final = "top 上边, left 左边, middle 中间, right 右边, bottom 下边"
PLACES: Final = tuple(Word(*place.split()) for place in _PLACES.split(","))
"""In reading order."""
TOP, LEFT, MIDDLE, RIGHT, BOTTOM = PLACES

COLORS: Final = {
    Word("red", "红色"): (205, 50, 45),
    Word("orange", "橙色"): (240, 145, 40),
    Word("yellow", "黄色"): (245, 220, 70),
    Word("green", "绿色"): (85, 165, 75),
    Word("blue", "蓝色"): (65, 120, 205),
    Word("purple", "紫色"): (135, 80, 170),
    Word("pink", "粉色"): (245, 165, 190),
    Word("brown", "棕色"): (130, 90, 55),
    Word("grey", "灰色"): (140, 140, 140),
    Word("white", "白色"): (240, 240, 238),
}
"""Colors of floors and walls, 8-bit RGB."""

NUMBERS: Final = (Word("no", "没有"), Word("one", "一"), Word("two", "两"), Word("three", "三"), Word("four", "四"))
"""Counts, by number."""

_ENGLISH: Final = "STOP EXIT OPEN SALE TAXI ZOO PARK CAFE HOTEL FARM BANK BEACH MENU FREE HOT COLD NEW PUSH PULL SHOP"
_CHINESE: Final = "出口 入口 停车 学校 医院 银行 饭店 公园 商店 车站 邮局 茶馆 农场 海滩 书店 安全 小心 欢迎 热水 免费"
SIGN_WORDS: Final = (*_ENGLISH.split(), *_CHINESE.split())
SIGN_TEXTS: Final = (*SIGN_WORDS, *(str(number) for number in range(10, 100)))
"""All texts that a sign can show."""

# Labels of patches beside the words above.
SIGN: Final = Word("sign", "牌子")
WALL: Final = Word("wall", "墙")
FLOOR: Final = Word("floor", "地板")
FIRST: Final = Word("first", "第一")
SECOND: Final = Word("second", "第二")
