import io
import math

import numpy as np
import pytest
from judge import error_ratio
from small import made

from rwkv_jax.generate import load_context, read
from rwkv_jax.generate.chat import TEMPLATES, Conversation, chat, prompt
from rwkv_jax.tokenizers import ByteTokenizer

RAVEN = TEMPLATES["raven"]
LETTERS_ONLY = {i: -math.inf for i in range(256) if not chr(i).isascii() or not chr(i).isalpha()}


def talker():
    return *made("rwkv4", vocab_size=256, scan=False), ByteTokenizer()


def talk(monkeypatch, capsys, *lines, seed=0, **settings):
    """Standard output of a chat in which `lines` are typed."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    settings = {"max_new_tokens": 12, "temperature": 1.0, "logit_bias": LETTERS_ONLY} | settings
    chat(*talker(), RAVEN, Conversation(), seed, **settings)
    return capsys.readouterr().out


def saved(path):
    model, params, _ = talker()
    return load_context(path, model, params)


def test_a_turn_is_a_paragraph_each():
    begun = Conversation("Bob: hi\n\nAlice: hello", None)
    assert prompt(RAVEN, " a\n\n\nb ", Conversation()) == "Bob: a\nb\n\nAlice:"
    assert prompt(RAVEN, "c", begun) == "\n\nBob: c\n\nAlice:"


def test_the_state_after_some_turns_is_that_of_their_text(monkeypatch, capsys, tmp_path):
    talk(monkeypatch, capsys, "hello", "and?", f"/save {tmp_path / 'talk'}", "never saved")
    context, text = saved(tmp_path / "talk")
    assert text.startswith("Bob: hello\n\nAlice:") and text.count("\n\nBob: and?\n\nAlice:") == 1
    model, params, tokenizer = talker()
    whole = read(model, params, tokenizer.encode(text))
    assert error_ratio(context.logits_BV, whole.logits_BV) < 1e-5
    for mine, read_again in zip(context.state[0], whole.state[0], strict=True):
        np.testing.assert_allclose(mine, read_again, rtol=1e-4, atol=1e-5)


def test_undo_takes_the_last_message_back(monkeypatch, capsys, tmp_path):
    first = talk(monkeypatch, capsys, "hello", f"/save {tmp_path / 'one'}")
    second = talk(monkeypatch, capsys, "hello", "and?", "/undo", f"/save {tmp_path / 'two'}")
    assert second.startswith(first) and "taken back: and?" in second
    (one, text), (two, text_two) = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert text == text_two
    np.testing.assert_array_equal(one.logits_BV, two.logits_BV)


def test_retry_answers_the_same_message_anew(monkeypatch, capsys, tmp_path):
    talk(monkeypatch, capsys, "hello", f"/save {tmp_path / 'one'}", "/retry", f"/save {tmp_path / 'two'}")
    (_, first), (context, second) = saved(tmp_path / "one"), saved(tmp_path / "two")
    begin = "Bob: hello\n\nAlice:"
    assert first.startswith(begin) and second.startswith(begin) and first != second
    model, params, tokenizer = talker()
    assert error_ratio(context.logits_BV, read(model, params, tokenizer.encode(second)).logits_BV) < 1e-5


def test_a_loaded_conversation_goes_on_as_if_never_left(monkeypatch, capsys, tmp_path):
    greedy = {"temperature": 0}
    there = talk(monkeypatch, capsys, "hello", f"/save {tmp_path / 'talk'}", "and?", **greedy)
    again = talk(monkeypatch, capsys, f"/load {tmp_path / 'talk'}", "/undo", "and?", **greedy)
    assert "there is no message to take back" in again
    assert again.splitlines()[-1] == there.splitlines()[-1]


def test_reset_forgets(monkeypatch, capsys):
    once = talk(monkeypatch, capsys, "hello", temperature=0)
    assert talk(monkeypatch, capsys, "something else", "/reset", "hello", temperature=0).endswith(once)


@pytest.mark.parametrize("line", ["/save nowhere/talk", "/load nowhere/talk", "/load", "/save"])
def test_a_mistake_is_one_line_and_the_chat_goes_on(monkeypatch, capsys, line):
    out = talk(monkeypatch, capsys, "hello", line, "hello")
    assert out.count("error: ") == 1
    assert (
        talk(monkeypatch, capsys, "/save x", "/undo", "/retry", "", "/nonsense", "/quit", "hello").count("Alice") == 0
    )


def test_ctrl_c_stops_a_reply_and_keeps_what_was_said(monkeypatch, capsys, tmp_path):
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
    model, params, tokenizer = talker()
    assert 0 < len(text) - len("Bob: hello\n\nAlice:") < 12
    assert error_ratio(context.logits_BV, read(model, params, tokenizer.encode(text)).logits_BV) < 1e-5
