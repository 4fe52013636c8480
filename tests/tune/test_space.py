"""The search space: the recipe's own field names, its own value first, every combination once."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plan.recipes import make_recipe
from trtqwen.diagnostics import InputError
from trtqwen.recipe import SECTIONS, load_recipe, recipe_names
from trtqwen.tune.space import (
    LAYOUT,
    configurations,
    default_space,
    field_value,
    own_configuration,
    parse_space,
    size,
)
from trtqwen.tune.target import Measures, Target, milliseconds


@pytest.mark.parametrize("name", recipe_names())
def test_the_default_space_has_the_recipe_in_it_and_names_its_fields(name: str) -> None:
    recipe = load_recipe(name)
    space = default_space(recipe)
    assert size(space) > 27
    for field, values in space.items():
        assert field_value(recipe, field) in values
        assert len(set(values)) == len(values)
        section, _, last = field.partition(".")
        assert field == LAYOUT or last in SECTIONS[section].model_fields
    assert (recipe.host is None) == ("serve.kv_cache_free_gpu_mem_fraction" not in space)


def test_layouts_fill_the_host() -> None:
    space = default_space(make_recipe(checkpoint={"tp_size": 4}))
    assert space[LAYOUT] == ((4, 1), (1, 4), (2, 2))
    assert own_configuration(make_recipe(checkpoint={"tp_size": 2}), space).changes["checkpoint.tp_size"] == 2


def test_vllm_has_one_policy() -> None:
    assert "serve.batch_scheduler_policy" not in default_space(make_recipe(engine={"backend": "vllm"}))


@given(seed=st.integers(0, 99))
def test_every_combination_comes_once_the_recipe_first(seed: int) -> None:
    recipe = make_recipe()
    space = parse_space(recipe, ["engine.max_batch_size=8,16,32", "layout=TP4x1,TP1x4", "engine.workers=1,2"])
    found = list(configurations(recipe, space, seed))
    assert len(found) == len(set(found)) == size(space)
    assert found[0] == own_configuration(recipe, space)
    assert found[0].title(found[0]) == "the recipe"


def test_a_large_space_is_drawn_lazily() -> None:
    recipe = make_recipe()
    space = {**default_space(recipe), "engine.max_seq_len": (8192, 16384, 32768)}
    assert size(space) > 2500
    found = list(islice(configurations(recipe, space, 1), 40))
    assert len(set(found)) == 40
    assert found == list(islice(configurations(recipe, space, 1), 40))


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("engine.max_batch_size", "is not FIELD=VALUE,VALUE"),
        ("engine.max_batch=1,2", "is not a field that can be swept"),
        ("checkpoint.tp_size=1,2", "is not a field that can be swept"),
        ("layout=4,1", "is not a layout"),
    ],
)
def test_a_wrong_sweep_is_refused(sweep: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_space(make_recipe(), [sweep])


@pytest.mark.parametrize(("text", "value"), [("500ms", 500), ("0.5s", 500), (" 40 ms ", 40), ("250us", 0.25)])
def test_times_have_units(text: str, value: float) -> None:
    assert milliseconds(text) == value


@pytest.mark.parametrize("text", ["500", "ms", "0ms", "-1s", "1.2.3s", "1m"])
def test_a_time_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a time"):
        milliseconds(text)


def test_limits_come_before_throughput() -> None:
    target = Target(time_to_first_token=500, inter_token_latency=50)
    fast, late, slow, failing = (
        Measures(900, 1, 400, 49, 1),
        Measures(2000, 1, 750, 10, 1),
        Measures(100, 1, 10, 10, 1),
        Measures(3000, 1, 10, 10, 0.5),
    )
    assert sorted((late, failing, slow, fast), key=target.rank) == [fast, slow, late, failing]
    [miss] = target.misses(late)
    assert miss.excess == pytest.approx(0.5)
    assert "time to first token is 750 ms, the limit 500 ms" in miss.what
