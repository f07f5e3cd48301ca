"""Users' paths in public functions, by `files.user_path`, and early checks of commands' outputs."""

import importlib
import re
from pathlib import Path

import pytest
from small import drawn, make
from weights import assert_same_params, one_line

import rwkv_jax
from rwkv_jax import RWKVForCausalLM, data, evaluate, finetune, interop, runs
from rwkv_jax.data import mixture, tokenizers
from rwkv_jax.interop.__main__ import main as convert
from rwkv_jax.train import loop, run_config
from rwkv_jax.train.__main__ import main as train

ROOT = Path(__file__).parents[1]
BYTES = tokenizers.ByteTokenizer()
LM = RWKVForCausalLM(None, None, BYTES)
CALLS = {
    "load": rwkv_jax.load,
    "describe": runs.describe,
    "trained_length": runs.trained_length,
    "locate": interop.locate,
    "save": lambda path: rwkv_jax.save(path, None, None),
    "from_pretrained": RWKVForCausalLM.from_pretrained,
    "save_pretrained": LM.save_pretrained,
    "load_context": LM.load_context,
    "save_context": lambda path: LM.save_context(path, None),
    "load_adapters": lambda path: finetune.load_adapters(path, None, None),
    "save_adapters": lambda path: finetune.save_adapters(path, None, None, None, 1.0),
    "export": lambda path: finetune.export(path, "x"),
    "merge": lambda path: finetune.merge(path, "x", "x"),
    "get_tokenizer": tokenizers.get_tokenizer,
    "save_tokenizer": lambda path: tokenizers.save(BYTES, path),
    "tokenizer_of_model": lambda path: tokenizers.of_model(path, 256),
    "corpus": data.prepare,
    "corpus_of_a_tokenizer": lambda path: data.prepare("stdlib", path),
    "write_corpus": lambda path: data.to_megatron("stdlib", "bytes", path),
    "mixture": mixture.prepare,
    "held_out": lambda path: evaluate._held_out(path, BYTES, None),
    "config": run_config.read,
    "workdir": lambda path: loop.run(None, path),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_public_functions_refuse_text_that_cannot_be_a_path(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("", "a\0b"):
        with one_line("is not a path"):
            call(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_public_functions_report_a_missing_home_folder(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # no entry in /etc/passwd either
    with one_line("~/x begins with the home folder, and there is none: set HOME"):
        call("~/x")
    assert not list(tmp_path.iterdir())


def test_cache_dir_needs_a_home_folder_only_without_environment_variables(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "RWKV_JAX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with one_line("~/.cache begins with the home folder, and there is none: set HOME"):
        data.cache_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(data.cache_dir()) == "/somewhere/rwkv_jax"


def test_user_path_is_the_only_reader_of_paths_in_the_sources():
    pattern = re.compile(r"type=Path\b|expanduser|Path\.home|Path\(sys\.argv")
    sources = [path for folder in ("rwkv_jax", "configs", "experiments") for path in (ROOT / folder).rglob("*.py")]
    found = {path.name for path in sources if pattern.search(path.read_text())}
    assert found == {"files.py"}


def test_public_functions_and_commands_expand_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, params = drawn(make("rwkv4", vocab_size=256))
    rwkv_jax.save("~/model.pth", model, params)
    assert convert(["~/model.pth", "~/folder"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model.pth", "folder"}
    assert_same_params(rwkv_jax.load("~/folder")[1], params)
    assert tokenizers.get_tokenizer("~/folder/tokenizer.json") == BYTES
    workdirs = []

    def assembled(config, workdir):
        workdirs.append(workdir)
        raise ValueError

    monkeypatch.setattr(loop, "assembled", assembled)
    (tmp_path / "config.py").write_bytes(Path(ROOT, "configs/tiny.py").read_bytes())
    assert train(["--config=~/config.py", "--workdir=~/run"]) == 2
    assert workdirs == [tmp_path / "run"]


# Arguments of commands whose inputs do not exist either: the line must name the output, which is looked at first.
FILE_OUTPUTS = {
    "generate": ["--model=absent", "--prompt=a", "--save_context={}"],
    "interop": ["absent", "{}"],
    "finetune export": ["export", "absent", "{}"],
    "finetune merge": ["merge", "absent", "absent", "{}"],
    "data": ["absent", "--write={}"],
}
FOLDER_OUTPUTS = {
    "train": ["--config=configs/tiny.py", "--config.corpus=absent", "--workdir={}"],
    "interop": ["absent", "{}", "--format=huggingface"],
    "harness": ["--model=absent", "--tasks=absent", "--output_path={}"],
}


@pytest.mark.parametrize("name, arguments", [*FILE_OUTPUTS.items(), *FOLDER_OUTPUTS.items()])
def test_commands_check_every_output_before_the_work(name, arguments, tmp_path, capsys):
    """Covers an output below a file, a file in an absent folder, and a file in place of a folder."""
    module = f"rwkv_jax.{name.split()[0]}"
    is_module = importlib.util.find_spec(module).submodule_search_locations is None
    main = importlib.import_module(module if is_module else f"{module}.__main__").main
    (tmp_path / "file").touch()
    for taken in ("taken.pth", "taken.pth.bin"):
        (tmp_path / taken).mkdir()
    before = sorted(tmp_path.rglob("*"))
    for output in ("file/x.pth", *(("none/x.pth", "taken.pth") if arguments in FILE_OUTPUTS.values() else ())):
        assert main([argument.format(tmp_path / output) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert err.startswith("error: ") and str((tmp_path / output).parent) in err and "absent" not in err
    assert sorted(tmp_path.rglob("*")) == before
