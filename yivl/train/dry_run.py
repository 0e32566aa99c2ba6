"""What a run will do and need, told before it starts: the dry run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from yivl.data.rows import RowError
from yivl.model.configuration import YiVLConfig
from yivl.model.loss import CHUNK_SIZE
from yivl.train.arguments import Arguments, Zero
from yivl.train.dataloaders import Batches, unwrap_worker_error
from yivl.train.parameters import PartSize
from yivl.train.trainer import count_batch

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
        """All of it; fragmentation and the CUDA context (1 to 2 GiB) come on top."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations")
        unit, name = (GIB, "GiB") if self.total >= GIB else (GIB / 1024, "MiB")
        return f"{self.total / unit:,.1f} {name}: " + ", ".join(f"{p} {getattr(self, p) / unit:,.1f}" for p in parts)


def estimate_memory(
    sizes: Sequence[PartSize], config: YiVLConfig, arguments: Arguments, zero: Zero, num_gpus: int
) -> Memory:
    """Estimate what one GPU needs with rows of full length, Adam, and attention that keeps no score matrix.

    16-bit DeepSpeed keeps 2 bytes of weight and 2 of gradient for a parameter, and 12 (a float32 copy and two moments)
    in the optimizer. Without DeepSpeed what trains is float32: 4, 4 and 8, and 2 for the copy that autocast keeps. ZeRO
    divides by the number of GPUs the optimizer from stage 1, the gradients from stage 2, the weights from stage 3.
    """
    model, training = arguments.model, arguments.training
    is_16_bit = bool(training.bf16 or (training.fp16 and zero.stage))
    width = 2 if is_16_bit else 4
    trained, decoder = sum(size.trainable for size in sizes), "language_model"
    frozen_width = {16: width, 8: 1.0, 4: 0.56}  # nf4 keeps its scales beside the half byte
    frozen = sum(
        (size.parameters - size.trainable) * (frozen_width[model.bits] if size.name == decoder else width)
        for size in sizes
    )
    has_masters = zero.stage > 0 and is_16_bit
    weight, gradient, moments = (2, 2, 12) if has_masters else (6 if is_16_bit else 4, 4, 8)
    weights = (frozen + trained * weight) / (num_gpus if zero.stage == 3 else 1)
    largest_layer = max(size.parameters for size in sizes) / config.num_hidden_layers * width
    if zero.stage == 3:
        weights = (0 if zero.offloads_weights else weights) + 3 * largest_layer  # gathered to be used
    gradients = trained * gradient / (num_gpus if zero.stage >= 2 else 1)
    optimizer = trained * moments / (num_gpus if zero.stage >= 1 else 1)
    if zero.offloads_optimizer:
        gradients = optimizer = 0.0  # gradients follow the optimizer to the CPU as they are made
    return Memory(weights, gradients, optimizer, _activations(sizes, config, arguments, width))


def _activations(sizes: Sequence[PartSize], config: YiVLConfig, arguments: Arguments, width: int) -> float:
    """Return the bytes kept for the backward pass.

    A layer that is recomputed keeps its input; one that is not keeps the inputs of its linear layers, of its norms and
    of its activation function.
    """
    training, vision = arguments.training, config.vision_config
    rows = training.per_device_train_batch_size
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    decoder_layer = 8 * config.hidden_size + 2 * heads * config.head_dim + 4 * config.intermediate_size
    kept = config.hidden_size if training.recompute_language_model else decoder_layer
    positions = rows * min(arguments.data.model_max_length, config.max_position_embeddings)
    total = positions * width * (config.num_hidden_layers * kept + decoder_layer)
    if any(size.trainable for size in sizes if size.name.startswith("vision_tower")):
        vit_layer = 12 * vision.hidden_size + 2 * vision.intermediate_size
        kept = vision.hidden_size if training.vision_gradient_checkpointing else vit_layer
        total += rows * config.num_patches * width * (config.num_vision_layers * kept + vit_layer)
    # Logits of a chunk: in 16 or 32 bits, in float32, and their gradient.
    return float(total + min(positions, CHUNK_SIZE) * config.vocab_size * (width + 8))


def total_steps(arguments: Arguments, batches: Batches) -> int:
    """Return the optimizer steps of the whole run, as the trainer counts them."""
    training = arguments.training
    per_epoch = -(-len(batches.loader) // training.gradient_accumulation_steps)
    return int(training.max_steps) if training.max_steps > 0 else math.ceil(per_epoch * training.num_train_epochs)


def describe_run(arguments: Arguments, batches: Batches, config: YiVLConfig, sizes: Sequence[PartSize]) -> str:
    """Return the plan of a run: steps, the first batch, and what one GPU needs, here and with more of them."""
    training = arguments.training
    accumulation, world_size = training.gradient_accumulation_steps, training.world_size
    steps = total_steps(arguments, batches)
    try:
        first = next(iter(batches.loader))
    except RowError as error:
        raise unwrap_worker_error(error) from error
    rows, positions = count_batch(first, config.num_patches)
    global_rows = training.per_device_train_batch_size * accumulation * world_size
    zero = Zero.of(training)
    lines = [
        f"{steps:,} steps of {global_rows:,} rows ({training.per_device_train_batch_size} x {accumulation} "
        f"accumulated x {world_size} processes)",
        f"first batch: {rows:,} rows, {positions:,} positions; about {positions * accumulation * world_size:,} a step",
        f"estimated memory of one GPU, rows of {arguments.data.model_max_length:,} positions, ZeRO stage {zero.stage}:",
    ]
    for num_gpus in sorted({world_size, 1, 8, 64} if zero.stage else {world_size}):
        lines.append(f"{num_gpus:>5} GPUs  {estimate_memory(sizes, config, arguments, zero, num_gpus)}")
    return "\n".join(lines)
