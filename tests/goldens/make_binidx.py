"""Token files by the released converters: `python tests/goldens/make_binidx.py JSON2BINIDX_TOOL RWKV_LM`.

The arguments are checkouts of Abel2076/json2binidx_tool (9051dad; needs torch, lm_dataformat, ftfy, tqdm) and
BlinkDL/RWKV-LM (524481d; needs torch and Python 3.12 or older). Writes

    binidx_tokenizer.json    bytes and a few merges, <|endoftext|> as token 0
    binidx.bin, .idx         tools/preprocess_data.py --tokenizer-type HFTokenizer --append-eod, with it
    binidx_world.bin, .idx   RWKV-v5/make_data.py, one epoch, its shuffling replaced by none
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tokenizers

HERE = Path(__file__).parent.resolve()
WITHOUT_SHUFFLING = """
import random, runpy, sys
random.shuffle = lambda lines: None
sys.path.insert(0, ".")
sys.argv = ["make_data.py", "binidx_world.jsonl", "1", "4"]
runpy.run_path("make_data.py", run_name="__main__")
"""


def save_tokenizer(path):
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=264, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(["the state of the state in the text " * 10], trainer)
    library.save(str(path), pretty=False)


def main(tool, rwkv_lm):
    tokenizer = HERE / "binidx_tokenizer.json"
    save_tokenizer(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "tools/preprocess_data.py", "--input", HERE / "binidx.jsonl", "--append-eod"]
        command += ["--output-prefix", f"{folder}/out", "--dataset-impl", "mmap"]
        command += ["--tokenizer-type", "HFTokenizer", "--vocab-file", tokenizer]
        subprocess.run(command, cwd=tool, check=True)
        for ending in (".bin", ".idx"):
            shutil.copy(f"{folder}/out_text_document{ending}", HERE / f"binidx{ending}")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("make_data.py", "src", "tokenizer"):
            path = Path(rwkv_lm) / "RWKV-v5" / name
            (shutil.copytree if path.is_dir() else shutil.copy)(path, f"{folder}/{name}")
        shutil.copy(HERE / "binidx.jsonl", f"{folder}/binidx_world.jsonl")
        # it ends with status 0 or 1, as there is a magic prime or not
        subprocess.run([sys.executable, "-c", WITHOUT_SHUFFLING], cwd=folder, check=False)
        for ending in (".bin", ".idx"):
            shutil.copy(f"{folder}/binidx_world{ending}", HERE / f"binidx_world{ending}")


if __name__ == "__main__":
    main(*sys.argv[1:])
