"""Export for llama.cpp: one GGUF file of the language model, one of ViT and projector (``mmproj``).

llama.cpp does not process images exactly as this package does: docs/interop.md lists the differences.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final, Literal, cast

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    LlamaFileType,
    TokenType,
    get_tensor_name_map,
)

from yivl.checkpoint.atomic import atomic_file, flush
from yivl.checkpoint.download import resolve_checkpoint
from yivl.checkpoint.folder import read_all_weights
from yivl.checkpoint.format import PROJECTOR, VIT, StateDict, check_keys
from yivl.checkpoint.full_disk import explain_full_disk
from yivl.checkpoint.loading import empty_model, read_small_files
from yivl.constants import STOP_STRING
from yivl.errors import CheckpointError, YiVLError
from yivl.export.llava import chat_template
from yivl.image_processing import ImageProcessor
from yivl.model.configuration import YiVLConfig
from yivl.tokenization import YiTokenizer, tokenize

Dtype = Literal["float32", "float16", "bfloat16"]

_FORMATS: Final = {
    "float32": (torch.float32, GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (torch.float16, GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (torch.bfloat16, GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}

Convert = Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]
"""Checkpoint key and tensor to GGUF name and tensor; ``None`` if the file does not hold it."""


def export_gguf(checkpoint: Path, folder: Path, *, dtype: Dtype) -> tuple[Path, Path]:
    """Write ``<name>-<dtype>.gguf`` and ``mmproj-<name>-<dtype>.gguf`` and return their paths.

    Weight files are memory-mapped one at a time and tensors converted one at a time. The ViT is that of ``vit/``,
    without the layers that never run.

    Args:
        checkpoint: Checkpoint folder or hub id; its last part is the name.
        folder: Created if it does not exist.
        dtype: Of the matrices; llama.cpp wants vectors and the position embeddings of the ViT in float32.

    Raises:
        CheckpointError: If the checkpoint is damaged or not supported by llama.cpp, or a target exists.
        YiVLError: If the dtype is unknown.
    """
    if dtype not in _FORMATS:
        raise YiVLError(f"dtype={dtype!r}; expected one of {', '.join(_FORMATS)}")
    name = Path(checkpoint).resolve().name
    targets = folder / f"{name}-{dtype}.gguf", folder / f"mmproj-{name}-{dtype}.gguf"
    for target in targets:
        if target.exists():
            raise CheckpointError(f"{target}: exists already; remove it or give another folder")
    source = resolve_checkpoint(checkpoint)
    config, tokenizer, image_processor = read_small_files(source)
    _check_supported(source, config)
    weights = read_all_weights(source, config)
    check_keys(source, empty_model(config).state_dict(), weights)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with explain_full_disk(folder), atomic_file(targets[0]) as language, atomic_file(targets[1]) as vision:
            with _writer(language, MODEL_ARCH.LLAMA, GGUFType.MODEL, name, dtype) as writer:
                _add_language_fields(writer, config)
                _add_vocabulary(writer, config, tokenizer)
                _write_tensors(writer, weights, _language_tensors(config), dtype)
            with _writer(vision, MODEL_ARCH.MMPROJ, GGUFType.MMPROJ, name, dtype) as writer:
                _add_vision_fields(writer, config, image_processor)
                _write_tensors(writer, weights, _vision_tensors(config), dtype)
            flush(language)  # takes long; from here on, both get their names within a moment
    except BaseException:
        targets[1].unlink(missing_ok=True)  # it may be in its place before the other one cannot be written
        raise
    return targets


def _check_supported(source: Path, config: YiVLConfig) -> None:
    """Refuse what llama.cpp would silently compute differently. Source: llama.cpp, tools/mtmd/models/llava.cpp."""
    vision = config.vision_config
    supported: dict[str, tuple[object, tuple[object, ...]]] = {
        "mm_projector_type": (config.mm_projector_type, ("mlp2x_gelu_Norm", "mlp2x_gelu")),
        "mm_vision_select_feature": (config.mm_vision_select_feature, ("patch",)),
        "image_aspect_ratio": (config.image_aspect_ratio, ("pad",)),
        "hidden_act": (config.hidden_act, ("silu",)),
        "attention_bias": (config.attention_bias, (False,)),
        "mlp_bias": (config.mlp_bias, (False,)),
        "rope_type": (config.rope_parameters["rope_type"], ("default",)),
        "hidden_act of the ViT": (vision.hidden_act, ("gelu", "quick_gelu")),
        # Of the projector's LayerNorms, too: torch.nn.LayerNorm has 1e-5, and llama.cpp uses that of the ViT.
        "layer_norm_eps of the ViT": (vision.layer_norm_eps, (1e-5,)),
    }
    for name, (value, known) in supported.items():
        if value not in known:
            expected = " or ".join(map(repr, known))
            raise CheckpointError(f"{source}: {name}={value!r} cannot be exported; expected {expected}")


@contextmanager
def _writer(path: Path, arch: MODEL_ARCH, kind: str, name: str, dtype: Dtype) -> Iterator[GGUFWriter]:
    """Yield a writer with the fields that both files have."""
    with closing(GGUFWriter(path, MODEL_ARCH_NAMES[arch])) as writer:
        writer.add_type(kind)
        writer.add_name(name)
        writer.add_file_type(_FORMATS[dtype][2])
        yield writer


def _add_language_fields(writer: GGUFWriter, config: YiVLConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_vocabulary(writer: GGUFWriter, config: YiVLConfig, tokenizer: YiTokenizer) -> None:
    """Add the vocabulary, so that llama.cpp tokenizes as ``tokenize`` does and stops at ``###``."""
    tokens = [_token(index, tokenizer) for index in range(config.vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in tokens])
    writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    stop_ids = tokenize([STOP_STRING], tokenizer)
    if len(stop_ids) == 1:  # as in every Yi vocabulary; llama.cpp stops at a token, not at a string
        writer.add_eot_token_id(stop_ids[0])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(chat_template())


def _token(index: int, tokenizer: YiTokenizer) -> tuple[str, float, TokenType]:
    """Return text, score and type of a token."""
    text, pieces = tokenizer.convert_ids_to_tokens(index), tokenizer.sp_model
    if text is None:
        return f"[PAD{index}]", 0.0, TokenType.UNUSED  # a padded vocabulary
    added = tokenizer.added_tokens_decoder.get(index)
    if index >= pieces.get_piece_size():
        return text, 0.0, TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    if pieces.is_unknown(index):
        kind = TokenType.UNKNOWN
    elif text in tokenizer.added_ids:
        kind = TokenType.CONTROL
    elif pieces.is_byte(index):
        kind = TokenType.BYTE
    elif pieces.is_control(index) or pieces.is_unused(index):
        kind = TokenType.UNUSED  # never the result of tokenization, special or not
    else:
        # Also SentencePiece's user-defined pieces, which are text in our prompts.
        kind = TokenType.NORMAL
    return text, pieces.get_score(index), kind


def _add_vision_fields(writer: GGUFWriter, config: YiVLConfig, image_processor: ImageProcessor) -> None:
    vision, clip = config.vision_config, image_processor.clip_processor
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")  # llama.cpp detects the LayerNorms from the tensors
    writer.add_vision_projection_dim(config.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_use_gelu(vision.hidden_act == "gelu")
    writer.add_vision_image_mean(clip.image_mean)
    writer.add_vision_image_std(clip.image_std)
    # Without the second field llama.cpp skips the last layer of the file.
    writer.add_vision_block_count(config.num_vision_layers)
    writer.add_array("clip.vision.feature_layer", [config.num_vision_layers])


def _language_tensors(config: YiVLConfig) -> Convert:
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)

    def convert(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        if key.startswith((VIT, PROJECTOR)):
            return None
        if key.endswith((".q_proj.weight", ".k_proj.weight")):
            tensor = _interleave_halves(tensor, config.head_dim)
        return cast(str, names.get_name(key, try_suffixes=(".weight",))), tensor  # without biases every key has a name

    return convert


def _interleave_halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return a query or key projection, ``(heads * head_dim, hidden)``, with the rows of each head interleaved.

    RoPE pairs dimension ``i`` with ``i + head_dim / 2`` in transformers and with ``i + 1`` in llama.cpp.
    Source: llama.cpp, conversion/llama.py.
    """
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _vision_tensors(config: YiVLConfig) -> Convert:
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, config.num_vision_layers)

    def convert(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        if key.startswith(PROJECTOR):
            return f"mm.{key.removeprefix(PROJECTOR)}", tensor
        # llama.cpp would apply post_layernorm, which comes after mm_vision_select_layer.
        if not key.startswith(VIT) or "post_layernorm" in key:
            return None
        name = key.replace(VIT, "vision_tower.vision_model.")
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        return None if found is None else (found, tensor)  # no name: a layer that never runs

    return convert


def _write_tensors(writer: GGUFWriter, weights: StateDict, convert: Convert, dtype: Dtype) -> None:
    """Write the file: fields, then the headers of all tensors, then the tensors one by one."""

    def tensors(*, shapes_only: bool) -> Iterator[tuple[str, torch.Tensor]]:
        for key, value in weights.items():
            if converted := convert(key, value.to("meta") if shapes_only else value):
                yield converted

    for name, tensor in tensors(shapes_only=True):
        torch_dtype, kind = _storage(name, tensor, dtype)
        num_bytes = tensor.numel() * torch_dtype.itemsize
        # The raw dtype overrides the NumPy one.
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors(shapes_only=False):
        stored = tensor.to(_storage(name, tensor, dtype)[0])
        # NumPy has no bfloat16; int16 carries the bits.
        bits = stored.view(torch.int16) if stored.dtype == torch.bfloat16 else stored
        writer.write_tensor_data(bits.numpy())


def _storage(name: str, tensor: torch.Tensor, dtype: Dtype) -> tuple[torch.dtype, GGMLQuantizationType]:
    """Return how a tensor is stored. Source: llama.cpp, conversion/base.py."""
    is_matrix = tensor.ndim > 1 and name != "v.position_embd.weight"
    # llama.cpp has no bfloat16 convolution.
    if not is_matrix or (dtype == "bfloat16" and name == "v.patch_embd.weight"):
        dtype = "float32"
    torch_dtype, kind, _ = _FORMATS[dtype]
    return torch_dtype, kind
