"""Our adapter for lm-evaluation-harness against its own for transformers, on the same weights and questions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from small import drawn

import rwkv_jax
from rwkv_jax.data.tokenizers import get_tokenizer

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[2]
CORPUS = Path(json.__file__).read_text()  # a text in every Python installation
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{context}"
{rest}
"""
TASKS = {
    "choice": ("multiple_choice", "{{question}}", "doc_to_choice: '{{choices}}'\ndoc_to_target: gold"),
    "word": ("loglikelihood", "", "doc_to_target: '{{text}}'\nmetric_list: [{metric: acc}]"),
    "rolling": ("loglikelihood_rolling", "", "doc_to_target: '{{text}}'\nmetric_list: [{metric: bits_per_byte}]"),
    "text": (
        "generate_until",
        "{{question}}",
        "doc_to_target: '{{text}}'\ngeneration_kwargs: {until: ['e', 'ab'], max_gen_toks: 24}\n"
        "metric_list: [{metric: exact_match}]",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a tokenizer, and a task of each kind on seven questions with a common beginning."""
    folder = tmp_path_factory.mktemp("harness")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator([CORPUS], trainer)
    library.save(str(folder / "tokenizer.json"))
    tokenizer = get_tokenizer(str(folder / "tokenizer.json"))
    model = rwkv_jax.build("rwkv4", vocab_size=320, num_layers=2, dim=32, matmul_precision="highest")
    lm = rwkv_jax.RWKVForCausalLM(*drawn(model), tokenizer)
    lm.save_pretrained(folder / "model")
    rng, words = np.random.default_rng(0), CORPUS.split()
    some = lambda low, high: " ".join(rng.choice(words, rng.integers(low, high)))
    beginning = some(30, 31)
    questions = [
        {
            "question": f"{beginning} {some(1, 12)}",
            "choices": [some(1, 4) for _ in range(3)],
            "gold": int(rng.integers(3)),
            "text": some(10, 150),
        }
        for _ in range(7)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    for name, (kind, context, rest) in TASKS.items():
        task = TASK.format(name=f"ours_{name}", data=folder / "data.jsonl", kind=kind, context=context, rest=rest)
        (folder / f"{name}.yaml").write_text(task)
    return folder


def run(folder, *command):
    """The answers of a command to all tasks: for each task a list with an entry for each question."""
    out = folder / command[2].replace(".", "_")
    env = os.environ | {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    tasks = ["--tasks", ",".join(f"ours_{name}" for name in TASKS), "--include_path", folder]
    command = [sys.executable, *command, *tasks, "--log_samples", "--output_path", out]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = {}
    for path in out.rglob("samples_*.jsonl"):
        name = path.name.removeprefix("samples_ours_").rpartition("_")[0]
        answers[name] = [json.loads(line)["resps"] for line in path.read_text().splitlines()]
    assert answers.keys() == TASKS.keys()
    return answers


def test_harness_command_answers_equal_those_of_lm_evals_hf_model(folder):
    theirs = run(
        folder, "-m", "lm_eval", "run", "--model=hf", "--batch_size=1", f"--model_args=pretrained={folder}/model"
    )
    ours = run(folder, "-m", "rwkv_jax.harness", f"--model={folder}/model", "--batch_size=3")
    assert ours["text"] == theirs["text"] and any(text for [[text]] in ours["text"])
    for name in ("choice", "word", "rolling"):
        numbers = lambda answers, name=name: np.array([[float(np.ravel(r)[0]) for r in row] for row in answers[name]])
        # the other adapter sums in float32, with one more rounding than ours
        np.testing.assert_allclose(numbers(ours), numbers(theirs), rtol=np.finfo(np.float32).eps, atol=1e-4)
    for name in ("choice", "word"):
        flags = lambda answers, name=name: [[str(np.ravel(r)[1]) for r in row] for row in answers[name]]
        assert flags(ours) == flags(theirs)


def adapter(folder, **settings):
    from rwkv_jax.harness import HarnessLM

    return HarnessLM(folder / "model", **settings)


def ask(method, *arguments):
    from lm_eval.api.instance import Instance

    return method([Instance("loglikelihood", {}, args, i) for i, args in enumerate(arguments)], disable_tqdm=True)


def nats(lm, context, ids):
    return lm._loglikelihood_tokens([(None, context, ids)], disable_tqdm=True)[0][0]


def test_harness_lm_max_length_truncates_contexts_and_rolls_in_windows(folder):
    lm, short = adapter(folder), adapter(folder, max_length=16)
    ids = lm.tok_encode(CORPUS[:200])[:40]
    assert nats(short, ids, [5]) == pytest.approx(nats(lm, ids[-16:], [5]), rel=1e-5)
    assert nats(short, ids, [5, 6]) == pytest.approx(nats(lm, ids[-15:], [5, 6]), rel=1e-5)
    with pytest.raises(ValueError, match="17 tokens to predict, expected at most the max_length of 16"):
        nats(short, [0], ids[:17])
    text = lm.lm.tokenizer.decode(ids)
    assert lm.tok_encode(text) == ids
    (whole,), (cut,) = (ask(one.loglikelihood_rolling, (text,)) for one in (lm, short))
    windows = (([0], ids[:16]), (ids[15:16], ids[16:32]), (ids[23:32], ids[32:]))
    assert whole == pytest.approx(nats(lm, [0], ids), rel=1e-5)
    assert cut == pytest.approx(sum(nats(lm, *window) for window in windows), rel=1e-5) != pytest.approx(whole)


def test_harness_lm_prepends_token_zero_with_add_bos_token(folder):
    plain, with_bos = adapter(folder), adapter(folder, add_bos_token=True)
    assert with_bos.tok_encode("ab") == [0, *plain.tok_encode("ab")] and with_bos.tok_encode("<|endoftext|>") == [0]
    assert ask(with_bos.loglikelihood, ("", "ab")) == ask(plain.loglikelihood, ("", "ab"))
    assert ask(with_bos.loglikelihood, ("def", " x")) == ask(plain.loglikelihood, ("<|endoftext|>def", " x"))
    assert ask(with_bos.loglikelihood, ("def", " x")) != ask(plain.loglikelihood, ("def", " x"))
    assert ask(with_bos.loglikelihood_rolling, ("def x",)) == ask(plain.loglikelihood_rolling, ("def x",))
    line_break = adapter(folder, prefix_token_id=plain.tok_encode("\n")[0])
    ((found, _),) = ask(line_break.loglikelihood, ("", "ab"))
    assert found == nats(plain, plain.tok_encode("\n"), plain.tok_encode("ab"))
    # the harness moves spaces at the end of a context to the continuation, here all of it
    assert ask(plain.loglikelihood, ("\n", "ab")) == ask(plain.loglikelihood, ("", "\nab"))


@pytest.mark.parametrize("kind", ["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def test_harness_lm_answers_equal_those_of_the_object_interface(kind, folder):
    from rwkv_jax.harness import HarnessLM

    model = rwkv_jax.build(kind, vocab_size=320, num_layers=2, dim=32, head_size=16)
    lm = rwkv_jax.RWKVForCausalLM(*drawn(model, scale=0.3), get_tokenizer(str(folder / "tokenizer.json")))
    harness = HarnessLM(lm, batch_size=2)
    texts = [CORPUS[a:b].strip() for a, b in ((0, 40), (0, 25), (40, 90))]  # the harness would move spaces at the end
    rolling = ask(harness.loglikelihood_rolling, *((text,) for text in texts))
    assert rolling == pytest.approx([float(lm.score(text).sum()) for text in texts], rel=1e-5)
    found = ask(harness.loglikelihood, *((text, " x") for text in texts))
    following = lm.tokenizer.encode(" x")
    expected = [float(lm.score(following, lm.read(text)).sum()) for text in texts]
    assert [nats for nats, _ in found] == pytest.approx(expected, rel=1e-5)
    generated = ask(harness.generate_until, *((text, {"max_gen_toks": 9}) for text in texts))
    assert generated == lm.generate(texts, max_new_tokens=9, temperature=0)


def test_harness_lm_generate_until_follows_the_settings_of_a_task(folder):
    lm = adapter(folder, batch_size=2)
    generated = lambda asked, *contexts: ask(lm.generate_until, *((context, asked) for context in contexts))
    settings = {"max_gen_toks": 9, "do_sample": True, "temperature": 0.8, "top_p": 0.9}
    texts = generated(settings, "def", "", "import json", "def")
    assert texts == generated(settings, "def", "", "import json", "def")
    (greedy,) = generated({"max_gen_toks": 9}, "def")
    assert greedy == lm.lm.generate("def", max_new_tokens=9, temperature=0) != texts[0]
    assert generated({"max_gen_toks": 9, "until": greedy[3]}, "def") == [greedy[: greedy.index(greedy[3])]]
    same = {"max_gen_toks": 9, "do_sample": False, "temperature": 0.0, "num_beams": 1}
    assert generated(same, "def") == generated(same | {"temperature": 1}, "def") == [greedy]
    (penalised,) = generated({"max_gen_toks": 9, "presence_penalty": 1e3}, "def")
    assert penalised == lm.lm.generate("def", max_new_tokens=9, temperature=0, presence_penalty=1e3) != greedy
    with pytest.raises(ValueError, match="hold repetition_penalty, expected"):
        generated({"repetition_penalty": 2.0}, "def")
    with pytest.raises(ValueError, match="tokenizer and dtype are for a path or a hub name"):
        type(lm)(lm.lm, dtype="bfloat16")
    with pytest.raises(ValueError, match="hold length_penalty, expected some of until, max_gen_toks"):
        generated({"length_penalty": 4}, "def")


def shipped_settings():
    """Yield the generation_kwargs of every task file of the installed lm_eval, as a task hands them to a model."""
    import lm_eval.tasks
    import yaml
    from lm_eval.config.task import TaskConfig

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)  # !function utils.process_docs
    for path in sorted(Path(lm_eval.tasks.__file__).parent.rglob("*yaml*")):
        content = path.read_bytes() if path.is_file() and path.suffix != ".pyc" else b""
        if b"\ngeneration_kwargs:" in content:
            yield TaskConfig(generation_kwargs=yaml.load(content, Loader)["generation_kwargs"]).generation_kwargs
    yield TaskConfig().generation_kwargs  # the default of tasks without settings


def test_harness_settings_accept_every_task_that_lm_eval_ships(caplog):
    from rwkv_jax.harness.adapter import _settings

    shipped = [(asked, *_settings(asked)) for asked in shipped_settings()]
    assert len(shipped) > 300
    for asked, sampling, stop, count in shipped:
        drawn = asked.get("do_sample", asked.get("temperature", 0) > 0)
        expected = {"temperature": asked.get("temperature", 1.0) if drawn else 0.0}
        assert sampling == expected | {name: asked[name] for name in ("top_p", "top_k") if name in asked}
        assert [text for text in asked["until"] if text] == stop
        assert count == asked.get("max_gen_toks", asked.get("max_new_tokens", 256))
    beams = {asked["num_beams"] for asked, *_ in shipped if asked.get("num_beams", 1) != 1}
    assert all(f"num_beams is {count}, read as 1" in caplog.text for count in beams)


def test_harness_lm_refuses_impossible_settings(folder):
    for settings, message in (
        ({"batch_size": "auto"}, "batch_size is 'auto', expected a whole number"),
        ({"max_length": 1}, "max_length is 1, expected at least 2"),
        ({"prefix_token_id": 320}, "prefix_token_id is 320, expected 0 to 319"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter(folder, **settings)


def test_harness_lm_limits_attention_to_its_trained_length(tmp_path, folder):
    model = rwkv_jax.build("transformer", vocab_size=320, num_layers=1, dim=32)
    rwkv_jax.save(tmp_path / "model", *drawn(model), format="safetensors")
    lm = adapter(tmp_path, tokenizer=str(folder / "tokenizer.json"), batch_size=2)
    assert lm.max_length == 1024
    assert len(ask(lm.loglikelihood, ("def", " x"), ("def", " main("))) == 2


def test_harness_command_reports_a_mistake_in_one_line(tmp_path, monkeypatch, capsys):
    """lm_eval would first index its thousands of tasks; this stand-in only makes the model."""
    from rwkv_jax.harness import HarnessLM
    from rwkv_jax.harness.__main__ import main

    def cli_evaluate():
        *command, settings, batch_size, tasks, output = sys.argv
        assert command == ["lm_eval", "run", "--model=rwkv_jax", "--model_args"]
        assert (batch_size, tasks, output) == ("--batch_size=3", "--tasks=piqa", f"--output_path={tmp_path}/results")
        assert json.loads(settings) == {"pretrained": f"{tmp_path}/absent", "add_bos_token": True}
        HarnessLM(**json.loads(settings))

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", cli_evaluate)
    monkeypatch.setenv("HOME", str(tmp_path))
    before, rest = list(sys.argv), ["--tasks=piqa", "--output_path=~/results"]
    assert main([f"--model={tmp_path}/absent", "--batch_size=3", "--add_bos_token", *rest]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/absent: no such file") and error.count("\n") == 1
    assert sys.argv == before
