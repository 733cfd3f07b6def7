"""Graph hypernetworks (GHN): a network that predicts the weights of networks it has not seen.

``space`` draws the networks to learn from, ``graph`` turns any network into the graph of its
operations, ``model`` is the GHN itself, ``checkpoint`` its files. GHN-2 is Knyazev et al. 2021
(arXiv 2110.13100), GHN-3 Knyazev et al. 2023 (2303.04143), their quantization-aware kin GHN-Q and
GHN-QAT Yun and Wong (2208.12489, 2309.13773).

For a model of one's own: `predict` and `predicted_model`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .prediction import predict, predicted_model

__all__ = ["predict", "predicted_model"]


def __getattr__(name: str) -> Any:
    # imported when asked for: the parts of the package are not to wait for one another
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.prediction"), name)
