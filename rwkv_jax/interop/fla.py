"""RWKV-7 as flash-linear-attention names it for transformers (its `RWKV7ForCausalLM`, model_type "rwkv7").

A low-rank map is a sequence of two layers: the official matrices transposed, and the added vector as the bias of the
second. Vectors are [D], except x_r ... x_g, which are [1, 1, D]; its first version had them in one x_x [6, D].

The epsilon of the heads' norm is that of the other norms times the size of a head: the released 64e-5 where a head has
64 channels. With `fuse_norm` that library adds 1e-6 to the squared length of a key, unlike the training of the
released models; folders written here disable it. The library cannot build a model of one layer.
"""

from collections.abc import Mapping

import numpy as np

from rwkv_jax.interop.official import VECTORS, layer_count

_RENAMED = {
    "model.embeddings.": "emb.",
    "model.norm.": "ln_out.",
    "lm_head.": "head.",
    "model.layers.": "blocks.",
    ".pre_norm.": ".ln0.",
    ".attn_norm.": ".ln1.",
    ".ffn_norm.": ".ln2.",
    ".attn.r_proj.": ".att.receptance.",
    ".attn.k_proj.": ".att.key.",
    ".attn.v_proj.": ".att.value.",
    ".attn.o_proj.": ".att.output.",
    ".attn.g_norm.": ".att.ln_x.",
    **{f".attn.{c}_lora.lora.0.weight": f".att.{c}1" for c in "wavg"},
    **{f".attn.{c}_lora.lora.2.weight": f".att.{c}2" for c in "wavg"},
    **{f".attn.{c}_lora.lora.2.bias": f".att.{c}0" for c in "wav"},
    ".attn.": ".att.",
}
_MIXES = "rwkvag"  # rows of x_x
CARRIED = {"tie_word_embeddings": False, "norm_eps": 1e-5, "hidden_act": "sqrelu"}  # in config.json, as in our model


def are_named_by_fla(tensors: Mapping[str, np.ndarray]) -> bool:
    return "model.embeddings.weight" in tensors


def from_fla(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return tensors by official name, in official shapes. Unknown names are kept."""
    out = {}
    for name, x in tensors.items():
        for theirs, ours in _RENAMED.items():
            name = name.replace(theirs, ours)
        if name.endswith(".att.x_x") and x.shape[:1] == (len(_MIXES),):
            out |= {f"{name[:-1]}{c}": row.reshape(1, 1, -1) for c, row in zip(_MIXES, x, strict=True)}
        else:
            out[name] = x.reshape(1, 1, -1) if VECTORS.match(name) else x.T if _is_low_rank(name) else x
    return out


def to_fla(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return official tensors of RWKV-7 by the names of flash-linear-attention, in its shapes."""
    out = {}
    for name, x in tensors.items():
        x = x.T if _is_low_rank(name) else x.reshape(-1) if VECTORS.match(name) and ".att.x_" not in name else x
        for theirs, ours in _RENAMED.items():
            name = name.replace(ours, theirs)
        out[name] = x
    return out


def _is_low_rank(name: str) -> bool:
    return name[-2:] in {f"{c}{i}" for c in "wavg" for i in "12"}


def head_norm_epsilon(tensors: Mapping[str, np.ndarray]) -> float:
    """Return the epsilon of the heads' norm with which that library computes the model of official tensors."""
    return CARRIED["norm_eps"] * tensors["blocks.0.att.r_k"].shape[-1]


def config(tensors: Mapping[str, np.ndarray]) -> dict:
    """Return the content of config.json for official tensors."""
    (V, D), (H, K) = tensors["emb.weight"].shape, tensors["blocks.0.att.r_k"].shape
    F, L = tensors["blocks.0.ffn.key.weight"].shape[0], layer_count(tensors)
    rank = lambda c, layer=0: tensors[f"blocks.{layer}.att.{c}1"].shape[1]
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "vocab_size": V,
        "hidden_size": D,
        "hidden_ratio": F / D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "head_dim": K,
        "num_heads": H,
        "value_dim": [D] * L,
        "decay_low_rank_dim": rank("w"),
        "a_low_rank_dim": rank("a"),
        "v_low_rank_dim": rank("v", L - 1) if L > 1 else rank("a"),
        "gate_low_rank_dim": rank("g"),
        "norm_first": True,
        "norm_bias": True,
        "fuse_norm": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": tensors["head.weight"].dtype.name,
        **CARRIED,
    }
