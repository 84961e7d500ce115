"""Costs: FLOPs against the compiler's count, tokens against the packed rows of a run, prices by hand."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from sqa_jax import adapters
from sqa_jax.batches.batch import Batch
from sqa_jax.checkpoints.weights import random_params
from sqa_jax.config import default
from sqa_jax.data.problem import Problem
from sqa_jax.data.teacher_records import TeacherRecord
from sqa_jax.metrics.costs import inference_cost, teacher_cost, training_cost
from sqa_jax.models.decoder import Decoder
from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.models.flops import forward_flops, training_flops
from sqa_jax.training.loss import row_losses

T = 192  # short enough that attention is not done in blocks, which skip what the mask hides
SHAPE = dict(vocab_size=260, tie_embeddings=True, hidden_size=256, intermediate_size=512, num_heads=4, num_kv_heads=2, head_dim=64)  # fmt: skip


# ---- operations


@pytest.fixture(scope="module")
def student():
    """One layer, since the compiler counts the body of a loop over layers once; wide, since we leave norms out."""
    config = DecoderConfig(num_layers=1, **SHAPE)
    return config, Decoder(config, jnp.float32, "none", 0.0), random_params(config, 0, jnp.float32, None)


def batch():
    """A row without padding in which every token is a target."""
    ones, places = jnp.ones((1, T), jnp.int32), jnp.arange(T)[None]
    return Batch(ones, ones, places, places, ones, jnp.ones((1, T), jnp.float32))


def counted(function, *arguments) -> float:
    lowered = jax.jit(function).lower(*arguments)
    return lowered.compile({"xla_backend_optimization_level": 3}).cost_analysis()[
        "flops"
    ]  # the optimization level outside of tests


def test_a_forward_pass_is_what_the_compiler_counts(student):
    """Within 3 %, which are norms, rotations and softmax. Every query is multiplied with all T keys: the mask saves nothing here."""
    config, decoder, params = student
    row = batch()

    def forward(params):
        hidden, _ = decoder.apply({"params": params}, row.tokens, row.positions, row.segments)
        return decoder.apply({"params": params}, hidden, method="unembed")

    assert forward_flops(config, T, T, T) == pytest.approx(counted(forward, params), rel=0.03)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_training_step_is_what_the_compiler_counts(student, method):
    config, decoder, params = student
    settings = default().adapter
    settings.methods = (method,)
    adapter, base = adapters.init_adapter(settings, config, params, 0), {} if method == "full" else params

    def loss(adapter, base):
        return row_losses(settings, decoder, adapter, base, batch(), None).sum()

    trained = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    ours = training_flops(config, (method,), trained, T, T, T)
    assert ours == pytest.approx(counted(jax.grad(loss), adapter, base), rel=0.03)


def test_without_attention_a_token_is_two_operations_a_parameter():
    for layers in (1, 3):
        config = DecoderConfig(num_layers=layers, **SHAPE)
        shapes = jax.eval_shape(lambda config=config: random_params(config, 0, jnp.float32, None))
        matrices = [leaf for leaf in jax.tree.leaves(shapes) if leaf.ndim > 1 and min(leaf.shape[-2:]) > layers]
        assert forward_flops(config, 1, 0, 1) == 2 * sum(leaf.size for leaf in matrices)
        # Scores and weighted values: two products of a head's width for each head and key.
        assert forward_flops(config, 1, 10, 0) - forward_flops(config, 1, 0, 0) == layers * 2 * 2 * 10 * 4 * 64


# ---- training


def write_run(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train.json").write_text(json.dumps({"trained_parameters": 1000}))


def test_sums_over_a_run(tmp_path):
    """Lines of validation are no steps; targets of every second step stand for all four."""
    config = DecoderConfig(num_layers=1, **SHAPE)
    write_run(
        tmp_path,
        [
            {"step": 0, "val_loss": 5.0},
            {"step": 2, "loss": 4.0, "tokens": 300, "targets": 30, "seconds": 1.5},
            {"step": 2, "val_loss": 4.0},
            {"step": 4, "loss": 3.0, "tokens": 500, "targets": 50, "seconds": 2.0},
        ],
    )
    cost = training_cost(tmp_path, default(), config, 40.0)
    assert (cost["tokens"], cost["target_tokens"], cost["seconds"]) == (800, 160, 3.5)
    by_hand = 2 * 2 * (800 * (131072 + 65536 + 3 * 131072 + 2 * 20 * 256) + 160 * 256 * 260) + 6 * 800 * 1000
    assert cost["flops"] == by_hand


def test_tokens_of_a_run_are_those_of_its_rows(tmp_path):
    """Counted again from the packed rows of a run's steps, of which one goes over the end of the first epoch."""
    import numpy as np

    from sqa_jax.batches.config_data import load_config_problems
    from sqa_jax.batches.dataset import build_or_reuse
    from sqa_jax.batches.loader import pack_dataset
    from sqa_jax.checkpoints.load import load_student
    from sqa_jax.training.loop import train

    config = default()
    config.update_from_flattened_dict(
        {
            "student.path": "random:tiny", "data.cache": str(tmp_path / "datasets"), "data.train_limit": 6,
            "recipe.max_prompt": 700, "train.batch_rows": 2, "train.steps": 3, "eval.val_limit": 2,
        }
    )  # fmt: skip
    train(config, str(tmp_path / "run"))
    student = load_student("random:tiny")
    dataset, reused = build_or_reuse(config, student.tokenizer, load_config_problems(config))
    rows = pack_dataset(dataset, config, student.tokenizer.pad_token_id)
    assert reused and rows.rows_of_epoch(0) < 6
    used = [rows[k] for k in range(3 * 2)]
    cost = training_cost(tmp_path / "run", config, student.config, 300.0)
    assert cost["tokens"] == sum(np.count_nonzero(row.segments) for row in used)
    assert cost["target_tokens"] == sum(row.target_mask.sum() for row in used)
    assert cost["trained_parameters"] == 32_768 and cost["seconds"] > 0


def test_cost_of_an_answer():
    config = DecoderConfig(num_layers=1, **SHAPE)
    metrics = {"n": {"AVG": 4}, "tokens_read": 400, "tokens_written": 80, "tokens_scored": 12}
    cost = inference_cost(metrics, config)
    assert (cost["tokens_read"], cost["tokens_written"]) == (100, 20)
    assert cost["flops"] == forward_flops(config, 120, 60, 23)


# ---- the teacher


PRICES = (("cheap", 1.0, 10.0), ("free", 0.0, 0.0))


def replied(pid="1", **fields):
    record = TeacherRecord(**{"pid": pid, "model": "cheap", "setting": "QTCH", "raw": "x" * 40} | fields)
    return Problem(pid, "Which?", ("a", "b"), 0), record


def cost(*replies):
    return teacher_cost(replies, PRICES, lambda problem, record: "p" * 400)


def test_recorded_tokens_and_prices_count():
    made = cost(
        replied("1", prompt_tokens=1000, output_tokens=100),
        replied("2", prompt_tokens=500, output_tokens=50, price=0.25),  # what was billed wins over the list
        replied("3", model="free", prompt_tokens=7, output_tokens=3),
    )
    assert made == {
        "replies": 3, "prompt_tokens": 1507, "output_tokens": 153, "estimated": False,
        "price": pytest.approx((1000 * 1 + 100 * 10) / 1e6 + 0.25),
    }  # fmt: skip


def test_what_was_not_counted_is_estimated_and_says_so():
    """Four characters a token, of the prompt and of the reply."""
    made = cost(replied(), replied("2", prompt_tokens=5, output_tokens=5))
    assert (made["prompt_tokens"], made["output_tokens"], made["estimated"]) == (105, 15, True)
    assert made["price"] == pytest.approx((105 * 1 + 15 * 10) / 1e6)


def test_a_model_without_a_price_has_none():
    assert cost(replied(), replied("2", model="unheard of"))["price"] is None
    assert cost()["price"] == 0 and cost()["replies"] == 0


def test_a_reply_is_paid_once_however_often_it_teaches():
    one = replied(prompt_tokens=10, output_tokens=1)
    assert cost(one, one) == cost(one)
    again = replied(prompt_tokens=10, output_tokens=1, sample=1, raw="another")
    assert cost(one, again)["replies"] == 2 and cost(one, replied("2"))["replies"] == 2


def test_two_samples_that_say_the_same_are_paid_twice():
    same = [replied(prompt_tokens=10, output_tokens=1, sample=k) for k in range(2)]
    assert cost(*same)["replies"] == 2
