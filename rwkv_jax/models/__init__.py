"""Models: parameters and names around `ops`, one file per version."""

from rwkv_jax.models.lm import LM, SIZES, build, per_layer, stack, unstack, upgraded, variations

__all__ = ["LM", "SIZES", "build", "per_layer", "stack", "unstack", "upgraded", "variations"]
