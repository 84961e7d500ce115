"""FLOPs, traffic and collectives of small programs, by hand and by the compiler's own analysis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sqa_jax.config import default
from sqa_jax.errors import UserError
from sqa_jax.parallel.chips import CHIPS, quiet_compiler
from sqa_jax.parallel.mesh import make_mesh
from sqa_jax.plan.hlo import Array, Computation, Instruction, parse
from sqa_jax.plan.hlo_cost import count
from sqa_jax.plan.measure import measure
from sqa_jax.plan.replica_groups import replica_groups
from tests.support.planned import config_for

V5E = CHIPS["v5e"]


def lowering(function, shapes, mesh, specs, out=None):
    """A callable that lowers a function for a mesh."""
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    options = {} if out is None else {"out_shardings": NamedSharding(mesh, out)}
    return lambda: jax.jit(function, in_shardings=shardings, **options).lower(*shapes)


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.fixture(scope="module")
def analysed(tpu_programs):
    """`analysed(name, function, shapes)`: our cost on one chip, and XLA's own analysis."""

    def run(name, function, shapes, topology="v5e:1x1"):
        kind, devices = tpu_programs.slice(topology)
        mesh = make_mesh(default().mesh, devices)
        lower = lowering(function, shapes, mesh, [PartitionSpec()] * len(shapes))
        compiled = tpu_programs.compile(name, lower, kind)

        def analysis():
            with quiet_compiler():
                found = lower().compile().cost_analysis()
            return {key: found[key] for key in ("flops", "bytes accessed")}

        return count(parse(compiled.hlo), CHIPS[kind], 1), tpu_programs.numbers(f"{name}-analysis", analysis)

    return run


def test_a_loop_counts_as_often_as_it_runs(analysed):
    """XLA's own analysis of a scan counts one iteration."""

    def layers(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    cost, xla = analysed("scan", layers, [shape(2048, 1024), shape(6, 1024, 1024)])
    assert cost.flops == 6 * 2 * 2048 * 1024**2
    assert cost.flops == pytest.approx(6 * xla["flops"], rel=0.01)
    assert cost.busy * V5E.flops > cost.flops  # nothing is faster than the chip's peak

    def odd(x, kernel):  # 1, 3, 5, 7
        return jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 2, jnp.tanh(c[1] @ kernel)), (1, x))

    cost, _ = analysed("while", odd, [shape(2048, 1024), shape(1024, 1024)])
    assert cost.flops == 4 * 2 * 2048 * 1024**2


def test_batched_products_and_traffic(analysed):
    """A batch is a spatial dimension of the convolution that TPUs make of it; an addition moves its three arrays."""
    cost, _ = analysed(
        "einsum", lambda a, b: jnp.einsum("bij,bjk->bik", a, b), [shape(16, 256, 512), shape(16, 512, 384)]
    )
    assert cost.flops == 16 * 2 * 256 * 512 * 384
    cost, xla = analysed("add", lambda a, b: a + b, [shape(8192, 8192), shape(8192, 8192)])
    assert cost.traffic == 3 * 2 * 8192**2 == xla["bytes accessed"]
    assert cost.busy == pytest.approx(cost.traffic / 819e9)


@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1"])
def test_the_clock_is_the_one_that_the_compiler_counts_in(analysed, topology):
    """A large product runs near the published peak by the compiler's cycles, whose seconds are the chip's."""
    assert [round(CHIPS[kind].clock / 1e9, 2) for kind in ("v4", "v5e", "v5p", "v6e")] == [1.05, 1.5, 1.75, 1.75]
    kind = topology.partition(":")[0]
    cost, _ = analysed(f"matmul-{kind}", jnp.matmul, [shape(4096, 4096), shape(4096, 4096)], topology)
    peak = 2 * 4096**3 / CHIPS[kind].flops
    assert peak < cost.busy < 1.25 * peak


def test_collectives_of_a_known_program(tpu_programs):
    kind, devices = tpu_programs.slice("v5e:2x2")
    mesh = make_mesh(config_for(2, 2, 1).mesh, devices)

    def both(x, w):  # w is gathered over fsdp; the product's rows are summed over all
        return (x @ w).astype(jnp.float32).sum(axis=0)

    specs = [PartitionSpec(("data", "fsdp")), PartitionSpec("fsdp")]
    lower = lowering(both, [shape(4096, 1024), shape(1024, 2048)], mesh, specs, PartitionSpec())
    with tpu_programs.planning("collectives"):
        found = measure(lower, kind, mesh, 0, 1.0)["collectives"]
    gathers = [row for row in found if row["kind"] != "all-reduce"]
    assert sum(row["sent"] for row in gathers) == 1024 * 2048 * 2 / 2
    assert {row["over"] for row in gathers} == {"fsdp"}
    reduces = [row for row in found if row["kind"] == "all-reduce"]
    assert sum(row["sent"] for row in reduces) == pytest.approx(2 * 3 / 4 * 2048 * 4)
    # Half of w over one link of 50 GB/s, as two chips in a row are no ring.
    assert sum(row["seconds"] for row in gathers) == pytest.approx(1024 * 2048 / 50e9)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['data'=2,'fsdp'=2] {'data'}", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_forms_of_replica_groups(text, groups):
    np.testing.assert_array_equal(replica_groups(Instruction("x", (), "all-gather", (), text), 4), groups)


def test_what_the_text_does_not_say_is_an_error():
    with pytest.raises(ValueError, match="x: its replica groups are written in an unknown form"):
        replica_groups(Instruction("x", (), "all-gather", (), "replica_groups=other"), 4)
    with pytest.raises(ValueError, match="the instruction x has no attribute body"):
        Instruction("x", (), "while", (), "").computation_name("body")


def test_arrays_count_with_their_padding():
    """To whole tiles, from the minor dimension on; memory spaces other than HBM are told apart."""
    array = Array("bf16", (10, 100), "1,0:T(8,128)(2,1)")
    assert array.bytes == 2000 and array.padded_bytes == 2 * 16 * 128 and array.in_hbm
    assert not array._replace(layout="1,0:T(8,128)S(1)").in_hbm
    assert Array("pred", (3,), "").padded_bytes == 3 and Array("s4", (3,), "").bytes == 1.5


def test_the_origin_of_a_value_is_behind_its_copies():
    copy = Instruction("b", (), "copy", ("a",), "")
    source = Instruction("a", (), "parameter", (), "0)")
    assert Computation({"a": source, "b": copy}, "b").origin("b") is source


def test_a_program_that_the_compiler_cannot_print(monkeypatch):
    """As libtpu's of 2026 for some steps on v5p; one line, with the memory that it takes."""

    class Compiled:
        def memory_analysis(self):
            names = ("argument", "output", "alias", "temp", "generated_code")
            return type("Sizes", (), {f"{name}_size_in_bytes": 2**29 for name in names})

        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nmore")

    lowered = type("Lowered", (), {"compile": lambda self: Compiled()})()
    mesh = make_mesh(config_for().mesh, jax.devices()[:4])
    with pytest.raises(UserError, match="1.5 of 16 GiB.*cannot print it.*RET_CHECK failure\\)") as caught:
        measure(lambda: lowered, "v5e", mesh, 0, 1.0)
    assert "\n" not in str(caught.value)
