"""The recurrences: pure functions of arrays."""

from rwkv_jax.ops.wkv4 import WKV4State, wkv4

__all__ = ["WKV4State", "wkv4"]
