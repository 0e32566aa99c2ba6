"""The known fields of the records in the output folder of a run, for ``yivl.files.schema``."""

from typing import Annotated, Any, Final, TypedDict

from yivl.files.validation import Number, short, within

_COUNT: Final = 2**48  # of rows and steps


class RunFields(TypedDict, total=False):
    """``training_run.json``."""

    base_model: Annotated[str | None, short]
    sources: list[dict[str, Any]]
    versions: dict[str, str]


class SourceFields(TypedDict, total=False):
    """Entry of ``sources`` in ``training_run.json``."""

    source: str
    shards: Annotated[int, within(0, _COUNT)]
    rows: Annotated[int, within(0, _COUNT)]
    rows_found: Annotated[int, within(0, _COUNT)]
    rows_per_epoch: Annotated[int, within(0, _COUNT)]
    fingerprint: str


class ArgumentFields(TypedDict, total=False):
    """``training_arguments.json``: the flags that a resumed run computes with; the others are compared."""

    per_device_train_batch_size: Annotated[int, within(1, 2**24)]
    gradient_accumulation_steps: Annotated[int, within(1, 2**24)]
    world_size: Annotated[int, within(1, 2**20)]
    optim: str
    lr_scheduler_type: str


class StateFields(TypedDict, total=False):
    """``trainer_state.json`` of transformers."""

    epoch: Annotated[Number | None, within(0, 1e12)]
    global_step: Annotated[int, within(0, _COUNT)]
    max_steps: Annotated[int, within(-1, _COUNT)]
    logging_steps: Annotated[Number, within(0, _COUNT)]
    eval_steps: Annotated[Number | None, within(0, _COUNT)]
    save_steps: Annotated[Number, within(0, _COUNT)]
    train_batch_size: Annotated[int | None, within(1, 2**24)]
    num_train_epochs: Annotated[Number, within(0, _COUNT)]
    num_input_tokens_seen: Annotated[int, within(0, 2**63)]
    total_flos: Annotated[Number, within(0, 1e100)]
    log_history: list[dict[str, Any]] | None
    stateful_callbacks: dict[str, Any] | None
