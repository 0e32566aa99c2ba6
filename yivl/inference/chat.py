"""Chat: the turns and images of one conversation. Start here to follow an answer from a question to its text.

``Chat.begin`` turns a question into a request, ``yivl.inference.engine`` decodes requests, one or many together, and
``Chat.finish`` adds the answered turn. Several chats can share one ``LoadedModel``.
"""

import os
import threading
import time
from collections.abc import Generator, Sequence
from typing import Any, Literal

import torch

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.constants import IMAGE_TOKEN_INDEX
from yivl.conversation import Turn
from yivl.errors import ContextLengthError, YiVLError
from yivl.image_processing import load_image
from yivl.inference.detokenization import Detokenizer
from yivl.inference.engine import decode, finish_together
from yivl.inference.kv_cache import PrefixStore, context_bytes
from yivl.inference.request import Answer, EncodedImage, FinishReason, GenerationState, ImageInput
from yivl.inference.sampling import AnswerText, Sampler, Sampling
from yivl.tokenization import stop_id, tokenize

__all__ = [
    "Answer",
    "Chat",
    "EncodedImage",
    "FinishReason",
    "GenerationState",
    "ImageInput",
    "answer_batch",
    "check_length",
]

Images = ImageInput | Sequence[ImageInput] | None
"""The images of a question, shown before it."""


class Chat:
    """One conversation with one model.

    A turn computes only what the conversation gained since the last one; each image is encoded once.

    Args:
        loaded: The model; other chats may share it.
        system: The system message; by default that of the model's prompt template.
        reuse_cache: Keep the keys and values of the answers of ``ask`` and ``stream`` for later turns. An ``Engine``
            that decodes requests of ``begin`` has its own.
        allow_remote: Accept http(s) URLs as images.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        system: str | None = None,
        reuse_cache: bool = True,
        allow_remote: bool = False,
    ) -> None:
        self.loaded = loaded
        self.system = loaded.model.config.prompt_template.system if system is None else system
        self.allow_remote = allow_remote
        self.last_answer: Answer | None = None
        self._prefixes = PrefixStore(context_bytes(loaded.model.config) if reuse_cache else 0)
        self._turns: list[Turn] = []
        self._images: list[Sequence[EncodedImage]] = []  # of each turn
        self._stream: Generator[str, None, None] | None = None

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | os.PathLike[str],
        device: str = "auto",
        dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
        *,
        system: str | None = None,
        allow_remote: bool = False,
        **loading: Any,
    ) -> "Chat":
        """Load a checkpoint and start a conversation; ``loading`` goes to ``yivl.checkpoint.loading.load_model``."""
        loaded = load_model(model_path, device=device, dtype=dtype, **loading)
        return cls(loaded, system=system, allow_remote=allow_remote)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The answered turns, oldest first."""
        return tuple(self._turns)

    @property
    def images(self) -> tuple[tuple[EncodedImage, ...], ...]:
        """The images of each answered turn."""
        return tuple(map(tuple, self._images))

    def free_cache(self) -> None:
        """Free the keys and values; the next turn re-computes them."""
        self._close_stream()
        self._prefixes.clear()

    def reset(self) -> None:
        """Start a new conversation and free the cache."""
        self.free_cache()
        self._turns, self._images, self.last_answer = [], [], None

    def undo(self) -> Turn | None:
        """Remove the last turn and return it, or ``None`` if there is none."""
        self._close_stream()
        if not self._turns:
            return None
        self._images.pop()
        return self._turns.pop()

    def ask(
        self, question: str, image: Images = None, *, stop_event: threading.Event | None = None, **sampling: Any
    ) -> str:
        """Return the answer and add the turn to the conversation.

        Args:
            question: Plain text; placeholders and special tokens in it stay text. ``###`` starts a turn of Yi-VL, as in
                the reference: pass text that the user did not write through ``yivl.conversation.escape_markers``.
            image: One image or several, shown before the question.
            stop_event: Set it from another thread to end the answer early.
            **sampling: Fields of ``Sampling``.

        Raises:
            ImageError: If an image cannot be used.
            ContextLengthError: If the conversation leaves no room for an answer.
            YiVLError: If a sampling value is out of range.
        """
        return "".join(self.stream(question, image, stop_event=stop_event, **sampling))

    def stream(
        self, question: str, image: Images = None, *, stop_event: threading.Event | None = None, **sampling: Any
    ) -> Generator[str, None, None]:
        """Yield the answer in pieces as it is generated; arguments and errors are those of ``ask``.

        Everything runs in the caller's thread, one token at a time. Closing the generator, or Ctrl-C, ends the answer;
        what was generated so far becomes the answer of the turn. The next call on this chat ends it too.
        """
        return self._decode(self.begin(question, image, stop_event=stop_event, **sampling))

    def begin(
        self,
        question: str,
        image: Images = None,
        *,
        stop_event: threading.Event | None = None,
        stops: Sequence[str] = (),
        **sampling: Any,
    ) -> GenerationState:
        """Return the request for an answer, for ``yivl.inference.engine``; call ``finish`` after it was decoded.

        Arguments and errors are those of ``ask``; ``stops`` are strings that end the answer, beside those of
        the prompt template.
        """
        start, settings = time.perf_counter(), Sampling(**sampling)
        self._close_stream()
        sources: Any = image if isinstance(image, list | tuple) else [] if image is None else [image]
        images = [self.encode(source) for source in sources]
        return self._prepare(len(self._turns), question, images, settings, stop_event, start, stops)

    def retry(self, *, stop_event: threading.Event | None = None, **sampling: Any) -> Generator[str, None, None]:
        """Yield another answer to the last question; it replaces the old one once it is finished.

        Raises:
            YiVLError: If there is no question yet.
        """
        self._close_stream()  # first: it may add a turn
        if not self._turns:
            raise YiVLError("there is no question to answer again")
        return self.edit(len(self._turns) - 1, self._turns[-1].question, stop_event=stop_event, **sampling)

    def edit(
        self, index: int, question: str, *, stop_event: threading.Event | None = None, **sampling: Any
    ) -> Generator[str, None, None]:
        """Yield the answer to another question about the images of turn ``index``; see ``begin_edit``."""
        return self._decode(self.begin_edit(index, question, stop_event=stop_event, **sampling))

    def begin_edit(
        self, index: int, question: str, *, stop_event: threading.Event | None = None, **sampling: Any
    ) -> GenerationState:
        """Return the request for another question about the images of turn ``index``; see ``begin``.

        Once finished, it replaces this turn and all that came after it.
        """
        start, settings = time.perf_counter(), Sampling(**sampling)
        self._close_stream()
        return self._prepare(index, question, self._images[index], settings, stop_event, start)

    def finish(self, state: GenerationState) -> None:
        """Add the turn to the conversation; one that was cancelled before its first token leaves it unchanged."""
        if state.finish_reason is None:
            state.finish("cancelled")
        if state.finish_reason == "cancelled" and not state.new_ids:
            return
        self._turns[state.history :] = [Turn(state.turn.question, state.text, state.turn.num_images)]
        self._images[state.history :] = [state.images]
        self.last_answer = state.result()

    def restore(self, turns: Sequence[Turn], images: Sequence[Sequence[ImageInput]]) -> None:
        """Replace the conversation with one that was held elsewhere.

        Args:
            turns: Answered turns, oldest first.
            images: The images of each turn.

        Raises:
            ImageError: If an image cannot be used.
            ValueError: If a turn has no answer, or its number of images differs.
        """
        if [turn.num_images for turn in turns] != [len(group) for group in images]:
            raise ValueError("turns and images differ in number")
        if any(turn.answer is None for turn in turns):
            raise ValueError("a turn has no answer")
        self.reset()
        self._images = [[self.encode(source) for source in group] for group in images]
        self._turns = list(turns)

    def encode(self, image: ImageInput) -> EncodedImage:
        """Return the features of an image, which several chats can share.

        Raises:
            ImageError: If the image cannot be used.
        """
        if isinstance(image, EncodedImage):
            return image
        if not isinstance(image, torch.Tensor):
            image = self.loaded.image_processor([load_image(image, allow_remote=self.allow_remote)])
        with torch.inference_mode():
            return EncodedImage(self.loaded.model.encode_images(image)[0])

    def _prepare(
        self,
        index: int,
        question: str,
        images: Sequence[EncodedImage],
        settings: Sampling,
        stop_event: threading.Event | None,
        start: float,
        stops: Sequence[str] = (),
    ) -> GenerationState:
        """Return the request for a question that follows the first ``index`` turns."""
        turns = [*self._turns[:index], Turn(question, num_images=len(images))]
        encoded = [image for group in (*self._images[:index], images) for image in group]
        tokenizer, config = self.loaded.tokenizer, self.loaded.model.config
        template, context = config.prompt_template, config.max_position_embeddings
        pieces = template.render(template.messages(turns), self.system)
        check_length(sum(len(piece) for piece in pieces if isinstance(piece, str)), self.loaded)
        input_ids = tokenize(pieces, tokenizer)
        image_keys = iter([-image.serial] * len(image.features) for image in encoded)
        slots = (next(image_keys) if token == IMAGE_TOKEN_INDEX else [token] for token in input_ids)
        keys = [key for slot in slots for key in slot]
        if len(keys) >= context:
            raise ContextLengthError(
                f"the conversation takes {len(keys)} positions and the context has {context}; "
                "start a new one, or ask with fewer or shorter turns"
            )
        return GenerationState(
            turn=turns[-1],
            images=images,
            history=index,
            input_ids=input_ids,
            features=torch.stack([image.features for image in encoded]) if encoded else None,
            keys=keys,
            sampler=Sampler(settings, input_ids, self.loaded.model.device),
            max_new_tokens=min(settings.max_new_tokens, context - len(keys)),
            stop_id=stop_id(template, tokenizer),
            detokenizer=Detokenizer(tokenizer),
            answer=AnswerText((*template.stop_strings, *stops)),
            stop_event=stop_event or threading.Event(),
            start=start,
        )

    def _decode(self, state: GenerationState) -> Generator[str, None, None]:
        self._stream = self._run(state)
        return self._stream

    def _run(self, state: GenerationState) -> Generator[str, None, None]:
        """Yield the answer; the turn is kept however it ends, unless by an error."""
        try:
            yield from decode(self.loaded, state, self._prefixes)
        except (GeneratorExit, KeyboardInterrupt):
            self.finish(state)
            raise
        self.finish(state)

    def _close_stream(self) -> None:
        """End an answer that was left unfinished."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def check_length(num_characters: int, loaded: LoadedModel) -> None:
    """Check that a text can fit into the context, without tokenizing it, which takes time.

    Raises:
        ContextLengthError: If it is too long however it is tokenized.
    """
    most = loaded.model.config.max_position_embeddings * loaded.tokenizer.longest_piece
    if num_characters > most:
        raise ContextLengthError(
            f"the conversation has {num_characters:,} characters, and the context holds at most {most:,}; "
            "ask with less text"
        )


def answer_batch(
    loaded: LoadedModel, questions: Sequence[str], images: Sequence[ImageInput | None] | None = None, **sampling: Any
) -> list[str]:
    """Return the answers to independent questions, each with one image or ``None``, decoded together.

    ``sampling`` are fields of ``Sampling``, for all questions.

    Raises:
        ImageError: If an image cannot be used.
        YiVLError: If a sampling value is out of range, or beam search is requested.
        ValueError: If the numbers of questions and images differ.
    """
    images = [None] * len(questions) if images is None else images
    if len(images) != len(questions):
        raise ValueError(f"{len(questions)} questions but {len(images)} images")
    chat = Chat(loaded, reuse_cache=False)
    return finish_together(loaded, [chat.begin(*asked, **sampling) for asked in zip(questions, images, strict=True)])
