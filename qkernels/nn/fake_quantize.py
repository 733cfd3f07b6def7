"""FakeQuantize: `qkernels.fake_quant` as a module that keeps its range or its learned scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import numeric
from qkernels.nn import observe
from qkernels.nn.quant_spec import QuantSpec
from qkernels.ops.fake_quant import fake_quant
from qkernels.ops.quant_range import QuantRange, observe_range, qparams

NARROW = (torch.float16, torch.bfloat16)


class FakeQuantize(nn.Module):
    """Fake-quantizes its input as a QuantSpec says.

    What is kept, by kind of range (the rest is None):
        dynamic: nothing;
        running: buffer `range`, [2] or [2, channels], lower and upper bounds;
        learned: parameter `scale`, [1] or [channels] (sharding refuses 0-dim parameters), and, if
            affine, buffer `zero_point`, [] or [channels], int32; with learned_zero_point, instead
            of that, parameter `offset` of scale's shape, in the units of x;
        running and learned: buffer `initialized`, uint8, 0 until there is a value.
    State stays fp32 in a model cast to fp16 or bf16, where an average would stop moving.

    Training mode: a running range observes the input, moves (range <- ema range + (1 - ema)
    observed; the first observation is taken as it is) and quantizes with the new value. A learned
    scale takes its first value from the first input that has elements. This is done once per
    training forward (with gradient accumulation, once per forward; for a layer called twice,
    twice); a forward that activation checkpointing repeats in the backward changes nothing and uses
    the range of the first time. With torch.distributed, all ranks observe together (the union of
    min-max ranges, the mean of others and of first scales; a rank without elements adds nothing to
    a first value, and if none has any it stays as it started), so every rank must run the same
    quantizers in the same order; DDP's broadcast of the buffers then finds them equal.
    Eval mode: nothing changes; a range that was never set is an error.

    The learned scale in use is |scale| + the smallest normal number: positive whatever the
    optimizer does, with gradient +-1 to the parameter (our rule: the paper has none). The gradient
    of the scale in use is LSQ's, times 1 / sqrt(N Qp).

    A learned zero point (LSQ+, Bhalgat et al. 2020, arXiv 2004.09576) is kept as the paper's offset
    beta, in the units of x: zero_point = -beta / scale, rounded half to even for use (our choice:
    the paper does not round it). Straight-through, with z = -beta / scale not rounded:
        dy/dbeta  = 0 inside, 1 where x is clipped, as in the paper;
        dy/dscale = rint(x / scale) - x / scale inside, z - rint(z) + qmin or qmax where x is
            clipped; the paper's where z is an integer, and within 1/2 of it elsewhere;
    both times LSQ's 1 / sqrt(N Qp) (our choice for beta). beta starts at -zero_point scale of the
    affine range and is free: the codes need not hold 0. A beta beyond 2^23 scales is refused, as
    every such zero point.

    A step compiled before there is a first value keeps the code that takes it (the values are
    right, the step is slower): calibrate before compiling.

    Args:
        spec: what to do; of this class's kind (`fake_quantizer` finds the class of a kind).
        channels: number of scales, for a spec with axis or group_size.

    Attributes:
        observer_enabled: False freezes the range (or first value) in training mode too.
        fake_quant_enabled: False passes the input through; observing goes on.
        sync_ranks: False keeps this rank's observations to itself.
        label: name for error messages; `prepare` sets the dotted name.
    """

    kind = "plain"
    scale: nn.Parameter | None
    offset: nn.Parameter | None
    zero_point: Tensor | None
    range: Tensor | None
    initialized: Tensor | None

    def __init__(self, spec: QuantSpec, channels: int = 1) -> None:
        super().__init__()
        if not isinstance(spec, QuantSpec):
            raise TypeError(f"FakeQuantize: spec must be a QuantSpec, got {spec!r}")
        if spec.kind != self.kind:
            own = type(self).__name__
            raise ValueError(f"{own}: spec must be of kind {self.kind}, got {spec.kind}")
        if type(channels) is not int or channels < 0:
            raise ValueError(f"FakeQuantize: channels must be an int of at least 0, got {channels}")
        if channels != 1 and not spec.per_channel:
            raise ValueError(f"FakeQuantize: channels must be 1 without axis, got {channels}")
        self.spec = spec
        self.label = ""
        self.observer_enabled = True
        self.fake_quant_enabled = True
        self.sync_ranks = True
        # True: known to be initialized; False: the buffer knows. Saves a wait for the device.
        self._settled = False
        self._collecting = False
        self._total: Tensor | None = None
        self._count = 0
        self._recent = observe.Recent()
        self._make_options()
        self._make_state((channels,) if spec.per_channel else ())

    def _make_options(self) -> None:
        """Keyword arguments of the ops, made once: a forward of a small tensor would notice."""
        spec = self.spec
        codes: dict[str, Any] = {
            "bits": spec.bits,
            "symmetric": spec.symmetric,
            "narrow_range": spec.narrow_range,
        }
        layout = {"axis": spec.axis, "group_size": spec.group_size}
        estimate = {"method": spec.method, "percentile": spec.percentile}
        self._of_qparams = codes
        self._of_range = {**codes, **layout, **estimate}
        self._of_quant = {**codes, **layout, "clip": spec.clip}
        self._of_dynamic = {**self._of_range, "clip": spec.clip}

    def _make_state(self, shape: tuple[int, ...]) -> None:
        spec = self.spec
        scale = nn.Parameter(torch.ones(shape or (1,))) if spec.learned else None
        offset = nn.Parameter(torch.zeros(shape or (1,))) if spec.learned_zero_point else None
        fixed = spec.learned and not spec.symmetric and not spec.learned_zero_point
        zero_point = torch.zeros(shape, dtype=torch.int32) if fixed else None
        bounds = None if spec.ema is None else torch.zeros(2, *shape)
        flag = None if spec.dynamic else torch.zeros((), dtype=torch.uint8)
        self.register_parameter("scale", scale)
        self.register_parameter("offset", offset)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("range", bounds)
        self.register_buffer("initialized", flag)

    @property
    def _union(self) -> bool:
        """Whether several observations combine to the widest range, and not to the mean."""
        return self.spec.ema is not None and self.spec.method == "minmax"

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape and floating dtype -> the same, fake-quantized.

        Raises:
            RuntimeError: nothing was observed before the range is needed.
            TypeError, ValueError: as `qkernels.fake_quant`.
        """
        if self._collecting:
            if x.numel() > 0:
                self._collect(self.measure(x))
            return x
        if self.spec.dynamic:
            return self._quantize_dynamic(x) if self.fake_quant_enabled else x
        params = self._observe(x) if self.training and self.observer_enabled else None
        if not self.fake_quant_enabled:
            return x
        # a compiled step asks neither: the number of elements may not be known
        if not torch.compiler.is_compiling() and x.numel() > 0:
            self._require_value()
        scale, zero_point = params or self._params(self.range)
        return self._quantize(x, scale, zero_point)

    def _quantize_dynamic(self, x: Tensor) -> Tensor:
        """x with the range of x. This and the next methods are what other kinds change."""
        return fake_quant(x, **self._of_dynamic)

    def _quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """x with what `_params` gave."""
        return fake_quant(x, scale, zero_point, **self._of_quant)

    def qparams(self) -> QuantRange:
        """(scale, zero_point) in use: positive scales, and int32 zero points (0 if symmetric).

        Raises:
            ValueError: the range is dynamic, so that there are none without a tensor.
            RuntimeError: nothing was observed yet.
        """
        if self.spec.dynamic:
            raise ValueError(f"{self._name}: range must be running or learned, got a dynamic one")
        self._require_value()
        with torch.no_grad():
            scale, zero_point = self._params(self.range)
        if not self.spec.per_channel:
            scale = scale.reshape(())
        if zero_point is None:
            zero_point = torch.zeros_like(scale, dtype=torch.int32)
        elif zero_point.is_floating_point():
            zero_point = zero_point.round().to(torch.int32).reshape(scale.shape)
        return QuantRange(scale, zero_point)

    def _params(self, bounds: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.scale is None:
            assert bounds is not None, "a quantizer that is not dynamic has a scale or a range"
            return qparams(bounds, **self._of_qparams)
        # the gradient is the sign of the parameter, and no step can make the sum 0 or negative
        scale = self.scale.abs() + numeric.smallest_scale(self.scale.dtype)
        return scale, self.zero_point if self.offset is None else -self.offset / scale

    @torch.no_grad()
    def measure(self, x: Tensor) -> Tensor:
        """What x alone says: its range [2, ...]; for a learned scale, scale and range [3, ...]."""
        scale, _, bounds = observe_range(x, **self._of_range)
        return torch.cat((scale[None], bounds)) if self.spec.learned else bounds

    def begin_collecting(self) -> None:
        """From now on forwards only note what they see; `collected` tells."""
        self._collecting, self._total, self._count = True, None, 0

    def end_collecting(self) -> None:
        """Back to quantizing."""
        self._collecting, self._total, self._count = False, None, 0

    def _collect(self, measured: Tensor) -> None:
        self._count += 1
        if self._total is None:
            self._total = measured
        elif self._union:
            lo = torch.minimum(self._total[0], measured[0])
            self._total = torch.stack((lo, torch.maximum(self._total[1], measured[1])))
        else:
            self._total = self._total + measured

    def collected(self) -> Tensor | None:
        """The union (running min-max range) or the mean of what was seen, for `store`."""
        if self._total is None or self._union:
            return self._total
        return self._total / self._count

    @torch.no_grad()
    def store(self, measured: Tensor) -> None:
        """Take over what `measure` gave, or a mean of it."""
        self._write(measured, None)

    def reset(self) -> None:
        """Forget the range, or the first value of the learned scale."""
        if self.initialized is not None:
            self.initialized.zero_()
        if self.range is not None:
            self.range.zero_()
        self._settled = False

    @torch.no_grad()
    def _observe(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Set the learned scale's first value (None), or move the range: the parameters for x."""
        sync = self.sync_ranks and observe.many_ranks()
        if self.spec.ema is None or self.range is None:
            self._first_value(x, sync)
            return None
        compiling = torch.compiler.is_compiling()
        if not compiling and observe.recomputing():
            if x.numel() == 0:
                return None
            return self._params(self._recent.recall(self.measure(x), self.range))
        local = self.range.clone() if x.numel() == 0 else self.measure(x)
        how = (self.spec.ema, self._union, sync)
        if compiling:
            used = observe.step_op(self.range, local, *how)
            params = self._params(used)
        else:
            params = observe.follow(self.range, local, *how, **self._of_qparams)
            self._recent.remember(local, self.range.clone())
        if not self._settled and (sync or x.numel() > 0):
            self._mark()
        return params

    def _first_value(self, x: Tensor, sync: bool) -> None:
        # in a compiled step `_settled` is as it was at the time of compiling: the buffer decides
        if self._settled or (not torch.compiler.is_compiling() and observe.recomputing()):
            return
        seen = x.numel() > 0
        # with other ranks this one keeps step, whatever it saw
        if not (seen or sync):
            return
        measured = self.measure(x)
        if sync and self._union:
            measured = observe.widest(measured)
        elif sync:
            measured = observe.average(measured, seen)
        self._write(measured, self.initialized)

    def _write(self, measured: Tensor, unless: Tensor | None) -> None:
        """Set the state; where `unless` is set, or the value not finite, it stays as it is (so a
        first batch with NaN leaves a learned scale at 1)."""
        keep = ~measured.isfinite().all(0)
        if unless is not None:
            keep = keep | unless.bool()
        self._set(keep, measured)
        self._mark()

    def _set(self, keep: Tensor, measured: Tensor) -> None:
        if self.range is not None:
            self.range.copy_(torch.where(keep, self.range, measured))
        elif self.scale is not None:
            self.scale.copy_(torch.where(keep, self.scale, measured[0]))
            _, zero_point = qparams(measured[1:], **self._of_qparams)
            if self.offset is not None:
                self.offset.copy_(torch.where(keep, self.offset, -zero_point * measured[0]))
            elif self.zero_point is not None:
                self.zero_point.copy_(torch.where(keep, self.zero_point, zero_point))

    def _mark(self) -> None:
        assert self.initialized is not None, "only a quantizer with state is marked"
        self.initialized.fill_(1)
        # an attribute set in a compiled step would compile it anew, and fail inside a checkpoint
        if not torch.compiler.is_compiling():
            self._settled = True

    def _require_value(self) -> None:
        """Raise if there is no range yet. Waits for the device once, then remembers."""
        flag = self.initialized
        if self._settled or flag is None or torch.compiler.is_compiling() or flag.is_meta:
            return
        if flag.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if not bool(flag):
            raise RuntimeError(
                f"{self._name}: range must be set by calibrate() or a training step before it is "
                "used, got no observation"
            )
        self._settled = True

    @property
    def _name(self) -> str:
        return f"FakeQuantize {self.label!r}" if self.label else "FakeQuantize"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantize:
        """`to`, `half`, `cuda` and the like; state is never narrowed below fp32."""

        def wide(t: Tensor) -> Tensor:
            out = fn(t)
            if out.dtype in NARROW:
                return t.to(out.device, torch.float32)
            return out

        # what forwards before a move used is on the old device
        self._recent = observe.Recent()
        return super()._apply(wide, recurse)

    def entries(self, prefix: str, state_dict: dict[str, Any]) -> list[str]:
        """The keys of a state_dict that are this module's, prefix being its name and a dot."""
        own = (prefix + name for name in (*self._parameters, *self._buffers))
        return [key for key in own if key in state_dict]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """A checkpoint without this module's entries (a float one) is none of its business."""
        if self.entries(prefix, state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
            self._settled = False

    def extra_repr(self) -> str:
        spec = self.spec
        kind = "learned scale" if spec.learned else "dynamic"
        if spec.learned_zero_point:
            kind += " and zero point"
        if spec.ema is not None:
            kind = f"running range, ema={spec.ema}"
        where = "per tensor" if spec.axis is None else f"axis={spec.axis}"
        if spec.group_size is not None:
            where = f"group_size={spec.group_size}"
        parts = [f"{spec.bits} bits", "symmetric" if spec.symmetric else "affine", where]
        parts += [spec.method, kind]
        if not self.fake_quant_enabled:
            parts.append("off")
        return ", ".join(parts)
