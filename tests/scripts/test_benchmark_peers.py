"""The comparison with other programs: what it runs, counts and writes. Its figures are not tested."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from PIL import Image
from safetensors.torch import load_file
from support.golden import CHECKPOINT, GOLDEN, ROOT
from support.golden_internvl import CHECKPOINT as INTERNVL
from support.golden_internvl import golden_model, pixels_of
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from yivl.checkpoint.loading import load_model, load_processors
from yivl.export.gguf import export_gguf
from yivl.export.hf import to_hf
from yivl.inference.chat import Chat

PHOTO = GOLDEN / "images/photo_rgb.jpg"
BOUNDS = {"bandwidth": 40e9, "float32": 1e11, "bfloat16": 4e11, "language_flops": 8e11, "vision_flops": 4e11}
TIMES = {"encode_s": 0.5, "prefill_s": 2.0, "tokens_per_s": 20.0}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return benchmark_peers.py and the modules beside it."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import benchmark_inference
    import benchmark_peers
    import benchmark_report
    import peer_workers

    class Scripts:
        inference, peers, report, workers = benchmark_inference, benchmark_peers, benchmark_report, peer_workers

    return Scripts


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return export_gguf(CHECKPOINT, tmp_path_factory.mktemp("gguf"), dtype="float16")


def golden_job(scripts: Any, checkpoint: Path = CHECKPOINT, **fields: Any) -> dict[str, Any]:
    config, tokenizer, _ = load_processors(checkpoint)
    ids = scripts.inference.question_ids(tokenizer, config.prompt_template)
    job = {"ids": ids, "prompt_tokens": len(ids) - 1 + config.num_patches, "question": scripts.inference.QUESTIONS[0]}
    job |= {"checkpoint": str(checkpoint), "image": str(PHOTO), "new_tokens": 3, "device": "cpu", "form": "float32"}
    return job | {"threads": torch.get_num_threads()} | fields


@pytest.mark.parametrize("kind", ["yivl", "llava", "transformers"])
def test_programs_of_pytorch_answer_about_the_whole_prompt(kind: str, scripts: Any, tmp_path: Path) -> None:
    if kind == "transformers":
        to_hf(CHECKPOINT, tmp_path / "hf")
    program = scripts.workers.PROGRAMS[kind](golden_job(scripts, hf=str(tmp_path / "hf")))
    assert program.facts == {"dtype": "float32"}
    assert min(program.run()[key] for key in TIMES) > 0


@pytest.mark.parametrize("kind", ["yivl", "llava", "transformers-internvl"])
def test_programs_of_pytorch_answer_by_an_internvl(kind: str, scripts: Any) -> None:
    program = scripts.workers.PROGRAMS[kind](golden_job(scripts, INTERNVL))
    assert program.facts == {"dtype": "float32"}
    assert min(program.run()[key] for key in TIMES) > 0


@torch.no_grad()
def test_an_internvl_of_transformers_is_that_of_the_package(scripts: Any) -> None:
    """With image tokens in the order of ``ps_version`` v2; other renames than those of InternVL would differ."""
    from internvl_of_transformers import as_transformers

    pixels, ids = pixels_of(["photo_rgb.jpg"]), torch.tensor([[6, 9, *[648] * 9, 7, 20, 30]])
    logits = [
        golden_model(ps_version=version)(ids.masked_fill(ids == 648, 642), pixel_values=pixels).logits
        for version in ("v2", "v1")
    ]
    found = as_transformers(golden_model())(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(found, logits[0], atol=1e-4, rtol=1e-4)
    assert (found - logits[1]).abs().max() > 0.1


def test_random_models_of_both_architectures_answer(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import random_models

    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    small |= {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 1024, "image_size": 56}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    for kind in ("vision", "intern_vision"):
        monkeypatch.setitem(random_models.SHAPES, "mine", small | {kind: vision})
        loaded = random_models.random_model("mine", "float32")
        answer = scripts.inference.measure_answer(loaded, Image.open(PHOTO), 1, new_tokens=4)
        ids = scripts.inference.question_ids(loaded.tokenizer, loaded.model.config.prompt_template)
        assert answer["prompt_tokens"] == len(ids) - 1 + {"vision": 16, "intern_vision": 4}[kind]


def test_a_prompt_that_is_computed_in_part_is_no_result(scripts: Any) -> None:
    job = golden_job(scripts)
    program = scripts.workers.PROGRAMS["yivl"](job | {"prompt_tokens": job["prompt_tokens"] + 1})
    with pytest.raises(AssertionError, match=f"{job['prompt_tokens']} positions"):
        program.run()


def test_the_baseline_chooses_the_same_first_token(scripts: Any) -> None:
    loaded, photo = load_model(CHECKPOINT, device="cpu", dtype="float32"), Image.open(PHOTO)
    baseline = scripts.inference.LlavaBaseline(CHECKPOINT, "cpu", "float32")
    assert baseline.model.config._attn_implementation == "sdpa"
    assert {type(layer) for layer in baseline.model.model.layers} == {LlamaDecoderLayer}
    token, _ = baseline.prefill(baseline.encode(photo))
    state = Chat(loaded).begin(scripts.inference.QUESTIONS[0], photo, temperature=0, max_new_tokens=1)
    from yivl.inference.engine import finish_together

    finish_together(loaded, [state])
    assert token.tolist() == [state.new_ids]


def test_llama_cpp_is_stopped_while_it_does_not_answer(scripts: Any, gguf: tuple[Path, Path]) -> None:
    job = golden_job(scripts, gguf=str(gguf[0]), mmproj=str(gguf[1]))
    worker = scripts.peers.Worker("llama.cpp", sys.executable, job)
    status = Path(f"/proc/{worker._process.pid}/stat")
    try:
        assert worker.facts["resident_bytes"] > 0
        for _ in range(2):
            assert status.read_text().rsplit(")", 1)[1].split()[0] == "T"
            assert min(worker.run()[key] for key in TIMES) > 0
    finally:
        worker.close()


def test_a_program_that_fails_is_reported_with_its_last_line(scripts: Any) -> None:
    with pytest.raises(scripts.peers.PeerError, match="KeyError: 'prompt_tokens'"):
        scripts.peers.Worker("llama.cpp", sys.executable, {"threads": 1})


def test_llama_cpp_quantizes_the_export(scripts: Any, gguf: tuple[Path, Path], tmp_path: Path) -> None:
    job = {"source": str(gguf[0]), "target": str(tmp_path / "q8.gguf"), "ftype": "LLAMA_FTYPE_MOSTLY_Q8_0"}
    scripts.peers.Worker("quantize", sys.executable, job | {"threads": 1}).close()
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "q8.gguf").tensors}
    assert "Q8_0" in kinds


def test_bytes_are_those_of_the_files(scripts: Any, gguf: tuple[Path, Path], tmp_path: Path) -> None:
    config = load_processors(CHECKPOINT)[0]
    to_hf(CHECKPOINT, tmp_path / "hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    read = ("language_model.model.layers.", "language_model.model.norm.", "language_model.lm_head.")
    rows = config.vocab_size / weights["language_model.lm_head.weight"].shape[0]  # the export adds rows
    expected = sum(
        value.numel() * (rows if "lm_head" in key else 1) for key, value in weights.items() if key.startswith(read)
    )
    _, token_bytes = scripts.peers.torch_bytes(config, "float32", 4)
    assert token_bytes == round(4 * expected)
    file_16, token_16 = scripts.peers.torch_bytes(config, "bfloat16", 2)
    file_8, token_8 = scripts.peers.torch_bytes(config, "8bit", 2)
    _, token_4 = scripts.peers.torch_bytes(config, "4bit", 2)
    quantized = sum(value.numel() for key, value in weights.items() if key.startswith(read[0]) and value.ndim == 2)
    assert file_16 - file_8 == round(quantized * (16 - 8.5) / 8)
    assert token_16 - token_8 == quantized  # half of 16 bits
    assert token_8 - token_4 == quantized * 3 // 8  # a scale and a zero in bfloat16 for 32 weights
    file_gguf, token_gguf = scripts.peers.gguf_bytes(gguf)
    assert file_gguf == sum(path.stat().st_size for path in gguf)
    assert token_gguf == pytest.approx(token_16, rel=0.01)  # llama.cpp has vectors in float32


def test_ratios_are_to_the_bounds_and_to_llama_cpp_of_the_same_bits(scripts: Any) -> None:
    config = load_processors(CHECKPOINT)[0]
    facts = {"dtype": "float32", "resident_bytes": 10**8}
    rows = {
        name: scripts.peers.row(name, facts, [TIMES | {"prefill_s": seconds}] * 2, BOUNDS, config, 100, None)
        for name, seconds in {"yivl:8bit": 2.0, "yivl:float32": 3.0}.items()
    }
    figures = rows["yivl:float32"]
    assert figures["prefill_over_bound"] == pytest.approx(3.0 / (8e11 / 4e11))
    assert figures["first_token_over_bound"] == pytest.approx(3.5 / (12e11 / 4e11))
    assert figures["decode_over_bound"] == pytest.approx((1 / 20) / (figures["bytes_per_token"] / 40e9))
    others = {"llama.cpp:f16": TIMES | {"first_token_s": 1.0}, "llama.cpp:q8_0": TIMES | {"first_token_s": 5.0}}
    scripts.peers.compare(rows | others)
    assert rows["yivl:float32"]["first_token_over_llama_cpp"] == 3.5
    assert rows["yivl:8bit"]["first_token_over_llama_cpp"] == 0.5


def test_table_and_chart_have_every_program(scripts: Any, tmp_path: Path) -> None:
    config = load_processors(CHECKPOINT)[0]
    facts = {"dtype": "bfloat16", "resident_bytes": 10**8}
    names = ("yivl:auto", "transformers:float32")
    results = {
        "machine": {"cpu": "a CPU", "threads": 2, "capability": "AVX2"},
        "shape": "small",
        "prompt_tokens": 1103,
        "new_tokens": 64,
        "repeats": 2,
        "bounds": BOUNDS,
        "peers": {name: scripts.peers.row(name, facts, [TIMES], BOUNDS, config, 100, None) for name in names},
        "errors": {"llama.cpp:q4_0": "ModuleNotFoundError: No module named 'llama_cpp'"},
    }
    lines = scripts.report.markdown_table(results).splitlines()
    assert "1,103 positions" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[4:]] == [
        "yivl auto (bfloat16)",
        "transformers float32",
        "llama.cpp q4_0",
    ]
    scripts.report.write_chart(tmp_path / "chart.png", results)
    assert Image.open(tmp_path / "chart.png").width > 1000


def test_a_section_of_a_page_is_replaced(scripts: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    scripts.report.replace_section(page, "cpu", "new")
    assert page.read_text() == "new\n"
    page.write_text("before\n<!-- cpu -->\nold\n<!-- /cpu -->\nafter\n")
    scripts.report.replace_section(page, "cpu", "table")
    assert page.read_text() == "before\n<!-- cpu -->\n\ntable\n\n<!-- /cpu -->\nafter\n"
    with pytest.raises(ValueError, match="no section <!-- gpu -->"):
        scripts.report.replace_section(page, "gpu", "table")


@pytest.mark.slow
def test_programs_take_turns(tmp_path: Path) -> None:
    peers = ("yivl:float32", "llama.cpp:q8_0", "transformers:float32", "llava:float32")
    flags = ["--shape", "small", "--repeats", "2", "--new-tokens", "4", "--peers", *peers]
    command = [sys.executable, "scripts/benchmark_peers.py", *flags, "--json", str(tmp_path / "peers.json")]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    results = json.loads((tmp_path / "peers.json").read_text())
    assert tuple(results["peers"]) == peers
    assert not results["errors"]
    assert all(len(rounds) == 2 for rounds in results["rounds"].values())
