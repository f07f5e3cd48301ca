"""What the README files say of experiments that are not the paper's: speed, precision, memory, fine-tuning."""

from collections.abc import Iterable
from pathlib import Path

from experiments.compare import table as compare_table
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
    """Of a result: the processor, or the accelerator."""
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
    worst = max(x for what, x, _ in read("precision/results.json")["claims"] if "over its bound" in what)
    rows = [
        ("FLOPs of a token in training, 6 x 512", mflop["rwkv4"], f"{mflop['transformer']}, transformer"),
        ("WKV in a training step, 6 x 512", _percent(models["rwkv4"]["parts"]["WKV"]), "of the step's time"),
        ("WKV forward and backward, B 4, T 1,024, D 512", _ms(ours), f"{_ms(plain)}, autodiff of a plain scan"),
        ("its temporary memory", _percent(ours["temporary_bytes"] / plain["temporary_bytes"]), "of the plain scan's"),
        ("its error, any form, to 100,000 tokens", f"{worst:.2f}", "of its stated bound, at most"),
        ("a token of 12 x 768, the first", _ms(first), ""),
        (f"a token of 12 x 768, after {last['context']:,}", _ms(last), ""),
        ("its speed", _percent(generation["bound"]["share"]), "of reading the parameters alone"),
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


def training_on_a_gpu() -> str:
    rows = [r for r in read("speed/pile.json")["rows"] if "tokens_per_second" in r and "wkv_impl" not in r]
    fastest = {}
    for r in rows:
        key = r["size"], r.get("name", "rwkv4"), r["batch"], r["seq_len"]
        if key not in fastest or r["tokens_per_second"] > fastest[key]["tokens_per_second"]:
            fastest[key] = r
    lines = [
        (
            f"{'RWKV-4' if name == 'rwkv4' else 'transformer'} {size.upper().replace('1B5', '1.5B')}",
            f"{batch} x {seq_len:,}",
            _three_digits(r["tokens_per_second"]),
            _percent(r["mfu"]),
            f"{r['state_gb'] + r['temporary_gb']:.1f}",
        )
        for (size, name, batch, seq_len), r in fastest.items()
    ]
    return table(("model", "rows x tokens", "tokens/s", "of the peak", "memory, GB"), lines)


def engineering() -> str:
    """Rows of the second table of the ledger: folder, question, command, hardware, what was found."""
    rows = [_compare(), *_speed(), _precision(), _finetune(), _rehearsal(), _long()]
    return table(("folder", "question", "command", "hardware", "found"), rows)


def _compare():
    results = read("compare/results.json")
    minus = results["arms"]["rwkv4"]["minus"]
    found = ", ".join(f"{minus[arm]['bits_per_byte']:+.2f} bits a byte against the {arm}" for arm in minus)
    tokens, seed = results["preset"]["tokens"], results["preset"]["seed"]
    found = f"a demonstration, {tokens:,} tokens, seed {seed}: RWKV-4 {found}"
    question = "bits a byte of RWKV-4, a transformer of equal size, and the same with token shift"
    return ["[compare](compare)", question, "`make compare`", hardware(results["stamp"]), found]


def _speed():
    results = read("speed/results.json")
    claims = [(r["what"], r["theirs"], r["ratio"], r["wanted"]) for suite in ("train", "generation")
              for r in results[suite]["rows"] if r["wanted"]]  # fmt: skip
    told = "; ".join(
        f"{what} {ratio:.1f} times {theirs} ({wanted:g} wanted)" for what, theirs, ratio, wanted in claims
    )
    told += "; WKV " + ", ".join(
        f"{what} {x:.2f} (at most {most:g} wanted)" for what, x, most in results["ops"]["claims"]
    )
    question = "training, decoding and WKV beside what people use"
    cpu = ["[speed](speed)", question, "`make speed`", hardware(results["train"]["stamp"]), told]
    pile = read("speed/pile.json")
    best = {}
    for r in pile["rows"]:
        if "tokens_per_second" in r and "name" not in r and r["seq_len"] == 1024:
            best[r["size"]] = max(best.get(r["size"], (0, 0)), (r["tokens_per_second"], r["mfu"]))
    told = "tokens/s and share of the peak: " + ", ".join(
        f"{s} {_three_digits(t)} ({_percent(m)})" for s, (t, m) in best.items()
    )
    told += "; 3B beside what earlier rows had left in memory: out of memory"
    command = "`python -m experiments.speed.pile`, `python -m experiments.speed.run --suite=ops --rwkv-lm=PATH`"
    question = "training of the released sizes on one device; WKV beside the released kernel (tables in the README)"
    return [cpu, ["[speed](speed), on a GPU", question, command, hardware(pile["stamp"]), told]]


def _precision():
    results = read("precision/results.json")
    worst = max(x for what, x, _ in results["claims"] if "over its bound" in what)
    question = "error of every WKV form against float64, values and gradients"
    found = f"every element within {worst:.2f} of its form's stated bound"
    return ["[precision](precision)", question, "`make precision`", hardware(results["stamp"]), found]


def _finetune():
    results = read("finetune/results.json")
    told = "; ".join(
        f"{arm} {row['difference']:+.3f} on the new, {results['old'][arm]['difference']:+.3f} on the old text"
        for arm, row in results["table"].items()
        if arm != "none"
    )
    question = "bits a byte of new and old text after fine-tuning in several ways, one seed"
    command = "`python -m experiments.finetune.run`"
    return ["[finetune](finetune)", question, command, hardware(results["stamp"]), told]


def _rehearsal():
    rows = read("rehearsal/results.json")["rows"]
    gib = lambda r, what: r[what] / 2**30
    told = "; ".join(
        f"{r['model']} on {r['target']} {gib(r, 'memory_needed'):.1f} of {gib(r, 'memory_capacity'):.0f} GiB a chip"
        for r in rows
    )
    question = "does a training step fit a slice of TPUs that is not here: XLA's plan, nothing was run"
    command = "`python -m experiments.rehearsal.run`"
    return ["[rehearsal](rehearsal)", question, command, "libtpu's compiler on a CPU", told]


def _long():
    results = read("long/results.json")
    mib = {(r["T"], r["way"]): r["resident_bytes"] / 2**20 for r in results["rows"]}
    longest = max(T for T, _ in mib)
    told = f"T {longest:,}: " + ", ".join(f"{way} {x:,.0f} MiB" for (T, way), x in mib.items() if longest == T)
    question = "memory of a training step against its length"
    return ["[long](long)", question, "`python -m experiments.long.run`", hardware(results["stamp"]), told]


def _ms(row: dict) -> str:
    return f"{row['seconds'] * 1e3:.3g} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _three_digits(x: float) -> str:
    return f"{float(f'{x:.3g}'):,.0f}"


BLOCKS = {
    "compare": compare,
    "speed": speed,
    "costs": costs,
    "wkv on a gpu": wkv_on_a_gpu,
    "training on a gpu": training_on_a_gpu,
    "engineering": engineering,
}
