"""Questions that say by ``<image>`` where their images are, as InternVL writes them, to the pieces of a prompt."""

from collections.abc import Iterator, Sequence

from yivl.constants import LLAVA_IMAGE_TOKEN
from yivl.conversation import ImageSlot, Piece, PromptTemplate, RolePieces


def with_tag(question: str) -> str:
    """Return a question that has an image, in front of it if it does not say where."""
    return question if LLAVA_IMAGE_TOKEN in question else f"{LLAVA_IMAGE_TOKEN}\n{question}"


def tagged_prompt(
    template: PromptTemplate, earlier: Sequence[tuple[str, str]], question: str, tiles: Sequence[int]
) -> list[Piece]:
    """Return the pieces of a prompt.

    Args:
        template: With the system message.
        earlier: Questions and answers.
        question: To be answered.
        tiles: Images at each ``<image>`` in the questions.

    Raises:
        ValueError: If the questions have too few ``<image>``.
    """
    left = iter(tiles)
    messages: list[RolePieces] = []
    for asked, answer in (*earlier, (question, None)):
        content = list(_place_images(asked, left))
        messages += [(template.user, content), (template.assistant, None if answer is None else [answer])]
    if unplaced := len(list(left)):
        raise ValueError(
            f"the questions have {len(tiles) - unplaced} {LLAVA_IMAGE_TOKEN} for {len(tiles)} entries of "
            f"num_patches_list; write {LLAVA_IMAGE_TOKEN} where each image is"
        )
    return template.render(messages)


def _place_images(text: str, tiles: Iterator[int]) -> Iterator[Piece]:
    """Yield the pieces of a question, with the next images at each ``<image>`` as long as there are any."""
    first, *rest = text.split(LLAVA_IMAGE_TOKEN)
    yield first
    for part in rest:
        count = next(tiles, None)
        yield LLAVA_IMAGE_TOKEN if count is None else ImageSlot(count)
        yield part
