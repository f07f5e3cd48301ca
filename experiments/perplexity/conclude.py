"""What the runs say: levels and paired differences by budget, gaps at equal tokens, FLOPs and seconds, verdicts."""

import numpy as np

from experiments.statistics import paired_bits

PAPER = 0.041  # bits per character, RWKV-4 1.178 minus transformer 1.137 (Table 5)
SHIFT = "transformer+shift"
AGAINST = ("rwkv4", "transformer", SHIFT, "lstm")
PROTOCOLS = {"windows": "", "best_practice": "best_practice_"}
AXES = ("tokens", "flops", "seconds")


def conclude(preset, values) -> dict:
    """Results from the cells, as `command.main` wants them."""
    arms = {arm: of_arm(preset, values, arm) for arm, _ in preset.arms}
    counted = values["counted"]["budgets"]
    last = {arm: its["budgets"][-1] for arm, its in arms.items()}
    ngram, to_beat = next((n, x) for n, x in counted[str(max(preset.budgets))].items() if n.endswith("-gram"))
    losing = [arm for arm in arms if last[arm]["windows"]["bits_per_byte"] >= to_beat]
    points = {
        axis: {arm: [(b[axis], b["windows"]["bits_per_byte"]) for b in its["budgets"]] for arm, its in arms.items()}
        for axis in AXES
    }
    gap = last["rwkv4"]["windows"]["minus"]["transformer"]["bits_per_byte"]
    by_shift = last[SHIFT]["windows"]["minus"]["transformer"]["bits_per_byte"]
    tokens = points["tokens"]
    return {
        "corpus": values["corpus"],
        "arms": arms,
        "counted": counted,
        "did_not_beat_counting": losing,
        "minus_transformer_at_equal": {axis: gaps_at_equal(points[axis]) for axis in AXES},
        "tokens_of_transformer_over_own": {arm: times_fewer(tokens[arm], tokens["transformer"]) for arm in arms},
        "share_of_gap_that_token_shift_closes": by_shift / gap if gap else None,
        "ledger": ledger(preset, last, losing, f"{ngram} {to_beat:.3f}"),
        "not_run": not_run() if preset.text == "stdlib" else [],
    }


def of_arm(preset, values, arm) -> dict:
    """One arm by budget; differences to the others are over the seeds that both have."""
    seeds, bytes_D = dict(preset.arms), values["corpus"]["test_bytes_by_document"]
    cell = lambda arm, seed, budget: values[f"{arm} seed {seed} after {budget}"]
    rate, rows = values["speed"]["tokens_per_second"][arm], []
    for budget in preset.budgets:
        runs = [cell(arm, seed, budget) for seed in range(seeds[arm])]
        tokens = runs[0]["tokens"]
        row = {
            "steps": budget,
            "tokens": tokens,
            "flops": runs[0]["flops_per_token"] * tokens,
            "seconds": tokens / rate,
        }
        for protocol, prefix in PROTOCOLS.items():
            by_seed, minus = [run[f"{prefix}bits_per_byte"] for run in runs], {}
            for other in AGAINST:
                if other in seeds and other != arm:
                    both = range(min(seeds[arm], seeds[other]))
                    nats = ([cell(a, seed, budget)[f"{prefix}nats"] for seed in both] for a in (arm, other))
                    minus[other] = _plain(paired_bits(*nats, bytes_D)) | {"seeds": len(both)}
            row[protocol] = {"bits_per_byte": float(np.mean(by_seed)), "by_seed": by_seed, "minus": minus}
        rows.append(row)
    first = cell(arm, 0, preset.budgets[0])
    stretches = [cell(arm, 0, budget)["trunk"] for budget in preset.budgets]
    about = {name: first[name] for name in ("parameters", "flops_per_token", "lr")} | {"tokens_per_second": rate}
    return about | {
        "seeds": seeds[arm],
        "budgets": rows,
        "trunk": {name: [x for stretch in stretches for x in stretch[name]] for name in stretches[0]},
    }


def _plain(interval) -> dict:
    names = ("bits_per_byte", "low", "high")
    return {name: None if np.isnan(x) else float(x) for name, x in zip(names, interval, strict=True)}


def level_at(points, x) -> float | None:
    """Bits per byte at `x`, on straight lines in log x between points; None outside them."""
    xs, ys = np.array(points).T
    inside = xs[0] * (1 - 1e-9) <= x <= xs[-1] * (1 + 1e-9)
    return float(np.interp(np.log(x), np.log(xs), ys)) if inside else None


def gaps_at_equal(points: dict) -> dict:
    """Bits per byte of each arm minus the transformer's, at as much of an axis as both have reached."""
    gaps = {}
    for arm, its in points.items():
        x = min(its[-1][0], points["transformer"][-1][0])
        ours, theirs = level_at(its, x), level_at(points["transformer"], x)
        gaps[arm] = {"at": x, "bits_per_byte": None if None in (ours, theirs) else ours - theirs}
    return gaps


def times_fewer(points, baseline) -> dict:
    """The baseline's tokens over those that an arm needs for the baseline's last level; a bound where the arm is there
    after its shortest budget, or not after its longest."""
    tokens, bits = np.array(points).T
    all_tokens, target = baseline[-1]
    if bits[0] <= target:
        return {"factor": all_tokens / tokens[0], "bound": "at least"}
    if bits.min() > target:
        return {"factor": all_tokens / tokens[-1], "bound": "less than"}
    i = int(np.argmax(bits <= target))
    needed = np.exp(np.interp(-target, -bits[i - 1 : i + 1], np.log(tokens[i - 1 : i + 1])))
    return {"factor": float(all_tokens / needed), "bound": None}


def verdict(difference: dict, paper: float | None, sign: int, comparable: bool) -> str:
    """In the words of the header of run.py. `paper`: its difference, None where it tells a `sign` alone."""
    low, high = difference["low"], difference["high"]
    if not comparable:
        return "not comparable"
    if low is None or low <= 0 <= high:
        return "not resolved"
    if low * sign < 0:
        return "contradicted"
    return "reproduced" if paper is not None and low <= paper <= high else "same sign"


def ledger(preset, last, losing, counted) -> list[dict]:
    """RWKV-4 minus each of the others."""
    claims = {
        "transformer": (f"{PAPER:+.3f} at 12 x 512", PAPER, 1),
        SHIFT: (f"no such arm; {PAPER:+.3f} without the shift", PAPER, 1),
        "lstm": ("no number: RWKV scales, LSTMs do not", None, -1),
    }
    size = f"{preset.num_layers} x {preset.dim}, {last['rwkv4']['tokens'] / 1e6:.3g} M tokens"
    rows = []
    for other, (says, paper, sign) in claims.items():
        if other not in last:
            continue
        windows, best = (last["rwkv4"][protocol]["minus"][other] for protocol in PROTOCOLS)
        ours = f"{_told(windows)}, best practice {_told(best)}; {size}, seeds: {windows['seeds']}"
        ours += f"; {other} behind the {counted} of the same bytes" * (other in losing)
        rows.append(
            {
                "artefact": f"Table 5: RWKV-4 minus {other}, bits a byte",
                "paper": says,
                "ours": ours,
                "verdict": verdict(windows, paper, sign, other not in losing),
            }
        )
    return rows


def _told(d) -> str:
    interval = "" if d["low"] is None else f" [{d['low']:+.3f}, {d['high']:+.3f}]"
    return f"{d['bits_per_byte']:+.3f}{interval}"


def not_run() -> list[dict]:
    command, why = "python -m experiments.perplexity.run --preset={} --text=enwik8", "no GPU with enwik8 at hand"
    rows = (
        ("Table 5 at its shape, 1.5 epochs", "gpu", "one H200", 0.4),
        ("Table 5 at 6 x 512, one epoch", "gpu-small", "one H200", 0.4),
        ("Table 5 at its shape, 40 epochs", "paper", "one H200", 6),
    )
    return [
        {"artefact": what, "command": command.format(preset), "hardware": hardware, "hours": hours, "why": why}
        for what, preset, hardware, hours in rows
    ]
