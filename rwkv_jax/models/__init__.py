"""Models: parameters and names around `ops`, one file for each kind of layer.

`block.py` defines a kind of layer, `kinds.py` lists them, and `lm.py` builds a language model from them.
"""

from rwkv_jax.models.kinds import KINDS, kind_of
from rwkv_jax.models.lm import LM, build, parameter_shapes, per_layer, stack, stacked_name, unstack

__all__ = ["KINDS", "LM", "build", "kind_of", "parameter_shapes", "per_layer", "stack", "stacked_name", "unstack"]
