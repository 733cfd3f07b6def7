"""Other libraries' fake quantization, if installed. None is needed; absent ones say why.

Each maker returns a call x -> y (with their own gradient), and the keyword arguments and parameters
with which ours does the same: torchao, Brevitas and NNCF (unsigned codes with a zero point) and
NVIDIA ModelOpt (signed codes, no zero point).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

MODULES = {
    "torchao": "torchao.quantization.quant_primitives",
    "brevitas": "brevitas.core.quant",
    "nncf": "nncf.torch.quantization.quantize_functions",
    "modelopt": "modelopt.torch.quantization.tensor_quant",
}


class Params(NamedTuple):
    """How x is quantized; column(p) broadcasts over x."""

    scale: Tensor
    zp: Tensor
    axis: int | None
    bits: int
    column: Callable[[Tensor], Tensor]

    @property
    def qmax(self) -> int:
        return 2**self.bits - 1


class Peer(NamedTuple):
    """A peer's call, and whether its codes are signed without a zero point."""

    call: Callable[[Tensor], Tensor]
    symmetric: bool = False


_loaded: dict[str, Any] = {}  # name -> module, or the sentence that says why not


def load(name: str) -> Any:
    """The peer's module, or why it is absent. (NNCF compiles its kernels the first time.)"""
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(MODULES[name])
            if name == "nncf":
                build_nncf(_loaded[name])
        except (ImportError, OSError, AttributeError, RuntimeError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            _loaded[name] = f"{name} is not timed: {first}"
    return _loaded[name]


def build_nncf(module: Any) -> None:
    """Compile and load its kernels, or an ImportError."""
    too_long = importlib.import_module("nncf.torch.extensions").ExtensionLoaderTimeoutException
    on_gpu = torch.cuda.is_available()
    functions = module.QuantizedFunctionsCUDA if on_gpu else module.QuantizedFunctionsCPU
    try:
        functions.get("Quantize_forward")
    except too_long as error:
        raise ImportError("its extension did not compile within its own time limit") from error


def absent() -> Iterator[str]:
    """One sentence for each peer that is not there."""
    for name in MODULES:
        found = load(name)
        if isinstance(found, str):
            yield found


def torchao(module: Any, x: Tensor, p: Params) -> Peer:
    block = tuple(1 if d == p.axis else n for d, n in enumerate(x.shape))
    args = (block, p.scale, p.zp, torch.uint8, 0, p.qmax)
    return Peer(lambda t: module._fake_quantize_affine(t, *args))


def brevitas(module: Any, x: Tensor, p: Params) -> Peer:
    quant = module.IntQuant(signed=False, narrow_range=False, input_view_impl=torch.nn.Identity())
    quant = quant.to(x.device)
    scale, zp = p.column(p.scale), p.column(p.zp).float()
    bits = torch.tensor(float(p.bits), device=x.device)
    return Peer(lambda t: quant(scale, zp, bits, t))


def nncf(module: Any, x: Tensor, p: Params) -> Peer:
    scale = p.column(p.scale)
    low, width = -p.column(p.zp) * scale, p.qmax * scale
    args = (low, width, 0, p.qmax, p.qmax + 1)
    return Peer(lambda t: module.QuantizeAsymmetric.apply(t, *args))


def modelopt(module: Any, x: Tensor, p: Params) -> Peer:
    amax = p.column(p.scale) * (2 ** (p.bits - 1) - 1)
    return Peer(lambda t: module.fake_tensor_quant(t, amax, None, p.bits, False, False), True)


MAKERS = {"torchao": torchao, "brevitas": brevitas, "nncf": nncf, "modelopt": modelopt}


def fake_quant_peers(x: Tensor, p: Params) -> dict[str, Peer]:
    """Every peer that is installed."""
    found = {}
    for name, maker in MAKERS.items():
        module = load(name)
        if not isinstance(module, str):
            found[name] = maker(module, x, p)
    return found
