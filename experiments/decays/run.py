"""Decays of every layer before and after training (Fig. 10): is their pattern learned, or given by the initialisers?

The paper draws the decays exp(-exp(time_decay)) of RWKV-4 169M by layer: many near 1 in the last layers, many near 0
in the first, "partly learned", partly from the initialisers. It tests neither part.

Claim: training from decays that are equal everywhere moves the last layer's half-lives above the first layer's.
Measured: that contrast, mean log2 half-life of the last layer minus the first, with t intervals over channels.

    python -m experiments.decays.run [--model=PATH]
    python -m experiments.decays.run --preset=gpu
    python -m experiments.decays.run --smoke

`--model` also draws released weights, or any others that `rwkv_jax.load` reads: their own decays, and those that the
initialisers give at their size.

Cost: two runs of 250 steps, 2 minutes on 2 idle cores; the committed run took 9 on shared ones.

The contrast learned from the flat start:
  reproduced       it is above zero with its interval
  contradicted     it is below zero with its interval
  not resolved     the interval contains zero
The drawn pattern itself:
  same sign        the last layer has a larger share of decays above 0.9 than the first
  contradicted     it has not
  not comparable   before training, that share rose as much or more from the first to the last layer

Deviations: 4 x 128 on about a million bytes, one seed, where the figure's model is 12 x 768 after 3.3e11 tokens. In so
few steps decays hardly move, so the learned share is a lower bound. The flat start removes only the pattern of the
decays: token shift and bonus keep theirs. Its half-life is that of the mean time_decay of the released start.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import rwkv_jax
from experiments import statistics, study
from experiments.command import claim, not_run
from experiments.runs import flat, trained
from rwkv_jax.train import metrics, run_config

NEAR_ONE = 0.9
POINTS = 33  # points of each layer's sorted decays in results


def initial(model, seed: int = 0):
    """Return the released initialisers' parameters."""
    return jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]


def flattened(params):
    """Return parameters with every time_decay replaced by their mean: one half-life everywhere."""
    att = params["blocks"]["att"]
    flat_LD = jnp.full_like(att["time_decay"], att["time_decay"].mean())
    return params | {"blocks": params["blocks"] | {"att": att | {"time_decay": flat_LD}}}


def decays_of(params) -> jax.Array:
    """Return time_decay [L, D]."""
    return params["blocks"]["att"]["time_decay"]


def half_lives(x_LD) -> np.ndarray:
    """Return the tokens after which a decay of exp(-exp(x)) per token has halved a channel's sums."""
    return np.log(2) / np.exp(x_LD)


def contrast(log2_LD) -> list:
    """Return last layer minus first: the mean over channels and its t interval."""
    return [round(x, 4) for x in statistics.t_interval(log2_LD[-1] - log2_LD[0])]


def layers(x_LD) -> list[dict]:
    """Return the sorted decays of each layer in `POINTS` points, and the share of its channels above 0.9."""
    return [
        {
            "decays": np.quantile(decay_D, np.linspace(0, 1, POINTS)).round(4).tolist(),
            f"above_{NEAR_ONE}": round(float((decay_D > NEAR_ONE).mean()), 4),
        }
        for decay_D in np.exp(-np.exp(x_LD))
    ]


def told(before_LD, after_LD) -> dict:
    """Return the layers and the contrast of one model, from its time_decay before and after training."""
    before_LD, after_LD = (np.asarray(x, np.float64) for x in (before_LD, after_LD))
    before_log2_LD, after_log2_LD = (np.log2(half_lives(x)) for x in (before_LD, after_LD))
    return {
        "before": layers(before_LD),
        "after": layers(after_LD),
        "contrast_before": contrast(before_log2_LD),
        "contrast_learned": contrast(after_log2_LD - before_log2_LD),
    }


def learned(config, folder: Path) -> dict:
    """Return the decays before and after a run from the released initialisers, or from flat decays."""
    fields = config.to_dict()
    start, run = fields.pop("start"), run_config.default()
    run.update(eval_every=0, save_every=0)
    run.update_from_flattened_dict(flat(fields))
    model = rwkv_jax.build("rwkv4", vocab_size=256, **fields["model"])
    params = initial(model, run.seed)
    if start == "flat":
        params = flattened(params)
        run.finetune.model = str(folder / "flat-{num_layers}x{dim}.safetensors".format(**fields["model"]))
        folder.mkdir(parents=True, exist_ok=True)
        rwkv_jax.save(run.finetune.model, model, params)
    _, after, workdirs = trained([run], folder)
    last = metrics.logged(workdirs[-1] / "metrics.jsonl")[-1]
    return told(decays_of(params), decays_of(after)) | {"bits_per_byte": round(last["valid_bits_per_byte"], 4)}


def of_model(path: str, config, folder) -> dict:
    """Return the decays of given weights, and those that the initialisers give at their size."""
    model, params = rwkv_jax.load(path)
    if set(model.layers) != {"rwkv4"}:
        raise ValueError(f"{path} has layers {model.layers}, expected rwkv4 alone: attention has no decays")
    # compiled for the decays alone, so that no other parameter is drawn
    before_LD = jax.jit(lambda: decays_of(initial(model)))()
    return told(before_LD, decays_of(params))


def conclude(its, values: dict) -> dict:
    """Return the rows of the ledger: the drawn pattern, and its learned part."""
    config = study.config_of(its)
    released, flat = (values[study.name_of(start, 0)] for start in ("released", "flat"))
    shares = lambda layers: f"{layers[0]['above_0.9']:.0%} to {layers[-1]['above_0.9']:.0%}"
    rise = lambda layers: layers[-1]["above_0.9"] - layers[0]["above_0.9"]
    rises, drawn = rise(released["after"]) > 0, rise(released["before"]) >= rise(released["after"])
    given, (mean, low, high) = released["contrast_before"][0], flat["contrast_learned"]
    worth = flat["bits_per_byte"] - released["bits_per_byte"]
    learned = statistics.told(mean, low, high)
    size = study.size_of(its)
    return {
        "ledger": [
            claim(
                "Fig. 10, decays by layer",
                "many near 1 in the last layers, many near 0 in the first",
                f"{shares(released['after'])} of the channels above 0.9, first to last layer",
                "not comparable" if drawn else "same sign" if rises else "contradicted",
                run=size,
                details=f"before training {shares(released['before'])}",
            ),
            claim(
                "Fig. 10, learned or given",
                "partly learned, partly from the initialisers; neither tested",
                f"from equal half-lives the last layer learns {learned} doublings more than the first",
                "reproduced" if low > 0 else "contradicted" if high < 0 else "not resolved",
                run=f"{size}, {config.steps} steps",
                details=f"{given:+.2f} doublings given; equal ones cost {worth:+.3f} bits a byte",
            ),
        ],
        "not_run": [
            not_run(
                "Fig. 10 at 6 x 512 after 100 M tokens", "python -m experiments.decays.run --preset=gpu", hours=0.2
            ),
            not_run(
                "Fig. 10 of the released 169M itself",
                "python -m experiments.decays.run --model=RWKV-4-Pile-169M-20220807-8023.pth",
                hours=0.1,
                hardware="any",
                why="the released weights were not at hand",
            ),
        ],
    }


STUDY = {
    "base": {
        "model": {"num_layers": 4, "dim": 128}, "seq_len": 256, "batch_size": 16, "steps": 250, "eval_tokens": 2**17,
        "corpus": "stdlib",
    },
    "arms": {start: {"start": start} for start in ("released", "flat")},
    "measure": "bits_per_byte",
    "against": "released",
    "run": learned,
    "also": lambda model=None: {model: partial(of_model, model)} if model else {},
    "options": {"model": "weights to draw too: a .pth, a folder, or anything else that rwkv_jax.load reads"},
    "conclude": conclude,
    "presets": {
        "smoke": {
            "base": {
                "model": {"num_layers": 2, "dim": 16}, "seq_len": 32, "batch_size": 2, "steps": 10,
                "eval_tokens": 2**10,
            }
        },
        "gpu": {
            "base": {
                "model": {"num_layers": 6, "dim": 512}, "seq_len": 512, "batch_size": 32, "steps": 6100,
                "corpus": "enwik8",
            }
        },
    },
}  # fmt: skip

if __name__ == "__main__":
    study.main(**STUDY)
