"""Tables of experiments that judge no claim of the paper: speed, precision, memory, fine-tuning."""

import math
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path

from experiments.compare import table as compare_table
from experiments.statistics import told
from rwkv_jax.files import read_json

HERE = Path(__file__).parent
CLAIMED = [4, 1024, 512, "float32"]  # B, T, D and dtype of WKV beside others


def read(name: str) -> dict:
    return read_json(HERE / name)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    line = lambda cells: f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    head = list(head)
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def hardware(stamp: dict) -> str:
    """Return the processor of a result, or its accelerator."""
    device = stamp["devices"][0]
    cores = f"{stamp['cores']} core" + "s" * (stamp["cores"] > 1)
    return f"{cores}, {stamp['processor']}" if device == "cpu" else device


def compare() -> str:
    lines = compare_table.render(read("compare/results.json")).splitlines()
    return "\n".join(["```", *(line.rstrip() for line in lines), "```"])


def speed() -> str:
    """Training, decoding and reading beside what people use."""
    results = read("speed/results.json")
    first, later = results["train"]["rows"] + results["generation"]["rows"], results["rwkv7"]
    suites = [
        (first, results["train"]["shape"], results["generation"]["shape"]["fields"]),
        (later["rows"], later["shape"]["training"], later["shape"]["generation"]["fields"]),
    ]
    rows = []
    for its, trained, generating in suites:
        step = "{num_layers} x {dim}, batch {batch}, T {seq_len}".format(**trained)
        large = "{num_layers} x {dim}, V {vocab_size:,}".format(**generating)
        for r in its:
            if r["theirs"] in ("rwkv4", "transformer"):
                continue
            what = f"{r['what'].removesuffix(', tokens/s')} {r['ours']}"
            shape = step if what.startswith("training") else large
            theirs = f"{r['theirs_per_second']:,.0f}, {r['theirs']}"
            rows.append((f"{what}, {shape}", f"{r['ours_per_second']:,.0f}", theirs, f"{r['ratio']:.1f}"))
    return table(("tokens/s", "ours", "theirs", "ratio"), rows)


def costs() -> str:
    """One number a row: of a step, of a token and of a start, beside what it is compared with."""
    results = read("speed/results.json")
    models, generation, startup = results["train"]["models"], results["generation"], results["startup"]
    mflop = {name: f"{models[name]['flops_per_token'] / 1e6:.0f} MFLOP" for name in ("rwkv4", "transformer")}
    wkv = {r["form"]: r for r in results["ops"]["rows"] if r["shape"] == CLAIMED and r["pass"] == "both"}
    ours, plain = wkv["scan"], wkv["plain scan, autodiff"]
    first, last = generation["contexts"]
    long = {r["model"]: r["seconds"] for r in results["decode"]["sweep"]["rows"] if r["context"] == last["context"]}
    seconds = {row["what"].partition(",")[0]: row["seconds"] for row in startup["commands"]}
    rows = [
        ("FLOPs of a token in training, 6 x 512", mflop["rwkv4"], f"{mflop['transformer']}, transformer"),
        ("WKV in a training step, 6 x 512", percent(models["rwkv4"]["parts"]["WKV"]), "of the step's time"),
        ("WKV forward and backward, B 4, T 1,024, D 512", _ms(ours), f"{_ms(plain)}, autodiff of a plain scan"),
        ("its temporary memory", percent(ours["temporary_bytes"] / plain["temporary_bytes"]), "of the plain scan's"),
        ("its error, to 100,000 tokens", f"{worst():.2f}", "of its stated bound, at most"),
        ("a token of 12 x 768, the first", _ms(first), ""),
        (f"a token of 12 x 768, after {last['context']:,}", _ms(last), ""),
        ("its speed", percent(generation["bound"]["share"]), "of reading the parameters alone"),
        (f"a token of 6 x 768, after {last['context']:,}", _ms({"seconds": long["rwkv4"]}),
         f"{_ms({'seconds': long['transformer']})}, transformer with a cache"),
        ("first token of 12 x 768 from the shell", f"{seconds['generate']['ours']:.1f} s",
         f"{seconds['generate']['rwkv package']:.1f} s, rwkv package"),
        ("first logged step of `configs/tiny.py`", f"{seconds['train with configs/tiny.py']['ours']:.1f} s",
         f"from the shell, {startup['stamp']['date']}"),
    ]  # fmt: skip
    return table(("cost", "ours", "beside it"), rows)


def wkv_on_a_gpu() -> str:
    results = read("speed/wkv.json")
    ms = {(r["form"], r["pass"]): r["milliseconds"] for r in results["rows"]}
    forms = list(dict.fromkeys(form for form, _ in ms))
    names = {"pallas": "our kernel", "associative": "our associative scan", "scan": "our scan"}
    lines = [
        (label, *(f"{ms[form, which]:g}" for form in forms))
        for which, label in (("forward", "forward"), ("both", "forward and backward"))
    ]
    return table(("", *(names.get(form, form) for form in forms)), lines)


def fastest_steps() -> dict[tuple, dict]:
    """Return the fastest training step on a GPU by (size, model, rows, tokens of a row)."""
    fastest = {}
    for r in read("speed/pile.json")["rows"]:
        if "tokens_per_second" in r and "wkv_impl" not in r:
            key = r["size"], r.get("name", "rwkv4"), r["batch"], r["seq_len"]
            fastest[key] = max(fastest.get(key, r), r, key=itemgetter("tokens_per_second"))
    return fastest


def training_on_a_gpu() -> str:
    lines = [
        (
            f"{'RWKV-4' if name == 'rwkv4' else 'transformer'} {size.upper().replace('1B5', '1.5B')}",
            f"{batch} x {seq_len:,}",
            three_digits(r["tokens_per_second"]),
            percent(r["mfu"]),
            f"{r['state_gb'] + r['temporary_gb']:.1f}",
        )
        for (size, name, batch, seq_len), r in fastest_steps().items()
    ]
    return table(("model", "rows x tokens", "tokens/s", "of the peak", "memory, GB"), lines)


def others() -> str:
    """Return the experiments that judge no claim of the paper: one number each."""
    compare, speed, precision = (
        read("compare/results.json"),
        read("speed/results.json"),
        read("precision/results.json"),
    )
    tuned, slices, long = read("finetune/results.json"), read("rehearsal/results.json"), read("long/results.json")
    minus = told_minus(compare["arms"]["rwkv4"]["minus"]["transformer+shift"])
    training = next(r["ratio"] for r in speed["train"]["rows"] if r["theirs"] == "transformers RwkvForCausalLM")
    largest = max(slices["rows"], key=itemgetter("memory_needed"))
    gib = {what: largest[what] / 2**30 for what in ("memory_needed", "memory_capacity")}
    longest = max(row["T"] for row in long["rows"])
    mib = {row["way"]: row["resident_bytes"] / 2**20 for row in long["rows"] if row["T"] == longest}
    rows = [
        ("compare", "RWKV-4 minus a transformer with token shift, after few tokens", minus, compare),
        ("speed", "training RWKV-4 beside transformers", f"{training:.1f} times the tokens/s", speed["train"]),
        ("precision", "error of every form of WKV against float64", f"{worst():.2f} of its bound", precision),
        ("finetune", "LoRA of rank 8: new text, against the base", _bits(tuned["table"]["LoRA, rank 8"]), tuned),
        ("finetune", "LoRA of rank 8: old text, against the base", _bits(tuned["old"]["LoRA, rank 8"]), tuned),
        ("rehearsal", "training {model}, remat {remat}, on {target}: XLA's plan of a chip's memory".format(**largest),
         "{memory_needed:.1f} of {memory_capacity:.0f} GiB".format(**gib), None),
        ("long", f"training in segments, T {longest:,}: memory, beside {mib['whole']:,.0f} MiB in one piece",
         f"{mib['segments']:,.0f} MiB", long),
    ]  # fmt: skip
    machine = lambda its: hardware(its["stamp"]) if its else "none: compiled only"
    lines = [(f"[{name}](../experiments/{name})", what, found, machine(its)) for name, what, found, its in rows]
    return table(("experiment", "quantity", "found", "hardware"), lines)


def worst() -> float:
    """Return the largest error of any form of WKV, as a share of its bound, rounded up."""
    largest = max(x for what, x, _ in read("precision/results.json")["claims"] if "over its bound" in what)
    return math.ceil(100 * largest) / 100


def told_minus(row: dict) -> str:
    """Format a difference of two arms of compare."""
    return f"{told(row['bits_per_byte'], row['low'], row['high'])} bits a byte"


def _bits(row: dict) -> str:
    return f"{row['difference']:+.3f} bits a byte"


def _ms(row: dict) -> str:
    return f"{row['seconds'] * 1e3:.3g} ms"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def three_digits(x: float) -> str:
    return f"{float(f'{x:.3g}'):,.0f}"


BLOCKS = {
    "compare": compare,
    "speed": speed,
    "costs": costs,
    "wkv on a gpu": wkv_on_a_gpu,
    "training on a gpu": training_on_a_gpu,
    "others": others,
}
