"""Eight simulated devices, the real student's file, and a tiny student that everything can be tried on."""

from __future__ import annotations

import gc
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support import shape_checks

LOOPS = "--xla_cpu_use_fusion_emitters=false"

# Before JAX is imported anywhere; what pytest starts beside itself has it all from there.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Tiny models spend their time in the compiler, which is twice as fast where it optimises nothing, and twice again
    # where it writes loops itself; newer ones do so only by way of MLIR, and refuse what they do not know.
    flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
        flags.append(LOOPS)
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
    # A second thread of PyTorch's finds nothing to do in a tiny model, and waits for it at full speed.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Several test processes may load the TPU compiler at the same time; there is no TPU to query.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # What one test has compiled no other compiles again, nor its child processes.
    _cache = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# Tracing makes many objects that live on; looking through all of them again and again takes a twentieth of the time.
gc.set_threshold(100_000, 50, 100)
shape_checks.install()  # before sqa_jax is imported anywhere

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser):
    group = parser.getgroup("references")
    group.addoption("--reference", action="store_true", help="only compare with outside libraries, computing them anew")
    group.addoption("--remake", action="store_true", help="with --reference: write tests/references anew")


# The files that take longest, in this order: workers that start with them end together.
SLOWEST_FIRST = (
    "study/test_study.py",
    "parallel/test_processes.py",
    "test_train.py",
)


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups
def pytest_collection_modifyitems(config, items):
    """`--reference` runs what compares with outside libraries; without it, what needs one is left out.

    The tests of a file share what its fixtures make, so they are one group of `--dist=loadgroup`, unless a test says
    otherwise with `@pytest.mark.xdist_group`.
    """
    live = config.getoption("--reference")

    def wanted(item) -> bool:
        needs_library = item.get_closest_marker("live") is not None
        return needs_library or "reference" in item.fixturenames if live else not needs_library

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    rank = {file: k for k, file in enumerate(SLOWEST_FIRST)}
    files = {item: item.path.relative_to(ROOT / "tests").as_posix() for item in items}
    items[:] = sorted(filter(wanted, items), key=lambda item: rank.get(files[item], len(rank)))
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(files[item]))


@pytest.fixture(scope="session")
def reference(pytestconfig):
    """`reference(name, compute)`: arrays of an outside library, see `tests.support.references`."""
    from tests.support.references import References

    return References(pytestconfig.getoption("--reference"), pytestconfig.getoption("--remake"))


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """`store(name, make)`: a folder that all tests of the session share, see `tests.support.store`."""
    from tests.support.store import Store

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "store"
    root.mkdir(exist_ok=True)
    return Store(root)


@pytest.fixture(scope="session", autouse=True)
def one_device_by_default():
    """A mesh of one simulated device, on which everything compiles sooner, wherever a test's settings ask for no other."""
    from sqa_jax.parallel import mesh

    make_mesh = mesh.make_mesh

    def small(settings, devices=None):
        import jax

        unset = [settings[axis] for axis in mesh.AXES] == [-1, 1, 1]
        return make_mesh(settings, jax.devices()[:1] if devices is None and unset else devices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sqa_jax.runtime.make_mesh", small)
        yield


@pytest.fixture(scope="module")
def tpu_compiler():
    """For tests that load the TPU's compiler, which ends the process over a flag that it does not know: JAX has read its
    flags, and there is none such left."""
    import jax

    jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace(LOOPS, ""))
        yield


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The pretrained student's GGUF file, which launch/test.sh fetches."""
    path = ROOT / "weights" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.exists(), f"{path} is missing: run `bash launch/fetch_student.sh`"
    return str(path)


@pytest.fixture(scope="session")
def tiny_student():
    """Two random layers and a tokenizer of bytes."""
    from sqa_jax.checkpoints.load import load_student

    return load_student("random:tiny")
