"""The figures of `results.json`: ops.png and startup.png, as far as their suites are in it.

python -m experiments.speed.plot [results.json [folder]]
"""

from pathlib import Path

from experiments.figures import SMALLEST, label_ends, panels, saved, titled
from rwkv_jax.command import Parser, end, reported
from rwkv_jax.files import read_json, user_path

FORMS = (  # colour and marker, in the order of the results
    ("#d55e00", "o"),
    ("#0072b2", "s"),
    ("#009e73", "D"),
    ("#cc79a7", "^"),
    ("#000000", "v"),
    ("#e69f00", "P"),
    ("#56b4e9", "*"),
    ("#882255", "X"),
)
PARTS = {"trace": "#0072b2", "lower": "#e69f00", "compile": "#009e73"}


def draw_ops(results, path) -> None:
    """Time a token, forward and with the backward pass, and the share of copy bandwidth, against T.

    Of the sizes, the one that has most lengths.
    """
    rows = [row for row in results["rows"] if row["seconds"]]
    lengths = {}
    for row in rows:
        lengths.setdefault(tuple(row["shape"][2:]), set()).add(row["shape"][1])
    dim, dtype = max(lengths, key=lambda size: len(lengths[size]))
    rows = [row for row in rows if row["shape"][2:] == [dim, dtype]]
    a_token = lambda row: 1e9 * row["seconds"] / (row["shape"][0] * row["shape"][1])
    measured = (
        ("forward", "ns a token", "forward", a_token),
        ("forward and backward", "ns a token", "both", a_token),
        ("forward and backward", "share of copy bandwidth, %", "both", lambda row: 100 * row["share_of_copy"]),
    )
    figure, [axes] = panels(3, width=4.5, height=3.9)
    forms = dict(zip(dict.fromkeys(row["form"] for row in rows), FORMS, strict=False))
    for axis, (title, label, which, value) in zip(axes, measured, strict=True):
        for form, (color, marker) in forms.items():
            its = [row for row in rows if (row["form"], row["pass"]) == (form, which)]
            points = sorted((row["shape"][1], value(row)) for row in its)
            axis.plot([T for T, _ in points], [y for _, y in points], color=color, marker=marker, label=form)
        axis.set(xlabel="T, tokens", ylabel=label, xscale="log", yscale="log", title=title)
        label_ends(axis)
    both = {(row["form"], row["shape"][1]): a_token(row) for row in rows if row["pass"] == "both"}
    most = max((T for _, T in both if all((form, T) in both for form in forms)), default=0)
    told = ", ".join(f"{form} {both[form, most]:,.0f}" for form in forms if (form, most) in both)
    at = f" at T {most:,}: {told}" if told else ""
    finding = f"WKV-4, ns a token forward and backward{at}"
    titled(figure, {"stamp": _stamp(results)}, finding, f"D {dim}, {dtype}")
    saved(figure, path)


def draw_startup(results, path) -> None:
    """Stacked bars of tracing, lowering and compiling, a panel a size; what it is compared with is paler."""
    sizes = list(dict.fromkeys(row["size"] for row in results["rows"]))
    figure, axes = panels(len(sizes), width=5.5, height=3.9)
    for axis, size in zip(axes[0], sizes, strict=True):
        rows = [row for row in results["rows"] if row["size"] == size]
        names = [f"{row['program']}, {row['layout']}" for row in rows]
        for side, shift, alpha in (("ours", -0.2, 1.0), ("before", 0.2, 0.4)):
            bars = [(y + shift, row[side]) for y, row in enumerate(rows) if side in row]
            for i, (part, color) in enumerate(PARTS.items()):
                left = [sum(list(seconds.values())[:i]) for _, seconds in bars]
                widths = [seconds[part] for _, seconds in bars]
                axis.barh([y for y, _ in bars], widths, 0.36, left, color=color, alpha=alpha, label=part)
            totals = [f" {sum(seconds.values()):.1f}" for _, seconds in bars]
            axis.bar_label(axis.containers[-1], totals, fontsize=SMALLEST)
        axis.set_yticks(range(len(rows)), names)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.grid(axis="x")
        axis.grid(visible=False, axis="y")
        axis.set(title=size, xlabel="seconds", xlim=(0, None))
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles[:3], names[:3], ncols=3, loc="outside upper right")
    first = results["rows"][0]
    told = [
        f"{sum(first[side].values()):.1f} s{name}"
        for side, name in (("ours", ""), ("before", " before"))
        if side in first
    ]
    finding = f"Compilation of the {first['program']} of {first['size']}, {first['layout']}: {', '.join(told)}"
    paler = f"paler: commit {results['against']}" if results["against"] else "until the first result"
    titled(figure, {"stamp": _stamp(results)}, finding, paler)
    saved(figure, path)


def _stamp(results) -> dict:
    stamp = results["stamp"]
    return stamp | ({"devices": [f"{stamp['cores']} CPU cores"]} if stamp["devices"] == ["cpu"] else {})


DRAW = {"ops": draw_ops, "startup": draw_startup}


@reported()
def main(argv=None) -> None:
    parser = Parser(prog="python -m experiments.speed.plot", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=user_path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("folder", nargs="?", type=user_path, help="for the figures; default: that of the results")
    args = parser.parse_args(argv)
    measured = read_json(args.results)
    for suite, draw in DRAW.items():
        if suite in measured:
            draw(measured[suite], (args.folder or args.results.parent) / f"{suite}.png")


if __name__ == "__main__":
    end(main())
