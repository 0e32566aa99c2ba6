"""The Trainer of transformers with our batches, parameter groups, checkpoints and log."""

import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from yivl.checkpoint.atomic import replace_dir, write_json
from yivl.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from yivl.data.rows import RowError
from yivl.errors import YiVLError
from yivl.image_processing import ImageProcessor
from yivl.tokenization import YiTokenizer
from yivl.train.arguments import Arguments, YiVLTrainingArguments, Zero, as_dict
from yivl.train.dataloaders import BatchLoader, unwrap_worker_error
from yivl.train.parameters import freeze_modes, frozen_modules, parameter_groups
from yivl.train.resume import (
    ARGUMENTS,
    RECORD,
    UNFINISHED,
    load_trained,
    publish,
    remove_old_checkpoints,
    save_trained,
)
from yivl.train.run_log import RunLog

logger = logging.getLogger(__name__)

MAX_EMPTY_STEPS: Final = 10
"""Steps in a row without a single target that are too many. Source: ours."""


class YiVLTrainer(Trainer):  # type: ignore[misc]
    """Trains a ``YiVLForCausalLM``, or peft around one.

    The loss of a step is the mean over its supervised tokens, whatever batches and processes they came in.
    """

    args: YiVLTrainingArguments
    optimizer: torch.optim.Optimizer | None
    control: Any

    def __init__(
        self,
        model: nn.Module,
        arguments: Arguments,
        loader: BatchLoader,
        *,
        tokenizer: YiTokenizer,
        image_processor: ImageProcessor,
        num_patches: int,
        eval_loader: BatchLoader | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_log = RunLog(arguments.training.output_dir)
        super().__init__(
            model,
            args=arguments.training,
            train_dataset=loader.dataset,
            eval_dataset=None if eval_loader is None else eval_loader.dataset,
            data_collator=loader.collate_fn,
            callbacks=[self.run_log, _EpochOrder(loader)],
        )
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.arguments, self.loader, self.eval_loader = arguments, loader, eval_loader
        self.tokenizer, self.image_processor, self.num_patches = tokenizer, image_processor, num_patches
        self.record = {} if record is None else record
        self._empty_steps = 0
        self._frozen = frozen_modules(model)
        self._run_dir = Path(arguments.training.output_dir)
        self._final_dtype: torch.dtype | None = None
        # Rows and positions since the last line of the log, on this process.
        self._seen, self._since = torch.zeros(2, dtype=torch.float64), time.perf_counter()

    def get_train_dataloader(self) -> BatchLoader:
        """Return our batches, which are those of this process already."""
        return self.loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer, with a learning rate for each part of the model."""
        optimizer: torch.optim.Optimizer | None = self.optimizer
        if optimizer is None:
            model = self.model if model is None else model
            try:
                optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            except (ImportError, ValueError) as error:
                raise YiVLError(f"--optim {self.args.optim}: {error}") from error
            if Zero.of(self.args).offloads_optimizer and self.args.optim.startswith("adamw_torch"):
                from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled on first use, and only offloading needs it

                names = ("lr", "betas", "eps")
                optimizer_class, settings = DeepSpeedCPUAdam, {name: settings[name] for name in names}
            groups = parameter_groups(model, self.args, self.get_decay_parameter_names(model))
            optimizer = self.optimizer = optimizer_class(groups, **settings)
        return optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Return the batches of a step and its number of supervised tokens, and count what is in them."""
        try:
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        except RowError as error:
            raise unwrap_worker_error(error) from error
        for batch in batches:
            self._seen += torch.tensor(count_batch(batch, self.num_patches), dtype=torch.float64)
        if isinstance(num_items, torch.Tensor):
            self._check_targets(int(num_items))
            num_items = num_items.clamp(min=1)  # it divides the loss
        return batches, num_items

    def _check_targets(self, num_targets: int) -> None:
        """Say so when every row of a step was left out, and stop when that goes on: a loss of 0 is no success.

        Raises:
            YiVLError: If no step had a target for too long.
        """
        self._empty_steps = 0 if num_targets else self._empty_steps + 1
        if self._empty_steps:
            logger.warning("step %d: every row was left out, nothing is learnt from it", self.state.global_step + 1)
        if self._empty_steps == min(MAX_EMPTY_STEPS, self.state.max_steps):
            raise YiVLError(f"no target in {self._empty_steps} steps: every row was left out, see bad_rows.jsonl")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss, and never logits: those of a vocabulary of 64,000 would fill the memory."""
        if model.training:
            freeze_modes(self._frozen)
        return super().compute_loss(model, inputs | {"skip_logits": True}, return_outputs, num_items_in_batch)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return and log the mean loss over all supervised tokens of the evaluation rows, of all processes."""
        assert self.eval_loader is not None  # --eval_strategy goes with --eval_data_path
        started, model = time.perf_counter(), self.model_wrapped
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        try:
            for batch in self.eval_loader:
                with torch.no_grad(), self.compute_loss_context_manager():
                    inputs = self._prepare_inputs(batch)
                    loss = model(**inputs, skip_logits=True, num_items_in_batch=1).loss  # their sum
                total += torch.tensor([loss.item(), int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())])
        except RowError as error:
            raise unwrap_worker_error(error) from error
        loss_sum, targets = self.accelerator.reduce(total.to(self.args.device, torch.float32), "sum").tolist()
        if not targets:
            raise YiVLError(f"{self.arguments.data.eval_data_path}: no target in the evaluation rows")
        metrics = {"eval_loss": loss_sum / targets}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since += time.perf_counter() - started
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add rows and positions (text tokens and patches) a second, over all processes, to every line.

        Raises:
            YiVLError: If the loss is no number: what follows would not be training.
        """
        if not math.isfinite(logs.get("loss", 0)):
            raise YiVLError(
                f"step {self.state.global_step}: the loss is {logs['loss']}; go on from a checkpoint before it with a "
                "lower --learning_rate"
            )
        if "loss" in logs and self._empty_steps >= self.args.logging_steps:
            del logs["loss"]  # there was none: a 0 would look like success
        if "rows_per_second" not in logs and "learning_rate" in logs:
            now = time.perf_counter()
            seen = self.accelerator.reduce(self._seen.to(self.args.device, torch.float32), "sum").tolist()
            rows, tokens = (round(number / (now - self._since), 2) for number in seen)
            logs |= {"rows_per_second": rows, "tokens_per_second": tokens}
            self._seen, self._since = torch.zeros_like(self._seen), now
        super().log(logs, start_time)

    # Checkpoints: transformers writes them file by file, here they appear as a whole.

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._run_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        started, name = time.perf_counter(), f"checkpoint-{self.state.global_step}"
        with self._unfinished() as folder:
            self._run_dir = folder
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._run_dir = Path(self.args.output_dir)
        if self.args.should_save:
            replace_dir(folder / name, self._run_dir / name)
            remove_old_checkpoints(self._run_dir, self.args.save_total_limit)
            self.run_log.draw()
        self.accelerator.wait_for_everyone()
        self._since += time.perf_counter() - started  # the rates of the log are those of training

    def save_final(self) -> None:
        """Write the trained model into the output folder, in the precision of its training."""
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
        """Yield an empty folder that all processes may write into; on leaving, all have done so.

        The nodes of a run share the disk of its output folder (docs/training.md).
        """
        folder = Path(self.args.output_dir) / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        yield folder
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model; no process goes on to write beside it before it is there."""
        super().save_model(output_dir, _internal_call)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if self._final_dtype is not None and not self.is_adapter:
            weights = self.model.state_dict() if state_dict is None else state_dict
            state_dict = {key: value.to(self._final_dtype) for key, value in weights.items()}
        save_trained(
            self.model,
            folder,
            tokenizer=self.tokenizer,
            image_processor=self.image_processor,
            state_dict=state_dict,
        )
        write_json(folder / ARGUMENTS, as_dict(self.arguments))
        write_json(folder / RECORD, self.record)

    @property
    def is_adapter(self) -> bool:
        """Whether LoRA adapters are trained."""
        return self.arguments.model.lora_enable

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.model if model is None else model, resume_from_checkpoint)


class _EpochOrder(TrainerCallback):  # type: ignore[misc]
    """Tells our batches which epoch begins; on a resumed run not every version of transformers does."""

    def __init__(self, loader: BatchLoader) -> None:
        self.loader = loader

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the order of the epoch."""
        self.loader.set_epoch(int(state.epoch or 0))


def count_batch(batch: dict[str, Any], num_patches: int) -> tuple[int, int]:
    """Return how many rows and decoder positions a batch holds, without padding."""
    ids = batch["input_ids"]
    num_images = int((ids == IMAGE_TOKEN_INDEX).sum())
    if "row_lengths" in batch:
        return len(batch["row_lengths"]), ids.numel() + num_images * (num_patches - 1)
    return len(ids), int(batch["attention_mask"].sum()) + num_images * (num_patches - 1)
