"""Products of two matrices, by the faster of the libraries that PyTorch has on board."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor


def _on_amd() -> bool:
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        processor = platform.processor()
    return "AuthenticAMD" in processor


# PyTorch multiplies single-precision matrices by MKL, which leaves the AVX512 of AMD's processors
# unused, and convolves by oneDNN, which then takes less than half the time. On others oneDNN is
# no faster, and slower where the left factor is transposed (docs/matmul.md).
_ONEDNN = (
    hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and _on_amd()
)
_LEAST_WORK = 1_000_000  # multiplications; below these its set-up costs more than it saves


def matmul(a: Tensor, b: Tensor, onto: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
    """a @ b, of two matrices or two batches of them, plus one of two if given.

    Args:
        onto: like the result; its memory may be taken for that.
        plus: broadcasts to the result, and stays as it is.
    """
    if _by_onednn(a, b):
        if onto is None:
            bias = plus if plus is not None and plus.ndim == 1 else None
            out = torch.ops.mkldnn._linear_pointwise(a, b.mT, bias, "none", [], "")
            return out if bias is plus else out.add_(plus)
        return torch.ops.mkldnn._linear_pointwise.binary(a, onto, b.mT, None, "add")
    if plus is not None:
        return torch.addmm(plus, a, b) if a.ndim == 2 else torch.baddbmm(plus, a, b)
    if onto is None:
        # As a @ b, which first makes views for shapes that broadcast.
        return torch.mm(a, b) if a.ndim == 2 else torch.bmm(a, b)
    return onto.addmm_(a, b) if onto.ndim == 2 else onto.baddbmm_(a, b)


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    return bool(
        _ONEDNN
        and a.ndim == b.ndim == 2
        and a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and len(a) * b.numel() >= _LEAST_WORK
        # It is no operation that autograd knows.
        and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
        and torch.backends.mkldnn.enabled
    )
