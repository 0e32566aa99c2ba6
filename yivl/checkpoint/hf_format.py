"""The ``-hf`` format of Yi-VL-6B-hf, read under the names of the Yi-VL format; ``yivl.export.hf`` writes it.

The format is that of transformers' LLaVA before 4.52, with a projector of four layers, two of them LayerNorms, and with
two more tokens. Source: BUAADreamer/Yi-VL-6B-hf, config.json and README.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from transformers import GenerationConfig, LlamaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl.checkpoint.atomic import write_json
from yivl.checkpoint.format import (
    PROJECTOR,
    TOKENIZER_FILES,
    TOWER,
    VIT,
    StateDict,
    read_json,
    read_main_shapes,
    read_main_weights,
)
from yivl.checkpoint.vit import vision_config
from yivl.constants import STOP_STRING
from yivl.errors import CheckpointError
from yivl.files.schema import HfFields
from yivl.files.validation import check_fields, library_errors
from yivl.image_processing import clip_processor, load_clip_processor
from yivl.model.configuration import YiVLConfig, fields_for, generation_config
from yivl.tokenization import YiTokenizer, load_tokenizer, read_sentencepiece

PUBLISHED: Final = "published.json"
"""The small files of a converted checkpoint by name, for the conversion back. Source: ours."""

VOCABULARY: Final = ("model.embed_tokens.weight", "lm_head.weight")
"""Keys of the weights with a row per token, whose number the ``-hf`` format rounds up."""

STRATEGIES: Final = {"patch": "default", "cls_patch": "full"}
"""``mm_vision_select_feature`` and ``vision_feature_select_strategy`` of transformers' LLaVA."""

TEXT_FIELDS: Final = (
    *("attention_bias", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range"),
    *("intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
    *("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"),
)
"""Of the language model, without vocabulary size and RoPE."""

_LAST_LAYER: Final = "multi_modal_projector.linear_4."
# Prefixes of Yi-VL and of -hf; the first match counts. Source: Yi-VL-6B-hf, model.safetensors.index.json.
_NAMES: Final = (
    (f"{PROJECTOR}0.", "multi_modal_projector.linear_1."),
    (f"{PROJECTOR}1.", "multi_modal_projector.linear_2."),
    (f"{PROJECTOR}3.", "multi_modal_projector.linear_3."),
    (f"{PROJECTOR}4.", _LAST_LAYER),
    (TOWER, "vision_tower."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
# Prefixes of transformers since 4.52, and before. Source: transformers 5, conversion_mapping.py.
_SINCE: Final = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
# Fields of generation_config.json that describe the -hf vocabulary or are written by programs.
_NOT_SAMPLING: Final = ("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "transformers_version")


def is_hf(fields: Mapping[str, Any]) -> bool:
    """Whether the fields of a ``config.json`` are of transformers' LLaVA, with the mark of Yi-VL or without."""
    is_llava = fields.get("model_type") == "llava" and {"text_config", "vision_config"} <= fields.keys()
    # Exports for SGLang have both configurations, and are in the Yi-VL format.
    return "mm_vision_tower" not in fields and (bool(fields.get("is_yi_vl_derived_model")) or is_llava)


def to_hf_key(key: str) -> str:
    """Return the ``-hf`` name of a checkpoint key."""
    return _renamed(key, _NAMES)


def to_yivl_key(key: str) -> str:
    """Return the checkpoint key of an ``-hf`` name, as any version of transformers writes it."""
    key = _renamed(_renamed(key, _SINCE), [(hf, yivl) for yivl, hf in _NAMES])
    # Programs that save the keys of transformers 5.6 in memory leave out the last part of this prefix.
    return f"{VIT}{key.removeprefix(VIT).removeprefix(TOWER)}" if key.startswith(TOWER) else key


def _renamed(key: str, names: Sequence[tuple[str, str]]) -> str:
    return next((new + key.removeprefix(old) for old, new in names if key.startswith(old)), key)


def read_published(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the small files of a Yi-VL checkpoint, or of the one an ``-hf`` folder was converted from, by name.

    Of another Yi model these are the files of its tokenizer; of an ``-hf`` folder that does not record them, none.

    Raises:
        CheckpointError: If a file is damaged.
    """
    folder = Path(folder)
    if (folder / PUBLISHED).is_file():
        return read_json(folder / PUBLISHED)
    names: tuple[str, ...] = TOKENIZER_FILES
    if (folder / "config.json").is_file():
        fields = read_json(folder / "config.json")
        if is_hf(fields):
            return {}
        names = ("config.json", "generation_config.json", *names) if "mm_vision_tower" in fields else names
    return {name: read_json(folder / name) for name in names if (folder / name).is_file()}


def read_hf_config(folder: str | os.PathLike[str], published: Mapping[str, Any] | None = None) -> YiVLConfig:
    """Return the Yi-VL configuration of a folder; what it does not record is as in the released models.

    Args:
        folder: In the ``-hf`` format.
        published: Small files of a Yi-VL checkpoint by name; by default those that the folder records.

    Raises:
        CheckpointError: If ``config.json`` does not describe a Yi-VL model.
    """
    fields = read_json(Path(folder) / "config.json")
    original = (read_published(folder) if published is None else published).get("config.json", {})
    path = Path(folder) / "config.json"
    if missing := sorted({"text_config", "vision_config"} - fields.keys()):
        raise CheckpointError(f"{path}: not the -hf format of a Yi-VL model (no {missing[0]})")
    check_fields(path, fields, HfFields)
    vision = vision_config(fields["vision_config"], f"{path}: vision_config")
    with library_errors(f"{path}: not the -hf format of a Yi-VL model"):
        text = LlamaConfig(**fields_for(LlamaConfig, fields["text_config"])).to_dict()
        [select_feature] = [
            feature for feature, name in STRATEGIES.items() if name == fields["vision_feature_select_strategy"]
        ]
        config = {
            "architectures": ["LlavaLlamaForCausalLM"],  # these three as in the released models
            "image_aspect_ratio": "pad",
            "mm_vision_tower": "./vit/clip-vit",
            **original,
            **{name: text[name] for name in (*TEXT_FIELDS, "rope_parameters")},
            "mm_hidden_size": vision.hidden_size,
            "mm_vision_select_feature": select_feature,
            "mm_vision_select_layer": fields["vision_feature_layer"],
            "vision_config": vision,
            "vocab_size": fields["image_token_index"],
        }
        # rope_parameters holds the next two; an export for SGLang has the last.
        for name in ("model_type", "rope_theta", "rope_scaling", "text_config"):
            config.pop(name, None)
        result = YiVLConfig(**fields_for(YiVLConfig, config))
    if not fields.get("is_yi_vl_derived_model") and not any(_LAST_LAYER in key for key in read_main_shapes(folder)):
        raise CheckpointError(f"{folder}: another LLaVA; the projector of Yi-VL has four layers, linear_1 to linear_4")
    return result


def read_hf_shapes(folder: str | os.PathLike[str], config: YiVLConfig) -> StateDict:
    """Return all tensors by checkpoint key on the meta device, as ``read_hf_weights``.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    return _checkpoint_weights(read_main_shapes(folder), config)


def read_hf_weights(folder: str | os.PathLike[str], config: YiVLConfig) -> StateDict:
    """Return all tensors by checkpoint key, without the rows of the two tokens and of the padding.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    return _checkpoint_weights(read_main_weights(folder), config)


def _checkpoint_weights(published: StateDict, config: YiVLConfig) -> StateDict:
    weights = {to_yivl_key(key): value for key, value in published.items()}
    for key in weights.keys() & set(VOCABULARY):
        weights[key] = weights[key][: config.vocab_size].clone()  # part of a storage cannot be saved
    return weights


def read_hf_vit(folder: str | os.PathLike[str], config: YiVLConfig) -> StateDict:
    """Return the ViT under the keys of ``yivl.checkpoint.vit``.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    weights = {to_yivl_key(key): value for key, value in read_main_weights(folder).items()}
    return {key.removeprefix(VIT): value for key, value in weights.items() if key.startswith(VIT)}


def read_hf_generation_config(
    folder: str | os.PathLike[str], config: YiVLConfig, published: Mapping[str, Any] | None = None
) -> GenerationConfig:
    """Return the generation settings of the Yi-VL checkpoint: the published ones, or sampling as in the folder.

    Raises:
        CheckpointError: If a file is damaged.
    """
    name, published = "generation_config.json", read_published(folder) if published is None else published
    path = Path(folder) / name
    if name in published:
        return generation_config(published[name], path)
    fields = read_json(path) if path.is_file() else {}
    sampling = {key: value for key, value in fields.items() if key not in _NOT_SAMPLING and not key.startswith("_")}
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": 0}
    return generation_config(sampling | ids, path)


def load_hf_clip_processor(folder: str | os.PathLike[str], config: YiVLConfig | None = None) -> CLIPImageProcessorPil:
    """Load the CLIP preprocessing from its own file, or from the one that transformers 5 writes for a processor.

    Raises:
        CheckpointError: If there is neither.
    """
    if not (Path(folder) / "preprocessor_config.json").is_file():
        path = Path(folder) / "processor_config.json"
        if path.is_file() and "image_processor" in (fields := read_json(path)):
            return clip_processor(fields["image_processor"], path)
    return load_clip_processor(folder)


def load_hf_tokenizer(
    folder: str | os.PathLike[str], config: YiVLConfig, like: str | os.PathLike[str] | None = None
) -> YiTokenizer:
    """Return the tokenizer of the Yi-VL checkpoint, without the two tokens; saving it writes its published files.

    Args:
        folder: In the ``-hf`` format.
        config: Of the folder.
        like: Folder of any Yi model that has the files instead.

    Raises:
        CheckpointError: If there is no ``tokenizer.model``, or it is not that of the model.
    """
    source = Path(folder if like is None else like)
    if not (source / "tokenizer.model").is_file():
        where = "convert the folder with scripts/convert.py from-hf --like" if like is None else "give another --like"
        raise CheckpointError(
            f"{source}: no tokenizer.model (transformers 5 and LLaMA-Factory write none); copy that of the Yi-VL "
            f"checkpoint there, or {where}"
        )
    _check_vocabulary(Path(folder), source / "tokenizer.model", config)
    with tempfile.TemporaryDirectory() as temporary:
        shutil.copyfile(source / "tokenizer.model", Path(temporary) / "tokenizer.model")
        has_files = (source / TOKENIZER_FILES[0]).is_file()
        for name, content in _tokenizer_files(source if has_files else Path(folder), config.vocab_size).items():
            write_json(Path(temporary) / name, content)
        try:
            return load_tokenizer(temporary)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(temporary, str(source))) from error


def _tokenizer_files(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Return the small files of the tokenizer: the published ones, or else those of ``folder`` in their form."""
    published = read_published(folder)
    if TOKENIZER_FILES[0] in published:
        return {name: published[name] for name in TOKENIZER_FILES if name in published}
    config = read_json(folder / TOKENIZER_FILES[0])
    with library_errors(folder / TOKENIZER_FILES[0]):
        return _published_tokenizer_files(folder, config, vocab_size)


def _published_tokenizer_files(folder: Path, config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    added = config.get("added_tokens_decoder")
    if added is None and (folder / "tokenizer.json").is_file():  # the only place where transformers 5 has them
        tokens = read_json(folder / "tokenizer.json").get("added_tokens", [])
        added = {str(token["id"]): {key: token[key] for key in token.keys() - {"id"}} for token in tokens}
    # LLaMA-Factory declares the stop string a special token; in Yi-VL it is text.
    added = {
        index: token
        for index, token in (added or {}).items()
        if int(index) < vocab_size and token["content"] != STOP_STRING
    }
    special: dict[str, Any] = {name: config[name] for name in ("bos_token", "eos_token", "unk_token") if name in config}
    special |= {
        "additional_special_tokens": [token["content"] for token in added.values() if token["special"]],
        "pad_token": "<unk>",
    }
    fields = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    fields |= {name: config[name] for name in ("model_max_length",) if name in config}
    known = {token["content"]: int(index) for index, token in added.items()}
    return dict(zip(TOKENIZER_FILES, (fields | special, special, known), strict=True))


def _check_vocabulary(folder: Path, path: Path, config: YiVLConfig) -> None:
    """Refuse a ``tokenizer.model`` of other tokens than those of the model."""
    tokenizer = read_sentencepiece(path)
    pieces = {tokenizer.id_to_piece(index): index for index in range(tokenizer.get_piece_size())}
    if (folder / "tokenizer.json").is_file():
        match read_json(folder / "tokenizer.json"):
            case {"model": {"vocab": dict(vocabulary)}}:
                with library_errors(folder / "tokenizer.json"):  # an id may be no number
                    fits = {piece: index for piece, index in vocabulary.items() if index < config.vocab_size} == pieces
            case _:
                raise CheckpointError(f"{folder}/tokenizer.json: no vocabulary of a BPE model; download it again")
    else:  # Llama 2 has the same ids of both ends, but no token for the stop string
        ends = (tokenizer.bos_id(), tokenizer.eos_id()) == (config.bos_token_id, config.eos_token_id)
        fits = ends and STOP_STRING in pieces and len(pieces) <= config.vocab_size
    if not fits:
        raise CheckpointError(f"{path}: not the tokenizer of {folder}; take that of the Yi model it was trained from")
