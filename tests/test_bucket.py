"""Workdirs in a bucket: a run there is the run on a disk, whatever the bucket refuses in between.

gcsfs, google-cloud-storage and tensorstore are the real ones; the bucket is the stand-in of bucket_server.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import threading
import time

import pytest

from sqa_jax import bucket
from sqa_jax.errors import UserError
from sqa_jax.evaluation.evaluate import evaluate
from sqa_jax.files import archive, as_path, atomic_write, local_path, open_log, read_json, read_jsonl, write_json
from sqa_jax.runtime import build_runtime
from sqa_jax.training.loop import train
from sqa_jax.training.workdir import bind_config, open_workdir
from tests.support.bucket_server import BucketServer
from tests.support.runs import last_adapter, quick_config, same

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:google"),  # how long Google will support this Python
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # orbax's threads, when one fails
]


@pytest.fixture(scope="module")
def server():
    with BucketServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", server.url)  # gcsfs, google-cloud-storage
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # which asks by gRPC for what kind of bucket it is
        yield server


@pytest.fixture
def store(server):
    """The objects of gs://bucket, which is empty at first; nothing is refused at first."""
    server.buckets, server.refuse = {"bucket": {}}, lambda method, name: None
    return server.buckets["bucket"]


def text(store, name: str) -> str:
    return store[name][1].decode()


# ---- a whole run


@pytest.fixture(scope="module")
def runs(server, tmp_path_factory):
    """A run on a disk; the same in a bucket, whose permission to write was withdrawn while it saved step 3."""
    root = tmp_path_factory.mktemp("runs")
    config = quick_config(root, **{"train.steps": 4, "train.eval_every": 2, "train.save_every": 1})
    runtime = build_runtime(config)
    train(config, str(root / "run"), runtime)
    server.buckets = {"bucket": {}}
    server.refuse = lambda method, name: 403 if method == "POST" and "checkpoints/last/3" in name else None
    with pytest.raises(UserError) as refused:
        train(config, "gs://bucket/runs/x", runtime)
    kept, _ = last_adapter(as_path("gs://bucket/runs/x"), config)
    server.refuse = lambda method, name: None
    train(config, "gs://bucket/runs/x", runtime)
    return config, root / "run", server.buckets["bucket"], refused.value, kept


def test_permission_withdrawn_in_the_middle_is_one_line_and_loses_nothing(runs):
    _, _, _, refused, kept = runs
    assert "gs://bucket/runs/x" in str(refused) and "roles/storage.objectAdmin" in str(refused)
    assert "\n" not in str(refused) and kept == 2


def test_a_run_in_a_bucket_is_the_run_on_a_disk(runs):
    config, here, store, _, _ = runs
    same(last_adapter(here, config), last_adapter(as_path("gs://bucket/runs/x"), config))
    assert json.loads(text(store, "runs/x/config.json")) == json.loads((here / "config.json").read_text())
    assert json.loads(text(store, "runs/x/train.json")) == json.loads((here / "train.json").read_text())
    clock = ("seconds", "tokens_per_second")
    there, on_disk = (
        [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines.splitlines()]
        for lines in (text(store, "runs/x/metrics.jsonl"), (here / "metrics.jsonl").read_text())
    )
    assert there == on_disk and [row["step"] for row in there if "loss" in row] == [1, 2, 3, 4]
    shown = [step for name in store if "/tensorboard/" in name for step in event_steps(store[name][1], "loss")]
    assert {3, 4} <= set(shown) <= {1, 2, 3, 4}  # TensorBoard's writer may drop the last ones of a run that fails
    assert not [name for name in store if ".probe" in name]


def event_steps(content: bytes, tag: str) -> list[int]:
    """The steps at which a TensorBoard file has a scalar; the format is length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    file, steps = io.BytesIO(content), []
    while head := file.read(12):
        event = Event.FromString(file.read(struct.unpack("<Q", head[:8])[0]))
        file.read(4)
        steps += [event.step for value in event.summary.value if value.tag == tag]
    return steps


def test_an_evaluation_in_a_bucket_is_the_one_on_a_disk(runs, server):
    """Its predictions cannot be written at first: the answers are kept, and given again when they can."""
    config, here, store, _, _ = runs
    expected = evaluate(config, str(here))
    server.refuse = lambda method, name: 403 if method == "POST" and "predictions" in name else None
    with pytest.raises(UserError, match="access is refused"):
        evaluate(config, "gs://bucket/runs/x")
    partial = next(name for name in store if "/partial-" in name)
    rows = [{**json.loads(line), "text": "kept"} for line in text(store, partial).splitlines()]
    assert len(rows) == 6
    server.put("bucket", partial, "".join(json.dumps(row) + "\n" for row in rows[:3]).encode() + b'{"pid": "1')
    server.refuse = lambda method, name: None
    metrics = evaluate(config, "gs://bucket/runs/x")
    again = [json.loads(line) for line in text(store, "runs/x/eval/test/predictions.jsonl").splitlines()]
    on_disk = [json.loads(line) for line in (here / "eval/test/predictions.jsonl").read_text().splitlines()]
    kept = [row["pid"] for row in rows[:3]]
    assert again == [{**row, "text": "kept"} if row["pid"] in kept else row for row in on_disk]
    metrics.pop("questions_per_second"), expected.pop("questions_per_second")
    assert metrics == expected and partial not in store
    assert evaluate(config, "gs://bucket/runs/x")["fingerprint"] == expected["fingerprint"]

    other = config.copy_and_resolve_references()
    other.eval.limit = 2
    before = text(store, "runs/x/eval/test/predictions.jsonl")
    assert evaluate(other, "gs://bucket/runs/x")["n"]["AVG"] == 2
    aside = [name for name in store if "/test." in name and name.endswith("predictions.jsonl")]
    assert [text(store, name) for name in aside] == [before]


def test_a_workdir_in_a_bucket_keeps_to_its_configuration(runs):
    config, _, store, _, _ = runs
    before = dict(store)
    other = config.copy_and_resolve_references()
    other.optimizer.learning_rate = 0.5
    trained = json.loads(text(store, "runs/x/config.json"))
    with pytest.raises(UserError, match="learning_rate was 0.001 and is 0.5"):
        bind_config("gs://bucket/runs/x", other, {key: trained[key] for key in ("student", "dataset")})
    assert dict(store) == before


# ---- what the bucket may refuse


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        (
            lambda method, name: 403 if method == "POST" else None,
            "access is refused.*legacyBucketReader on gs://another ",
        ),
        (lambda method, name: 403 if not name else None, "access is refused"),  # the bucket's own description
        (lambda method, name: 403 if method == "DELETE" else None, "access is refused"),
        (lambda method, name: 401 if method == "POST" else None, "gcloud auth application-default login"),
        (lambda method, name: 404, "no such bucket.*gcloud storage buckets create gs://another"),
        (lambda method, name: 404 if method == "POST" else None, "no such bucket"),
        (lambda method, name: 503, "it cannot be reached"),
        (lambda method, name: time.sleep(3), "it cannot be reached.*no answer within 1 s"),
    ],
)
def test_what_a_bucket_refuses_is_said_at_once(server, store, monkeypatch, refuse, words):
    monkeypatch.setattr(bucket, "ANSWER_SECONDS", 1.0)
    server.buckets["another"], server.refuse = {}, refuse
    began = time.monotonic()
    with pytest.raises(UserError, match=words) as caught:
        open_workdir("gs://another/runs/x")
    assert (
        time.monotonic() - began < 5 and "\n" not in str(caught.value) and "gs://another/runs/x: " in str(caught.value)
    )


def test_without_credentials_it_says_how_to_get_them(server, store, monkeypatch, tmp_path):
    """As on a machine where nobody has logged in; Google's own library looks for them."""
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    for name, value in {"HOME": tmp_path, "CLOUDSDK_CONFIG": tmp_path, "GOOGLE_APPLICATION_CREDENTIALS": ""}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="no valid Google credentials here.*gcloud auth application-default login"):
        open_workdir("gs://bucket/runs/x")


def test_without_gcsfs_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[gcs\]'"):
        open_workdir("gs://bucket/runs/x")


def test_what_must_be_on_a_disk_is_refused_elsewhere():
    from sqa_jax.config import default
    from sqa_jax.study.run import run_study as study
    from sqa_jax.teach.collect import teach

    with pytest.raises(UserError, match="s3://bucket/x: gs:// is the only store that is known"):
        open_workdir("s3://bucket/x")
    for verb in (study, teach):
        with pytest.raises(UserError, match="gs://bucket/x: a .* must be on this machine's disk"):
            verb(default(), "gs://bucket/x")
    with pytest.raises(UserError, match="must be on this machine's disk"):
        local_path("gs://bucket/x", "this")


# ---- files


def test_an_object_is_whole_or_what_it_was(server, store):
    path = as_path("gs://bucket/x.json")
    write_json(path, {"a": "é\u2028"})
    assert read_json(path, "it") == {"a": "é\u2028"}
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("half")
        raise RuntimeError
    server.refuse = lambda method, name: 403 if method == "POST" else None
    with pytest.raises(UserError, match="access is refused"), atomic_write(path) as file:
        file.write("refused")
    assert read_json(path, "it") == {"a": "é\u2028"} and list(store) == ["x.json"]
    server.refuse = lambda method, name: 403
    with pytest.raises(UserError, match="access is refused"):
        read_json(path, "it")
    server.refuse = lambda method, name: None
    with atomic_write(path, "wb") as file:
        file.write(b"{\xff")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(path, "it")
    with pytest.raises(UserError, match="not found; it should hold rows"):
        read_jsonl(as_path("gs://bucket/none.jsonl"), "rows")


def test_a_folder_that_is_moved_aside_is_never_lost(server, store):
    files = {"metrics.json": b"{}", "partial-1.jsonl": b"1\n", "predictions.jsonl": b"2\n"}
    for name, content in files.items():
        server.put("bucket", f"test/{name}", content)
    for denied in ("POST", "DELETE"):
        server.refuse = lambda method, name, denied=denied: 403 if (method, name[-5:]) == (denied, "jsonl") else None
        with pytest.raises(UserError, match="access is refused"):
            archive("gs://bucket/test", f"gs://bucket/test.{denied}")
        whole = [name for name in ("test", f"test.{denied}") if all(f"{name}/{file}" in store for file in files)]
        assert whole, "a copy is whole at any time"
    server.refuse = lambda method, name: None
    archive("gs://bucket/test", "gs://bucket/test.1")
    left = {file: content for file, content in files.items() if file != "metrics.json"}
    assert {file: store[f"test.1/{file}"][1] for file in left} == left and not [
        n for n in store if n.startswith("test/")
    ]


def test_a_log_grows_by_whole_lines_and_does_not_wait(server, store, monkeypatch):
    monkeypatch.setattr(bucket, "UPLOAD_SECONDS", 0.0)
    seen, go = [], threading.Event()

    def slow(method, name):
        if method == "POST" and name:
            seen.append(text(store, "log.jsonl") if "log.jsonl" in store else "")
            go.wait(10)

    server.refuse = slow
    lines = [json.dumps({"step": step, "text": "é"}) + "\n" for step in range(200)]
    with open_log("gs://bucket/log.jsonl") as log:
        began = time.monotonic()
        for line in lines[:100]:
            log.write(line)
        assert time.monotonic() - began < 1 and not store, "the first upload is still under way"
        go.set()
        for line in lines[100:]:
            log.write(line)
            time.sleep(0.002)
    assert text(store, "log.jsonl") == "".join(lines)
    assert 2 < len(seen) < 200 and all("".join(lines).startswith(one) and one[-1:] in ("", "\n") for one in seen)
    with open_log("gs://bucket/log.jsonl") as log:
        log.write("more\n")
        log.flush()
        assert text(store, "log.jsonl") == "".join(lines) + "more\n"


def test_an_upload_that_failed_is_raised_by_what_comes_next(server, store, monkeypatch):
    monkeypatch.setattr(bucket, "UPLOAD_SECONDS", 0.0)
    log = open_log("gs://bucket/log.jsonl")
    server.refuse = lambda method, name: 403 if method == "POST" else None
    with pytest.raises(OSError, match="Forbidden"):
        for _ in range(500):
            log.write("line\n")
            time.sleep(0.01)
    server.refuse = lambda method, name: None
    log.close()
    assert set(text(store, "log.jsonl").splitlines()) == {"line"}
