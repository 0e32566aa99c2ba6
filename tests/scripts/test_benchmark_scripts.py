"""The benchmark scripts run; their figures are not tested."""

import json
import runpy
import subprocess
import sys

import pytest
import torch
from support.golden import ROOT


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
