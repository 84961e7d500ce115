"""The budget under every interleaving, the ledger under every crash, full disks and corrupt files."""

from __future__ import annotations

import copy
import math
import shutil
import sqlite3

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from sqa_jax.config import default
from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.teach.budget import Budget, Prices
from sqa_jax.teach.collect import teach
from sqa_jax.teach.ledger import Ledger, Outcome
from sqa_jax.teach.prompts import make_requests
from sqa_jax.teach.teacher import Reply, Request
from tests.support.teacher_server import (
    KEY,
    KEY_ENV,
    PRICES,
    TeacherServer,
    read_attempts,
    read_records,
    teach_config,
    write_questions,
)

# Parts of 2^-20 add up without rounding, so that "never exceeds" can be meant to the letter.
money = st.integers(0, 1 << 22).map(lambda k: k / (1 << 20))
cents = st.integers(0, 10_000).map(lambda k: k / 100)


def requests(number):
    return [Request(f"h{k}", f"q{k}", 0, "?") for k in range(number)]


@settings(deadline=None)
@given(limit=money, spent=money, steps=st.lists(st.tuples(money, st.integers(0, 9), st.floats(0, 1)), max_size=60))
def test_whatever_the_order_the_budget_is_never_exceeded(limit, spent, steps):
    """Requests that start and end in any order, each costing at most what was reserved; nothing is lost count of, and
    what fits is let in."""
    budget, held, paid = Budget(limit, spent), [], spent
    for amount, which, part in steps:
        if which < 5:
            fits = paid + sum(held) + amount <= limit
            assert budget.reserve(amount) == fits
            held += [amount] * fits
        elif held:
            amount = held.pop(which % len(held))
            price = math.floor(part * amount * (1 << 20)) / (1 << 20)
            budget.settle(amount, price)
            paid += price
        assert budget.spent == paid and budget.reserved == sum(held) and budget.idle == (not held)
        assert budget.spent + budget.reserved <= max(limit, spent)


@settings(deadline=None)
@given(
    prompt=st.text(max_size=200), image=st.booleans(), most=st.integers(1, 5000), data=st.data(),
    prices=st.tuples(cents, cents),
)  # fmt: skip
def test_no_reply_within_the_limits_costs_more_than_was_reserved(prompt, image, most, data, prices):
    """A token is at least a byte; the reply is as long as is allowed at most; an image as dear as the settings say."""
    teach_settings = default().teach
    teach_settings.model, teach_settings.prices = "m", (("m", *prices),)
    teach_settings.max_output_tokens = most
    request = Request("h", "q", 0, prompt, object() if image else None)
    used = data.draw(st.integers(0, len(prompt.encode()) + image * teach_settings.image_tokens))
    written = data.draw(st.integers(0, most))
    table = Prices(teach_settings)
    reserved = table.upper_bound(request)
    price = table.of(Reply("ok", "", used, written), reserved)
    assert price == pytest.approx((used * prices[0] + written * prices[1]) / 1e6) and price <= reserved * (1 + 1e-12)
    assert table.upper_bound(request) == reserved and table.free == (prices == (0, 0))
    assert table.of(Reply("ok", ""), reserved) == reserved


def test_a_service_dearer_than_can_be_is_believed():
    """Where a reply cost twice the highest price, the next request is taken to cost that much."""
    teach_settings = default().teach
    teach_settings.model, teach_settings.prices = "teacher-1", PRICES
    table, request = Prices(teach_settings), requests(1)[0]
    reserved = table.upper_bound(request)
    price = table.of(Reply("ok", "", 0, round(2 * reserved * 1e5)), reserved)
    assert price == pytest.approx(2 * reserved, rel=1e-3) and table.upper_bound(request) == pytest.approx(price)


@pytest.mark.parametrize("row", [["m", 1, 1], ("m", 1), ("m", -1, 1), ("m", "1", 1), ("m", math.nan, 1)])
def test_a_price_that_is_none_is_refused(row):
    teach_settings = default().teach
    teach_settings.model, teach_settings.prices = "m", (row,)
    with pytest.raises(UserError, match="config.teach.prices"):
        Prices(teach_settings)


class LedgerMachine(RuleBasedStateMachine):
    """A ledger beside a model of it in plain Python. A crash is a copy of its files without closing it."""

    sent = Bundle("sent")

    @initialize()
    def open(self):
        import tempfile

        self.root = tempfile.mkdtemp()
        self.ledger = Ledger(f"{self.root}/0/ledger.sqlite")
        self.states, self.replies, self.crashes = {}, {}, 0

    @rule(target=sent, which=st.integers(0, 4), price=money)
    def send(self, which, price):
        (attempt,) = self.ledger.record_attempts([requests(5)[which]], [price])
        self.states[attempt] = ("sent", price)
        return attempt, which, price

    @rule(one=consumes(sent), text=st.text(max_size=20), part=st.floats(0, 1))
    def answer(self, one, text, part):
        attempt, which, reserved = one
        if self.states[attempt][0] == "sent":
            self.ledger.record_outcomes([Outcome(attempt, Reply("ok", text, 1, 1), part * reserved)])
            self.states[attempt] = ("answered", part * reserved)
            self.replies.setdefault(f"h{which}", []).append((attempt, text))

    @rule(one=consumes(sent), lost=st.booleans())
    def fail(self, one, lost):
        attempt, _, reserved = one
        if self.states[attempt][0] == "sent":
            self.ledger.record_outcomes([Outcome(attempt, error="x", maybe_paid=lost)])
            self.states[attempt] = ("lost", reserved) if lost else ("free", 0.0)

    @rule()
    def crash(self):
        self.crashes += 1
        shutil.copytree(f"{self.root}/{self.crashes - 1}", f"{self.root}/{self.crashes}")
        self.ledger.__exit__()
        self.ledger = Ledger(f"{self.root}/{self.crashes}/ledger.sqlite")
        for attempt, (state, price) in self.states.items():
            self.states[attempt] = ("lost" if state == "sent" else state, price)

    @invariant()
    def agrees(self):
        if not hasattr(self, "ledger"):
            return
        paid, perhaps = self.ledger.spent()
        assert paid == pytest.approx(sum(price for state, price in self.states.values() if state == "answered"))
        assert perhaps == pytest.approx(
            sum(price for state, price in self.states.values() if state in ("sent", "lost"))
        )
        rows = {row["hash"]: (row["raw"], row["times"]) for row in self.ledger.replies()}
        assert rows == {name: (max(texts)[1], len(texts)) for name, texts in self.replies.items()}

    def teardown(self):
        if hasattr(self, "ledger"):
            self.ledger.__exit__()
            shutil.rmtree(self.root)


def test_a_ledger_remembers_through_crashes():
    few = settings(max_examples=8, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(LedgerMachine, settings=few)


def test_a_full_disk_loses_nothing_that_was_kept(tmp_path):
    """One line says so; what was committed before is there, and the ledger goes on when there is room."""
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        first, second = ledger.record_attempts(requests(2), [0.5, 0.25])
        ledger.record_outcomes([Outcome(first, Reply("ok", "kept", 1, 1), 0.5)])
        ledger._db.execute("PRAGMA max_page_count=1")  # SQLite takes what it has for the least
        with pytest.raises(UserError, match="the disk is full; free some space"):
            ledger.record_outcomes([Outcome(second, Reply("ok", "x" * 100_000, 1, 1), 0.25)])
    with Ledger(path) as ledger:
        assert [row["raw"] for row in ledger.replies()] == ["kept"] and ledger.spent() == (0.5, 0.25)


def test_a_full_disk_in_the_middle_of_a_run(tmp_path, monkeypatch):
    """The run stops in one line; with room again, it asks only for what is missing."""
    monkeypatch.setenv(KEY_ENV, KEY)
    end, ends = Ledger.record_outcomes, []

    def full(self, outcomes, batch=None):
        ends.append(outcomes)
        if len(ends) == 2:
            self._db.execute("PRAGMA max_page_count=1")
            outcomes = [o._replace(reply=Reply("ok", "x" * 100_000)) for o in outcomes]
        return end(self, outcomes, batch)

    data = write_questions(tmp_path / "questions", 5)
    with TeacherServer() as server:
        config = teach_config(data, server, "openai", concurrency=1)
        with monkeypatch.context() as patch, pytest.raises(UserError, match="disk is full"):
            patch.setattr(Ledger, "record_outcomes", full)
            teach(config, str(tmp_path / "run"))
        assert server.asked == ["q0", "q1"]
        summary = teach(config, str(tmp_path / "run"))
        assert server.asked == ["q0", "q1", "q1", "q2", "q3", "q4"] and summary["replies"] == 5
        assert summary["dollars"] + summary["dollars_perhaps"] >= server.bill


def test_damaged_and_impossible_places_are_one_line(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"not a data base at all, and long enough" * 100)
    with pytest.raises(UserError, match="damaged"):
        Ledger(tmp_path / "ledger.sqlite")
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="file"):
            Ledger(place / "ledger.sqlite")
    (tmp_path / "folder" / "ledger.sqlite").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be written"):
        Ledger(tmp_path / "folder" / "ledger.sqlite")


def test_a_ledger_that_cannot_be_used_is_not_kept_locked(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"not a data base at all, and long enough" * 100)
    caught = []
    for _ in range(2):
        with pytest.raises(UserError, match="damaged") as error:
            Ledger(tmp_path / "ledger.sqlite")
        caught.append(copy.copy(error))  # as a traceback would keep it, with its frames
    (tmp_path / "ledger.sqlite").unlink()
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.spent() == (0, 0)


def test_settings_are_the_ledgers_own_as_soon_as_something_was_paid(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.bind_settings({"a": 1, "b": 0.0})
        (attempt,) = ledger.record_attempts(requests(1), [0.5])
        ledger.record_outcomes([Outcome(attempt, error="no such model")])
        ledger.bind_settings({"a": 2, "b": 0.0})
        ledger.record_attempts(requests(1), [0.5])
        ledger.bind_settings({"a": 2, "b": 0})
        with pytest.raises(UserError, match="a was 2 and is 3"):
            ledger.bind_settings({"a": 3, "b": 0})


def test_a_hash_is_of_everything_that_decides_the_reply():
    """Whatever decides it makes another request; what does not, the same one."""
    problem = Problem("1", "Which?", ("a", "b"), 0, lecture="L", solution="S", caption="C")

    def hashes(problem=problem, identity=None, **change):
        teach_settings = default().teach
        for name, value in change.items():
            setattr(teach_settings, name, value)
        return [request.hash for request in make_requests([problem], teach_settings, identity or {"model": "m"})]

    (usual,) = hashes()
    others = [
        hashes(setting="QTCHL"), hashes(setting="QTCHLS"), hashes(setting="QTCHS"), hashes(reply="text"),
        hashes(caption=True),
        hashes(temperature=1.0), hashes(identity={"model": "n"}), hashes(Problem("1", "Where?", ("a", "b"), 0)),
        hashes(Problem("2", "Which?", ("a", "b"), 0)), hashes(temperature=1.0, samples=2)[1:],
    ]  # fmt: skip
    assert len({usual, *(name for (name,) in others)}) == 11
    for same in (hashes(max_output_tokens=9), hashes(concurrency=1), hashes(samples=2)[:1], hashes(retries=9)):
        assert same == [usual]
    with pytest.raises(UserError, match="QTCH, QTCHL"):
        hashes(setting="QCM")
    with pytest.raises(UserError, match="json or text"):
        hashes(reply="xml")


def test_the_database_is_one_that_survives_a_power_cut(tmp_path):
    """Each commit is flushed to the disk; another program can read it meanwhile."""
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger._db.execute("PRAGMA synchronous").fetchone()[0] == 2
        ledger.record_attempts(requests(1), [0.5])
        assert [row["state"] for row in read_attempts(tmp_path)] == ["sent"]
        with sqlite3.connect(tmp_path / "ledger.sqlite") as other:
            assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_every_record_says_what_it_cost(tmp_path, monkeypatch):
    monkeypatch.setenv(KEY_ENV, KEY)
    with TeacherServer() as server:
        summary = teach(teach_config(write_questions(tmp_path / "q"), server, "openai"), str(tmp_path / "run"))
        rows = read_records(tmp_path / "run")
        assert {row["pid"]: row["price"] for row in rows} == pytest.approx({c.pid: c.dollars for c in server.calls})
        assert summary["dollars"] == pytest.approx(sum(row["price"] for row in rows), abs=1e-6)
