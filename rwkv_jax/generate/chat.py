"""A chat over one recurrent state: no turn is read twice.

    python -m rwkv_jax.generate --model=RWKV-4-World-0.4B.pth --chat

A conversation is a text of paragraphs that begin with the name of their speaker, the format on which the released
models were tuned. A reply ends with its paragraph.
"""

import io
import re
import sys
from typing import NamedTuple

from rwkv_jax.generate.context import Context
from rwkv_jax.generate.saved import load_context, save_context
from rwkv_jax.generate.text import stream

BREAK = "\n\n"  # ends a paragraph
HELP = """/retry      another reply to the last message       /undo        take the last message back
/save FILE  the conversation and its state          /load FILE   continue a saved conversation
/reset      start a new conversation                /quit        exit, as does the end of the input
Ctrl-C stops a reply; the conversation then continues after what was printed."""


class Template(NamedTuple):
    """The names of the two speakers."""

    user: str
    assistant: str


# User, world: the model cards of BlinkDL/rwkv-7-world and BlinkDL/rwkv-4-world. Raven: v2/prompt/default/English-2.py
# of BlinkDL/ChatRWKV.
TEMPLATES = {
    "user": Template("User", "Assistant"),
    "world": Template("Question", "Answer"),
    "raven": Template("Bob", "Alice"),
}


def default_template(model) -> str:
    """Return the template of the released models of this vocabulary and version."""
    if model.vocab_size != 65536:
        return "raven"
    return model.unit[0][1].world_template


class Conversation(NamedTuple):
    """The text so far and the context after it. Immutable: keeping an old one costs one state."""

    text: str = ""
    context: Context | None = None


def prompt(template: Template, message: str, conversation: Conversation) -> str:
    """Return a turn as the model reads it: the message as one paragraph, and the opening of the reply."""
    message = re.sub(r"\n\s*\n", "\n", message.strip())
    opening = BREAK if conversation.text else ""
    return f"{opening}{template.user}: {message}{BREAK}{template.assistant}:"


def say(model, params, tokenizer, conversation: Conversation, text: str, seed: int, **settings) -> Conversation:
    """Print the reply to `text` as it is generated; return the conversation after it, or up to Ctrl-C."""
    pieces = stream(model, params, text, tokenizer, context=conversation.context, stop=(BREAK,), seed=seed, **settings)
    held = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        held = tokenizer.decode(pieces.tokens)[len(pieces.text) :]  # which the context has read
    print(held, flush=True)
    return Conversation(conversation.text + text + pieces.text + held, pieces.context)


def chat(model, params, tokenizer, template: Template, conversation: Conversation, seed: int, **settings) -> None:
    """Chat on standard input and output until `/quit` or the end of the input.

    Raises:
        ValueError: invalid settings, before the first message. Later errors are printed, one line each.
    """
    stream(model, params, "", tokenizer, seed=seed, **settings)
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):  # a byte that is not UTF-8 invalidates its line only
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    past = []  # the conversation before each turn since the last load or reset, and the turn's message
    num_replies = 0
    if interactive:
        print(HELP, flush=True)
    while True:
        try:
            line = input("> " if interactive else "").removeprefix("\ufeff")  # a file's byte order mark
        except (EOFError, KeyboardInterrupt):
            return
        command, _, argument = line.strip().partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            past, conversation = [], Conversation()
        elif command in ("/undo", "/retry") and not past:
            print("there is no message to take back", flush=True)
        elif command == "/undo":
            conversation, message = past.pop()
            print(f"taken back: {message}", flush=True)
        elif command in ("/save", "/load"):
            try:
                if command == "/save" and conversation.context is None:
                    raise ValueError("there is no conversation to save")
                if command == "/save":
                    save_context(argument, conversation.context, model, params, text=conversation.text)
                else:
                    context, text = load_context(argument, model, params)
                    past, conversation = [], Conversation(text or "", context)
                    print(conversation.text, flush=True)
            except (ValueError, OSError) as error:
                _report(error)
        elif command.startswith("/") and command != "/retry":
            print(HELP, flush=True)
        elif re.search("[\ud800-\udfff]", line):  # surrogates stand for bytes that are not UTF-8
            print("error: the message is not UTF-8, and was not read", flush=True)
        elif command:
            before, line = past[-1] if command == "/retry" else (conversation, line)
            try:
                text = prompt(template, line, before)
                conversation = say(model, params, tokenizer, before, text, seed + num_replies, **settings)
            except ValueError as error:  # what the tokenizer cannot encode
                _report(error)
                continue
            past[len(past) - (command == "/retry") :] = [(before, line)]
            num_replies += 1


def _report(error: Exception) -> None:
    print(f"error: {' '.join(str(error).split())}", flush=True)
