"""Conversations on standard input and output."""

import io
import math

import pytest
from generating import NEARLY_GREEDY, assert_equal, assert_read, unstacked

from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.generate import load_context
from rwkv_jax.generate.chat import TEMPLATES, Conversation, chat, default_template, prompt
from rwkv_jax.generate.text import Texts
from rwkv_jax.models import build

RAVEN = TEMPLATES["raven"]
LETTERS_ONLY = {i: -math.inf for i in range(256) if not chr(i).isascii() or not chr(i).isalpha()}
TOKENIZER = ByteTokenizer()


@pytest.fixture
def talk(monkeypatch, capsys, tmp_path):
    """A function that types `lines` into a chat and returns its standard output; the folder is `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def talk(*lines, **settings):
        typed = b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed)))
        settings = {"max_new_tokens": 12, "temperature": 1.0, "logit_bias": LETTERS_ONLY} | settings
        chat(*unstacked("rwkv4"), TOKENIZER, RAVEN, Conversation(), seed=0, **settings)
        return capsys.readouterr().out

    return talk


def saved(name):
    """(context, text) of a saved conversation, after a check that the context has read exactly the text."""
    context, text = load_context(name, *unstacked("rwkv4"))
    assert_read("rwkv4", context, TOKENIZER.encode(text))
    return context, text


def test_chat_prompt_is_a_paragraph_for_each_turn():
    begun = Conversation("Bob: hi\n\nAlice: hello", None)
    assert prompt(RAVEN, " a\n\n\nb ", Conversation()) == "Bob: a\nb\n\nAlice:"
    assert prompt(RAVEN, "c", begun) == "\n\nBob: c\n\nAlice:"


@pytest.mark.parametrize(
    ("kind", "vocab_size", "names"),
    [
        ("rwkv4", 65536, ("Question", "Answer")),
        ("rwkv5", 65536, ("User", "Assistant")),
        ("rwkv7", 65536, ("User", "Assistant")),
        ("rwkv4", 50277, ("Bob", "Alice")),
    ],
)
def test_default_template_has_the_names_of_the_released_models(kind, vocab_size, names):
    model = build(kind, vocab_size=vocab_size, num_layers=1, dim=64)
    assert TEMPLATES[default_template(model)] == names


def test_chat_undo_restores_and_retry_redraws(talk):
    """Undo restores the conversation before the last message, retry draws another reply to it."""
    out = talk("hello", "/save one", "and?", "/save two", "/retry", "/save three", "/undo", "/save four")
    assert "taken back: and?" in out
    (one, first), (_, second), (_, third), (four, last) = map(saved, ("one", "two", "three", "four"))
    assert first.startswith("Bob: hello\n\nAlice:") and second.startswith(f"{first}\n\nBob: and?\n\nAlice:")
    assert third.startswith(f"{first}\n\nBob: and?\n\nAlice:") and second != third
    assert last == first
    assert_equal(one, four)


def test_chat_continues_a_loaded_conversation_and_reset_forgets_it(talk):
    there = talk("hello", "/save talk", "and?", **NEARLY_GREEDY)
    again = talk("/load talk", "/undo", "and?", "/reset", "/undo", "hello", **NEARLY_GREEDY)
    assert again.count("there is no message to take back") == 2
    assert there.splitlines()[-1] in again.splitlines()
    assert again.splitlines()[-1] == there.splitlines()[0]


@pytest.mark.parametrize("line", ["/save nowhere/talk", "/load nowhere/talk", "/load"])
def test_chat_prints_one_line_for_a_mistake_and_continues(talk, line):
    out = talk("hello", line, "hello")
    assert out.count("error: ") == 1 and len(out.splitlines()) == 3


def test_chat_reports_a_message_that_is_not_utf8_and_skips_a_byte_order_mark(talk):
    out = talk(b"\xef\xbb\xbfhello\n", b"caf\xe9\n", "/save one", "/undo", "/undo")
    assert out.count("error: the message is not UTF-8") == 1 and len(out.splitlines()) == 4
    assert "taken back: hello" in out and out.endswith("no message to take back\n")
    assert saved("one")[1].startswith("Bob: hello\n\nAlice:")


def test_chat_refuses_wrong_settings_before_the_first_message(talk):
    with pytest.raises(ValueError, match="top_p is 2"):
        talk(top_p=2)


def test_chat_prints_no_reply_without_a_message(talk):
    out = talk("/save x", "/undo", "/retry", "", "/nonsense", "/quit", "hello")
    assert out.count("error: there is no conversation to save") == 1 and out.endswith("after what was printed.\n")


def test_chat_keeps_the_printed_text_after_an_interrupt(talk, monkeypatch):
    count, real = 0, print

    def interrupted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        real(*args, **kwargs)

    monkeypatch.setattr("builtins.print", interrupted)
    talk("hello", "/save talk")
    _, text = saved("talk")
    assert 0 < len(text) - len("Bob: hello\n\nAlice:") < 12


def test_chat_prints_and_keeps_what_was_held_back_at_an_interrupt(talk, monkeypatch):
    """The line break of the reply "\\n" may begin the stop string, so it is held back when the interrupt comes."""
    only_a_line_break = {i: -math.inf for i in range(256) if i != ord("\n")}
    real = Texts.advance

    def interrupted(texts, count):
        if texts.tokens[0]:
            raise KeyboardInterrupt
        return real(texts, count)

    monkeypatch.setattr(Texts, "advance", interrupted)
    assert talk("hello", "/save talk", logit_bias=only_a_line_break) == "\n\n"  # the reply, and the end of its line
    _, text = saved("talk")
    assert text == "Bob: hello\n\nAlice:\n"
