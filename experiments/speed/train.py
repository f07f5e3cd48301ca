"""Training: tokens/s, model FLOP utilisation, and where the time of a step goes.

Where it goes is measured by parts: each is a program of its own at the model's exact shapes, timed in turn with the
whole step in the same run, on random numbers.

optimiser             `train.apply_gradient`: clipping, Adam, the update and its check
WKV or attention      the operator on its own, one layer after the other, forward and backward
matmuls               the model's products on their own, each fed by the one before, forward and backward: flattened
                      as the model does it, kernels float32 and rounded to the dtype of the activations
elementwise and rest  what remains of the step: norms, shifts, activations, residuals, loss, embedding, and what XLA
                      moves between layers

Two numbers say how far that can be trusted. `gradient_and_optimiser` is the sum of two separate programs, forward and
backward of the loss and the optimiser, over the whole step: 1 if programs cost what they cost inside it. On a CPU it
is about 1.1: the optimiser alone takes 250 MB of memory anew (6 x 512), page by page from the system, and inside the
step what the backward pass has freed. So "optimiser" is then an upper bound, "elementwise and rest" a lower one.
`parts_of_gradient` is operator and matmuls over forward and backward: above 1 the parts would exceed the whole.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import rwkv_jax
from experiments.speed.timing import medians, ratio
from rwkv_jax import hardware, train
from rwkv_jax.models.attention import causal_attention
from rwkv_jax.models.layers import matmul
from rwkv_jax.ops import wkv4
from rwkv_jax.train import optim

CPU = {"num_layers": 6, "dim": 512, "vocab_size": 256, "dtype": "float32", "batch": 4, "seq_len": 512}
ACCELERATOR = {"num_layers": 12, "dim": 768, "vocab_size": 50277, "dtype": "bfloat16", "batch": 8, "seq_len": 1024}
SMOKE = {"num_layers": 2, "dim": 64, "vocab_size": 256, "dtype": "float32", "batch": 2, "seq_len": 32}
ROUNDS = 7
MODELS = {"rwkv4": "WKV", "transformer": "attention"}  # and what they mix tokens with


def run(smoke):
    """Rows of speed beside others' (on a CPU), and for both models FLOPs, utilisation and the parts of a step."""
    on_cpu = jax.default_backend() == "cpu"
    shape, rounds = SMOKE if smoke else CPU if on_cpu else ACCELERATOR, 1 if smoke else ROUNDS
    models = {name: build(name, shape) for name in MODELS}
    sides = {(name, part): f for name, model in models.items() for part, f in programs(model, shape).items()}
    if on_cpu:
        sides |= {("transformers", name): peer(name, shape) for name in MODELS}
    rng, size = np.random.default_rng(0), (shape["batch"], shape["seq_len"] + 1)
    tokens = (rng.integers(0, shape["vocab_size"], size).astype(np.int32) for _ in itertools.count())
    seconds = medians(sides, tokens, rounds)

    named = hardware.peak_flops(jax.devices()[0])
    peak = named or hardware.matmul_peak()
    speed = lambda *side: shape["batch"] * shape["seq_len"] / seconds[side]
    compare = lambda ours, theirs, name, wanted: ratio(
        "training, tokens/s", ours[0], speed(*ours), name, speed(*theirs), wanted
    )
    rows = [compare(("rwkv4", "step"), ("transformer", "step"), "transformer", None)]
    if on_cpu:
        rows += [
            compare(("rwkv4", "step"), ("transformers", "rwkv4"), "transformers RwkvForCausalLM", 2.0),
            compare(("transformer", "step"), ("transformers", "transformer"), "transformers GPT-2, sdpa", 0.9),
        ]
    measured = {}
    for name, model in models.items():
        flops = hardware.flops_per_token(model, shape["seq_len"])
        times = {part: t for (side, part), t in seconds.items() if side == name}
        measured[name] = {
            "tokens_per_second": speed(name, "step"),
            "flops_per_token": flops,
            "share_of_peak": speed(name, "step") * flops / peak,
            **parts(times, MODELS[name]),
        }
    which = "data sheet, bf16" if named else "measured, float32"
    return {"shape": shape, "rows": rows, "peak_flops": peak, "peak": which, "models": measured}


def report(results):
    """What was measured besides `rows`, a line each."""
    lines = []
    for name, row in results["models"].items():
        shares = ", ".join(f"{part} {t / row['step_seconds']:.0%}" for part, t in row["parts"].items())
        lines.append(f"{name}: {row['share_of_peak']:.0%} of {results['peak_flops'] / 1e9:,.0f} GFLOP/s; {shares}")
        lines.append(
            f"  gradient and optimiser over the step {row['gradient_and_optimiser']:.2f}, "
            f"operator and matmuls over the gradient {row['parts_of_gradient']:.2f}"
        )
    return lines


def parts(seconds, operator):
    """Seconds of a step by part, and how consistent they are (see above)."""
    own = {operator: seconds["operator"], "matmuls": seconds["matmuls"]}
    known = own | {"optimiser": seconds["optimiser"]}
    return {
        "step_seconds": seconds["step"],
        "parts": own
        | {"elementwise and rest": seconds["step"] - sum(known.values()), "optimiser": known["optimiser"]},
        "gradient_and_optimiser": (seconds["gradient"] + seconds["optimiser"]) / seconds["step"],
        "parts_of_gradient": sum(own.values()) / seconds["gradient"],
    }


def build(name, shape):
    return rwkv_jax.build(name, **{k: shape[k] for k in ("num_layers", "dim", "vocab_size", "dtype")})


def programs(model, shape):
    """The whole step and its parts as functions of tokens [B, T+1], finished when they return."""
    tx = optim.optimiser()
    initial = jax.jit(train.make_init(model, tx))(jax.random.key(0))
    whole = jax.jit(train.make_step(model, tx), donate_argnums=0)
    descend = jax.jit(lambda state, *args: train.apply_gradient(tx, state, *args), donate_argnums=0)
    state, other = initial, jax.tree.map(jnp.copy, initial)
    params = jax.tree.map(jnp.copy, initial.params)
    lr = np.float32(1e-4)
    gradients = itertools.cycle([noise(params, seed, 1e-3) for seed in range(2)])

    def step(tokens_BT):
        nonlocal state
        batch = {"tokens": tokens_BT, "mask": np.ones_like(tokens_BT[:, 1:], bool)}
        state = jax.block_until_ready(whole(state, batch, lr))[0]

    def optimiser(_):
        nonlocal other
        other = jax.block_until_ready(descend(other, next(gradients), np.float32(1.0), lr))[0]

    @jax.jit
    def loss_gradient(params, tokens_BT):
        def objective(params):
            logits_BTV, _ = model.apply({"params": params}, tokens_BT[:, :-1])
            return (optim.cross_entropy(logits_BTV, tokens_BT[:, 1:]) + optim.l2wrap(logits_BTV)).mean()

        return jax.value_and_grad(objective)(params)

    return {
        "step": step,
        "gradient": lambda tokens_BT: jax.block_until_ready(loss_gradient(params, tokens_BT)),
        "optimiser": optimiser,
        "operator": both_passes(*operators(model, shape)),
        "matmuls": both_passes(*products(model, params, shape)),
    }


def noise(shapes, seed, scale=1.0):
    """Normal numbers in the shapes and dtypes of a tree."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    draw = lambda key, x: (scale * jax.random.normal(key, x.shape)).astype(x.dtype)
    return tree.unflatten([draw(key, x) for key, x in zip(keys, leaves, strict=True)])


def both_passes(f, draw):
    """f forward and backward, on arguments and cotangents that change between calls."""

    @jax.jit
    def program(arguments, dy):
        y, pull = jax.vjp(f, *arguments)
        return y, pull(dy)

    sets = [draw(seed) for seed in range(2)]
    turns = itertools.cycle([(x, noise(jax.eval_shape(f, *x), seed + 2)) for seed, x in enumerate(sets)])
    return lambda _: jax.block_until_ready(program(*next(turns)))


def operators(model, shape):
    """(f, draw) of WKV or attention in every layer: what a layer returns is a later one's input."""
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


def products(model, params, shape):
    """(f, draw) of the model's products: those of a layer in an order in which they can be chained, then the head."""
    layer = [x for path, x in jax.tree.leaves_with_path(params["blocks"]) if path[-1].key == "kernel"]
    layer.sort(key=lambda x: (x.shape[1] != x.shape[2], x.shape[1]))  # [L, D, D] first, then D to F, then F to D
    head_DV = params["head"]["kernel"]
    wide = jnp.promote_types(model.dtype, jnp.float32)

    def f(x_BTD, layer, head_DV):
        def chain(x, kernels):
            for kernel in kernels:
                x = matmul(x, kernel.astype(x.dtype), (((2,), (0,)), ((), ())))
            return x, None

        x_BTD, _ = jax.lax.scan(chain, x_BTD, layer)
        return matmul(x_BTD, head_DV.astype(model.dtype), (((2,), (0,)), ((), ())), None, wide)

    def draw(seed):
        x_BTD = jax.ShapeDtypeStruct((shape["batch"], shape["seq_len"], shape["dim"]), model.dtype)
        x_BTD, layer_, head = noise([x_BTD, layer, head_DV], seed)
        shrink = lambda kernel: kernel / kernel.shape[-2] ** 0.5  # so that every product has the scale of its input
        return x_BTD, [shrink(kernel) for kernel in layer_], shrink(head)

    return f, draw


def peer(name, shape):
    """A step by torch and transformers: forward, backward, clip, Adam."""
    import torch
    import transformers

    D, T, V = shape["dim"], shape["seq_len"], shape["vocab_size"]
    if name == "rwkv4":
        config = transformers.RwkvConfig(
            vocab_size=V, context_length=T, hidden_size=D, num_hidden_layers=shape["num_layers"], use_cache=False
        )
        model = transformers.RwkvForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=V, n_positions=T, n_embd=D, n_layer=shape["num_layers"], n_head=max(1, D // 64),
            n_inner=9 * D // 2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
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
