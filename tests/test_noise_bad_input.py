"""Bad input of the noise ops and error_stats: the error names op, argument, rule and value, and
nothing is written."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from compare import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from test_philox import backend_of
from torch import Tensor

import qkernels
from qkernels import numeric
from qkernels.ops.error_stats import stats_call, update_error_stats

LAST = numeric.LARGEST_SEED
INF, NAN = float("inf"), float("nan")

# arguments that are right for an x of four rows
GOOD: dict[str, dict[str, Any]] = {
    "differential_noise": dict(stats=(torch.zeros(4), torch.ones(4)), prev_stats=None, axis=0),
    "drop_in_noise": dict(stats=(torch.zeros(4), torch.ones(4)), p=0.5, axis=0),
    "uniform_noise": dict(scale=torch.ones(4), p=0.5, axis=0),
}
op_of = pytest.mark.parametrize("op", GOOD)
stats_op = pytest.mark.parametrize("op", ("differential_noise", "drop_in_noise"))
p_op = pytest.mark.parametrize("op", ("drop_in_noise", "uniform_noise"))


def tensor() -> Tensor:
    return torch.arange(24.0).reshape(4, 6)


def call(op: str, x: object = None, **kwargs: Any) -> Tensor:
    args = GOOD[op] | dict(seed=1, step=2) | kwargs
    return getattr(qkernels, op)(tensor() if x is None else x, **args)


def refused(kind: type[Exception], text: str, op: str, **kwargs: Any) -> None:
    """The call fails with this text after "<op>: ", out of place and in place, where x keeps its
    values and its version."""
    with pytest.raises(kind, match=rf"^{op}: {text}"):
        call(op, **kwargs)
    x = tensor()
    with pytest.raises(kind, match=rf"^{op}: {text}"):
        call(op, x, inplace=True, **kwargs)
    assert_same(x, tensor())
    assert x._version == 0


@op_of
@pytest.mark.parametrize("name", ("seed", "step"))
def test_seed_and_step(op: str, name: str) -> None:
    for bad in (-1, LAST + 1, 2**64, -(2**63)):
        refused(ValueError, rf"{name} must be in 0..{LAST}, got {bad}$", op, **{name: bad})
    for bad in (1.0, True, None, "1", (1,)):
        text = rf"{name} must be an int or a 0-dim int64 tensor, got {re.escape(repr(bad))}$"
        refused(TypeError, text, op, **{name: bad})
    for bad in (torch.tensor([1]), torch.tensor(1, dtype=torch.int32), torch.tensor(1.0)):
        shape = re.escape(str(tuple(bad.shape)))
        text = rf"{name} must be an int or a 0-dim int64 tensor, got {bad.dtype} of shape {shape}$"
        refused(TypeError, text, op, **{name: bad})
    meta = torch.tensor(1, device="meta")
    refused(ValueError, rf"{name} must be on cpu like x, got meta$", op, **{name: meta})


@op_of
def test_a_tensor_as_seed_is_taken_modulo_2_63(op: str) -> None:
    """The kernel reads it where no error can be raised."""
    assert_same(call(op, seed=torch.tensor(-1)), call(op, seed=LAST))
    assert_same(call(op, step=torch.tensor(-(2**63) + 5)), call(op, step=5))


@op_of
def test_offset(op: str) -> None:
    for bad in (-1, LAST - 23, 2**64):
        refused(ValueError, rf"offset must be in 0..{LAST - 24}, got {bad}$", op, offset=bad)
    for bad in (1.0, True, None, torch.tensor(1)):
        refused(TypeError, rf"offset must be an int, got {re.escape(repr(bad))}$", op, offset=bad)
    assert call(op, offset=LAST - 24).isfinite().all()


@p_op
def test_probability(op: str) -> None:
    for bad in (-0.1, 1.5, 2, -1):
        refused(ValueError, rf"p must be in \[0, 1\], got {bad}$", op, p=bad)
    for bad in (NAN, INF, -INF):
        refused(ValueError, rf"p must be finite, got {bad}$", op, p=bad)
    for bad in ("0.5", None, True, torch.tensor(0.5)):
        refused(TypeError, rf"p must be a number, got {re.escape(repr(bad))}$", op, p=bad)


@stats_op
def test_ramp(op: str) -> None:
    for bad in (NAN, INF, -INF):
        refused(ValueError, rf"ramp must be finite, got {bad}$", op, ramp=bad)
    for bad in ("1", None, False, torch.tensor(1.0)):
        refused(TypeError, rf"ramp must be a number, got {re.escape(repr(bad))}$", op, ramp=bad)


def with_bad(
    op: str, name: str, value: object, mean: object = None, std: object = None
) -> dict[str, Any]:
    """The arguments of op with one mean, std or scale replaced; the other of its pair is good."""
    if name == "scale":
        return dict(scale=value)
    mean = torch.zeros(4) if mean is None else mean
    std = torch.ones(4) if std is None else std
    pair = (value, std) if name.endswith("mean") else (mean, value)
    return {"prev_stats" if name.startswith("prev") else "stats": pair}


PARAMS = [
    ("differential_noise", "mean"),
    ("differential_noise", "std"),
    ("differential_noise", "prev_mean"),
    ("differential_noise", "prev_std"),
    ("drop_in_noise", "mean"),
    ("drop_in_noise", "std"),
    ("uniform_noise", "scale"),
]
param_of = pytest.mark.parametrize(("op", "name"), PARAMS)


@param_of
def test_tensors_of_the_wrong_size_device_or_dtype(op: str, name: str) -> None:
    def bad(kind: type[Exception], text: str, value: object) -> None:
        refused(kind, f"{name} must be {text}", op, **with_bad(op, name, value))

    for value in (torch.ones(5), torch.ones(3), torch.ones(()), torch.ones(4, 1), torch.ones(0)):
        bad(
            ValueError,
            rf"1-D with 4 entries, got shape {re.escape(str(tuple(value.shape)))}$",
            value,
        )
    bad(ValueError, r"on cpu like x, got meta$", torch.ones(4, device="meta"))
    bad(TypeError, r"torch.float32 for torch.float32 x, got torch.float64$", torch.ones(4).double())
    for dtype in (torch.int32, torch.bool, torch.complex64):
        bad(TypeError, rf"a floating tensor, got {dtype}$", torch.ones(4, dtype=dtype))
    for value, kind in (("1", "str"), (None, "NoneType"), (True, "bool"), ([1.0] * 4, "list")):
        bad(TypeError, rf"a Tensor or a number, got {kind}$", value)


@param_of
def test_one_entry_where_there_are_no_channels(op: str, name: str) -> None:
    for value in (torch.ones(4), torch.ones(1, 1), torch.ones(0)):
        args = dict(axis=None) if op == "uniform_noise" else dict(axis=None, stats=(0.0, 1.0))
        args |= with_bad(op, name, value, 0.0, 1.0)
        refused(ValueError, rf"{name} must be 0-dim \(or one entry\), got shape", op, **args)


@backend_of
@param_of
def test_values_are_checked_on_the_cpu(backend: str, op: str, name: str) -> None:
    rule = "finite" if name.endswith("mean") else "finite and at least 0"
    shown = "(prev_)?" + name.removeprefix("prev_")
    for bad in (NAN, INF, -INF) if rule == "finite" else (-0.5, NAN, INF, -INF):
        text = rf"{shown} must be {rule}, got {bad} at channel 2$"
        value = torch.tensor([1.0, 1.0, bad, bad])
        refused(ValueError, text, op, backend=backend, **with_bad(op, name, value))
        text = rf"{shown} must be {rule}, got {bad} at channel 0$"
        refused(ValueError, text, op, backend=backend, **with_bad(op, name, bad))
    assert call(op, backend=backend, **with_bad(op, name, -torch.zeros(4))).isfinite().all()


@backend_of
@op_of
def test_nothing_is_written_where_autograd_watches(backend: str, op: str) -> None:
    leaf = tensor().requires_grad_()
    x = leaf * 1
    name = "scale" if op == "uniform_noise" else "std"
    with pytest.raises(ValueError, match=rf"^{op}: {name} must be finite and at least 0, got -1.0"):
        call(op, x, inplace=True, backend=backend, **with_bad(op, name, -torch.ones(4)))
    assert_same(x.detach(), tensor())
    with pytest.raises(ValueError, match=rf"^{op}: seed must be in"):
        call(op, x, inplace=True, backend=backend, seed=-1)
    assert_same(x.detach(), tensor())


@stats_op
def test_statistics_of_the_wrong_kind(op: str) -> None:
    names = ("stats", "prev_stats") if op == "differential_noise" else ("stats",)
    for name in names:
        text = rf"{name} must be an ErrorStats or a pair \(mean, std\), got "
        for bad, kind in (
            ((0.0, 1.0, 2.0), "tuple of 3"),
            ([1.0], "list of 1"),
            (0.1, "float"),
            (torch.ones(2), "Tensor"),
            ({"mean": 0.0, "std": 1.0}, "dict"),
        ):
            refused(TypeError, rf"{text}{kind}$", op, **{name: bad})
    refused(TypeError, r"stats must be .*got NoneType$", op, stats=None)


@op_of
def test_x_and_granularity(op: str) -> None:
    for dtype in (torch.int32, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=rf"^{op}: x must be float32, .*got {dtype}$"):
            call(op, torch.ones(4, 6).to(dtype))
    with pytest.raises(TypeError, match=rf"^{op}: x must be a Tensor, got list$"):
        call(op, [1.0])
    with pytest.raises(TypeError, match=rf"^{op}: x must be a dense .*got torch.sparse_coo$"):
        call(op, tensor().to_sparse())
    refused(ValueError, r"axis must be in -2..1, got 2$", op, axis=2)
    refused(TypeError, r"axis must be an int or None, got 0.0$", op, axis=0.0)
    refused(ValueError, r"group_size must be None when axis is given, got 2$", op, group_size=2)
    refused(ValueError, r"group_size must be a divisor of 6 .*got 4$", op, axis=None, group_size=4)
    with pytest.raises(ValueError, match=rf"^{op}: axis must be None for a 0-dim x, got 0$"):
        call(op, torch.ones(()))
    refused(ValueError, r"backend must be one of auto, native, .*got 'fast'$", op, backend="fast")


def test_the_axis_of_differential_noise_is_0_unless_given() -> None:
    args = dict(seed=1, step=2)
    law = (torch.zeros(4), torch.arange(4.0))
    want = qkernels.differential_noise(tensor(), law, axis=0, **args)
    assert_same(qkernels.differential_noise(tensor(), law, **args), want)
    with pytest.raises(ValueError, match=r"^drop_in_noise: mean must be 0-dim"):
        qkernels.drop_in_noise(tensor(), law, p=0.5, **args)


def test_raw_ops_check_too() -> None:
    """torch.ops reaches the kernels past the public functions: bad sizes must not reach memory."""
    ops, x, four = torch.ops.qkernels, tensor(), torch.ones(4)
    counter = (1, 2, None, None)
    with pytest.raises(ValueError, match="differential_noise: std must be 1-D with 4 entries"):
        ops.differential_noise(x, four, torch.ones(3), None, None, *counter, 1.0, 0, 0, None)
    with pytest.raises(ValueError, match="prev_mean and prev_std must be given together, got one"):
        ops.differential_noise(x, four, four, four, None, *counter, 1.0, 0, 0, None)
    with pytest.raises(ValueError, match=r"drop_in_noise: p must be in \[0, 1\], got 2.0"):
        ops.drop_in_noise(x, four, four, 2.0, *counter, 1.0, 0, 0, None)
    with pytest.raises(ValueError, match=r"uniform_noise: seed must be in 0..\d+, got -1"):
        ops.uniform_noise(x, four, 1.0, -1, 2, None, None, 0, 0, None)
    with pytest.raises(TypeError, match=r"uniform_noise: step must be .*got torch.int32"):
        at = torch.tensor(1, dtype=torch.int32)
        ops.uniform_noise(x, four, 1.0, 1, 2, None, at, 0, 0, None)
    with pytest.raises(ValueError, match=r"error_stats: scale must be 1-D with 4 entries"):
        ops.error_stats(x, torch.ones(3), None, 0, 15, 0, None, "code")
    with pytest.raises(ValueError, match=r"error_stats: axis must be in 0..1, got 5"):
        ops.error_stats_dynamic(x, 0, 15, 5, None, False, "minmax", 99.0, "code")


def test_error_stats() -> None:
    def bad(kind: type[Exception], text: str, *args: object, **kwargs: Any) -> None:
        with pytest.raises(kind, match=rf"^error_stats: {text}"):
            qkernels.error_stats(tensor(), *args, **{"bits": 4, **kwargs})

    bad(ValueError, r"bits must be in 1..16, got 0$", bits=0)
    bad(TypeError, r"bits must be an int in 1..16, got 4.0$", bits=4.0)
    bad(ValueError, r"zero_point must be None when scale is None, got a value$", None, 3)
    bad(ValueError, r"scale must be 1-D with 4 entries, got shape \(3,\)$", torch.ones(3), axis=0)
    bad(ValueError, r"scale must be on cpu like x, got meta$", torch.ones((), device="meta"))
    bad(TypeError, r"scale must be .*got torch.float64$", torch.ones(()).double())
    bad(ValueError, r"scale must be positive, .*got -1.0 at channel 0$", -1.0)
    bad(ValueError, r"method must be one of minmax, .*got 'best'$", method="best")
    bad(ValueError, r"clip must be one of code, value, got 'hard'$", clip="hard")
    bad(
        ValueError,
        r"percentile must be in \(50, 100\], got 40.0$",
        method="percentile",
        percentile=40,
    )
    bad(ValueError, r"axis must be in -2..1, got 2$", axis=2)
    bad(ValueError, r"backend must be one of auto, .*got 'fast'$", backend="fast")
    with pytest.raises(TypeError, match=r"^error_stats: x must be float32, .*got torch.int64$"):
        qkernels.error_stats(torch.ones(3, dtype=torch.int64), bits=4)


@backend_of
def test_averages_of_the_wrong_kind(backend: str) -> None:
    op, args = stats_call(tensor(), 1.0, bits=4)

    def bad(kind: type[Exception], text: str, ema: Tensor, *args: object) -> None:
        before = ema if ema.is_meta else ema.clone()
        with pytest.raises(kind, match=rf"^error_stats: {text}"):
            update_error_stats(ema, 0.9, backend, op, *args)
        assert ema.is_meta or torch.equal(ema, before)

    bad(
        TypeError,
        "ema must be torch.float32 for .*got torch.float64$",
        torch.zeros(5, 1).double(),
        *args,
    )
    for shape in ((4, 1), (5,), (5, 4), (1, 5)):
        text = rf"ema must be contiguous of shape \(5, 1\), got {re.escape(str(shape))}$"
        bad(ValueError, text, torch.zeros(shape), *args)
    bad(ValueError, r"ema must be contiguous of shape", torch.zeros(5, 2)[:, :1], *args)
    bad(
        ValueError, r"ema must be on cpu like x, got meta$", torch.zeros(5, 1, device="meta"), *args
    )
    # an invalid scale is found before the average moves
    wrong = (args[0], -args[1], *args[2:])
    bad(ValueError, r"scale must be positive", torch.zeros(5, 1), *wrong)


numbers = st.one_of(st.none(), st.integers(-2, 3), st.floats(-1, 2), st.just(NAN))


@settings(max_examples=150, deadline=None)
@given(
    op=st.sampled_from(sorted(GOOD)),
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=4),
    axis=st.one_of(st.none(), st.integers(-5, 5)),
    group_size=st.one_of(st.none(), st.integers(-1, 9)),
    seed=st.one_of(st.none(), st.integers(-1, LAST + 1)),
    step=st.integers(-1, LAST + 1),
    offset=st.integers(-1, LAST + 1),
    p=numbers,
    std=numbers,
    permute=st.randoms(use_true_random=False),
    inplace=st.booleans(),
)
def test_any_arguments_give_a_result_or_a_clear_error(
    op: str,
    shape: list[int],
    axis: int | None,
    group_size: int | None,
    seed: int | None,
    step: int,
    offset: int,
    p: float | None,
    std: float | None,
    permute: object,
    inplace: bool,
) -> None:
    order = list(range(len(shape)))
    permute.shuffle(order)
    x = torch.linspace(-2, 3, torch.Size(shape).numel()).reshape(shape).permute(order)
    before = x.clone()
    args: dict[str, Any] = dict(axis=axis, group_size=group_size, seed=seed, step=step)
    args |= dict(offset=offset)
    args |= dict(scale=std) if op == "uniform_noise" else dict(stats=(0.5, std))
    if op != "differential_noise":
        args |= dict(p=p)
    try:
        y = getattr(qkernels, op)(x, inplace=inplace, **args)
    except (ValueError, TypeError) as error:
        assert str(error).startswith(f"{op}: ") and ", got " in str(error)
        assert_same(x, before)
        return
    assert y.shape == x.shape and (y is x) == inplace and not y.isnan().any()
    assert_same(y, getattr(qkernels, op)(before, backend="reference", **args))
