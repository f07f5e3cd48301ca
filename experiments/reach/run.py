"""Reach: how far back in the text the gradient of a prediction goes in a trained RWKV-4.

Claim: gradients of RWKV neither explode nor vanish along time (the paper, appendix H). The paper's proof is about WKV
alone: derivatives with respect to W_v and W_k are a mean and a covariance under the weights, hence bounded at any
length; `tests/ops/test_wkv4_properties.py` checks both identities. This experiment measures a whole model: the norm of
the gradient of one prediction's loss with respect to the embedding of the token n places earlier, against n.

    python -m experiments.reach.run                   200 steps of 2 x 64 on the embedded corpus, then 1,024 bytes back
    python -m experiments.reach.run --smoke --out=DIR

Cost: 3 minutes on 2 cores.

The paper has no number. Verdict by the mean norm over held-out files and over the farther half of n, relative to the
nearest 8:
  *same sign*       below 1, and above 1e-7, float32's rounding
  *contradicted*    above 1: it grows with the distance
  *not resolved*    otherwise. The paper proves something else, so *reproduced* is not among the verdicts.

Deviations: a byte model of 141 thousand parameters after 0.8 M bytes, one seed. Training had windows of 128 bytes, so
decays slow enough to reach over 1,000 bytes come from the initialiser.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import command
from experiments.runs import trained
from rwkv_jax import data
from rwkv_jax.command import end
from rwkv_jax.train import optim, run_config

HERE = Path(__file__).parent
NEAREST = 8  # places whose mean norm is the unit: single ones depend on the length of their embedding
ROUNDING = 1e-7
SHARE = 0.95


@dataclass(frozen=True)
class Preset:
    text: str = "stdlib"
    num_layers: int = 2
    dim: int = 64
    seq_len: int = 128
    batch_size: int = 32
    steps: int = 200
    back: int = 1024  # tokens read before the prediction
    files: int = 48  # maximum number of held-out files
    points: int = 40  # points of the curve in results


PRESETS = {
    "smoke": Preset(num_layers=1, dim=16, seq_len=16, batch_size=2, steps=4, back=64, files=4, points=8),
    "cpu": Preset(),
}


def norms(model, params, tokens_BT) -> np.ndarray:
    """Return the norms [B, T - 1] of gradients by the inputs' embeddings, the last input first.

    Entry n is the norm of dL/d emb of the input n before the last, with L in nats on the last token.
    """
    inputs_BT, last_B = tokens_BT[:, :-1], tokens_BT[:, -1]
    rows_BTD = params["emb"]["embedding"][inputs_BT]
    apart = model.clone(vocab_size=inputs_BT.size)  # every input has an embedding of its own

    @jax.jit
    @jax.grad
    def gradient(rows_ND):
        own = params | {"emb": {"embedding": rows_ND}}
        x_BTD, _ = apart.apply({"params": own}, jnp.arange(inputs_BT.size).reshape(inputs_BT.shape), method="hidden")
        logits_BV = model.apply({"params": params}, x_BTD[:, -1], method="logits")
        return optim.cross_entropy(logits_BV, last_B).sum()

    gradient_ND = gradient(rows_BTD.reshape(-1, model.dim))
    return np.linalg.norm(gradient_ND.reshape(rows_BTD.shape), axis=-1)[:, ::-1]


def beginnings(split: data.Split, files: int, length: int) -> np.ndarray:
    """Return [files, length]: the first tokens of documents that are long enough."""
    lengths = np.diff(split.starts, append=len(split.tokens))
    starts = np.asarray(split.starts)[lengths >= length][:files]
    if not len(starts):
        raise ValueError(
            f"no held-out document has {length} tokens, as `back` requires; the longest has {lengths.max()}"
        )
    return np.stack([split.tokens[start : start + length] for start in starts]).astype(np.int32)


def config_of(preset):
    config = run_config.default()
    config.model.update(num_layers=preset.num_layers, dim=preset.dim)
    config.update(corpus=preset.text, seq_len=preset.seq_len, batch_size=preset.batch_size, steps=preset.steps)
    config.update(log_every=max(1, preset.steps // 20), eval_every=0, save_every=0)
    return config


def cells(preset, folder) -> command.Cells:
    def reach():
        model, params, _ = trained([config_of(preset)], folder)
        tokens_BT = beginnings(data.prepare(preset.text, "bytes").valid, preset.files, preset.back + 1)
        return curve(norms(model, params, tokens_BT), preset.points) | {"files": len(tokens_BT)}

    return {"reach": reach}


def curve(norms_BT, points: int) -> dict:
    """Return means over rows in groups of n, relative to the nearest, and the reach of a share of their sum."""
    mean_T = norms_BT.mean(axis=0, dtype=np.float64)
    near = mean_T[:NEAREST].mean()
    edges = np.unique(np.geomspace(1, len(mean_T), points).round().astype(int))
    groups = [slice(low, high) for low, high in zip([0, *edges[:-1]], edges, strict=True)]
    spread = lambda q: [float(np.quantile(norms_BT[:, g].mean(axis=1), q) / near) for g in groups]
    total = np.cumsum(mean_T) / mean_T.sum()
    return {
        "lag": [(g.start + g.stop - 1) / 2 for g in groups],
        "mean": [float(mean_T[g].mean() / near) for g in groups],
        "low": spread(0.1),
        "high": spread(0.9),
        "reach": int(np.searchsorted(total, SHARE)),
        "far": float(mean_T[len(mean_T) // 2 :].mean() / near),
    }


def conclude(preset, values) -> dict:
    its = values["reach"]
    at = lambda n: its["mean"][int(np.argmin(np.abs(np.array(its["lag"]) - n)))]
    falls = ", ".join(f"{at(n):.1e} at {n}" for n in (10, 100, 1000) if n < preset.back)
    return {
        "ledger": [
            {
                "artefact": "Gradient along time (appendix H)",
                "paper": "neither explodes nor vanishes; no number",
                "ours": f"{its['far']:.1e} of the nearest's norm over the farther half of {preset.back} bytes",
                "details": f"norm by the embedding n bytes before, of the mean over the nearest {NEAREST}: {falls}; "
                f"{SHARE:.0%} of the sum within {its['reach']} bytes",
                "verdict": verdict(its["far"]),
            }
        ]
    }


def verdict(far: float) -> str:
    if far > 1:
        return "contradicted"
    return "same sign" if far > ROUNDING else "not resolved"


if __name__ == "__main__":
    end(command.main(HERE, __doc__, PRESETS, cells, conclude))
