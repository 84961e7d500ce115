"""Plans of training and generation against hand calculations, the compiler's counts, and the communication model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sqa_jax.checkpoints.hf_config import to_hf
from sqa_jax.checkpoints.load import student_config
from sqa_jax.config import default
from sqa_jax.files import write_json
from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.models.t5.config import T5Config
from sqa_jax.plan import table
from sqa_jax.plan.report import epoch_cost, plan_generation, plan_training
from tests.support.planned import RANK, STATS, STUDENT, config_for

MESHES = ((4, 1, 1), (1, 4, 1), (2, 1, 2))
T5 = T5Config(1022, 256, 512, 2, 3, 4, 128)


@pytest.fixture(scope="module")
def plans(tpu_programs):
    """The same step on three meshes of four chips."""
    kind, devices = tpu_programs.slice("v5e:2x2")
    found = {}
    for sizes in MESHES:
        with tpu_programs.planning("train-" + "x".join(map(str, sizes))):
            found[sizes] = plan_training(config_for(*sizes), STUDENT, kind, devices, STATS)
    return found


def test_memory_is_the_sum_of_the_shards(plans):
    layers, D, F, V, heads = 3, 256, 512, 1022, 128
    kernels = D * 4 * heads + 2 * D * 2 * heads + 4 * heads * D + 3 * D * F
    tables, norms = 2 * V * D, layers * 2 * D + D
    batch = 2 * 8 * 4 * (3 * 256 + 3 * 128)
    split = {  # LoRA's a over fsdp, its b over tensor
        (4, 1, 1): (1, RANK * (D + 4 * heads)),
        (1, 4, 1): (4, RANK * (D // 4 + 4 * heads)),
        (2, 1, 2): (2, RANK * (D + 4 * heads // 2)),
    }
    for sizes, (shards, adapter) in split.items():
        base = 2 * (layers * kernels + tables) / shards + 2 * norms
        state = 3 * 4 * layers * adapter  # weights and Adam's two moments
        rows = sizes[0] * sizes[1]
        memory = plans[sizes]["memory"]
        expected = base + state + batch / rows + 8  # and two counters
        assert plans[sizes]["arguments"] == pytest.approx(expected, abs=16), sizes
        assert memory["arguments"] == pytest.approx(expected, rel=0.005)
        assert state <= memory["donated"] <= 1.01 * state + 16384
        assert plans[sizes]["donated"]


def test_flops_are_those_of_the_model(plans):
    """Products of a step by hand; what else the backward pass recomputes is little."""
    tokens, layers, D, F, V, heads = 2 * 8 * 256, 3, 256, 512, 1022, 4 * 128
    kernels = 2 * D * heads + 2 * D * heads // 2 + 3 * D * F
    expected = tokens * (
        2 * 2 * layers * kernels  # forward, and input gradients
        + 2 * 3 * layers * RANK * (D + heads)  # LoRA: weight gradients, too
        + 2 * 2 * D * V // 2  # logits at every second position: forward, and input gradients
        + 2 * 7 * layers * heads * 256  # a block of attention scores: two products forward, five backward
    )
    for row in plans.values():
        assert expected <= 4 * row["flops"] < 1.07 * expected
        assert row["utilization"]["roofline"] < 1
        assert row["seconds"]["estimate"] >= row["seconds"]["roofline"]
        assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"]["estimate"])


@pytest.mark.parametrize("sizes", MESHES)
def test_communication_is_the_formulas(plans, sizes):
    row = plans[sizes]
    sent, expected = sum(c["sent"] for c in row["collectives"]), row["expected_sent"]
    assert sent == pytest.approx(sum(expected.values()), rel=0.1)
    assert (expected["weights"] > 0) == (sizes[1] > 1) and expected["gradients"] > 0
    if sizes == (4, 1, 1):  # by hand: the adapter alone, in bfloat16, after each micro-batch, all-reduced in a ring
        assert expected["gradients"] == 2 * 2 * 3 / 4 * 2 * 3 * RANK * (256 + 512)


def test_a_plan_as_text(plans):
    text = table.training(plans[1, 4, 1])
    assert "1×4×1 (data, fsdp, tensor)" in text and "the state is updated in place" in text
    assert "all-gather" in text and "by formula" in text
    ranked = table.sweep(list(plans.values()), markdown=True)
    assert ranked.count("\n| ") == 3 + 1 and ranked.startswith("| mesh | rows |")


def test_generation_is_the_loop_to_the_last_token(tpu_programs):
    """Products by hand: each token meets every weight once, and all slots of the KV cache."""
    config = config_for()
    config.adapter.methods, config.adapter.prompt.length = ("prompt",), 4
    config.eval.batch_questions, config.eval.max_new_tokens, config.recipe.max_prompt = 64, 20, 200
    with tpu_programs.planning("generate"):
        row = plan_generation(config, STUDENT, *tpu_programs.slice("v5e:1x1"))
    layers, D, F, V, heads, cached = 3, 256, 512, 1022, 4 * 128, 256
    kernels = 2 * D * heads + 2 * D * heads // 2 + 3 * D * F
    assert row["flops"] == pytest.approx(64 * 20 * 2 * (layers * (kernels + 2 * heads * cached) + D * V), rel=0.02)
    assert row["tokens_per_second"] == pytest.approx(64 * 20 / row["seconds"]["estimate"])
    assert row["seconds"]["binds"] == "memory" and not row["collectives"]
    assert "64 texts of 20 new tokens" in table.generation(row)


def test_an_encoder_decoder_by_hand(tpu_programs):
    """The encoder processes all positions of a row, the decoder as many as there may be targets, with cross-attention."""
    device = tpu_programs.slice("v5e:1x1")
    config = config_for()
    config.adapter.lora.targets = ("q",)
    with tpu_programs.planning("t5-train"):
        row = plan_training(config, T5, *device, STATS)
    encoded, decoded, D, F, V, inner = 2 * 8 * 256, 2 * 8 * 128, 256, 512, 1022, 4 * 128
    kernels = 4 * D * inner + 3 * D * F  # of a layer without cross-attention
    expected = (
        2
        * 2
        * (  # forward, and input gradients
            encoded * (2 * kernels + 3 * 2 * D * inner)  # the encoder; keys and values for the decoder's layers
            + decoded * (3 * (kernels + 2 * D * inner) + D * V)  # the decoder, its logits
        )
    )
    expected += 2 * 3 * RANK * (D + inner) * (2 * encoded + 2 * 3 * decoded)  # LoRA: weight gradients, too
    # Scores and values: two products forward, one recomputed and four backward.
    expected += 2 * 7 * inner * (2 * encoded * 256 + 3 * decoded * (128 + 256))
    assert expected <= row["flops"] < 1.03 * expected
    assert row["trained_parameters"] == RANK * (D + inner) * (2 + 2 * 3)
    # The model's FLOPs exclude padding: of each sequence the encoder processes one half, the decoder the other.
    assert row["utilization"]["roofline"] < 1 and row["model_flops"] < row["flops"]

    config.adapter.methods, config.adapter.prompt.length = ("prompt",), 4
    config.eval.batch_questions, config.eval.max_new_tokens, config.recipe.max_prompt = 64, 20, 200
    with tpu_programs.planning("t5-generate"):
        row = plan_generation(config, T5, *device)
    # Each token meets the decoder's weights. One query a head is no matrix product.
    assert row["flops"] == pytest.approx(64 * 20 * 2 * (3 * (kernels + 2 * D * inner) + D * V), rel=0.02)
    assert row["seconds"]["binds"] == "memory"


def test_an_encoder_decoders_batch_dimension_is_sharded(tpu_programs):
    """Sharded by their width, like the weights, the decoder's activations would be sent after each product."""
    config = config_for(1, 4, 1, accumulate=1)
    config.adapter.lora.targets = ("q",)
    with tpu_programs.planning("t5-fsdp"):
        row = plan_training(config, T5, *tpu_programs.slice("v5e:2x2"), STATS)
    others = [c for c in row["collectives"] if c["kind"] not in ("all-gather", "reduce-scatter")]
    # What is left: gradients of the adapter, and embeddings that were looked up.
    expected = row["expected_sent"]
    assert sum(c["sent"] for c in others) < 1.2 * (expected["gradients"] + expected["activations"])
    assert sum(c["sent"] for c in row["collectives"]) < 1.1 * sum(expected.values())


def test_a_program_that_does_not_fit_gets_advice(tpu_programs):
    config = config_for(rows=65536, accumulate=1)
    with tpu_programs.planning("out-of-memory"):
        row = plan_training(config, STUDENT, *tpu_programs.slice("v5e:1x1"), STATS)
    assert not row["fits"] and row["temporaries"] > 16 * 2**30
    rows, accumulate = (int(word.split("=")[1].rstrip(":")) for word in row["advice"][0].split() if "=" in word)
    assert rows * accumulate == 65536 and row["temporaries"] * rows / 65536 < 16 * 2**30
    assert "remat=full" in row["advice"][1]
    assert "does not fit" in table.training(row)

    large = DecoderConfig(32000, 8192, 22016, 80, 64, 8, 128)  # refused by its arguments, without compiling
    row = plan_training(config_for(rows=64), large, *tpu_programs.slice("v5e:4x4"), STATS)
    assert row["arguments"] > 16 * 2**30 and "config.mesh.fsdp=16" in row["advice"][0]


def test_price():
    config = default()
    config.plan.prices = (("v5e", 2.0, 0.5),)
    cost = epoch_cost(config, "v5e", 16, STATS, 1000.0)
    assert cost["seconds"] == 100.0 and cost["chip_hours"] == pytest.approx(16 / 36)
    assert cost["dollars"] == pytest.approx({"on_demand": 2 * 16 / 36, "spot": 0.5 * 16 / 36})
    assert epoch_cost(config, "v6e", 16, STATS, 1000.0)["dollars"] == {"on_demand": None, "spot": None}


def test_shape_of_a_student_without_its_weights(smollm2, tmp_path):
    published = student_config("random:smollm2-135m")  # the file has its epsilon in 32 bits
    assert student_config(smollm2) == dataclasses.replace(published, norm_epsilon=float(np.float32(1e-5)))
    write_json(tmp_path / "config.json", to_hf(STUDENT))
    assert student_config(str(tmp_path)) == STUDENT
