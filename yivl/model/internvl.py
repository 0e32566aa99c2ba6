"""InternVLChatModel: the model of the package under the API of the model card of InternVL-Chat-V1-2."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from yivl.constants import IMAGE_TOKEN_INDEX, IMG_CONTEXT, IMG_END, IMG_START, LLAVA_IMAGE_TOKEN
from yivl.conversation import Control, Piece, PromptTemplate, prompt_text
from yivl.model.fusion import collapse_image_tokens, merge_features, position_ids_from_mask
from yivl.model.internvl_configuration import InternVLConfig
from yivl.model.modeling import YiVLForCausalLM
from yivl.model.tagged_prompts import tagged_prompt, with_tag
from yivl.model.vision_tower import Images, stack_images
from yivl.tokenization import YiTokenizer, stop_id, tokenize

History = list[tuple[str, str]]
"""Questions, with ``<image>`` where their images are, and answers."""

Settings: TypeAlias = Mapping[str, Any] | GenerationConfig | None
"""Arguments of ``generate``, such as ``max_new_tokens`` and ``do_sample``; ``None`` for none."""


class InternVLChatModel(YiVLForCausalLM):
    """InternVL-Chat. In memory, names are those of Yi-VL; the published ones differ by the prefixes of the parts.

    Beside the calls of ``YiVLForCausalLM``, with one ``-200`` per image, it takes those of the original, whose ids hold
    one ``<IMG_CONTEXT>`` per image token. Source: OpenGVLab/InternVL,
    internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py.
    """

    config: InternVLConfig
    img_context_token_id: int | None = None
    """Id of ``<IMG_CONTEXT>`` in the vocabulary of the tokenizer; the configuration does not hold it."""

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return projected features, ``(num_images, num_patches, hidden)``: what replaces ``<IMG_CONTEXT>``.

        Args:
            pixel_values: ``(num_images, 3, image_size, image_size)``, normalized.
        """
        return self.encode_images(pixel_values)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        images: Images | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        *,
        pixel_values: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits and, with labels, the loss: at the positions of ``input_ids`` if there are ``pixel_values``.

        Args:
            input_ids: ``(batch, seq)`` int64 with ``<IMG_CONTEXT>`` at image tokens; with ``-200`` at image slots if
                ``images`` are given instead of ``pixel_values``.
            attention_mask: ``(batch, seq)``, 0 at padding.
            position_ids: Rotary positions, ``(batch, seq)``; by default the number of preceding real tokens.
            past_key_values: Key-value cache of transformers, empty if there are ``pixel_values``.
            inputs_embeds: Of ``YiVLForCausalLM.forward``, as ``images``, ``logits_to_keep`` and ``kwargs``.
            labels: ``(batch, seq)`` int64, ``IGNORE_INDEX`` where no loss is computed.
            pixel_values: ``(num_images, 3, image_size, image_size)``, normalized.
            image_flags: ``(num_images,)`` or ``(num_images, 1)``, 0 for an image that stands for none: it is encoded,
                so that all ranks run the ViT, and its features are dropped.

        Raises:
            ValueError: If image tokens and images differ in number. The original cuts surplus features and prints a
                warning.
        """
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pixel_values without input_ids; give the ids that say where the images stand")
            inputs_embeds = self._embed(input_ids, pixel_values, image_flags)
            input_ids = None
            if position_ids is None and attention_mask is not None:
                position_ids = position_ids_from_mask(attention_mask)
        return super().forward(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            labels,
            images,
            logits_to_keep,
            **kwargs,
        )

    def _embed(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, image_flags: torch.Tensor | None
    ) -> torch.Tensor:
        """Return embeddings, ``(batch, seq, hidden)``, of ids with ``<IMG_CONTEXT>`` at image tokens.

        Raises:
            ValueError: If the id of ``<IMG_CONTEXT>`` is unknown, or image tokens and images differ in number.
        """
        is_image = input_ids == self._context_id()
        features = self.extract_feature(pixel_values)
        if image_flags is not None:
            if image_flags.numel() != len(features):
                raise ValueError(f"image_flags has {image_flags.numel()} entries for {len(features)} images")
            features = features[image_flags.flatten().to(features.device) == 1]
        num_images, num_patches = features.shape[:2]
        if (count := int(is_image.sum())) != num_images * num_patches:
            raise ValueError(
                f"input_ids have {count} <IMG_CONTEXT> tokens; expected {num_patches} for each of {num_images} images"
            )
        text_embeds = self.get_input_embeddings()(input_ids).to(input_ids.device)
        return merge_features(input_ids.masked_fill(is_image, IMAGE_TOKEN_INDEX), text_embeds, features)

    def _context_id(self) -> int:
        if self.img_context_token_id is None:
            raise ValueError("img_context_token_id is None; set it to the id of <IMG_CONTEXT> in the tokenizer")
        return self.img_context_token_id

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        images: Images | None = None,
        attention_mask: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate after a prompt: the call of ``YiVLForCausalLM``, or that of the original, with ``pixel_values``.

        Args:
            inputs: ``(batch, seq)`` int64 with ``-200`` at image slots, as ``images``, ``attention_mask`` and
                ``image_features`` of ``YiVLForCausalLM.generate``. The result starts with these ids.
            images: One image per ``-200``.
            attention_mask: ``(batch, seq)``, 0 at padding, of both calls.
            image_features: Instead of ``images``.
            **kwargs: Arguments of ``GenerationMixin.generate``, and of the call of the original:
                ``pixel_values``, ``(num_images, 3, image_size, image_size)``, or ``None`` for text only, with
                ``input_ids`` that hold one ``<IMG_CONTEXT>`` per image token; ``visual_features``,
                ``(num_images, num_patches, hidden)``, instead of encoding the pixels. The result has the new ids only.

        Raises:
            ValueError: If there are no ids, or image tokens and images differ in number.
        """
        if "pixel_values" not in kwargs:
            return super().generate(inputs, images, attention_mask, image_features, **kwargs)
        pixel_values, features = kwargs.pop("pixel_values"), kwargs.pop("visual_features", None)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None:
            raise ValueError("generate needs input_ids")
        slots = input_ids
        if pixel_values is not None:
            num_patches = self.config.num_patches
            slots, attention_mask = collapse_image_tokens(input_ids, attention_mask, self._context_id(), num_patches)
        output = super().generate(slots, pixel_values if features is None else None, attention_mask, features, **kwargs)
        if isinstance(output, torch.Tensor):
            return output[:, input_ids.shape[1] :]
        output.sequences = output.sequences[:, input_ids.shape[1] :]
        return output

    @property
    def system_message(self) -> str:
        """System message of ``chat`` and ``batch_chat``. Setting it changes the configuration, which is saved."""
        return self.config.prompt_template.system

    @system_message.setter
    def system_message(self, text: str) -> None:
        self.config.system_message = text

    def chat(
        self,
        tokenizer: YiTokenizer,
        pixel_values: torch.Tensor | None,
        question: str,
        generation_config: Settings,
        history: Sequence[Sequence[str]] | None = None,
        return_history: bool = False,
        num_patches_list: Sequence[int] | None = None,
        IMG_START_TOKEN: str = IMG_START,  # noqa: N803 (the three names of the original)
        IMG_END_TOKEN: str = IMG_END,  # noqa: N803
        IMG_CONTEXT_TOKEN: str = IMG_CONTEXT,  # noqa: N803
        verbose: bool = False,
    ) -> str | tuple[str, History]:
        """Return the answer to a question, and with ``return_history`` the conversation for the next call.

        Each ``<image>`` in a question, earlier ones included, is the place of the next entry of ``num_patches_list``;
        further ones are text. A first question without any gets one in front of it. All other text is data, control
        tokens included. Everything is computed again at every call; ``yivl.inference.chat.Chat`` keeps it.

        Args:
            tokenizer: Of ``load_tokenizer`` or ``load_pretrained_model``.
            pixel_values: All images of the conversation, ``(num_images, 3, image_size, image_size)``, or ``None``. One
                image may be without the first dimension.
            question: The question.
            generation_config: Arguments of ``generate``. Greedy by default; an answer ends with ``<|im_end|>``,
                whatever ``eos_token_id`` is, and of several (``num_return_sequences``) it is the first.
            history: Earlier questions and answers, as they were returned; it is not changed.
            return_history: Return the history with this turn, too.
            num_patches_list: Images that stand at each ``<image>``; by default all of them at one.
            IMG_START_TOKEN: Control token before an image.
            IMG_END_TOKEN: Control token after an image.
            IMG_CONTEXT_TOKEN: Control token that stands for an image token in the ids of ``forward``.
            verbose: Print the prompt and the answer.

        Raises:
            ValueError: If the numbers of images, of ``<image>`` and in ``num_patches_list`` do not fit together.
            ContextLengthError: If the conversation exceeds the context length.
            TypeError: If the tokenizer is another class, ``generation_config`` holds no arguments, or the history no
                questions and answers.
        """
        pixel_values = None if pixel_values is None else stack_images(pixel_values)
        num_images = 0 if pixel_values is None else len(pixel_values)
        tiles = [num_images] * (num_images > 0) if num_patches_list is None else list(num_patches_list)
        if min(tiles, default=1) < 1 or sum(tiles) != num_images:
            raise ValueError(
                f"num_patches_list is {tiles}; expected the number of images at each {LLAVA_IMAGE_TOKEN}, "
                f"{num_images} in sum"
            )
        earlier = _turns(history or ())
        if not earlier and tiles:
            question = with_tag(question)
        template = self._template(tokenizer, IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN)
        prompt = tagged_prompt(template, earlier, question, tiles)
        [answer] = self._answer(tokenizer, [prompt], pixel_values, generation_config)
        if verbose:
            print(prompt_text(prompt) + answer)  # noqa: T201 (asked for)
        return (answer, [*earlier, (question, answer)]) if return_history else answer

    def batch_chat(
        self,
        tokenizer: YiTokenizer,
        pixel_values: torch.Tensor | None,
        questions: Sequence[str],
        generation_config: Settings,
        num_patches_list: Sequence[int] | None = None,
        history: None = None,
        return_history: bool = False,
        IMG_START_TOKEN: str = IMG_START,  # noqa: N803 (as above)
        IMG_END_TOKEN: str = IMG_END,  # noqa: N803
        IMG_CONTEXT_TOKEN: str = IMG_CONTEXT,  # noqa: N803
        verbose: bool = False,
        image_counts: Sequence[int] | None = None,
    ) -> list[str]:
        """Return the answers to independent questions, generated together: those of ``chat`` one by one.

        Args:
            tokenizer: Of ``chat``, as the arguments that are not listed here.
            pixel_values: The images of all questions, in order.
            questions: The questions.
            generation_config: For all questions.
            num_patches_list: Number of images of each question, 0 for none; by default 1, or 0 without
                ``pixel_values``. They stand at its first ``<image>``.
            history: Not supported, as ``return_history``.
            image_counts: Former name of ``num_patches_list``.

        Raises:
            NotImplementedError: If a history is given or asked for.
            ValueError: If ``num_patches_list`` does not fit the questions or the images.
            ContextLengthError: If a question exceeds the context length.
            TypeError: As ``chat``, and if the questions are one text.
        """
        if isinstance(questions, str):
            raise TypeError("questions is one text; expected a list of them, or use chat")
        if history is not None or return_history:
            raise NotImplementedError("batch_chat asks independent questions; use chat for a conversation")
        pixel_values = None if pixel_values is None else stack_images(pixel_values)
        num_images = 0 if pixel_values is None else len(pixel_values)
        counts = image_counts if num_patches_list is None else num_patches_list
        counts = [int(num_images > 0)] * len(questions) if counts is None else list(counts)
        if len(counts) != len(questions) or min(counts, default=0) < 0 or sum(counts) != num_images:
            raise ValueError(
                f"num_patches_list is {counts}; expected the number of images of each of {len(questions)} questions, "
                f"{num_images} in sum"
            )
        template = self._template(tokenizer, IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN)
        prompts = [
            tagged_prompt(template, [], with_tag(question), [count])
            if count
            else tagged_prompt(template, [], question, [])
            for question, count in zip(questions, counts, strict=True)
        ]
        answers = self._answer(tokenizer, prompts, pixel_values, generation_config)
        if verbose:
            for prompt, answer in zip(prompts, answers, strict=True):
                print(prompt_text(prompt) + answer)  # noqa: T201 (asked for)
        return answers

    def _template(self, tokenizer: YiTokenizer, start: str, end: str, context: str) -> PromptTemplate:
        """Return the prompt template with the tokens of a call, as the original remembering that of image tokens.

        Raises:
            TypeError: If the tokenizer is another class.
        """
        if not isinstance(tokenizer, YiTokenizer):
            raise TypeError(
                f"{type(tokenizer).__name__} yields other ids than the original; use the tokenizer of "
                "yivl.mm_utils.load_pretrained_model, or yivl.tokenization.load_tokenizer"
            )
        self.img_context_token_id = tokenizer.control_id(context)
        return replace(self.config.prompt_template, around_image=((Control(start),), (Control(end),)))

    def _answer(
        self,
        tokenizer: YiTokenizer,
        prompts: Sequence[Sequence[Piece]],
        pixel_values: torch.Tensor | None,
        generation_config: Settings,
    ) -> list[str]:
        """Return the answers to prompts, whose images are in order."""
        settings = _arguments(generation_config)
        if not prompts:
            return []
        rows = [torch.tensor(tokenize(pieces, tokenizer)) for pieces in prompts]
        input_ids = pad_sequence(rows, batch_first=True, padding_side="left").to(self.device)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        stop = stop_id(self.config.prompt_template, tokenizer)
        settings |= {"eos_token_id": stop, "pad_token_id": tokenizer.pad_token_id, "return_dict_in_generate": False}
        output = self.generate(input_ids, pixel_values, mask.to(self.device), **settings)
        answers = output[:: len(output) // len(prompts), input_ids.shape[1] :].tolist()
        return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]


def _turns(history: Sequence[Sequence[str]]) -> History:
    """Return the turns of a history.

    Raises:
        TypeError: If one is no pair of texts.
    """
    turns: History = []
    for turn in history:
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise TypeError(f"the history has {turn!r:.80}; expected pairs of a question and its answer, both texts")
        turns.append((turn[0], turn[1]))
    return turns


def _arguments(generation_config: Settings) -> dict[str, Any]:
    """Return arguments of ``generate``.

    Raises:
        TypeError: If there are none in it.
    """
    if isinstance(generation_config, GenerationConfig):
        return {"generation_config": generation_config}
    if isinstance(generation_config, Mapping | None):
        return dict(generation_config or {})
    raise TypeError(
        f"generation_config is of type {type(generation_config).__name__}; expected a dict of arguments of generate"
    )
