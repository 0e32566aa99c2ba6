"""The Trainer of transformers with the batches, parameter groups, checkpoints and log of yivl."""

import logging
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from yivl.checkpoint.adapters import save_adapter
from yivl.checkpoint.atomic import write_json, write_text
from yivl.checkpoint.format import ARGUMENTS, RECORD, RUN_CONFIG, read_json
from yivl.checkpoint.saving import write_checkpoint
from yivl.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from yivl.data.collator import normalize_images
from yivl.data.encoding import Encoder
from yivl.data.sampler import BatchSampler
from yivl.errors import YiVLError
from yivl.train.arguments import Arguments
from yivl.train.fsdp import enable_fsdp, save_optimizer, without_padding
from yivl.train.parameters import freeze_modes, frozen_modules, keep_embedding_states, parameter_groups
from yivl.train.plan import as_config, as_dict
from yivl.train.resume import UNFINISHED, describe_origin, load_trained, publish, publish_checkpoint
from yivl.train.run_config import run_config_text
from yivl.train.run_log import RunLog
from yivl.train.stopping import StopOnSignal

if TYPE_CHECKING:
    from yivl.train.dataloaders import Batches, BatchLoader

logger = logging.getLogger(__name__)

MAX_EMPTY_STEPS: Final = 10
"""Consecutive steps without a token to compute the loss on, after which a run stops. Source: ours."""


class YiVLTrainer(Trainer):
    """Trains a model on the mean loss over the target tokens of all micro-batches and ranks of an optimizer step."""

    args: TrainingArguments
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        batches: "Batches",
        *,
        arguments: Arguments,
        encoder: Encoder,
        eval_loader: "BatchLoader | None" = None,
        offloads_optimizer: bool = False,
    ) -> None:
        self.run_log, self.loader, self.stop = RunLog(args.output_dir), batches.loader, StopOnSignal()
        self.model = model  # for `create_accelerator_and_postprocess`; old versions of transformers set it later
        super().__init__(
            model,
            args=args,
            train_dataset=self.loader.dataset,
            eval_dataset=None if eval_loader is None else eval_loader.dataset,
            data_collator=self.loader.collate_fn,
            callbacks=[self.run_log, self.stop, _EpochOrder(self.loader)],
        )
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.arguments, self.encoder, self.eval_loader = arguments, encoder, eval_loader
        self.offloads_optimizer = offloads_optimizer
        self.sources, self.stream = batches.sources, batches.stream
        self._empty_steps, self._frozen = 0, frozen_modules(model)
        self._run_dir = Path(args.output_dir)
        self._final_dtype: torch.dtype | None = None
        # Hyperparameters of the parameter groups, as the flags set them.
        self._given: list[dict[str, Any]] = []
        # Samples and tokens since the last log line, on this rank.
        self._seen, self._since = torch.zeros(2, dtype=torch.float64), time.perf_counter()

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, which wraps the model."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            enable_fsdp(self.accelerator, self.args, self.model)
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> "BatchLoader":
        """Return the batches of this rank, which must not be sharded again."""
        return self.loader

    def num_examples(self, dataloader: "BatchLoader") -> int:
        """Return the samples per epoch, which mixture weights make another number than the rows."""
        sampler = dataloader.batch_sampler
        return sum(sampler.samples_per_epoch) if isinstance(sampler, BatchSampler) else super().num_examples(dataloader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer, with a learning rate for each part of the model.

        Raises:
            YiVLError: If ``--optim`` needs a package that is not installed.
        """
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        try:
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        except (ImportError, ValueError) as error:
            raise YiVLError(f"--optim {self.args.optim}: {error}") from error
        if self.offloads_optimizer and self.args.optim.startswith("adamw_torch"):
            from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled on first use, and only offloading needs it

            optimizer_class, settings = DeepSpeedCPUAdam, _hyperparameters(settings)
        groups = parameter_groups(model, self.arguments.training, self.get_decay_parameter_names(model))
        optimizer: torch.optim.Optimizer = optimizer_class(groups, **settings)
        if settings.get("optim_bits") == 8:
            keep_embedding_states(model)
        self.optimizer, self._given = optimizer, [_hyperparameters(group) for group in optimizer.param_groups]
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the states of a checkpoint; the hyperparameters stay those of the flags, as ``check_same_run`` logs."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not isinstance(self.lr_scheduler, LambdaLR):
            return
        assert self.optimizer is not None
        groups, scheduler = self.optimizer.param_groups, self.lr_scheduler
        scheduler.base_lrs = [given["lr"] for given in self._given]
        for group, given, schedule in zip(groups, self._given, scheduler.lr_lambdas, strict=True):
            group.update(given | {"initial_lr": given["lr"], "lr": given["lr"] * schedule(scheduler.last_epoch)})
        scheduler._last_lr = [group["lr"] for group in groups]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Return the micro-batches of a step and the number of tokens its loss is computed on.

        Raises:
            YiVLError: If too many consecutive steps have no such token.
        """
        if self.state.global_step >= self.state.max_steps:
            # The run was interrupted after its last checkpoint, before its final model: transformers would train a step
            # more before it compares the numbers.
            self.control.should_training_stop = True
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.stream is not None:
            self.stream.receive(batches)
        for batch in batches:
            self._seen += torch.tensor(count_batch(batch, self.encoder.num_patches), dtype=torch.float64)
        if not isinstance(num_items, torch.Tensor):
            return batches, num_items
        # The loss of a step without target tokens is 0, which would look like success.
        self._empty_steps = 0 if num_items else self._empty_steps + 1
        if self._empty_steps:
            logger.warning("step %d: no target token, all of its samples were left out", self.state.global_step + 1)
        if self._empty_steps == min(MAX_EMPTY_STEPS, self.state.max_steps):
            raise YiVLError(
                f"no target token in {self._empty_steps} steps: all samples were left out; see bad_rows.jsonl"
            )
        return batches, num_items.clamp(min=1)  # it divides the loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a batch on the device, its pixels normalized there."""
        return normalize_images(super()._prepare_inputs(inputs), self.encoder.image_processor)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss without logits, which need 64,000 values per token."""
        if model.training:
            freeze_modes(self._frozen)
        return super().compute_loss(model, inputs | {"skip_logits": True}, *args, **kwargs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return and log the mean loss over the target tokens of the evaluation data, on all ranks.

        Raises:
            YiVLError: If there is no target token.
        """
        assert self.eval_loader is not None  # --eval_strategy needs --eval_data_path
        started, model = time.perf_counter(), self.model_wrapped
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for batch in self.eval_loader:
            with torch.no_grad(), self.compute_loss_context_manager():
                inputs = self._prepare_inputs(batch)
                loss = model(**inputs, skip_logits=True, num_items_in_batch=1).loss  # the sum over its tokens
            total += torch.tensor([loss.item(), int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())])
        loss_sum, targets = self.accelerator.reduce(total.to(self.args.device, torch.float32), "sum").tolist()
        if not targets:
            raise YiVLError(f"{self.arguments.data.eval_data_path}: no target token; check the answers of its rows")
        metrics = {"eval_loss": loss_sum / targets}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since += time.perf_counter() - started
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a line with the samples and tokens (text and image patches) per second of all ranks added.

        Raises:
            YiVLError: If the loss is NaN or infinite.
        """
        if not math.isfinite(logs.get("loss", 0)):
            raise YiVLError(
                f"step {self.state.global_step}: the loss is {logs['loss']}; resume from an earlier checkpoint with a "
                "lower --learning_rate"
            )
        if "loss" in logs and self._empty_steps >= self.state.logging_steps:
            del logs["loss"]  # no step since the last line had a target token
        if "rows_per_second" not in logs and "learning_rate" in logs:
            now = time.perf_counter()
            seen = self.accelerator.reduce(self._seen.to(self.args.device, torch.float32), "sum").tolist()
            samples, tokens = (round(number / (now - self._since), 2) for number in seen)
            logs |= {"rows_per_second": samples, "tokens_per_second": tokens}
            self._seen, self._since = torch.zeros_like(self._seen), now
        super().log(logs, start_time)

    # transformers writes a checkpoint file by file; here it is written to a temporary folder and moved.

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._run_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        started, name = time.perf_counter(), f"checkpoint-{self.state.global_step}"
        with self._unfinished() as folder:
            self._run_dir = folder
            try:
                super()._save_checkpoint(model, trial)
                if self.stream is not None:
                    self.stream.write(folder / name)
            finally:
                self._run_dir = Path(self.args.output_dir)
        publish_checkpoint(folder / name, self._run_dir, self.args.save_total_limit)
        if self.args.should_save:
            self.run_log.draw()
        self.accelerator.wait_for_everyone()
        self._since += time.perf_counter() - started  # saving does not count as training

    def save_final(self) -> None:
        """Write the trained model to the output folder, in bfloat16 after bf16 mixed precision."""
        self._final_dtype = torch.bfloat16 if self.args.bf16 else None
        with self._unfinished() as folder:
            self.save_model(str(folder / "model"))
        self._final_dtype = None
        if self.args.should_save:
            publish(folder / "model", self._run_dir)
            folder.rmdir()
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _unfinished(self) -> Iterator[Path]:
        """Yield an empty folder for all ranks, which share a file system; on exit, all ranks have written."""
        folder = Path(self.args.output_dir) / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            yield folder
        except BaseException:  # such as a full disk, which an incomplete checkpoint must not keep full
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer(self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model; all ranks wait for it before they write other files."""
        super().save_model(output_dir, _internal_call)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.is_fsdp_enabled and state_dict is not None:
            state_dict = without_padding(state_dict)
        if self._final_dtype is not None and not self.arguments.model.lora_enable:
            weights = self.model.state_dict() if state_dict is None else state_dict
            state_dict = {key: value.to(self._final_dtype) for key, value in weights.items()}
        tokenizer, image_processor = self.encoder.tokenizer, self.encoder.image_processor
        if isinstance(self.model, PeftModel):
            save_adapter(self.model, folder, image_processor=image_processor, state_dict=state_dict)
        else:
            clip_processor = image_processor.clip_processor
            write_checkpoint(
                self.model, folder, tokenizer=tokenizer, image_processor=clip_processor, state_dict=state_dict
            )
        write_json(folder / ARGUMENTS, as_dict(self.arguments, self.args))
        write_text(folder / RUN_CONFIG, run_config_text(as_config(self.arguments, self.args)))
        write_json(folder / RECORD, describe_origin(self.arguments.model.model_name_or_path, self.sources))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random state of this rank; at another number of ranks, it follows from the seed and the step."""
        if checkpoint is None or read_json(Path(checkpoint) / ARGUMENTS)["world_size"] == self.args.world_size:
            super()._load_rng_state(checkpoint)
        else:
            set_seed(self.args.seed + self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:  # `fit` loads the weights before they are sharded
            load_trained(self.model if model is None else model, Path(resume_from_checkpoint))


class _EpochOrder(TrainerCallback):
    """Sets the epoch of the batches; not every version of transformers does so in a resumed run."""

    def __init__(self, loader: "BatchLoader") -> None:
        self.loader = loader

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Set the epoch, which decides the order."""
        self.loader.set_epoch(int(state.epoch or 0))


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a parameter group that flags set."""
    return {name: group[name] for name in ("lr", "weight_decay", "betas", "eps") if name in group}


def count_batch(batch: dict[str, Any], num_patches: int) -> tuple[int, int]:
    """Return the numbers of samples and tokens in a batch, with image patches and without padding."""
    ids = batch["input_ids"]
    num_images = int((ids == IMAGE_TOKEN_INDEX).sum())
    if "row_lengths" in batch:
        return len(batch["row_lengths"]), ids.numel() + num_images * (num_patches - 1)
    return len(ids), int(batch["attention_mask"].sum()) + num_images * (num_patches - 1)
