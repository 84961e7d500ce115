"""The agent: episodes in a batch, policies and their cost, traces to learn from, and the command."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from sqa_jax.agent import explore
from sqa_jax.agent.__main__ import agent, config_with_adapter, show, write_traces
from sqa_jax.agent.evidence import calls_by_records
from sqa_jax.agent.loop import Agent
from sqa_jax.agent.policies import Constrained, Free, Plan, decide, random_plan
from sqa_jax.agent.summary import pareto
from sqa_jax.agent.tools import Tool, make_tools
from sqa_jax.batches.config_data import load_config_problems
from sqa_jax.batches.dataset import build_or_reuse
from sqa_jax.config import default
from sqa_jax.data.teacher_records import TeacherRecord
from sqa_jax.errors import UserError
from sqa_jax.files import read_jsonl
from sqa_jax.inference import decode_slots
from sqa_jax.models.flops import forward_flops
from sqa_jax.prompts.tool_calls import ToolSpec
from sqa_jax.runtime import build_runtime
from sqa_jax.training.loop import train
from tests.support.verbs import run_verb

CALCULATOR = "tests.agent.test_agent:calculator"


def calculator(config, problems):
    """A third tool, in one file."""
    return Tool(ToolSpec("calculate", "calculates"), lambda requests: ["42"] * len(requests))


def small(tmp_path=None, **agent_settings):
    config = default()
    config.student.path = "random:tiny"
    config.recipe.answer, config.recipe.chat, config.recipe.max_prompt = "text", False, 700
    config.eval.limit = 6
    config.agent.update({"context": 1400, "batch": 4, "calibrate": 4, "max_new_tokens": 6} | agent_settings)
    config.study.benchmark = ("sample",)
    if tmp_path is not None:
        config.data.cache = str(tmp_path / "datasets")
    return config


@pytest.fixture(scope="module")
def runtime():
    return build_runtime(small())


@pytest.fixture(scope="module", autouse=True)
def few_programs(runtime):
    """Most time goes into compiling: all agents of like settings share their decode slots, which pad to few sizes."""
    slots, coarse = {}, lambda count: next(size for size in (256, 1024) if size >= count)

    def shared(adapter_config, decoder, *rest):
        key = (str(adapter_config), decoder, *rest)
        if key not in slots:
            slots[key] = decode_slots.DecodeSlots(adapter_config, decoder, *rest)
        return slots[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sqa_jax.agent.loop.DecodeSlots", shared)
        patch.setattr("sqa_jax.evaluation.student.build_runtime", lambda config: runtime)
        patch.setattr(decode_slots, "padded_size", coarse)
        patch.setattr(decode_slots, "_WIDTHS", (256,))
        patch.setattr(decode_slots, "_EXTENT_MULTIPLE", 2048)
        yield


@pytest.fixture(scope="module")
def problems():
    return load_config_problems(small()).split("test")[:12]


def answered(config, runtime, problems, policy):
    tools = make_tools(config, load_config_problems(config))
    rows = sorted(Agent(config, runtime, tools)(policy, {}, runtime.student.params, problems), key=lambda r: r["index"])
    assert [row["index"] for row in rows] == list(range(len(problems)))
    return rows


def calls_of(row):
    return [turn["tool"] for turn in row["turns"] if "tool" in turn]


def test_a_batch_answers_as_each_question_alone(runtime, problems):
    """At different turns, in other slots, in chunks: the same decisions, likelihoods and costs."""
    thresholds = dict.fromkeys(("describe_image", "retrieve"), float("inf"))
    first = [row["turns"][0]["margins"] for row in answered(small(), runtime, problems, Constrained(thresholds))]
    thresholds = {name: float(np.median([margins[name] for margins in first])) for name in thresholds}
    together = answered(small(), runtime, problems, Constrained(thresholds))
    alone = answered(small(batch=1), runtime, problems[:4], Constrained(thresholds))
    for ours, theirs in zip(together, alone, strict=False):
        assert (
            calls_of(ours) == calls_of(theirs) and ours["answer"] == theirs["answer"] and ours["read"] == theirs["read"]
        )
        for a, b in zip(ours["turns"], theirs["turns"], strict=True):
            np.testing.assert_allclose(a.get("answers", []), b.get("answers", []), atol=2e-3)
    assert len({tuple(calls_of(row)) for row in together}) > 1


def test_never_calling_is_multiple_choice_scoring_of_the_same_prompt(runtime, problems):
    """The scores are those of `inference.likelihood` for the same ids."""
    from sqa_jax.inference.likelihood import LikelihoodScorer, MultipleChoice

    config = small()
    agent_ = Agent(config, runtime, make_tools(config, load_config_problems(config)))
    policy = Plan(lambda p: ())
    rows = {row["index"]: row for row in agent_(policy, {}, runtime.student.params, problems)}
    choices = [
        MultipleChoice(one.tokens, agent_.dialogue.encode_answers(p))
        for p, one in zip(problems, agent_.dialogue.encode_questions(problems), strict=True)
    ]
    scorer = LikelihoodScorer(config.adapter, runtime.decoder, runtime.mesh, 1024, 4)
    for index, log_probs in scorer({}, runtime.student.params, choices):
        sums = np.asarray([option.sum() for option in log_probs])
        np.testing.assert_allclose(rows[index]["turns"][0]["answers"], sums, atol=2e-3)


def test_plans_are_followed_and_results_are_in_the_context(runtime, problems):
    rows = answered(small(), runtime, problems, Plan(lambda p: ("describe_image", "retrieve")))
    never = answered(small(), runtime, problems, Plan(lambda p: ()))
    for row, bare, problem in zip(rows, never, problems, strict=True):
        assert calls_of(row) == ["describe_image", "retrieve"] == row["calls"]
        caption = problem.caption if problem.image else ""
        assert [t["result"] for t in row["turns"] if "tool" in t] == [caption, problem.lecture]
        assert row["read"] >= bare["read"] + len(problem.lecture.encode()) + len(
            caption.encode()
        )  # a tokenizer of bytes
        assert row["flops"] > bare["flops"]


def test_no_more_calls_than_allowed_and_none_twice(runtime, problems):
    rows = answered(small(most_calls=1), runtime, problems, Constrained({"describe_image": -1e9, "retrieve": -1e9}))
    assert all(len(row["calls"]) == 1 for row in rows)
    rows = answered(small(), runtime, problems, Constrained({"describe_image": -1e9, "retrieve": -1e9}))
    assert all(sorted(row["calls"]) == ["describe_image", "retrieve"] for row in rows)


def test_a_simulated_policy_is_the_policy_itself(runtime, problems):
    """What calibration computes from all orders of calls is what an episode does."""
    records = {p.pid: [] for p in problems}
    for order in explore.orders(["describe_image", "retrieve"], 2):
        rows = answered(small(), runtime, problems, Plan(lambda p, order=order: order, score=True))
        for p, row in zip(problems, rows, strict=True):
            records[p.pid].append(row)
    states = {pid: explore.states_of(rows) for pid, rows in records.items()}
    assert all(set(found) == {(), ("describe_image",), ("retrieve",), ("describe_image", "retrieve"), ("retrieve", "describe_image")} for found in states.values())  # fmt: skip
    chosen = explore.calibrate(problems, states, ["describe_image", "retrieve"])
    margins = sorted(found[()].margins["retrieve"] for found in states.values())
    for thresholds in (chosen.thresholds, {"describe_image": float("inf"), "retrieve": (margins[5] + margins[6]) / 2}):
        rows = answered(small(), runtime, problems, Constrained(thresholds))
        for p, row in zip(problems, rows, strict=True):
            assert tuple(row["calls"]) == explore.follow(states[p.pid], thresholds)
            assert row["answer"] == states[p.pid][tuple(row["calls"])].answer
    right = [states[p.pid][explore.follow(states[p.pid], chosen.thresholds)].answer == p.answer for p in problems]
    assert chosen.accuracy == pytest.approx(np.mean(right)) and chosen.accuracy >= chosen.never


def test_operations_are_counted_token_by_token(runtime, problems):
    """A brute-force count of one episode: each token attends to all before it, and to itself."""
    config = small()
    agent_ = Agent(config, runtime, make_tools(config, load_config_problems(config)))
    policy = Plan(lambda p: ("retrieve",))
    (row,) = agent_(policy, {}, runtime.student.params, problems[:1])
    (opening,) = agent_.dialogue.encode_questions(problems[:1])
    call = agent_.dialogue.encode_call(agent_.tools["retrieve"].call_for(problems[0]))
    result, _ = agent_.dialogue.encode_result(problems[0].lecture, 10_000)
    trunk, options = (
        len(opening.tokens) + len(call) + len(result),
        [len(o) for o in agent_.dialogue.encode_answers(problems[0])],
    )
    attended = list(range(1, trunk + 1)) + [trunk + k for size in options for k in range(1, size)]
    assert row["read"] == trunk and row["branched"] == len(attended) - trunk and row["scored"] == sum(options)
    expected = forward_flops(runtime.student.config, len(attended), float(np.mean(attended)), sum(options))
    assert row["flops"] == pytest.approx(expected, rel=1e-9)


def test_a_third_tool_needs_no_other_file(runtime, problems):
    config = small(tools=("describe_image", "retrieve", CALCULATOR), most_calls=3)
    rows = answered(
        config, runtime, problems[:3], Constrained(dict.fromkeys(("describe_image", "retrieve", "calculate"), -1e9))
    )
    assert all(len(calls_of(row)) == 3 and "calculate" in calls_of(row) for row in rows)


# Students that generate a given script.

SCRIPTS = {
    "calls for ever": (["describe_image()"] * 9, {"calls": 1, "status": "forced", "error": "cannot be called again"}),
    "calls what is not there": (
        ["search(x)"] * 9,
        {"calls": 0, "status": "forced", "error": "there is no tool search"},
    ),
    "says nothing": ([""] * 9, {"calls": 0, "status": "forced", "error": "neither a call nor an answer"}),
    "answers before being asked": (["The answer is {last}."], {"calls": 0, "status": "ok"}),
    "answers for the tool, too": (
        ["Action: describe_image() Result: a cat Answer: The answer is {first}.", "Answer: The answer is {last}."],
        {"calls": 1, "status": "ok"},
    ),
    "corrects a mistake": (
        ["hm", "retrieve(x)", "The answer is {last}."],
        {"calls": 1, "status": "ok", "error": "neither"},
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_question_is_answered_whatever_a_student_generates(runtime, problems, name, monkeypatch):
    script, expected = SCRIPTS[name]
    config = small(max_new_tokens=100)
    agent_ = Agent(config, runtime, make_tools(config, load_config_problems(config)))
    policy = Free()
    turn_of = {}

    def decode(first_tokens, pause_at):
        texts, slots = {}, agent_.slots
        for slot in first_tokens:
            first, *_, last = asked[question_of[slot]].choices
            turn = turn_of[slot] = turn_of.get(slot, -1) + 1
            text = script[min(turn, len(script) - 1)].format(first=first, last=last)
            texts[slot] = runtime.student.tokenizer(text, add_special_tokens=False)["input_ids"]
            state = slots._slots[slot]
            slots._slots[slot] = state._replace(length=state.length + 1 + len(texts[slot]))
        return texts

    asked = problems[:3]
    question_of, numbers = {}, iter(range(len(asked)))
    reset = agent_.slots.reset
    monkeypatch.setattr(agent_.slots, "decode", decode)
    monkeypatch.setattr(agent_.slots, "reset", lambda slot: (question_of.__setitem__(slot, next(numbers)), reset(slot)))
    found = sorted(agent_(policy, {}, runtime.student.params, asked), key=lambda row: row["index"])
    for row, problem in zip(found, asked, strict=True):
        assert len(row["calls"]) == expected["calls"] and row["status"] == expected["status"]
        if expected["status"] == "ok":
            assert row["answer"] == len(problem.choices) - 1
        if "error" in expected:
            assert expected["error"] in " ".join(row["mistakes"])
        else:
            assert not row["mistakes"]


def test_free_text_ends(runtime, problems):
    rows = answered(small(), runtime, problems, Free())
    assert all(
        row["written"] > 0 and 0 <= row["answer"] < len(p.choices) for row, p in zip(rows, problems, strict=True)
    )


def test_results_too_long_for_the_context_are_shortened_and_counted(runtime, problems):
    config = small(context=760)
    long = [dataclasses.replace(p, lecture="x" * 5000) for p in problems[:3]]
    rows = answered(config, runtime, long, Plan(lambda p: ("retrieve", "describe_image")))
    for row in rows:
        assert row["shortened"]["retrieve"] > 3000 and row["read"] <= 760
        assert calls_of(row) == ["retrieve"]  # no room for more


def test_failing_tools_leave_a_status(runtime, problems, monkeypatch):
    tools = make_tools(small(), load_config_problems(small()))

    def broken(requests):
        raise RuntimeError("no network")

    tools["retrieve"] = dataclasses.replace(tools["retrieve"], run=broken)
    agent_, policy = Agent(small(), runtime, tools), Plan(lambda p: ("retrieve",))
    for row in agent_(policy, {}, runtime.student.params, problems[:3]):
        assert row["status"] == "tool failed" and "no network" in row["turns"][0]["result"]


@pytest.mark.parametrize("changes", [{"context": 60}, {"context": 10**6}])
def test_contexts_that_cannot_be(runtime, problems, changes):
    with pytest.raises(UserError, match="config.agent.context"):
        answered(small(**changes), runtime, problems, Plan(lambda p: ()))


def test_decisions_by_threshold():
    assert decide({"a": 1.0, "b": 3.0}, {"a": 0.0, "b": 2.5}) == "a"
    assert decide({"a": -1.0}, {"a": 0.0}) is None and decide({}, {}) is None


def test_random_plans_keep_their_rates(problems):
    tools_of = random_plan({"a": 0.25, "b": 1.0}, seed=0)
    plans = [tools_of(dataclasses.replace(problems[0], pid=str(k))) for k in range(2000)]
    assert np.mean(["a" in plan for plan in plans]) == pytest.approx(0.25, abs=0.03)
    assert all("b" in plan for plan in plans) and tools_of(problems[0]) == tools_of(problems[0])


def test_useful_calls_by_a_teacher_s_replies(problems):
    problem = dataclasses.replace(problems[0], image=None, lecture="L", answer=0)

    def reply(setting, answer):
        return TeacherRecord(problem.pid, "m", setting, "", answer)

    assert calls_by_records(problem, []) == ["retrieve"]
    assert calls_by_records(problem, [reply("QTCH", 1), reply("QTCHL", 0)]) == ["retrieve"]
    assert calls_by_records(problem, [reply("QTCH", 0), reply("QTCHL", 0)]) == []
    assert calls_by_records(problem, [reply("QTCH", 1), reply("QTCHL", 1)]) == []


def test_the_pareto_front():
    systems = [{"policy": n, "price_of_1000": p, "columns": {"AVG": a}} for n, p, a in [("a", 1, 40), ("b", 2, 40), ("c", 3, 50)]]  # fmt: skip
    models = [{"system": "m", "price_of_1000": 9, "columns": {"AVG": 90}}, {"system": "?", "price_of_1000": None, "columns": {"AVG": 99}}]  # fmt: skip
    assert pareto(systems, models) == ["a", "c", "m"]


def test_policies_report_traces_training_and_the_trained_student(tmp_path):
    """A run of all policies, one stopped half-way, a training on its traces, and a run of the trained student."""
    config = small(tmp_path)
    results = agent(config, str(tmp_path / "agent"), "test")
    names = [row["policy"] for row in results["systems"]]
    assert set(names) == {"never", "always", "random", "oracle", "constrained", "free"}
    of = {row["policy"]: row for row in results["systems"]}
    assert of["oracle"]["columns"]["AVG"] >= max(of["never"]["columns"]["AVG"], of["constrained"]["columns"]["AVG"])
    assert of["never"]["calls"] == {} and of["always"]["calls"] == {"describe_image": 1.0, "retrieve": 1.0}
    folder = tmp_path / "agent" / "test"
    page = (folder / "report.md").read_text()
    assert "H1" in page and (folder / "plots" / "accuracy_against_cost.svg").read_text().startswith("<svg")
    assert json.loads((folder / "results.json").read_text())["pareto"]
    pids = [p.pid for p in load_config_problems(config).split("test")[:6]]
    for name in names:
        assert [row["pid"] for row in read_jsonl(folder / name / "predictions.jsonl", "")] == pids
    assert "constrained: question" in show(config, str(tmp_path / "agent"), "test", pids[3])
    with pytest.raises(UserError, match="no such question"):
        show(config, str(tmp_path / "agent"), "test", "nobody")

    # A killed run leaves a partial file; the questions in it are not asked again.
    whole = (folder / "always" / "predictions.jsonl").read_text()
    metrics = json.loads((folder / "always" / "metrics.json").read_text())
    partial = folder / "always" / f"partial-{metrics['fingerprint'][:16]}.jsonl"
    partial.write_text("".join(whole.splitlines(True)[:4]) + '{"pid": "half')
    (folder / "always" / "predictions.jsonl").unlink()
    (folder / "always" / "metrics.json").unlink()
    agent(config, str(tmp_path / "agent"), "test")
    rows = [json.loads(line) for line in (folder / "always" / "predictions.jsonl").read_text().splitlines()]
    assert [(r["pid"], r["answer"], r["calls"]) for r in rows] == [
        (r["pid"], r["answer"], r["calls"]) for r in map(json.loads, whole.splitlines())
    ]

    config.data.train_limit = 10
    file = write_traces(config, str(tmp_path / "agent"))
    learned = small(tmp_path)
    learned.data.update({"traces": (str(file),), "train_limit": 10})
    learned.train.update({"row_length": 1536, "batch_rows": 1, "steps": 2, "eval_every": 0, "save_every": 0})
    learned.eval.val_limit, learned.eval.row_length, learned.eval.batch_rows = 2, 1024, 1
    train(learned, str(tmp_path / "lora"))
    trained = small(policies=("never", "constrained"), calibrate=0, adapter=str(tmp_path / "lora"))
    found = agent(config_with_adapter(trained), str(tmp_path / "trained"), "test")
    assert [row["policy"] for row in found["systems"]] == ["never", "constrained"]
    assert found["adapter"] == str(tmp_path / "lora")


def test_training_rows_are_the_ids_of_the_dialogue(runtime, tmp_path):
    """Training prompt == inference prompt, turn by turn."""
    config = small(tmp_path)
    config.data.train_limit, config.agent.evidence = 6, "records"
    config.data.traces = (str(write_traces(config, str(tmp_path / "agent"))),)
    problems = load_config_problems(config)
    dataset, _ = build_or_reuse(config, runtime.student.tokenizer, problems)
    tokens, prompt_lengths, _, pids = dataset.columns()
    agent_ = Agent(config, runtime, make_tools(config, problems))
    known = problems.all()
    calls = 0
    for pid in dict.fromkeys(pids):
        rows = [(t.tolist(), int(n)) for t, n, p in zip(tokens, prompt_lengths, pids, strict=True) if p == pid]
        (opening,) = agent_.dialogue.encode_questions([known[pid]])
        said = list(opening.tokens)
        assert len(rows) <= 3
        for row, length in rows[:-1]:
            assert row[:length] == said and row[-1] == agent_.dialogue.call_end_token()
            call = agent_.dialogue.parse(runtime.student.tokenizer.decode(row[length:-1]), known[pid]).call
            assert row[length:-1] == agent_.dialogue.encode_call(call)
            text = known[pid].caption if call.tool == "describe_image" else known[pid].lecture
            said += row[length:-1] + agent_.dialogue.encode_result(text, 10_000)[0]
            calls += 1
        row, length = rows[-1]
        assert row[:length] == said
        assert row[length:] == [
            *agent_.dialogue.encode_answers(known[pid])[known[pid].answer],
            runtime.student.tokenizer.eos_token_id,
        ]
    assert calls > 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agent.policies": ("sometimes",)}, "config.agent.policies names 'sometimes'"),
        ({"agent.policies": ("only:search",)}, "config.agent.policies names 'only:search'"),
        ({"agent.evidence": "stars"}, "config.agent.evidence is 'stars'"),
        ({"agent.chip": ("v99", 0.4)}, "config.agent.chip names 'v99'"),
        ({"agent.adapter": "nowhere"}, "config.agent.adapter: nowhere has no config.json"),
    ],
)
def test_settings_that_cannot_be(tmp_path, changes, message):
    config = small(tmp_path, policies=("never",))
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        agent(config_with_adapter(config), str(tmp_path / "agent"), "test")


def test_traces_that_cannot_be_learned(tmp_path, runtime):
    config, problems = small(tmp_path), load_config_problems(small())
    for text, message in (
        (None, "not found; python -m sqa_jax.agent --traces makes it"),
        ('{"pid": "x"}', "trace 1 lacks pid, tools or turns"),
        ('{"pid": "nobody", "tools": [], "turns": []}', "no trace of a training question"),
    ):
        file = tmp_path / f"{len(message)}.jsonl"
        config.data.traces = (str(file),)
        if text:
            file.write_text(text + "\n")
        with pytest.raises(UserError, match=message):
            build_or_reuse(config, runtime.student.tokenizer, problems)


def test_the_command_says_what_it_wrote_and_what_is_wrong(tmp_path):
    command = ["--config", "configs/agent.py", "--config.student.path=random:tiny"]
    flags = ["--config.agent.context=1400", "--config.recipe.max_prompt=700", "--config.eval.limit=3", "--config.agent.policies=('never',)"]  # fmt: skip
    done = run_verb("agent", *command, *flags, "--split=val", "--workdir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "never" in done.stdout and (tmp_path / "val" / "never" / "metrics.json").exists()
    done = run_verb("agent", *command, "--show=1")
    assert done.returncode == 2 and "--workdir is needed" in done.stderr
