"""The sweep's ranking with a stand-in for the compiler; topologies, slices, and mistakes."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from sqa_jax.config import default
from sqa_jax.errors import UserError
from sqa_jax.parallel.chips import CHIPS, collective_seconds, topology
from sqa_jax.parallel.mesh import make_mesh
from sqa_jax.plan import table
from sqa_jax.plan.plan import make_plan
from sqa_jax.plan.report import plan_training
from sqa_jax.plan.sweep import sweep
from tests.support.planned import STATS, STUDENT, config_for
from tests.support.tpu_programs import fake_slice
from tests.support.verbs import run_verb


def test_a_sweep_ranks_and_says_what_is_impossible(monkeypatch, capsys):
    """The stand-in takes four rows of a chip for too many, and is slower with a larger `fsdp`."""
    compiled = []

    def stand_in(config, *_):
        mesh, rows = config.mesh.to_dict(), config.train.batch_rows // (config.mesh.data * config.mesh.fsdp)
        compiled.append((config.mesh.fsdp, config.mesh.tensor, rows))
        row = {"mesh": mesh, "batch": {"rows_per_chip": rows, **config.train.to_dict()}, "fits": rows < 4}
        return {**row, "tokens_per_second": rows / config.mesh.fsdp} if rows < 4 else row

    monkeypatch.setattr("sqa_jax.plan.sweep.plan_training", stand_in)
    rows = sweep(config_for(), STUDENT, "v5e", fake_slice(2, 2), STATS, 12, rows=32)
    ranked = [row for row in rows if row["fits"]]
    speeds = [row["tokens_per_second"] for row in ranked]
    assert speeds == sorted(speeds, reverse=True) and len(ranked) > 1
    assert all(row["batch"]["batch_rows"] * row["batch"]["accumulate"] == 32 for row in ranked)
    rejected = [row for row in rows if not row["fits"]]
    failed = {(*row["mesh"].values(), row["batch"]["rows_per_chip"]): row["why"] for row in rejected}
    assert "does not divide" in failed[1, 1, 4, 1]  # the vocabulary
    assert "does not fit" in failed.values()
    # What follows from what was compiled is not compiled.
    too_many = [key for key, why in failed.items() if why == "fewer rows did not fit"]
    assert all(any(c[:2] == key[1:3] and 4 <= c[2] < key[3] for c in compiled) for key in too_many)
    assert f"compiling {len(compiled) + len(too_many)}" in capsys.readouterr().err
    assert table.sweep(rejected).startswith("nothing that was compiled fits\n")


def test_slices_are_along_data():
    devices = fake_slice(2, 2, slices=2)
    mesh = make_mesh(config_for(4, 2, 1).mesh, devices)
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match="2 slices do not divide"):
        make_mesh(config_for(1, 8, 1).mesh, devices)


@pytest.mark.live
def test_topologies_of_the_compiler(tpu_compiler):
    """Every device is a chip; fake slices have the coordinates of real ones."""
    assert len(topology("v4:2x2x1")[1]) == 4
    for slices in (1, 2):
        real = topology("v5e:2x4", slices)[1]
        known = {(tuple(d.coords), getattr(d, "slice_index", 0), d.platform, d.device_kind) for d in real}
        assert known == {(d.coords, d.slice_index, d.platform, d.device_kind) for d in fake_slice(2, 4, slices=slices)}
    mesh = make_mesh(config_for(4, 2, 1).mesh, topology("v5e:2x2", slices=2)[1])
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]


def test_the_time_of_a_collective():
    """Links in both directions where an axis is a ring; a microsecond a hop; the DCN between slices."""
    v4, v5e = CHIPS["v4"], CHIPS["v5e"]
    line, ring = fake_slice(2, 1), fake_slice(4, 1, 1)
    assert collective_seconds(v5e, line, np.array([[0, 1]]), 1e6) == pytest.approx(1e6 / 50e9)
    assert collective_seconds(v4, ring, np.arange(4)[None], 1e6) == pytest.approx(1e6 / (2 * 50e9))
    assert collective_seconds(v4, ring, np.arange(4)[None], 1.0) == pytest.approx(2e-6)  # two hops
    assert collective_seconds(v5e, line, np.array([[0]]), 1e6) == 0.0
    slices = fake_slice(2, 1, slices=2)
    assert collective_seconds(v5e, slices, np.array([[0, 2]]), 1e6) == pytest.approx(1e6 / 3.125e9)


@pytest.mark.parametrize("name", ["v5e:3x3", "v9:2x2", "v5e:4x4x4", "v5p:4x4", "v5e", "v5e:32x32", "nonsense"])
def test_unknown_topologies_name_known_ones(name):
    with pytest.raises(UserError, match="v5e:4x4.*v6e:4x4"):
        topology(name)


def test_mistakes(monkeypatch):
    for config, message in (
        (config_for(3), "does not use exactly the 4 devices"),
        (config_for(rows=6), "train.batch_rows is 6"),
        (config_for(1, 1, 4), "does not divide"),
    ):
        with pytest.raises(UserError, match=message):
            plan_training(config, STUDENT, "v5e", fake_slice(2, 2), STATS)
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match="tpu-plan"):
        make_plan(default(), "v5e:4x4", 1, ("train",))


def test_the_verb_says_mistakes_in_one_line():
    done = run_verb("plan", "--config=configs/test.py", "--topology=v5e:5x5")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --topology v5e:5x5") and done.stderr.count("\n") == 1
