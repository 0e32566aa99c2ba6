"""The benchmark scripts run; their figures are not tested."""

import json
import runpy
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from support.golden import CHECKPOINT, ROOT
from support.serving import wait_until

from yivl.checkpoint.loading import empty_model, load_model


def test_the_loader_is_measured_on_the_data_it_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    measure_loader = runpy.run_path(str(ROOT / "scripts/benchmark_training.py"))["measure_loader"]
    threads = torch.get_num_threads()
    try:
        results = measure_loader(16, 1)
    finally:
        torch.set_num_threads(threads)
    assert results["time_over_decoding"] > 0
    assert results["images_per_s_per_worker"] > 0


def test_the_estimate_is_that_of_the_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = runpy.run_path(str(ROOT / "scripts/benchmark_training.py"))
    config = script["shape_config"]("small")
    model = empty_model(config)
    estimates = {
        variant: script["estimate"](Namespace(variant=variant, dtype="bfloat16"), model, config, 100, 2)
        for variant in ("packed", "packed_8bit")
    }
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    parameters -= config.vocab_size * config.hidden_size  # the states of embeddings keep 32 bits
    assert estimates["packed"] - estimates["packed_8bit"] == 6 * parameters


def test_the_server_ends_when_a_measurement_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    serving = runpy.run_path(str(ROOT / "scripts/benchmark_serving.py"))["serving"]
    before = set(threading.enumerate())
    flags = Namespace(clients=2, prefill_chunk=64)
    with pytest.raises(ZeroDivisionError), serving(load_model(CHECKPOINT, device="cpu"), flags):
        raise ZeroDivisionError
    # Threads of the event loop's pool end after the loop.
    wait_until(lambda: not [thread for thread in set(threading.enumerate()) - before if not thread.daemon])


@pytest.mark.slow
def test_data_is_measured_in_files_and_shards(tmp_path: Path) -> None:
    flags = ["--max-rows", "1000", "--max-shards", "1", "--samples", "40", "--shuffle-buffer", "8", "--batches", "2"]
    outputs = ["--chart", str(tmp_path / "chart.png"), "--markdown", str(tmp_path / "table.md")]
    command = [sys.executable, "scripts/benchmark_data.py", *flags, *outputs]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    results = json.loads(printed)
    assert results["files"]["1000"]["samples_per_second"] > 0
    assert len(results["shards"]["1"]["resume_seconds"]) == 3
    assert (tmp_path / "chart.png").stat().st_size > 10_000
    assert (tmp_path / "table.md").read_text().count("| 1,000 |") == 1


def test_a_measurement_that_takes_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = runpy.run_path(str(ROOT / "scripts/benchmark_data.py"))
    results = {"samples": 5, "buffer": 8, "files": {1000: None}, "shards": {1: None}}
    assert script["markdown_table"](results).count("not measured: too slow") == 2


@pytest.mark.slow
def test_serving_is_measured_with_one_and_several_clients() -> None:
    flags = ["--shape", "small", "--repeats", "1", "--new-tokens", "8", "--clients", "2"]
    command = [sys.executable, "scripts/benchmark_serving.py", *flags]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    results = json.loads(printed[printed.index("{") :])
    assert results["image"]["one_client"] > 0
    assert results["image"]["several_clients"] > 0
    assert len(results["turns"]["over_first_turn"]) == 4
    assert results["shared_image"]["last_of_simultaneous_clients_seconds"] > 0
    assert results["gaps"]["others_join_seconds"] > 0


def test_precisions_are_compared_with_float32() -> None:
    script = runpy.run_path(str(ROOT / "scripts/benchmark_quantization.py"))
    rows = script["measure"](ROOT / "tests/golden/checkpoint", script["golden_questions"]()[:2], 4)
    assert rows.pop("tokens") > 0
    # bitsandbytes cannot pack these widths in 4 bits.
    names = ["bfloat16", "bfloat16 weights, float32 products", "8 bits", "4 bits", "8 bits (bitsandbytes)"]
    assert list(rows) == names
    assert 0 < rows["8 bits"]["kl"] < rows["4 bits"]["kl"]
