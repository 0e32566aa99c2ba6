"""The published layout and the ``-hf`` layout of Yi-VL-6B-hf, both ways, without loss.

The ``-hf`` layout is that of transformers' LLaVA before 4.52, with a projector of four layers, two of them LayerNorms,
and with two more tokens. Source: BUAADreamer/Yi-VL-6B-hf, config.json and README.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlamaTokenizer

from yivl.bridges.template import chat_template
from yivl.errors import CheckpointError
from yivl.image_processing import load_clip_processor
from yivl.model.configuration import YiVLConfig, read_json
from yivl.model.loading import read_small_files, resolve_checkpoint
from yivl.model.modeling import YiVLForCausalLM
from yivl.model.saving import atomic_folder, save_checkpoint, save_shards, write_json
from yivl.model.vit_weights import read_vit_weights
from yivl.model.weight_files import StateDict, check_checkpoint_files, read_weights
from yivl.tokenization import load_tokenizer

IMAGE_TOKEN: Final = "<image>"
"""Takes the first id behind the vocabulary; in a prompt it stands once for each patch. Source: as above."""

PAD_TOKEN: Final = "<pad>"
"""Takes the next id. Source: as above."""

_MULTIPLE: Final = 64  # of which the vocabulary is one: 64,000 and two tokens are 64,064. Source: as above.
_TOWER: Final = "model.vision_tower.vision_tower."
_VOCABULARY: Final = ("model.embed_tokens.weight", "lm_head.weight")

# Ours and theirs; the first that fits is taken. Source: as above, model.safetensors.index.json.
_NAMES: Final = (
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.1.", "multi_modal_projector.linear_2."),
    ("model.mm_projector.3.", "multi_modal_projector.linear_3."),
    ("model.mm_projector.4.", "multi_modal_projector.linear_4."),
    (_TOWER, "vision_tower."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
# What transformers has written since 4.52, and the same before. Source: transformers 5, conversion_mapping.py.
_SINCE: Final = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
_BUFFERS: Final = (".rotary_emb.inv_freq", ".embeddings.position_ids")  # computed, not learned
_STRATEGIES: Final = {"patch": "default", "cls_patch": "full"}

_PUBLISHED: Final = "published.json"  # the small published files as they were, by name, for the way back
_TOKENIZER_FILES: Final = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEXT_FIELDS: Final = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def to_hf(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Write a checkpoint in the ``-hf`` layout; memory for the whole model is needed.

    Rows of the new tokens, and those that pad the vocabulary, are copies of the row of ``<unk>``, so that none of them
    is ever more likely than ``<unk>``. The small published files go along in ``published.json``.

    Args:
        source: Folder in the published layout, or hub id.
        target: Replaced if it holds a checkpoint.

    Raises:
        CheckpointError: If the projector has no ``-hf`` form, weights are missing, or ``target`` may not be replaced.
    """
    folder = resolve_checkpoint(source)
    config, _, image_processor = read_small_files(folder)
    if config.mm_projector_type != "mlp2x_gelu_Norm":
        raise CheckpointError(f"{folder}: mm_projector_type={config.mm_projector_type!r} has no -hf form")
    weights = _read(folder)
    vit = read_vit_weights(folder, config.mm_vision_tower)
    weights |= {f"{_TOWER}vision_model.{key}": value for key, value in vit.items()}
    _check(folder, _empty_model(config), weights)
    rows = -(-(config.vocab_size + 2) // _MULTIPLE) * _MULTIPLE
    for key in _VOCABULARY:
        weights[key] = torch.cat([weights[key], weights[key][:1].expand(rows - config.vocab_size, -1)])
    with atomic_folder(target) as new:
        save_shards({_renamed(key, _NAMES): value.contiguous() for key, value in weights.items()}, new, "5GB")
        write_json(new / "config.json", _their_config(config, rows, weights["lm_head.weight"].dtype))
        names = ("config.json", "generation_config.json", *_TOKENIZER_FILES)
        write_json(new / _PUBLISHED, {name: read_json(folder / name) for name in names if (folder / name).is_file()})
        generation = _read_if_there(folder / "generation_config.json")
        write_json(new / "generation_config.json", generation | {"pad_token_id": config.vocab_size + 1})
        _write_their_tokenizer(folder, new, config.vocab_size)
        _write_their_processor(image_processor.clip_processor.to_dict(), new, config)


def from_hf(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Write a checkpoint in the published layout; memory for the whole model is needed.

    What ``config.json`` does not say is taken from ``published.json``, and without that from the released models.

    Args:
        source: Folder in the ``-hf`` layout as Yi-VL-6B-hf, this module or a later version of transformers write it.
        target: Replaced if it holds a checkpoint.

    Raises:
        CheckpointError: If ``source`` is no such folder, weights are missing, or ``target`` may not be replaced.
    """
    folder = Path(source)
    published = _read_if_there(folder / _PUBLISHED)
    config = _our_config(folder, published.get("config.json", {}))
    if not (folder / "tokenizer.model").is_file():
        raise CheckpointError(f"{folder}: no tokenizer.model; copy that of the Yi model there")
    weights = {_to_ours(key): value for key, value in _read(folder).items()}
    for key in set(_VOCABULARY) & weights.keys():
        weights[key] = weights[key][: config.vocab_size].clone()
    model = _empty_model(config)
    _check(folder, model, weights)
    if "generation_config.json" in published:
        model.generation_config = GenerationConfig(**published["generation_config.json"])
    with tempfile.TemporaryDirectory() as own:
        shutil.copyfile(folder / "tokenizer.model", Path(own) / "tokenizer.model")
        _write_our_tokenizer(folder, Path(own), published, config.vocab_size)
        tokenizer, image_processor = load_tokenizer(own), load_clip_processor(folder)
        save_checkpoint(model, target, tokenizer=tokenizer, image_processor=image_processor, state_dict=weights)


def _read(folder: Path) -> StateDict:
    """Return all weights of a checkpoint."""
    weights: StateDict = {}
    for path in check_checkpoint_files(folder):
        weights |= read_weights(path)
    return {key: value for key, value in weights.items() if not key.endswith(_BUFFERS)}


def _renamed(key: str, names: Sequence[tuple[str, str]]) -> str:
    return next((new + key.removeprefix(old) for old, new in names if key.startswith(old)), key)


def _to_ours(key: str) -> str:
    key = _renamed(_renamed(key, _SINCE), [(theirs, ours) for ours, theirs in _NAMES])
    # transformers 5.6 dropped this part in memory, and programs that save from there do too.
    return (
        key
        if not key.startswith(_TOWER)
        else f"{_TOWER}vision_model.{key.removeprefix(_TOWER).removeprefix('vision_model.')}"
    )


def _empty_model(config: YiVLConfig) -> YiVLForCausalLM:
    """Return the model without its weights."""
    with torch.device("meta"):
        return YiVLForCausalLM(config)


def _check(folder: Path, model: YiVLForCausalLM, weights: Mapping[str, torch.Tensor]) -> None:
    """Compare names and shapes with those of the model."""
    wanted = {key: list(value.shape) for key, value in model.state_dict().items()}
    found = {key: list(value.shape) for key, value in weights.items()}
    if wanted != found:
        strange = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        raise CheckpointError(
            f"{folder}: {len(strange)} tensors do not fit config.json, such as {strange[0]}: "
            f"{found.get(strange[0], 'missing')}, expected {wanted.get(strange[0], 'none')}"
        )


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _their_config(config: YiVLConfig, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the fields of ``config.json``; those of Yi-VL-6B-hf, and the number of patches that newer readers use."""
    published = config.to_published_dict()
    text = {name: published[name] for name in (*_TEXT_FIELDS, "rope_scaling", "rope_theta") if name in published}
    name = str(dtype).removeprefix("torch.")
    vision = config.vision_config.to_diff_dict()
    vision.pop("_name_or_path", None)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": config.num_patches,
        "image_token_index": config.vocab_size,
        "is_yi_vl_derived_model": True,
        "model_type": "llava",
        "pad_token_id": config.vocab_size + 1,
        "projector_hidden_act": "gelu",
        "text_config": text
        | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": name, "vocab_size": rows},
        "tie_word_embeddings": False,
        "torch_dtype": name,
        "vision_config": vision | {"model_type": "clip_vision_model"},
        "vision_feature_layer": config.mm_vision_select_layer,
        "vision_feature_select_strategy": _STRATEGIES[config.mm_vision_select_feature],
    }


def _our_config(folder: Path, published: Mapping[str, Any]) -> YiVLConfig:
    fields = read_json(folder / "config.json")
    try:
        text = LlamaConfig(**fields["text_config"]).to_dict()
        vision = CLIPVisionConfig(**fields["vision_config"])
        [select_feature] = [
            ours for ours, theirs in _STRATEGIES.items() if theirs == fields["vision_feature_select_strategy"]
        ]
        ours = {
            "image_aspect_ratio": "pad",  # as in the released models
            "mm_vision_tower": "./vit/clip-vit",
            **published,
            **{name: text[name] for name in (*_TEXT_FIELDS, "rope_parameters")},
            "mm_hidden_size": vision.hidden_size,
            "mm_vision_select_feature": select_feature,
            "mm_vision_select_layer": fields["vision_feature_layer"],
            "vision_config": vision,
            "vocab_size": fields["image_token_index"],
        }
        for name in ("model_type", "rope_theta", "rope_scaling"):  # the last two are in rope_parameters
            ours.pop(name, None)
        return YiVLConfig(**ours)
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}/config.json: not the -hf layout of a Yi-VL model ({reason})") from error


def _write_their_tokenizer(folder: Path, new: Path, vocabulary: int) -> None:
    """Write the tokenizer with two more tokens, as files for programs old and new."""
    added = {IMAGE_TOKEN: vocabulary, PAD_TOKEN: vocabulary + 1}
    shutil.copyfile(folder / "tokenizer.model", new / "tokenizer.model")
    config, special, known = (_read_if_there(folder / name) for name in _TOKENIZER_FILES)
    decoder = config.get("added_tokens_decoder", {}) | {
        str(index): {"content": token, "special": True}
        | dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        for token, index in added.items()
    }
    template = chat_template(IMAGE_TOKEN)
    (new / "chat_template.jinja").write_text(template, encoding="utf-8")  # where processors look for it
    changes = {"added_tokens_decoder": decoder, "chat_template": template, "pad_token": PAD_TOKEN}
    changes |= {"processor_class": "LlavaProcessor", "tokenizer_class": "LlamaTokenizer"}
    write_json(new / "tokenizer_config.json", config | changes)
    write_json(new / "special_tokens_map.json", special | {"pad_token": PAD_TOKEN})
    write_json(new / "added_tokens.json", known | added)
    tokenizer = LlamaTokenizer.from_pretrained(os.fspath(new), add_prefix_space=False)
    tokenizer.backend_tokenizer.save(os.fspath(new / "tokenizer.json"))


def _write_our_tokenizer(folder: Path, new: Path, published: Mapping[str, Any], vocabulary: int) -> None:
    """Write the tokenizer's small files: the published ones, or else theirs without the two tokens."""
    if _TOKENIZER_FILES[0] in published:
        for name in set(_TOKENIZER_FILES) & published.keys():
            write_json(new / name, published[name])
        return
    config, special, known = (_read_if_there(folder / name) for name in _TOKENIZER_FILES)
    decoder = config.get("added_tokens_decoder", {})
    config |= {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {index: token for index, token in decoder.items() if int(index) < vocabulary},
        "pad_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer",
    }
    for name in ("chat_template", "extra_special_tokens", "image_token", "processor_class"):
        config.pop(name, None)
    write_json(new / "tokenizer_config.json", config)
    write_json(new / "special_tokens_map.json", special | {"pad_token": "<unk>"})
    write_json(new / "added_tokens.json", {token: index for token, index in known.items() if index < vocabulary})


def _write_their_processor(fields: Mapping[str, Any], new: Path, config: YiVLConfig) -> None:
    """Write the CLIP preprocessing, under the name that all versions know, and what ``LlavaProcessor`` needs."""
    names = {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    write_json(new / "preprocessor_config.json", {**fields, **names})
    write_json(
        new / "processor_config.json",
        {
            "image_token": IMAGE_TOKEN,
            "num_additional_image_tokens": 1,  # the class token, which "default" drops
            "patch_size": config.vision_config.patch_size,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": _STRATEGIES[config.mm_vision_select_feature],
        },
    )
