"""Every layer of flash-linear-attention as a mixer named ``fla:<layer>``, as that library builds it."""

from mixers.fla_layers.layer import PREFIX, FlaLayer, layer_class
from mixers.fla_layers.listing import describe_layer, layer_names

__all__ = ["PREFIX", "FlaLayer", "describe_layer", "layer_class", "layer_names"]
