"""The language model around the blocks: embedding, LN0, layers, final norm, untied head.

One signature serves training, prefill and decoding, for RWKV, the transformer and hybrids:

    logits_BTV, state = model.apply({"params": params}, tokens_BT, state, reset_BT=None, valid_BT=None)
"""

import difflib
from dataclasses import fields
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rwkv_jax.models import lstm, rwkv4, transformer
from rwkv_jax.models.layers import ACTIVATIONS, LayerNorm, Linear, dropout, embedding_init, matmul, orthogonal
from rwkv_jax.ops.wkv4 import FORMS

# Sizes of the released models (Table 2): layers and width. Their vocabulary is GPT-NeoX-20B's.
SIZES = {
    "169m": (12, 768),
    "430m": (24, 1024),
    "1b5": (24, 2048),
    "3b": (32, 2560),
    "7b": (32, 4096),
    "14b": (40, 5120),
}
NEOX_VOCAB = 50277
MODELS = {"rwkv4": ("rwkv4",), "transformer": ("attention",), "lstm": ("lstm",)}
KINDS = ("rwkv4", "attention", "lstm")  # of layers
# What of a layer's forward pass is kept for the backward pass, by `checkpoint_name`; the rest is computed again.
# Temporary memory of a step in MiB, 12 layers of D 256 on 4 windows of 1,024 tokens, float32, beside a state of 119
# (compiled.memory_analysis(), CPU, jax 0.10.2, 2026-11-26), and values kept a token and layer of RWKV-4: from D to 4 D
# are 144 MiB, from there to 12 D 384.
#                RWKV-4   transformer   kept
#   "none"        1,762         2,185   all
#   "matmuls"       774           731   12 D
#   "outputs"       405           372   4 D
#   "block"         264           340   D
OUTPUTS = ("wkv", "att", "ffn_value")
REMAT = {
    "none": None,  # everything is kept
    "block": (),  # the input of each layer: the whole layer runs twice
    "outputs": OUTPUTS,  # no recurrence or attention twice, of 13 D^2 of matrix products 8 D^2
    "matmuls": (*OUTPUTS, "query", "key", "value", "receptance", "ffn_key", "ffn_receptance"),  # none twice
}
CHOICES = {
    "remat": tuple(REMAT),
    "dtype": ("float32", "bfloat16", "float16", "float64"),
    "param_dtype": ("float32", "bfloat16", "float16", "float64"),
    "wkv_impl": (None, *FORMS),
    "embedding_init": ("v4", "v4neo", "v5", "normal"),
    "embedding_norm": (True, False),
    "token_shift": (None, True, False),
    "activation": (None, *ACTIVATIONS),
    "current_token": ("bonus", "plain", "excluded"),
    "previous_token": ("whole", "decayed"),
    "receptance": (True, False),
    "matrix_init": ("released", "printed", "normal"),
    "matmul_precision": (None, "default", "high", "highest"),
}


def build(name: str, size: str | None = None, **overrides: Any) -> "LM":
    """A model by name, "rwkv4", "transformer" or "lstm", with the fields of `LM`; `size` is one of the released sizes.

    `build("rwkv4", layers=("rwkv4", "attention"), ...)` is a hybrid of alternating layers.
    """
    _one_of("model name", name, MODELS)
    defaults = {"layers": MODELS[name]}
    if size is not None:
        _one_of("size", size, SIZES)
        defaults |= {"vocab_size": NEOX_VOCAB, "num_layers": SIZES[size][0], "dim": SIZES[size][1]}
    chosen = defaults | overrides
    names = [f.name for f in fields(LM) if f.name not in ("parent", "name")]
    for key in chosen:
        _one_of("model field", key, names)
    for key in ("vocab_size", "num_layers", "dim"):
        if not isinstance(chosen.get(key), int) or chosen[key] < 1:
            raise ValueError(f"model field {key} is {chosen.get(key)!r}, expected a positive integer")
    for key in ("hidden_dim", "head_size"):
        value = chosen.get(key)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"model field {key} is {value!r}, expected a positive integer")
    if not 0 <= chosen.get("dropout", 0.0) < 1:
        raise ValueError(f"model field dropout is {chosen['dropout']!r}, expected a share from 0 to below 1")
    if isinstance(chosen.get("remat"), bool):  # as runs of version 0.1 have it
        chosen["remat"] = "block" if chosen["remat"] else "none"
    for key, choices in CHOICES.items():
        if key in chosen:
            _one_of(f"model field {key}", chosen[key], choices)
    chosen["layers"] = tuple(chosen["layers"])
    for kind in chosen["layers"]:
        _one_of("kind of layer", kind, KINDS)
    for key in ("current_token", "previous_token", "receptance", "matrix_init"):
        if "rwkv4" not in chosen["layers"] and chosen.get(key, getattr(LM, key)) != getattr(LM, key):
            raise ValueError(f"model field {key} is {chosen[key]!r}, which means nothing without RWKV-4 layers")
    if not chosen["layers"] or chosen["num_layers"] % len(chosen["layers"]):
        raise ValueError(
            f"num_layers is {chosen['num_layers']}, expected a multiple of the {len(chosen['layers'])} kinds in layers"
        )
    return LM(**chosen)


# Values with which a model of RWKV-4 layers computes what the released one does.
RELEASED = {
    "embedding_norm": (True,),
    "token_shift": (None, True),
    "activation": (None, "relu2"),
    "current_token": ("bonus",),
    "previous_token": ("whole",),
    "receptance": (True,),
}


def variations(model: "LM") -> list[str]:
    """The fields by which a model of RWKV-4 layers is another than the released one."""
    return [name for name, values in RELEASED.items() if getattr(model, name) not in values]


def upgraded(fields: dict) -> dict:
    """Fields of a model that a run or file holds, as `build` takes them: those of 0.1 have no `receptance`, and say
    "no token shift" of RWKV-4, meaning attention layers alone."""
    old = "receptance" not in fields and fields.get("token_shift") is False
    return {**fields, "token_shift": None} if old else fields


def _one_of(what, given, known):
    if given not in known:
        near = difflib.get_close_matches(str(given), [str(k) for k in known], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(map(str, known))}"
        raise ValueError(f"unknown {what} {given!r}: {hint}")


class LM(nn.Module):
    """Fields are plain JSON values; None means the model's own default.

    `apply` in `jax.jit` is one program for each shape. Outside of it a plain forward pass runs operation by operation,
    one layer after the other: slower, but nothing is compiled twice. Stacked parameters are copied for it in every
    call, which takes their memory once more.
    """

    vocab_size: int
    num_layers: int
    dim: int
    layers: tuple[str, ...] = ("rwkv4",)  # one repeating unit, num_layers / len(layers) times
    hidden_dim: int | None = None  # F: 4 D for RWKV-4, 4.5 D for attention, 1.28 D for LSTM: 13 D^2 a layer of all
    dtype: str = "float32"  # activations; norms' statistics, WKV, logits and loss are float32 at least
    param_dtype: str = "float32"
    matmul_precision: str | None = None  # "highest": full float32 where the hardware would round the inputs
    dropout: float = 0.0  # on the embedding and on the residual stream after each add, as in RWKV-v4neo
    embedding_init: str = "v4neo"  # see `layers.embedding_init`
    embedding_scale: float | None = None
    embedding_norm: bool = True  # LN0
    token_shift: bool | None = None  # None: in RWKV-4, not in attention, where it is on q, k, v and the MLP's input
    activation: str | None = None  # see `layers.ACTIVATIONS`; None: "relu2" in RWKV-4, "gelu" in attention's MLP
    current_token: str = "bonus"  # RWKV-4: these four as in `rwkv4.Variant`
    previous_token: str = "whole"
    receptance: bool = True
    matrix_init: str = "released"  # "normal": the head too
    wkv_impl: str | None = None  # see `ops.wkv4`
    head_size: int = 64  # attention: K; a narrower model has one head
    remat: str = "none"  # what the backward pass computes again, see `REMAT`
    scan: bool = True  # parameters stacked [L, ...], compile time independent of depth; False: one set a layer

    def setup(self):
        kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        linear = partial(Linear, precision=self.matmul_precision, **kw)
        norm = partial(LayerNorm, **kw)
        self.emb = nn.Embed(
            self.vocab_size,
            self.dim,
            embedding_init=embedding_init(self.embedding_init, self.embedding_scale),
            **kw,
        )
        if self.embedding_norm:
            self.ln0 = norm()
        unit = self._unit(linear, norm)
        if self.scan:
            axes = {"params": 0, "intermediates": 0}
            # The check traces a layer once more, though nothing is broadcast out of it. Without it keys are split in
            # another way: what is drawn from a seed stays what it was.
            draws = self.is_initializing() or self.has_rng("dropout")
            self.blocks = nn.scan(
                self._remat(unit.func, prevent_cse=False),
                variable_axes=axes,
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast, 0),
                length=self.num_layers // len(self.layers),
                check_constancy_invariants=draws,
            )(**unit.keywords)
        else:
            make = {kind: self._block(kind, linear, norm) for kind in self.layers}
            kinds = self.layers * (self.num_layers // len(self.layers))
            self.blocks = [self._remat(make[kind].func)(**make[kind].keywords) for kind in kinds]
        self.ln_out = norm()
        wide = jnp.promote_types(self.dtype, jnp.float32)
        self.head = linear(
            self.vocab_size,
            kernel_init=nn.initializers.normal(0.02) if self.matrix_init == "normal" else orthogonal(0.5),
            dot_general=partial(matmul, preferred_element_type=wide),
        )

    def _block(self, kind, linear, norm):
        shared = {
            "dim": self.dim,
            "hidden_dim": self.hidden_dim,
            "num_layers": self.num_layers,
            "linear": linear,
            "norm": norm,
            "dropout": self.dropout,
        }
        if kind == "rwkv4":
            variant = rwkv4.Variant(
                self._shifts(kind),
                self.current_token,
                self.previous_token,
                self.receptance,
                self.activation or "relu2",
                self.matrix_init,
            )
            return partial(rwkv4.Block, wkv_impl=self.wkv_impl, variant=variant, **shared)
        if kind == "lstm":
            return partial(lstm.Block, **shared)
        own = {"token_shift": self._shifts(kind), "activation": self.activation or "gelu"}
        return partial(transformer.Block, head_size=self.head_size, **own, **shared)

    def _shifts(self, kind):
        return kind == "rwkv4" if self.token_shift is None else self.token_shift

    def _unit(self, linear, norm):
        blocks = tuple(self._block(kind, linear, norm) for kind in self.layers)
        return blocks[0] if len(blocks) == 1 else partial(Unit, blocks=blocks)

    def _remat(self, block, **kw):
        names = REMAT[self.remat]
        if names is None:
            return block
        return nn.remat(block, policy=jax.checkpoint_policies.save_only_these_names(*names), **kw)

    def hidden(self, tokens_BT, state=None, *, reset_BT=None, valid_BT=None):
        """Activations [B, T, D] after the final norm, and the state after the last token.

        Args:
            tokens_BT: ids in [0, V).
            state: what `init_state` or an earlier call returned; None: no past.
            reset_BT: True where a new document starts.
            valid_BT: False where a token is padding, on either side, and leaves the state untouched.

        The state is a tuple with one entry a layer, leaves [B, ...]; without one coming in, an attention layer's
        entry is None (no cache is allocated).
        """
        if self.scan and self._eager(tokens_BT, state, reset_BT, valid_BT):
            # linen hands its lifted scan a new function in every call, which JAX would compile in every call
            apart, params = per_layer(self.clone(remat="none", parent=None), self.variables["params"])
            return apart.apply({"params": params}, tokens_BT, state, reset_BT, valid_BT, method="_hidden")
        return self._hidden(tokens_BT, state, reset_BT, valid_BT)

    def _hidden(self, tokens_BT, state, reset_BT, valid_BT):
        x_BTD = dropout(self, self.emb(tokens_BT), self.dropout)
        if self.embedding_norm:
            x_BTD = self.ln0(x_BTD)
        if not self.scan:
            new = []
            for i, block in enumerate(self.blocks):
                entry = None if state is None else state[i]
                x_BTD, entry = block(x_BTD, entry, reset_BT, valid_BT, jnp.float32(i))
                new.append(entry)
            return self.ln_out(x_BTD), tuple(new)
        period = len(self.layers)
        first = jnp.arange(0, self.num_layers, period, dtype=jnp.float32)
        if state is not None:
            state = tuple(jax.tree.map(lambda *x: jnp.stack(x), *state[j::period]) for j in range(period))
            state = state[0] if period == 1 else state
        x_BTD, state = self.blocks(x_BTD, state, reset_BT, valid_BT, first)
        state = (state,) if period == 1 else state
        entry = lambda i: jax.tree.map(lambda x: x[i // period], state[i % period])
        return self.ln_out(x_BTD), tuple(entry(i) for i in range(self.num_layers))

    def _eager(self, *operands):
        """Whether this is a plain forward pass, none of whose operands is traced."""
        collecting = any(map(self.is_mutable_collection, ("params", "intermediates")))
        if collecting or (self.dropout and self.has_rng("dropout")):
            return False
        return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((self.variables, operands)))

    def logits(self, x_BTD):
        """Logits [B, T, V], float32, of activations from `hidden`. Prefill needs them for the last position only."""
        return self.head(x_BTD)

    def __call__(self, tokens_BT, state=None, *, reset_BT=None, valid_BT=None):
        x_BTD, state = self.hidden(tokens_BT, state, reset_BT=reset_BT, valid_BT=valid_BT)
        return self.logits(x_BTD), state

    def init_state(self, batch: int, max_length: int | None = None) -> tuple:
        """The empty past. `max_length` tokens is what a KV cache can hold; a recurrent state has no such limit."""
        wide, D = jnp.promote_types(self.dtype, jnp.float32), self.dim
        shifts = self._shifts
        make = {
            "rwkv4": lambda: rwkv4.init_state(batch, D, wide, shifts("rwkv4")),
            "lstm": lambda: lstm.init_state(batch, D, self.hidden_dim, wide),
            "attention": lambda: transformer.init_state(
                batch, D, self.head_size, max_length, self.dtype, shifts("attention")
            ),
        }
        return tuple(make[self.layers[i % len(self.layers)]]() for i in range(self.num_layers))

    @property
    def recurrent(self) -> bool:
        """Whether the state of every layer has a fixed size, however long the past."""
        return "attention" not in self.layers


class Unit(nn.Module):
    """Blocks of several kinds in turn: what a hybrid repeats."""

    blocks: tuple

    @nn.compact
    def __call__(self, x_BTD, state, reset_BT, valid_BT, layer):
        new = []
        for j, block in enumerate(self.blocks):
            entry = None if state is None else state[j]
            x_BTD, entry = block(name=f"block_{j}")(x_BTD, entry, reset_BT, valid_BT, layer + j)
            new.append(entry)
        return x_BTD, tuple(new)


def per_layer(model, params):
    """Model and parameters of one layer each, from either layout.

    Raises:
        ValueError: stacked parameters are those of another number of layers.
    """
    if not model.scan:
        return model, params
    wanted = model.num_layers // len(model.layers)
    for path, x in jax.tree_util.tree_leaves_with_path(params["blocks"]):
        if x.shape[:1] != (wanted,):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"blocks/{name} is {x.shape}, expected {wanted} layers of it")
    return model.clone(scan=False), jax.jit(unstack)(params)  # one program, not one for each layer and shape


def unstack(params):
    """Stacked parameters (`scan=True`) as one set a layer (`scan=False`), which decoding reads faster: a 12 x 768
    float32 model decodes at 41 to 45 tokens/s from per-layer arrays, at 27 from stacked ones (2-core CPU)."""
    rest = {k: v for k, v in params.items() if k != "blocks"}
    blocks = params["blocks"]
    units = [blocks[f"block_{j}"] for j in range(len(blocks))] if "block_0" in blocks else [blocks]
    repeats = len(jax.tree.leaves(blocks)[0])
    layer = lambda i: jax.tree.map(lambda x: x[i // len(units)], units[i % len(units)])
    return rest | {f"blocks_{i}": layer(i) for i in range(repeats * len(units))}


def stack(params, period: int = 1):
    """One set of parameters a layer as stacked ones. `period`: layers in a hybrid's repeating unit."""
    rest = {k: v for k, v in params.items() if not k.startswith("blocks_")}
    layers = [params[f"blocks_{i}"] for i in range(len(params) - len(rest))]
    units = [jax.tree.map(lambda *x: jnp.stack(x), *layers[j::period]) for j in range(period)]
    return rest | {"blocks": units[0] if period == 1 else {f"block_{j}": u for j, u in enumerate(units)}}
