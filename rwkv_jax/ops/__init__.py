"""The recurrences: pure functions of arrays."""

from rwkv_jax.ops.wkv4 import wkv4
from rwkv_jax.ops.wkv4_algebra import WKV4State
from rwkv_jax.ops.wkv6 import wkv6
from rwkv_jax.ops.wkv7 import wkv7

__all__ = ["WKV4State", "wkv4", "wkv6", "wkv7"]
