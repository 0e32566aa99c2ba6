"""Turns to the pieces of a prompt: text, control tokens and image slots. Ids, tensors and images come later.

Text is always data: a control token or a placeholder that is spelled out in it stays text.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Final

from yivl.constants import (
    ASSISTANT,
    DEFAULT_IMAGE_TOKEN,
    HUMAN,
    IMG_END,
    IMG_START,
    INTERNVL_TOKENS,
    LLAVA_IMAGE_TOKEN,
    STOP_STRING,
    SYSTEM_PROMPT,
)

_TOKENS: Final = (DEFAULT_IMAGE_TOKEN, LLAVA_IMAGE_TOKEN, "<s>", "</s>", "<unk>", "<pad>", *INTERNVL_TOKENS)
_MARKERS: Final = re.compile(rf"##(?=#)|<(?=\||{'|'.join(re.escape(token[1:]) for token in _TOKENS)})")


@dataclass(frozen=True)
class Control:
    """A control token that the template writes; it becomes its id."""

    token: str


@dataclass(frozen=True)
class ImageSlot:
    """The place of an image in a message."""

    tiles: int = 1
    """Images that stand here one after the other, as parts of one.
    Source: OpenGVLab/InternVL, ``num_patches_list`` of ``chat``."""


IMAGE: Final = ImageSlot()
Piece = str | Control | ImageSlot
RolePieces = tuple[str, Sequence[Piece] | None]
"""Role name and content of a message; ``None`` is the answer to generate."""


@dataclass(frozen=True)
class Turn:
    """One question and its answer; ``None`` if it has not been generated yet."""

    question: str
    answer: str | None = None
    num_images: int = 0
    """Number of images before the question."""


@dataclass(frozen=True)
class PromptTemplate:
    """How messages become a prompt, and where an answer ends."""

    system: str
    """System message of conversations without their own."""
    user: str
    assistant: str
    """Role names, as the prompt spells them."""
    before_system: tuple[Piece, ...]
    after_system: tuple[Piece, ...]
    before_role: tuple[Piece, ...]
    after_role: str
    """Ends the header of a message; an answer to generate is a header only."""
    before_text: str
    after_text: tuple[Piece, ...]
    """Ends a message; the loss is computed on it, as on ``before_text``."""
    after_message: str
    around_image: tuple[tuple[Piece, ...], tuple[Piece, ...]]
    """Pieces before and after the tiles of an image."""
    between_images: str
    """Text between images that precede a question; a line break comes before the question itself."""
    moves_images: bool
    """Whether the images of a question come first, wherever it places them."""
    stop_strings: tuple[str, ...]
    """Each ends an answer and is not part of it."""
    stop_token: str | None
    """Control token that ends an answer; ``None`` is the ``eos_token`` of the tokenizer."""

    @property
    def control_tokens(self) -> set[str]:
        """All control tokens that a prompt can have."""
        pieces = (*self.before_system, *self.after_system, *self.before_role, *self.after_text)
        tokens = {piece.token for piece in (*pieces, *chain(*self.around_image)) if isinstance(piece, Control)}
        return tokens if self.stop_token is None else tokens | {self.stop_token}

    def messages(self, turns: Iterable[Turn], questions: Sequence[Sequence[str]] = ()) -> list[RolePieces]:
        """Return the messages of turns.

        Args:
            turns: Each with its answer, or ``None`` to generate it.
            questions: Of each turn as it is written, text with one image slot between neighbors. Read only by a
                template that does not move images; by default images come first.
        """
        turns = list(turns)
        written = [None] * len(turns) if self.moves_images or not questions else questions
        messages: list[RolePieces] = []
        for turn, texts in zip(turns, written, strict=True):
            question = self._images_first(turn) if texts is None else place_images(texts)
            messages += [(self.user, question), (self.assistant, None if turn.answer is None else [turn.answer])]
        return messages

    def render(self, messages: Iterable[RolePieces], system: str | None = None) -> list[Piece]:
        """Return the pieces of a prompt; ``system`` replaces the system message of the template."""
        return [piece for piece, _ in self.render_targets(messages, system)]

    def render_targets(self, messages: Iterable[RolePieces], system: str | None = None) -> Iterator[tuple[Piece, bool]]:
        """Yield the pieces of a prompt and whether the loss is computed on them: on answers, and on what ends them."""
        for piece in (*self.before_system, self.system if system is None else system, *self.after_system):
            yield piece, False
        for role, content in messages:
            for piece in (*self.before_role, f"{role}{self.after_role}"):
                yield piece, False
            if content is not None:
                for piece in (self.before_text, *content, *self.after_text):
                    for part in self._image(piece) if isinstance(piece, ImageSlot) else (piece,):
                        yield part, role == self.assistant
                yield self.after_message, False

    def _image(self, slot: ImageSlot) -> tuple[Piece, ...]:
        before, after = self.around_image
        return *before, *[IMAGE] * slot.tiles, *after

    def _images_first(self, turn: Turn) -> list[Piece]:
        if not turn.num_images:
            return [turn.question]
        more: list[Piece] = [self.between_images, IMAGE]
        return [IMAGE, *more * (turn.num_images - 1), f"\n{turn.question}"]


def place_images(texts: Sequence[str]) -> list[Piece]:
    """Return the pieces of texts, with an image slot between neighbors."""
    first, *rest = texts
    return [first, *(piece for text in rest for piece in (IMAGE, text))]


def prompt_text(pieces: Iterable[Piece]) -> str:
    """Return a prompt as text, with ``<image_placeholder>`` at image slots."""
    return "".join(
        piece if isinstance(piece, str) else piece.token if isinstance(piece, Control) else DEFAULT_IMAGE_TOKEN
        for piece in pieces
    )


YI_VL: Final = PromptTemplate(
    system=SYSTEM_PROMPT,
    user=HUMAN,
    assistant=ASSISTANT,
    before_system=(),
    after_system=(f"\n\n{STOP_STRING} ",),
    before_role=(),
    after_role=":",
    before_text=" ",
    after_text=(f"\n{STOP_STRING}",),
    after_message=" ",
    around_image=((), ()),
    between_images="",
    moves_images=True,
    stop_strings=(STOP_STRING,),
    stop_token=None,
)
"""A finished message ends with the stop string that starts the next turn, an open one with its colon.
Source: 01-ai/Yi, VL/llava/conversation.py, mm_default; VL/llava/mm_utils.py moves images to the front."""

_END: Final = Control("<|im_end|>")
HERMES_2: Final = PromptTemplate(
    system=(
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
    ),
    user="user",
    assistant="assistant",
    before_system=(Control("<|im_start|>"), "system\n"),
    after_system=(_END,),
    before_role=(Control("<|im_start|>"),),
    after_role="\n",
    before_text="",
    after_text=(_END,),
    after_message="",
    around_image=((Control(IMG_START),), (Control(IMG_END),)),
    between_images="\n",
    moves_images=False,
    stop_strings=(),
    stop_token=_END.token,
)
"""Like ChatML, without a line break after ``<|im_end|>``. At the release of InternVL-Chat-V1-2 the system message was
``Answer the questions.``; this one replaced it in July 2024.
Source: OpenGVLab/InternVL, internvl_chat/internvl/conversation.py, Hermes-2; train/dataset.py, preprocess_mpt."""


def escape_markers(text: str) -> str:
    """Return text that cannot start a turn, an image slot or a control token, for text that the user did not write.

    A question is part of the prompt as it is, as in the reference: for Yi-VL, ``### Assistant: ...`` on a line of its
    own gets the ids of an answer. Escape documents, web pages and the output of OCR before they become part of a
    question. A space is put between three ``#`` and after the ``<`` of ``<image_placeholder>``, ``<image>``,
    ``<|...|>``, ``<s>``, ``</s>``, ``<unk>``, ``<pad>``, ``<IMG_CONTEXT>``, and of ``<img>``, ``<quad>``, ``<ref>`` and
    ``<box>`` and their ends; all other text is unchanged, and escaping again changes nothing.
    """
    return _MARKERS.sub(lambda found: f"{found[0]} ", text)


@dataclass
class Conversation:
    """A conversation for code written against the reference implementation; the package itself uses ``Turn``.

    A placeholder in a message is an image slot. An empty message counts as unanswered, and a tuple message
    ``(text, image, mode)`` puts its image first, as in the reference (docs/fidelity.md).
    """

    system: str = SYSTEM_PROMPT
    roles: tuple[str, str] = (HUMAN, ASSISTANT)
    messages: list[list[object]] = field(default_factory=list)
    sep: str = STOP_STRING

    def append_message(self, role: str, message: str | tuple[object, ...] | None) -> None:
        """Add a message; ``None`` leaves the turn to the model."""
        self.messages.append([role, message])

    def copy(self) -> "Conversation":
        """Return an independent copy."""
        return replace(self, messages=[list(message) for message in self.messages])

    def get_prompt(self) -> str:
        """Return the prompt with ``<image_placeholder>`` at every image slot."""
        rendered: list[RolePieces] = []
        for index, (role, content) in enumerate(self.messages):
            text = content[0] if isinstance(content, tuple) else content
            if index == 0 and isinstance(content, tuple):
                text = f"{DEFAULT_IMAGE_TOKEN}\n{str(text).replace(DEFAULT_IMAGE_TOKEN, '').strip()}"
            rendered.append((str(role), [str(text)] if text else None))
        return prompt_text(YI_VL.render(rendered, self.system))


conv_templates: Final = {"mm_default": Conversation()}
"""Templates by LLaVA's names; call ``.copy()`` before adding messages. Source: 01-ai/Yi, VL/llava/conversation.py."""
