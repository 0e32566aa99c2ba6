"""The estimated memory of a GPU in training, from the sizes of the model's parts and the flags alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from yivl.model.configuration import YiVLConfig
from yivl.model.loss import CHUNK_SIZE
from yivl.train.arguments import Arguments
from yivl.train.parameters import PartSize
from yivl.train.plan import Zero

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Estimated memory of one GPU, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """The sum; fragmentation and the CUDA context (1 to 2 GiB) are not included."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations")
        unit, name = (GIB, "GiB") if self.total >= GIB else (GIB / 1024, "MiB")
        return f"{self.total / unit:,.1f} {name}: " + ", ".join(f"{p} {getattr(self, p) / unit:,.1f}" for p in parts)


def estimate_memory(
    sizes: Sequence[PartSize], config: YiVLConfig, arguments: Arguments, zero: Zero, num_gpus: int
) -> Memory:
    """Return the estimated peak memory of one GPU, for samples of full length, Adam and memory-efficient attention.

    Bytes per trainable parameter, for weight, gradient and optimizer: 2, 2 and 12 (FP32 master weight and two moments)
    with DeepSpeed in 16 bits; 4, 4 and 8 without it, or 2 with an 8-bit ``--optim`` and 0 with Adafactor, and 2 for the
    copy that autocast caches. ZeRO partitions the optimizer states from stage 1, the gradients from stage 2 and the
    weights from stage 3. FSDP2 partitions all of them, gathers a layer and the next ones, and keeps the output head
    gathered between its forward and backward pass; with ``reshard_after_forward`` false, all layers. DDP keeps the
    gradients a second time, in the buckets that it reduces. On one GPU, the gradients of a step with one micro-batch
    take the place of the activations and copies that the backward pass frees; others are counted beside them.
    """
    model, training = arguments.model, arguments.training
    is_16_bit = bool(training.bf16 or (training.fp16 and zero.stage))
    width = 2 if is_16_bit else 4
    trained = sum(size.trainable for size in sizes)
    frozen = sum(size.parameters - size.trainable for size in sizes) * width
    if model.bits != 16:
        decoder = next(size.parameters for size in sizes if size.name == "language_model")
        decoder -= 2 * config.vocab_size * config.hidden_size  # embeddings and output head are not quantized
        # nf4 has a scale in addition, of 8 bits for 64 weights (QLoRA, arXiv 2305.14314, section 3).
        frozen -= decoder * (width - {8: 1.0, 4: 0.516}[model.bits])
    has_master_weights = zero.stage > 0 and is_16_bit and not zero.is_fsdp
    optim = str(training.others.get("optim"))
    moments = 2 if "8bit" in optim else 0 if optim == "adafactor" else 8  # Adafactor has a value per row and column
    cached = 2 if is_16_bit and not zero.is_fsdp else 0
    weight, gradient, moments = (2, 2, 4 + moments) if has_master_weights else (4 + cached, 4, moments)
    weights = (frozen + trained * weight) / (num_gpus if zero.stage == 3 or zero.is_fsdp else 1)
    largest_layer = max(size.parameters for size in sizes) / config.num_hidden_layers * width
    if zero.stage == 3:
        weights = (0 if zero.offloads_weights else weights) + 3 * largest_layer  # gathered for use
    if zero.is_fsdp:
        head = config.vocab_size * config.hidden_size * width
        weights += 2 * head if zero.stage == 3 else sum(size.parameters for size in sizes) * width + head
    gradients = trained * gradient / (num_gpus if zero.stage >= 2 else 1)
    optimizer = trained * moments / (num_gpus if zero.stage >= 1 else 1)
    if "8bit" in optim and not (zero.stage or model.lora_enable) and model.trains_language_model:
        optimizer += 6 * config.vocab_size * config.hidden_size  # see keep_embedding_states
    if zero.offloads_optimizer:
        gradients = optimizer = 0.0  # gradients move to the CPU as they are computed
    activations = _activations(sizes, config, arguments, width, zero)
    micro_batch = training.per_device_train_batch_size * num_gpus
    accumulates = training.gradient_accumulation_steps > 1 or (training.global_batch_size or 0) > micro_batch
    if num_gpus > 1 and not zero.stage:
        gradients *= 2
    elif not (zero.stage or accumulates):
        gradients = max(gradients - activations - trained * cached, 0.0)
    return Memory(weights, gradients, optimizer, activations)


def _activations(sizes: Sequence[PartSize], config: YiVLConfig, arguments: Arguments, width: int, zero: Zero) -> float:
    """Return the bytes of the activations saved for the backward pass.

    A layer under gradient checkpointing saves its input. A decoder layer without it saves the residual stream twice,
    the normalized states twice, queries, keys and values, the output of attention and of its heads joined, and the gate
    and up projections (``yivl.model.decoder``); adapters save the product of the last two as well. The residual stream
    has the dtype of the embeddings: float32 where autocast trains them, else that of the frozen or DeepSpeed's weights.
    A ViT layer saves the inputs of its linear layers, norms and activation function.
    """
    training, vision = arguments.training, config.vision_config
    samples = training.per_device_train_batch_size
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    mlp = (3 if arguments.model.lora_enable else 2) * config.intermediate_size
    trains_embeddings = any(size.trainable for size in sizes if size.name == "language_model")
    residual = config.hidden_size * (4 if trains_embeddings and not zero.stage else width)
    decoder_layer = 2 * residual + width * (4 * config.hidden_size + heads * config.head_dim + mlp)
    saved = residual if training.gradient_checkpointing else decoder_layer
    tokens = samples * min(arguments.data.model_max_length, config.max_position_embeddings)
    total = tokens * (config.num_hidden_layers * saved + decoder_layer)
    if any(size.trainable for size in sizes if size.name.startswith("vision_tower")):
        vit_layer = config.saved_vision_widths * vision.hidden_size + 2 * vision.intermediate_size
        saved = vision.hidden_size if training.vision_gradient_checkpointing else vit_layer
        total += samples * config.num_vision_positions * width * (config.num_vision_layers * saved + vit_layer)
    if arguments.model.use_dora:  # the adapted weight of a layer, whose norm DoRA computes, in two copies
        total += 2 * width * config.hidden_size * config.intermediate_size
    # Logits of a chunk and their gradient.
    return float(total + min(tokens, CHUNK_SIZE) * config.vocab_size * 2 * width)
