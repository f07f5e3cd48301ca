"""The released recipe: Adam with learning rates by parameter group, its schedules, and the loss."""

import itertools
import math
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

LOGITS = 2**26  # elements of the logits that exist at one time: 256 MiB of float32

# Learning-rate multipliers of RWKV-v4neo (`layerwise_lr=1`), as (regex over the parameter path, factor): the first
# match wins, anything else has 1. Its second Pile stage used 5 for both and for time_mix.
GROUPS = ((r"/time_decay$", 2.0), (r"/time_first$", 3.0))


def optimiser(
    betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, clip=1.0, groups: Sequence = GROUPS
) -> optax.GradientTransformation:
    """Descent direction per unit of learning rate: the step applies `params - lr * direction`.

    The learning rate stays outside, an input of the step, so that no schedule is compiled into the program. Decay is
    decoupled (AdamW) and for matrices only, the embedding, the head and LoRA's included. What a group's factor 0
    freezes is not moved, by decay neither, and has no moments unless other layers of its leaf have.
    Parameters and gradients may have any dtype: moments and direction are float32 at least.
    """
    matrices = lambda params: jax.tree_util.tree_map_with_path(
        lambda path, x: bool(re.search(r"(kernel|embedding|lora_[ab])$", _name(path))), params
    )
    by_group = optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, factors(updates, groups)))
    adam = optax.scale_by_adam(*betas, eps=eps)
    if any(factor == 0 for _, factor in groups):
        adam = optax.masked(adam, lambda params: jax.tree.map(lambda f: bool(np.any(f)), factors(params, groups)))
    chain = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        adam,
        optax.add_decayed_weights(weight_decay, mask=matrices) if weight_decay else optax.identity(),
        by_group,
    )
    return optax.GradientTransformation(
        lambda params: chain.init(wide(params)),
        lambda updates, state, params=None: chain.update(wide(updates), state, wide(params)),
    )


def wide(tree):
    """Floating-point leaves as float32 at least."""
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)) if floating(x) else x, tree)


def factors(params, groups: Sequence):
    """Learning-rate factor of each leaf: a number, or an array [L, 1, ...] where layers of a stacked leaf differ.

    The first rule wins whose regular expression is found in a leaf's path, such as "blocks/att/time_decay", or in that
    of a layer of it, "blocks.3/att/time_decay", stacked or not; "blocks.0-11/" means all of these. (A hybrid's stacked
    leaves have a layer for each repeating unit: "blocks.3/block_0/...".)
    """
    rules = [(re.compile(_spelled_out(pattern)), factor) for pattern, factor in groups]

    def factor_of(path, x):
        name, layers = _names(path, x)
        first = lambda *names: next((f for rule, f in rules if any(map(rule.search, names))), 1.0)
        each = [first(name, layer) for layer in layers] or [first(name)]
        if len(set(each)) == 1:
            return each[0]
        return np.reshape(np.array(each, np.float32), (-1, *[1] * (x.ndim - 1)))

    return jax.tree_util.tree_map_with_path(factor_of, params)


def check_groups(params, groups: Sequence) -> None:
    """ValueError where a rule matches nothing; not for those of `GROUPS`, which other models' trees may lack."""
    leaves = [_names(path, x) for path, x in jax.tree_util.tree_leaves_with_path(params)]
    names = [name for name, layers in leaves for name in (name, *layers)]
    for pattern, factor in groups:
        if (pattern, factor) not in GROUPS and not any(re.search(_spelled_out(pattern), name) for name in names):
            raise ValueError(f"optim.groups: {pattern!r} matches none of {', '.join(sorted(n for n, _ in leaves))}")


def frozen_stopped(params, groups: Sequence):
    """The same parameters, without a gradient where the factor is 0, so that none is computed."""

    def stopped(x, factor):
        if np.all(factor):
            return x
        return jnp.where(factor == 0, jax.lax.stop_gradient(x), x) if np.any(factor) else jax.lax.stop_gradient(x)

    return jax.tree.map(stopped, params, factors(params, groups))


def _name(path) -> str:
    return "/".join(str(getattr(p, "key", p)) for p in path)


def _names(path, x) -> tuple[str, list[str]]:
    """The path of a leaf, and those of its layers where it has some."""
    name = _name(path)
    first, _, rest = name.partition("/")
    if first == "blocks":
        return name, [f"blocks.{i}/{rest}" for i in range(x.shape[0])]
    return name, [name.replace("_", ".", 1)] if first.startswith("blocks_") else []


def _spelled_out(pattern: str) -> str:
    """ "blocks.2-4/" as the regular expression that it stands for."""

    def layers(found):
        return f"{found[1]}(?:{'|'.join(map(str, range(int(found[2]), int(found[3]) + 1)))})"

    return re.sub(r"(blocks\\?\.)(\d+)-(\d+)(?=/)", layers, pattern)


def schedule(
    kind: str, lr: float, lr_end: float, steps: int, warmup: int = 0, decay_start: int | None = None
) -> Callable[[int], float]:
    """Learning rate of a step in [0, steps), after a linear warm-up.

    "exponential": constant, then from step `decay_start` on lr * (lr_end / lr)^progress, at lr_end in the last step:
    the paper's own (appendix G). With the decay in the last tenth it is a trunk, and runs of other lengths branch
    off where their own decay starts. "cosine": half a cosine from lr to lr_end. "constant".
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


# (width, learning rate) of the released runs (Table 3) from 768 on; below, the best of `python -m
# experiments.compare.run --sweep` for short byte-level runs. In between on a straight line in log-log.
RELEASED_RATES = ((768, 6e-4), (1024, 4e-4), (2048, 3e-4), (4096, 1.5e-4), (5120, 1e-4))
LEARNING_RATES = {
    "rwkv4": ((64, 1.6e-2), (128, 8e-3), (256, 4e-3), *RELEASED_RATES),
    "attention": ((64, 8e-3), (128, 2e-3), (256, 1e-3), *RELEASED_RATES),
}


def default_lr(kind: str, dim: int) -> float:
    """Learning rate that suits a width, for models of `kind` "rwkv4" or "attention"."""
    table = LEARNING_RATES[kind]
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


def token_losses(head, x_BTD, targets_BT, chunk: int | None = None):
    """(`cross_entropy`, `l2wrap`) of each token [B, T], of logits that exist for `chunk` tokens at a time.

    `head(x_ND)` gives logits [N, V]. A chunk's are computed again in the backward pass, so that [B, T, V], 6.6 GB at
    V 50,277 for 32 windows of 1,024, exists in neither; at a small V one chunk holds every token and nothing is
    computed twice.

    Args:
        x_BTD: activations after the final norm, of the rows of one device: what is split over devices is not chunked.
        chunk: tokens, 1 or more; None: a power-of-two share of them, of at most `LOGITS` logits.
    """

    def losses(x_and_targets):
        x, targets = x_and_targets
        logits = head(x)
        return cross_entropy(logits, targets), l2wrap(logits)

    N = targets_BT.size
    if chunk is None:
        wanted = -(-N * jax.eval_shape(head, x_BTD).shape[-1] // LOGITS)
        chunks = 1 << (wanted - 1).bit_length()
    else:
        chunks = -(-N // chunk)
    if chunks == 1:
        return losses((x_BTD, targets_BT))
    size = -(-N // chunks)

    def split(x):
        x = x.reshape(N, *x.shape[2:])
        return jnp.pad(x, ((0, chunks * size - N), *[(0, 0)] * (x.ndim - 1))).reshape(chunks, size, *x.shape[1:])

    by_chunk = jax.lax.map(jax.checkpoint(losses, prevent_cse=False), (split(x_BTD), split(targets_BT)))
    return jax.tree.map(lambda x: x.reshape(-1)[:N].reshape(targets_BT.shape), by_chunk)
