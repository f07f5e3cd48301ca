"""Fields of a model: as JSON, and the errors of `build` for those that do not fit."""

import json
import math
from dataclasses import fields

import jax
import pytest
from small import KINDS, D, L, V, forward, make, shapes_of, tokens

from rwkv_jax import models
from rwkv_jax.models import LM, build
from rwkv_jax.models.block import switches


@pytest.mark.parametrize("kind", ["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def test_lm_wkv_impl_chooses_the_form_of_the_operator(kind):
    other = {"rwkv4": "associative"}.get(kind, "chunked")
    program = lambda impl: str(
        jax.make_jaxpr(forward, 0)(make(kind, wkv_impl=impl), shapes_of(make(kind)), tokens(2, 16))
    )
    assert program("scan") != program(other)


def test_switches_of_one_name_have_one_type_that_a_config_can_hold():
    types = {}
    for kind in models.KINDS.values():
        for name, (its, _) in switches(kind.variant).items():
            assert types.setdefault(name, its) is its and its in (bool, int, float, str), name


@pytest.mark.parametrize("kind", KINDS)
def test_lm_fields_survive_json(kind):
    model = make(kind, dtype="bfloat16", dropout=0.1, hidden_dim=24, embedding_scale=1e-3)
    values = {f.name: getattr(model, f.name) for f in fields(LM) if f.name not in ("parent", "name")}
    assert build(KINDS[kind]["name"], **json.loads(json.dumps(values))) == model


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"name": "transformr"}, "unknown model name 'transformr': did you mean 'transformer'?"),
        ({"size": "169M"}, "unknown size '169M': did you mean '169m'?"),
        ({"vocab_sise": 5}, "unknown model field 'vocab_sise': did you mean 'vocab_size'?"),
        ({"layers": ["rwkv4", "atention"]}, "unknown kind of layer 'atention': did you mean 'attention'?"),
        ({"layers": []}, "model field layers is empty, expected kinds of layers"),
        ({"layers": ["rwkv4"] * 3}, "num_layers is 2, expected a multiple of the 3 kinds in layers"),
        ({"embedding_init": "v4nea"}, "unknown model field embedding_init 'v4nea': did you mean 'v4neo'?"),
        ({"dim": None}, "model field dim is None, expected a positive integer"),
        ({"hidden_dim": 0}, "model field hidden_dim is 0, expected a positive integer"),
        ({"dim": 2**30}, "model field dim is 1073741824, expected a positive integer, at most 1048576"),  # XLA aborts
        ({"num_layers": True}, "model field num_layers is True, expected a positive integer"),
        ({"dropout": 1.0}, "model field dropout is 1.0, expected a fraction from 0 to below 1"),
        ({"dropout": "0.1"}, "model field dropout is '0.1', expected a fraction from 0 to below 1"),
        ({"head_norm_epsilon": -1.0}, "model field head_norm_epsilon is -1.0, expected a finite number above 0"),
        ({"head_norm_epsilon": math.nan}, "model field head_norm_epsilon is nan, expected a finite number above 0"),
        ({"head_norm_epsilon": True}, "model field head_norm_epsilon is True, expected a finite number above 0"),
        ({"embedding_scale": math.inf}, "model field embedding_scale is inf, expected a finite number above 0"),
        ({"embedding_scale": 0.0}, "model field embedding_scale is 0.0, expected a finite number above 0"),
        ({"wkv_impl": "chunked"}, "unknown model field wkv_impl 'chunked': expected one of None, "),
        (
            {"layers": ["rwkv4", "rwkv7"], "wkv_impl": "associative"},
            "unknown model field wkv_impl 'associative': expected one of None, scan",
        ),
        ({"scan": "no"}, "unknown model field scan 'no': expected one of True, False"),
        ({"name": "rwkv7", "removal": math.nan}, "model.variant.removal is nan, expected a finite float"),
        ({"variant": 5}, "model field variant is 5, expected switches by name"),
        ({"head_norm_epsilon": "a"}, "model field head_norm_epsilon is 'a', expected a finite number above 0"),
        ({"low_ranks": [1, 2]}, "model field low_ranks is (1, 2), expected None: no layer has low-rank maps"),
        ({"name": "rwkv6", "low_ranks": 5}, "model field low_ranks is 5, expected a list"),
        ({"name": "rwkv6", "low_ranks": [1, 0]}, "model field low_ranks is (1, 0), expected 2 positive integers"),
        ({"name": "rwkv7", "low_ranks": [8, 8]}, "model field low_ranks is (8, 8), expected 4 positive integers"),
        (
            {"name": "rwkv6", "low_ranks": [8, True]},
            "model field low_ranks is (8, True), expected 2 positive integers",
        ),
        (
            {"name": "rwkv6", "low_ranks": [8, 2**40]},
            "model field low_ranks is (8, 1099511627776), expected 2 positive",
        ),
    ],
    ids=str,
)
def test_build_names_a_misspelt_field_and_the_nearest_correct_one(arguments, line):
    given = {"name": "rwkv4", "vocab_size": V, "num_layers": L, "dim": D} | arguments
    with pytest.raises(ValueError) as error:
        build(**given)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
