"""Parts that the blocks of several kinds share."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

# The released models' norm. linen's defaults (epsilon 1e-6, fast variance) give other numbers on their weights.
LayerNorm = partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)


def matmul(x, kernel, dimension_numbers, precision=None, preferred_element_type=None):
    """x @ kernel over flattened rows, with the signature that `nn.Dense` expects.

    Two contracted axes in the weight's gradient would make XLA's CPU compiler transpose its operands in memory: a
    channel-mixing layer at D 512 then takes 1.1 to 1.2 times as long.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = _product(rows, kernel, precision, preferred_element_type)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x, kernel, precision, out_dtype):
    return lax.dot_general(x, kernel, (((1,), (0,)), ((), ())), precision, out_dtype)


def _product_forward(x, kernel, precision, out_dtype):
    return _product(x, kernel, precision, out_dtype), (x, kernel)


def _product_backward(precision, out_dtype, saved, dy):
    """Gradients of `_product`. The cotangent of a wider result is rounded to the operands' dtype: float32 products
    took 2.4 times as long as 16-bit ones on an H100 (logits of 1,024 tokens at V 50,277)."""
    x, kernel = saved
    dy = dy.astype(x.dtype)
    dx = lax.dot_general(dy, kernel, (((1,), (1,)), ((), ())), precision)
    return dx, lax.dot_general(x, dy, (((0,), (0,)), ((), ())), precision)


_product.defvjp(_product_forward, _product_backward)


class Linear(nn.Dense):
    """x W; and x W + (x A) B where the parameters hold adapters A, B beside the kernel (`models.lora`)."""

    use_bias: bool = False
    dot_general: Callable = matmul

    @nn.compact
    def __call__(self, x):
        y = super().__call__(x)
        if not self.has_variable("params", "lora_a"):
            return y
        a, b = (self.get_variable("params", name).astype(self.dtype) for name in ("lora_a", "lora_b"))
        low = matmul(x.astype(self.dtype), a, None, self.precision)
        return y + self.dot_general(low, b, None, precision=self.precision)


def orthogonal(scale: float = 1.0, widened: bool = True):
    """Orthogonal kernel [in, out] with gain scale * sqrt(max(1, out / in)) (RWKV-LM, `generate_init_weight`).

    Without `widened` the gain is `scale`, as in channel mixing and the low-rank maps from RWKV-5 on.
    """

    def init(key, shape, dtype=jnp.float32):
        gain = scale * (max(1.0, shape[1] / shape[0]) ** 0.5 if widened else 1)
        return _orthogonal(gain, key, shape, dtype)

    return init


# Jitted, hence traced once for a shape: linen evaluates the shape of every parameter's initialiser in every `apply`.
@partial(jax.jit, static_argnums=(0, 2, 3))
def _orthogonal(gain, key, shape, dtype):
    wide = jnp.promote_types(dtype, jnp.float32)  # its QR decomposition has no 16-bit form
    return nn.initializers.orthogonal(gain)(key, shape, wide).astype(dtype)


# Of the hidden channels in channel mixing or an MLP. GELU is the tanh approximation.
Activation = Literal["relu2", "relu", "gelu"]
ACTIVATIONS = {"relu2": lambda x: jnp.square(nn.relu(x)), "relu": nn.relu, "gelu": nn.gelu}


def embedding_init(scheme: str, scale: float | None):
    """Return an embedding initialiser: one of the three released schemes, or "normal", which they replace.

    `scale` replaces the standard deviation or bound of a scheme; None keeps the one below. The schemes differ in
    the scale of the residual stream after LN0, because the epsilon of LN0, 1e-5, exceeds so small a variance:

    "v4"      orthogonal, entries of standard deviation 1e-4 (RWKV-LM, RWKV-v4): 0.032 after LN0
    "v4neo"   uniform in +-lr_init, 6e-4 for the 169M model (RWKV-LM, RWKV-v4neo): 0.109 after LN0
    "v5"      uniform in +-1e-4 (RWKV-LM, RWKV-v5; the paper's text): 0.018 after LN0
    "normal"  standard deviation 0.02 (GPT-2): 1 after LN0
    """

    def init(key, shape, dtype=jnp.float32):
        if scheme == "v4":
            return _orthogonal((scale or 1e-4) * max(shape) ** 0.5, key, shape, dtype)
        if scheme == "normal":
            return (scale or 0.02) * jax.random.normal(key, shape, dtype)
        bound = scale or {"v4neo": 6e-4, "v5": 1e-4}[scheme]
        wide = jnp.promote_types(dtype, jnp.float32)  # 16-bit parameters start as the float32 ones, rounded
        return jax.random.uniform(key, shape, wide, -bound, bound).astype(dtype)

    return init


def batch_sharded(x_BTD):
    """Constrain the residual stream to batch sharding; a no-op unless the strategy maps "batch" to a mesh axis
    (`parallel.fsdp`), where XLA would otherwise gather the batch instead of the weights."""
    return nn.with_logical_constraint(x_BTD, ("batch", None, None))


def on_own_rows(op):
    """Return `op(shared, rows) -> rows`, run by each device on its own rows where "batch" is mapped to a mesh axis.

    `shared` and `rows` are pytrees, those of rows with leaves [B, ...]. XLA's partitioner cannot split a kernel.
    """
    split = nn.logical_to_mesh_axes(("batch",))
    if split[0] is None:
        return op
    return jax.shard_map(op, in_specs=(type(split)(), split), out_specs=split, check_vma=False)


def token_shift(x_BTD, last_BD, reset_BT=None, valid_BT=None):
    """Activations of the previous token (Eqs. 11-15), and those of the last one to carry into the next call.

    The token before the first is `last_BD`, or zero when that is None or a document starts (`reset_BT`); padding
    (`valid_BT` False) is skipped. The carried value is float32 at least.
    """
    B, T, D = x_BTD.shape
    first_B1D = jnp.zeros((B, 1, D), x_BTD.dtype) if last_BD is None else last_BD[:, None].astype(x_BTD.dtype)
    line_BTD = jnp.concatenate([first_B1D, x_BTD], axis=1)  # entry t is what precedes token t if all are valid
    if valid_BT is None:
        previous_BTD, last_BD = line_BTD[:, :T], line_BTD[:, T]
    else:
        newest_BT = lax.cummax(jnp.where(valid_BT, jnp.arange(1, T + 1)[None], 0), axis=1)
        newest_BT = jnp.pad(newest_BT, ((0, 0), (1, 0)))  # index into the line of the newest valid token before t
        found_BTD = jnp.take_along_axis(line_BTD, newest_BT[..., None], axis=1)
        previous_BTD, last_BD = found_BTD[:, :T], found_BTD[:, T]
    if reset_BT is not None:
        previous_BTD = jnp.where(reset_BT[..., None], 0, previous_BTD)
    return previous_BTD, last_BD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))


def lerp(x_BTD, previous_BTD, mix_D):
    """mix * x_t + (1 - mix) * x_{t-1}."""
    mix_D = mix_D[None, None].astype(x_BTD.dtype)
    return x_BTD * mix_D + previous_BTD * (1 - mix_D)


def depth_ratios(layer, num_layers: int):
    """(l / (L - 1), 1 - l / L): from 0 to 1 and from 1 towards 0 over the depth; one layer counts as the first."""
    return layer / max(num_layers - 1, 1), 1 - layer / num_layers


def mix_ramp(dim: int, power, offset=0.0):
    """A function that returns (i / D)^power + offset, the released shape of `time_mix_*` over the channels."""
    return lambda: (jnp.arange(dim) / dim) ** power + offset


def vector(module: nn.Module, name: str, value: Callable, shape: int | tuple[int, ...], dtype):
    """A parameter whose initial value is a formula, `value()`, traced only at initialisation."""
    shape = (shape,) if isinstance(shape, int) else shape
    if module.has_variable("params", name):
        found = module.get_variable("params", name)
        if found.shape != shape:
            raise ValueError(f"{'/'.join((*module.path, name))} is {found.shape}, expected {shape}")
        return found
    return module.param(name, lambda _: value().astype(dtype))


def absent(module: nn.Module, *names: str):
    """Skip the random keys of parameters that a variant lacks, so that later ones keep their initial values."""
    for _ in names if module.is_initializing() else ():
        module.make_rng("params")


def observe(module: nn.Module, name: str, value):
    """Sow `value()` only where the caller of `apply` collects "intermediates": otherwise nothing is traced."""
    if module.is_mutable_collection("intermediates"):
        module.sow("intermediates", name, value())


def observed(params, sown) -> dict:
    """Diagnostics (`Kind.observe`) of a layer whose decays, if any, are not parameters."""
    return {"k_max": sown["att"]["k_max"], "dead_channels": {"inactive": 1 - sown["ffn"]["active_F"].mean()}}


def dropout(module: nn.Module, x, rate: float):
    """Dropout, only where the caller passed a "dropout" key to `apply`."""
    if rate == 0 or not module.has_rng("dropout"):
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)
