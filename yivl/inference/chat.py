"""Chat: image and question to answer. The inference spine; every entry point goes through it and nothing else.

``Chat`` owns the history and the key-value cache of one conversation. It knows nothing about terminals, pages or
servers; several of them can share one ``LoadedModel``, and ``yivl.inference.engine`` decodes the answers of many
together.
"""

import os
import secrets
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import StoppingCriteriaList
from transformers.cache_utils import Cache

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.constants import IMAGE_TOKEN_INDEX, STOP_STRING, SYSTEM_PROMPT
from yivl.conversation import Turn, render_chunks
from yivl.errors import ContextLengthError, YiVLError
from yivl.image_processing import ImageSource, load_image
from yivl.inference.kv_cache import make_cache
from yivl.inference.sampling import Sampler, Sampling
from yivl.inference.stopping import StopOnEvent, StopOnText, cut_answer, find_stop, stable_prefix
from yivl.tokenization import YiTokenizer, tokenize_chunks

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Answer:
    """A finished answer and what it took."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    """Positions of the prompt, image patches included."""
    cached_tokens: int
    """Those of them that an earlier turn had already computed."""
    new_tokens: int
    seconds_to_first_token: float
    """From the call, image preprocessing included."""
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Rate after the first token; 0 for a single token."""
        decoding = self.seconds - self.seconds_to_first_token
        return (self.new_tokens - 1) / decoding if self.new_tokens > 1 and decoding > 0 else 0.0


@dataclass(frozen=True)
class EncodedImage:
    """A picture as the language model sees it; chats that share a model can share it."""

    features: torch.Tensor
    """``(num_patches, hidden)``."""
    serial: int = field(default_factory=lambda: secrets.randbits(62) + 1)
    """Tells pictures apart in the caches; drawn at random, so that no two chats draw the same."""


ImageInput = ImageSource | torch.Tensor | EncodedImage
"""A picture to be loaded, its ``pixel_values`` ``(3, image_size, image_size)``, or what the model made of them."""


@dataclass
class GenerationState:
    """An answer that is being generated: what it answers, its tokens so far, and the text they make."""

    turn: Turn
    images: list[EncodedImage]
    """Of this turn."""
    history: int
    """Finished turns that come before it; later ones are replaced."""
    input_ids: list[int]
    features: torch.Tensor | None
    """Of the pictures of all turns, ``(num_images, num_patches, hidden)``."""
    keys: list[int]
    """What each position of the fused prompt holds: a token id, or a negative number for its picture."""
    sampler: Sampler
    max_new_tokens: int
    """What is left of the context, at most."""
    stops: tuple[str, ...]
    stop_event: threading.Event
    start: float
    new_ids: list[int] = field(default_factory=list)
    raw_text: str = ""
    num_shown: int = 0
    num_cached: int = 0
    first_token_at: float = 0.0
    finish_reason: FinishReason | None = None
    """``None`` while it goes on."""

    @property
    def text(self) -> str:
        """The answer, once it is finished."""
        return cut_answer(self.raw_text, self.stops)

    def take(self, token: int, tokenizer: YiTokenizer) -> str:
        """Add a token and return the text that it settles."""
        self.first_token_at = self.first_token_at or time.perf_counter()
        self.new_ids.append(token)
        self.raw_text = tokenizer.decode(self.new_ids, skip_special_tokens=True)
        if token == tokenizer.eos_token_id or find_stop(self.raw_text, self.stops) >= 0:
            self.finish_reason = "stop"
        elif self.stop_event.is_set():
            self.finish_reason = "cancelled"
        elif len(self.new_ids) >= self.max_new_tokens:
            self.finish_reason = "length"
        settled = stable_prefix(self.raw_text, self.stops) if self.finish_reason is None else self.text
        piece, self.num_shown = settled[self.num_shown :], max(len(settled), self.num_shown)
        return piece


class Chat:
    """One conversation with one model.

    A turn computes only what the conversation gained since the last one; each picture is encoded once.

    Args:
        loaded: The model, shared with other chats if wanted.
        system: The system message.
        reuse_cache: Keep keys and values between turns.
        allow_remote: Accept http(s) addresses as pictures.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        system: str = SYSTEM_PROMPT,
        reuse_cache: bool = True,
        allow_remote: bool = False,
    ) -> None:
        self.loaded = loaded
        self.system = system
        self.allow_remote = allow_remote
        self.last_answer: Answer | None = None
        self._reuse_cache = reuse_cache
        self._turns: list[Turn] = []
        self._images: list[list[EncodedImage]] = []  # of each turn
        self._cache: Cache | None = None
        self._cached_keys: list[int] = []
        self._stream: Generator[str, None, None] | None = None

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | os.PathLike[str],
        device: str = "auto",
        dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
        *,
        system: str = SYSTEM_PROMPT,
        allow_remote: bool = False,
        **loading: Any,
    ) -> "Chat":
        """Load a checkpoint and start a conversation; ``loading`` goes to ``yivl.checkpoint.loading.load_model``."""
        loaded = load_model(model_path, device=device, dtype=dtype, **loading)
        return cls(loaded, system=system, allow_remote=allow_remote)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The finished turns, oldest first."""
        return tuple(self._turns)

    @property
    def images(self) -> tuple[tuple[EncodedImage, ...], ...]:
        """The pictures of each finished turn."""
        return tuple(map(tuple, self._images))

    @property
    def num_cache_bytes(self) -> int:
        """Memory of the keys and values that are kept for the next turn."""
        layers = self._cache.layers if self._cache is not None else []
        states = [state for layer in layers if layer.is_initialized for state in (layer.keys, layer.values)]
        return sum(state.untyped_storage().nbytes() for state in states)

    def free_cache(self) -> None:
        """Give up the keys and values; the next turn computes them anew."""
        self._close_stream()
        self._drop_cache()

    def reset(self) -> None:
        """Forget the conversation and free its cache."""
        self._close_stream()
        self._turns, self._images = [], []
        self._drop_cache()
        self.last_answer = None

    def undo(self) -> Turn | None:
        """Take the last turn back and return it, or ``None`` if there is none."""
        self._close_stream()
        if not self._turns:
            return None
        self._images.pop()
        return self._turns.pop()

    def ask(
        self,
        question: str,
        image: ImageInput | Sequence[ImageInput] | None = None,
        *,
        stop_event: threading.Event | None = None,
        **sampling: Any,
    ) -> str:
        """Return the answer and add the turn to the conversation.

        Args:
            question: Plain text; placeholders and special tokens in it stay text.
            image: One picture or several, shown before the question.
            stop_event: Set it from another thread to end the answer early.
            **sampling: Fields of ``Sampling``.

        Raises:
            ImageError: If a picture cannot be used.
            ContextLengthError: If the conversation leaves no room for an answer.
            YiVLError: If a sampling value is out of range.
        """
        return "".join(self.stream(question, image, stop_event=stop_event, **sampling))

    def stream(
        self,
        question: str,
        image: ImageInput | Sequence[ImageInput] | None = None,
        *,
        stop_event: threading.Event | None = None,
        **sampling: Any,
    ) -> Generator[str, None, None]:
        """Yield the answer in pieces as it is generated; arguments and errors are those of ``ask``.

        Everything runs in the caller's thread, one step at a time. Closing the generator, or Ctrl-C, ends the answer;
        what was generated so far becomes the answer of the turn. The next call on this chat ends it too.
        """
        reply = self.begin(question, image, stop_event=stop_event, **sampling)
        return self._start(reply)

    def begin(
        self,
        question: str,
        image: ImageInput | Sequence[ImageInput] | None = None,
        *,
        stop_event: threading.Event | None = None,
        stops: Sequence[str] = (),
        **sampling: Any,
    ) -> GenerationState:
        """Return a reply without a token yet, for ``yivl.inference.engine``; arguments and errors are those of ``ask``.

        Args:
            question: As in ``ask``.
            image: As in ``ask``.
            stop_event: As in ``ask``.
            stops: Strings that end the answer, beside ``###``.
            **sampling: As in ``ask``.
        """
        start = time.perf_counter()
        settings = Sampling(**sampling)
        self._close_stream()
        images = [self.encode(source) for source in _as_list(image)]
        turn = Turn(question, num_images=len(images))
        return self._reply(turn, images, settings, stop_event, start, history=len(self._turns), stops=stops)

    def retry(self, *, stop_event: threading.Event | None = None, **sampling: Any) -> Generator[str, None, None]:
        """Answer the last question anew, streamed; the new answer replaces the old one once there is one.

        Raises:
            YiVLError: If there is no question yet.
        """
        if not self._turns:
            raise YiVLError("there is no question to answer again")
        return self.edit(len(self._turns) - 1, self._turns[-1].question, stop_event=stop_event, **sampling)

    def edit(
        self, index: int, question: str, *, stop_event: threading.Event | None = None, **sampling: Any
    ) -> Generator[str, None, None]:
        """Answer another question about the pictures of turn ``index``, streamed.

        Once there is an answer, this turn takes the place of the old one and of all that came after it.
        """
        return self._start(self.begin_edit(index, question, stop_event=stop_event, **sampling))

    def begin_edit(
        self, index: int, question: str, *, stop_event: threading.Event | None = None, **sampling: Any
    ) -> GenerationState:
        """Return the state of an answer to another question about the images of turn ``index``, as ``begin`` does."""
        self._close_stream()
        settings, images = Sampling(**sampling), self._images[index]
        turn = Turn(question, num_images=len(images))
        return self._reply(turn, images, settings, stop_event, time.perf_counter(), history=index)

    def restore(self, turns: Sequence[Turn], images: Sequence[Sequence[ImageInput]]) -> None:
        """Take over a conversation that was held elsewhere, in place of this one.

        Args:
            turns: Answered turns, oldest first.
            images: The pictures of each turn.

        Raises:
            ImageError: If a picture cannot be used.
            ValueError: If a turn has no answer, or another number of pictures than it says.
        """
        if [turn.num_images for turn in turns] != [len(group) for group in images]:
            raise ValueError("turns and images differ in number")
        if any(turn.answer is None for turn in turns):
            raise ValueError("a turn has no answer")
        self.reset()
        self._images = [[self.encode(source) for source in group] for group in images]
        self._turns = list(turns)

    def encode(self, picture: ImageInput) -> EncodedImage:
        """Return a picture as the language model sees it; one that is encoded already comes back as it is.

        Raises:
            ImageError: If it cannot be used.
        """
        if isinstance(picture, EncodedImage):
            return picture
        if not isinstance(picture, torch.Tensor):
            picture = self.loaded.image_processor([load_image(picture, allow_remote=self.allow_remote)])
        with torch.inference_mode():
            return EncodedImage(self.loaded.model.encode_images(picture)[0])

    def _tokenize(self, turns: Sequence[Turn]) -> list[int]:
        # Whatever is longer than the longest tokens of the whole context need not be tokenized to know that.
        most = self.loaded.model.config.max_position_embeddings * self.loaded.tokenizer.longest_piece
        length = sum(len(turn.question) + len(turn.answer or "") + 1 for turn in turns)
        if length + len(self.system) > most:
            raise ContextLengthError(f"the conversation has {length} characters, more than any context of this model")
        messages = [message for turn in turns for message in turn.messages()]
        return tokenize_chunks(render_chunks(messages, self.system), self.loaded.tokenizer)

    def _room(self, prompt_length: int, settings: Sampling) -> int:
        """Return how many tokens the answer may have."""
        context: int = self.loaded.model.config.max_position_embeddings
        if prompt_length >= context:
            raise ContextLengthError(
                f"the conversation takes {prompt_length} positions and the context has {context}; "
                "start a new one, or ask with fewer or shorter turns"
            )
        return min(settings.max_new_tokens, context - prompt_length)

    def _reply(
        self,
        turn: Turn,
        images: list[EncodedImage],
        settings: Sampling,
        stop_event: threading.Event | None,
        start: float,
        *,
        history: int,
        stops: Sequence[str] = (),
    ) -> GenerationState:
        """Return what answers after ``history`` turns, once its prompt is known to fit."""
        input_ids = self._tokenize([*self._turns[:history], turn])
        all_images = [image for group in [*self._images[:history], images] for image in group]
        keys = _position_keys(input_ids, all_images)
        return GenerationState(
            turn=turn,
            images=images,
            history=history,
            input_ids=input_ids,
            features=torch.stack([image.features for image in all_images]) if all_images else None,
            keys=keys,
            sampler=Sampler(settings, input_ids, self.loaded.model.device),
            max_new_tokens=self._room(len(keys), settings),
            stops=(STOP_STRING, *stops),
            stop_event=stop_event or threading.Event(),
            start=start,
        )

    def _start(self, reply: GenerationState) -> Generator[str, None, None]:
        tokens = self._beam_tokens(reply) if reply.sampler.settings.num_beams > 1 else self._tokens(reply)
        self._stream = self._run(reply, tokens)
        return self._stream

    def _close_stream(self) -> None:
        """End an answer that was left unfinished: two at once would write into one cache."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _run(self, reply: GenerationState, tokens: Iterator[int]) -> Generator[str, None, None]:
        """Turn tokens into pieces of text until something ends the answer, then keep the turn."""
        try:
            for token in tokens:
                if piece := reply.take(token, self.loaded.tokenizer):
                    yield piece
                if reply.finish_reason:
                    break
        except GeneratorExit:
            reply.finish_reason = "cancelled"
            self.finish(reply)
            raise
        except KeyboardInterrupt:
            self._drop_cache()  # it may have come in the middle of a step
            reply.finish_reason = "cancelled"
            self.finish(reply)
            raise
        except BaseException:
            self._drop_cache()
            raise
        self.finish(reply)

    def finish(self, reply: GenerationState) -> None:
        """Add the turn to the conversation and note what it took; one that ended before its first token never was."""
        if reply.finish_reason == "cancelled" and not reply.new_ids:
            return
        end = time.perf_counter()
        self._turns[reply.history :] = [Turn(reply.turn.question, reply.text, reply.turn.num_images)]
        self._images[reply.history :] = [reply.images]
        self.last_answer = Answer(
            text=reply.text,
            finish_reason=reply.finish_reason or "length",
            prompt_tokens=len(reply.keys),
            cached_tokens=reply.num_cached,
            new_tokens=len(reply.new_ids),
            seconds_to_first_token=(reply.first_token_at or end) - reply.start,
            seconds=end - reply.start,
        )
        if self._cache is not None and self._reuse_cache:
            self._cached_keys = (reply.keys + reply.new_ids)[: self._cache.get_seq_length()]
        else:
            self._drop_cache()

    def _tokens(self, reply: GenerationState) -> Iterator[int]:
        """Yield new tokens one by one; a token is computed only when it is asked for."""
        cache, reply.num_cached = self._cache_for(reply.keys)
        logits = self._prefill(reply, cache)
        while True:
            token = reply.sampler.choose(logits)
            yield token
            logits = self._step(token, cache)

    @torch.inference_mode()
    def _prefill(self, reply: GenerationState, cache: Cache) -> torch.Tensor:
        """Feed what the cache does not hold yet; return the logits of the last position, ``(1, vocabulary)``."""
        model = self.loaded.model
        fused = model.fuse(torch.tensor([reply.input_ids], device=model.device), image_features=reply.features)
        new_embeds = fused.inputs_embeds[:, reply.num_cached :]
        logits: torch.Tensor = model(
            inputs_embeds=new_embeds, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        return logits[:, -1].float()

    @torch.inference_mode()
    def _step(self, token: int, cache: Cache) -> torch.Tensor:
        """Feed one token; return the logits after it, ``(1, vocabulary)``."""
        model = self.loaded.model
        token_ids = torch.tensor([[token]], device=model.device)
        logits: torch.Tensor = model(input_ids=token_ids, past_key_values=cache, use_cache=True).logits
        return logits[:, -1].float()

    def _beam_tokens(self, reply: GenerationState) -> Iterator[int]:
        """Yield the tokens of a beam search, which are known only at its end; no cache is kept."""
        self._drop_cache()
        tokenizer, model, length = self.loaded.tokenizer, self.loaded.model, len(reply.input_ids)
        settings = reply.sampler.settings
        with torch.inference_mode(), _seeded(settings.seed):
            output = model.generate(
                torch.tensor([reply.input_ids], device=model.device),
                image_features=reply.features,
                generation_config=settings.generation_config(tokenizer, reply.max_new_tokens),
                stopping_criteria=StoppingCriteriaList([StopOnText(tokenizer, length), StopOnEvent(reply.stop_event)]),
            )
        yield from output[0, length:].tolist()

    def _drop_cache(self) -> None:
        self._cache, self._cached_keys = None, []

    def _cache_for(self, keys: list[int]) -> tuple[Cache, int]:
        """Return a cache that holds a prefix of the prompt, at most all but its last position, and its length."""
        shared = 0
        for cached, wanted in zip(self._cached_keys, keys[:-1], strict=False):
            if cached != wanted:
                break
            shared += 1
        if self._cache is None:
            self._cache = make_cache(self.loaded.model.config.num_hidden_layers)
        if surplus := self._cache.get_seq_length() - shared:  # crop(0) empties the cache in older transformers
            self._cache.crop(-surplus)
        self._cached_keys = keys[:shared]
        return self._cache, shared


def _position_keys(input_ids: Sequence[int], images: Sequence[EncodedImage]) -> list[int]:
    """Return what each position of the fused sequence holds; see ``GenerationState.keys``."""
    keys: list[int] = []
    remaining = iter(images)
    for token in input_ids:
        if token == IMAGE_TOKEN_INDEX:
            image = next(remaining)
            keys += [-image.serial] * len(image.features)
        else:
            keys.append(token)
    return keys


def _as_list(image: ImageInput | Sequence[ImageInput] | None) -> list[ImageInput]:
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]  # type: ignore[list-item]


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from a seed inside the block and leave the generators as they were; ``None`` changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
