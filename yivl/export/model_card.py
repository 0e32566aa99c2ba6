"""The model card (``README.md``) of a trained model, made from the records of training and evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from yivl.checkpoint import hub
from yivl.checkpoint.folder import format_of, read_config
from yivl.checkpoint.format import ADAPTER_CONFIG, ADAPTER_SETTINGS, ARGUMENTS, LOG, RECORD, read_json
from yivl.checkpoint.hub import CARD, MARKER, known_base, last_part
from yivl.errors import CheckpointError
from yivl.export.families import ANY, FAMILIES
from yivl.train.run_log import read_log

TASK: Final = "image-text-to-text"
"""Source: the tasks of the hub."""

_HARDWARE: Final = {
    "01-ai/Yi-VL-6B": "one GPU with 24 GB, such as RTX 3090, RTX 4090, A10 or A30",
    "01-ai/Yi-VL-34B": "four RTX 4090 (24 GB each), or one A800 (80 GB)",
}
"""Source: the model card of Yi-VL, "Hardware requirements"."""

_CONVERTED: Final = {f"BUAADreamer/Yi-VL-{size}-hf": f"01-ai/Yi-VL-{size}" for size in ("6B", "34B")}
"""Released checkpoints in the ``-hf`` format, and their originals."""

_SOURCE_COLUMNS: Final = ("rows", "rows_per_epoch", "images", "shards", "weight")


def publish(
    folder: Path,
    repo_id: str,
    *,
    private: bool,
    base_model: str | None = None,
    license_id: str | None = None,
    scores: Sequence[Path] = (),
    message: str = "Upload a model",
) -> str:
    """Upload a checkpoint or adapter with its model card to the hub and return the URL of the commit.

    The arguments are those of ``make_card`` and ``hub.upload``.

    Raises:
        CheckpointError: As these do, or if the folder has an edited card, to which nothing can be added.
    """
    hub.check_whole(folder)
    if not hub.is_edited(folder / CARD):
        card = make_card(folder, repo_id=repo_id, base_model=base_model, license_id=license_id, scores=scores)
    elif license_id or scores:
        raise CheckpointError(f"{folder / CARD}: was edited by hand and is kept; add license and scores to it by hand")
    else:
        card = None
    return hub.upload(folder, repo_id, private=private, base_model=base_model, card=card, message=message)


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
    adapter, flags, record = (_read_if_exists(folder / name) for name in (ADAPTER_CONFIG, ARGUMENTS, RECORD))
    base = known_base(folder, base_model)
    released = _CONVERTED.get(base or "", base or "")
    name = (repo_id or folder.resolve().name).split("/")[-1]
    config = None if adapter else read_config(folder)
    model_type = _read_if_exists(folder / ADAPTER_SETTINGS).get("model_type") if config is None else config.model_type
    family = FAMILIES.get(str(model_type), ANY)
    license_file = next((path.name for path in sorted(folder.glob("LICENSE*")) if path.is_file()), None)
    license_id = _license(folder, license_file, license_id)
    reports, results = [], []
    for path in scores:
        report, measured = _read_scores(path, {name, folder.resolve().name})
        reports.append(report)
        results += measured
    data = ModelCardData(
        language=["en", "zh"],
        license=license_id,
        license_link=license_file if license_id == "other" else None,
        library_name="peft" if adapter else "yivl",
        pipeline_tag=TASK,
        base_model=base,
        base_model_relation=("adapter" if adapter else "finetune") if base else None,
        tags=[*family.tags, *(["lora"] if adapter else [])],
        model_name=name if results else None,
        eval_results=results or None,
    )
    sources = record.get("sources", [])
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / "assets/model_card.jinja"),
        marker=MARKER,
        name=name,
        model=repo_id or name,
        adapter=adapter,
        config=config,
        format=None if adapter else format_of(folder).name,
        family=family,
        base=base,
        released=released,
        hardware=_HARDWARE.get(released),
        flags=flags,
        # A checkpoint-N folder has no log; its trainer_state.json holds the same lines.
        log=read_log(folder / LOG) or _read_if_exists(folder / "trainer_state.json").get("log_history", []),
        sources=sources,
        columns=[key for key in _SOURCE_COLUMNS if any(source.get(key) is not None for source in sources)],
        versions=({"peft": adapter["peft_version"]} if "peft_version" in adapter else {}) | record.get("versions", {}),
        reports=reports,
        license_id=license_id,
        license_file=license_file,
        last_part=lambda path: f"`{_cell(last_part(path))}`",
    )
    return f"{card}\n"


def _read_scores(path: Path, names: set[str]) -> tuple[dict[str, Any], list[EvalResult]]:
    """Return what the card shows of a ``scores.json``, and the results for the index of the hub.

    The index takes those of this model, one of ``names``, on the whole benchmark and with the image of each question.
    """
    about = read_json(path)
    groups: list[tuple[str, Sequence[float]]]  # the accuracy in percent comes first
    try:
        dataset, model = last_part(about["data"]), last_part(about["model"])
        if "overall" in about:
            protocol = f", protocol {about['protocol']}" if "protocol" in about else ""
            title = f"{about['benchmark'].upper()}, {about['split']} split, {about['questions']:,} questions{protocol}"
            columns = ["domain", "accuracy %"]
            groups = [(name, [100 * value]) for name, value in {**about["domains"], "all": about["overall"]}.items()]
            if hub.is_hub_id(about["data"]) and not Path(about["data"]).exists():
                dataset = about["data"]
            metric, is_claim = "accuracy", about["is_whole"]
        else:
            images = about["images"] if "images" in about else about["pictures"]  # the key of older files
            shown = {"own": "", "another": ", shown the image of another question", "none": ", shown no image"}
            title = f"`{dataset}`{shown[images]}"
            columns = [_cell(", ".join(about["group_by"]) or "group"), "exact %", "best constant answer %", "questions"]
            groups = [
                (", ".join(one["group"]) or "all", [float(one["accuracy"]), float(one["constant"]), int(one["number"])])
                for one in about["scores"]
            ]
            metric, is_claim = "exact_match", images == "own"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a scores.json of python -m yivl.eval") from error
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset.removesuffix(".jsonl").removesuffix(".json"),
            dataset_name=dataset,
            metric_type=metric,
            metric_name=f"{metric.replace('_', ' ')} in percent, {name}",
            metric_value=values[0],
        )
        for name, values in groups
        if is_claim and model in names
    ]
    rows = [
        [_cell(name), *(f"{value:,}" if isinstance(value, int) else f"{value:.1f}" for value in values)]
        for name, values in groups
    ]
    return {"title": f"{title}, measured on `{model}`:", "columns": columns, "rows": rows}, results


def _license(folder: Path, file: str | None, given: str | None) -> str | None:
    """Return the license: of the ``LICENSE`` file, else the given one, else that of an earlier card."""
    if file is not None:
        head = (folder / file).read_text(encoding="utf-8", errors="replace")[:500]
        is_apache = "Apache License" in head and "Version 2.0, January 2004" in head
        if given is not None and (given == "apache-2.0") != is_apache:
            raise CheckpointError(f"{folder / file}: is another license than {given!r}; drop one of them")
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


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
