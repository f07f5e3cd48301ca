"""Curves of runs: from the files of their workdirs to the lines of the figure."""

import json

import numpy as np
import pytest
import training

from experiments.curves import plot
from rwkv_jax import hardware, models, train
from rwkv_jax.train import metrics


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run of six steps, evaluated twice."""
    folder = tmp_path_factory.mktemp("runs")
    config = training.config(
        training.write_text(folder / "text"), seq_len=8, batch_size=2, eval_tokens=64, diagnostics_every=3
    )
    config.model.dim = 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RWKV_JAX_CACHE", str(folder / "cache"))
        training.install_toy(patch)
        train.run(config, folder / "whole")
    return folder / "whole"


@pytest.fixture
def written(whole, tmp_path):
    """`written(name, rows, changes)`: a workdir with these rows, whose config has these changes at its top level."""

    def write(name, rows=(), changes=(), absent=()):
        workdir = tmp_path / name
        workdir.mkdir(parents=True)
        record = json.loads((whole / "config.json").read_text())
        record["config"] |= dict(changes)
        for field in absent:
            del record["config"][field]
        (workdir / "config.json").write_text(json.dumps(record))
        for row in rows:
            metrics.append(workdir / "metrics.jsonl", row)
        return str(workdir)

    return write


def losses(*values):
    return [{"step": 10 * (i + 1), "loss_nats": value} for i, value in enumerate(values)]


def test_points_of_a_run_have_steps_tokens_seconds_or_flops_as_x(whole):
    (run,) = plot.read([whole])
    x_N, y_N = plot.points(run, "valid_loss_nats", "tokens")
    assert x_N.tolist() == [3 * 16, 6 * 16] and len(y_N) == 2
    seconds_N, y_N = plot.points(run, "loss_nats", "seconds")
    assert len(y_N) == 6 and seconds_N.tolist() == [run.curves["train_seconds"][step] for step in range(1, 7)]
    assert plot.points(run, "valid_loss_nats", "seconds")[0].tolist() == seconds_N[[2, 5]].tolist()
    flops = hardware.flops_per_token(models.build("rwkv4", vocab_size=256, num_layers=2, dim=8), 8)
    assert plot.points(run, "loss_nats", "flops")[0] == pytest.approx(flops * 16 * np.arange(1, 7))


def test_points_take_the_later_of_two_rows_of_a_step(written):
    """A step has two rows until its log is truncated, and in logs of versions that did not truncate them."""
    again = [{"step": 20, "loss_nats": 4.5}, {"step": 25, "loss_nats": 3.5}]
    (run,) = plot.read([written("a", [*losses(5, 4, 3), *again])])
    assert [x.tolist() for x in plot.points(run, "loss_nats", "step")] == [[10, 20, 25, 30], [5, 4.5, 3.5, 3]]


def test_curves_table_lists_the_fields_that_differ(written, capsys, tmp_path):
    a = written("x/a", losses(5.0, 4.0), {"keep": 3, "max_loss_rise": 2.0})
    b = written("y/a", absent=("max_skipped", "data"))  # an older config; the run has logged nothing
    with open(f"{a}/metrics.jsonl", "a") as file:
        file.write('{"step": 30, "loss_n')  # a half-written row of a run in progress
    assert plot.main([a, b, a, f"--output={tmp_path / 'x.pdf'}"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["x/a", "y/a"] and lines[3] == ["last", "loss_nats", "4", "-"]
    assert sorted(lines[1:3]) == [["keep", "3", "2"], ["max_loss_rise", "2.0", "0.0"]]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["x.pdf"]
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")


def test_curves_figure_has_a_panel_for_each_nested_metric(whole, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot.plt, "close", drawn.append)
    command = [str(whole), "--y=parameter_norm,loss_nats", "--x=step", f"--output={tmp_path / 'x.png'}"]
    assert plot.main(command) == 0
    panels = drawn[0].axes
    assert [panel.get_ylabel() for panel in panels] == ["parameter norm/emb", "parameter norm/time mix", "loss nats"]
    assert [line.get_xdata().tolist() for line in panels[2].lines] == [[1, 2, 3, 4, 5, 6], [3, 6]]  # and validation
    monkeypatch.undo()
    plot.plt.close("all")


def test_curves_figure_shows_names_of_runs_without_matplotlib_markup(written, tmp_path, monkeypatch, capsysbinary):
    """In matplotlib $ starts a formula, and a name that begins with _ is left out of the legend."""
    drawn = []
    monkeypatch.setattr(plot.plt, "close", drawn.append)
    runs = [written(name, losses(5.0, 4.0)) for name in ("_a", "b$^{", "\udce4")]
    assert plot.main([*runs, f"--output={tmp_path / 'x.png'}"]) == 0
    assert b"written: " in capsysbinary.readouterr().out  # read here: pytest-xdist accepts UTF-8 only
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == ["_a", "b$^{", "\ufffd"]
    monkeypatch.undo()
    plot.plt.close("all")


def test_smoothed_averages_over_neighbouring_steps():
    rng = np.random.default_rng(0)
    steps_N, y_N = np.cumsum(rng.integers(1, 9, 50)).astype(float), rng.standard_normal(50)
    expected = [y_N[np.abs(steps_N - step) <= 10].mean() for step in steps_N]
    assert plot.smoothed((steps_N, y_N), 20) == pytest.approx(expected)
    assert plot.smoothed((steps_N, y_N), 0) == pytest.approx(y_N)


@pytest.mark.parametrize(
    "args, expected",
    [
        (["{folder}"], "is no training run: it has no config.json"),
        (["{folder}/model"], "is not that of a training run"),
        (["{folder}/good", "--y=loss"], "no run has logged 'loss', there is loss_nats"),
        (["{folder}/good", "--x=seconds"], "good has not logged train_seconds, expected --x=tokens or another"),
        (["{folder}/good", "--smooth=-1"], "smooth is -1, expected a number of steps, 0 or more"),
        (["{folder}/good", "--output={folder}/x.abc"], "Format 'abc' is not supported"),
    ],
)
def test_curves_plot_reports_mistakes_in_one_line(args, expected, written, tmp_path, capsys, monkeypatch):
    written("good", losses(1.0))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "rwkv"}')
    monkeypatch.chdir(tmp_path)
    assert plot.main([arg.format(folder=tmp_path) for arg in args]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and expected in err and err.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
