"""The README in both languages: short, the same code, the tree on disk, and an example that runs."""

import re
from pathlib import Path

import pytest
from training import config, write_text

from rwkv_jax import train

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = (ROOT / name for name in ("README.md", "README.zh.md"))


def blocks(page: Path, language: str = "") -> list[str]:
    """Return the code blocks of a page, without comments."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [re.sub(r" *# .*", "", block) for its, block in found if its == language]


def test_readme_is_short():
    text = ENGLISH.read_text()
    assert len(text.split()) <= 1200
    assert len(re.findall(r"^\|[- |]+\|$", text, re.MULTILINE)) <= 3


def test_chinese_readme_has_the_code_links_and_headings_of_the_english_one():
    for language in ("python", "sh"):
        assert blocks(CHINESE, language) == blocks(ENGLISH, language)
    links = lambda page: sorted(set(re.findall(r"\]\((?!README)(.*?)\)", page.read_text())))
    assert links(CHINESE) == links(ENGLISH)
    headings = lambda page: len(re.findall(r"^## ", page.read_text(), re.MULTILINE))
    assert headings(CHINESE) == headings(ENGLISH)


def test_readme_links_lead_to_files():
    links = re.findall(r"\]\((?!http)([^)#]+)", ENGLISH.read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_tree_of_the_readme_is_the_tree_on_disk(page):
    tree = next(block for block in blocks(page) if block.startswith("rwkv_jax/"))
    named = set(re.findall(r"[a-z0-9_]+(?:/|\.py)", tree))
    package = ROOT / "rwkv_jax"
    on_disk = {f"{path.name}/" for path in package.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    on_disk |= {path.name for path in package.glob("[a-z]*.py")}
    on_disk |= {"configs/", "experiments/", "notebooks/", "docs/", "tests/", "rwkv_jax/"}
    on_disk |= {path.name for path in (ROOT / "configs").glob("*.py")}
    assert on_disk <= named


@pytest.mark.slow
def test_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """With a tiny run in the place of that of `make compare`."""
    monkeypatch.chdir(tmp_path)
    fields = {"model.num_layers": 1, "model.dim": 16, "steps": 2, "eval_every": 0, "eval_tokens": 0}
    its = config(write_text(tmp_path / "text.txt"))
    its.update_from_flattened_dict(fields)
    train.run(its, Path("runs/compare/rwkv7"))
    code = "".join(blocks(ENGLISH, "python")[:2])
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["logits_BTV"].shape == (2, 1, 256) and names["lm"].model.vocab_size == 256
    assert capsys.readouterr().out
