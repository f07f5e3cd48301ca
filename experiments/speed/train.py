"""Training on a CPU: tokens/s against transformers, model FLOP utilisation, and a breakdown of a step's time.

WKV (or attention) of all layers and the optimiser (`train.apply_gradient`: clipping, Adam, the update and its check)
run as programs of their own, at the model's shapes and on random numbers, in turn with the whole step. The rest of the
step is matrix products and elementwise work. "optimiser" is an upper bound: alone it takes 250 MB from the system,
page by page (6 x 512), which inside the step the backward pass has freed.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import rwkv_jax
from experiments.speed.timing import medians, ratio
from rwkv_jax import hardware, train
from rwkv_jax.models.attention import causal_attention
from rwkv_jax.ops import wkv4
from rwkv_jax.train import optim

FULL = {"num_layers": 6, "dim": 512, "vocab_size": 256, "dtype": "float32", "batch": 4, "seq_len": 512}
SMOKE = {"num_layers": 2, "dim": 64, "vocab_size": 256, "dtype": "float32", "batch": 2, "seq_len": 32}
ROUNDS = 7
MODELS = {"rwkv4": "WKV", "transformer": "attention"}  # model -> how it mixes tokens


def run(smoke: bool) -> dict:
    """Return the rows of speed against others, and for both models FLOPs, utilisation and the parts of a step."""
    shape, rounds = (SMOKE, 1) if smoke else (FULL, ROUNDS)
    models = {name: build(name, shape) for name in MODELS}
    sides = {(name, part): f for name, model in models.items() for part, f in programs(model, shape).items()}
    sides |= {("transformers", name): peer(name, shape) for name in MODELS}
    rng, size = np.random.default_rng(0), (shape["batch"], shape["seq_len"] + 1)
    tokens = (rng.integers(0, shape["vocab_size"], size).astype(np.int32) for _ in itertools.count())
    seconds = medians(sides, tokens, rounds)

    peak = hardware.matmul_peak()
    speed = {side: shape["batch"] * shape["seq_len"] / t for side, t in seconds.items()}
    ours, others = (speed[name, "step"] for name in MODELS)
    what = "training, tokens/s"
    rows = [
        ratio(what, "rwkv4", ours, "transformer", others, None),
        ratio(what, "rwkv4", ours, "transformers RwkvForCausalLM", speed["transformers", "rwkv4"], 2.0),
        ratio(what, "transformer", others, "transformers GPT-2, sdpa", speed["transformers", "transformer"], 0.9),
    ]
    measured = {}
    for name, model in models.items():
        flops = hardware.flops_per_token(model, shape["seq_len"])
        measured[name] = {
            "tokens_per_second": speed[name, "step"],
            "flops_per_token": flops,
            "share_of_peak": speed[name, "step"] * flops / peak,
            "step_seconds": seconds[name, "step"],
            "parts": parts({part: t for (side, part), t in seconds.items() if side == name}, MODELS[name]),
        }
    return {"shape": shape, "rows": rows, "peak_flops": peak, "models": measured}


def report(results: dict) -> list[str]:
    """Return lines on the measurements besides `rows`."""
    lines = []
    for name, row in results["models"].items():
        shares = ", ".join(f"{part} {t / row['step_seconds']:.0%}" for part, t in row["parts"].items())
        lines.append(f"{name}: {row['share_of_peak']:.0%} of {results['peak_flops'] / 1e9:,.0f} GFLOP/s; {shares}")
    return lines


def parts(seconds: dict, operator: str) -> dict:
    """Return the seconds of a step by part."""
    known = {operator: seconds["operator"], "optimiser": seconds["optimiser"]}
    return known | {"matmuls and the rest": seconds["step"] - sum(known.values())}


def build(name, shape):
    return rwkv_jax.build(name, **{k: shape[k] for k in ("num_layers", "dim", "vocab_size", "dtype")})


def whole_step(model, shape):
    """Return (a training step as a function of tokens [B, T+1], finished when it returns; its temporary bytes)."""
    tx, lr = optim.optimiser(), np.float32(1e-4)
    state = jax.jit(train.make_init(model, tx))(jax.random.key(0))
    batch = lambda tokens_BT: {"tokens": tokens_BT, "mask": np.ones_like(tokens_BT[:, 1:], bool)}
    tokens_BT = np.zeros((shape["batch"], shape["seq_len"] + 1), np.int32)
    step = jax.jit(train.make_step(model, tx), donate_argnums=0).lower(state, batch(tokens_BT), lr).compile()

    def run(tokens_BT):
        nonlocal state
        state = jax.block_until_ready(step(state, batch(tokens_BT), lr))[0]

    return run, step.memory_analysis().temp_size_in_bytes


def programs(model, shape) -> dict:
    """Return the whole step and its parts as functions of tokens [B, T+1], finished when they return."""
    tx, lr = optim.optimiser(), np.float32(1e-4)
    descend = jax.jit(lambda state, *args: train.apply_gradient(tx, state, *args), donate_argnums=0)
    other = jax.jit(train.make_init(model, tx))(jax.random.key(0))
    gradients = itertools.cycle([noise(other.params, seed, 1e-3) for seed in range(2)])

    def optimiser(_):
        nonlocal other
        other = jax.block_until_ready(descend(other, next(gradients), np.float32(1.0), lr))[0]

    step, _ = whole_step(model, shape)
    return {"step": step, "optimiser": optimiser, "operator": both_passes(*operators(model, shape))}


def noise(shapes, seed, scale=1.0):
    """Return normal numbers in the shapes and dtypes of a tree."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draw = lambda key, x: (scale * jax.random.normal(key, x.shape)).astype(x.dtype)
    return tree.unflatten([draw(key, x) for key, x in zip(keys, leaves, strict=True)])


def both_passes(f, draw):
    """Return a run of f forward and backward, on arguments and cotangents that change between calls."""

    @jax.jit
    def program(arguments, dy):
        y, pull = jax.vjp(f, *arguments)
        return y, pull(dy)

    sets = [draw(seed) for seed in range(2)]
    turns = itertools.cycle([(x, noise(jax.eval_shape(f, *x), seed + 2)) for seed, x in enumerate(sets)])
    return lambda _: jax.block_until_ready(program(*next(turns)))


def operators(model, shape):
    """Return (f, draw) of WKV or attention in every layer, where a layer's output is a later one's input."""
    B, T, L, D = shape["batch"], shape["seq_len"], shape["num_layers"], shape["dim"]
    array = lambda *size: jax.ShapeDtypeStruct(size, model.dtype)

    def all_wkv(w_LD, u_LD, k_BTD, v_BTD):
        def layer(kv, wu):
            return (kv[1], wkv4(*wu, *kv, impl=model.wkv_impl)[0]), None

        return jax.lax.scan(layer, (k_BTD, v_BTD), (w_LD, u_LD))[0][1]

    def all_attention(q_BTHK, k_BTHK, v_BTHK):
        def layer(qkv, _):
            return (*qkv[1:], causal_attention(*qkv)), None

        return jax.lax.scan(layer, (q_BTHK, k_BTHK, v_BTHK), length=L)[0][2]

    if model.layers == ("rwkv4",):
        vectors = [jax.ShapeDtypeStruct((L, D), "float32")] * 2

        def draw(seed):
            w_LD, *rest = noise([*vectors, array(B, T, D), array(B, T, D)], seed)
            return -jnp.exp(w_LD), *rest

        return all_wkv, draw
    K = min(model.head_size, D)
    return all_attention, lambda seed: noise([array(B, T, D // K, K)] * 3, seed)


def peer(name, shape):
    """Return a step by torch and transformers: forward, backward, clip, Adam."""
    import torch
    import transformers

    D, T, V, L = shape["dim"], shape["seq_len"], shape["vocab_size"], shape["num_layers"]
    if name == "rwkv4":
        config = transformers.RwkvConfig(
            vocab_size=V, context_length=T, hidden_size=D, num_hidden_layers=L, use_cache=False
        )
        model = transformers.RwkvForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=V, n_positions=T, n_embd=D, n_layer=L, n_head=max(1, D // 64), n_inner=9 * D // 2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, tie_word_embeddings=False,
            bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    model.train()
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.99))

    def run(tokens_BT):
        tokens = torch.from_numpy(tokens_BT).long()
        logits = model(input_ids=tokens[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return run
