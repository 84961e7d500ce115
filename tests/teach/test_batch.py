"""Batch jobs through google-genai: half the price, and submitted exactly once whatever happens."""

from __future__ import annotations

import collections

import pytest

from sqa_jax.errors import UserError
from sqa_jax.signals import StopSignal
from sqa_jax.teach.collect import teach
from sqa_jax.teach.genai import GenAI
from tests.support.teacher_server import (
    KEY,
    KEY_ENV,
    Fail,
    Say,
    TeacherServer,
    kill,
    read_attempts,
    read_records,
    teach_config,
    teach_flags,
    teaching,
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
    return write_questions(tmp_path_factory.mktemp("questions"), 6)


def batch_config(data, server, **change):
    return teach_config(data, server, "genai", **{"batch": True, **change})


def stop_at_the_first_wait(patch):
    """As if a signal came while the jobs are running."""
    patch.setattr(StopSignal, "sleep", lambda self, seconds: setattr(self, "asked", True))


def answers(server, number=6):
    """Each question gets another answer, so that a mix-up is noticed."""
    server.script = {
        f"q{k}": [Say(f'{{"reasoning": "as {k}", "answer": {k % 3}, "solution": "s"}}')] for k in range(number)
    }


@pytest.mark.parametrize("order", ["as asked", "mixed", "without keys"])
def test_replies_cost_half_and_find_their_questions(server, data, order, tmp_path, monkeypatch):
    """By their keys in any order; by their place where the service does not give the keys back."""
    answers(server)
    job = TeacherServer.job

    def changed(self, name):
        made = job(self, name)
        if output := made["metadata"].get("output"):
            rows = output["inlinedResponses"]["inlinedResponses"]
            rows = rows[::-1] if order == "mixed" else rows
            rows = [{"response": row["response"]} for row in rows] if order == "without keys" else rows
            output["inlinedResponses"] = {"inlinedResponses": rows}
        return made

    monkeypatch.setattr(TeacherServer, "job", changed)
    summary = teach(batch_config(data, server, batch_requests=4), str(tmp_path / "run"))
    assert sorted(len(job["rows"]) for job in server.jobs.values()) == [2, 4]
    rows = read_records(tmp_path / "run")
    assert [(row["pid"], row["answer"], row["reasoning"]) for row in rows] == [
        (f"q{k}", k % 3, f"as {k}") for k in range(6)
    ]
    assert summary["dollars"] == pytest.approx(server.bill, abs=1e-6) and summary["dollars_perhaps"] == 0
    assert [len(server.of(f"q{k}")[0].images) for k in range(6)] == [0, 1] * 3
    usual = teach(teach_config(data, server, "genai"), str(tmp_path / "usual"))
    assert summary["dollars"] == pytest.approx(usual["dollars"] / 2, abs=2e-6)


def test_killed_while_the_job_is_running(server, data, tmp_path):
    """SIGKILL between submission and collection: the next run collects that job."""
    server.job_state = ""
    with teaching(teach_flags(data, server, "genai", tmp_path / "run", batch=True)) as process:
        wait_until(lambda: server.polls >= 1)
        kill(process)
    assert {row["state"] for row in read_attempts(tmp_path / "run")} == {"sent"}
    server.job_state = "SUCCEEDED"
    summary = teach(batch_config(data, server), str(tmp_path / "run"))
    assert len(server.jobs) == 1 and summary["replies"] == 6 and summary["dollars_perhaps"] == 0
    assert summary["dollars"] == pytest.approx(server.bill, abs=1e-6)


def test_killed_before_the_service_named_the_job(server, data, tmp_path):
    """It was created, but its name never arrived: it is found by its display name, after pages of others."""
    row = {"request": {"contents": [{"parts": [{"text": "?"}]}]}}
    for number in range(5):
        server.make_job("m", {"displayName": f"other {number}", "inputConfig": {"requests": {"requests": [row]}}})
    server.on_create = "held"
    with teaching(teach_flags(data, server, "genai", tmp_path / "run", batch=True)) as process:
        wait_until(lambda: len(server.jobs) == 6)
        kill(process)
    server.on_create = ""
    summary = teach(batch_config(data, server), str(tmp_path / "run"))
    assert len(server.jobs) == 6 and summary["replies"] == 6 and summary["dollars_perhaps"] == 0
    assert collections.Counter(server.asked)["q0"] == 1


def test_a_lost_response_does_not_submit_twice(server, data, tmp_path):
    """Within one run: the next attempt looks for the job first."""
    server.on_create = "lost"
    summary = teach(batch_config(data, server), str(tmp_path / "run"))
    assert len(server.jobs) == 1 and summary["replies"] == 6
    assert summary["dollars"] == pytest.approx(server.bill, abs=1e-6)


def test_a_job_that_was_never_submitted_is_submitted(server, data, tmp_path):
    """Nothing was paid for the attempt, and its reservation is released."""
    server.on_create = "refused"
    with pytest.raises(UserError, match="keeps failing"):
        teach(batch_config(data, server, retries=1), str(tmp_path / "run"))
    assert not server.jobs
    server.on_create = ""
    most = sum(row["reserved"] for row in read_attempts(tmp_path / "run"))
    summary = teach(batch_config(data, server, budget=1.01 * most), str(tmp_path / "run"))
    assert len(server.jobs) == 1 and summary["replies"] == 6 and summary["dollars_perhaps"] == 0


def test_the_same_questions_elsewhere_are_another_job(server, data, tmp_path):
    """A job of another workdir, even an abandoned one, is not taken for this one's."""
    teach(batch_config(data, server), str(tmp_path / "one"))
    server.on_create = "refused"
    with pytest.raises(UserError):
        teach(batch_config(data, server, retries=0), str(tmp_path / "two"))
    server.on_create = ""
    teach(batch_config(data, server), str(tmp_path / "two"))
    assert len(server.jobs) == 2 and len({job["displayName"] for job in server.jobs.values()}) == 2


def test_the_budget_holds_for_jobs_too(server, data, tmp_path):
    """Only what fits is submitted, also while jobs are running; more budget asks only for the rest."""
    with pytest.raises(UserError, match="budget of"):
        teach(batch_config(data, server, budget=0.0028, batch_requests=1), str(tmp_path / "run"))
    first = len(server.calls)
    assert 1 <= first < 6 and server.bill <= 0.0028
    summary = teach(batch_config(data, server), str(tmp_path / "run"))
    assert sorted(server.asked) == [f"q{k}" for k in range(6)] and summary["replies"] == 6


def test_what_a_job_did_not_cost_pays_for_the_next(server, data, tmp_path):
    """With money for one question at its highest price beyond what all of them cost in the end, all are answered."""
    free = teach(batch_config(data, server), str(tmp_path / "free"))
    most = max(row["reserved"] for row in read_attempts(tmp_path / "free"))
    budget = 1.001 * (free["dollars"] + most)
    assert budget < sum(row["reserved"] for row in read_attempts(tmp_path / "free"))
    summary = teach(batch_config(data, server, budget=budget), str(tmp_path / "run"))
    assert summary["replies"] == 6 and summary["dollars"] == free["dollars"] and len(server.jobs) > 2


def test_running_jobs_count_as_spent_after_a_restart(server, data, tmp_path, monkeypatch):
    server.job_state = ""
    with monkeypatch.context() as patch:
        stop_at_the_first_wait(patch)
        assert teach(batch_config(data, server, limit=3), str(tmp_path / "run"))["ended"] == "signal"
        held = sum(row["reserved"] for row in read_attempts(tmp_path / "run"))
        summary = teach(batch_config(data, server, budget=1.01 * held), str(tmp_path / "run"))
    assert len(server.jobs) == 1 and summary["dollars_perhaps"] == pytest.approx(held, abs=1e-6)
    with pytest.raises(UserError, match="batch jobs under way, which are paid for"):
        teach(teach_config(data, server, "genai"), str(tmp_path / "run"))
    server.job_state = "SUCCEEDED"
    assert teach(batch_config(data, server), str(tmp_path / "run"))["replies"] == 6


def test_a_job_is_collected_although_no_reply_is_missing(server, data, tmp_path, monkeypatch):
    """Replies that were asked for again are in the job; without `ask_again` nothing is missing, but they are paid."""
    server.script["q1"] = [Say("")]
    teach(batch_config(data, server), str(tmp_path / "run"))
    server.script, server.job_state = {}, ""
    with monkeypatch.context() as patch:
        stop_at_the_first_wait(patch)
        teach(batch_config(data, server, ask_again=("empty",)), str(tmp_path / "run"))
    server.job_state = "SUCCEEDED"
    summary = teach(batch_config(data, server), str(tmp_path / "run"))
    assert summary["status"] == {"ok": 6} and len(server.of("q1")) == 2
    assert summary["dollars"] == pytest.approx(server.bill, abs=1e-6)


def test_one_bad_question_in_a_job(server, data, tmp_path):
    """It costs nothing, is named, and is asked for alone by the same command."""
    server.script["q2"] = [Fail(400, f"this image of {KEY} cannot be read \ud83d")]
    with pytest.raises(UserError, match=r"1 questions got no reply, such as q2: this image of \*\*\* cannot .* 5 of 6"):
        teach(batch_config(data, server), str(tmp_path / "run"))
    assert not any(KEY.encode() in path.read_bytes() for path in (tmp_path / "run").iterdir())
    server.script.clear()
    summary = teach(batch_config(data, server), str(tmp_path / "run"))
    assert server.asked.count("q2") == 1 and len(server.calls) == 6 and summary["dollars_perhaps"] == 0


@pytest.mark.parametrize(("state", "lost"), [("FAILED", False), ("EXPIRED", True), ("CANCELLED", True)])
def test_a_job_that_brought_nothing(server, data, state, lost, tmp_path):
    """What may have been charged counts as spent. The next run asks again."""
    server.job_state = state
    with pytest.raises(UserError, match=f"ended as JOB_STATE_{state}"):
        teach(batch_config(data, server), str(tmp_path / "run"))
    assert {row["state"] for row in read_attempts(tmp_path / "run")} == {"lost" if lost else "free"}
    server.job_state = "SUCCEEDED"
    summary = teach(batch_config(data, server), str(tmp_path / "run"))
    assert summary["replies"] == 6 and (summary["dollars_perhaps"] > 0) == lost


def test_a_job_that_is_gone_counts_as_perhaps_paid(server, data, tmp_path, monkeypatch):
    server.job_state = ""
    with monkeypatch.context() as patch:
        stop_at_the_first_wait(patch)
        teach(batch_config(data, server), str(tmp_path / "run"))
    server.jobs.clear()
    with pytest.raises(UserError, match="no longer there"):
        teach(batch_config(data, server), str(tmp_path / "run"))
    assert {row["state"] for row in read_attempts(tmp_path / "run")} == {"lost"}


@pytest.mark.parametrize("wrong", ["key", "model"])
def test_a_wrong_key_or_model_submits_nothing(server, data, wrong, tmp_path, monkeypatch):
    change = {"model": "teacher-9", "prices": (("teacher-9", 1, 1), ("teacher-1", 1, 10))} if wrong == "model" else {}
    with monkeypatch.context() as patch:
        if wrong == "key":
            patch.setenv(KEY_ENV, "another-Key")
        with pytest.raises(UserError, match="key is not accepted" if wrong == "key" else "is not there") as caught:
            teach(batch_config(data, server, **change), str(tmp_path / "run"))
    assert not server.jobs and "another-Key" not in str(caught.value)
    assert teach(batch_config(data, server), str(tmp_path / "run"))["replies"] == 6


def test_jobs_are_no_larger_than_the_service_takes(server, data, tmp_path, monkeypatch):
    """As many as fit by their size, and always at least one."""
    monkeypatch.setattr("sqa_jax.teach.batch.BATCH_BYTES", 4500)
    sizes = []
    submit = GenAI.submit

    def measured(self, name, requests):
        sizes.append(sum(map(self.request_bytes, requests)))
        return submit(self, name, requests)

    monkeypatch.setattr(GenAI, "submit", measured)
    teach(batch_config(data, server), str(tmp_path / "run"))
    assert len(server.jobs) > 1 and all(size <= 4500 for size in sizes) and len(server.calls) == 6
    monkeypatch.setattr("sqa_jax.teach.batch.BATCH_BYTES", 1)
    assert teach(batch_config(data, server), str(tmp_path / "small"))["replies"] == 6


def test_only_one_client_has_batch_jobs(server, data, tmp_path):
    with pytest.raises(UserError, match="only the client genai"):
        teach(teach_config(data, server, "gemini", batch=True), str(tmp_path / "run"))
