"""The request loop: rate limit, retries, early stops, and that a restart pays for nothing twice."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import time

import pytest
import tenacity
from hypothesis import given, settings
from hypothesis import strategies as st

from sqa_jax.config import default
from sqa_jax.errors import UserError
from sqa_jax.signals import StopSignal
from sqa_jax.teach.collect import teach
from sqa_jax.teach.ledger import Ledger
from sqa_jax.teach.run import backoff
from sqa_jax.teach.teacher import TransientError, retry_after
from tests.support.teacher_server import (
    KEY,
    KEY_ENV,
    MODEL,
    Break,
    Fail,
    Say,
    TeacherServer,
    kill,
    read_attempts,
    read_records,
    teach_config,
    teach_flags,
    teaching,
    wait_for_handler,
    wait_until,
    write_questions,
)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv(KEY_ENV, KEY)
    with TeacherServer() as server:
        yield server


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions"), 12)


@contextlib.contextmanager
def running(data, server, client, workdir, **change):
    """The verb in a process of its own, with held replies released at the end."""
    with teaching(teach_flags(data, server, client, workdir, **change)) as process:
        try:
            yield process
        finally:
            server.go.set()


@pytest.mark.parametrize(
    ("client", "header"),
    [("gemini", True), ("genai", True), ("openai", True), ("gemini", False), ("genai", False)],
)
def test_a_service_that_asks_to_wait_is_not_asked_before(server, data, client, header, tmp_path):
    """By its header or, as Google does, in the body; neither by this question's next try nor by any other question,
    also not by those that were already in line for the rate limit."""
    seconds = 1.0 if header else 0.6
    server.script["q0"] = [Fail(429, retry_after="1") if header else Fail(429, delay="0.6s")]
    config = teach_config(data, server, client, limit=6, concurrency=6, requests_per_minute=1200, image=False)
    assert teach(config, str(tmp_path / "run"))["replies"] == 6
    told = server.of("q0")[0].at
    early = [call.pid for call in server.calls if told + 0.4 < call.at < told + seconds]
    assert not early and server.of("q0")[1].at - told >= seconds
    assert sum(call.at > told + seconds for call in server.calls) >= 3


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({"retry-after": "7"}, "", 7),
        ({"Retry-After": " 2.5 "}, "retryDelay: '9s'", 2.5),
        ({}, '{"retryDelay": "31.5s"}', 31.5),
        ({}, "{'retryDelay': '3s'}", 3),
        ({"Retry-After": "soon"}, "", 0),
        ({"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, "", 0),
        ({}, "no wish", 0),
    ],
)
def test_forms_of_retry_after(headers, body, seconds):
    assert retry_after(headers, body) == seconds


def test_retry_after_a_date():
    import email.utils

    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 27 < retry_after({"Retry-After": date}, "") <= 31


@settings(deadline=None)
@given(st.integers(1, 40), st.floats(0, 100), st.floats(0, 5))
def test_backoff_doubles_and_is_never_shorter_than_asked_for(attempt, asked, first):
    """At most `backoff · 2^(tries - 1)`, a minute at most, and what the service asked for on top."""
    teach_settings = default().teach
    teach_settings.backoff = first
    state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
    state.attempt_number = attempt
    state.set_exception((TransientError, TransientError("x", asked), None))
    assert asked <= backoff(teach_settings)(state) <= asked + min(60.0, first * 2.0 ** (attempt - 1)) + 1e-9


def test_requests_are_evenly_spaced(server, data, tmp_path):
    """Retries pass the same rate limiter."""
    server.script = {"q1": [Fail(500)], "q3": [Fail(429)]}
    config = teach_config(data, server, "openai", limit=5, requests_per_minute=600, image=False, backoff=0.0)
    teach(config, str(tmp_path / "run"))
    times = sorted(call.at for call in server.calls)
    # A tenth of a second apart; on the server's clock a gap may look shorter, where its thread had to wait.
    assert len(times) == 7 and times[-1] - times[0] >= 0.5
    assert all(later - earlier >= 0.15 for earlier, later in zip(times, times[3:], strict=False))


def test_concurrency_is_bounded(server, data, tmp_path):
    server.lag = 0.15
    teach(teach_config(data, server, "openai", concurrency=3), str(tmp_path / "run"))
    assert server.most_under_way == 3 and len(server.calls) == 12


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("client", ["gemini", "openai"])
def test_the_budget_stops_before_it_is_exceeded(server, data, client, concurrency, tmp_path):
    """By the service's own bill, lost replies included; then more budget asks only for the rest."""
    server.lag = 0.02
    server.script = {"q1": [Break("silent")], "q2": [Fail(500), Break("cut")]}
    workdir, asked = str(tmp_path / "run"), []
    for budget in (0.004, 0.008, 1.0):
        config = teach_config(data, server, client, budget=budget, concurrency=concurrency)
        if budget < 1:
            with pytest.raises(UserError, match=rf"budget of \${budget} .* raise --config.teach.budget"):
                teach(config, workdir)
            rows = read_attempts(tmp_path / "run")
            assert (
                sum(r["price"] or 0 for r in rows) + sum(r["reserved"] for r in rows if r["state"] == "lost") <= budget
            )
        else:
            summary = teach(config, workdir)
        assert server.bill <= budget
        asked.append(len(server.calls))
    assert 1 <= asked[0] < asked[1] < asked[2]
    tries = collections.Counter(server.asked)
    assert tries == {f"q{k}": {1: 2, 2: 3}.get(k, 1) for k in range(12)}
    assert summary["replies"] == 12 and summary["dollars"] + summary["dollars_perhaps"] >= server.bill


def test_a_budget_too_small_for_one_question_asks_none(server, data, tmp_path):
    with pytest.raises(UserError, match="does not cover the next question; 0 of 12 replies are kept"):
        teach(teach_config(data, server, "openai", budget=1e-6), str(tmp_path / "run"))
    assert not server.calls


def test_a_free_teacher_needs_no_budget(server, data, tmp_path):
    config = teach_config(data, server, "openai", budget=0.0, prices=((MODEL, 0, 0),), limit=2)
    summary = teach(config, str(tmp_path / "run"))
    assert summary["replies"] == 2 and summary["dollars"] == 0


@pytest.mark.parametrize(
    ("act", "status"),
    [
        (Say("", finish="safety"), "blocked"),
        (Say(""), "empty"),
        (Say("x", finish="length"), "cut_off"),
        (Say("?"), "unparsed"),
        (Say('{"answer": 1'), "malformed"),
    ],
)
def test_asking_again_is_a_choice_and_has_an_end(server, data, act, status, tmp_path):
    """Without `ask_again` nothing, with it these questions alone, and no more than `ask_at_most` replies in all."""
    server.script["q1"] = [act, act, act]
    workdir = str(tmp_path / "run")

    def calls(**change):
        teach(teach_config(data, server, "openai", limit=3, **change), workdir)
        return len(server.of("q1"))

    other = "blocked" if status != "blocked" else "empty"
    assert calls() == calls() == calls(ask_again=(other,)) == 1
    assert calls(ask_again=(status,)) == 2 == calls(ask_again=(status,))
    assert calls(ask_again=(status,), ask_at_most=3) == 3
    assert [row["status"] for row in read_records(tmp_path / "run")] == ["ok", status, "ok"]
    assert calls(ask_again=(status, other), ask_at_most=4) == 4
    assert [row["status"] for row in read_records(tmp_path / "run")] == ["ok"] * 3
    assert calls(ask_again=(status, other), ask_at_most=9) == 4 and len(server.calls) == 6
    assert len([row for row in read_attempts(tmp_path / "run") if row["pid"] == "q1"]) == 4  # each is still there


def test_several_samples_are_several_replies(server, data, tmp_path):
    config = teach_config(data, server, "openai", limit=2, samples=3, temperature=0.7)
    assert teach(config, str(tmp_path / "run"))["replies"] == 6
    assert [(r["pid"], r["sample"]) for r in read_records(tmp_path / "run")] == [
        (f"q{k // 3}", k % 3) for k in range(6)
    ]
    with pytest.raises(UserError, match="temperature"):
        teach(teach_config(data, server, "openai", samples=2), str(tmp_path / "other"))


def test_only_what_changed_is_asked_again(server, tmp_path):
    """A changed question or image is another request; a higher token limit is not."""
    root = tmp_path / "questions"
    root.mkdir()
    data, workdir = write_questions(root, 4), str(tmp_path / "run")
    teach(teach_config(data, server, "openai"), workdir)
    teach(teach_config(data, server, "openai", max_output_tokens=200, concurrency=1, retries=0), workdir)
    assert len(server.calls) == 4
    file = root / "problems.json"
    file.write_text(file.read_text().replace("to a magnet? [q2]", "to a strong magnet? [q2]"))
    images = root / "images" / "train"
    (images / "q1" / "image.png").write_bytes((images / "q3" / "image.png").read_bytes())
    server.script["q2"] = [Say(), Fail(400, "not now")]
    with pytest.raises(UserError, match="3 of 4 replies are kept"):
        teach(teach_config(data, server, "openai"), workdir)
    # What was said of the question as it was is not a reply to it any more.
    assert [row["pid"] for row in read_records(tmp_path / "run")] == ["q0", "q1", "q3"]
    summary = teach(teach_config(data, server, "openai"), workdir)
    assert sorted(server.asked[4:]) == ["q1", "q2", "q2"] and summary["replies"] == 4
    with pytest.raises(UserError, match="teach.setting was 'QTCH' and is 'QTCHL'.*choose another --workdir"):
        teach(teach_config(data, server, "openai", setting="QTCHL"), workdir)
    with pytest.raises(UserError, match="teach.model"):
        teach(teach_config(data, server, "openai", model="o", prices=(("o", 1, 1),)), workdir)
    assert len(server.calls) == 7 and len(read_records(tmp_path / "run")) == 4


def test_one_refused_question_does_not_stop_the_others(server, data, tmp_path):
    server.script["q3"] = [Fail(400, "this image cannot be read")] * 2
    config = teach_config(data, server, "openai", concurrency=2)
    with pytest.raises(UserError, match="1 questions got no reply, such as q3: .*cannot be read.*11 of 12"):
        teach(config, str(tmp_path / "run"))
    with pytest.raises(UserError, match="q3"):
        teach(config, str(tmp_path / "run"))
    assert server.asked[-1] == "q3" and len(server.calls) == 13
    assert teach(config, str(tmp_path / "run"))["replies"] == 12


def test_a_service_that_only_fails_is_left_alone(server, data, tmp_path):
    server.usual = Fail(503)
    config = teach_config(data, server, "openai", concurrency=2, retries=1)
    with pytest.raises(UserError, match="keeps failing, last with HTTP 503"):
        teach(config, str(tmp_path / "run"))
    # Three questions in a row, each tried twice; one more may have been under way.
    assert 6 <= len(server.calls) <= 8 and server.bill == 0


@pytest.mark.parametrize("act", [Fail(429, "insufficient_quota: you exceeded it"), Fail(402, "Insufficient Balance")])
def test_an_account_without_credit_is_not_asked_again(server, data, act, tmp_path):
    """Nor for any other question, also where it ran out in the middle of a run."""
    server.script = {f"q{k}": [act] for k in range(3, 12)}
    with pytest.raises(UserError, match="no credit left.*3 of 12 replies are kept"):
        teach(teach_config(data, server, "openai", concurrency=1), str(tmp_path / "run"))
    assert len(server.calls) == 4


def test_two_runs_at_once_are_refused(server, data, tmp_path):
    """Before anything is sent; and the first is not disturbed."""
    server.usual = Break("held")
    with running(data, server, "openai", tmp_path / "run", limit=2) as process:
        wait_until(lambda: len(server.calls) == 2)
        with pytest.raises(UserError, match="another run is using it"):
            teach(teach_config(data, server, "openai", limit=2), str(tmp_path / "run"))
        server.go.set()
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "2 of 2 replies: 2 ok" in out and len(server.calls) == 2
    assert f"${server.bill:.4f} of $1" in err and KEY not in out + err


@pytest.mark.parametrize("concurrency", [1, 4])
def test_killed_in_the_middle_nothing_is_paid_twice(server, data, concurrency, tmp_path):
    """SIGKILL with replies kept and requests in flight: the next run asks only for those that have no reply, and counts
    those in flight as paid."""
    under_way = [f"q{k}" for k in range(5, 5 + concurrency)]
    server.script = {pid: [Break("held")] for pid in under_way}
    config = teach_config(data, server, "openai", concurrency=concurrency, limit=10)
    with running(data, server, "openai", tmp_path / "run", concurrency=concurrency, limit=10) as process:
        # One at a time, the fifth question's reply is kept before the sixth is asked.
        wait_until(lambda: set(under_way) <= set(server.asked))
        wait_until(lambda: sum(row["state"] == "answered" for row in read_attempts(tmp_path / "run")) >= 5)
        kill(process)
        states = collections.Counter(row["state"] for row in read_attempts(tmp_path / "run"))
    kept = [row["pid"] for row in read_attempts(tmp_path / "run") if row["state"] == "answered"]
    assert states == {"answered": len(kept), "sent": concurrency}
    before = len(server.calls)
    summary = teach(config, str(tmp_path / "run"))
    assert not set(server.asked[before:]) & set(kept)
    assert collections.Counter(server.asked) == {f"q{k}": 2 if f"q{k}" in under_way else 1 for k in range(10)}
    assert summary["replies"] == 10 and summary["dollars_perhaps"] > 0
    assert summary["dollars"] + summary["dollars_perhaps"] >= server.bill
    assert [row["state"] for row in read_attempts(tmp_path / "run")].count("lost") == concurrency


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_requests_in_flight(server, data, number, tmp_path):
    server.script = {pid: [Break("held")] for pid in ("q1", "q2")}
    with running(data, server, "openai", tmp_path / "run", concurrency=2) as process:
        wait_until(lambda: {"q1", "q2"} <= set(server.asked))
        process.send_signal(number)
        wait_for_handler(process, number)
        server.go.set()
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "the same command asks only for what is missing" in out, err
    asked = len(server.calls)
    assert asked < 12 and f"{asked} of 12 replies: {asked} ok" in out
    summary = teach(teach_config(data, server, "openai"), str(tmp_path / "run"))
    assert sorted(server.asked) == sorted(f"q{k}" for k in range(12)) and summary["dollars_perhaps"] == 0


def test_a_signal_during_a_long_wait_ends_it(server, data, tmp_path):
    """Nobody waits an hour for Ctrl-C because a service asked for an hour."""
    server.usual = Fail(429, retry_after="3600")
    with running(data, server, "openai", tmp_path / "run", limit=4) as process:
        wait_until(lambda: server.calls and any(row["state"] == "free" for row in read_attempts(tmp_path / "run")))
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=10)
    assert process.returncode == 0 and "stopped" in out and server.bill == 0


def test_a_signal_before_the_first_request_sends_none(server, data, tmp_path, monkeypatch):
    enter = StopSignal.__enter__

    def signalled(self):
        enter(self)
        os.kill(os.getpid(), signal.SIGTERM)
        return self

    monkeypatch.setattr(StopSignal, "__enter__", signalled)
    assert teach(teach_config(data, server, "openai"), str(tmp_path / "run"))["ended"] == "signal" and not server.calls


def test_the_progress_bar_shows_money_and_remaining_time(server, data, tmp_path, capfd):
    server.lag = 0.05
    teach(teach_config(data, server, "openai", concurrency=1, limit=6), str(tmp_path / "run"))
    last = capfd.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert "6/6" in last and f"${server.bill:.4f} of $1" in last and "<" in last


def test_a_ledger_in_use_by_this_process_is_refused_too(server, data, tmp_path):
    with Ledger(tmp_path / "run" / "ledger.sqlite"), pytest.raises(UserError, match="another run"):
        teach(teach_config(data, server, "openai"), str(tmp_path / "run"))
    assert not server.calls
