"""Numbers that the `rwkv` package and an independent float64 program agree on, for RWKV-5.2, 6 and 7.

Tensors are drawn by a rule that other programs can repeat: each has the values u_i = ((i * 2654435761 + CRC-32 of its
official name) mod 2^32) / 2^32 - 1/2, i = 1, 2, ... in row-major order, with a scale and an offset by its role.
"""

import re
import zlib

import jax
import numpy as np
import pytest
from small import forward

from rwkv_jax import interop
from rwkv_jax.models import build, parameter_shapes

TOKENS = np.int32([[3, 7, 11, 2, 19, 7, 3, 5]])
# First five logits after the last token, the sum of all |logits|, and the norm of the matrices of both layers.
EXPECTED = {
    "rwkv5": ([1.007854, -1.500570, -2.115161, -2.071763, -2.193294], 38.36179, [1823.53456, 954.95488]),
    "rwkv6": ([0.794522, -1.164027, -1.913541, -1.755888, -1.915799], 31.43998, [1720.55833, 1106.56161]),
    "rwkv7": ([0.520654, -0.815335, -1.977325, -2.449997, -2.470847], 36.93368, [981.77974, 364.53202]),
}


def tensor(name, shape):
    """The tensor of this official name."""
    i = np.arange(1, np.prod(shape) + 1, dtype=np.uint64)
    u = (((i * 2654435761 + zlib.crc32(name.encode())) % 2**32) / 2**32 - 0.5).astype(np.float32).reshape(shape)
    rules = (
        (r"ln\w+\.weight", 1 + u),
        (r"emb\.weight|w0|time_decay", 4 * u),
        (r"\w+\.weight|\w+[12]", 0.3 * u),
        (r"time_mix_\w|time_maa_\w|x_\w", u + 0.5),
        (r"k_[ka]", 1 + u),
    )
    found = next((x for pattern, x in rules if re.search(rf"(^|\.)({pattern})$", name)), u)
    return found.astype(np.float64)  # drawn and scaled in float32


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", EXPECTED)
def test_lm_of_later_versions_has_the_numbers_of_independent_programs(kind):
    shapes = parameter_shapes(build(kind, vocab_size=20, num_layers=2, dim=128))
    empty = interop.to_official(jax.tree.map(lambda x: np.zeros(x.shape), shapes))
    model, params = interop.from_official({name: tensor(name, x.shape) for name, x in empty.items()})
    logits_BTV, state = forward(model, params, TOKENS)
    first, total, norms = EXPECTED[kind]
    np.testing.assert_allclose(logits_BTV[0, -1, :5], first, atol=1e-6)
    np.testing.assert_allclose(np.abs(logits_BTV[0, -1]).sum(), total, atol=1e-5)
    np.testing.assert_allclose([np.linalg.norm(layer.wkv) for layer in state], norms, rtol=1e-6)  # drawn in float32
