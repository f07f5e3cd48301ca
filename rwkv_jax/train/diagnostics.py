"""What is worth knowing about a model in training beside its loss, computed apart from the step."""

import re

import jax
import jax.numpy as jnp
import optax

from rwkv_jax import models
from rwkv_jax.finetune import FULL
from rwkv_jax.train.step import apply_gradient, make_gradient

# (group, regex over the parameter path): the first match counts. Attention is "time_mix", an MLP "channel_mix".
GROUPS = (
    ("embedding", r"^emb/"),
    ("head", r"^head/"),
    ("norms", r"(^|/)ln\w+/"),
    ("decays", r"/time_(decay|first)$"),
    ("time_mix", r"/att/"),
    ("channel_mix", r"/ffn/"),
)
FORGETS = 1e-3  # a channel that keeps less than this share of its sums from one token to the next forgets at once
POSITIONS = 64  # whose logits exist at one time


def make_diagnose(model, tx, method=FULL, **options):
    """`diagnose(state, batch, lr, axis_name=None) -> (state, values)` of the step that `batch` is about to take.

    The state comes back as it came, so that every strategy runs it like a step. Costs about a step and a half. Values:

        parameter_norm, gradient_norm, update_norm
            L2 norms by group of `GROUPS`: of what the step starts from, of its gradient before clipping, and of the
            change that it makes
        k_max [L]
            largest |k| of each layer over the batch: WKV works with exp(k) kept as differences of exponents, other
            programs overflow near 88 in float32 and 11 in float16. Of attention the keys, before rotation
        dead_channels
            "forgetting" [L]: share of time-mixing channels whose decay exp(-exp(time_decay)) is below `FORGETS`; they
            see the current and the previous token only. NaN for attention
            "inactive" [L]: share of hidden channels of channel mixing (ReLU^2) or of an MLP (GELU) whose
            pre-activation is above 0 at no token of the batch
        logit_max
            largest logit over the batch, without dropout

    Options are those of `make_gradient`.
    """
    mean_gradient = make_gradient(model, method=method, **options)

    def diagnose(state, batch, lr, axis_name=None):
        grads, loss, _ = mean_gradient(state, batch, axis_name)
        new_state, _ = apply_gradient(tx, state, grads, loss, lr)
        updates = jax.tree.map(jnp.subtract, new_state.params, state.params)
        trees = {"parameter_norm": state.params, "gradient_norm": grads, "update_norm": updates}
        params, initial = method.bind(state.params, state.frozen, len(batch["tokens"]))
        seen = _over_batch(model, params, initial if state.carry is None else state.carry, batch)
        if axis_name is not None:
            seen = jax.lax.pmax(seen, axis_name)
        values = {name: norms(tree) for name, tree in trees.items()}
        values |= {"k_max": seen["k_max"], "logit_max": seen["logit_max"]}
        inactive = [1 - active_F.mean() for active_F in seen["active"]]
        return state, values | {
            "dead_channels": {
                "forgetting": jnp.stack(_forgetting(model, params)),
                "inactive": jnp.stack(inactive),
            }
        }

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
    """Maxima over the batch, of floats as of truth values: {"k_max": [L], "active": L times [F], "logit_max": []}."""
    apply = lambda *args, **kw: model.apply({"params": params}, *args, **kw)
    tokens_BT = batch["tokens"][:, :-1]
    (x_BTD, _), collected = apply(
        tokens_BT, initial, reset_BT=batch.get("reset"), method="hidden", mutable=["intermediates"]
    )
    layers = _layers(model, collected["intermediates"])
    logit_max = jax.lax.map(  # [B, T, V] may be larger than everything else
        lambda x_BD: apply(x_BD[:, None], method="logits").max(), x_BTD.swapaxes(0, 1), batch_size=POSITIONS
    )
    return {
        "k_max": jnp.stack([layer["att"]["k_max"][0] for layer in layers]),
        "active": [layer["ffn"]["active_F"][0].astype(jnp.float32) for layer in layers],
        "logit_max": logit_max.max(),
    }


def _forgetting(model, params):
    decays = [layer["att"].get("time_decay") for layer in _layers(model, params)]
    share = lambda decay_D: jnp.mean(jnp.exp(-jnp.exp(decay_D)) < FORGETS)
    return [jnp.float32(jnp.nan) if decay_D is None else share(decay_D) for decay_D in decays]


def _layers(model, tree):
    """The part of each layer, first to last, of a tree that is laid out like the parameters."""
    tree = models.unstack(tree) if model.scan else tree
    return [tree[f"blocks_{i}"] for i in range(model.num_layers)]
