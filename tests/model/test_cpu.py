"""Whether the CPU has bfloat16 matrix products, asked of CPUs that are not here."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from yivl.model.cpu import has_native_bfloat16

X86 = {"architecture": "x86_64", "avx2": True}


@pytest.mark.parametrize(
    ("capabilities", "level", "onednn", "expected"),
    [
        (X86, "AVX2", False, False),
        (X86 | {"avx512_f": True}, "AVX512", True, False),  # Skylake: oneDNN supports bfloat16, and emulates it
        (X86 | {"avx512_f": True, "avx512_bf16": True}, "AVX512", True, True),  # Cooper Lake, Zen 4
        (X86 | {"avx512_f": True, "amx_bf16": True}, "AVX512", True, True),  # Sapphire Rapids
        (X86 | {"avx512_f": True, "avx512_bf16": True}, "AVX2", True, False),  # ATEN_CPU_CAPABILITY=avx2
        (X86 | {"avx512_f": True, "avx512_bf16": True}, "AVX512", False, False),  # ONEDNN_MAX_CPU_ISA=AVX2
        ({"architecture": "aarch64", "bf16": True}, "SVE256", True, True),  # Graviton 3
        ({"architecture": "aarch64"}, "DEFAULT", True, False),  # Graviton 2
    ],
)
def test_the_instructions_decide(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], level: str, onednn: bool, expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn, raising=False)
    assert has_native_bfloat16() is expected


def test_a_build_without_onednn_emulates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert has_native_bfloat16() is False


@pytest.mark.parametrize("variable", ["ATEN_CPU_CAPABILITY=avx2", "ONEDNN_MAX_CPU_ISA=AVX2"])
def test_variables_imitate_a_cpu_without_it(variable: str) -> None:
    name, value = variable.split("=")
    code = "from yivl.model.cpu import has_native_bfloat16; print(has_native_bfloat16())"
    environment = os.environ | {name: value}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
