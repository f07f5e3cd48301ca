"""Figures: labels at the ends of lines, their order, and no label on another; which files are drawn."""

import numpy as np
import pytest

from experiments import figures, results


@pytest.mark.parametrize(
    "y, expected",
    [
        ([5], [5]),
        ([0, 10, 4], [0, 10, 4]),
        ([5, 5, 5], [4, 5, 6]),
        ([2, 1.8, 9], [2.4, 1.4, 9]),
        ([0, 0], [0, 1]),
        ([10, 10], [9, 10]),
        ([5, 5.5, 6.2, 7], [4.425, 5.425, 6.425, 7.425]),
    ],
)
def test_spread_moves_labels_no_farther_than_they_need(y, expected):
    assert figures.spread(y, gap=1, low=0, high=10) == pytest.approx(expected)


def test_saved_keeps_labels_apart_in_the_order_of_their_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(figures.plt, "close", lambda figure: None)
    figure, [[axis]] = figures.panels(1)
    for arm, y in zip(figures.COLOURS, (2.0, 2.001, 2.002, 1e3, np.nan), strict=False):
        axis.plot([1, 2], [1, y], **figures.style(arm))
    axis.axhline(2.003, label="a level")
    axis.set_yscale("log")
    figures.label_ends(axis)
    figures.saved(figure, tmp_path / "figure.png")
    heights = {text.get_text(): text.get_position()[1] for text in axis.texts}
    assert sorted(heights, key=heights.get) == ["transformer", "rwkv4", "rwkv5", "rwkv6", "a level", "rwkv7"]
    line = figures.SMALLEST / 72 * figure.dpi / axis.get_window_extent().height
    assert (np.diff(sorted(heights.values())) >= line).all()
    monkeypatch.undo()
    figures.plt.close(figure)


def test_redraw_draws_every_results_file_and_no_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "HERE", tmp_path)
    monkeypatch.setattr(results, "draw", lambda name, path: path.name)
    monkeypatch.setattr(results.sys, "argv", ["plot.py"])
    (tmp_path / "tracking").mkdir()
    for name in ("results.json", "long.json", "long.png", "sweep.json"):
        (tmp_path / "tracking" / name).touch()
    with pytest.raises(SystemExit):
        results.redraw("tracking")
    assert capsys.readouterr().out == "written: long.json\nwritten: results.json\n"
