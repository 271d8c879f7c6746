"""Fast-weight product-key memory (Zhao & Jones 2026, arXiv:2601.00671): the operation and the layer."""

from mixers.fwpkm.functional import FastWeightOutput, fast_weight_pkm
from mixers.fwpkm.layer import FastWeightPKM, FastWeightPKMConfig, FastWeightState

__all__ = ["FastWeightOutput", "FastWeightPKM", "FastWeightPKMConfig", "FastWeightState", "fast_weight_pkm"]
