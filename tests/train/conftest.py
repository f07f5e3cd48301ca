"""A text, and runs of the toy of tests/training.py, once for each file that asks for them."""

import pytest
import training


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def text(module_patch, tmp_path_factory):
    """A text, and a cache of tokens of its own."""
    folder = tmp_path_factory.mktemp("text")
    module_patch.setenv("RWKV_JAX_CACHE", str(folder / "cache"))
    return training.write_text(folder / "corpus.txt")


@pytest.fixture(scope="module")
def toy(module_patch):
    """Runs of this file train the toy."""
    training.install_toy(module_patch)


@pytest.fixture(scope="module")
def runs(toy, text, tmp_path_factory):
    return training.make_runs(text, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def half(runs, tmp_path):
    """A copy of the workdir of a run that died after its step 4 was saved."""
    return training.copied(runs.half, tmp_path / "run")
