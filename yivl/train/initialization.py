"""Initialization of a run: from a checkpoint, or from a language model, a ViT and a new projector."""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from yivl.checkpoint.download import resolve_checkpoint
from yivl.checkpoint.folder import find_format, read_vit_weights
from yivl.checkpoint.format import StateDict, check_weight_file, read_json
from yivl.checkpoint.loading import empty_model, read_small_files, set_images
from yivl.checkpoint.projector import load_projector
from yivl.checkpoint.support import check_support
from yivl.checkpoint.vit_source import ViTSource, resolve_vit
from yivl.errors import CheckpointError, YiVLError
from yivl.files.validation import library_errors
from yivl.image_processing import ImageProcessor
from yivl.model.architectures import config_class, model_class
from yivl.model.attention import register_packed_sdpa
from yivl.model.configuration import YiVLConfig, fields_for
from yivl.model.modeling import YiVLForCausalLM
from yivl.model.sharding import gathered, new_parameter
from yivl.tokenization import YiTokenizer, add_image_tokens, check_control_tokens, check_vocabulary, load_tokenizer
from yivl.train.arguments import ModelArguments

_CPU = torch.device("cpu")
# Fields of a language model's config.json that do not hold for the vision-language model.
_OF_THE_LANGUAGE_MODEL = ("model_type", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version")
_SHAPE_OF_A_VIT = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "patch_size", "image_size"),
)


@dataclass(frozen=True)
class Start:
    """Everything about an initialization that is known before weights are read."""

    folder: Path
    config: YiVLConfig
    """With the image size and the vocabulary of the weights; ``image_size`` and ``num_new_tokens`` are of the run."""
    image_size: int
    """Side of the ViT input in pixels."""
    num_new_tokens: int
    """Tokens that are added to the vocabulary of a language model."""
    is_language_model: bool
    """Whether ``folder`` holds no projector and no ViT."""
    vit: ViTSource | None
    """A ViT that replaces the checkpoint's own."""
    tokenizer: YiTokenizer
    image_processor: ImageProcessor


def read_start(arguments: ModelArguments, *, device: torch.device = _CPU, weights: bool = True) -> Start:
    """Read the small files of ``--model_name_or_path`` and ``--vision_tower``, then download weights if all flags fit.

    Args:
        arguments: Of the run.
        device: Of this rank.
        weights: Whether to download weights that are not on this machine; a dry run needs none.

    Raises:
        CheckpointError: If something is missing, damaged or does not fit.
        YiVLError: If flags do not fit the checkpoint, or an adapter could not be used after training.
    """
    folder = resolve_checkpoint(arguments.model_name_or_path, weights=False)
    is_language_model = find_format(read_json(folder / "config.json")) is None
    num_new_tokens = 0
    vit: ViTSource | None
    if is_language_model:
        vit = _vit_of_parts(folder, arguments)
        config, clip_processor = _config_of_parts(folder, vit, arguments), vit.clip_processor
        tokenizer, num_new_tokens = _tokenizer_of_parts(folder, config)
    else:
        config, tokenizer, image_processor = read_small_files(folder)
        clip_processor = image_processor.clip_processor
        vit = _replacing_vit(folder, config, arguments)
    _set_drop_path_rate(config.vision_config, arguments.drop_path_rate)
    if arguments.pretrain_mm_mlp_adapter is not None:
        check_weight_file(Path(arguments.pretrain_mm_mlp_adapter))
    image_size = config.vision_config.image_size if arguments.image_size is None else arguments.image_size
    image_processor = set_images(
        config, clip_processor, image_size=image_size, image_aspect_ratio=arguments.image_aspect_ratio
    )
    config.to_published_dict()  # what the checkpoint format cannot express is refused before training
    is_on_cpu = device.type == "cpu"
    bits_on_cpu = arguments.bits if is_on_cpu else 16
    check_support(config, arguments.attn_implementation, is_on_cpu=is_on_cpu, bnb_bits_on_cpu=bits_on_cpu)
    compares_vits = vit is not None and arguments.lora_enable and not arguments.unfreeze_mm_vision_tower
    if weights or compares_vits:
        folder = resolve_checkpoint(arguments.model_name_or_path)
        vit = None if arguments.vision_tower is None else resolve_vit(arguments.vision_tower)
    if vit is not None and compares_vits:
        _check_same_vit(vit, read_vit_weights(folder, config))
    return Start(folder, config, image_size, num_new_tokens, is_language_model, vit, tokenizer, image_processor)


def load_start(
    start: Start, arguments: ModelArguments, *, dtype: torch.dtype, packing: bool, device: torch.device = _CPU
) -> YiVLForCausalLM:
    """Return the model with its weights and the image size of the run: on the CPU, or on ``device`` if it is quantized.

    Raises:
        CheckpointError: If weights are missing or do not fit.
    """
    attention = arguments.attn_implementation
    model = model_class(start.config).from_pretrained(
        start.folder,
        config=start.config,
        attn_implementation=register_packed_sdpa() if packing and attention == "sdpa" else attention,
        dtype=dtype,
        # Quantized weights are placed while they are loaded; they cannot be moved later.
        device_map=None if arguments.bits == 16 else {"": str(device)},
        bits=arguments.bits,
        image_size=start.image_size,
        vit_weights=None if start.vit is None else start.vit.read_weights(),
        fresh_projector=start.is_language_model,
    )
    if start.num_new_tokens:
        _add_embeddings(model, len(start.tokenizer), start.num_new_tokens)
    if arguments.pretrain_mm_mlp_adapter is not None:
        load_projector(model, Path(arguments.pretrain_mm_mlp_adapter))
    model.config.use_cache = False
    return model


def empty_start(start: Start) -> YiVLForCausalLM:
    """Return the model of a dry run, on the meta device."""
    if start.num_new_tokens:
        start.config.vocab_size = len(start.tokenizer)
    model = empty_model(start.config)
    model.resize_images(start.image_size)
    return model


def _replacing_vit(folder: Path, config: YiVLConfig, arguments: ModelArguments) -> ViTSource | None:
    """Return the ViT of ``--vision_tower`` for a checkpoint, which has a projector and a ViT.

    Raises:
        CheckpointError: If flags are for another projector or ViT; names all of them.
    """
    wrong = [name for name, value in arguments.of_a_new_model.items() if value != getattr(config, name, None)]
    vit, problems = None, []
    if arguments.vision_tower is not None:
        try:
            vit = resolve_vit(arguments.vision_tower, weights=False)
        except CheckpointError as error:
            problems.append(f"--vision_tower {error}")
        else:
            if any(getattr(vit.config, name) != getattr(config.vision_config, name) for name in _SHAPE_OF_A_VIT):
                wrong.append("vision_tower")
    if wrong:
        flags = ", ".join(f"--{name} {getattr(arguments, name)}" for name in wrong)
        problems.insert(
            0, f"{flags}: {folder} has another projector or ViT; drop them, or initialize from a language model"
        )
    if problems:
        raise CheckpointError("; ".join(problems))
    return vit


def _check_same_vit(vit: ViTSource, own: StateDict) -> None:
    """Refuse a frozen ViT other than the base model's under LoRA: an adapter folder does not hold it."""
    other = vit.read_weights()
    if own.keys() != other.keys() or any(not torch.equal(value, other[key]) for key, value in own.items()):
        raise YiVLError(
            f"--vision_tower {vit.path}: not the ViT of the base model, and an adapter does not store a frozen ViT; "
            "add --unfreeze_mm_vision_tower True, or drop --vision_tower"
        )


def _vit_of_parts(folder: Path, arguments: ModelArguments) -> ViTSource:
    """Return the ViT for a language model.

    Raises:
        CheckpointError: If there is no such ViT.
        YiVLError: If only adapters would be trained.
    """
    if arguments.vision_tower is None:
        raise CheckpointError(f"{folder}: a language model without a ViT; give one with --vision_tower")
    if arguments.lora_enable:
        raise YiVLError(f"--lora_enable: {folder} is a language model without a projector; give a checkpoint")
    return resolve_vit(arguments.vision_tower, weights=False)


def _tokenizer_of_parts(folder: Path, config: YiVLConfig) -> tuple[YiTokenizer, int]:
    """Return the tokenizer of a language model with the image tokens of the template, and how many it lacked."""
    tokenizer = load_tokenizer(folder)
    check_vocabulary(folder, tokenizer, config.vocab_size)
    complete = add_image_tokens(tokenizer) if any(config.prompt_template.around_image) else tokenizer
    check_control_tokens(folder, complete, config.prompt_template)
    return complete, len(complete) - len(tokenizer)


def _config_of_parts(folder: Path, vit: ViTSource, arguments: ModelArguments) -> YiVLConfig:
    """Return the configuration of a new model, whose architecture is that of the ViT.

    Raises:
        CheckpointError: If ``config.json`` is that of another kind of model or cannot be used, or a flag is of another
            architecture.
    """
    path, kind, given = folder / "config.json", config_class(vit.config), arguments.of_a_new_model
    if other := given.keys() - {field.name for field in fields(kind)}:
        name = min(other)
        raise CheckpointError(f"--{name} {given[name]}: a model with the ViT {vit.path} has no such choice; drop it")
    text = read_json(path)
    # The keys of other kinds can be those of Llama, and their computation another one.
    if text.get("model_type", "llama") != "llama":
        raise CheckpointError(f"{path}: model_type is {text['model_type']!r}; expected 'llama', as Yi models have")
    known = {key: value for key, value in text.items() if key not in _OF_THE_LANGUAGE_MODEL} | given
    known |= {
        "vision_config": vit.config,
        "mm_vision_tower": f"./vit/{vit.name}",
        "mm_hidden_size": vit.config.hidden_size,
    }
    with library_errors(path):
        return kind(**fields_for(kind, known))


def _set_drop_path_rate(vision_config: PreTrainedConfig, rate: float) -> None:
    """Set stochastic depth to that of the run, whatever the run before had.

    Raises:
        YiVLError: If the ViT has none.
    """
    if hasattr(vision_config, "drop_path_rate"):
        vision_config.drop_path_rate = rate
    elif rate:
        raise YiVLError(f"--drop_path_rate {rate}: a CLIP has no stochastic depth; drop it")


def _add_embeddings(model: YiVLForCausalLM, vocab_size: int, num_new: int) -> None:
    """Grow the vocabulary, in place: new input embeddings are random, new rows of the head the mean of the others.

    Source: OpenGVLab/InternVL, internvl_chat/internvl/train/internvl_chat_finetune.py.

    Args:
        model: Of a language model.
        vocab_size: After the growth.
        num_new: Tokens with the last ids.
    """
    embeddings, head, num_kept = model.get_input_embeddings(), model.get_output_embeddings(), vocab_size - num_new
    with gathered([embeddings.weight, head.weight]):
        rows = [module.weight.detach()[:num_kept] for module in (embeddings, head)]
        random = torch.empty_like(rows[0][:num_new]).normal_(std=model.config.initializer_range)
        mean = rows[1].float().mean(0).to(rows[1].dtype).expand(num_new, -1)
        grown = [torch.cat([old, new]) for old, new in zip(rows, (random, mean), strict=True)]
    embeddings.weight, head.weight = (new_parameter(weight) for weight in grown)
    embeddings.num_embeddings = head.out_features = vocab_size
    model.config.vocab_size = model.vocab_size = model.model.vocab_size = vocab_size
