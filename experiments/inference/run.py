"""Seconds a token and bytes of memory against context: RWKV-4, and a transformer with and without a cache.

Claims: a token of RWKV-4 costs the same time and memory after any context (Table 1; Figs. 7, 13, 14: 3B in a straight
line to about 10 to 15 s for 1,000 tokens where transformers of its size curve up to 45 to 65 s; less memory for 512
tokens than any of them). Not in the paper but said of this project: it is 10 times as fast at 4,096 tokens and 100
times at 32,768. If reading memory takes all the time, both factors follow from a law: a token reads W = V D + 13 D^2 L
weights once for all B texts, and a cached transformer 2 T D L numbers of keys and values for each text, so that

    ratio(T, B) = 1 + 2 B T D L / W

    python -m experiments.inference.run                   6 x 512, V 256, float32
    python -m experiments.inference.run --preset=gpu      169M, float32, random weights; latency alone
    python -m experiments.inference.run --preset=paper    3B and 7B too, to 131,072 tokens, and training
    python -m experiments.inference.run --smoke --out=DIR

Latency is measured over some tokens after a filled context. A cache is filled with noise, and attention reads the
filled part only. RWKV-4 reads its context, up to `read_tokens`, and continues from that state beyond (`gpu` reads
nothing). The transformer without a cache recomputes the whole text for each token. Cumulative time is the integral of
latency over positions, checked by generating tokens one by one. Memory is what a token needs beside the parameters:
state and XLA's temporaries. Caches above `memory_share` of the memory that parameters leave are skipped, and listed by
name. The training half of Table 1: tokens/s and XLA's temporary memory of a step against T, at equal B T.

Cost: 16 minutes on 2 CPU cores, alone on the machine; `gpu` a minute of one H100 once its programs are compiled;
`paper`, estimated, 30 minutes. The programs of `gpu` were compiled with XLA_FLAGS=--xla_gpu_autotune_level=0, which
may make a token slower. Training steps compiled this way were 14 times slower than in experiments/speed/pile.json, for
an unknown reason; they were discarded, and `gpu` trains nothing.

Constant time and memory of RWKV-4:
  reproduced       the slowest position is within 25 % of the fastest, and memory is equal at all positions
  contradicted     positions are 50 % apart, or memory differs
  not resolved     in between, because timing noise of a shared machine alone can reach that (this last rule was added
                   after a spread of 1.26)
The two factors:
  no claim         they are not the paper's; reported is the ratio at batch 1 against the cached transformer
Seconds for 1,000 tokens, of the preset's first size:
  not comparable   for anything smaller than 3B, because the law above gives small models another ratio
  at 3B            reproduced if the cached transformer takes at least 3 times as long, same sign if it takes longer,
                   else contradicted
Memory for 512 tokens, of the preset's first size:
  reproduced       RWKV-4 needs the least; else contradicted
Training against T:
  reproduced       RWKV-4 keeps 0.75 or more of its tokens/s from the shortest to the longest T, the transformer less
                   than RWKV-4; same sign if only the latter; else contradicted

Deviations: byte vocabulary and small shapes on a CPU; our transformer, not BLOOM, OPT, GPT-Neo or Pythia; the paper
does not say whether its baselines used a cache.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import rwkv_jax
from experiments import command, study
from experiments.inference import conclusions
from experiments.speed.decode import at_context, greedy, memory_bytes, state_bytes, total_bytes
from rwkv_jax import generate, models, train
from rwkv_jax.command import end
from rwkv_jax.train import optim

HERE = Path(__file__).parent
ARMS = ("rwkv4", "transformer", "transformer+shift")
SHIFTED, UNCACHED = conclusions.SHIFTED, conclusions.UNCACHED


@dataclass(frozen=True)
class Shape:
    num_layers: int
    dim: int
    vocab_size: int
    batches: tuple = (1,)


@dataclass(frozen=True)
class Preset:
    shapes: dict
    training: Shape
    dtype: str = "float32"  # of inference
    training_dtype: str = "float32"
    positions: tuple = (0, 512, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    shift_positions: tuple = (512, 4096, 32768)  # of the transformer with token shift, at the first batch only
    tokens: int = 32  # timed after each position
    rounds: int = 2  # the fastest counts
    read_tokens: int = 2**15  # tokens that RWKV-4 actually reads, summed over a batch
    uncached: tuple = (512, 2048)
    uncached_tokens: int = 2**14  # maximum per batch
    direct: int = 2048
    memory_share: float = 0.5
    lengths: tuple = (256, 2048, 8192)  # of training; none: no training
    step_tokens: int = 8192  # B T of training
    wkv: tuple = ("scan", "associative")  # forms of WKV in training
    shifted: bool = True  # whether the transformer with token shift runs too


NEOX = 50277
SMOKE = Preset(
    shapes={"1x32": Shape(1, 32, 64)}, training=Shape(1, 32, 64), positions=(512,), tokens=2, rounds=1,
    read_tokens=512, uncached=(512,), direct=256, lengths=(32,), step_tokens=64, wkv=("scan",), shifted=False,
)  # fmt: skip
CPU = Preset(shapes={"6x512": Shape(6, 512, 256, (1, 8, 32))}, training=Shape(4, 256, 256))
GPU = Preset(
    shapes={"169M": Shape(12, 768, NEOX, (1, 16))}, training=Shape(12, 768, NEOX), positions=(0, 512, 4096, 32768),
    read_tokens=0, direct=1024, memory_share=0.8, lengths=(), shifted=False,
)  # fmt: skip
PAPER = Preset(
    shapes=GPU.shapes | {"3B": Shape(32, 2560, NEOX, (1, 8)), "7B": Shape(32, 4096, NEOX, (1, 8))},
    training=Shape(12, 768, NEOX), training_dtype="bfloat16", step_tokens=2**15, wkv=("associative", "pallas"),
    positions=(0, 512, 4096, 32768, 131072), uncached=(512, 4096),
)  # fmt: skip
PRESETS = {"smoke": SMOKE, "cpu": CPU, "gpu": GPU, "paper": PAPER}


def built(shape: Shape, dtype, arm, **fields):
    its = {"num_layers": shape.num_layers, "dim": shape.dim, "vocab_size": shape.vocab_size, "dtype": dtype}
    return rwkv_jax.build(**study.MODELS[arm]["model"], **its, **fields)


def random_parameters(model):
    """Return noise for every parameter, drawn on the device: the initialisers would take minutes for 7B."""
    shapes = models.parameter_shapes(model)
    draw = jax.jit(lambda key, like: 0.02 * jax.random.normal(key, like.shape, like.dtype), static_argnums=1)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(shapes))))
    return jax.tree.map(lambda like: draw(next(keys), like), shapes)


def cache_limit(preset, params) -> int:
    """Return the bytes that a state may take."""
    return int(preset.memory_share * (memory_bytes() - total_bytes(params)))


def room(count) -> int:
    """Return the cache slots for `count` tokens, as generation allocates them."""
    return generate.CACHE_STEP * math.ceil(count / generate.CACHE_STEP)


def filled(model, batch, position, slots):
    """Return a transformer's state after `position` tokens, its caches full of noise."""
    shapes = jax.eval_shape(lambda: model.init_state(batch, max_length=slots))
    block = jax.random.normal(jax.random.key(2), (generate.CACHE_STEP, *shapes[0].cache.k_BHSK.shape[3:]))

    @jax.jit
    def make():
        noise = lambda x: jnp.broadcast_to(jnp.tile(block, (slots // len(block), 1)).astype(x.dtype), x.shape)
        return jax.tree.map(lambda x: noise(x) if x.ndim == 4 else jnp.zeros(x.shape, x.dtype), shapes)

    return at_context(make(), position)


def program(model, params, state):
    """Return (compiled decoding of some tokens from states of that shape, its bytes beside the parameters)."""
    compiled = greedy.lower(model, params, state, first_token(state), 1).compile()
    plan = compiled.memory_analysis()
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return compiled, held + plan.temp_size_in_bytes - total_bytes(params)


def first_token(state):
    return jnp.zeros((len(jax.tree.leaves(state)[0]), 1), jnp.int32)


def timed(run, *args):
    """Return (seconds, result of `run`)."""
    began = time.perf_counter()
    result = jax.block_until_ready(run(*args))
    return time.perf_counter() - began, result


def decoded(compiled, params, state, position, count, rounds):
    """Return (seconds of `count` tokens after `position`, the state after them), the fastest of `rounds`."""
    token_B1, times = first_token(state), []
    for n in [1] + [count] * rounds:  # one token first, to warm up
        seconds, (_, state) = timed(compiled, params, at_context(state, position), token_B1, n)
        times.append(seconds)
    return min(times[1:]), state


def latency(preset, shape, arm, batch) -> dict:
    """Return the seconds a token, state bytes and memory beside the parameters, at every position that fits."""
    model = built(shape, preset.dtype, arm, scan=False)
    params = random_parameters(model)
    limit, rng = cache_limit(preset, params), np.random.default_rng(0)
    rows, left_out, past, read, programs = [], [], None, 0, {}
    positions = preset.shift_positions if arm == SHIFTED else preset.positions
    for position in tqdm(positions, desc=f"{arm}, batch {batch}", disable=None, leave=False):
        if arm == "rwkv4":
            if position * batch <= preset.read_tokens and position > read:
                tokens = rng.integers(0, model.vocab_size, (batch, position - read)).astype(np.int32)
                past, read = generate.read(model, params, tokens, past), position
            state, slots = jax.tree.map(jnp.copy, past.state) if past else model.init_state(batch), None
        else:
            slots = room(position + preset.tokens)
            wanted = total_bytes(jax.eval_shape(lambda slots=slots: model.init_state(batch, max_length=slots)))
            if wanted > limit:
                left_out.append({"position": position, "state_bytes": wanted})
                continue
            state = filled(model, batch, position, slots)
        if slots not in programs:
            programs = {slots: program(model, params, state)}
        compiled, beside = programs[slots]
        held = state_bytes(state, position)
        seconds, state = decoded(compiled, params, state, position, preset.tokens, preset.rounds)
        del state
        row = {"position": position, "seconds": seconds / preset.tokens, "state_bytes": held, "memory_bytes": beside}
        rows.append(row | ({"read": read} if arm == "rwkv4" else {}))
    return {"parameter_bytes": total_bytes(params), "limit_bytes": limit, "rows": rows, "left_out": left_out}


def without_cache(preset, shape, batch) -> dict:
    """Return the seconds of one more token after each context, with everything recomputed."""
    model = built(shape, preset.dtype, "transformer")
    params = random_parameters(model)

    @jax.jit
    def last(params, tokens_BT):
        x_BTD, _ = model.apply({"params": params}, tokens_BT, method="hidden")
        return model.apply({"params": params}, x_BTD[:, -1], method="logits").argmax(-1)

    rows = []
    for position in preset.uncached:
        if position * batch > preset.uncached_tokens:
            continue
        tokens_BT = np.random.default_rng(0).integers(0, model.vocab_size, (batch, position)).astype(np.int32)
        compiled = last.lower(params, tokens_BT).compile()
        beside = compiled.memory_analysis().temp_size_in_bytes
        seconds = min(timed(compiled, params, tokens_BT)[0] for _ in range(1 + preset.rounds))
        rows.append({"position": position, "seconds": seconds, "state_bytes": 0, "memory_bytes": beside})
    return {"rows": rows}


def generated(preset, shape, arm) -> dict:
    """Return the cumulative seconds of generating one text token by token, its cache growing as that of `generate`."""
    model = built(shape, preset.dtype, arm, scan=False)
    params, step = random_parameters(model), generate.CACHE_STEP
    state, total, rows = model.init_state(1, max_length=step), 0.0, [{"position": 0, "seconds": 0.0}]
    compiled = None
    for position in range(0, preset.direct, step):
        if arm != "rwkv4":
            state = filled(model, 1, position, position + step)
        if arm != "rwkv4" or compiled is None:
            compiled, _ = program(model, params, state)
        seconds, state = decoded(compiled, params, state, position, step, 1)
        total += seconds
        rows.append({"position": position + step, "seconds": total})
    return {"rows": rows}


def trained(preset, arm, wkv=None) -> dict:
    """Return the tokens/s of a training step and its temporary memory, activations and gradients, at every length."""
    rows = []
    for length in tqdm(preset.lengths, desc=f"training, {arm}", disable=None, leave=False):
        model, tx = built(preset.training, preset.training_dtype, arm, wkv_impl=wkv), optim.optimiser()
        state = jax.jit(train.make_init(model, tx))(jax.random.key(0))
        shape = (preset.step_tokens // length, length + 1)
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, shape).astype(np.int32)
        batch, lr = {"tokens": tokens, "mask": np.ones_like(tokens[:, 1:], bool)}, np.float32(1e-4)
        compiled = jax.jit(train.make_step(model, tx), donate_argnums=0).lower(state, batch, lr).compile()
        times = []
        for _ in range(1 + preset.rounds):
            seconds, (state, _) = timed(compiled, state, batch, lr)
            times.append(seconds)
        temporary = compiled.memory_analysis().temp_size_in_bytes
        rows.append({"T": length, "tokens_per_second": tokens[:, 1:].size / min(times), "temporary_bytes": temporary})
    return {"parameter_bytes": total_bytes(state.params), "rows": rows}


def cells(preset, workdir):
    asked = {}
    for name, shape in preset.shapes.items():
        for batch in shape.batches:
            arms = [arm for arm in ARMS if arm != SHIFTED or (preset.shifted and batch == shape.batches[0])]
            for arm in arms:
                asked[f"{name}, {arm}, batch {batch}"] = partial(latency, preset, shape, arm, batch)
            if batch * min(preset.uncached) <= preset.uncached_tokens:
                asked[f"{name}, {UNCACHED}, batch {batch}"] = partial(without_cache, preset, shape, batch)
    name, shape = next(iter(preset.shapes.items()))
    for arm in ("rwkv4", "transformer"):
        asked[f"{name}, {arm}, generated"] = partial(generated, preset, shape, arm)
    if preset.lengths:
        for wkv in preset.wkv:
            asked[f"training, rwkv4, {wkv}"] = partial(trained, preset, "rwkv4", wkv)
        for arm in ("transformer", SHIFTED) if preset.shifted else ("transformer",):
            asked[f"training, {arm}"] = partial(trained, preset, arm)
    return asked


if __name__ == "__main__":
    end(command.main(HERE, __doc__, PRESETS, cells, conclusions.conclude))
