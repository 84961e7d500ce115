"""Each service's real client library against a fake server with fault injection."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from sqa_jax.errors import UserError
from sqa_jax.prompts.formats import SETTINGS
from sqa_jax.teach.collect import teach
from tests.support.teacher_server import (
    CLIENTS,
    KEY,
    KEY_ENV,
    Break,
    Fail,
    Say,
    TeacherServer,
    read_attempts,
    read_records,
    teach_config,
    teach_flags,
    write_questions,
)
from tests.support.verbs import run_verb


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv(KEY_ENV, KEY)
    with TeacherServer() as server:
        yield server


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture(params=CLIENTS)
def client(request):
    return request.param


def holds_key(workdir, *texts):
    files = [path.read_bytes() for path in workdir.rglob("*") if path.is_file()] if workdir.exists() else []
    assert not workdir.exists() or files
    return any(KEY.encode() in content for content in [*files, *(text.encode() for text in texts)])


@pytest.mark.parametrize(
    ("client", "setting"),
    [*(("gemini", setting) for setting in SETTINGS), ("genai", "QTCHLS"), ("openai", "QTCHLS"), ("openai", "QTCH")],
)
def test_questions_and_images_arrive_unchanged(server, data, client, setting, tmp_path):
    """The lecture and the solution are shown in exactly the settings that name them; images arrive byte for byte."""
    summary = teach(teach_config(data, server, client, setting=setting), str(tmp_path / "run"))
    assert sorted(server.asked) == ["q0", "q1", "q2", "q3"] and summary["replies"] == 4 and summary["ended"] == "done"
    for call in server.calls:
        assert ("LECTURE" in call.prompt, "SOLUTION:" in call.prompt) == ("L" in setting, setting.endswith("S"))
        assert all(option in call.prompt for option in ("(0) an iron nail", "(1) a cork", "(2) a cup"))
        number = int(call.pid[1:])
        assert len(call.images) == number % 2
        for image in call.images:
            with Image.open(io.BytesIO(image)) as decoded:
                assert decoded.size == (3 + number, 5) and decoded.getpixel((0, 0)) == (40 * number, 7, 200)
    rows = read_records(tmp_path / "run")
    assert [(r["pid"], r["answer"], r["status"], r["setting"]) for r in rows] == [
        (f"q{k}", 0, "ok", setting) for k in range(4)
    ]
    assert {(r["reasoning"], r["solution"]) for r in rows} == {("Iron is attracted.", "Magnets attract iron.")}


def test_what_is_sent_follows_the_settings(server, data, client, tmp_path):
    """The highest number of tokens and the temperature reach the service; without images none is sent."""
    config = teach_config(data, server, client, image=False, temperature=0.5, max_output_tokens=77, limit=2)
    teach(config, str(tmp_path / "run"))
    for call in server.calls:
        options = call.body.get("generationConfig", call.body)
        assert not call.images and options["temperature"] == 0.5
        assert 77 in (options.get("maxOutputTokens"), options.get("max_tokens"))


def test_an_image_in_a_rare_format_is_sent_as_png(server, data, tmp_path):
    """No service accepts BMP; the pixels are unchanged."""
    root = tmp_path / "questions"
    root.mkdir()
    data = write_questions(root, 2)
    file = root / "images" / "train" / "q1" / "image.png"
    Image.new("RGB", (9, 4), (1, 2, 3)).save(file, "BMP")
    teach(teach_config(data, server, "openai"), str(tmp_path / "run"))
    (image,) = server.of("q1")[0].images
    with Image.open(io.BytesIO(image)) as decoded:
        assert (decoded.format, decoded.size, decoded.getpixel((8, 3))) == ("PNG", (9, 4), (1, 2, 3))


@pytest.mark.parametrize(
    ("act", "perhaps_paid"),
    [
        (Fail(429), False),
        (Fail(500), False),
        (Fail(503), False),
        (Fail(504), True),
        (Break("late", 4.0), True),
        (Break("silent"), True),
        (Break("cut"), True),
        (Break("not_json"), True),
    ],
)
def test_transient_errors_are_retried(server, data, client, act, perhaps_paid, tmp_path):
    """One failure, then a reply. What may have been charged counts, what was certainly free does not."""
    server.script["q1"] = [act]
    config = teach_config(data, server, client, limit=2, timeout=1.0 if act == Break("late", 4.0) else 10.0)
    summary = teach(config, str(tmp_path / "run"))
    assert summary["replies"] == 2 and summary["ended"] == "done" and not summary["failed"]
    assert len(server.of("q0")) == 1 and len(server.of("q1")) == 2
    states = [row["state"] for row in read_attempts(tmp_path / "run") if row["pid"] == "q1"]
    assert states == ["lost" if perhaps_paid else "free", "answered"]
    answered = server.of("q0")[0].dollars + server.of("q1")[1].dollars
    assert summary["dollars"] == pytest.approx(answered, abs=1e-6)
    assert summary["dollars"] + summary["dollars_perhaps"] >= server.bill - 1e-6
    assert (summary["dollars_perhaps"] > 0) == perhaps_paid


@pytest.mark.parametrize(
    ("act", "status", "answer"),
    [
        (Say("I am not sure about this one."), "unparsed", None),
        (Say('{"answer": 1, "sol'), "malformed", 1),
        (Say('{"reasoning": "It is long, and', finish="length"), "cut_off", None),
        (Say("", finish="prompt"), "blocked", None),
        (Say("", finish="safety"), "blocked", None),
        (Say(""), "empty", None),
        (Say("Since iron is attracted, the answer is (2) a cup."), "ok", 2),
        (Say("separators \u2028 \x85 and \x00 in a reply"), "unparsed", None),
    ],
)
def test_what_came_back_is_kept_with_its_status(server, data, client, act, status, answer, tmp_path):
    """Such a reply was paid for: it is kept as it came, and the same command does not ask for it again."""
    server.script["q0"] = [act]
    config, workdir = teach_config(data, server, client, limit=2), tmp_path / "run"
    summary = teach(config, str(workdir))
    first = read_records(workdir)[0]
    assert (first["pid"], first["status"], first["answer"]) == ("q0", status, answer)
    if act.text and act.finish != "prompt":
        assert first["raw"] == act.text.encode("utf-8", "replace").decode()
    assert summary["status"] == ({"ok": 2} if status == "ok" else {"ok": 1, status: 1})
    assert summary["dollars"] == pytest.approx(server.bill, abs=1e-6)
    assert teach(config, str(workdir))["dollars"] == summary["dollars"] and len(server.calls) == 2


@pytest.mark.parametrize("client", ["genai", "openai"])
def test_a_reply_that_is_not_unicode_is_kept(server, data, client, tmp_path):
    """JSON can carry half a surrogate pair. (Through google-generativeai it cannot: it reads protocol buffers.)"""
    server.script["q0"] = [Say("The answer is (1). \ud83d")]
    summary = teach(teach_config(data, server, client, limit=2), str(tmp_path / "run"))
    assert summary["status"] == {"ok": 2} and len(server.calls) == 2
    assert read_records(tmp_path / "run")[0]["raw"] == "The answer is (1). ?"


@pytest.mark.filterwarnings("ignore:.*FinishReason")
@pytest.mark.parametrize("number", [11, 12, 99])
def test_an_ending_that_only_newer_clients_know_is_kept(server, data, client, number, tmp_path):
    """Services add reasons for which a reply ended; a reply that is paid for is not lost over one."""
    server.script["q0"] = [Say(finish=number)]
    summary = teach(teach_config(data, server, client, limit=2), str(tmp_path / "run"))
    assert summary["replies"] == 2 and len(server.calls) == 2


def test_a_service_that_counts_no_tokens_is_taken_at_the_highest_price(server, data, client, tmp_path):
    server.usual = Say(usage=False)
    summary = teach(teach_config(data, server, client, limit=1), str(tmp_path / "run"))
    assert summary["dollars"] >= server.bill > 0 and summary["dollars"] >= 100 * 10 / 1e6


@pytest.mark.parametrize("code", [400, 401, 403])
def test_a_wrong_key_is_refused_in_one_line_that_does_not_show_it(
    server, data, client, code, tmp_path, monkeypatch, capfd
):
    """Not tried again, not paid, and the service's own words, which repeat the key, are cleaned of it."""
    if code == 400:  # as Gemini says it; the server answers by itself
        monkeypatch.setenv(KEY_ENV, "another-Key/1==")
    server.usual = Fail(code, f"{KEY} may not do this")
    with pytest.raises(UserError, match="key is not accepted") as caught:
        teach(teach_config(data, server, client, concurrency=1), str(tmp_path / "run"))
    assert len(read_attempts(tmp_path / "run")) == 1 and server.bill == 0
    out, err = capfd.readouterr()
    assert not holds_key(tmp_path / "run", out, err, str(caught.value), repr(caught.value.__cause__))
    assert "another-Key" not in out + err + str(caught.value)
    assert all("another-Key" not in str(row["error"]) for row in read_attempts(tmp_path / "run"))


def test_an_unknown_model_is_refused_and_the_workdir_stays_usable(server, data, client, tmp_path):
    config = teach_config(data, server, client, model="teacher-9", prices=(("teacher-9", 1, 1), ("teacher-1", 1, 10)))
    with pytest.raises(UserError, match="'teacher-9' is not there") as caught:
        teach(config, str(tmp_path / "run"))
    assert "config.teach.model" in str(caught.value) and server.bill == 0
    assert teach(teach_config(data, server, client), str(tmp_path / "run"))["replies"] == 4


def test_nobody_there_costs_nothing(data, client, tmp_path, monkeypatch):
    """A connection that was never made is not perhaps paid."""
    monkeypatch.setenv(KEY_ENV, KEY)
    with TeacherServer() as gone:
        config = teach_config(data, gone, client, retries=1, concurrency=1)
    with pytest.raises(UserError, match="keeps failing") as caught:
        teach(config, str(tmp_path / "run"))
    assert {row["state"] for row in read_attempts(tmp_path / "run")} == {"free"}
    assert not holds_key(tmp_path / "run", str(caught.value))


def test_the_key_is_nowhere_whatever_happens(server, data, client, tmp_path, capfd):
    """Through every failure in one run: not in the workdir, on the screen, or in an exception."""
    server.script = {
        "q0": [Fail(429, f"slow down, {KEY}"), Break("silent")],
        "q1": [Fail(500, f"key={KEY}"), Break("not_json")],
        "q2": [Break("cut"), Break("late", 2.0)],
        "q3": [Fail(400, f"bad request of {KEY}")],
    }
    workdir = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        teach(teach_config(data, server, client, retries=3, timeout=0.5), str(workdir))
    chain, error = [], caught.value
    while error is not None:
        chain += [str(error), repr(error)]
        error = error.__cause__ or error.__context__
    out, err = capfd.readouterr()
    assert not holds_key(workdir, out, err, *chain)
    assert any(KEY in value for value in server.calls[0].headers.values())  # it was used


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        ({}, "", KEY_ENV),
        ({"budget": 0.0}, KEY, "--config.teach.budget=5"),
        ({"model": "nobody"}, KEY, "price of 'nobody' is not known"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(server, data, tmp_path, monkeypatch, change, key, message):
    monkeypatch.setenv(KEY_ENV, key)
    result = run_verb("teach", *teach_flags(data, server, "openai", tmp_path / "run", **change))
    assert result.returncode == 2 and result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and not server.calls
    assert not (tmp_path / "run").exists() and KEY not in result.stdout + result.stderr


def test_a_wrong_key_at_the_command_line(server, data, tmp_path, monkeypatch):
    """The progress bar aside, one line."""
    monkeypatch.setenv(KEY_ENV, "another-Key/1==")
    result = run_verb("teach", *teach_flags(data, server, "gemini", tmp_path / "run"))
    lines = [
        line
        for line in result.stderr.replace("\r", "\n").splitlines()
        if line.strip() and "reply/s" not in line and "?reply" not in line
    ]
    assert result.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: gemini: the key is not accepted")
    assert "another-Key" not in result.stdout + result.stderr and not holds_key(tmp_path / "run")


@pytest.mark.parametrize("name", ["", KEY, "sk-live key"])
def test_a_key_in_the_place_of_its_variable_is_not_repeated(server, data, client, name, tmp_path, monkeypatch):
    for variable in ("GEMINI_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    if name == "" and client == "openai":
        config = teach_config(data, server, client, key_env="", endpoint="")
        with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
            teach(config, str(tmp_path / "run"))
        return
    with pytest.raises(UserError) as caught:
        teach(teach_config(data, server, client, key_env=name), str(tmp_path / "run"))
    assert "environment" in str(caught.value) and KEY not in str(caught.value) and "sk-live" not in str(caught.value)
    assert not server.calls and not (tmp_path / "run").exists()


def test_another_server_never_gets_the_key_of_openai(server, data, tmp_path, monkeypatch):
    """Unless it is named; a local server needs none."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UserError, match="key is not accepted"):
        teach(teach_config(data, server, "openai", key_env=""), str(tmp_path / "run"))
    assert not server.calls
