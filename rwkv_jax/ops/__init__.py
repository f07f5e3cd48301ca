"""The recurrences: pure functions of arrays."""

from rwkv_jax.ops.wkv4 import wkv4
from rwkv_jax.ops.wkv4_algebra import WKV4State

__all__ = ["WKV4State", "wkv4"]
