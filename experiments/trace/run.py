"""Causal tracing of where a model stores, carries and reads out a fact (Fig. 11), over many facts, with controls.

The paper traces one prompt in RWKV-4 430M: noise on the embeddings of "The Eiffel Tower", and at one token and layer
the clean state and activation restored. The answer comes back from layer 4 of 24 at the subject, and from layer 20 or
so at the words after it; one prompt, no interval, no control, noise not stated.

Claim: the values that bring the answer back lie deeper at the words after the subject than at its end, and at those
words the recurrent state carries them. Measured in a small model that has memorised generated facts: the average
indirect effect (probability of the answer with one place restored minus that without) of the residual stream, of the
state, and of both. The noise is 3 standard deviations of the embedding's entries, as in ROME (Meng et al., 2022).

    python -m experiments.trace.run
    python -m experiments.trace.run --model=PATH --facts=FILE
    python -m experiments.trace.run --sweep           learning rate of the small model
    python -m experiments.trace.run --smoke --out=DIR

`--model` also traces released weights, or any that `rwkv_jax.load` reads, on a JSON list of {"subject", "prompt",
"attribute"}, such as ROME's known_1000.json: those facts whose answer the model finds, up to 100 of them.

Cost: 4 minutes on 2 cores. RWKV-4 430M on a CPU: some minutes a fact.

  same sign      the mean depth of the effect of both is greater at the words after the subject than at its last token
                 (bootstrap interval over facts); at those words the effect of both is greater than that of the
                 residual stream alone (t interval over facts)
  contradicted   less
  not resolved   the interval contains zero
Controls: noise on as many other tokens; the mean effect of all places.

Deviations: a model of a few layers that knows nothing but the answers to its facts. Depth is in shares of the layers,
each weighted by its effect where that is above zero.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import rwkv_jax
from experiments import command, stamp, sweeps, tasks
from experiments.results import write_json
from experiments.statistics import told, verdict
from experiments.trace import averages, facts, tracing
from rwkv_jax import interop
from rwkv_jax.command import end
from rwkv_jax.data import tokenizers
from rwkv_jax.files import read_json

HERE = Path(__file__).parent
RECALL = 0.99


@dataclass(frozen=True)
class Preset:
    num_layers: int = 6
    dim: int = 64
    vocab_size: int = 1024
    subjects: int = 500
    batch_size: int = 256
    steps: int = 600  # maximum: training ends at a recall of `RECALL`
    traced: int = 100  # facts
    noises: int = 10
    noise: float = 3.0  # in standard deviations of the embedding's entries
    rows: int = 480  # runs at a time
    lr: float | None = None  # None: the best of sweep.json
    seed: int = 0


PRESETS = {
    "smoke": Preset(2, 16, 64, subjects=4, batch_size=8, steps=10, traced=3, noises=2, lr=1e-2),
    "cpu": Preset(),
}


def rows_of(prompts: facts.Prompt) -> dict:
    """Return prompts and answers as training batches.

    The state is reset after the padding, and only the answer counts.
    """
    P, T = prompts.tokens_T.shape
    return {
        "tokens": np.concatenate([prompts.tokens_T, prompts.answer[:, None]], axis=1),
        "mask": np.tile(np.arange(T) == T - 1, (P, 1)),
        "reset": prompts.valid_T.cumsum(axis=1) == 1,
    }


def prompts_of(preset: Preset) -> facts.Prompt:
    return facts.everything(facts.world(preset.subjects, preset.vocab_size, preset.seed))


@partial(jax.jit, static_argnums=0)
def found(model, params, prompts):
    """Return [P]: True where the model's greedy token after a prompt is its answer."""
    x_PTD, _ = model.apply({"params": params}, prompts.tokens_T, valid_BT=prompts.valid_T, method="hidden")
    logits_P1V = model.apply({"params": params}, x_PTD[:, -1:], method="logits")
    return logits_P1V[:, 0].argmax(-1) == prompts.answer


def learn(preset: Preset, lr: float):
    """Train until the model knows its facts; return (model, params, share of the facts recalled at each test)."""
    prompts = prompts_of(preset)
    rows = rows_of(prompts)
    model = rwkv_jax.build("rwkv4", vocab_size=preset.vocab_size, num_layers=preset.num_layers, dim=preset.dim)

    def batch(step):
        chosen = np.random.default_rng([preset.seed, step]).integers(len(rows["mask"]), size=preset.batch_size)
        return {name: x[chosen] for name, x in rows.items()}

    def look(step, params):
        share = round(float(found(model, params, prompts).mean()), 4)
        return [step, share], share >= RECALL

    kw = {"lr": lr, "steps": preset.steps, "seed": preset.seed, "every": max(1, preset.steps // 30), "look": look}
    params, seen = tasks.fit(model, batch, **kw)
    return model, params, seen


def learned(preset: Preset, folder: Path) -> dict:
    """Train the small model and save it as a file; return its recall and learning rate."""
    model, params, seen = learn(preset, lr_of(preset))
    folder.mkdir(parents=True, exist_ok=True)
    rwkv_jax.save(folder / "model.safetensors", model, params)
    return {"recall": seen, "lr": lr_of(preset)}


def traced(model, params, prompts: facts.Prompt, preset: Preset) -> dict:
    """Return indirect effects by kind, role and layer over facts that the model knows, with their controls."""
    rng = np.random.default_rng(preset.seed)
    known = rng.permutation(np.flatnonzero(found(model, params, prompts)))[: preset.traced]
    if len(known) < 2:
        raise ValueError(f"the model finds the answers of {len(known)} facts, expected at least 2")
    sd = preset.noise * float(jnp.asarray(params["emb"]["embedding"], jnp.float32).std())
    one = lambda number: trace_one(model, params, jax.tree.map(lambda x: x[number], prompts), sd, rng, preset)
    probabilities, places, effects = zip(*map(one, tqdm(known, desc="facts", disable=None)), strict=True)
    named = lambda names, values: dict(zip(names, values, strict=True))
    effect_FKRL = np.array(effects)
    return {
        "facts": len(known),
        "of": len(prompts.answer),
        "noise": sd,
        "probability": named(("clean", "subject corrupted", "others corrupted"), averages.over_facts(probabilities)),
        "random_place": named(tracing.KINDS, averages.over_facts(places)),
        "effect": {
            kind: named(averages.ROLES, map(averages.over_facts, effect_FKRL[:, k].swapaxes(0, 1)))
            for k, kind in enumerate(tracing.KINDS)
        },
        "deeper": averages.deeper(effect_FKRL, preset.seed),
        "by_state": averages.by_state(effect_FKRL),
    }


def trace_one(model, params, prompt: facts.Prompt, sd: float, rng, preset: Preset):
    """Trace one fact; return probabilities, mean effect of all places [kinds], effect by role [kinds, roles, L].

    The probabilities of its answer are clean, with the subject noisy, and with other tokens noisy.
    """
    shape = (preset.noises, len(prompt.tokens_T), model.dim)
    noise_NTD = sd * rng.standard_normal(shape, np.float32)
    noise_on = lambda chosen_T: noise_NTD * chosen_T[:, None]
    seen = tracing.effects(model, params, prompt, noise_on(prompt.subject_T), preset.rows)
    others_N = tracing.corrupted(model, params, prompt, noise_on(averages.other_tokens(prompt, rng)))
    effect_KTL = np.mean(seen.restored - seen.corrupted[:, None, None, None], axis=0)
    of_all_places = effect_KTL[:, prompt.valid_T].mean((1, 2))
    probabilities = [seen.clean, seen.corrupted.mean(), others_N.mean()]
    return probabilities, of_all_places, averages.by_role(effect_KTL, averages.roles(prompt))


def of_world(preset: Preset, folder: Path) -> dict:
    return traced(*rwkv_jax.load(folder / "model.safetensors", scan=False), prompts_of(preset), preset)


def of_file(path: str, file: str, preset: Preset) -> dict:
    model, params = rwkv_jax.load(path, scan=False)
    if set(model.layers) != {"rwkv4"}:
        raise ValueError(
            f"{path} has layers {model.layers}, expected rwkv4 only: tracing needs states of a fixed size"
        )
    tokenizer = tokenizers.for_model(interop.locate(path), model.vocab_size)
    return traced(model, params, facts.from_file(file, tokenizer), preset)


def cells(preset: Preset, folder: Path, model: str | None = None, facts: str | None = None) -> command.Cells:
    if bool(model) != bool(facts):
        raise ValueError("expected --model and --facts together")
    added = {f"{Path(model).name} on {Path(facts).name}": lambda: of_file(model, facts, preset)} if model else {}
    return {"learning": lambda: learned(preset, folder), "small model": lambda: of_world(preset, folder)} | added


def conclude(preset: Preset, values: dict) -> dict:
    claims = [row for name, value in values.items() if name != "learning" for row in claims_of(name, value)]
    larger = command.not_run(
        "Fig. 11 of the released 430M itself",
        "python -m experiments.trace.run --model=RWKV-4-Pile-430M-20220808-8066.pth --facts=known_1000.json",
        hours=5,
        hardware="2 CPU cores, or a GPU",
        why="neither weights nor facts were at hand",
    )
    return {"ledger": claims, "not_run": [larger]}


def claims_of(name: str, value: dict) -> list[dict]:
    """Return the rows of the ledger of one model."""
    clean, noisy, others = (mean for mean, *_ in value["probability"].values())
    random = value["random_place"]["both"][0]
    return [
        command.claim(
            f"Fig. 11, a fact goes deeper after its subject ({name})",
            "layer 4 of 24 at the subject, about 20 after it (one prompt)",
            f"{told(*value['deeper'], digits=2)} of the depth",
            verdict(*value["deeper"][1:], sign=1),
            run=f"{value['facts']} facts",
        ),
        command.claim(
            f"Fig. 11, the state carries it there ({name})",
            "state and activation put back together",
            f"{told(*value['by_state'])} more probability of the answer with the state",
            verdict(*value["by_state"][1:], sign=1),
        ),
        command.claim(
            f"Fig. 11, controls ({name})",
            "none",
            f"a random place gives back {random:+.3f} of the probability",
            "no claim",
            details=f"probability {clean:.2f}, {noisy:.2f} with a noisy subject, {others:.2f} with others noisy",
        ),
    ]


def lr_of(preset: Preset) -> float:
    if preset.lr:
        return preset.lr
    runs = read_json(HERE / "sweep.json")["steps"]
    return float(min(runs, key=runs.get))


def sweep(preset: Preset, path: Path) -> None:
    """Sweep learning rates by the steps until the small model knows its facts, until the best is not at an end."""
    steps = {}
    for lr in sweeps.search((8e-3, 1.6e-2, 3.2e-2), steps, lambda lr: learn(preset, lr)[2][-1][0]):
        print(f"lr {lr}: {steps[lr]} steps", flush=True)
    write_json(path, {"steps": steps, "fields": command.fields(preset), "stamp": stamp.stamp()})


if __name__ == "__main__":
    options = {
        "model": "weights to trace too: a .pth, a folder, or anything else that rwkv_jax.load reads",
        "facts": "JSON list of subject, prompt and attribute, to trace these weights on",
    }
    end(command.main(HERE, __doc__, PRESETS, cells, conclude, sweep, options))
