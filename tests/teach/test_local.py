"""Local teachers, a model on this machine and recorded replies; and datasets built from records."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from sqa_jax.batches.dataset import build_or_reuse
from sqa_jax.checkpoints.tokenizer import byte_tokenizer
from sqa_jax.config import default
from sqa_jax.data.sources import load_problems
from sqa_jax.errors import UserError
from sqa_jax.models.catalogue import SHAPES
from sqa_jax.models.vision.registry import vision_family
from sqa_jax.teach.collect import teach
from sqa_jax.teach.ledger import Ledger
from sqa_jax.teach.student import StudentTeacher
from tests.support.teacher_server import (
    KEY,
    KEY_ENV,
    Say,
    TeacherServer,
    read_attempts,
    read_records,
    teach_config,
    write_questions,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions"), 5)


def replay_config(data, *files, **change):
    return teach_config(
        data, None, "replay", **{"model": "", "replay": tuple(map(str, files)), "budget": 0.0, **change}
    )


def write_replies(path, *rows):
    full = ({"model": "m", "setting": "QTCH", "raw": f"The answer is ({k % 3})."} | row for k, row in enumerate(rows))
    path.write_text("".join(json.dumps(row) + "\n" for row in full))
    return path


def targets(config, problems):
    """{pid: target text} of a distillation dataset."""
    config.recipe.max_prompt = config.recipe.max_target = 4000
    tokenizer = byte_tokenizer()
    tokens, lengths, _, pids = build_or_reuse(config, tokenizer, problems)[0].columns()
    return {pid: tokenizer.decode(ids[n:]) for ids, n, pid in zip(tokens, lengths, pids, strict=True)}


def test_the_samples_teacher_is_replayed(tmp_path):
    """Every reply of the split, word for word; and its records make the dataset that the sample's own name makes."""
    config = default()
    config.teach.client, config.teach.replay, config.teach.model = "replay", ("sample",), ""
    config.teach.setting, config.teach.reply = "QTCH", "text"
    summary = teach(config, str(tmp_path / "run"))
    from sqa_jax.data import sample

    problems = load_problems("sample")
    train = {problem.pid for problem in problems.split("train")}
    rows = [row for row in sample.teacher_replies(sample.generate()) if row["setting"] == "QTCH"]
    recorded = {row["pid"]: row["raw"] for row in rows if row["pid"] in train}
    assert {row["pid"]: row["raw"] for row in read_records(tmp_path / "run")} == recorded
    assert summary["replies"] == len(recorded) > 100 and summary["dollars"] == 0
    made = []
    for teacher in ("sample", str(tmp_path / "run" / "records.jsonl")):
        config.data.teacher, config.recipe.arm, config.data.cache = (teacher,), "teacher_cot", str(tmp_path / "cache")
        config.data.train_limit = 60
        made.append(targets(config, problems))
    assert made[0] == made[1] and len(made[0]) > 20


def test_replies_that_are_all_to_another_split(tmp_path):
    """Nothing is written, so the same workdir can be used with the right split."""
    config = default()
    config.teach.client, config.teach.replay, config.teach.model = "replay", ("sample",), ""
    config.teach.split = "test"
    with pytest.raises(
        UserError, match=r"all 1600 replies of simulated-teacher, QTCH, are to other splits than 'test'"
    ):
        teach(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_replay_goes_on_from_files(data, tmp_path):
    """Questions without a recorded reply stay missing, which is no error; replies of another model or setting are not
    this teacher's."""
    file = write_replies(
        tmp_path / "a.jsonl", {"pid": "q0"}, {"pid": "q2", "status": "blocked"}, {"pid": "q3", "model": "n"},
        {"pid": "q4", "setting": "QTCHL"}, {"pid": "q1", "price": 3.0, "prompt_tokens": 7},
    )  # fmt: skip
    summary = teach(replay_config(data, file, model="m"), str(tmp_path / "run"))
    assert (summary["replies"], summary["missing"], summary["dollars"], summary["ended"]) == (3, 2, 0, "missing")
    rows = read_records(tmp_path / "run")
    assert [(r["pid"], r["status"], r["answer"]) for r in rows] == [
        ("q0", "ok", 0),
        ("q1", "ok", 1),
        ("q2", "blocked", 1),
    ]
    assert rows[1]["prompt_tokens"] == 7
    again = teach(replay_config(data, file, model="m"), str(tmp_path / "run"))
    assert again["replies"] == 3 and len(read_attempts(tmp_path / "run")) == 3
    # Records are replies too.
    copy = teach(replay_config(data, tmp_path / "run" / "records.jsonl"), str(tmp_path / "copy"))
    assert copy["replies"] == 3 and [r["raw"] for r in read_records(tmp_path / "copy")] == [r["raw"] for r in rows]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"pid": "q0"}, {"pid": "q77"}], "1 replies are to questions that .* does not have, such as q77"),
        ([{"pid": "q0"}, {"pid": "q0"}], "replies 1 and 2 are both for question q0"),
        ([{"pid": "q0"}, {"pid": "q1", "model": "n"}], "recorded replies are of m, n: choose one"),
        ([{"pid": "q0", "setting": "QTCHS"}], "no reply of m in setting QTCH; the files hold m QTCHS"),
        ([{"pid": "q0", "raw": 3}], "reply 1 has no text in 'raw'"),
        ([], "recorded replies are of no model"),
    ],
)
def test_replies_that_cannot_be_meant_are_refused(data, rows, said, tmp_path):
    """In one line, before anything is kept; and what a workdir holds already stays."""
    good = write_replies(tmp_path / "good.jsonl", {"pid": "q3"})
    teach(replay_config(data, good), str(tmp_path / "run"))
    before = read_records(tmp_path / "run")
    with pytest.raises(UserError, match=said) as caught:
        teach(replay_config(data, write_replies(tmp_path / "bad.jsonl", *rows)), str(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert read_records(tmp_path / "run") == before and len(read_attempts(tmp_path / "run")) == 1


def test_two_files_with_a_reply_to_one_question(data, tmp_path):
    first, second = (write_replies(tmp_path / name, {"pid": "q0"}) for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(UserError, match="b.jsonl: question q0 has a reply of m in .*a.jsonl already"):
        teach(replay_config(data, first, second), str(tmp_path / "run"))
    with pytest.raises(UserError, match="not found"):
        teach(replay_config(data, tmp_path / "none.jsonl"), str(tmp_path / "run"))
    with pytest.raises(UserError, match="config.teach.replay is empty"):
        teach(replay_config(data), str(tmp_path / "run"))


def test_replayed_and_paid_replies_do_not_mix(data, tmp_path, monkeypatch):
    """A workdir is one teacher's."""
    monkeypatch.setenv(KEY_ENV, KEY)
    with TeacherServer() as server:
        teach(teach_config(data, server, "openai"), str(tmp_path / "run"))
        file = write_replies(tmp_path / "a.jsonl", {"pid": "q0", "model": "teacher-1"})
        with pytest.raises(UserError, match="replay was False and is True"):
            teach(replay_config(data, file), str(tmp_path / "run"))
    assert len(read_records(tmp_path / "run")) == 5


def student_config(data, **change):
    base = {"model": "random:tiny", "image": False, "budget": 0.0, "max_output_tokens": 6, "concurrency": 2}
    config = teach_config(data, None, "student", **{**base, **change})
    return config


def test_a_student_is_asked_without_key_or_money(data, tmp_path, monkeypatch):
    """Its replies are what it generates; stopped after the first call, it goes on with the rest; cut off is said."""
    asked = []
    ask_all = StudentTeacher.ask_all

    def watched(self, requests):
        asked.append([request.pid for request in requests])
        return ask_all(self, requests)

    monkeypatch.setattr(StudentTeacher, "ask_all", watched)
    keep = Ledger.record_replies

    def killed(self, replies, price):
        keep(self, replies, price)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Ledger, "record_replies", killed)
        teach(student_config(data, limit=4), str(tmp_path / "run"))
    kept = {row["pid"] for row in read_attempts(tmp_path / "run")}
    summary = teach(student_config(data, limit=4), str(tmp_path / "run"))
    assert len(kept) == 2 and len(asked[0]) == 4 and sorted(kept | set(asked[1])) == ["q0", "q1", "q2", "q3"]
    assert len(asked[1]) == 2 and summary["replies"] == 4 and summary["dollars"] == 0
    rows = read_records(tmp_path / "run")
    assert all(1 <= row["output_tokens"] <= 6 and row["prompt_tokens"] > 100 for row in rows)
    assert all((row["status"] == "cut_off") == (row["output_tokens"] == 6) for row in rows)


def test_a_vision_language_student_gets_the_images(tmp_path, capsys):
    """A prompt is longer by its image tokens, the reply depends on them, and a question whose image the vision encoder
    cannot process gets no reply, rather than one to another question."""
    data = write_questions(tmp_path / "questions", 6)
    Image.new("RGB", (1, 300)).save(tmp_path / "questions" / "images" / "train" / "q5" / "image.png")
    rows = {}
    for image in (True, False):
        config = student_config(data, model="random:qwen2-vl-tiny", image=image)
        config.data.cache = str(tmp_path / "cache")
        summary = teach(config, str(tmp_path / f"run-{image}"))
        rows[image] = {row["pid"]: row for row in read_records(tmp_path / f"run-{image}")}
        assert (summary["missing"], set(rows[image])) == (
            (1, {f"q{k}" for k in range(5)}) if image else (0, {f"q{k}" for k in range(6)})
        )
    assert "1 of 3 questions' images cannot be used" in capsys.readouterr().err
    longer = {pid: row["prompt_tokens"] - rows[False][pid]["prompt_tokens"] for pid, row in rows[True].items()}
    vision = SHAPES["qwen2-vl-tiny"].vision
    for k in (1, 3):
        image = vision_family(vision).preprocess_image(vision, Image.new("RGB", (3 + k, 5)))
        assert longer[f"q{k}"] == len(image.pieces) * vision.features_per_piece + 2 > 2  # and its two delimiter tokens
        assert rows[True][f"q{k}"]["raw"] != rows[False][f"q{k}"]["raw"]
    for k in (0, 2, 4):
        assert longer[f"q{k}"] == 0 and rows[True][f"q{k}"]["raw"] == rows[False][f"q{k}"]["raw"]


def test_a_student_says_what_it_cannot(data, tmp_path):
    with pytest.raises(UserError, match="random:tiny has no vision encoder; set --config.teach.image=False"):
        teach(student_config(data, image=True), str(tmp_path / "run"))
    with pytest.raises(UserError, match="config.teach.model is empty"):
        teach(student_config(data, model=""), str(tmp_path / "run"))
    with pytest.raises(UserError, match="lower --config.teach.max_output_tokens"):
        teach(student_config(data, max_output_tokens=10**6), str(tmp_path / "run"))
    assert not read_attempts(tmp_path / "run")


@pytest.mark.parametrize("client", ["gemini", "openai"])
def test_records_become_a_distillation_dataset(data, client, tmp_path, monkeypatch):
    """The teacher's words are the targets: its reasoning as a chain of thought, its solution as an explanation; blocked
    and wrong-headed replies teach nothing, and the manifest counts them."""
    monkeypatch.setenv(KEY_ENV, KEY)
    with TeacherServer() as server:
        server.script["q1"] = [Say("", finish="safety")]
        server.script["q2"] = [Say("no idea")]
        teach(teach_config(data, server, client), str(tmp_path / "run"))
    config, problems = default(), load_problems("dir", data)
    config.data.source, config.data.path, config.data.cache = "dir", data, str(tmp_path / "cache")
    config.data.teacher = (str(tmp_path / "run" / "records.jsonl"),)
    for arm, fmt, said in (
        ("teacher_cot", "QCM-EA", "Iron is attracted.\nThe answer is A."),
        ("teacher_answer", "QCM-AE", "The answer is A. BECAUSE: Magnets attract iron."),
    ):
        config.recipe.arm, config.recipe.format = arm, fmt
        made = targets(config, problems)
        assert set(made) == {"q0", "q3", "q4"}
        assert all(text.startswith(said) for text in made.values())


def test_an_image_that_is_missing_is_noticed_before_anything_is_paid(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_ENV, KEY)
    data = write_questions(tmp_path / "questions", 4)
    file = tmp_path / "questions" / "images" / "train" / "q3" / "image.png"
    with TeacherServer() as server:
        file.write_bytes(file.read_bytes()[:20])
        with pytest.raises(UserError, match="q3.*not a readable image"):
            teach(teach_config(data, server, "openai"), str(tmp_path / "run"))
        file.unlink()
        with pytest.raises(UserError, match="image not found; fetch the images, or ask without them"):
            teach(teach_config(data, server, "openai"), str(tmp_path / "run"))
        assert not server.calls
        assert teach(teach_config(data, server, "openai", image=False), str(tmp_path / "run"))["replies"] == 4


def test_an_image_that_goes_away_stops_the_run_and_costs_nothing(tmp_path, monkeypatch):
    """In one line, and nobody goes on asking; what was not sent is not perhaps paid, what was answered is kept."""
    monkeypatch.setenv(KEY_ENV, KEY)
    data, work = write_questions(tmp_path / "questions", 12), tmp_path / "run"
    with TeacherServer() as server:
        act, server.lag = server.next_act, 0.05

        def removing(call):
            (tmp_path / "questions" / "images" / "train" / "q3" / "image.png").unlink(missing_ok=True)
            return act(call)

        server.next_act = removing
        with pytest.raises(UserError, match="q3.*image not found"):
            teach(teach_config(data, server, "openai", concurrency=2), str(work))
        states = {row["pid"]: row["state"] for row in read_attempts(work)}
        assert states.pop("q3") == "free" and set(states.values()) == {"answered"}
        assert set(states) == set(server.asked) and len(server.calls) <= 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("client", "oracle"), ("samples", 0), ("concurrency", 0), ("max_output_tokens", 0), ("ask_at_most", 0),
        ("batch_requests", 0), ("limit", -1), ("retries", -1), ("requests_per_minute", -1.0), ("temperature", -0.1),
        ("backoff", -1.0), ("image_tokens", -1), ("budget", -1.0), ("budget", float("nan")), ("timeout", 0.0),
        ("poll_seconds", 0.0), ("batch_discount", 0.0), ("batch_discount", 1.5), ("ask_again", ("ok",)),
        ("setting", "QCM"), ("reply", "xml"), ("split", "nowhere"),
    ],
)  # fmt: skip
def test_settings_that_can_only_be_mistakes(data, name, value, tmp_path, monkeypatch):
    """One line that names the setting, before a workdir is made."""
    monkeypatch.setenv(KEY_ENV, KEY)
    change = {} if name == "client" else {name: value}
    with pytest.raises(UserError) as caught:
        teach(teach_config(data, None, value if name == "client" else "openai", **change), str(tmp_path / "run"))
    assert name in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "run").exists()
