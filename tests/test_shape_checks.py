"""Shape annotations are checked in tests: a wrong shape is refused at the boundary, before it broadcasts into a result."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from sqa_jax.models.layers.attention import dot_product_attention
from sqa_jax.models.layers.kv_cache import init_cache, write_kv
from sqa_jax.models.layers.masks import attention_mask
from tests.support.shape_checks import MODULES

QUERY, KEY = jnp.ones((1, 3, 4, 8)), jnp.ones((1, 5, 2, 8))


def test_right_shapes_are_accepted():
    mask = jnp.ones((1, 3, 5), bool)
    assert jax.jit(dot_product_attention)(QUERY, KEY, KEY, mask).shape == QUERY.shape


@pytest.mark.parametrize(
    ("value", "mask"),
    [
        (jnp.ones((1, 6, 2, 8)), jnp.ones((1, 3, 5), bool)),  # another number of keys
        (KEY, jnp.ones((1, 1, 5), bool)),  # would broadcast
        (KEY, jnp.ones((1, 3, 5))),  # no booleans
    ],
)
def test_wrong_shapes_are_refused(value, mask):
    """While tracing, too."""
    with pytest.raises(TypeCheckError):
        dot_product_attention(QUERY, KEY, value, mask)
    with pytest.raises(TypeCheckError):
        jax.jit(dot_product_attention)(QUERY, KEY, value, mask)


def test_arguments_are_checked_against_each_other():
    ones = jnp.ones((2, 3), int)
    with pytest.raises(TypeCheckError):
        attention_mask(ones, ones, jnp.ones((2, 4), int), ones)
    config = type("Config", (), dict(num_layers=1, num_kv_heads=2, head_dim=4))()
    cache = init_cache(config, rows=2, slots=5)
    new = jnp.ones((2, 1, 2, 4))
    with pytest.raises(TypeCheckError):
        write_kv((cache.key, cache.value), jnp.int32(0), jnp.arange(2), jnp.zeros((1, 1), int), new, new)


def test_every_checked_module_exists():
    from importlib.util import find_spec

    assert all(find_spec(module) for module in MODULES)
