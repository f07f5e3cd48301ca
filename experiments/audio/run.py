"""Endless audio: minutes of sound continued from a state of fixed size, by a small RWKV-4 that reads samples as bytes.

Claim: none of the paper's. A byte model reads any bytes: here those of generated music (mu-law, 4 kHz), which no text
prior helps with. What is told is bits per sample of held-out music beside n-grams of the same bytes, and that minutes
of continuation take the memory of the first sample: the state's bytes at the beginning and at the end.

    python -m experiments.audio.run                   2 x 64, 2.5 M samples (10 minutes of music), 3 minutes continued
    python -m experiments.audio.run --smoke --out=DIR

Cost: 4 minutes on 2 cores. Sound is left in runs/audio/cpu: `minutes.wav`, and `continued.wav`, of which a copy is
here: 5 s of held-out music, the 10 s that the model continues it with, and after a pause the last 10 s.

The verdict is *not comparable* whatever comes out: the paper has no such experiment, and music that a score of
forty lines makes says nothing about recordings. What is heard in the kept run is a bass and one tone that wanders
over it, in noise: neither the notes nor the chords of the score. Its speed was measured beside other programs.
"""

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import rwkv_jax
from experiments import command, tasks
from experiments.audio import music
from experiments.compare import baselines
from rwkv_jax import evaluate
from rwkv_jax.train import optim

HERE = Path(__file__).parent
TRAIN_SEED, TEST_SEED = 0, 1  # of the score
COLUMNS, HIGHEST = 120, 128  # of a spectrogram kept in the results: 120 times, 0 to 1 kHz at 4 kHz


@dataclass(frozen=True)
class Preset:
    rate: int = 4000  # samples a second
    num_layers: int = 2
    dim: int = 64
    seq_len: int = 512
    batch_size: int = 8
    steps: int = 600  # of which all together read the training music once
    test_seconds: float = 60.0
    prompt_seconds: float = 5.0
    seconds: float = 180.0  # continued
    excerpt_seconds: float = 10.0
    piece: int = 4000  # samples drawn in one call
    seed: int = 0


PRESETS = {
    "smoke": Preset(
        1000, 1, 16, 32, 2, steps=8, test_seconds=2, prompt_seconds=1, seconds=2, excerpt_seconds=1, piece=500
    ),
    "cpu": Preset(),
}


def training_bytes(preset) -> np.ndarray:
    return music.encoded(music.music(TRAIN_SEED, preset.steps * preset.batch_size * preset.seq_len + 1, preset.rate))


def test_bytes(preset) -> np.ndarray:
    return music.encoded(music.music(TEST_SEED, round(preset.test_seconds * preset.rate), preset.rate))


def learn(preset, path: Path) -> dict:
    """Train, save to `path`, and bits per sample of held-out music under the model and under n-grams."""
    train_N, test_N = training_bytes(preset), test_bytes(preset)
    B, T = preset.batch_size, preset.seq_len
    row_N = np.random.default_rng(preset.seed).permutation(preset.steps * B)

    def batch_of(step):
        starts_B1 = T * row_N[step * B : (step + 1) * B, None]
        return {"tokens": train_N[starts_B1 + np.arange(T + 1)].astype(np.int32), "mask": np.ones((B, T), bool)}

    model = rwkv_jax.build("rwkv4", vocab_size=256, num_layers=preset.num_layers, dim=preset.dim)
    lr = optim.default_lr("rwkv4", preset.dim)
    params, _ = tasks.fit(model, batch_of, lr=lr, steps=preset.steps, seed=preset.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    rwkv_jax.save(path, model, params)

    stream_N = np.concatenate([[0], test_N])  # the protocols want a separator first
    bits = lambda nats_N: float(np.mean(nats_N[1:], dtype=np.float64) / np.log(2))
    carried_N = evaluate.carried(model, params, stream_N, np.zeros(1, int), T, 1)
    return {
        "lr": lr,
        "training_samples": len(train_N) - 1,
        "test_samples": len(test_N),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "bits_per_sample": {
            "state carried": bits(carried_N),
            "windows": bits(evaluate.windows(model, params, stream_N, T, B)),
            **{f"{n}-gram": float(b.mean()) for n, b in enumerate(baselines.ngram_bits(train_N[None], test_N), 1)},
        },
    }


def continuation(model, params, prompt_N, num_samples: int, seed: int, piece: int):
    """(bytes [num_samples] drawn at temperature 1 after the prompt, the state before them and after all drawn, samples
    a second); drawn are whole pieces, of which the first is not timed."""
    model, params = model.clone(scan=False), rwkv_jax.unstack(params)

    before, logits_BV = _read(model, params, prompt_N[None].astype(np.int32))
    state, pieces, began = before, [], time.perf_counter()
    with tqdm(total=num_samples, unit="sample", unit_scale=True, disable=None, leave=False) as bar:
        for i in range(-(-num_samples // piece)):
            key = jax.random.fold_in(jax.random.key(seed), i)
            (state, logits_BV), drawn = _draw(model, piece, params, state, logits_BV, key)
            pieces.append(np.asarray(drawn))
            bar.update(piece)
            if i == 0:
                began = time.perf_counter()  # the first call compiles
    speed = piece * (len(pieces) - 1) / (time.perf_counter() - began)
    return np.concatenate(pieces)[:num_samples], before, state, speed


@partial(jax.jit, static_argnums=0)
def _read(model, params, tokens_BT):
    x_BTD, state = model.apply({"params": params}, tokens_BT, method="hidden")
    return state, model.apply({"params": params}, x_BTD[:, -1], method="logits")


@partial(jax.jit, static_argnums=(0, 1))
def _draw(model, piece, params, state, logits_BV, key):
    def sample(carry, uniform):
        state, logits_BV = carry
        below = jnp.cumsum(jax.nn.softmax(logits_BV), axis=-1) < uniform
        token_B1 = jnp.minimum(below.sum(axis=-1, keepdims=True), model.vocab_size - 1)
        logits_BTV, state = model.apply({"params": params}, token_B1, state)
        return (state, logits_BTV[:, 0]), token_B1[0, 0].astype(jnp.uint8)

    return jax.lax.scan(sample, (state, logits_BV), jax.random.uniform(key, piece))


def play(preset, path: Path) -> dict:
    """Minutes after a prompt of held-out music: sound files beside the model, and what the results keep of them."""
    model, params = rwkv_jax.load(path)
    count = lambda seconds: round(seconds * preset.rate)
    prompt_N = test_bytes(preset)[: count(preset.prompt_seconds)]
    drawn_N, before, after, speed = continuation(
        model, params, prompt_N, count(preset.seconds), preset.seed, preset.piece
    )
    prompt, sound, size = music.decoded(prompt_N), music.decoded(drawn_N), count(preset.excerpt_seconds)
    music.write_wav(path.with_name("minutes.wav"), sound, preset.rate)
    pause = np.zeros(count(0.5))
    music.write_wav(
        path.with_name("continued.wav"), np.concatenate([prompt, sound[:size], pause, sound[-size:]]), preset.rate
    )
    excerpts = {
        "held-out music": music.decoded(test_bytes(preset)[:size]),
        "the first seconds of its continuation": sound[:size],
        "the last": sound[-size:],
    }
    return {
        "samples": len(drawn_N),
        "samples_per_second": round(speed),
        "state_bytes": [sum(x.nbytes for x in jax.tree.leaves(state)) for state in (before, after)],
        "loudness": [round(float(np.sqrt(np.mean(part**2))), 4) for part in np.array_split(sound, 18)],
        "spectrograms": {name: digits(music.spectrogram(s, COLUMNS, HIGHEST)) for name, s in excerpts.items()},
    }


def digits(decibels) -> list[str]:
    """A row of decibels as a string, a character for each: 0 for -60 dB, z for 0, so that results stay small."""
    level = np.round((decibels + 60) / 60 * 35).astype(int)
    return ["".join("0123456789abcdefghijklmnopqrstuvwxyz"[i] for i in row) for row in level]


def cells(preset, folder) -> command.Cells:
    path = folder / "rwkv4.safetensors"
    return {"model": partial(learn, preset, path), "sound": partial(play, preset, path)}


def conclude(preset, values) -> dict:
    bits, sound = values["model"]["bits_per_sample"], values["sound"]
    begin, end = sound["state_bytes"]
    best = min((name for name in bits if "gram" in name), key=bits.get)
    return {
        "ledger": [
            {
                "artefact": "Endless audio",
                "paper": "not in the paper",
                "ours": f"bits per sample of held-out music {bits['state carried']:.2f} with the state carried, "
                f"{bits['windows']:.2f} in windows of {preset.seq_len}, 6-gram {bits['6-gram']:.2f}, the best n-gram "
                f"({best}) {bits[best]:.2f}; {preset.seconds / 60:.2g} minutes continued, {begin:,} bytes of state at "
                f"the beginning and {end:,} at the end, {sound['samples_per_second'] / preset.rate:.1f} times as fast "
                "as it sounds",
                "verdict": "not comparable",
            }
        ]
    }


if __name__ == "__main__":
    sys.exit(command.main(HERE, __doc__, PRESETS, cells, conclude))
