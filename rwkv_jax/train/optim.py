"""The released recipe: Adam with learning rates by parameter group, its schedules, and the loss."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rwkv_jax.models import KINDS, kind_of, stacked_name

LOGITS = 2**27  # elements of the logits that exist at one time: 512 MiB of float32


def released_groups() -> tuple:
    """Learning-rate multipliers of the released trainers, (regex over the parameter path, factor), of all kinds of
    layers: the first match wins, anything else has 1."""
    return tuple(rule for kind in KINDS.values() for rule in kind.groups)


def optimiser(
    betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, clip=1.0, groups: Sequence | None = None
) -> optax.GradientTransformation:
    """Descent direction per unit of learning rate: the step applies `params - lr * direction`.

    The learning rate stays outside, an input of the step, so that no schedule is compiled into the program. Decay is
    decoupled (AdamW) and for matrices only: `Kind.decayed`, the embedding, the head and LoRA's. Factor 0 freezes a
    group: it is not moved, not even by decay, and has no moments unless other layers of its leaf have.
    Parameters and gradients may have any dtype: moments and direction are float32 at least. `groups` None: the
    `released_groups`.
    """
    groups = released_groups() if groups is None else groups
    decayed = re.compile("|".join((r"^emb/", r"/lora_[ab]$", *(kind.decayed for kind in KINDS.values()))))
    matrices = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, x: bool(decayed.search(_name(path))), params
    )
    by_group = optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, factors(updates, groups)))
    adam = optax.scale_by_adam(*betas, eps=eps)
    if any(factor == 0 for _, factor in groups):
        adam = optax.masked(adam, lambda params: jax.tree.map(lambda f: bool(np.any(f)), factors(params, groups)))
    chain = optax.chain(
        clipped(clip) if clip else optax.identity(),
        adam,
        optax.add_decayed_weights(weight_decay, mask=matrices) if weight_decay else optax.identity(),
        by_group,
    )
    return optax.GradientTransformation(
        lambda params: chain.init(wide(params)),
        lambda updates, state, params=None: chain.update(wide(updates), state, wide(params)),
    )


def clipped(largest: float) -> optax.GradientTransformation:
    """Gradients times min(1, largest / (norm + 1e-6)), with their global norm.

    The released trainers' clip (torch, DeepSpeed). Without the 1e-6, as optax has it, 150 steps of RWKV-6 end 4e-4
    nats from theirs in float64, not 1e-11: Adam's epsilon does not scale with the gradient.
    """

    def clip(updates, params=None):
        factor = jnp.minimum(1, largest / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda x: x * factor, updates)

    return optax.stateless(clip)


def wide(tree):
    """Floating-point leaves as float32 at least."""
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)) if floating(x) else x, tree)


def factors(params, groups: Sequence):
    """Learning-rate factor of each leaf: a number, or an array [L, 1, ...] where layers of a stacked leaf differ.

    The first rule wins whose regular expression matches the path of all layers, such as "blocks/att/key/kernel",
    or that of one, "blocks.3/att/key/kernel", stacked or not; "blocks.0-11/" is a range of layers. (A hybrid's
    stacked leaves have a layer for each repeating unit: "blocks.3/block_0/...".)
    """
    rules = [(re.compile(_spelled_out(pattern)), factor) for pattern, factor in groups]

    apart = _units_apart(params)

    def factor_of(path, x):
        first = lambda names: next((f for rule, f in rules if any(map(rule.search, names))), 1.0)
        each = list(map(first, _names(path, x, apart)))
        if len(set(each)) == 1:
            return each[0]
        return np.reshape(np.array(each, np.float32), (-1, *[1] * (x.ndim - 1)))

    return jax.tree_util.tree_map_with_path(factor_of, params)


def check_groups(params, groups: Sequence) -> None:
    """Raise ValueError if a rule matches nothing, except released ones, which are for all kinds of layers."""
    apart = _units_apart(params)
    leaves = [_names(path, x, apart) for path, x in jax.tree_util.tree_leaves_with_path(params)]
    names = [name for layers in leaves for layer in layers for name in layer]
    for pattern, _ in (rule for rule in groups if rule not in released_groups()):
        if not any(re.search(_spelled_out(pattern), name) for name in names):
            raise ValueError(f"optim.groups: {pattern!r} matches none of {', '.join(sorted(n[0][0] for n in leaves))}")


def frozen_stopped(params, groups: Sequence):
    """Parameters with `stop_gradient` where the factor is 0, so that no gradient is computed."""

    def stopped(x, factor):
        if np.all(factor):
            return x
        return jnp.where(factor == 0, jax.lax.stop_gradient(x), x) if np.any(factor) else jax.lax.stop_gradient(x)

    return jax.tree.map(stopped, params, factors(params, groups))


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _units_apart(params) -> int:
    """Number of repeating units before the stacked ones: see `LM.layers_apart`."""
    if "blocks" not in params:
        return 0
    period = sum(name.startswith("block_") for name in params["blocks"]) or 1
    return sum(name.startswith("blocks_") for name in params) // period


def _names(path, x, apart: int) -> list[tuple[str, ...]]:
    """Names that a rule may match for each layer of a leaf, its path first; stacked layers follow those apart."""
    name = _name(path)
    first, _, rest = name.partition("/")
    if first == "blocks":
        return [(name, f"blocks.{apart + i}/{rest}") for i in range(x.shape[0])]
    return [(name, name.replace("_", ".", 1), stacked_name(name)) if first.startswith("blocks_") else (name,)]


def _spelled_out(pattern: str) -> str:
    """A pattern with ranges such as "blocks.2-4/" expanded to a regular expression."""

    def layers(found):
        return f"{found[1]}(?:{'|'.join(map(str, range(int(found[2]), int(found[3]) + 1)))})"

    return re.sub(r"(blocks\\?\.)(\d+)-(\d+)(?=/)", layers, pattern)


def schedule(
    kind: str, lr: float, lr_end: float, steps: int, warmup: int = 0, decay_start: int | None = None
) -> Callable[[int], float]:
    """Learning rate of a step in [0, steps), after a linear warm-up.

    "exponential": constant, then from step `decay_start` on (None: from the end of the warm-up) lr * (lr_end /
    lr)^progress, which reaches lr_end in the last step (appendix G). Before its decay such a run is a trunk, from
    which runs of other lengths can branch off where their own decay starts. "cosine": half a cosine from lr to lr_end.
    "constant".
    """
    if kind not in ("exponential", "cosine", "constant"):
        raise ValueError(f"schedule is {kind!r}, expected exponential, cosine or constant")
    if not 0 < lr_end <= lr:
        raise ValueError(f"lr is {lr} and lr_end {lr_end}, expected 0 < lr_end <= lr")
    start = warmup if kind == "cosine" or decay_start is None else decay_start

    def at(step: int) -> float:
        progress = min(max((step - start + 1) / max(steps - start, 1), 0.0), 1.0)
        if kind == "exponential":
            value = lr * (lr_end / lr) ** progress
        elif kind == "cosine":
            value = lr_end + (lr - lr_end) * 0.5 * (1 + math.cos(math.pi * progress))
        else:
            value = lr
        return value * min(1.0, (step + 1) / max(warmup, 1))

    return at


def default_lr(kind: str, dim: int) -> float:
    """Learning rate for a width, by log-log interpolation in the kind's table; its only rate, if it has one."""
    table = kind_of(kind).learning_rates
    if len(table) == 1:
        return table[0][1]
    dim = min(max(dim, table[0][0]), table[-1][0])
    (d1, lr1), (d2, lr2) = next((a, b) for a, b in itertools.pairwise(table) if dim <= b[0])
    share = math.log(dim / d1) / math.log(d2 / d1)
    return lr1 * (lr2 / lr1) ** share


def cross_entropy(logits_BTV, targets_BT):
    """Negative log-likelihood of each target in nats, float32 at least."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)


def l2wrap(logits_BTV):
    """0.5e-4 * max_logit^2 of each token: its mean in the loss has the gradient of the released `L2Wrap`,
    1e-4 / (B T) * max_logit on each token's largest logit. It belongs to the objective, not to the reported loss."""
    return 0.5e-4 * jnp.square(logits_BTV.max(axis=-1))


def losses_of_head(head, params, x_BTD, targets_BT, mask_BT, *, chunk: int | None = None, penalised: bool = True):
    """(objective, nll): sums of `cross_entropy` + `l2wrap`, and of `cross_entropy`, over the tokens masked in.

    Logits exist for `chunk` tokens at a time, never for all [B, T, V], 6.6 GB at V 50,277 for 32 windows of 1,024.
    They are computed once: a chunk's gradient is taken while its logits exist, not recomputed in the backward pass.
    Only gradients of the objective are defined.

    Args:
        head: `head(params, x_ND)` gives logits [N, V].
        params: of the head, rounded to the dtype of x if wider. Their gradient is summed over chunks in float32.
        x_BTD: activations after the final norm, of the rows of one device: sharded rows cannot be chunked.
        chunk: tokens, 1 or more; None: a power-of-two share of them, of at most `LOGITS` logits.
        penalised: False: the objective has no `l2wrap`.
    """
    N = targets_BT.size
    if chunk is None:
        wanted = -(-jax.eval_shape(head, params, x_BTD.reshape(N, -1)).size // LOGITS)
        chunks = 1 << (wanted - 1).bit_length()
    else:
        chunks = -(-N // chunk)
    size = -(-N // chunks)

    def split(x):
        x = x.reshape(N, *x.shape[2:])
        return jnp.pad(x, ((0, chunks * size - N), *[(0, 0)] * (x.ndim - 1))).reshape(chunks, size, *x.shape[1:])

    def losses(params, x_ND, targets_N, mask_N):
        logits_NV = head(params, x_ND)
        nll_N = cross_entropy(logits_NV, targets_N)
        objective_N = nll_N + l2wrap(logits_NV) if penalised else nll_N
        return jnp.where(mask_N, objective_N, 0).sum(), jnp.where(mask_N, nll_N, 0).sum()

    return _summed(losses, params, *map(split, (x_BTD, targets_BT, mask_BT)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(losses, params, x_CND, targets_CN, mask_CN):
    """Sums of `losses` over chunks."""
    params = _narrow(params, x_CND.dtype)
    by_chunk = jax.lax.map(lambda chunk: losses(params, *chunk), (x_CND, targets_CN, mask_CN))
    return jax.tree.map(jnp.sum, by_chunk)


def _summed_forward(losses, params, x_CND, targets_CN, mask_CN):
    narrow = _narrow(params, x_CND.dtype)
    gradient = jax.value_and_grad(losses, argnums=(0, 1), has_aux=True)

    def add(total, chunk):
        sums, (dparams, dx_ND) = gradient(narrow, *chunk)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, (sums, dparams)), dx_ND

    sums = jax.eval_shape(losses, narrow, *(x[0] for x in (x_CND, targets_CN, mask_CN)))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (sums, jax.eval_shape(wide, params)))
    (sums, dparams), dx_CND = jax.lax.scan(add, zeros, (x_CND, targets_CN, mask_CN))
    return sums, (dparams, dx_CND, params)


def _summed_backward(losses, saved, cotangents):
    dparams, dx_CND, params = saved
    scale = cotangents[0]
    dparams = jax.tree.map(lambda x, like: (scale * x).astype(like.dtype), dparams, params)
    return dparams, (scale * dx_CND).astype(dx_CND.dtype), None, None


_summed.defvjp(_summed_forward, _summed_backward)


def _narrow(params, dtype):
    """`params` rounded to `dtype` if wider, once for all chunks."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.finfo(dtype).bits < jnp.finfo(x.dtype).bits else x, params)
