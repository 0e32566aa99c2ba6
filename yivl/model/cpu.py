"""What the CPU computes well: the question behind the default precision of inference and the warning of training."""

import torch


def has_native_bfloat16() -> bool:
    """Return whether the CPU has instructions for bfloat16 matrix products, and PyTorch uses them.

    Those are AVX512-BF16 and AMX on x86, and the BF16 extension of Arm. Without them bfloat16 products are emulated:
    on an AVX2 CPU at 20 GFLOP/s, against 92 to 150 in float32. ``torch.ops.mkldnn._is_mkldnn_bf16_supported`` alone
    does not tell: it is true on every CPU with AVX512, where products without AVX512-BF16 run at 32 GFLOP/s, against 54
    in float32 (``ONEDNN_MAX_CPU_ISA=AVX512_CORE``). Source of the rates: ours.

    ``ATEN_CPU_CAPABILITY=avx2`` and ``ONEDNN_MAX_CPU_ISA=AVX2`` imitate a CPU without these instructions.
    """
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not has_onednn or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    found = torch.cpu.get_capabilities()
    if found.get("architecture") != "x86_64":
        return bool(found.get("bf16"))
    is_present = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return is_present and torch.backends.cpu.get_cpu_capability() == "AVX512"
