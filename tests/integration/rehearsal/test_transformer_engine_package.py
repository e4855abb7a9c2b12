"""Transformer Engine's own Python: its classes take what Megatron and this project give them, and the tests' stand-in
(tests/mesh/transformer_engine_stand_in.py) has their arguments, parameters, marks and names in checkpoints.

The classes are built, and called in test_rehearsal.py, by the trainer's code. Their kernels do not run.
"""

import json
from functools import cache
from typing import Any

import pytest

from tests.integration.rehearsal.layers_of_a_rank import CLASSES
from tests.support.rehearsed_ranks import needs_transformer_engine, run_python

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(1200), needs_transformer_engine]

RECIPES = ("recipes.qwen3_30b_a3b:minpro", "recipes.qwen3_14b:minpro")  # a mixture, and a dense model
GIVEN_BY_PLACE = {"hidden", "rows", "query", "key", "value"}  # the stand-in's names of tensors
BY_KEYWORDS = {"device"}  # of RMSNorm, which passes **kwargs on


@cache
def layers(source: str, recipe: str) -> dict[str, Any]:
    done = run_python("-m", "tests.integration.rehearsal.layers_of_a_rank", source, recipe)
    assert done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_stand_in_has_the_same_parameters_marks_and_states(recipe: str) -> None:
    package, stand_in = layers("package", recipe), layers("stand_in", recipe)
    assert package["problems"] == stand_in["problems"] == []
    assert package["parameters"] == stand_in["parameters"]
    assert package["state"] == stand_in["state"]
    # norms fused with projections, and an expert's weights under numbers
    assert any("layer_norm_weight" in name for name in package["parameters"])
    assert any("weight0" in name for name in package["parameters"]) == ("30b" in recipe)


@pytest.mark.parametrize("name", CLASSES)
def test_the_stand_in_has_no_argument_that_the_class_lacks(name: str) -> None:
    package, stand_in = (layers(source, RECIPES[0])["signatures"][name] for source in ("package", "stand_in"))
    assert set(stand_in["__init__"]) - BY_KEYWORDS <= set(package["__init__"])
    assert set(stand_in["forward"]) - GIVEN_BY_PLACE <= set(package["forward"])
    by_place = [argument in GIVEN_BY_PLACE for argument in stand_in["forward"]]
    assert by_place == sorted(by_place, reverse=True)  # tensors come first, as in the class
    for function, arguments in stand_in.items():
        for argument, default in arguments.items():
            if default and argument in package[function]:
                assert default == package[function][argument], (function, argument)
