"""Studies: kept and computed runs, the options of the command, comparisons, drafts, trunks."""

import json
import runpy
import shutil
import sys
from functools import partial

import jax
import numpy as np
import pytest
import training

from experiments import command, runs, study
from rwkv_jax import train

SCRIPT = '''"""Is it worth anything?

No number in the paper.
"""

from experiments import study
from test_study import computed, conclude, never

study.main(
    base={base}, arms={arms}, seeds={seeds}, measure="loss", run=computed, conclude=conclude, swept={swept},
    budgets={budgets}, also={also},
    sweep=study.Sweep(field="lr", value=lambda run: run["loss"]),
    presets={{"gpu": {{"base": {{"model.dim": 256}}}}}}, options={options},
)
'''  # fmt: skip
BASE = {"model.dim": 8, "model.num_layers": 1, "steps": 9}
ran = []  # configs that `computed` has run


def loss(model, params, corpus):
    """A placeholder measure: `computed` supplies its number."""


def computed(config, folder) -> dict:
    """A stand-in for a training run: a level for each arm and seed, lowest at a rate of 4e-3."""
    config = config.to_dict()
    if config.get("dies") in (True, config.get("steps", 0)):
        raise KeyboardInterrupt
    if config.get("fails"):
        raise ValueError("no\nsuch corpus")
    ran.append(config)
    off_rate = abs(np.log2(config.get("lr", 4e-3) / 4e-3))
    return {"loss": 2 + 0.1 * config["seed"] + config.get("cost", 0.0) + off_rate, "curve": CURVE, "tokens": 1}


def never(config, folder):
    raise AssertionError("computed")


CURVE = {"tokens": [1, 2], "loss_nats": [3.0, 2.0]}


def conclude(its, values) -> dict:
    rows = study.compared(its, values)
    ours = f"{rows['b']['difference']:.2f}"
    return {"ledger": [{"artefact": "Table 0", "paper": "none", "ours": ours, "verdict": "same sign"}]}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A study's script as a command: `(argv, fields of the study) -> exit code`, in a folder of its own."""
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(study.measures, "loss", loss, raising=False)
    monkeypatch.setattr(command, "draw", lambda name, path: path)
    monkeypatch.setattr(study, "end", sys.exit)
    ran.clear()

    def call(*argv, name="run.py", seeds=2, swept=False, base=BASE, options=(), budgets=(), also="dict", **arms):
        path = tmp_path / "v_shift" / name
        path.parent.mkdir(exist_ok=True)
        fields = {
            "base": base,
            "arms": arms or {"b": {"cost": 0.5}},
            "seeds": seeds,
            "swept": swept,
            "budgets": budgets,
            "also": also,
        }
        path.write_text(SCRIPT.format(options=dict.fromkeys(options, "help"), **fields))
        monkeypatch.setattr("sys.argv", [str(path), *argv])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as exit:
            return exit.code
        return 0

    call.folder, call.runs = tmp_path / "v_shift", tmp_path / "runs"
    call.results = lambda name="results": json.loads((call.folder / f"{name}.json").read_text())
    return call


# -------------------------------------------------------------------------------------------- the command


def test_study_computes_each_run_once_and_only_runs_of_an_added_arm_or_seed(script, capsys):
    assert script() == 0 and len(ran) == 4
    assert "minus base" in capsys.readouterr().out
    assert script() == 0 and len(ran) == 4
    assert script(b={"cost": 0.5}, c={"cost": 0.1}) == 0 and [c.get("cost") for c in ran[4:]] == [0.1, 0.1]
    assert script(seeds=3) == 0 and [config["seed"] for config in ran[6:]] == [2, 2]
    assert script(b={"cost": 0.6}) == 0 and len(ran) == 10
    results = script.results()
    assert list(results["cells"]) == ["base, seed 0", "b, seed 0", "base, seed 1", "b, seed 1"]
    assert results["table"]["b"]["difference"] == pytest.approx(0.6)
    assert results["study"]["arms"] == {"base": [{}], "b": [{"cost": 0.6}]}
    kept = [json.loads(path.read_text()) for path in script.runs.glob("*.json")]
    config = {"model.dim": 8, "model.num_layers": 1, "steps": 9, "seed": 1, "cost": 0.5}
    assert config in [its["config"][0] for its in kept]


def test_study_resumes_after_an_interruption(script, capsys):
    assert script(b={"dies": True}) == 130 and len(ran) == 1 and not list(script.folder.glob("*.json"))
    assert "the same command resumes" in capsys.readouterr().err
    assert script() == 0 and len(ran) == 4


def test_study_concludes_from_the_finished_runs(script, capsys):
    assert script("--kept") == 2
    assert "--kept is for studies with budgets" in capsys.readouterr().err
    optim = {"schedule": "exponential", "warmup": 0.1, "decay": 0.1}
    some = {"base": BASE | {"optim": optim, "dies": 20}, "budgets": (10, 20)}
    some["also"] = "lambda: {'speed': never}"
    assert script("--kept", **some) == 2
    assert "no run of this study is in" in capsys.readouterr().err.splitlines()[-1]
    assert script(**some) == 130 and len(ran) == 4
    assert script("--kept", **some) == 0 and len(ran) == 4
    results = script.results()
    assert len(results["cells"]) == 4 and "20 steps" in results["missing"][0]
    assert len(results["missing"]) == 5 and results["missing"][-1] == "speed"  # --kept computes nothing
    assert results["table"]["b"]["difference"] == pytest.approx(0.5) and list(results["by_budget"]) == ["10"]


def test_study_resumes_from_published_results_with_the_same_identity(script, capsys):
    assert script("--resume") == 2
    assert "results.json" in capsys.readouterr().err
    assert script() == 0 and len(ran) == 4
    assert script("--resume", "--smoke") == 2
    assert "excludes --sweep and --smoke" in capsys.readouterr().err
    shutil.rmtree(script.runs)
    assert script("--resume", b={"cost": 0.5}, c={"cost": 0.1}) == 0 and [c.get("cost") for c in ran[4:]] == [0.1] * 2
    assert "resumed: 4 of 6 are published" in capsys.readouterr().err
    shutil.rmtree(script.runs)
    assert script("--resume", b={"cost": 0.6}) == 0 and [c["cost"] for c in ran[6:]] == [0.6] * 2
    shutil.rmtree(script.runs)
    assert script() == 0 and len(ran) == 12


def test_swept_lr_does_not_search_the_arms_of_a_known_sweep(tmp_path):
    known = tmp_path / "known.json"
    known.write_text('{"runs": {"a 3x64": {"0.004": 1.0, "0.008": 2.0}}}')
    about = its(arms={"a": {"model.num_layers": 3}}, run=computed, sweep=study.Sweep(known=known))
    assert study.swept_lr(about, "a", tmp_path / "sweep.json", tmp_path) == 4e-3
    assert not (tmp_path / "sweep.json").exists()


def test_study_reports_an_error_in_one_line(script, capsys):
    for argv, arms, message in (
        ((), {"b": {"fails": True}}, "no such corpus"),
        (("--text=enwik8",), {}, "the base of this study has no 'corpus'"),
        (("--arm=d",), {}, "no arm 'd', expected one of base, b"),
        (("--steps=0",), {}, "--steps=0, expected 1 or more"),
    ):
        assert script(*argv, **arms) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"


def test_study_runs_the_arms_seeds_steps_and_options_of_its_command_line(script):
    argv = ("--arm=c", "--seed=1", "--steps=7", "--note=x")
    also = "lambda: {'speed': never}"
    assert script(*argv, base=BASE | {"note": None}, options=["note"], also=also, b={}, c={"cost": 0.1}) == 0
    assert [(config["seed"], config["steps"], config["note"]) for config in ran] == [(1, 7, "x")] * 2
    assert list(script.results()["cells"]) == ["base, seed 1", "c, seed 1"]
    figure = script.folder / "figure.png"
    assert figure.exists()
    figure.unlink()
    (script.folder / "plot.py").touch()
    assert script(*argv, base=BASE | {"note": None}, options=["note"], b={}, c={"cost": 0.1}) == 0
    assert not figure.exists()  # a figure of its own needs what `conclude` adds to a whole study


def test_study_smoke_leaves_no_files(script, capsys):
    assert script("--smoke") == 0 and len(ran) == 4
    assert not script.runs.exists() and not list(script.folder.glob("*.json"))
    assert capsys.readouterr().out.endswith("nothing was written\n")
    assert script("--smoke", f"--out={script.folder / 'out'}") == 0 and (script.folder / "out/results.json").exists()


def test_study_draft_does_not_replace_published_results(script, capsys):
    assert script() == 0 and script.results()["draft"] is True
    assert script("--publish") == 0 and "draft" not in script.results()
    assert script(b={"cost": 0.7}) == 0
    assert script.results()["table"]["b"]["difference"] == pytest.approx(0.5)
    assert script.results("results-draft")["table"]["b"]["difference"] == pytest.approx(0.7)
    assert script("--preset=gpu") == 0 and script.results("gpu")["study"]["base"]["model.dim"] == 256
    assert script("--publish", "--seed=0") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: only a whole study")
    assert script(name="idea.py") == 0 and script("--preset=gpu", name="idea.py") == 0
    assert script.results("idea")["preset"] == "cpu" and script.results("idea-gpu")["preset"] == "gpu"


def test_study_publishes_to_the_ledger(script, tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text("<!-- hours -->\n<!-- end -->")
    monkeypatch.setattr(study.ledger, "HERE", tmp_path)
    monkeypatch.setattr(study.ledger, "ORDER", ())
    monkeypatch.setattr(study.ledger, "FILES", (page,))
    assert script() == 0 and study.ledger.results() == [] and "hours in all" not in page.read_text()
    assert script("--publish") == 0 and [name for name, _ in study.ledger.results()] == ["v_shift"]
    assert "0.0 hours in all" in page.read_text()


def test_study_takes_the_best_swept_rate_and_sweeps_missing_ones(script):
    """The sweep starts around 1.6e-2 and continues to lower rates until 4e-3 has two neighbours."""
    base, tried = {"model.dim": 8, "model.num_layers": 1, "lr": 1.6e-2}, {2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2}
    assert script("--sweep", base=base) == 0
    found = script.results("sweep")["runs"]
    assert list(found) == ["base 1x8", "b 1x8"] and set(map(float, found["b 1x8"])) == tried and len(ran) == 10
    assert script(swept=True, base=base, b={"cost": 0.5}, c={"cost": 0.1}) == 0
    assert {config["lr"] for config in ran[10:15]} == tried  # sweep of the new arm
    assert [config["lr"] for config in ran[15:]] == [4e-3] * 3  # seed 0 is kept from the sweeps


# ------------------------------------------------------------------------------------------------- configs


def its(**fields):
    return study.Study(base={"model": {"dim": 64}, "seq_len": 100, "batch_size": 10}, **fields)


def test_config_of_an_arm_takes_nested_and_dotted_changes():
    shift = {"model": {"variant": {"token_shift": False}}}
    found = study.arms_of(its(arms={"a": shift, "f": lambda base: {"model.hidden_dim": 5 * base.model.dim}}))
    assert found == {"base": [{}], "a": [shift], "f": [{"model.hidden_dim": 320}]}
    config = study.config_of(its(), found["a"][0] | {"tokens": 5500}, seed=3)
    assert not config.model.variant.token_shift and config.model.dim == 64 and (config.steps, config.seed) == (5, 3)
    assert study.config_of(its(), {"tokens": 5500, "steps": 3}).steps == 3
    assert study.config_of(its(), {"optim.groups": (("a", 0.0),)}).optim.groups[0] == ("a", 0.0)  # still tuples
    assert study.config_of(study.Study(base={"a.b": 1}, run=computed), {"a": {"c": 2}}).a.to_dict() == {"b": 1, "c": 2}


def test_config_of_refuses_an_unknown_field_or_type_in_one_line():
    with pytest.raises(ValueError, match=r"^no config field 'model.unknown.shift_v'; rwkv_jax/train/run_config.py"):
        study.config_of(its(), {"model": {"unknown": {"shift_v": False}}})
    with pytest.raises(ValueError, match=r"^a config field has the wrong type: .*steps"):
        study.config_of(its(), {"steps": "many"})


def test_study_chosen_shrinks_a_smoke_and_presets_name_arms():
    presets = {"smoke": {"arms": ("b",)}, "gpu": {"base": {"model": {"dim": 512}}, "seeds": (3, 5)}}
    small = study.chosen(its(arms={"a": {}, "b": {}}, seeds=3, presets=presets), "smoke")
    assert list(study.arms_of(small)) == ["base", "b"] and study.seeds_of(small) == (0, 1)
    assert study.config_of(small).model.dim == 16
    large = study.chosen(its(arms={"a": {}, "b": {}}, presets=presets), "gpu")
    assert study.config_of(large).model.dim == 512 and large.base["seq_len"] == 100
    assert study.seeds_of(large) == (3, 5)


def test_study_refuses_a_wrong_arm_before_it_trains_another(tmp_path):
    with pytest.raises(ValueError, match=r"^unknown arm in against 'bse': did you mean 'base'\?"):
        study.chosen(its(arms={"base": {}, "a": {}}, against="bse"))
    wrong = {"model.name": "transformer", "model.variant.shift_v": False}
    with pytest.raises(ValueError, match=r"^unknown switch of model.variant 'shift_v'"):
        study.cells(its(arms={"a": wrong}), tmp_path)


def test_identity_of_a_run_depends_on_all_that_its_numbers_depend_on(tmp_path, monkeypatch):
    config = study.config_of(its())
    of = lambda **changes: runs.hash_of(runs.fixed(study.config_of(its(), changes)))
    assert of(log_every=3, keep=5) == of() and len({of(), of(steps=3), of(eval_every=5)}) == 3
    with config.unlocked():
        config.model.variant.young = None
    assert runs.hash_of(runs.fixed(config)) == of()  # a switch that no run knew leaves finished runs valid
    config.model.variant.young = True
    assert runs.hash_of(runs.fixed(config)) != of()
    assert "model.variant.shift_v" in runs.fixed(config)
    measure = lambda **parameters: runs.identity_of(partial(study.measures.bits_per_byte, **parameters))
    assert measure() == measure() != measure(tokens=5) and measure()["name"] == "bits_per_byte"
    assert runs.identity_of(study.measures.bits_per_byte) != runs.identity_of(study.measures.best_practice)
    bare, other = "  def f(x):\n    return x", "  def f(x):\n    return -x"
    told = '  def f(x):\n    """X."""\n    return x  # x'
    sources = iter((bare, told, other))
    monkeypatch.setattr(runs.inspect, "getsource", lambda function: next(sources))
    first, second, third = (runs.identity_of(its) for _ in range(3))
    assert first == second != third
    monkeypatch.undo()
    in_a_call = runs.identity_of(lambda model, params, corpus: {"loss": 1})  # its source is not a statement by itself
    assert in_a_call != runs.identity_of(lambda model, params, corpus: {"loss": 2})
    weights = tmp_path / "a.safetensors"
    weights.write_bytes(b"a")
    config.finetune.model = str(weights)
    before = runs.fixed(config)
    weights.write_bytes(b"b")
    assert runs.fixed(config) != before


# -------------------------------------------------------------------------------------------- comparisons

EFFECTS = {"large": 0.1, "small": 0.003, "none": 0.0}
ARMS = {arm: {} for arm in EFFECTS}


def values(effects=EFFECTS, noise=1e-4):
    """Runs of all arms: a level for each seed, an effect for each arm, six documents that differ widely."""
    rng, found = np.random.default_rng(0), {}
    for arm, effect in {"base": 0.0, **effects}.items():
        for seed in range(3):
            bits = 2.3 + 0.05 * seed + effect + noise * rng.standard_normal()
            nats = (np.array([0.5, 0.7, 0.9, 1.1, 1.3, 1.5]) * 1000 * bits * np.log(2)).tolist()
            found[study.name_of(arm, seed)] = {
                "bits_per_byte": bits, "bits_per_byte_nats": nats, "bits_per_byte_bytes": [1000] * 6, "lr": 0.1
            }  # fmt: skip
    return found


def test_compared_resolves_differences_above_the_noise_of_seeds():
    arms = its(arms=ARMS, seeds=3)
    rows = study.compared(arms, values())
    assert rows["base"].keys() == {"bits_per_byte", "lr"}
    assert rows["large"]["resolved"] and not rows["none"]["resolved"]
    for arm, effect in EFFECTS.items():
        assert rows[arm]["difference"] == pytest.approx(effect, abs=3e-4)
        assert rows[arm]["low"] < effect < rows[arm]["high"] and rows[arm]["p_holm"] >= rows[arm]["p"]
    fresh = study.Study(**json.loads(json.dumps(study.fields_of(arms))))  # as stored in results
    assert study.compared(fresh, values()) == rows
    lines = study.table(arms, rows).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["base", "large", "small", "none"] and lines[2].endswith("*")


def test_compared_gives_the_wider_interval_and_none_for_one_seed():
    """The documents differ in the effect and the seeds agree, so the interval over documents is the wider one."""
    found = values({"a": 0.03}, noise=0)
    for seed in range(3):
        found[study.name_of("a", seed)]["bits_per_byte_nats"][3] -= 500
    row = study.compared(its(arms={"a": {}}, seeds=3), found)["a"]
    assert row["high"] - row["low"] > 0.1 and row["by_seed"] == [0.03] * 3
    assert row["p"] == 0 and not row["resolved"]  # the seeds alone would be sure, but the interval has 0
    for run in found.values():
        del run["bits_per_byte_nats"]
    row = study.compared(its(arms={"a": {}}, seeds=3), {x: run for x, run in found.items() if x != "a, seed 1"})["a"]
    assert row["seeds"] == 2
    row = study.compared(its(arms={"a": {}}, seeds=1), found)["a"]
    assert (row["low"], row["high"], row["p"], row["seeds"]) == (None, None, None, 1)


def test_compared_pools_the_spread_of_seeds_over_all_arms():
    """Four arms of two seeds have 3 degrees of freedom; an arm that lacks a seed does not count."""
    level = lambda bits: {"bits_per_byte": bits}
    levels = {"base": (1.0, 1.1), "a": (1.2, 1.32), "b": (1.4, 1.51), "c": (1.3, 1.4), "d": (9.0,)}
    found = {study.name_of(arm, i): level(bits) for arm, of_arm in levels.items() for i, bits in enumerate(of_arm)}
    arms = {arm: {} for arm in "abcd"}
    rows = study.compared(its(arms=arms, seeds=2, is_pooled=True), found)
    changes = np.array([0.1, 0.12, 0.11, 0.1])  # from seed to seed: their variance is that of differences of arms
    half = 3.182446 * changes.std(ddof=1) / 2**0.5  # t at 0.975 with 3 degrees of freedom
    assert rows["a"]["difference"] == pytest.approx(0.21)
    assert (rows["a"]["low"], rows["a"]["high"]) == (pytest.approx(0.21 - half), pytest.approx(0.21 + half))
    assert rows["a"]["resolved"] and rows["d"]["seeds"] == 1
    assert rows["d"]["high"] - rows["d"]["difference"] == pytest.approx(half * 2**0.5)  # one seed spreads as much
    one = its(arms=arms, seeds=1, is_pooled=True)
    assert study.compared(one, found)["a"]["low"] is None  # no arm has two seeds
    at = lambda budget: {f"{name}, {budget} steps": run for name, run in found.items()}
    longer = {"a, seed 0, 9 steps": level(1.4), "base, seed 0, 9 steps": level(1.3)}
    rows = study.compared(its(arms=arms, seeds=2, is_pooled=True, budgets=(3, 9)), at(3) | longer)
    assert rows["a"]["high"] == pytest.approx(0.1 + half * 2**0.5)  # the spread of the shorter runs
    alone = study.compared(its(arms=arms, seeds=2), found)["a"]
    assert alone["high"] - alone["difference"] == pytest.approx(12.7062 * 0.01)  # t with 1 degree of freedom


# ------------------------------------------------------------------------------------------------- trunks


@pytest.mark.parametrize("step", ["toy", pytest.param("rwkv4", marks=pytest.mark.slow)])
def test_trained_branch_of_a_trunk_is_bit_equal_to_a_run_of_its_length(step, tmp_path, monkeypatch):
    """The trunk stops at 9 and at 18, and the learning rate of both budgets decays from there."""
    if step == "toy":
        training.install_toy(monkeypatch)
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(f"{i} bottles of beer on the wall, " * 4)
    base = {"model": {"num_layers": 1, "dim": 8}, "seq_len": 8, "batch_size": 2, "corpus": str(text), "optim.lr": 1e-2}
    config = lambda steps: study.config_of(study.Study(base=base), {"steps": steps}, seed=3)
    folder = tmp_path / "runs"
    found = {b: runs.trained(runs.stages(config(20), (10, 20), b), folder) for b in (20, 10)}
    assert len(list(folder.iterdir())) == 4 and found[10][2][0] == found[20][2][0]  # both trunks, both branches
    for budget, (_, params, _) in found.items():
        whole = config(budget)
        whole.optim.warmup = 1 / budget  # one step, as a twentieth of the longest budget
        expected = train.run(whole, tmp_path / f"whole-{budget}").params
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    branch = found[10][2][-1] / "metrics.jsonl"
    before = branch.read_bytes()
    again = runs.trained(runs.stages(config(20), (10, 20), 10), folder)
    assert again[2] == found[10][2] and branch.read_bytes() == before
    jax.tree.map(np.testing.assert_array_equal, again[1], found[10][1])
    other = runs.stages(config(20), (10, 20), 10)
    other[0].optim.warmup = 0.0
    assert runs.trained(other, folder)[2][1] != again[2][1]  # a branch of another trunk is another run
    logged = runs.curve(found[20][2])
    assert logged["tokens"] == [16 * step for step in range(1, 21)]
