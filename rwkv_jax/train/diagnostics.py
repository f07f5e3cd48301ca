"""Diagnostics of a model in training, computed outside the step."""

import re

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from rwkv_jax import models
from rwkv_jax.train.step import Objective, apply_gradient, mean_gradient

# (group, regex over the parameter path): the first match counts. Attention is "time_mix", an MLP "channel_mix".
GROUPS = (
    ("embedding", r"^emb/"),
    ("head", r"^head/"),
    ("norms", r"(^|/)ln\w+/"),
    ("decays", r"/(time_(decay|first|faaaa)|w0)$"),
    ("time_mix", r"/att/"),
    ("channel_mix", r"/ffn/"),
)
POSITIONS = 64  # whose logits exist at one time


def make_diagnose(model, tx, **options):
    """`diagnose(state, batch, lr, axis_name=None) -> (state, values)` for the step that is about to take `batch`.

    The state is returned unchanged, so that every strategy runs it like a step. Costs about a step and a half. Values:

        parameter_norm, gradient_norm, update_norm
            L2 norms by group of `GROUPS`: of the parameters, of the gradient before clipping, and of the change
        logit_max
            largest logit over the batch, without dropout

    and observations of the kinds of layers (`Kind.observe`), NaN for layers that lack them:

        k_max [L]
            largest |k| of each layer over the batch. WKV here takes differences of exponents; programs that compute
            exp(k) overflow near 88 in float32 and 11 in float16. In attention, k is the key before rotation
        dead_channels
            "forgetting" [L]: share of time-mixing channels that nearly lose their sums from one token to the next;
            they see the current and the previous token only
            "inactive" [L]: share of hidden channels of channel mixing (ReLU^2) or of an MLP (GELU) whose
            pre-activation is above 0 at no token of the batch

    Options are the fields of `step.Objective`.
    """
    objective = Objective(**options)

    def diagnose(state, batch, lr, axis_name=None):
        grads, loss, _ = mean_gradient(model, objective, state, batch, axis_name)
        new_state, _ = apply_gradient(tx, state, grads, loss, lr)
        updates = jax.tree.map(jnp.subtract, new_state.params, state.params)
        trees = {"parameter_norm": state.params, "gradient_norm": grads, "update_norm": updates}
        params, initial = objective.method.bind(model, state.params, state.frozen, len(batch["tokens"]))
        logit_max, sown = _over_batch(model, params, initial if state.carry is None else state.carry, batch)
        if axis_name is not None:
            logit_max, sown = jax.lax.pmax((logit_max, sown), axis_name)
        values = {name: norms(tree) for name, tree in trees.items()}
        return state, values | _observed(model, params, sown) | {"logit_max": logit_max}

    return diagnose


def norms(tree) -> dict:
    """L2 norm of each group of `GROUPS` that a tree of parameters, gradients or updates has."""
    grouped = {}
    for path, x in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        group = next((group for group, pattern in GROUPS if re.search(pattern, name)), "other")
        grouped.setdefault(group, []).append(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    return {group: optax.tree.norm(leaves) for group, leaves in grouped.items()}


def _over_batch(model, params, initial, batch):
    """(largest logit, values that each layer sowed): maxima over the batch, also of booleans."""
    apply = lambda *args, **kw: model.apply({"params": params}, *args, **kw)
    tokens_BT = batch["tokens"][:, :-1]
    (x_BTD, _), collected = apply(
        tokens_BT, initial, reset_BT=batch.get("reset"), method="hidden", mutable=["intermediates"]
    )
    logit_max = jax.lax.map(  # [B, T, V] may be larger than everything else
        lambda x_BD: apply(x_BD[:, None], method="logits").max(), x_BTD.swapaxes(0, 1), batch_size=POSITIONS
    )
    sown = _layers(model, collected.get("intermediates", {}))
    return logit_max.max(), jax.tree.map(lambda x: x.astype(jnp.float32), sown)


def _observed(model, params, sown) -> dict:
    """Values [L] of every observation, NaN for layers that lack it."""
    once = lambda tree: jax.tree.map(lambda x: x[0], tree, is_leaf=lambda x: isinstance(x, tuple))
    kinds, params = [kind for _, kind, _ in model.every_layer], _layers(model, params)
    seen = [flatten_dict(kind.observe(*layer)) for kind, *layer in zip(kinds, params, map(once, sown), strict=True)]
    names = dict.fromkeys(name for layer in seen for name in layer)
    stacked = {name: jnp.stack([layer.get(name, jnp.float32(jnp.nan)) for layer in seen]) for name in names}
    return unflatten_dict(stacked)


def _layers(model, tree) -> list:
    """The part of each layer, first to last, of a tree that is laid out like the parameters."""
    tree = models.unstack(tree)
    return [tree.get(f"blocks_{i}", {}) for i in range(model.num_layers)]
