"""Chat: image and question to answer. The inference spine; every entry point goes through it and nothing else.

``Chat`` owns the history and the key-value cache of one conversation. It knows nothing about terminals, pages or
servers; several of them can share one ``LoadedModel``.
"""

import os
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import StoppingCriteriaList
from transformers.cache_utils import Cache

from yivl.constants import IMAGE_TOKEN_INDEX, STOP_STRING, SYSTEM_PROMPT
from yivl.conversation import Turn, render_chunks
from yivl.errors import ContextLengthError, YiVLError
from yivl.image_processing import ImageSource, load_image
from yivl.model.cache import make_cache
from yivl.model.loading import LoadedModel, load_model
from yivl.sampling import Sampling
from yivl.stopping import StopOnEvent, StopOnText, cut_answer, stable_prefix
from yivl.tokenization import tokenize_chunks

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


@dataclass
class _Progress:
    """An answer that is being generated."""

    turn: Turn
    images: list["_Image"]  # of this turn
    history: int  # finished turns that come before it; later ones are replaced
    input_ids: list[int]
    features: torch.Tensor | None  # (num_images, num_patches, hidden), of all turns
    keys: list[int]  # what each position of the fused prompt holds; see _position_keys
    settings: Sampling
    max_new_tokens: int  # what is left of the context, at most
    stop_event: threading.Event
    start: float
    new_ids: list[int] = field(default_factory=list)
    raw_text: str = ""
    num_cached: int = 0
    first_token_at: float = 0.0
    finish_reason: FinishReason = "length"


@dataclass(frozen=True)
class _Image:
    """A picture of the conversation, encoded once."""

    features: torch.Tensor  # (num_patches, hidden)
    serial: int  # tells pictures apart in the cache; never reused


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
        self._images: list[list[_Image]] = []  # of each turn
        self._num_encoded = 0
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
        """Load a checkpoint and start a conversation; ``loading`` goes to ``yivl.model.loading.load_model``."""
        loaded = load_model(model_path, device=device, dtype=dtype, **loading)
        return cls(loaded, system=system, allow_remote=allow_remote)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The finished turns, oldest first."""
        return tuple(self._turns)

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
        image: ImageSource | Sequence[ImageSource] | None = None,
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
        image: ImageSource | Sequence[ImageSource] | None = None,
        *,
        stop_event: threading.Event | None = None,
        **sampling: Any,
    ) -> Generator[str, None, None]:
        """Yield the answer in pieces as it is generated; arguments and errors are those of ``ask``.

        Everything runs in the caller's thread, one step at a time. Closing the generator, or Ctrl-C, ends the answer;
        what was generated so far becomes the answer of the turn. The next call on this chat ends it too.
        """
        start = time.perf_counter()
        settings = Sampling(**sampling)
        self._close_stream()
        images = [self._encode(source) for source in _as_list(image)]
        turn = Turn(question, num_images=len(images))
        return self._answer(turn, images, settings, stop_event, start, history=len(self._turns))

    def retry(self, *, stop_event: threading.Event | None = None, **sampling: Any) -> Generator[str, None, None]:
        """Answer the last question anew, streamed; the new answer replaces the old one once there is one.

        Raises:
            YiVLError: If there is no question yet.
        """
        self._close_stream()
        if not self._turns:
            raise YiVLError("there is no question to answer again")
        settings, images = Sampling(**sampling), self._images[-1]
        turn = Turn(self._turns[-1].question, num_images=len(images))
        return self._answer(turn, images, settings, stop_event, time.perf_counter(), history=len(self._turns) - 1)

    def answer_batch(
        self, questions: Sequence[str], images: Sequence[ImageSource | None] | None = None, **sampling: Any
    ) -> list[str]:
        """Return the answers to independent single-turn questions, generated together; the conversation is not used.

        Args:
            questions: One per row.
            images: One picture or ``None`` per row.
            **sampling: Fields of ``Sampling``.

        Raises:
            ValueError: If the numbers of questions and images differ.
        """
        if not questions:
            return []
        images = [None] * len(questions) if images is None else images
        if len(images) != len(questions):
            raise ValueError(f"{len(questions)} questions but {len(images)} images")
        settings, tokenizer = Sampling(**sampling), self.loaded.tokenizer
        encoded = [self._encode(image).features for image in images if image is not None]
        rows = [
            torch.tensor(self._tokenize([Turn(question, num_images=int(image is not None))]))
            for question, image in zip(questions, images, strict=True)
        ]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
        lengths = torch.tensor([len(row) for row in rows])
        attention_mask = (torch.arange(input_ids.shape[1]).flip(0) < lengths[:, None]).long()
        num_patches = self.loaded.model.config.num_patches
        longest = max(len(row) + int((row == IMAGE_TOKEN_INDEX).sum()) * (num_patches - 1) for row in rows)
        with torch.inference_mode(), _seeded(settings.seed):
            output = self.loaded.model.generate(
                input_ids.to(self.loaded.model.device),
                attention_mask=attention_mask.to(self.loaded.model.device),
                image_features=torch.stack(encoded) if encoded else None,
                generation_config=settings.generation_config(tokenizer, self._room(longest, settings)),
                stopping_criteria=StoppingCriteriaList([StopOnText(tokenizer, input_ids.shape[1])]),
            )
        texts = tokenizer.batch_decode(output[:, input_ids.shape[1] :].tolist(), skip_special_tokens=True)
        return [cut_answer(text) for text in texts]

    def _encode(self, source: ImageSource) -> _Image:
        image = load_image(source, allow_remote=self.allow_remote)
        with torch.inference_mode():
            features = self.loaded.model.encode_images(self.loaded.image_processor([image]))[0]
        self._num_encoded += 1
        return _Image(features, self._num_encoded)

    def _tokenize(self, turns: Sequence[Turn]) -> list[int]:
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

    def _answer(
        self,
        turn: Turn,
        images: list[_Image],
        settings: Sampling,
        stop_event: threading.Event | None,
        start: float,
        *,
        history: int,
    ) -> Generator[str, None, None]:
        """Check that the prompt fits, then return the generator that answers after ``history`` turns."""
        input_ids = self._tokenize([*self._turns[:history], turn])
        all_images = [image for group in [*self._images[:history], images] for image in group]
        keys = _position_keys(input_ids, all_images)
        progress = _Progress(
            turn=turn,
            images=images,
            history=history,
            input_ids=input_ids,
            features=torch.stack([image.features for image in all_images]) if all_images else None,
            keys=keys,
            settings=settings,
            max_new_tokens=self._room(len(keys), settings),
            stop_event=stop_event or threading.Event(),
            start=start,
        )
        tokens = self._beam_tokens(progress) if settings.num_beams > 1 else self._tokens(progress)
        self._stream = self._run(progress, tokens)
        return self._stream

    def _close_stream(self) -> None:
        """End an answer that was left unfinished: two at once would write into one cache."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _run(self, progress: _Progress, tokens: Iterator[int]) -> Generator[str, None, None]:
        """Turn tokens into pieces of text until something ends the answer, then keep the turn."""
        try:
            yield from self._pieces(progress, tokens)
        except GeneratorExit:
            progress.finish_reason = "cancelled"
            self._finish(progress)
            raise
        except KeyboardInterrupt:
            self._drop_cache()  # it may have come in the middle of a step
            progress.finish_reason = "cancelled"
            self._finish(progress)
            raise
        except BaseException:
            self._drop_cache()
            raise
        self._finish(progress)

    def _pieces(self, progress: _Progress, tokens: Iterator[int]) -> Generator[str, None, None]:
        tokenizer, shown = self.loaded.tokenizer, ""
        for token in tokens:
            progress.first_token_at = progress.first_token_at or time.perf_counter()
            progress.new_ids.append(token)
            progress.raw_text = tokenizer.decode(progress.new_ids, skip_special_tokens=True)
            if token == tokenizer.eos_token_id or STOP_STRING in progress.raw_text:
                progress.finish_reason = "stop"
                break
            if progress.stop_event.is_set():
                progress.finish_reason = "cancelled"
                break
            stable = stable_prefix(progress.raw_text)
            if len(stable) > len(shown):
                piece, shown = stable[len(shown) :], stable
                yield piece
        if rest := cut_answer(progress.raw_text)[len(shown) :]:
            yield rest

    def _finish(self, progress: _Progress) -> None:
        """Add the turn to the conversation and note what it took; one that ended before its first token never was."""
        if progress.finish_reason == "cancelled" and not progress.new_ids:
            return
        end, text = time.perf_counter(), cut_answer(progress.raw_text)
        self._turns[progress.history :] = [Turn(progress.turn.question, text, progress.turn.num_images)]
        self._images[progress.history :] = [progress.images]
        self.last_answer = Answer(
            text=text,
            finish_reason=progress.finish_reason,
            prompt_tokens=len(progress.keys),
            cached_tokens=progress.num_cached,
            new_tokens=len(progress.new_ids),
            seconds_to_first_token=(progress.first_token_at or end) - progress.start,
            seconds=end - progress.start,
        )
        if self._cache is not None and self._reuse_cache:
            self._cached_keys = (progress.keys + progress.new_ids)[: self._cache.get_seq_length()]
        else:
            self._drop_cache()

    def _tokens(self, progress: _Progress) -> Iterator[int]:
        """Yield new tokens one by one; a token is computed only when it is asked for."""
        settings, input_ids = progress.settings, progress.input_ids
        model, processors = self.loaded.model, settings.logits_processors()
        generator = None if settings.seed is None else torch.Generator(model.device).manual_seed(settings.seed)
        cache, progress.num_cached = self._cache_for(progress.keys)
        logits = self._prefill(progress, cache)
        # Logits processors index the vocabulary with the ids, so -200 cannot stay in them.
        seen = torch.tensor([[max(token, 0) for token in input_ids]], device=logits.device)
        while True:
            scores = processors(seen, logits)
            if settings.temperature > 0:
                token = torch.multinomial(scores.softmax(-1), 1, generator=generator)
            else:
                token = scores.argmax(-1, keepdim=True)
            yield int(token)
            seen = torch.cat([seen, token], dim=1)
            if seen.shape[1] - len(input_ids) >= progress.max_new_tokens:
                return
            logits = self._step(token, cache)

    @torch.inference_mode()
    def _prefill(self, progress: _Progress, cache: Cache) -> torch.Tensor:
        """Feed what the cache does not hold yet; return the logits of the last position, ``(1, vocabulary)``."""
        model = self.loaded.model
        fused = model.fuse(torch.tensor([progress.input_ids], device=model.device), image_features=progress.features)
        new_embeds = fused.inputs_embeds[:, progress.num_cached :]
        logits: torch.Tensor = model(
            inputs_embeds=new_embeds, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        return logits[:, -1].float()

    @torch.inference_mode()
    def _step(self, token: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Feed one token; return the logits after it, ``(1, vocabulary)``."""
        model = self.loaded.model
        logits: torch.Tensor = model(input_ids=token.to(model.device), past_key_values=cache, use_cache=True).logits
        return logits[:, -1].float()

    def _beam_tokens(self, progress: _Progress) -> Iterator[int]:
        """Yield the tokens of a beam search, which are known only at its end; no cache is kept."""
        self._drop_cache()
        tokenizer, model, length = self.loaded.tokenizer, self.loaded.model, len(progress.input_ids)
        with torch.inference_mode(), _seeded(progress.settings.seed):
            output = model.generate(
                torch.tensor([progress.input_ids], device=model.device),
                image_features=progress.features,
                generation_config=progress.settings.generation_config(tokenizer, progress.max_new_tokens),
                stopping_criteria=StoppingCriteriaList(
                    [StopOnText(tokenizer, length), StopOnEvent(progress.stop_event)]
                ),
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


def _position_keys(input_ids: Sequence[int], images: Sequence[_Image]) -> list[int]:
    """Return what each position of the fused sequence holds: a token id, or a negative number for its picture."""
    keys: list[int] = []
    remaining = iter(images)
    for token in input_ids:
        if token == IMAGE_TOKEN_INDEX:
            image = next(remaining)
            keys += [-image.serial] * len(image.features)
        else:
            keys.append(token)
    return keys


def _as_list(image: ImageSource | Sequence[ImageSource] | None) -> list[ImageSource]:
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
