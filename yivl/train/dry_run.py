"""The dry run: steps, batch size and estimated memory of a run, before weights load."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from yivl.data.rows import RowError
from yivl.model.configuration import YiVLConfig
from yivl.model.loss import CHUNK_SIZE
from yivl.train.arguments import Arguments
from yivl.train.dataloaders import unwrap_worker_error
from yivl.train.parameters import PartSize
from yivl.train.plan import Zero
from yivl.train.run import Run
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
        """The sum; fragmentation and the CUDA context (1 to 2 GiB) are not included."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations")
        unit, name = (GIB, "GiB") if self.total >= GIB else (GIB / 1024, "MiB")
        return f"{self.total / unit:,.1f} {name}: " + ", ".join(f"{p} {getattr(self, p) / unit:,.1f}" for p in parts)


def estimate_memory(
    sizes: Sequence[PartSize], config: YiVLConfig, arguments: Arguments, zero: Zero, num_gpus: int
) -> Memory:
    """Return the estimated memory of one GPU, for samples of full length, Adam and memory-efficient attention.

    Bytes per trainable parameter, for weight, gradient and optimizer: 2, 2 and 12 (FP32 master weight and two moments)
    with DeepSpeed in 16 bits; 4, 4 and 8 without it, or 2 with an 8-bit ``--optim``, and 2 for the copy that autocast
    caches. ZeRO partitions the optimizer states from stage 1, the gradients from stage 2 and the weights from stage 3.
    FSDP2 partitions all of them, gathers a layer and the next ones, and keeps the output head gathered between its
    forward and backward pass; with ``reshard_after_forward`` false, all layers.
    """
    model, training = arguments.model, arguments.training
    is_16_bit = bool(training.bf16 or (training.fp16 and zero.stage))
    width = 2 if is_16_bit else 4
    trained = sum(size.trainable for size in sizes)
    quantized_width = {16: width, 8: 1.0, 4: 0.56}[model.bits]  # nf4 has scales in addition to the half byte
    frozen = sum(
        (size.parameters - size.trainable) * (quantized_width if size.name == "language_model" else width)
        for size in sizes
    )
    has_master_weights = zero.stage > 0 and is_16_bit and not zero.is_fsdp
    moments = 2 if "8bit" in str(training.others.get("optim")) else 8
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
    if zero.offloads_optimizer:
        gradients = optimizer = 0.0  # gradients move to the CPU as they are computed
    return Memory(weights, gradients, optimizer, _activations(sizes, config, arguments, width, zero))


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
        vit_layer = 12 * vision.hidden_size + 2 * vision.intermediate_size
        saved = vision.hidden_size if training.vision_gradient_checkpointing else vit_layer
        total += samples * config.num_patches * width * (config.num_vision_layers * saved + vit_layer)
    if arguments.model.use_dora:  # the adapted weight of a layer, whose norm DoRA computes, in two copies
        total += 2 * width * config.hidden_size * config.intermediate_size
    # Logits of a chunk and their gradient.
    return float(total + min(tokens, CHUNK_SIZE) * config.vocab_size * 2 * width)


def describe_run(run: Run, config: YiVLConfig, sizes: Sequence[PartSize]) -> str:
    """Return a text on the steps, the first batch and the memory of one GPU, on this machine and on larger ones.

    Raises:
        RowError: If a sample of the first batch cannot be used.
    """
    plan, micro_batch = run.plan, run.plan.per_device_train_batch_size
    arguments = run.arguments._replace(
        training=replace(run.arguments.training, per_device_train_batch_size=micro_batch)
    )
    accumulation, sequence_length = plan.gradient_accumulation_steps, run.arguments.data.model_max_length
    batches_per_step = accumulation * plan.world_size
    try:
        first = next(iter(run.batches.loader))
    except RowError as error:
        raise unwrap_worker_error(error) from error
    samples, tokens = count_batch(first, config.num_patches)
    lines = [
        f"{run.total_steps:,} steps, global batch size {micro_batch * batches_per_step:,} ({micro_batch} per device x "
        f"{accumulation} accumulation steps x {plan.world_size} processes)",
        f"first batch: {samples:,} samples, {tokens:,} tokens; about {tokens * batches_per_step:,} tokens per step",
        f"estimated memory per GPU, sequence length {sequence_length:,}, {plan.zero}:",
    ]
    for num_gpus in sorted({plan.world_size, 1, 8, 64} if plan.zero.stage else {plan.world_size}):
        lines.append(f"{num_gpus:>5} GPUs  {estimate_memory(sizes, config, arguments, plan.zero, num_gpus)}")
    return "\n".join(lines)
