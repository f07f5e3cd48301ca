"""Going back within a pass: the state after the first tokens of a pass that has read more of them.

Once the pass is made, what its tokens leave in a state needs no matrix product again: token shift keeps two normed
inputs, WKV's state follows from keys and values, and a cache has only to forget its length.
"""

import jax.numpy as jnp

from rwkv_jax.models.layers import token_shift
from rwkv_jax.ops import wkv4


def read(model, params, tokens_BT, state):
    """(logits [B, T, V], the state after all tokens, what `state_after` needs of the pass).

    For parameters of one layer each (`scan=False`). What is needed are the normed inputs of both halves of a layer
    and the keys and values of the first, each [B, T, D]. ValueError for an LSTM, which has none of these.
    """
    if "lstm" in model.layers:
        raise ValueError(f"layers are {model.layers}, expected rwkv4 and attention: an LSTM cannot go back in a pass")
    (logits_BTV, state), variables = model.apply(
        {"params": params},
        tokens_BT,
        state,
        capture_intermediates=lambda module, method: module.name in ("ln1", "ln2", "key", "value"),
        mutable=["intermediates"],
    )
    layers = [variables["intermediates"][f"blocks_{i}"] for i in range(model.num_layers)]
    made = lambda layer: (layer["ln1"], layer["ln2"], layer["att"]["key"], layer["att"]["value"])
    return logits_BTV, state, [tuple(module["__call__"][0] for module in made(layer)) for layer in layers]


def state_after(model, params, before, after, made, count_B):
    """The state after the first `count_B` tokens of each row, from none to all, of a pass from `before` to `after`.

    Equal to reading those tokens alone, from `before`, up to rounding. `made` is what `read` returned.
    """
    valid_BT = jnp.arange(made[0][0].shape[1])[None] < count_B[:, None]
    last = lambda x_BTD, last_BD: None if last_BD is None else token_shift(x_BTD, last_BD, None, valid_BT)[1]
    state = []
    for i, (old, new, (ln1_BTD, ln2_BTD, k_BTD, v_BTD)) in enumerate(zip(before, after, made, strict=True)):
        if model.layers[i % len(model.layers)] == "rwkv4":
            att = params[f"blocks_{i}"]["att"]
            w_D = -jnp.exp(att["time_decay"])
            u_D = jnp.zeros_like(w_D)  # no part of the state depends on it
            past = {"wkv": wkv4(w_D, u_D, k_BTD, v_BTD, old.wkv, valid_BT=valid_BT, impl=model.wkv_impl)[1]}
        else:
            past = {"cache": new.cache._replace(length_B=old.cache.length_B + count_B)}
        lasts = {"att_last": last(ln1_BTD, old.att_last), "ffn_last": last(ln2_BTD, old.ffn_last)}
        state.append(new._replace(**past, **lasts))
    return tuple(state)
