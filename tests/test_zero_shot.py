"""Zero-shot: the expected numbers, LAMBADA from a file, and what counts as reproduced."""

import json
import math

import jax
import numpy as np
import pytest
from small import drawn

import rwkv_jax
from experiments.zero_shot import run
from rwkv_jax import evaluate

MEANS = [  # of the 13 accuracies, as the figure of the same numbers in RWKV-LM prints them
    44.13, 44.14, 43.42, 48.04, 48.39, 47.25, 53.91, 53.55, 52.64, 57.93, 57.64, 55.92, 61.20, 60.44, 61.34, 63.71,
    62.38, 64.58,
]  # fmt: skip


def test_the_expected_numbers_have_the_published_means():
    rows = run.EXPECTED["rows"]
    accuracies = [[row["values"][task] for task in run.EXPECTED["metrics"]] for row in rows]
    np.testing.assert_allclose([round(np.mean(row), 2) for row in accuracies], MEANS, atol=0.005)
    assert [row["mean"] for row in rows] == MEANS
    assert len(run.PARAMETERS) == 6 and "ctx4096" in [*run.PARAMETERS][3] and "ctx8192" in [*run.PARAMETERS][5]
    for checkpoint in run.PARAMETERS:
        assert f"--model={checkpoint}.pth --add_bos_token --tasks=piqa," in run.harness_command(checkpoint)


def test_lambada_is_the_last_word_after_token_zero(tmp_path):
    model = rwkv_jax.build("rwkv4", vocab_size=256, num_layers=1, dim=16, matmul_precision="highest")
    model, params = drawn(model)
    path, passages = tmp_path / "lambada.jsonl", ["The end of it", "One two"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))
    rwkv_jax.save(tmp_path / "model.pth", model, params)
    cell = run.of_lambada(str(tmp_path / "model.pth"), str(path), batch_size=2)

    nats = []
    for text in passages:
        ids = np.array([[0, *text.encode()]])
        log_p, _ = jax.jit(evaluate.log_likelihoods, static_argnums=0)(model, params, ids)
        nats.append(float(log_p[0, -len(text.split(" ")[-1]) - 1 :].sum()))
    assert cell["lambada_ppl"] == pytest.approx(math.exp(-np.mean(nats)), rel=1e-4)
    assert (cell["checkpoint"], cell["passages"]) == ("model", 2) and cell["lambada_openai"] in (0, 50, 100)
    path.write_text('{"txt": "a b"}\n')
    with pytest.raises(ValueError, match='expected a JSON object with a "text" in each line'):
        run.of_lambada(str(tmp_path / "model.pth"), str(path))


@pytest.mark.parametrize(
    ("checkpoint", "change", "verdict"),
    [
        ("RWKV-4-Pile-169M-20220807-8023", (1.01, 0.6), "reproduced"),
        ("RWKV-4-Pile-169M-20220807-8023", (1.04, 0.0), "contradicted"),
        ("RWKV-4-Pile-169M-20220807-8023", (1.0, 0.8), "contradicted"),
        ("another", (1.0, 0.0), "not comparable"),
    ],
)
def test_a_checkpoint_of_the_paper_is_judged_by_its_tolerance(checkpoint, change, verdict):
    cell = {"checkpoint": checkpoint, "passages": 5153}
    row = run.of_checkpoint(cell | {"lambada_ppl": 29.33 * change[0], "lambada_openai": 32.99 + change[1]})
    assert row["verdict"] == verdict


@pytest.mark.parametrize(
    ("nats", "flags_equal", "of_long_text", "verdict"),
    [
        (2e-5, True, 3e-5, "reproduced"),
        (2e-5, True, 2e-4, "contradicted"),
        (2e-4, True, 3e-5, "contradicted"),
        (2e-5, False, 3e-5, "contradicted"),
    ],
)
def test_the_scorer_is_judged_by_all_that_was_compared(nats, flags_equal, of_long_text, verdict):
    cell = {"requests": 4, "nats": nats, "flags_equal": flags_equal}
    long_text = {"tokens": 900, "nats": of_long_text, "nats_as_answered": 3e-4, "float32_spacing": 5e-4}
    told = run.conclude(run.PRESETS["cpu"], {"one pass": cell, "harness": cell | {"long_text": long_text}})
    assert told["ledger"][1]["verdict"] == verdict and "3e-04 as lm_eval rounds it" in told["ledger"][1]["ours"]
    assert len(told["not_run"]) == 6


def test_one_of_the_two_paths_alone_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="one of --model and --lambada without the other"):
        run.cells(run.PRESETS["smoke"], tmp_path, model="x")
