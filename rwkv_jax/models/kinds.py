"""The kinds of layers. To add one, add a file beside this one and a line here."""

from rwkv_jax.models import attention, lstm, rwkv4, rwkv5, rwkv6, rwkv7
from rwkv_jax.models.block import Kind, check_choice

KINDS = {
    "rwkv4": rwkv4.KIND,
    "rwkv5": rwkv5.KIND,
    "rwkv6": rwkv6.KIND,
    "rwkv7": rwkv7.KIND,
    "attention": attention.KIND,
    "lstm": lstm.KIND,
}
MODELS = {"attention": "transformer"}  # names of models of one kind of layer, where they differ from the kind's
DEFAULT = "rwkv4"


def kind_of(name: str) -> Kind:
    """The record of a kind of layer. ValueError for an unknown name."""
    check_choice("kind of layer", name, KINDS)
    return KINDS[name]


def kind_of_model(name: str) -> str:
    """The kind of layer that a model of this name repeats. ValueError for an unknown name."""
    names = {MODELS.get(kind, kind): kind for kind in KINDS}
    check_choice("model name", name, names)
    return names[name]
