"""A run as its user sees it: resumed, killed, stopped, misconfigured."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import rwkv_jax
from rwkv_jax import checkpoint, metrics, run_config, train
from rwkv_jax.train import prepare
from rwkv_jax.train.__main__ import main

ROOT = Path(__file__).parents[1]
STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("RWKV_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, n)).decode() for n in rng.integers(2, 9, 200)]
    path.write_text(" ".join(rng.choice(words, 4000)))
    return str(path)


def _config(text, **changes):
    config = run_config.default()
    config.model.update(num_layers=2, dim=32)
    config.update(corpus=text, steps=STEPS, seq_len=16, batch_size=4, log_every=1, eval_every=3, eval_tokens=256)
    config.update(save_every=2, **changes)
    return config


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    state = train.run(_config(text), workdir)
    return workdir, jax.device_get(state)


def _same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(a), jax.device_get(b)))


def _numbers(workdir):
    """What the log says of steps, without what depends on the clock, and of starts nothing."""
    clock = re.compile("goodput|mfu|.*_seconds?|.*_per_second.*")
    rows = [row for row in metrics.read(workdir / "metrics.jsonl") if "began" not in row]
    return [{k: v for k, v in row.items() if not clock.fullmatch(k)} for row in rows]


def test_a_workdir_holds_what_it_promises(finished, text):
    workdir, state = finished
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["name"] == "rwkv4" and config["model"]["dim"] == 32
    assert config["tokenizer"] == "bytes" and len(config["corpus"]["sha256"]) == 64 and "jax" in config["versions"]
    rows = [r for r in metrics.read(workdir / "metrics.jsonl") if "loss_nats" in r]
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row["bits_per_byte"] == pytest.approx(row["loss_nats"] / np.log(2))
        assert {"grad_norm", "lr", "tokens_per_second", "batch_hash", "skipped", "tokens"} <= row.keys()
    assert len({r["batch_hash"] for r in rows}) == STEPS
    assert [r["step"] for r in metrics.read(workdir / "metrics.jsonl") if "valid_loss_nats" in r] == [3, 6]
    assert checkpoint.steps(workdir / "checkpoints") == [4, 6]
    assert int(state.step) == STEPS
    model, params = rwkv_jax.load(workdir)
    assert model.dim == 32 and _same(params, state.params)


def test_training_learns(finished):
    losses = [r["loss_nats"] for r in _numbers(finished[0]) if "loss_nats" in r]
    assert losses[0] == pytest.approx(np.log(256), rel=0.1) and losses[-1] < losses[0] - 0.3


class _DiedError(Exception):
    pass


def test_resume_is_bit_for_bit_and_cuts_the_log_back(finished, text, tmp_path, monkeypatch):
    """Dies after step 5 with the checkpoint of step 4: row 5 and a torn row are cut, and both come again."""
    append = metrics.append

    def dies(path, row):
        append(path, row)
        if row["step"] == 5:
            raise _DiedError

    monkeypatch.setattr(metrics, "append", dies)
    with pytest.raises(_DiedError):
        train.run(_config(text), tmp_path / "run")
    monkeypatch.undo()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss')
    state = train.run(_config(text), tmp_path / "run")
    assert _same(state, finished[1])
    assert _numbers(tmp_path / "run") == _numbers(finished[0])


def test_killed_between_saving_and_evaluating_a_step_the_evaluation_comes_again(finished, text, tmp_path, monkeypatch):
    append = metrics.append

    def dies(path, row):
        if row["step"] == STEPS and "valid_loss_nats" in row:
            raise _DiedError
        append(path, row)

    monkeypatch.setattr(metrics, "append", dies)
    with pytest.raises(_DiedError):
        train.run(_config(text), tmp_path)
    monkeypatch.undo()
    train.run(_config(text), tmp_path)
    assert _numbers(tmp_path) == _numbers(finished[0])


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(finished, text, tmp_path, capsys):
    state = train.run(_config(text), tmp_path)
    files = [p for p in (tmp_path / "checkpoints" / "6").rglob("*") if p.is_file() and p.stat().st_size > 1000]
    damaged = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    again = train.run(_config(text), tmp_path)
    assert "damaged checkpoint" in capsys.readouterr().err
    assert _same(again, state) and _numbers(tmp_path) == _numbers(finished[0])


def test_the_step_is_traced_once_over_interruption_and_resume(text, tmp_path, monkeypatch):
    traces, make_step = [], prepare.make_step

    def counting(*args, **kwargs):
        step = make_step(*args, **kwargs)
        return lambda *a, **k: (traces.append(1), step(*a, **k))[1]

    monkeypatch.setattr(prepare, "make_step", counting)
    config = _config(text)
    config.optim.eps = 1e-7  # of its own: its program is not compiled yet
    train.run(config, tmp_path)
    assert len(traces) == 1


def test_a_branch_starts_where_its_trunk_was(text, finished, tmp_path):
    trunk = finished[0] / "checkpoints" / "4"
    state = train.run(_config(text, branch_from=str(trunk)), tmp_path)
    assert [r["step"] for r in _numbers(tmp_path) if "loss_nats" in r] == [5, 6]
    assert _same(state, finished[1])  # the same schedule, hence the same end


@pytest.mark.parametrize("strategy", ["pmap", "fsdp"])
def test_a_run_goes_on_under_another_strategy(strategy, finished, text, tmp_path):
    config = _config(text)
    config.strategy, config.steps = strategy, STEPS
    state = train.run(config, tmp_path)
    expected = [r["loss_nats"] for r in _numbers(finished[0]) if "loss_nats" in r]
    assert [r["loss_nats"] for r in _numbers(tmp_path) if "loss_nats" in r] == pytest.approx(expected, rel=1e-4)
    like = jax.tree.map(np.asarray, jax.device_get(train.stored(state)))
    assert checkpoint.restore(tmp_path / "checkpoints", like)[0] == STEPS


def test_two_runs_cannot_share_a_workdir(text, tmp_path):
    with train.claimed(tmp_path), pytest.raises(ValueError, match="is in use by another run"):
        train.run(_config(text), tmp_path)


def test_a_workdir_of_another_config_names_the_fields(finished, text):
    with pytest.raises(ValueError, match=r"run of another config: model\.dim was 32, now 64; steps was 6, now 7$"):
        config = _config(text)
        config.model.dim, config.steps = 64, 7
        train.run(config, finished[0])


def test_schedules():
    from rwkv_jax import optim

    lr = optim.schedule("exponential", 1e-3, 1e-5, steps=100, warmup=10, decay_start=80)
    assert lr(0) == pytest.approx(1e-4) and lr(9) == lr(50) == lr(79 - 1) == 1e-3
    assert lr(99) == pytest.approx(1e-5) and lr(89) == pytest.approx(1e-4, rel=1e-6)
    cosine = optim.schedule("cosine", 1e-3, 1e-5, steps=100, warmup=10)
    assert cosine(99) == pytest.approx(1e-5) and cosine(54) == pytest.approx(5.05e-4, rel=1e-2)
    rates = [cosine(i) for i in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_groups_and_decay_reach_what_they_name():
    """Multipliers 2 and 3 for the decays and bonuses; decoupled decay for matrices, nothing else."""
    from rwkv_jax import optim

    model = rwkv_jax.build("rwkv4", vocab_size=8, num_layers=2, dim=8)
    params = model.init(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    ones = jax.tree.map(np.ones_like, params)
    tx = optim.optimiser(weight_decay=0.5, clip=0)
    direction, _ = tx.update(ones, tx.init(params), params)
    flat = lambda tree: {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree.leaves_with_path(tree)
    }
    values = flat(params)
    for name, d in flat(direction).items():
        factor = 2 if name.endswith("time_decay") else 3 if name.endswith("time_first") else 1
        decay = 0.5 * values[name] if name.endswith(("kernel", "embedding")) else 0
        assert np.allclose(d, factor * (1 + decay), rtol=1e-5), name


def test_l2wrap_is_the_released_gradient():
    """1e-4 / (B T) * max_logit on the largest logit of each token, nothing elsewhere."""
    from rwkv_jax import optim

    logits = jax.random.normal(jax.random.key(0), (2, 3, 5)) * 4
    grad = jax.grad(lambda x: optim.l2wrap(x).mean())(logits)
    top = logits.max(-1, keepdims=True)
    assert np.allclose(grad, np.where(logits == top, 1e-4 / 6 * top, 0), atol=1e-9)


# ------------------------------------------------------------------------------------------ the command line


def _command(*args, module="train"):
    return [sys.executable, "-W", "error", "-m", f"rwkv_jax.{module}", *map(str, args)]


def _tiny(text, workdir, *more):
    sizes = ["model.num_layers=2", "model.dim=32", f"corpus={text}", f"steps={STEPS}", "seq_len=16", "batch_size=4"]
    log = ["log_every=1", "eval_every=3", "eval_tokens=256", "save_every=2"]
    fields = [f"--config.{x}" for x in (*sizes, *log)]
    return _command("--config=configs/tiny.py", f"--workdir={workdir}", *fields, *more)


def _fails(command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and done.stderr.splitlines()[-1] == lines[0], done.stderr
    return lines[0]


MISTAKES = {
    "missing corpus": (["--config.corpus=/nowhere/text"], "/nowhere/text"),
    "empty corpus": (["--config.corpus={empty}"], "empty"),
    "corpus shorter than a window": (
        ["--config.corpus={short}", "--config.seq_len=512"],
        "shorter than one window of 513",
    ),
    "misspelt field": (["--config.optim.warmpu=3"], 'Did you mean "warmup" instead of "warmpu"?'),
    "misspelt section": (["--config.optm.lr=3"], 'Did you mean "optim"'),
    "value of another type": (["--config.steps=many"], "config.steps=many"),
    "unknown model": (["--config.model.name=rwkv5"], "unknown model name 'rwkv5': did you mean 'rwkv4'?"),
    "unknown schedule": (["--config.optim.schedule=linear"], "schedule is 'linear', expected exponential"),
    "batch over accumulation": (["--config.accumulation=3"], "batch_size is 4, expected a multiple of 3"),
    "stray argument": (["steps=3"], "unexpected argument 'steps=3'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistake, text, tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("a few words\n" * 20)
    more, expected = MISTAKES[mistake]
    places = {name: tmp_path / name for name in ("empty", "short")}
    line = _fails(_tiny(text, tmp_path / "run", *(arg.format(**places) for arg in more)))
    assert expected in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_mistakes_without_a_process_each(text, tmp_path, capsys):
    """The quick half of the test above: the same lines from `main` itself."""
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("a few words\n" * 20)
    for mistake, (more, expected) in MISTAKES.items():
        command = _tiny(
            text, tmp_path / "run", *(a.format(empty=tmp_path / "empty", short=tmp_path / "short") for a in more)
        )
        assert main(command[5:]) == 2, mistake
        assert expected in capsys.readouterr().err.splitlines()[-1], mistake


@pytest.mark.parametrize(
    "field, value",
    [
        ("accumulation", 0), ("seed", 2**32), ("keep", 0), ("steps", 0), ("eval_tokens", 1), ("log_every", -1),
        ("optim.lr", 0.0), ("optim.lr", float("inf")), ("optim.lr_end", 0.0), ("optim.eps", float("nan")),
        ("optim.warmup", 2.0), ("optim.betas", (0.9, 0.99, 0.999)), ("optim.groups", (("(", 2.0),)),
        ("optim.groups", (("a",),)), ("model.dropout", 1.0), ("model.head_size", 0), ("model.dtype", "float31"),
        ("model.wkv_impl", "cuda"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named_before_anything_is_written(field, value, text, tmp_path):
    config = _config(text)
    section, _, name = field.rpartition(".")
    with config.unlocked():
        (config[section] if section else config)[name] = value
    with pytest.raises(ValueError, match=f"(config|model) field (model.)?{name if 'model' in section else field} "):
        train.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "program, expected",
    [
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "KeyError: 'get_config'"),
        ("def get_config(arg): return {}", "get_config returned dict, expected a ConfigDict"),
        ("import nowhere", "ModuleNotFoundError"),
    ],
)
def test_a_config_file_that_is_none_is_one_line(program, expected, tmp_path, capsys):
    (tmp_path / "config.py").write_text(program)
    assert main([f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "config.py: " in err and expected in err
    assert not (tmp_path / "run").exists()


def test_a_start_that_failed_does_not_claim_the_workdir(text, tmp_path):
    config = _config(text)
    config.branch_from = "nothing"
    with pytest.raises(ValueError, match="branch_from is 'nothing'"):
        train.run(config, tmp_path)
    config.branch_from = ""
    assert int(train.run(config, tmp_path).step) == STEPS


def test_a_branch_must_go_beyond_its_trunk(finished, text, tmp_path):
    config = _config(text, branch_from=str(finished[0] / "checkpoints" / str(STEPS)))
    with pytest.raises(ValueError, match=f"steps is {STEPS}, expected more than the {STEPS} of branch_from"):
        train.run(config, tmp_path)


def test_all_checkpoints_damaged_is_one_line(finished, text, tmp_path, capsys):
    train.run(_config(text), tmp_path)
    for path in (tmp_path / "checkpoints").rglob("manifest.json"):
        newest = max((p for p in path.parent.rglob("*") if p.is_file() and p != path), key=lambda p: p.stat().st_size)
        newest.write_bytes(newest.read_bytes()[:-1])
    assert main(_tiny(text, tmp_path)[5:]) == 2
    assert "no valid checkpoint" in capsys.readouterr().err.splitlines()[-1]


def _wait_for(path, step, process):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and any(r["step"] >= step for r in metrics.read(path)):
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step}: {process.communicate()}")


LONG = ["--config.steps=60", "--config.save_every=5", "--config.optim.warmup=0.0"]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_cleanly(signum, text, tmp_path):
    process = subprocess.Popen(_tiny(text, tmp_path, *LONG), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    _wait_for(tmp_path / "metrics.jsonl", 3, process)
    process.send_signal(signum)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    stopped = max(checkpoint.steps(tmp_path / "checkpoints"))
    assert f"stopped at step {stopped} of 60" in err and stopped < 60
