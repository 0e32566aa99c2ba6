"""What the LLaVA classes of transformers and SGLang read: configurations, tokenizer, processor, chat template."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from transformers import LlamaTokenizer

from yivl.checkpoint.atomic import write_json, write_text
from yivl.checkpoint.download import resolve_checkpoint
from yivl.checkpoint.folder import read_all_weights
from yivl.checkpoint.format import TOKENIZER_FILES, StateDict, check_keys
from yivl.checkpoint.hf_format import STRATEGIES, TEXT_FIELDS, read_published
from yivl.checkpoint.loading import empty_model, read_small_files
from yivl.constants import ASSISTANT, HUMAN, STOP_STRING, SYSTEM_PROMPT
from yivl.errors import CheckpointError
from yivl.image_processing import ImageProcessor
from yivl.model.configuration import YiVLConfig
from yivl.tokenization import YiTokenizer


@dataclass(frozen=True)
class Checkpoint:
    """Everything a Yi-VL checkpoint holds."""

    config: YiVLConfig
    tokenizer: YiTokenizer
    image_processor: ImageProcessor
    weights: StateDict
    """By checkpoint key; the ViT is that of ``vit/``, as in a loaded model."""
    small_files: dict[str, dict[str, Any]]
    """``config.json``, ``generation_config.json`` and those of the tokenizer, where they exist."""


def read_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint in full.

    Args:
        source: Checkpoint folder or hub id.

    Raises:
        CheckpointError: If something is missing or damaged, weights do not fit the configuration, or the projector is
            not ``mlp2x_gelu_Norm``: other programs support no other.
    """
    folder = resolve_checkpoint(source)
    config, tokenizer, image_processor = read_small_files(folder)
    if config.mm_projector_type != "mlp2x_gelu_Norm":
        raise CheckpointError(
            f"{folder}: mm_projector_type={config.mm_projector_type!r}; other programs read only 'mlp2x_gelu_Norm'"
        )
    weights = read_all_weights(folder, config)
    check_keys(folder, empty_model(config).state_dict(), weights)
    own = {name: json.loads(text) for name, text in tokenizer.files.items() if name in TOKENIZER_FILES}
    return Checkpoint(config, tokenizer, image_processor, weights, own | read_published(folder))


def text_config(config: YiVLConfig) -> dict[str, Any]:
    """Return the configuration of the language model."""
    fields = config.to_published_dict()
    names = (*TEXT_FIELDS, "rope_scaling", "rope_theta", "torch_dtype", "vocab_size")
    own = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return {name: fields[name] for name in names if name in fields} | own


def vision_config(config: YiVLConfig) -> dict[str, Any]:
    """Return the configuration of the ViT."""
    fields: dict[str, Any] = config.vision_config.to_diff_dict() | {"model_type": "clip_vision_model"}
    fields.pop("_name_or_path", None)  # a local path
    return fields


def chat_template(image_token: str = "") -> str:
    """Return the prompt of ``yivl.conversation`` as a chat template; the released tokenizer carries that of Yi-Chat.

    A first message of role ``system`` replaces the system prompt.

    Args:
        image_token: Written, with a line break, before a question for each of its images; empty where the program
            inserts a marker itself, as llama.cpp does.
    """
    lines = (Path(__file__).parent / "assets/chat_template.jinja").read_text(encoding="utf-8").splitlines()
    # One line without blanks: readers differ in how they treat white space around tags.
    return Template("".join(line.strip() for line in lines)).substitute(
        image=image_token + r"{{ '\n' }}" if image_token else "",
        system=SYSTEM_PROMPT,
        stop=STOP_STRING,
        human=HUMAN,
        assistant=ASSISTANT,
    )


def write_tokenizer(source: Checkpoint, target: Path, added: dict[str, int], special: dict[str, str]) -> None:
    """Write the tokenizer with added tokens, for slow and fast tokenizer classes, and with the chat template.

    Args:
        source: The checkpoint.
        target: Folder to write to.
        added: Tokens and their ids after the vocabulary; the first is the image token.
        special: Roles of added tokens, such as ``pad_token``.
    """
    source.tokenizer.save_pretrained(target)
    config, known_special, known = (source.small_files.get(name, {}) for name in TOKENIZER_FILES)
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    decoder = config.get("added_tokens_decoder", {}) | {
        str(index): {"content": token, "special": True, **flags} for token, index in added.items()
    }
    template = chat_template(next(iter(added)))
    write_text(target / "chat_template.jinja", template)  # where processors look for it
    changes = {"added_tokens_decoder": decoder, "chat_template": template}
    changes |= {"processor_class": "LlavaProcessor", "tokenizer_class": "LlamaTokenizer"}
    # Without it LlamaTokenizer of transformers 5 puts a blank before every piece, whatever tokenizer.json says.
    changes["add_prefix_space"] = False
    write_json(target / "tokenizer_config.json", config | changes | special)
    write_json(target / "special_tokens_map.json", known_special | special)
    write_json(target / "added_tokens.json", known | added)
    tokenizer = LlamaTokenizer.from_pretrained(os.fspath(target), add_prefix_space=False)
    tokenizer.backend_tokenizer.save(os.fspath(target / "tokenizer.json"))


def write_processor(source: Checkpoint, target: Path, image_token: str) -> None:
    """Write the CLIP preprocessing under the file name all versions know, and the settings of ``LlavaProcessor``."""
    names = {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    write_json(target / "preprocessor_config.json", source.image_processor.clip_processor.to_dict() | names)
    settings = {
        "image_token": image_token,
        "num_additional_image_tokens": 1,  # the class token, which "default" drops
        "patch_size": source.config.vision_config.patch_size,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": STRATEGIES[source.config.mm_vision_select_feature],
    }
    write_json(target / "processor_config.json", settings)
