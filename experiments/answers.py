"""The README's questions, answered by committed numbers, in English and Chinese; and where others are better."""

import numpy as np

from experiments.engineering import fastest_steps, read, table, three_digits, told_minus
from experiments.scaling import fit
from experiments.statistics import at_most, millions, told_row

HEADS = {"en": ("question", "answer", "evidence"), "zh": ("问题", "回答", "证据")}

# Folder of the evidence, then question and answer in each language.
ANSWERS = (
    ("trajectory", {
        "en": ("Does it train like the released code?",
               "RWKV-4, 5.2, 6, 7, {steps} steps in float64: losses within {trajectory} nats"),
        "zh": ("训练与官方代码一致吗？", "RWKV-4、5.2、6、7 各 {steps} 步（float64）：损失相差不到 {trajectory} nats"),
    }),
    ("perplexity", {
        "en": ("Does it beat a transformer? ({size}, {tokens} tokens of books, seeds: {seeds})",
               "RWKV-4 minus transformer: {rwkv4_transformer} bits a byte, minus one with token shift: {rwkv4_shift}; "
               "RWKV-7: {rwkv7_transformer} and {rwkv7_shift}; {crossings}"),
        "zh": ("优于 Transformer 吗？（{size}，{tokens} token 的书，种子数 {seeds}）",
               "RWKV-4 减 Transformer：每字节 {rwkv4_transformer} 比特，减带 token shift 的：{rwkv4_shift}；"
               "RWKV-7：{rwkv7_transformer} 与 {rwkv7_shift}；{crossings_zh}"),
    }),
    ("perplexity", {
        "en": ("What did each version bring? ({versions_tokens} tokens, seeds: {versions_seeds})",
               "RWKV-5.2 minus 4: {rwkv5_4} bits a byte; 6 minus 5.2: {rwkv6_5}; 7 minus 6: {rwkv7_6}"),
        "zh": ("每一代带来了什么？（{versions_tokens} token，种子数 {versions_seeds}）",
               "RWKV-5.2 减 4：每字节 {rwkv5_4} 比特；6 减 5.2：{rwkv6_5}；7 减 6：{rwkv7_6}"),
    }),
    ("scaling", {
        "en": ("How much compute does RWKV-7 need for RWKV-4's loss? ({models_4} and {models_7} runs)",
               "{gain} times as much, at the lowest loss of both ({lowest} bits a byte)"),
        "zh": ("达到 RWKV-4 的损失，RWKV-7 需要多少计算量？（{models_4} 与 {models_7} 次训练）",
               "在两者都达到的最低损失处（每字节 {lowest} 比特）为其 {gain} 倍"),
    }),
    ("perplexity", {
        "en": ("What does token shift do for a transformer? ({tokens} tokens)", "{shift} bits a byte"),
        "zh": ("token shift 使 Transformer 的损失改变多少？（{tokens} token）", "每字节 {shift} 比特"),
    }),
    ("recall", {
        "en": ("Does a state of fixed size recall? (examples to 0.9 right, {pairs} pairs)",
               "{learned}; not in {most} k: {failed}"),
        "zh": ("固定大小的状态能做联想回忆吗？（{pairs} 对，达到 0.9 正确率的样本数）",
               "{learned}；{most} k 内未达到：{failed}"),
    }),
    ("tracking", {
        "en": ("Who tracks a state? (share right, product of {elements} elements; chance {chance_S3}, "
               "in A5 {chance_A5})",
               "S3: RWKV-5.2 {S3_rwkv5}, 6 {S3_rwkv6}, 7 {S3_rwkv7} ({longer} elements: {S3_longer}), "
               "7 with `removal` 2 {S3_removal} ({S3_longer_removal}). A5: {A5_rwkv5}, {A5_rwkv6}, {A5_rwkv7}, "
               "{A5_removal}; transformer {A5_transformer}, with token shift {A5_shifted}"),
        "zh": ("谁能跟踪状态？（{elements} 个元素之积的正确率；随机 {chance_S3}，A5 {chance_A5}）",
               "S3：RWKV-5.2 {S3_rwkv5}，6 {S3_rwkv6}，7 {S3_rwkv7}（{longer} 个元素：{S3_longer}），"
               "`removal` 为 2 的 7 {S3_removal}（{S3_longer_removal}）。A5：{A5_rwkv5}、{A5_rwkv6}、{A5_rwkv7}、"
               "{A5_removal}；Transformer {A5_transformer}，带 token shift {A5_shifted}"),
    }),
    ("speed", {
        "en": ("How fast is it?",
               "training RWKV-4 on a CPU: {training_4} times Hugging Face's; 169M on an H100: {h100} tokens/s (our "
               "transformer {h100_transformer}); a token of 12 x 768 on a CPU: {first} ms, "
               "after {context} tokens {last} ms"),
        "zh": ("有多快？",
               "训练速度：RWKV-4 在 CPU 上是 Hugging Face 实现的 {training_4} 倍；169M 在 H100 上 {h100} token/s"
               "（我们的 Transformer {h100_transformer}）；生成：12 x 768 在 CPU 上每个 token {first} ms，"
               "{context} 个 token 之后 {last} ms"),
    }),
)  # fmt: skip


# Names in braces, and the pairs of experiments/perplexity that they stand for.
MAIN = {
    "rwkv4_transformer": "rwkv4 minus transformer",
    "rwkv4_shift": "rwkv4 minus transformer+shift",
    "rwkv7_transformer": "rwkv7 minus transformer",
    "rwkv7_shift": "rwkv7 minus transformer+shift",
    "shift": "transformer+shift minus transformer",
}
VERSIONS = {"rwkv5_4": "rwkv5 minus rwkv4", "rwkv6_5": "rwkv6 minus rwkv5", "rwkv7_6": "rwkv7 minus rwkv6"}


def answers(language: str) -> str:
    """Return the questions and answers as a table."""
    found = numbers()
    rows = [[*(text.format(**found) for text in its[language]), _link(folder)] for folder, its in ANSWERS]
    return table(HEADS[language], rows)


def numbers() -> dict:
    """Return what stands in the braces of the answers."""
    perplexity, speed = read("perplexity/results.json"), read("speed/results.json")
    base, pairs = perplexity["study"]["base"], perplexity["pairs"]
    first, *_, last = speed["generation"]["contexts"]
    training = {row["theirs"]: row["ratio"] for row in speed["train"]["rows"]}
    trajectory, scaling = read("trajectory/results.json"), read("scaling/results.json")
    gain = scaling["compute_at_equal_loss"]["rwkv7 over rwkv4"]
    recall = read("recall/results.json")
    pairs_recalled = 8
    by_version = recall["examples_to_0.9"][f"T 64, n {pairs_recalled}, D 64"]
    step = fastest_steps()["169m", "rwkv4", 32, 1024]
    tracking, longer = read("tracking/results.json"), read("tracking/long.json")  # longer training, on S3
    elements = tracking["study"]["base"]["seq_len"]
    last_tokens = {"A5": tracking["last_token"], "S3": longer["last_token"]}
    right_of = lambda group, arm, n: f"{np.mean(last_tokens[group][f'{group} x 2, {arm}'][str(n)]):.2f}"
    removal = "rwkv7 (removal 2)"
    trackers = {"rwkv5": "rwkv5", "rwkv6": "rwkv6", "rwkv7": "rwkv7", "removal": removal}
    apart = [its["from kept"]["loss_nats"] for name, its in trajectory["cells"].items() if name.endswith("float64")]
    overtaking, overtaking_zh = _crossings(perplexity["overtakes"])
    tokens, seeds, main = at_common_budget(pairs, MAIN)
    versions_tokens, versions_seeds, versions = at_common_budget(pairs, VERSIONS)
    return {
        "steps": f"{trajectory['fields']['steps']}",
        "trajectory": at_most(max(apart)),
        "size": f"{base['model.num_layers']} x {base['model.dim']}",
        "tokens": millions(tokens),
        "seeds": seeds,
        **main,
        "crossings": overtaking,
        "crossings_zh": overtaking_zh,
        "versions_tokens": millions(versions_tokens),
        "versions_seeds": versions_seeds,
        **versions,
        "gain": fit.told(gain),
        "lowest": f"{gain['loss_nats'] / np.log(2):.2f}",
        **{f"models_{version}": len(scaling["arms"][f"rwkv{version}"]["flops"]) for version in (4, 7)},
        "training_4": f"{training['transformers RwkvForCausalLM']:.1f}",
        "h100": three_digits(step["tokens_per_second"]),
        "h100_transformer": three_digits(fastest_steps()["169m", "transformer", 32, 1024]["tokens_per_second"]),
        "pairs": pairs_recalled,
        "learned": ", ".join(f"{arm} {n / 1000:.0f} k" for arm, n in by_version.items() if n),
        "failed": ", ".join(arm for arm, n in by_version.items() if not n),
        "most": f"{recall['cells'][f'rwkv4, T 64, n {pairs_recalled}, D 64, seed 0']['curve'][-1][0] / 1000:.0f}",
        "elements": elements,
        **{f"chance_{group}": f"{tracking['chance'][group]:.2f}" for group in last_tokens},
        **{
            f"{group}_{name}": right_of(group, arm, elements)
            for group in last_tokens
            for name, arm in trackers.items()
        },
        "A5_transformer": right_of("A5", "transformer", elements),
        "A5_shifted": right_of("A5", "transformer+shift", elements),
        "longer": 2 * elements,
        "S3_longer": right_of("S3", "rwkv7", 2 * elements),
        "S3_longer_removal": right_of("S3", removal, 2 * elements),
        "first": f"{1e3 * first['seconds']:.1f}",
        "last": f"{1e3 * last['seconds']:.1f}",
        "context": f"{last['context']:,}",
    }


def others_better() -> str:
    """Return what others do better, as a table."""
    speed, compare = read("speed/results.json"), read("compare/results.json")["arms"]
    h100 = lambda name: three_digits(fastest_steps()["169m", name, 32, 1024]["tokens_per_second"])
    starts = next(row["seconds"] for row in speed["startup"]["commands"] if row["what"].startswith("generate"))
    training = {row["theirs"]: row["ratio"] for row in speed["rwkv7"]["rows"] if row["what"].startswith("training")}
    shifted = {arm: compare[arm]["minus"]["transformer+shift"] for arm in ("rwkv4", "rwkv7")}
    few, other = "bits a byte after few tokens, `make compare`", "minus a transformer with token shift"
    behind = [
        (few, f"{arm.replace('rwkv', 'RWKV-')} {told_minus(row)}", other)
        for arm, row in shifted.items()
        if (row["low"] or 0) > 0
    ]
    rows = [
        ("training of 169M on an H100", f"RWKV-4 {h100('rwkv4')} tokens/s", f"our transformer {h100('transformer')}"),
        ("training RWKV-7 on a CPU, 6 x 512", f"{training['rwkv4']:.2f} of RWKV-4's tokens/s",
         f"{training['transformer']:.2f} of our transformer's"),
        ("first token of 12 x 768 from the shell", f"{starts['ours']:.1f} s",
         f"`rwkv` package {starts['rwkv package']:.1f} s"),
        *behind,
    ]  # fmt: skip
    return table(("where", "ours", "beside it"), rows)


def at_common_budget(pairs: dict, names: dict) -> tuple[str, int, dict]:
    """Return the largest budget that all named pairs have, in tokens, the fewest seeds and the differences at it."""
    tokens = max(set.intersection(*(set(pairs[pair]) for pair in names.values())), key=int)
    rows = {name: pairs[pair][tokens] for name, pair in names.items()}
    differences = {name: told_row(row) for name, row in rows.items()}
    return tokens, min(row["seeds"] for row in rows.values()), differences


def _crossings(overtakes: dict) -> tuple[str, str]:
    """Return who overtakes whom, and after how many tokens, in English and Chinese, where that is resolved."""
    found = {"en": [], "zh": []}
    for pair, its in overtakes.items():
        for at in (at for at in its if at["is_resolved"]):
            ahead, behind = pair.split(" minus ")[:: -1 if at["then_above"] else 1]
            found["en"].append(f"{ahead} overtakes {behind} at about {millions(at['tokens'], 2)}")
            found["zh"].append(f"{ahead} 约在 {millions(at['tokens'], 2)} 处超过 {behind}")
    last = {"en": "no other crossing is resolved", "zh": "此外没有可确认的超越"}
    between = {"en": "; ", "zh": "；"}
    return tuple(between[language].join([*its, last[language]]) for language, its in found.items())


def _link(folder: str) -> str:
    return f"[{folder}](experiments/{folder})"


BLOCKS = {
    "answers": lambda: answers("en"),
    "answers in chinese": lambda: answers("zh"),
    "where we lose": others_better,
}
