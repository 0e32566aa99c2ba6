"""The model card (``README.md``) of a trained model, made from the records of training and evaluation."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from yivl.checkpoint import hub
from yivl.checkpoint.format import ADAPTER_CONFIG, ARGUMENTS, LOG, RECORD, read_config, read_json
from yivl.checkpoint.hub import CARD, MARKER, known_base, last_part
from yivl.errors import CheckpointError
from yivl.train.resume import GLOBAL_BATCH_FLAGS
from yivl.train.run_log import read_log

TASK: Final = "image-text-to-text"
"""Source: the tasks of the hub."""

# Flags that decide a result, in the order of the table; those of LoRA are shown for adapters only.
_FLAGS: Final = (
    *("stage", "image_size", "image_aspect_ratio", "model_max_length", "packing", "bits"),
    *("freeze_backbone", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "unfreeze_mm_vision_tower"),
    *("lora_enable", "lora_r", "lora_alpha", "lora_dropout", "lora_vision_tower"),
    *("learning_rate", "mm_projector_lr", "mm_vision_tower_lr", "lr_scheduler_type", "warmup_steps"),
    *("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm"),
    *("max_rows_per_source", *GLOBAL_BATCH_FLAGS, "deepspeed", "bf16", "fp16", "seed"),
)
_SOURCE_COLUMNS: Final = ("rows", "rows_per_epoch", "images", "shards", "weight")


@dataclass(frozen=True)
class _Scores:
    """One ``scores.json`` of ``python -m yivl.eval``."""

    title: str
    columns: Sequence[str]
    """The name of the groups, and what was measured of each."""
    groups: Sequence[tuple[str, Sequence[float]]]
    """Name of each group and its values; the accuracy in percent comes first."""
    dataset: str
    model: str
    """Last part of the path or hub id of the evaluated model."""
    metric: str
    is_claim: bool
    """Whether the values are the model's score: on the whole benchmark, and with the image of each question."""

    @property
    def rows(self) -> list[list[str]]:
        """The rows of the table."""
        return [[_cell(name), *map(_number, values)] for name, values in self.groups]


def publish(
    folder: Path,
    repo_id: str,
    *,
    private: bool,
    base_model: str | None = None,
    license_id: str | None = None,
    scores: Sequence[Path] = (),
    message: str = "Upload a Yi-VL model",
) -> str:
    """Upload a checkpoint or adapter with its model card to the hub and return the URL of the commit.

    The arguments are those of ``make_card`` and ``hub.upload``.

    Raises:
        CheckpointError: As these do, or if the folder has an edited card, to which nothing can be added.
    """
    if hub.is_edited(folder / CARD) and (license_id or scores):
        raise CheckpointError(f"{folder / CARD}: was edited by hand and is kept; add license and scores to it by hand")
    card = partial(make_card, folder, repo_id=repo_id, base_model=base_model, license_id=license_id, scores=scores)
    return hub.upload(folder, repo_id, private=private, base_model=base_model, make_card=card, message=message)


def make_card(
    folder: Path,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    license_id: str | None = None,
    scores: Sequence[Path] = (),
) -> str:
    """Return the text of a model card: architecture, training, scores, use, license.

    What the folder does not record is left out or named as missing. Only the last part of a path is shown.

    Args:
        folder: A checkpoint or an adapter.
        repo_id: The hub id in the commands; by default the name of the folder.
        base_model: Hub id of the model it was trained from, if the folder does not record it.
        license_id: Identifier of the hub (``apache-2.0``), if there is no ``LICENSE`` file in the folder.
        scores: ``scores.json`` files of ``python -m yivl.eval``.

    Raises:
        CheckpointError: If the folder is neither, a file cannot be read, or ``license_id`` contradicts ``LICENSE``.
    """
    adapter = _read_if_exists(folder / ADAPTER_CONFIG)
    base, reports = known_base(folder, base_model), [_read_scores(path) for path in scores]
    name = (repo_id or folder.resolve().name).split("/")[-1]
    license_file = next((path for path in sorted(folder.glob("LICENSE*")) if path.is_file()), None)
    license_id = _license(folder, license_file, license_id)
    results = _eval_results(reports, {name, folder.resolve().name})
    config = None if adapter else read_config(folder)
    data = ModelCardData(
        language=["en", "zh"],
        license=license_id,
        license_link=license_file.name if license_file is not None and license_id == "other" else None,
        library_name="peft" if adapter else "yivl",
        pipeline_tag=TASK,
        base_model=base,
        base_model_relation=("adapter" if adapter else "finetune") if base else None,
        tags=["yi-vl", "llava", *(["lora"] if adapter else [])],
        model_name=name if results else None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / "assets/model_card.jinja"),
        marker=MARKER,
        name=name,
        model=repo_id or name,
        adapter=adapter,
        config=config,
        vision=config and config.vision_config,
        base=base,
        path=_path,
        **_training(folder, base, adapter),
        reports=reports,
        model_base=" --model-base CHECKPOINT" if adapter and not base else "",
        license_id=license_id,
        license_file=license_file and license_file.name,
    )
    return f"{card}\n"


def _training(folder: Path, base: str | None, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the section on training shows."""
    flags, record = _read_if_exists(folder / ARGUMENTS), _read_if_exists(folder / RECORD)
    # A checkpoint-N folder has no log; its trainer_state.json holds the same lines.
    log = read_log(folder / LOG) or _read_if_exists(folder / "trainer_state.json").get("log_history", [])
    facts = [("initialized from", base or _path(flags.get("model_name_or_path", "")))]
    if log:
        facts.append(("optimizer steps", f"{log[-1]['step']:,}"))
    if flags:
        facts.append(("global batch size", f"{math.prod(flags[name] for name in GLOBAL_BATCH_FLAGS):,}"))
    for key, label in (("loss", "loss"), ("eval_loss", "evaluation loss")):
        if line := next((line for line in reversed(log) if key in line), None):
            facts.append((f"{label}, at step {line['step']:,}", f"{line[key]:.4f}"))
    sources, versions = record.get("sources") or [], record.get("versions") or {}
    recorded = {"flags": flags, "steps and losses": log, "rows of each source": sources, "versions": versions}
    length = "max_steps" if flags.get("max_steps", -1) > 0 else "num_train_epochs"
    return {
        "flags": flags,
        "flag_names": [name for name in (*_FLAGS, length) if flags.get("lora_enable") or not name.startswith("lora_")],
        "log": log,
        "record": record,
        "facts": [fact for fact in facts if fact[1]],
        "columns": [key for key in _SOURCE_COLUMNS if any(source.get(key) is not None for source in sources)],
        "versions": ({"peft": adapter["peft_version"]} if "peft_version" in adapter else {}) | versions,
        "missing": [name for name, value in recorded.items() if not value],
    }


def _read_scores(path: Path) -> _Scores:
    about = read_json(path)
    try:
        dataset, model = last_part(about["data"]), last_part(about["model"])
        if "overall" in about:
            named = {**about["domains"], "all": about["overall"]}
            protocol = f", protocol {about['protocol']}" if "protocol" in about else ""
            split = f"{about['split']} split, {about['questions']:,} questions{protocol}"
            is_on_hub = hub.is_hub_id(about["data"]) and not Path(about["data"]).exists()
            return _Scores(
                f"{about['benchmark'].upper()}, {split}, measured on `{model}`:",
                ("domain", "accuracy %"),
                [(name, [100 * accuracy]) for name, accuracy in named.items()],
                about["data"] if is_on_hub else dataset,
                model,
                "accuracy",
                is_claim=about["is_whole"],
            )
        images = about["images"] if "images" in about else about["pictures"]  # the key of older files
        shown = {"own": "", "another": ", shown the image of another question", "none": ", shown no image"}[images]
        return _Scores(
            f"`{dataset}`{shown}, measured on `{model}`:",
            (_cell(", ".join(about["group_by"]) or "group"), "exact %", "best constant answer %", "questions"),
            [
                (", ".join(one["group"]) or "all", [float(one["accuracy"]), float(one["constant"]), int(one["number"])])
                for one in about["scores"]
            ],
            dataset,
            model,
            "exact_match",
            is_claim=images == "own",
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a scores.json of python -m yivl.eval") from error


def _eval_results(reports: Iterable[_Scores], names: set[str]) -> list[EvalResult]:
    """Return the scores for the index of the hub: those of this model, without controls."""
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=report.dataset.removesuffix(".jsonl").removesuffix(".json"),
            dataset_name=report.dataset,
            metric_type=report.metric,
            metric_name=f"{report.metric.replace('_', ' ')} in percent, {name}",
            metric_value=values[0],
        )
        for report in reports
        if report.is_claim and report.model in names
        for name, values in report.groups
    ]


def _license(folder: Path, file: Path | None, given: str | None) -> str | None:
    """Return the license: of the ``LICENSE`` file, else the given one, else that of an earlier card.

    Raises:
        CheckpointError: If the file and ``given`` contradict each other, or the earlier card cannot be read.
    """
    if file is not None:
        head = file.read_text(encoding="utf-8", errors="replace")[:500]
        is_apache = "Apache License" in head and "Version 2.0, January 2004" in head
        if given is not None and (given == "apache-2.0") != is_apache:
            raise CheckpointError(f"{file}: is another license than {given!r}; drop one of them")
        return given or ("apache-2.0" if is_apache else "other")
    if given is not None or not (folder / CARD).is_file():
        return given
    try:
        data: ModelCardData = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data
    except Exception as error:  # the YAML reader has many
        raise CheckpointError(f"{folder / CARD}: its front matter is not valid YAML; correct or remove it") from error
    return data.license


def _read_if_exists(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _path(path: str) -> str:
    return path and f"`{_cell(last_part(path))}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.1f}"
