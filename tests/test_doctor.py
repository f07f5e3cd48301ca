"""The report on an installation: what it asks, and how it ends where something is wrong."""

import json
import re
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import rwkv_jax
from rwkv_jax import doctor, models
from rwkv_jax.train import step

ROOT = Path(__file__).parents[1]


def test_doctor_reports_the_same_as_a_table_and_as_json(monkeypatch, capsys):
    found = doctor.report()
    monkeypatch.setattr(doctor, "report", lambda: found)
    assert doctor.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))
    assert found["result"] == "ok" and found["versions"]["jax"] == jax.__version__
    assert found["versions"]["rwkv_jax"] == rwkv_jax.__version__
    assert found["devices"]["count"] == jax.device_count() and found["machine"]["executable"] == sys.executable
    assert doctor.main([]) == 0
    *rows, result = capsys.readouterr().out.splitlines()
    assert result == "RESULT: ok" and len(rows) < 30
    (column,) = {re.match(r"\S+( \S+)*  +", row).end() for row in rows}  # aligned
    shown = {row[:column].rstrip(): row[column:] for row in rows}
    assert {"python", "devices", "wkv4", "wkv7", "corpora cache", "torch", "tiny model"} <= shown.keys()
    assert shown["jax"] == jax.__version__ and shown["devices"].startswith(f"{jax.device_count()} x cpu")


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
def test_doctor_asks_the_operators_for_their_forms(platform, monkeypatch):
    wkv4, wkv6, wkv7 = (sys.modules[f"rwkv_jax.ops.{name}"] for name in ("wkv4", "wkv6", "wkv7"))
    monkeypatch.setattr("rwkv_jax.ops.dispatch.target_platform", lambda: platform)
    monkeypatch.setattr(wkv6, "suited_form", lambda T: f"form of {T}")
    found = doctor.operators()
    assert found["platform"] == platform and not found["hopper"]
    for T in doctor.LENGTHS:
        both = lambda name, T=T: tuple(found["forms"][name][T][way] for way in ("forward", "backward"))
        assert both("wkv4") == (wkv4.suited_form(platform, T, jnp.float32),) * 2
        assert both("wkv6") == (f"form of {T}",) * 2
        assert both("wkv7") == wkv7.suited_forms(platform, T)


def test_doctor_reports_caches_accelerators_and_extras(tmp_path, monkeypatch):
    monkeypatch.setenv("RWKV_JAX_CACHE", str(tmp_path / "cache"))
    assert doctor.caches()["corpora"] == {"path": str(tmp_path / "cache"), "bytes": 0}
    (tmp_path / "cache" / "a").mkdir(parents=True)
    (tmp_path / "cache" / "a" / "train.bin").write_bytes(b"abc")
    assert doctor.caches()["corpora"]["bytes"] == 3

    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(doctor, "DRIVERS", {str(tmp_path / "nvidia[0-9]*"): "jax[cuda13]"})
    assert doctor.devices()["unused"] is None  # JAX_PLATFORMS asks for the CPU
    monkeypatch.delenv("JAX_PLATFORMS")
    assert doctor.devices()["unused"] == "jax[cuda13]"

    monkeypatch.setitem(doctor.EXTRAS, "absent", ("no-such-package", "nothing"))
    rows = dict(doctor._extra_rows(**doctor.extras()))
    assert rows["absent"] == "not installed: pip install no-such-package (nothing)"
    assert re.match(r"\d", rows["tensorboard"])  # of requirements-dev.txt


def test_doctor_knows_every_extra_of_the_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, (requirement,) in extras.items():
        assert doctor.EXTRAS[name][0] == re.match(r"[\w-]+", requirement)[0]


def unmoved(model, objective, params, frozen, batch, carry, key):
    sums = step.Sums(jnp.float32(7), jnp.float32(1))
    return jax.tree.map(jnp.zeros_like, params), (sums, None)


@pytest.mark.parametrize(
    "name, broken, message",
    [
        ("rwkv_jax.train.step.gradient_of_batch", unmoved, "the loss of the tiny model went from 7.000 to 7.000"),
        (
            "rwkv_jax.models.LM.init_state",
            lambda model, batch, empty=models.LM.init_state: jax.tree.map(lambda x: x + 1, empty(model, batch)),
            "logits of the tiny model differ by",
        ),
    ],
)
def test_doctor_fails_where_the_model_is_wrong(name, broken, message, monkeypatch, capsys):
    monkeypatch.setattr(name, broken)
    assert doctor.main([]) == 1
    *rows, result = capsys.readouterr().out.splitlines()
    assert result.startswith(f"RESULT: failed: model: RuntimeError: {message}") and rows[-1].split()[0] == "model"


def test_doctor_reports_the_other_parts_where_one_fails(monkeypatch, capsys):
    def devices():
        raise RuntimeError("no\ndriver")

    monkeypatch.setattr(doctor, "devices", devices)
    monkeypatch.setattr(doctor, "tiny_model", devices)
    assert doctor.main(["--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["devices"] == {"error": "RuntimeError: no driver"} and "forms" in found["operators"]
    assert found["result"] == "failed: devices: RuntimeError: no driver"
    assert doctor.main([]) == 1
    assert "\ndevices           RuntimeError: no driver\n" in capsys.readouterr().out
