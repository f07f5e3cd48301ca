"""Tables of the README files and docs/results.md, generated from committed results.

    python -m experiments.ledger                      rewrites the blocks of FILES
    python -m experiments.ledger --run                runs the `cpu` presets first, but the long ones: make reproduce

A block of a file stands between `<!-- NAME -->` and `<!-- end -->`; the rest is prose.
"""

import re
import signal
import subprocess
import sys
from pathlib import Path

from experiments import answers, engineering
from experiments.engineering import hardware, table
from experiments.perplexity import table as perplexity
from rwkv_jax.command import Parser, end, reported
from rwkv_jax.files import read_json

HERE = Path(__file__).parent
PERPLEXITY = HERE / "perplexity" / "results.json"
ROOT = HERE.parent
FILES = (ROOT / "README.md", ROOT / "README.zh.md", ROOT / "docs" / "results.md", HERE / "README.md")
# In the order of the paper, after what all else rests on. A folder that is not named here comes last.
ORDER = (
    "trajectory", "perplexity", "scaling", "context", "inference", "lra", "small_init", "decays", "trace", "zero_shot",
    "recall", "tracking", "order", "reach", "ablations", "ablations_rwkv7", "bf16",
)  # fmt: skip

# `make reproduce` names them; all others together take under two hours.
LONG = ("perplexity", "scaling", "ablations", "ablations_rwkv7", "recall", "tracking")
# Claims of the first table of experiments/README.md.
FIRST = (
    "The released trainer, step for step",
    "The released trainer of RWKV-7, step for step",
    "Table 5: RWKV-4 minus transformer, bits a byte",
    "rwkv4 minus transformer+shift, bits a byte",
    "rwkv7 minus transformer+shift, bits a byte",
    "rwkv7 minus rwkv4, bits a byte",
    "Compute at equal loss, rwkv7 over rwkv4",
    "Compute at equal loss, rwkv4 over transformer",
    "Recall (section 9; Tables 6, 7)",
    "Recall by version, RWKV-4 against RWKV-6",
    "State tracking, A5: rwkv7 minus transformer, token 16 (trained on 16)",
    "State tracking, S3: rwkv7 (removal 2) minus rwkv7, token 32 (trained on 16)",
    "Longest lag of a copied symbol, RWKV-7",
    "Section 5.2, longer windows 1:10:10",
    "Parts of the model, one taken away at a time",
    "RWKV-7, parts taken away one at a time",
    "RWKV-7 from fla's start values of March 2025",
    "Appendix E, initial values as printed",
    "Fig. 9, small initial embedding with LN0",
    "Fig. 10, learned or given",
    "Fig. 11, a fact goes deeper after its subject (small model)",
    "Table 1: training against T, at equal B T",
    "Table 1: a token's time and memory against context",
    "Fig. 13: memory for 512 tokens, without parameters",
)


def reproductions() -> list[Path]:
    """Folders of the experiments of the paper, in order, then of other studies that were published."""
    published = {file.parent for file in HERE.glob("*/*.json") if _is_published(file)}
    found = published | {HERE / name for name in ORDER}
    return sorted(found, key=lambda f: (ORDER.index(f.name) if f.name in ORDER else len(ORDER), f.name))


def results() -> list[tuple[str, dict]]:
    """(folder, results) of what was published, of a folder the preset `cpu` first."""
    found = []
    for folder in reproductions():
        files = sorted(filter(_is_published, folder.glob("*.json")), key=lambda f: (f.name != "results.json", f.name))
        found += [(folder.name, read_json(file)) for file in files]
    return found


def _is_published(file: Path) -> bool:
    """Return True for a file of published results: it has ledger rows (sweeps have none) and is no draft."""
    its = read_json(file)
    return "ledger" in its and not its.get("draft")


COLUMNS = ("claim", "the paper", "here", "run", "verdict")


def rows() -> list[tuple[str, list[str]]]:
    """Return (claim, cells) of all rows."""
    return [
        (row["artefact"], [f"[{row['artefact']}]({name})", row["paper"], row["ours"], _run(row, its), row["verdict"]])
        for name, its in results()
        for row in its["ledger"]
    ]


def _run(row: dict, its: dict) -> str:
    devices = (cell["devices"] for cell in (its["stamp"], *its["cells"].values()) if "devices" in cell)
    accelerator = [where(its)[0]] if any(names != ["cpu"] for names in devices) else []
    return ", ".join(filter(None, [row.get("run"), *accelerator]))


def claims() -> str:
    """Return the claims in the order of `FIRST`, the first results of each."""
    found = dict(reversed(rows()))
    return table(COLUMNS, [found[name] for name in FIRST if name in found])


def more_claims() -> str:
    """All other rows, in the order of the experiments."""
    left, picked = [], set()
    for name, cells in rows():
        if name in FIRST and name not in picked:
            picked.add(name)
        else:
            left.append(cells)
    return table(COLUMNS, left)


def runs() -> str:
    """Return the preset, hardware and time of all results."""
    its = [(f"[{name}]({name})", of["preset"], *where(of)) for name, of in results()]
    return table(("experiment", "preset", "hardware", "time"), its)


def not_run() -> str:
    """Return what was not run, and why, as results give it; first the runs that published results lack."""
    rows = [
        [
            f"[{len(its['missing'])} of {len(its['missing']) + len(its['cells'])} cells of {name}]({name})",
            f"{command_of(name, its)[:-1]} --resume --publish`",
            where(its)[0],
            "see its header",
            f"still to run, {its['missing'][0]} first",
        ]
        for name, its in results()
        if its.get("missing")
    ]
    started = {name for name, _ in results()}
    rows += [
        [
            f"[all of {f.name}]({f.name})",
            f"`python -m experiments.{f.name}.run --publish`",
            "2 CPU cores",
            "see its header",
            "still to run",
        ]
        for f in reproductions()
        if f.name not in started
    ]
    rows += [
        [f"[{row['artefact']}]({name})", f"`{row['command']}`", row["hardware"], str(row["hours"]), row["why"]]
        for name, its in results()
        for row in its.get("not_run", [])
    ]
    once = dict.fromkeys(map(tuple, rows))  # results of two presets may lack the same
    return table(("artefact", "command", "hardware", "hours", "why"), once)


def hours() -> str:
    """Return the total time of all cells; runs that several experiments share count once."""
    cells = {
        cell.get("hash") or (i, name): cell["wall_seconds"]
        for i, (_, its) in enumerate(results())
        for name, cell in its["cells"].items()
    }
    return f"{sum(cells.values()) / 3600:.1f} hours in all, where runs that scaling and perplexity share count once."


def command_of(name: str, its: dict) -> str:
    preset = "" if its["preset"] == "cpu" else f" --preset={its['preset']}"
    return f"`python -m experiments.{name}.run{preset}`"


def where(its: dict) -> tuple[str, str]:
    """Hardware and time of results, hardware by hardware where cells come from several."""
    machines = {}
    for cell in its["cells"].values():
        name = hardware(cell if "cores" in cell else its["stamp"])
        machines[name] = machines.get(name, 0) + cell["wall_seconds"]
    seconds = its["wall_seconds"]
    time = f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"
    return "; ".join(sorted(machines, key=machines.get, reverse=True)), time


BLOCKS = {
    "claims": claims,
    "more claims": more_claims,
    "runs": runs,
    "levels": lambda: perplexity.levels(read_json(PERPLEXITY)),
    "differences": lambda: perplexity.differences(read_json(PERPLEXITY)),
    "trend": lambda: perplexity.sentences(read_json(PERPLEXITY)),
    "samples": lambda: perplexity.samples(read_json(PERPLEXITY)),
    "not run": not_run,
    "hours": hours,
    **engineering.BLOCKS,
    **answers.BLOCKS,
}


def filled(text: str) -> str:
    """Return the text of a page with its generated blocks filled from the committed results."""

    def block(found):
        name = found[1]
        if name not in BLOCKS:
            raise ValueError(f"no block {name!r}, expected one of {', '.join(BLOCKS)}")
        return f"<!-- {name} -->\n{BLOCKS[name]()}\n<!-- end -->"

    return re.sub(r"<!-- ([a-z0-9 ]+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def refresh() -> None:
    """Rewrite the generated blocks of all `FILES` from the committed results."""
    for path in FILES:
        path.write_text(filled(path.read_text()))


@reported()
def main(argv=None) -> int:
    parser = Parser(prog="python -m experiments.ledger", description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="run the `cpu` presets first, but the long ones")
    args = parser.parse_args(argv)
    failed = []
    for folder in (f for f in reproductions() if args.run and f.name not in LONG):
        print(f"== {folder.name}", flush=True)
        publish = ["--publish"] if "study.main(" in (folder / "run.py").read_text() else []
        code = subprocess.run([sys.executable, "-m", f"experiments.{folder.name}.run", *publish]).returncode
        if code in (130, -signal.SIGINT):
            return 130
        if code:
            failed.append(folder.name)
    refresh()
    for name, its in results() if args.run else ():
        if name in LONG:
            missing = len(its.get("missing", ()))
            so_far = f" for {len(its['cells'])} of {len(its['cells']) + missing} cells" if missing else ""
            command = f"{command_of(name, its)[1:-1]} --resume --publish"
            print(f"left out, {where(its)[1]}{so_far} where it was run: {command}")
    if failed:
        print(f"error: failed: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    end(main())
