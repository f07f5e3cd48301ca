"""Runs of the toy of tests/training.py, once for each file that requests them."""

import pytest
import training


@pytest.fixture(scope="module")
def toy(module_patch):
    """Makes runs of this file train the toy."""
    training.install_toy(module_patch)


@pytest.fixture(scope="module")
def runs(toy, text, tmp_path_factory):
    return training.make_runs(text, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def half(runs, tmp_path):
    """A copy of the workdir of a run that died after its step 4 was saved."""
    return training.copied(runs.half, tmp_path / "run")
