"""Every layer of flash-linear-attention as a mixer named ``fla:<layer>``, as that library builds it."""

from mixers.fla_layers.layer import PREFIX, FlaLayer, layer_class
from mixers.fla_layers.listing import CONTINUES, describe_layer, layer_names

__all__ = ["CONTINUES", "PREFIX", "FlaLayer", "describe_layer", "layer_class", "layer_names"]
