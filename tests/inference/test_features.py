"""Cached features of a frozen vision encoder: the same from one device, four, or two processes; whole, and of their model."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqa_jax.checkpoints.load import load_student
from sqa_jax.config import default
from sqa_jax.data.images import load_images
from sqa_jax.errors import UserError
from sqa_jax.inference import features as cached
from sqa_jax.models.vision.adapter import ComputeConfig
from sqa_jax.models.vision.encode import encode_images
from sqa_jax.parallel.mesh import make_mesh
from sqa_jax.parallel.processes import main_first
from sqa_jax.parallel.rules import shardings
from sqa_jax.runtime import Runtime, make_decoder
from tests.support.process_group import free_port, launch, wait_for_all
from tests.support.vision_pair import png, problem

# More images than one batch, and of several sizes.
PROBLEMS = [problem(str(k), png(k, (30 + 60 * (k % 3), 40 + 50 * (k % 2)))) for k in range(11)]


@functools.cache
def runtime_on(devices: int, dtype: str = "float32") -> Runtime:
    config = default()
    config.student.dtype = dtype
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    student = load_student("random:qwen2-vl-tiny", shardings_for=lambda tree: shardings(tree, mesh))
    return Runtime(mesh, student, make_decoder(config, student.config, mesh))


def features(cache: Path, devices: int = 4, dtype: str = "float32"):
    """(images, their features) of a model with random weights."""
    runtime = runtime_on(devices, dtype)
    with main_first():
        images = load_images(cache, runtime.student.config.vision, runtime.student.config.vocab_size, PROBLEMS)
    return images, cached.cached_features(cache, runtime, images)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return features(tmp_path_factory.mktemp("alone"), 1)


def test_features_are_those_of_each_image_alone(alone):
    images, found = alone
    runtime, vision = runtime_on(1), images.vision
    assert found.shape == (images.feature_offsets[-1], 64) and len(images.sizes) == 11
    run = jax.jit(lambda params, inputs: encode_images(vision, params, inputs, ComputeConfig()))
    rows = cached.ImageBatcher(images)
    for number in (0, 4, 10):
        span = slice(*images.feature_offsets[number : number + 2])
        _, row = rows(np.arange(span.start, span.stop) + images.vocab_size, 64)
        expected = run(runtime.student.params["vision"], jax.tree.map(lambda array: array[None], row.encoder))
        np.testing.assert_allclose(found[span], expected[0, : span.stop - span.start], atol=1e-5)


def test_four_devices_and_two_processes_compute_the_same(alone, tmp_path):
    images, expected = alone
    _, found = features(tmp_path / "devices")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    address, worker = f"127.0.0.1:{free_port()}", Path(__file__).parent.parent / "support" / "features_worker.py"
    started = launch(lambda index: [worker, address, 2, index, tmp_path / "processes"], 2)
    for code, _, err in wait_for_all(started):
        assert code == 0, err[-2000:]
    (path,) = (tmp_path / "processes").glob("features-*")
    assert path.name in {folder.name for folder in (tmp_path / "devices").iterdir()}
    found = np.fromfile(path / "features.bin", np.float32).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_half_precision_is_kept_apart(alone, tmp_path):
    _, exact = alone
    images, half = features(tmp_path, 1, "bfloat16")
    assert half.dtype == jnp.bfloat16
    assert np.abs(np.asarray(half, np.float32) - exact).max() < 0.05 * np.abs(exact).max()
    (path,) = tmp_path.glob("features-*")
    assert json.loads((path / "manifest.json").read_text())["shape"] == [int(images.feature_offsets[-1]), 64]


def test_interrupted_or_damaged_features_are_never_read(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(cached, "write_json", full)
        with pytest.raises(UserError, match="the disk is full"):
            features(tmp_path, 1)
    assert [folder.name.split("-")[0] for folder in tmp_path.iterdir()] == ["pictures"]
    images, found = features(tmp_path, 1)
    (path,) = tmp_path.glob("features-*")
    (path / "features.bin").write_bytes(found.tobytes()[:-4])
    with pytest.raises(UserError, match=f"{path}: damaged .*; remove this folder"):
        features(tmp_path, 1)
    # Another model has other features.
    runtime = runtime_on(1)
    other = runtime._replace(student=dataclasses.replace(runtime.student, fingerprint="another"))
    cached.cached_features(tmp_path, other, images)
    assert len(list(tmp_path.glob("features-*"))) == 2
