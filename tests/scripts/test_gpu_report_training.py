"""The training parts of the GPU report: their contract, and what is reported when one cannot run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_report_training

    return gpu_report_training


def run_of(script: Any, name: str) -> Any:
    return next(run for run in script.RUNS if run.name == name)


def figures(name: str = "lora", *, device: str = "cpu", rehearsal: bool = True) -> Any:
    from gpu_report_parts import Figures

    return Figures(name, device, rehearsal, seconds=600)


def measured(script: Any, name: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Return the figures that a part prints."""
    from gpu_report_parts import measure_part

    measure_part(next(part for part in script.PARTS if part.name == name), figures(name))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_the_parts_are_ordered_by_worth(script: Any) -> None:
    assert [part.name for part in script.PARTS[:2]] == ["lora", "full"]
    assert all(part.seconds > 0 for part in script.PARTS)
    # DeepSpeed's process group stays in the process of a rehearsal.
    assert [run.name for run in script.RUNS if "--deepspeed" in run.flags] == [script.RUNS[-1].name]


def test_a_part_prints_its_figures_after_every_step(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "REHEARSAL_STEPS", 2)
    first, *_, last = measured(script, "full", capsys)
    assert (first["part"], first["steps"], last["steps"]) == ("full", 1, 2)
    assert len(last["losses"]) == script.WARM_UP + 2
    assert last["samples_per_s"] == pytest.approx(2 / last["step_seconds"], rel=0.01)
    assert sum(first["phase_seconds"].values()) == pytest.approx(first["step_seconds"], rel=0.3)
    assert last["trainable"] < last["parameters"]


def test_mfu_is_the_share_of_the_peak_by_the_useful_flops(script: Any) -> None:
    from flops import Trained, training_flops

    lora = run_of(script, "lora")
    run = script.described(lora, lora.sizes[0], figures())
    tokens = run.arguments.data.model_max_length
    flops = 2 * training_flops(run.config, tokens, 200, Trained(lora_rank=8))
    # The median step takes 2 s: half of the measured rate, and a quarter of the peak.
    steps = [{"step": seconds, "forward": 0.5} for seconds in (1.0, 2.0, 9.0)]
    found = script.speed(run, 200, steps, rate=flops, peak=2 * flops)
    assert found["share_of_matrix_products"] == pytest.approx(0.5)
    assert found["mfu"] == pytest.approx(0.25)
    assert found["tokens_per_s"] == tokens
    assert script.speed(run, 200, steps, rate=flops, peak=None)["mfu"] is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["allocator", "cublas"],
)
def test_a_size_that_runs_out_of_memory_is_followed_by_the_next(
    error: Exception, script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def train(_: Any, run: Any, figures: Any) -> None:
        tried.append(run)
        figures.values["step_seconds"] = float(len(tried))
        if len(tried) == 1:
            raise error

    monkeypatch.setattr(script, "train", train)
    first, last = measured(script, "lora", capsys)
    reason = str(error).splitlines()[0]
    assert first == {"part": "lora", "skipped": f"32 layers, 8 samples: {type(error).__name__}: {reason}"}
    assert last == first | {"step_seconds": 2.0}


def test_a_failure_is_one_line(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore lines")

    monkeypatch.setattr(script, "train", train)
    last = measured(script, "stage1", capsys)[-1]
    assert last["error"] == "RuntimeError: no size fits"
    assert last["skipped"].count("CUDA out of memory") == len(run_of(script, "stage1").sizes)
    assert "\n" not in last["skipped"]

    def wrong(*_: Any) -> None:
        raise RuntimeError("expected a matrix")

    monkeypatch.setattr(script, "train", wrong)
    assert measured(script, "stage1", capsys) == [{"part": "stage1", "error": "RuntimeError: expected a matrix"}]


@pytest.mark.parametrize(("part", "package"), [("qlora", "bitsandbytes"), ("stage1", "peft")])
def test_a_missing_package_is_skipped(
    part: str, package: str, script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_report_parts

    monkeypatch.setattr(gpu_report_parts.importlib.util, "find_spec", lambda name: None if name == package else name)
    skipped = f"needs {package}, which is not installed"
    assert measured(script, part, capsys) == [{"part": part, "skipped": skipped}]


@pytest.mark.parametrize(
    ("part", "gib", "first"),
    [("full", 79, (16, 8)), ("full", 138, (32, 4)), ("full_adafactor", 79, (32, 4))],
)
def test_the_first_size_that_fits_by_the_estimate_is_measured(
    part: str, gib: int, first: tuple[int, int], script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gib * script.GIB, gib * script.GIB))
    monkeypatch.setattr(script, "train", lambda _, run, __: tried.append(run))
    script.measure(run_of(script, part), figures(device="cuda", rehearsal=False))
    (run,) = tried
    assert (run.config.num_hidden_layers, run.arguments.training.per_device_train_batch_size) == first


def test_the_rehearsal_compiles_no_operators(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (found,) = measured(script, "full_offload", capsys)
    assert "compiles" in found["skipped"]
