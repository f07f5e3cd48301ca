"""Conversations on standard input and output."""

import io
import math

import pytest
from generating import NEARLY_GREEDY, assert_equal, assert_read, unstacked

from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.generate import load_context
from rwkv_jax.generate.chat import TEMPLATES, Conversation, chat, prompt

RAVEN = TEMPLATES["raven"]
LETTERS_ONLY = {i: -math.inf for i in range(256) if not chr(i).isascii() or not chr(i).isalpha()}
TOKENIZER = ByteTokenizer()


def talk(monkeypatch, capsys, *lines, seed=0, **settings):
    """Standard output of a chat in which `lines` are typed."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    settings = {"max_new_tokens": 12, "temperature": 1.0, "logit_bias": LETTERS_ONLY} | settings
    chat(*unstacked("rwkv4"), TOKENIZER, RAVEN, Conversation(), seed, **settings)
    return capsys.readouterr().out


def saved(path):
    return load_context(path, *unstacked("rwkv4"))


def test_chat_prompt_is_a_paragraph_for_each_turn():
    begun = Conversation("Bob: hi\n\nAlice: hello", None)
    assert prompt(RAVEN, " a\n\n\nb ", Conversation()) == "Bob: a\nb\n\nAlice:"
    assert prompt(RAVEN, "c", begun) == "\n\nBob: c\n\nAlice:"


def test_chat_state_equals_that_of_the_text_so_far(monkeypatch, capsys, tmp_path):
    talk(monkeypatch, capsys, "hello", "and?", f"/save {tmp_path / 'talk'}", "never saved")
    context, text = saved(tmp_path / "talk")
    assert text.startswith("Bob: hello\n\nAlice:") and text.count("\n\nBob: and?\n\nAlice:") == 1
    assert_read("rwkv4", context, TOKENIZER.encode(text))


def test_chat_undo_restores_the_conversation_before_the_last_message(monkeypatch, capsys, tmp_path):
    first = talk(monkeypatch, capsys, "hello", f"/save {tmp_path / 'one'}")
    second = talk(monkeypatch, capsys, "hello", "and?", "/undo", f"/save {tmp_path / 'two'}")
    assert second.startswith(first) and "taken back: and?" in second
    (one, text), (two, text_two) = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert text == text_two
    assert_equal(one, two)


def test_chat_retry_draws_another_reply_to_the_same_message(monkeypatch, capsys, tmp_path):
    talk(monkeypatch, capsys, "hello", f"/save {tmp_path / 'one'}", "/retry", f"/save {tmp_path / 'two'}")
    (_, first), (context, second) = saved(tmp_path / "one"), saved(tmp_path / "two")
    begin = "Bob: hello\n\nAlice:"
    assert first.startswith(begin) and second.startswith(begin) and first != second
    assert_read("rwkv4", context, TOKENIZER.encode(second))


def test_chat_continues_a_loaded_conversation(monkeypatch, capsys, tmp_path):
    there = talk(monkeypatch, capsys, "hello", f"/save {tmp_path / 'talk'}", "and?", **NEARLY_GREEDY)
    again = talk(monkeypatch, capsys, f"/load {tmp_path / 'talk'}", "/undo", "and?", **NEARLY_GREEDY)
    assert "there is no message to take back" in again
    assert again.splitlines()[-1] == there.splitlines()[-1]


def test_chat_reset_begins_a_new_conversation(monkeypatch, capsys):
    once = talk(monkeypatch, capsys, "hello", **NEARLY_GREEDY)
    assert talk(monkeypatch, capsys, "something else", "/reset", "hello", **NEARLY_GREEDY).endswith(once)


@pytest.mark.parametrize("line", ["/save nowhere/talk", "/load nowhere/talk", "/load", "/save"])
def test_chat_prints_one_line_for_a_mistake_and_continues(monkeypatch, capsys, line):
    out = talk(monkeypatch, capsys, "hello", line, "hello")
    assert out.count("error: ") == 1
    out = talk(monkeypatch, capsys, "/save x", "/undo", "/retry", "", "/nonsense", "/quit", "hello")
    assert out.count("Alice") == 0


def test_chat_keeps_what_was_printed_before_ctrl_c(monkeypatch, capsys, tmp_path):
    count = 0

    def interrupted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    real = print
    monkeypatch.setattr("builtins.print", interrupted)
    talk(monkeypatch, capsys, "hello", f"/save {tmp_path / 'talk'}")
    context, text = saved(tmp_path / "talk")
    assert 0 < len(text) - len("Bob: hello\n\nAlice:") < 12
    assert_read("rwkv4", context, TOKENIZER.encode(text))
