"""QuantSpec and QConfig: checks, presets, JSON."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from typing import Any

import pytest

from qkernels.nn import QConfig, QuantSpec

BAD_SPECS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"bits": 0}, ValueError, r"QuantSpec: bits must be in 1\.\.16, got 0"),
    ({"bits": 17}, ValueError, r"bits must be in 1\.\.16, got 17"),
    ({"bits": 4.0}, TypeError, r"bits must be an int in 1\.\.16, got 4\.0"),
    ({"bits": True}, TypeError, "bits must be an int"),
    ({"axis": 1.0}, TypeError, "axis must be an int or None, got 1.0"),
    ({"group_size": "8"}, TypeError, "group_size must be an int or None, got '8'"),
    ({"group_size": 0}, ValueError, "group_size must be at least 1, got 0"),
    ({"axis": 0, "group_size": 8}, ValueError, "group_size must be None when axis is given, got 8"),
    ({"symmetric": 1}, TypeError, "symmetric must be a bool, got 1"),
    ({"learned": "yes"}, TypeError, "learned must be a bool, got 'yes'"),
    ({"bits": 1, "narrow_range": True}, ValueError, "narrow_range must be False for bits=1"),
    ({"method": "median"}, ValueError, "method must be one of minmax, .*, got 'median'"),
    ({"percentile": 99.0}, ValueError, "percentile must be None unless method='percentile'"),
    (
        {"method": "percentile", "percentile": 50.0},
        ValueError,
        r"percentile must be in \(50, 100\]",
    ),
    ({"clip": "soft"}, ValueError, "clip must be one of code, value, got 'soft'"),
    ({"ema": 1.0}, ValueError, r"ema must be in \[0, 1\) or None, got 1\.0"),
    ({"ema": float("nan")}, ValueError, r"ema must be in \[0, 1\) or None, got nan"),
    ({"ema": "0.9"}, TypeError, r"ema must be a number in \[0, 1\) or None, got '0\.9'"),
    ({"ema": 0.9, "learned": True}, ValueError, "ema must be None when learned is True, got 0.9"),
    (
        {"ema": 0.9, "method": "lsq"},
        ValueError,
        "method must be minmax, percentile or mse when ema",
    ),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD_SPECS)
def test_spec_refuses(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        QuantSpec(**{"bits": 4, **options})


BAD_CONFIGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weight": 4}, TypeError, "QConfig: weight must be a QuantSpec or None, got 4"),
    ({"activation": "int8"}, TypeError, "activation must be a QuantSpec or None, got 'int8'"),
    ({"overrides": ["fc"]}, TypeError, r"overrides must be a mapping, got \['fc'\]"),
    ({"overrides": {1: None}}, TypeError, "overrides must have str patterns as keys, got 1"),
    ({"overrides": {"fc": 8}}, TypeError, "overrides must hold a QConfig or None, got 8 for 'fc'"),
    (
        {"overrides": {"fc": QConfig.lsq(2, 2, overrides={"x": None})}},
        ValueError,
        r"overrides must not hold overrides of their own, got \['x'\] for 'fc'",
    ),
    ({"first_last_bits": 0}, ValueError, r"first_last_bits must be in 1\.\.16 or None, got 0"),
    ({"first_last_bits": "8"}, TypeError, "first_last_bits must be an int or None, got '8'"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD_CONFIGS)
def test_config_refuses(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        QConfig(**{"weight": None, "activation": None, **options})


def test_presets_are_what_their_docs_say() -> None:
    minmax = QConfig.minmax(2, 4)
    assert minmax.weight == QuantSpec(2, axis=0, symmetric=True)
    assert minmax.weight.dynamic and minmax.weight.per_channel
    assert minmax.activation == QuantSpec(4, ema=0.9)
    assert not minmax.activation.dynamic
    lsq = QConfig.lsq(3, 5, first_last_bits=None)
    learned = {"method": "lsq", "learned": True, "clip": "value"}
    assert lsq.weight == QuantSpec(3, axis=0, symmetric=True, **learned)
    assert lsq.activation == QuantSpec(5, **learned)
    assert (minmax.first_last_bits, lsq.first_last_bits) == (8, None)
    assert QConfig.minmax(4, None).activation is None
    assert QConfig.lsq(None, 4).weight is None


def test_presets_of_the_other_papers() -> None:
    minmax, lsq = QConfig.minmax(2, 4), QConfig.lsq(2, 4)
    learned = {"method": "mse", "learned": True, "clip": "value"}
    plus = QConfig.lsq_plus(2, 4)
    assert plus.weight == QuantSpec(2, axis=0, symmetric=True, **learned)
    assert plus.activation == QuantSpec(4, learned_zero_point=True, **learned)
    pact = QConfig.pact(2, 4)
    assert pact.weight == minmax.weight
    assert pact.activation == QuantSpec(4, kind="pact", learned=True)
    dorefa = QConfig.dorefa(2, 4)
    assert dorefa.weight == QuantSpec(2, kind="dorefa_weight")
    assert dorefa.activation == QuantSpec(4, kind="dorefa_activation", clip="value")
    assert dorefa.weight.dynamic and not dorefa.activation.dynamic
    noise = QConfig.quant_noise(2, 4)
    assert noise.weight == replace(minmax.weight, kind="quant_noise", p=0.5)
    assert noise.activation == minmax.activation
    drop = QConfig.qdrop(2, 4, p=0.25)
    assert drop.weight == lsq.weight
    assert drop.activation == replace(lsq.activation, kind="qdrop", p=0.25)
    for make in (QConfig.lsq_plus, QConfig.pact, QConfig.dorefa, QConfig.quant_noise):
        assert make(None, 4).weight is None and make(4, None).activation is None
    assert QConfig.qdrop(None, 2, first_last_bits=4).first_last_bits == 4


def test_more_bits_for_the_first_and_last_layer() -> None:
    """Each kind keeps its ways; DoReFa's layers are min-max there, as its paper has them float."""
    for make in (QConfig.lsq_plus, QConfig.pact, QConfig.quant_noise, QConfig.qdrop):
        wide, eight = make(2, 4).widened(), make(8, 8)
        assert (wide.weight, wide.activation) == (eight.weight, eight.activation)
    assert QConfig.dorefa(2, 4).widened() == QConfig.minmax(8, 8)
    narrow = QConfig.dorefa(2, 4, first_last_bits=None)
    assert narrow.widened() == narrow


def test_config_survives_json_and_pickle() -> None:
    config = QConfig(
        QuantSpec(2, group_size=16, symmetric=True, narrow_range=True, method="mse"),
        QuantSpec(4, method="percentile", percentile=99.9, ema=0.99),
        overrides={"stem.*": None, "head": QConfig.lsq(8, None), "*": QConfig.minmax(4, 4)},
        first_last_bits=6,
    )
    again = QConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert list(again.overrides) == ["stem.*", "head", "*"]
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("name", ["lsq_plus", "pact", "dorefa", "quant_noise", "qdrop"])
def test_kinds_survive_json(name: str) -> None:
    config = getattr(QConfig, name)(2, 3)
    assert QConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_from_before_there_were_kinds_is_the_same() -> None:
    """A run directory that holds one can be gone on with."""
    old = {"bits": 4, "axis": 0, "group_size": None, "symmetric": True, "narrow_range": False}
    old |= {"method": "minmax", "percentile": None, "learned": False, "clip": "code", "ema": None}
    assert QuantSpec(4, axis=0, symmetric=True).to_dict() == old
    assert QuantSpec.from_dict(old) == QuantSpec(4, axis=0, symmetric=True)
    new = QuantSpec(4, kind="qdrop", p=0.5).to_dict()
    assert (new["kind"], new["p"]) == ("qdrop", 0.5) and "learned_zero_point" not in new


def test_from_dict_refuses_unknown_keys() -> None:
    with pytest.raises(
        ValueError, match=r"QConfig.from_dict: keys must be of .*, got \['wieght'\]"
    ):
        QConfig.from_dict({"wieght": None, "activation": None})
    with pytest.raises(
        ValueError, match=r"QuantSpec.from_dict: keys must be of .*, got \['nbits'\]"
    ):
        QuantSpec.from_dict({"bits": 4, "nbits": 4})


def test_overrides_are_a_copy() -> None:
    patterns: dict[str, QConfig | None] = {"fc": None}
    config = QConfig.lsq(2, 2, overrides=patterns)
    patterns["conv"] = None
    assert list(config.overrides) == ["fc"]
