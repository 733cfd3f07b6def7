"""THE table: which function runs an op on a device. Data only; qkernels/_registry.py reads it.

The order of the rows of one (op, device) is the order in which they are tried. The reference row
accepts everything and comes last of the automatic choice. The Triton rows for CPU tensors run under
TRITON_INTERPRET=1 only; they stand behind the reference, so that they run when asked for by name.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One implementation of one op. Targets are "module:function", imported on first use."""

    op: str
    device: str
    backend: str
    target: str  # the function, with the arguments of the op's schema less `backend`
    available: str | None = None  # device -> why this row can never run here, or None; asked once
    refuses: str | None = None  # the op's arguments -> why it cannot take this call, or None
    foreach: str | None = None  # a list of such arguments -> list of results; None: one by one


BACKENDS = ("native", "triton", "reference")

# op -> stem of the module that holds it in each folder of qkernels/backends
STEMS = {
    "fake_quant": "fake_quant",
    "fake_quant_bwd": "fake_quant",
    "lsq_bwd": "lsq_bwd",
    "quant_range": "quant_range",
    "qparams": "quant_range",
    "fake_quant_dynamic": "fake_quant_dynamic",
    "quantize": "quantize",
    "dequantize": "quantize",
    "error_stats": "error_stats",
    "error_stats_dynamic": "error_stats",
    "differential_noise": "noise",
    "drop_in_noise": "noise",
    "uniform_noise": "noise",
}

ORDER = {
    "cpu": ("native", "reference", "triton"),
    "cuda": ("native", "triton", "reference"),
}

AVAILABLE = {
    "native": "qkernels._native:available",
    "triton": "qkernels.backends.triton.launch:available",
    "reference": None,
}

# op -> module of the Triton backend whose rows take a list in one launch for each kind of tensor
TRITON_LISTS = {
    "fake_quant": "foreach",
    "fake_quant_bwd": "foreach",
    "lsq_bwd": "foreach_lsq",
    "error_stats": "foreach_stats",
    "differential_noise": "foreach_noise",
    "drop_in_noise": "foreach_noise",
    "uniform_noise": "foreach_noise",
}

# backend -> op -> module with the function that takes a list in one call; others go one by one
FOREACH = {"native": STEMS, "triton": TRITON_LISTS}

REFUSES: dict[tuple[str, str], str] = {}

ROWS: list[Row] = [
    Row(
        op,
        device,
        backend,
        f"qkernels.backends.{backend}.{stem}:{op}",
        AVAILABLE[backend],
        REFUSES.get((op, backend)),
        f"qkernels.backends.{backend}.{FOREACH[backend][op]}:foreach_{op}"
        if op in FOREACH.get(backend, {})
        else None,
    )
    for op, stem in STEMS.items()
    for device, backends in ORDER.items()
    for backend in backends
]
