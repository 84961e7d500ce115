"""Likelihood scoring and generation against PyTorch, row by row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from sqa_jax.adapters import adapter as adapters
from sqa_jax.config import default
from sqa_jax.errors import UserError
from sqa_jax.inference.generate import Generator, trim
from sqa_jax.inference.likelihood import Choice, LikelihoodScorer, choose, layout
from sqa_jax.students.config import DecoderConfig
from sqa_jax.students.decoder import Decoder
from sqa_jax.students.weights import random_params, save_safetensors

CONFIG = DecoderConfig(64, 32, 64, 2, 4, 2, 8, tie_embeddings=True, max_positions=256)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def base():
    params = random_params(CONFIG, 0)
    return jax.tree.map(lambda a: a + 0.05 * jax.random.normal(jax.random.key(1), a.shape), params)


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("m") / "model"
    save_safetensors(base, CONFIG, directory)
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


def adapter_settings(*methods):
    config = default().adapter
    config.methods = methods
    config.lora.rank, config.prefix.length, config.prefix.reparametrize, config.prompt.length = 4, 3, False, 4
    return config


def ids(*sizes):
    return [RNG.integers(1, 64, n).tolist() for n in sizes]


CHOICES = [
    Choice(ids(9)[0], [[5, 6, 7], [5, 6, 9, 2], [5, 8]]),
    Choice(ids(4)[0], [[3], [4]]),
    Choice(ids(30)[0], ids(1, 2, 3, 4, 5)),
    Choice(ids(12)[0], [[1, 2, 3], [1, 2, 3, 4]]),  # one is the beginning of the other
    Choice(ids(7)[0], [[9, 9], [9, 9]]),  # the same twice
]


def reference(model, prompt, option):
    """Log-probabilities of an option's tokens, in PyTorch, with nothing shared."""
    with torch.no_grad():
        logits = model(torch.tensor([list(prompt) + list(option)])).logits[0]
    return torch.log_softmax(logits, -1)[range(len(prompt) - 1, len(prompt) + len(option) - 1), option].numpy()


def test_options_score_as_if_each_were_read_alone(base, model):
    scorer = LikelihoodScorer(adapter_settings("lora"), Decoder(CONFIG), 48, 2)
    found = dict(scorer({}, base, CHOICES))
    assert sorted(found) == list(range(len(CHOICES)))
    for index, log_probs in found.items():
        whole = [reference(model, CHOICES[index].prompt, option) for option in CHOICES[index].options]
        for ours, theirs in zip(log_probs, whole, strict=True):
            np.testing.assert_allclose(ours, theirs[len(theirs) - len(ours) :], atol=1e-4)
        # Leaving out what is shared changes no difference between options.
        sums, expected = [p.sum() for p in log_probs], [p.sum() for p in whole]
        np.testing.assert_allclose(np.subtract(sums, sums[0]), np.subtract(expected, expected[0]), atol=1e-4)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_soft_prompts_and_prefixes_are_seen(base, method):
    """Scored in one tree and scored one option a row, with an adapter in front, agree."""
    settings_ = adapter_settings(method)
    tree = adapters.init_adapter(settings_, CONFIG, base, 0)
    scorer = LikelihoodScorer(settings_, Decoder(CONFIG), 48, 2)
    together = dict(scorer(tree, base, CHOICES))
    for index, choice in enumerate(CHOICES[:3]):
        for k, option in enumerate(choice.options):
            (_, (alone, _)) = next(
                scorer(tree, base, [Choice(list(choice.prompt) + option[:-1], [option[-1:], option[-1:]])])
            )
            np.testing.assert_allclose(together[index][k][-1], alone[0], atol=1e-4)
    bare = dict(scorer({}, base, CHOICES))
    assert np.abs(bare[2][0] - together[2][0]).max() > 1e-4


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    options=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=5), min_size=2, max_size=5),
    virtual=st.integers(0, 3),
)
def test_layout_reads_each_option_back(prompt, options, virtual):
    """Walking a branch of the tree gives the prompt and the option; every scored token has its predecessor."""
    tree = layout(Choice(prompt, options), virtual)
    for number, option in enumerate(options):
        visible = (tree.branches == 0) | (tree.branches == number + 1)
        read = tree.tokens[visible].tolist()
        assert (read + [option[-1]])[virtual:] == prompt + option
        np.testing.assert_array_equal(tree.positions[visible], np.arange(visible.sum()))
        own = tree.option == number
        assert tree.targets[own].tolist() == option[len(option) - own.sum() :] and own.any()
        np.testing.assert_array_equal(
            tree.positions[tree.predicting[own]] + 1,
            virtual + len(prompt) + len(option) - own.sum() + np.arange(own.sum()),
        )


def test_choose():
    scores = [np.array([-1.0, -1.0, -1.0]), np.array([-2.5])]
    assert choose(scores, "none") == 1 and choose(scores, "length") == 0


def greedy(model, prompt, count, eos):
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
        )
    return trim(out[0, len(prompt) :].numpy(), eos)


def test_greedy_generation_equals_reference(base, model):
    prompts = ids(3, 17, 70, 9, 64)
    # An end token that really comes up, so that rows end at different times.
    free = greedy(model, prompts[0], 12, [0])
    eos = (free[5], 0)
    generator = Generator(adapter_settings("lora"), Decoder(CONFIG), eos, 12, batch=3)
    found = dict(generator({}, base, prompts))
    assert found == {k: greedy(model, prompt, 12, list(eos)) for k, prompt in enumerate(prompts)}
    assert len(found[0]) <= 5


@pytest.mark.parametrize("methods", [("prefix",), ("prompt",), ("prefix", "prompt", "lora")])
def test_generation_with_adapters_equals_rereading_everything(base, methods):
    settings_ = adapter_settings(*methods)
    tree = jax.tree.map(
        lambda a: a + 0.1 * jax.random.normal(jax.random.key(2), a.shape),
        adapters.init_adapter(settings_, CONFIG, base, 0),
    )
    virtual = adapters.virtual_tokens(settings_)
    prompts = ids(5, 11)
    found = dict(Generator(settings_, Decoder(CONFIG), (63,), 6, batch=2)(tree, base, prompts))

    @jax.jit
    def next_token(tokens, length):
        positions = jnp.arange(32)[None]
        out, _ = Decoder(CONFIG).apply(
            {"params": base},
            tokens,
            positions,
            (positions < length).astype(int),
            adapters.activate(settings_, tree, CONFIG),
            method="logits",
        )
        return jnp.argmax(out[0, length - 1])

    for k, prompt in enumerate(prompts):
        text = [0] * virtual + prompt
        for _ in range(6):
            token = int(next_token(jnp.asarray([text + [0] * (32 - len(text))]), len(text)))
            if token == 63:
                break
            text.append(token)
        assert found[k] == text[virtual + len(prompt) :]


def test_sampling_is_a_function_of_seed_and_question(base):
    prompts = ids(5, 6, 7, 8)

    def sample(seed, batch):
        return dict(
            Generator(adapter_settings("lora"), Decoder(CONFIG), (0,), 8, batch, temperature=1.0, seed=seed)(
                {}, base, prompts
            )
        )

    assert sample(0, 2) == sample(0, 4), "how questions are batched must not change what is sampled"
    assert sample(0, 2) != sample(1, 2)


def test_too_long_is_refused(base):
    with pytest.raises(UserError, match="256 positions"):
        list(Generator(adapter_settings("lora"), Decoder(CONFIG), (0,), 200, 1)({}, base, ids(80)))
    with pytest.raises(UserError, match="256 positions"):
        list(
            LikelihoodScorer(adapter_settings("lora"), Decoder(CONFIG), 48, 1)(
                {}, base, [Choice(ids(300)[0], [[1], [2]])]
            )
        )


def test_reasoning_then_likelihood_is_generation_followed_by_scoring(tmp_path):
    """The student's own text up to its answer sentence, then the likeliest whole target: against a loop by hand."""
    from sqa_jax.data.dataset import encoder_for, load_config_problems
    from sqa_jax.data.prompts import Format
    from sqa_jax.inference.answer import answers
    from sqa_jax.runtime import start

    config = default()
    config.student.path, config.recipe.format, config.recipe.max_prompt = "random:tiny", "QCM-EA", 700
    config.eval.temperature = 3.0  # greedy, random weights write nothing that can be seen
    config.eval.max_new_tokens, config.eval.batch_questions, config.eval.batch_rows = 12, 2, 8
    runtime = start(config)
    problems, base = load_config_problems(config).split("test")[:10], runtime.student.params
    found = {one.index: (one.answer, one.text) for one in answers(config, runtime)({}, base, problems)}
    assert sorted(found) == list(range(10))
    encoder = encoder_for(config, runtime.student.tokenizer)
    forward = jax.jit(lambda tokens, places, mask: runtime.decoder.apply({"params": base}, tokens, places, mask)[0])
    reasons = []
    for index, problem in enumerate(problems):
        answer, text = found[index]
        reason, _, letter = text.rpartition("The answer is ")
        reason = reason.rstrip("\n")
        prompt = encoder.encode([problem], [Format("QCM", "EA")])[0].tokens
        scores = []
        for option in "ABCDEFGHIJ"[: len(problem.choices)]:
            # A reason of blanks alone leaves the answer sentence by itself.
            whole = f"{reason}\nThe answer is {option}." if reason else f"The answer is {option}."
            (target,) = encoder.plain([whole])
            row = np.zeros((1, 1024), np.int32)
            row[0, : len(prompt) + len(target)] = prompt + target
            hidden = forward(
                row, np.arange(1024)[None], (np.arange(1024) < len(prompt) + len(target))[None].astype(int)
            )
            logits = runtime.decoder.apply({"params": base}, hidden, method="unembed")[0]
            log_probs = jax.nn.log_softmax(logits, -1)
            scores.append(sum(float(log_probs[len(prompt) + k - 1, t]) for k, t in enumerate(target)))
        assert scores[answer] >= max(scores) - 1e-3
        assert letter == f"{'ABCDEFGHIJ'[answer]}."
        reasons.append(reason)
    assert any(reasons)


@pytest.mark.parametrize(
    ("fmt", "mode", "words"),
    [
        ("QCM-EA", "likelihood", "reasons before it answers; use --config.eval.mode=reason"),
        ("QCM-AE", "reason", "answers first; use --config.eval.mode=likelihood"),
        ("QCM-A", "guess", "choose one of auto, likelihood, reason, generate"),
    ],
)
def test_a_way_of_answering_that_the_format_does_not_allow(fmt, mode, words):
    from sqa_jax.inference.answer import way

    config = default()
    config.recipe.format, config.eval.mode = fmt, mode
    with pytest.raises(UserError, match=words):
        way(config)
