"""Plans against numbers by hand, the compiler's own counts, and the formula of what a step communicates."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sqa_jax.batches.packing import Limits
from sqa_jax.checkpoints.hf_config import to_hf
from sqa_jax.checkpoints.load import student_config
from sqa_jax.config import default
from sqa_jax.errors import UserError
from sqa_jax.files import write_json
from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.models.t5.config import T5Config
from sqa_jax.parallel.chips import CHIPS, quiet_compiler, topology, use_compiler_only
from sqa_jax.parallel.mesh import make_mesh
from sqa_jax.plan import table
from sqa_jax.plan.__main__ import make_plan
from sqa_jax.plan.hlo import parse
from sqa_jax.plan.hlo_cost import count
from sqa_jax.plan.measure import measure
from sqa_jax.plan.programs import Data
from sqa_jax.plan.report import epoch, plan, plan_generation
from sqa_jax.plan.sweep import sweep

use_compiler_only()

# Nearly whole tiles, so that little is padded in memory; a vocabulary that four does not divide.
STUDENT = DecoderConfig(1022, 256, 512, 3, 4, 2, 128)
RANK = 128
DATA = Data(100_000, 64, 0.5, Limits(256, 128), "the test")


def config_for(data=-1, fsdp=1, tensor=1, rows=8, accumulate=2):
    config = default()
    config.adapter.lora.targets, config.adapter.lora.rank = ("q_proj",), RANK  # each target costs the compiler a second
    config.train.row_length = 256
    config.train.batch_rows, config.train.accumulate = rows, accumulate
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = data, fsdp, tensor
    return config


def compiled(function, shapes, mesh, specs):
    placed = [NamedSharding(mesh, spec) for spec in specs]
    with quiet_compiler():
        return jax.jit(function, in_shardings=placed).lower(*shapes).compile()


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.fixture(scope="module", autouse=True)
def compiler(tpu_compiler):
    """Of TPUs, in every test here."""


@pytest.fixture(scope="module")
def slice_2x2():
    return topology("v5e:2x2")


@pytest.fixture(scope="module")
def plans(slice_2x2):
    """The same step on three meshes of four chips."""
    kind, devices = slice_2x2
    shapes = [(4, 1, 1), (1, 4, 1), (2, 1, 2)]
    return {sizes: plan(config_for(*sizes), STUDENT, kind, devices, DATA) for sizes in shapes}


# ---- reading programs


def test_loops_count_as_often_as_they_run():
    """The compiler's own count of a scan is one round of it."""
    mesh = make_mesh(default().mesh, topology("v5e:1x1")[1])

    def layers(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    one = compiled(layers, [shape(2048, 1024), shape(6, 1024, 1024)], mesh, [PartitionSpec()] * 2)
    work = count(parse(one.as_text()), CHIPS["v5e"], 1)
    assert work.flops == 6 * 2 * 2048 * 1024**2
    assert work.flops == pytest.approx(6 * one.cost_analysis()["flops"], rel=0.01)
    assert work.busy * CHIPS["v5e"].flops > work.flops  # nothing is faster than the chip's peak

    def odd(x, kernel):  # 1, 3, 5, 7
        return jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 2, jnp.tanh(c[1] @ kernel)), (1, x))

    one = compiled(odd, [shape(2048, 1024), shape(1024, 1024)], mesh, [PartitionSpec()] * 2)
    assert count(parse(one.as_text()), CHIPS["v5e"], 1).flops == 4 * 2 * 2048 * 1024**2


def test_batched_products_and_traffic():
    """A batch is a dimension of the convolution that TPUs make of it; an addition moves its three arrays."""
    mesh = make_mesh(default().mesh, topology("v5e:1x1")[1])
    product = compiled(
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b),
        [shape(16, 256, 512), shape(16, 512, 384)],
        mesh,
        [PartitionSpec()] * 2,
    )
    assert count(parse(product.as_text()), CHIPS["v5e"], 1).flops == 16 * 2 * 256 * 512 * 384
    total = compiled(lambda a, b: a + b, [shape(8192, 8192), shape(8192, 8192)], mesh, [PartitionSpec()] * 2)
    work = count(parse(total.as_text()), CHIPS["v5e"], 1)
    assert work.traffic == 3 * 2 * 8192**2 == total.cost_analysis()["bytes accessed"]
    assert work.busy == pytest.approx(work.traffic / 819e9)


def test_collectives_of_known_programs(slice_2x2):
    kind, devices = slice_2x2
    config = config_for(2, 2, 1)
    mesh = make_mesh(config.mesh, devices)

    def both(x, w):  # w is gathered over fsdp; the product's rows are summed over all
        return (x @ w).astype(jnp.float32).sum(axis=0)

    rows, columns = PartitionSpec(("data", "fsdp")), PartitionSpec("fsdp")
    one = jax.jit(both, in_shardings=(NamedSharding(mesh, rows), NamedSharding(mesh, columns)), out_shardings=NamedSharding(mesh, PartitionSpec()))  # fmt: skip
    found = measure(one.lower(shape(4096, 1024), shape(1024, 2048)), kind, mesh, 0, 1.0)["collectives"]
    gathers = [row for row in found if row["kind"] != "all-reduce"]
    assert sum(row["sent"] for row in gathers) == 1024 * 2048 * 2 / 2
    assert {row["over"] for row in gathers} == {"fsdp"}
    reduces = [row for row in found if row["kind"] == "all-reduce"]
    assert sum(row["sent"] for row in reduces) == pytest.approx(2 * 3 / 4 * 2048 * 4)
    # Half of w over one link of 50 GB/s, as two chips in a row are no ring.
    assert sum(row["seconds"] for row in gathers) == pytest.approx(1024 * 2048 / 50e9)


# ---- the training step


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


def test_operations_are_those_of_the_model(plans):
    """Products of a step by hand; what else the backward pass computes again is little."""
    tokens, layers, D, F, V, heads = 2 * 8 * 256, 3, 256, 512, 1022, 4 * 128
    kernels = 2 * D * heads + 2 * D * heads // 2 + 3 * D * F
    expected = tokens * (
        2 * 2 * layers * kernels  # forward, and gradients of the inputs
        + 2 * 3 * layers * RANK * (D + heads)  # LoRA: gradients of its weights, too
        + 2 * 2 * D * V // 2  # logits at every second place: forward, and gradients of the inputs
        + 2 * 7 * layers * heads * 256  # a block of scores: two products forward, five backward
    )
    for row in plans.values():
        assert expected <= 4 * row["flops"] < 1.07 * expected
        assert row["utilization"]["roofline"] < 1
        assert row["seconds"]["estimate"] >= row["seconds"]["roofline"]
        assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"]["estimate"])


@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 4, 1), (2, 1, 2)])
def test_communication_is_the_formulas(plans, sizes):
    row = plans[sizes]
    sent, expected = sum(c["sent"] for c in row["collectives"]), row["expected_sent"]
    assert sent == pytest.approx(sum(expected.values()), rel=0.1)
    assert (expected["weights"] > 0) == (sizes[1] > 1) and expected["gradients"] > 0
    if sizes == (4, 1, 1):  # by hand: the adapter alone, in bfloat16, after each micro-batch, reduced over a ring
        assert expected["gradients"] == 2 * 2 * 3 / 4 * 2 * 3 * RANK * (256 + 512)


def test_generation_is_the_loop_to_the_last_token():
    """Products by hand: each token meets every weight once, and all places of the cache."""
    config = config_for()
    config.adapter.methods, config.adapter.prompt.length = ("prompt",), 4
    config.eval.batch_questions, config.eval.max_new_tokens, config.recipe.max_prompt = 64, 20, 200
    row = plan_generation(config, STUDENT, *topology("v5e:1x1"))
    layers, D, F, V, heads, places = 3, 256, 512, 1022, 4 * 128, 256
    kernels = 2 * D * heads + 2 * D * heads // 2 + 3 * D * F
    assert row["flops"] == pytest.approx(64 * 20 * 2 * (layers * (kernels + 2 * heads * places) + D * V), rel=0.02)
    assert row["tokens_per_second"] == pytest.approx(64 * 20 / row["seconds"]["estimate"])
    assert row["seconds"]["binds"] == "memory" and not row["collectives"]


def test_an_encoder_decoder_by_hand():
    """Its encoder meets all places of a row, its decoder as many as there may be targets, and reads the encoder's."""
    student, one = T5Config(1022, 256, 512, 2, 3, 4, 128), topology("v5e:1x1")
    config = config_for()
    config.adapter.lora.targets = ("q",)
    row = plan(config, student, *one, DATA)
    read, written, D, F, V, inner = 2 * 8 * 256, 2 * 8 * 128, 256, 512, 1022, 4 * 128
    kernels = 4 * D * inner + 3 * D * F  # of a layer without cross-attention
    expected = (
        2
        * 2
        * (  # forward, and gradients of the inputs
            read * (2 * kernels + 3 * 2 * D * inner)  # the encoder; keys and values for the decoder's layers
            + written * (3 * (kernels + 2 * D * inner) + D * V)  # the decoder, its logits
        )
    )
    expected += 2 * 3 * RANK * (D + inner) * (2 * read + 2 * 3 * written)  # LoRA: gradients of its weights, too
    # Scores and values: two products forward, one again and four backward.
    expected += 2 * 7 * inner * (2 * read * 256 + 3 * written * (128 + 256))
    assert expected <= row["flops"] < 1.03 * expected
    assert row["trained_parameters"] == RANK * (D + inner) * (2 + 2 * 3)
    # The model's operations know no padding: of each sequence the encoder reads one half, the decoder writes the other.
    assert row["utilization"]["roofline"] < 1 and row["model_flops"] < row["flops"]

    config.adapter.methods, config.adapter.prompt.length = ("prompt",), 4
    config.eval.batch_questions, config.eval.max_new_tokens, config.recipe.max_prompt = 64, 20, 200
    row = plan_generation(config, student, *one)
    # Each token meets the decoder's weights. One query a head is no product of matrices.
    assert row["flops"] == pytest.approx(64 * 20 * 2 * (3 * (kernels + 2 * D * inner) + D * V), rel=0.02)
    assert row["seconds"]["binds"] == "memory"


def test_an_encoder_decoders_rows_lie_apart(slice_2x2):
    """Split with the weights by their width, the activations of its decoder would be sent after each product."""
    config = config_for(1, 4, 1, accumulate=1)
    config.adapter.lora.targets = ("q",)
    row = plan(config, T5Config(1022, 256, 512, 2, 3, 4, 128), *slice_2x2, DATA)
    rows = [c for c in row["collectives"] if c["kind"] not in ("all-gather", "reduce-scatter")]
    # What is left: gradients of the adapter, and what was looked up in the table.
    expected = row["expected_sent"]
    assert sum(c["sent"] for c in rows) < 1.2 * (expected["gradients"] + expected["activations"])
    assert sum(c["sent"] for c in row["collectives"]) < 1.1 * sum(expected.values())


def test_a_program_that_cannot_be_written_down(slice_2x2, monkeypatch):
    """As the compiler's of 2026 for some steps on v5p; said in one line, and how much memory it takes."""

    def broken(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nmore")

    mesh = make_mesh(config_for().mesh, slice_2x2[1])
    lowered = jax.jit(lambda x: x + 1, in_shardings=NamedSharding(mesh, PartitionSpec())).lower(shape(8, 128))
    monkeypatch.setattr(jax.stages.Compiled, "as_text", broken)
    with pytest.raises(UserError, match="of 16 GiB.*cannot write it down.*RET_CHECK failure\\)") as caught:
        measure(lowered, "v5e", mesh, 0, 1.0)
    assert "\n" not in str(caught.value)


def test_memory_that_is_short_is_a_plan_too():
    kind, devices = topology("v5e:1x1")
    config = config_for(rows=65536, accumulate=1)
    row = plan(config, STUDENT, kind, devices, DATA)
    assert not row["fits"] and row["temporaries"] > 16 * 2**30
    rows, accumulate = (int(word.split("=")[1].rstrip(":")) for word in row["advice"][0].split() if "=" in word)
    assert rows * accumulate == 65536 and row["temporaries"] * rows / 65536 < 16 * 2**30
    assert "remat=full" in row["advice"][1]
    assert "does not fit" in table.training(row)

    large = DecoderConfig(32000, 8192, 22016, 80, 64, 8, 128)
    row = plan(config_for(rows=64), large, *topology("v5e:4x4"), DATA)
    assert row["arguments"] > 16 * 2**30 and "config.mesh.fsdp=16" in row["advice"][0]


def test_price():
    config = default()
    config.plan.prices = (("v5e", 2.0, 0.5),)
    cost = epoch(config, "v5e", 16, DATA, 1000.0)
    assert cost["seconds"] == 100.0 and cost["chip_hours"] == pytest.approx(16 / 36)
    assert cost["dollars"] == pytest.approx({"on_demand": 2 * 16 / 36, "spot": 0.5 * 16 / 36})
    assert epoch(config, "v6e", 16, DATA, 1000.0)["dollars"] == {"on_demand": None, "spot": None}


def test_sweep_ranks_and_says_what_cannot_be(slice_2x2, monkeypatch, capsys):
    """With a stand-in for the compiler, in which four rows of a chip are too many and `fsdp` makes steps slow."""
    compiled = []

    def stand_in(config, *_):
        mesh, rows = config.mesh.to_dict(), config.train.batch_rows // (config.mesh.data * config.mesh.fsdp)
        compiled.append((config.mesh.fsdp, config.mesh.tensor, rows))
        row = {"mesh": mesh, "batch": {"rows_per_chip": rows, **config.train.to_dict()}, "fits": rows < 4}
        return {**row, "tokens_per_second": rows / config.mesh.fsdp} if rows < 4 else row

    monkeypatch.setattr("sqa_jax.plan.sweep.plan", stand_in)
    rows = sweep(config_for(), STUDENT, *slice_2x2, DATA, 12, rows=32)
    ranked = [row for row in rows if row["fits"]]
    speeds = [row["tokens_per_second"] for row in ranked]
    assert speeds == sorted(speeds, reverse=True) and len(ranked) > 1
    assert all(row["batch"]["batch_rows"] * row["batch"]["accumulate"] == 32 for row in ranked)
    failed = {(*row["mesh"].values(), row["batch"]["rows_per_chip"]): row["why"] for row in rows if not row["fits"]}
    assert "does not divide" in failed[1, 1, 4, 1]  # the vocabulary
    assert "does not fit" in failed.values()
    # What follows from what was compiled is not compiled.
    too_many = [key for key, why in failed.items() if why == "fewer rows did not fit"]
    assert all(any(c[:2] == key[1:3] and 4 <= c[2] < key[3] for c in compiled) for key in too_many)
    assert f"compiling {len(compiled) + len(too_many)}" in capsys.readouterr().err


# ---- slices, and what cannot be


def test_every_device_is_a_chip_and_slices_lie_along_data():
    assert len(topology("v4:2x2x1")[1]) == 4
    _, devices = topology("v5e:2x2", slices=2)
    mesh = make_mesh(config_for(4, 2, 1).mesh, devices)
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match="2 slices do not divide"):
        make_mesh(config_for(1, 8, 1).mesh, devices)


@pytest.mark.parametrize("name", ["v5e:3x3", "v9:2x2", "v5e:4x4x4", "v5p:4x4", "v5e", "v5e:32x32", "nonsense"])
def test_unknown_topologies_name_known_ones(name):
    with pytest.raises(UserError, match="v5e:4x4.*v6e:4x4"):
        topology(name)


def test_mistakes(slice_2x2, monkeypatch):
    kind, devices = slice_2x2
    for config, message in (
        (config_for(3), "does not use exactly the 4 devices"),
        (config_for(rows=6), "train.batch_rows is 6"),
        (config_for(1, 1, 4), "does not divide"),
    ):
        with pytest.raises(UserError, match=message):
            plan(config, STUDENT, kind, devices, DATA)
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match="tpu-plan"):
        make_plan(default(), "v5e:4x4", 1, ("train",))


def test_the_verb_says_mistakes_in_one_line():
    command = [sys.executable, "-m", "sqa_jax.plan", "--config=configs/test.py", "--topology=v5e:5x5"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --topology v5e:5x5") and done.stderr.count("\n") == 1


def test_shape_of_a_student_without_its_weights(smollm2, tmp_path):
    published = student_config("random:smollm2-135m")  # the file has its epsilon in 32 bits
    assert student_config(smollm2) == dataclasses.replace(published, norm_epsilon=float(np.float32(1e-5)))
    write_json(tmp_path / "config.json", to_hf(STUDENT))
    assert student_config(str(tmp_path)) == STUDENT


def test_the_clock_is_the_one_that_the_compiler_counts_in():
    """A large product runs near the published peak by the compiler's cycles, whose seconds are the chip's."""
    assert [round(CHIPS[kind].clock / 1e9, 2) for kind in ("v4", "v5e", "v5p", "v6e")] == [1.05, 1.5, 1.75, 1.75]
    for kind in ("v5e:1x1", "v6e:1x1"):
        name, devices = topology(kind)
        mesh = make_mesh(default().mesh, devices)
        one = compiled(jnp.matmul, [shape(4096, 4096), shape(4096, 4096)], mesh, [PartitionSpec()] * 2)
        peak = 2 * 4096**3 / CHIPS[name].flops
        assert peak < count(parse(one.as_text()), CHIPS[name], 1).busy < 1.25 * peak
