"""The command of the experiments: resumed cells, separate presets; sweeps checked by hand."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from experiments import command, stamp, sweeps

ROOT = Path(command.__file__).parents[1]
COMMANDS = [path for path in sorted(ROOT.glob("experiments/**/*.py")) if "\ndef main(argv=None)" in path.read_text()]


@dataclass(frozen=True)
class Preset:
    size: int = 3
    text: str = "stdlib"


PRESETS = {"smoke": Preset(1), "cpu": Preset(2), "gpu": Preset(3)}


class Experiment:
    """Three cells, the second of which may be interrupted, and a log of the computed ones."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.ran, self.interrupted = folder / "reach", [], False
        monkeypatch.chdir(folder)
        monkeypatch.setattr(command, "draw", lambda name, path: path)

    def cells(self, preset, workdir, model=None):
        def cell(name):
            if self.interrupted and name == "b":
                raise KeyboardInterrupt
            self.ran.append(name)
            return {"value": preset.size, "in": str(workdir)}

        return {name: (lambda name=name: cell(name)) for name in ("a", "b", "c", *filter(None, [model]))}

    def conclude(self, preset, values):
        row = {"artefact": "Table 0", "paper": "1", "ours": str(values["a"]["value"]), "verdict": "same sign"}
        return {"ledger": [row]}

    def __call__(self, *argv):
        doc = "What is asked.\n\nHow it is done."
        options = {"model": "weights"}
        return command.main(self.folder, doc, PRESETS, self.cells, self.conclude, options=options, argv=argv)


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    return Experiment(tmp_path, monkeypatch)


def test_experiment_command_keeps_finished_cells_after_an_interrupt(experiment, capsys):
    experiment.interrupted = True
    assert experiment() == 130
    assert not (experiment.folder / "results.json").exists()
    experiment.interrupted = False
    assert experiment() == 0
    assert experiment.ran == ["a", "b", "c"]
    results = json.loads((experiment.folder / "results.json").read_text())
    assert list(results["cells"]) == ["a", "b", "c"] and results["fields"] == {"size": 2, "text": "stdlib"}
    assert results["cells"]["a"]["in"] == "runs/reach/cpu"
    assert results["wall_seconds"] == sum(cell["wall_seconds"] for cell in results["cells"].values())
    assert "Table 0: 2 (paper: 1): same sign" in capsys.readouterr().out
    assert experiment("--again") == 0
    assert experiment.ran == ["a", "b", "c"] * 2


def test_experiment_command_keeps_cells_of_each_preset_and_option(experiment):
    read = lambda name="results": json.loads((experiment.folder / f"{name}.json").read_text())
    assert experiment() == 0 and experiment("--preset=gpu") == 0 and experiment("--text=other.txt") == 0
    assert experiment.ran == ["a", "b", "c"] * 3
    assert read("gpu")["cells"]["a"]["value"] == 3 and read()["fields"]["text"] == "other.txt"
    for argv, added in ((["--model=x.pth"], ["x.pth"]), ([], []), (["--model=x.pth"], ["x.pth"])):
        assert experiment("--text=other.txt", *argv) == 0 and list(read()["cells"]) == ["a", "b", "c", *added]
    assert experiment.ran == [*["a", "b", "c"] * 3, "x.pth"]


def test_experiment_command_smoke_does_not_replace_results(experiment, tmp_path, capsys):
    assert experiment("--smoke") == 2
    assert capsys.readouterr().err.startswith("error: --smoke would overwrite real results")
    assert experiment("--smoke", f"--out={tmp_path / 'out'}") == 0
    assert not (tmp_path / "runs").exists() and not experiment.folder.exists()
    assert experiment.ran == ["a", "b", "c"]


def test_experiment_command_refreshes_the_ledger_for_its_own_folder_only(experiment, tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text("<!-- hours -->\n<!-- end -->")
    monkeypatch.setattr(command.ledger, "HERE", tmp_path)
    monkeypatch.setattr(command.ledger, "ORDER", ("reach",))
    monkeypatch.setattr(command.ledger, "FILES", (page,))
    assert experiment(f"--out={tmp_path / 'elsewhere'}") == 0 and page.read_text() == "<!-- hours -->\n<!-- end -->"
    assert experiment() == 0 and "0.0 hours in all" in page.read_text()


@pytest.mark.parametrize(
    ("best", "better", "widest", "expected"),
    [
        (2, min, None, ["4", "8", "16", "2", "1"]),  # the best rate is at an end until 1 is worse
        (64, max, None, ["4", "8", "16", "32", "64", "128"]),
        (64, max, 4, ["4", "8", "16", "32"]),
    ],
)
def test_sweep_search_stops_when_the_best_rate_has_two_neighbours(best, better, widest, expected):
    distance, sign, values = lambda rate: abs(np.log2(rate / best)), 1 if better is min else -1, {}
    found = list(sweeps.search((4, 8, 16), values, lambda rate: sign * distance(rate), better, widest))
    assert found == expected == list(values)
    assert list(sweeps.search((4, 8, 16), values, None, better, widest)) == []  # nothing is computed again


def test_sweeps_lr_reads_swept_rates_and_interpolates_between_widths(tmp_path):
    path = tmp_path / "sweep.json"
    assert sweeps.lr(path, "transformer+shift", 4, 128) == 4e-3 and sweeps.lr(path, "lstm", 4, 128) is None
    assert sweeps.lr(path, "rwkv4", 3, 32) == pytest.approx(sweeps.lr(path, "rwkv4", 2, 64))
    assert sweeps.lr(path, "rwkv4", 3, 90) == pytest.approx((16e-3 * 8e-3) ** 0.5, rel=0.02)
    assert 6e-4 < sweeps.lr(path, "rwkv4", 12, 512) < 4e-3
    for name in ("lstm 4x128", "lstm 4x128", "rwkv4 4x128"):
        sweeps.bracket(path, name, 2.2e-3, lambda lr: abs(np.log2(lr / 16e-3)), steps=len(name))
    found = json.loads(path.read_text())
    assert {name: made["steps"] for name, made in found["made"].items()} == {"lstm 4x128": 10, "rwkv4 4x128": 11}
    assert list(sweeps.swept(path)["lstm 4x128"]) == ["0.001", "0.002", "0.004", "0.008", "0.016", "0.032"]
    assert sweeps.lr(path, "lstm", 4, 128) == 16e-3
    assert sweeps.lr(path, "rwkv4", 4, 128) == 8e-3  # compare's: finished runs keep their rate


def test_stamp_leaves_out_the_output_folder(monkeypatch):
    monkeypatch.setattr("sys.argv", ["run.py", "--smoke", "--out=/a", "--seed=1", "--out", "/b", "--text=x"])
    assert stamp.stamp()["command"].endswith(" --smoke --seed=1 --text=x")


@pytest.mark.parametrize(
    "module, arguments", [("compare.run", ["--duration=1e6", "--out"]), ("curves.plot", ["absent", "--output"])]
)
def test_experiment_commands_refuse_an_unwritable_output_before_computing(module, arguments, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert importlib.import_module(f"experiments.{module}").main([*arguments, f"{tmp_path}/file/x.png"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and f"{tmp_path}/file" in err and "absent" not in err


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_experiment_commands_report_an_unknown_option_in_one_line(path, capsys):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert importlib.import_module(name).main(["--unknown"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
