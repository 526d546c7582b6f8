"""What a CPU can compute in half precision at speed."""

from __future__ import annotations

import platform
from functools import cache

import torch


@cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a dtype in hardware.

    For bfloat16 and float16 that takes instructions that many CPUs lack: torch then falls back to code several
    times slower than float32. oneDNN's own answer for x86 is yes from AVX-512 on, also where it has to emulate.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if platform.machine() in ("x86_64", "AMD64"):
        if dtype == torch.bfloat16:
            return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.cpu._is_amx_fp16_supported()
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, name)())
