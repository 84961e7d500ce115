"""Multiple-choice scoring and generation against PyTorch, row by row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqa_jax import adapters
from sqa_jax.checkpoints.sources import SafetensorsSource
from sqa_jax.checkpoints.weights import read_params
from sqa_jax.config import default
from sqa_jax.errors import UserError
from sqa_jax.inference.batching import first_fit
from sqa_jax.inference.generate import Generator, trim
from sqa_jax.inference.likelihood import LikelihoodScorer, MultipleChoice, branched_sequence, choose
from sqa_jax.models.decoder import Decoder
from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.models.soft_tokens import with_soft_tokens
from sqa_jax.parallel.mesh import make_mesh
from sqa_jax.parallel.rules import shardings
from tests.support.torch_models import torch_model, write_checkpoint

CONFIG = DecoderConfig(64, 32, 64, 2, 4, 2, 8, tie_embeddings=True, max_positions=256)
MESH = make_mesh(default().mesh, jax.devices()[:1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Llama of `CONFIG` whose weights are so large that greedy texts do not repeat one token."""
    return write_checkpoint(
        tmp_path_factory.mktemp("model"), "llama", vocab_size=64, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=256, rms_norm_eps=CONFIG.norm_epsilon,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(checkpoint):
    return read_params(SafetensorsSource(checkpoint), CONFIG)


def adapter_settings(*methods):
    config = default().adapter
    config.methods = methods
    config.lora.rank, config.prefix.length, config.prefix.reparametrize, config.prompt.length = 4, 3, False, 4
    return config


def ids(seed, *sizes):
    """Random sequences of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 64, n).tolist() for n in sizes]


PROMPTS = ids(0, 9, 4, 30, 12, 7)
QUESTIONS = [
    MultipleChoice(PROMPTS[0], [[5, 6, 7], [5, 6, 9, 2], [5, 8]]),
    MultipleChoice(PROMPTS[1], [[3], [4]]),
    MultipleChoice(PROMPTS[2], ids(1, 1, 2, 3, 4, 5)),
    MultipleChoice(PROMPTS[3], [[1, 2, 3], [1, 2, 3, 4]]),  # one is a prefix of the other
    MultipleChoice(PROMPTS[4], [[9, 9], [9, 9]]),  # the same twice
]


def option_log_probs(checkpoint):
    """Log-probabilities of every option's tokens, in PyTorch, each option computed alone."""
    import torch

    model, arrays = torch_model(checkpoint), {}
    for index, question in enumerate(QUESTIONS):
        for number, option in enumerate(question.options):
            with torch.no_grad():
                logits = model(torch.tensor([list(question.prompt) + list(option)])).logits[0]
            predicting = range(len(question.prompt) - 1, len(question.prompt) + len(option) - 1)
            arrays[f"{index}.{number}"] = torch.log_softmax(logits, -1)[predicting, option].numpy()
    return arrays


def test_options_score_as_if_each_were_computed_alone(base, checkpoint, reference):
    expected = reference("inference/option_log_probs", lambda: option_log_probs(checkpoint))
    scorer = LikelihoodScorer(adapter_settings("lora"), Decoder(CONFIG), MESH, 48, 2)
    found = dict(scorer({}, base, QUESTIONS))
    assert sorted(found) == list(range(len(QUESTIONS)))
    for index, log_probs in found.items():
        whole = [expected[f"{index}.{number}"] for number in range(len(QUESTIONS[index].options))]
        for ours, theirs in zip(log_probs, whole, strict=True):
            np.testing.assert_allclose(ours, theirs[len(theirs) - len(ours) :], atol=1e-4)
        # Leaving out what is shared changes no difference between options.
        sums, whole_sums = [p.sum() for p in log_probs], [p.sum() for p in whole]
        np.testing.assert_allclose(np.subtract(sums, sums[0]), np.subtract(whole_sums, whole_sums[0]), atol=1e-4)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_soft_prompts_and_prefixes_are_attended_to(base, method):
    """Scores in one branched sequence and of one option a row, with an adapter, agree."""
    settings_ = adapter_settings(method)
    tree = adapters.init_adapter(settings_, CONFIG, base, 0)
    scorer = LikelihoodScorer(settings_, Decoder(CONFIG), MESH, 48, 2)
    soft = adapters.soft_prompt_tokens(settings_).count
    choices = [choice._replace(prompt=with_soft_tokens(choice.prompt, soft)) for choice in QUESTIONS]
    together = dict(scorer(tree, base, choices))
    shared = [choice._replace(prompt=with_soft_tokens([7, 8, 9] * 6 + choice.prompt, soft)) for choice in QUESTIONS[:3]]
    alone = [option for choice in shared for _, option in scorer(tree, base, [choice])]
    for ours, theirs in zip([p for _, p in sorted(scorer(tree, base, shared))], alone, strict=True):
        for together_, alone_ in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(together_, alone_, atol=1e-4)
    for index, choice in enumerate(choices[:3]):
        for k, option in enumerate(choice.options):
            (_, (alone, _)) = next(
                scorer(tree, base, [MultipleChoice(list(choice.prompt) + option[:-1], [option[-1:], option[-1:]])])
            )
            np.testing.assert_allclose(together[index][k][-1], alone[0], atol=1e-4)
    bare = dict(scorer({}, base, QUESTIONS))
    assert np.abs(bare[2][0] - together[2][0]).max() > 1e-4


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    options=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=5), min_size=2, max_size=5),
)
def test_branched_sequence_holds_every_option(prompt, options):
    """A branch with its trunk is the prompt and the option; every scored token has its predecessor."""
    sequence = branched_sequence(MultipleChoice(prompt, options))
    for number, option in enumerate(options):
        visible = (sequence.branches == 0) | (sequence.branches == number + 1)
        path = sequence.tokens[visible].tolist()
        assert path + [option[-1]] == prompt + option
        np.testing.assert_array_equal(sequence.positions[visible], np.arange(visible.sum()))
        scored = sequence.target_options == number
        assert sequence.targets[scored].tolist() == option[len(option) - scored.sum() :] and scored.any()
        np.testing.assert_array_equal(
            sequence.positions[sequence.target_positions[scored]] + 1,
            len(prompt) + len(option) - scored.sum() + np.arange(scored.sum()),
        )


def test_choose():
    scores = [np.array([-1.0, -1.0, -1.0]), np.array([-2.5])]
    assert choose(scores, "none") == 1 and choose(scores, "length") == 0


GREEDY = ids(2, 3, 17, 70, 9, 64)


def greedy_texts(checkpoint):
    """What PyTorch generates for `GREEDY`: the first text without end tokens, then all up to end tokens that come up."""
    import torch

    model = torch_model(checkpoint)

    def generate(prompt, eos):
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=12,
            do_sample=False, eos_token_id=eos, pad_token_id=0,
        )  # fmt: skip
        return np.asarray(trim(out[0, len(prompt) :].numpy(), eos), np.int32)

    free = generate(GREEDY[0], [0])
    eos = [int(free[5]), 0]
    return {"eos": np.asarray(eos)} | {str(k): generate(prompt, eos) for k, prompt in enumerate(GREEDY)}


def test_greedy_generation_equals_reference(base, checkpoint, reference):
    expected = reference("inference/greedy_texts", lambda: greedy_texts(checkpoint))
    eos = tuple(expected["eos"].tolist())
    generator = Generator(adapter_settings("lora"), Decoder(CONFIG), MESH, eos, 12, num_slots=3)
    found = dict(generator({}, base, GREEDY))
    assert found == {k: expected[str(k)].tolist() for k in range(len(GREEDY))}
    assert 0 < len(found[0]) <= 5 and len({len(text) for text in found.values()}) > 1, "texts end at different times"


@pytest.fixture(scope="module")
def adapted(base):
    """(settings, adapter) with some of everything."""
    settings_ = adapter_settings("prefix", "prompt", "lora")
    tree = adapters.init_adapter(settings_, CONFIG, base, 0)
    return settings_, jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(2), a.shape), tree)


def recomputed(settings_, tree, base, prompts, eos, count):
    """Greedy texts, each alone, recomputing the whole sequence for each token."""

    @jax.jit
    def next_token(tokens, length):
        positions = jnp.arange(192)[None]
        out, _ = Decoder(CONFIG).apply(
            {"params": base},
            tokens,
            positions,
            (positions < length).astype(int),
            adapters.adapter_inputs(settings_, tree, CONFIG),
            method="logits",
        )
        return jnp.argmax(out[0, length - 1])

    texts = {}
    for k, prompt in enumerate(prompts):
        texts[k] = []
        while len(texts[k]) < count:
            text = prompt + texts[k]
            token = int(next_token(jnp.asarray([text + [0] * (192 - len(text))]), len(text)))
            if token in eos:
                break
            texts[k].append(token)
    return texts


def trimmed(texts, eos):
    return {k: trim(np.asarray(text), eos) for k, text in texts.items()}


# Packed rows hold several prompts, and slots are refilled; one text crosses the cache's first 128 positions, others start
# after them.
MIXED = ids(3, 5, 11, 118, 3, 140, 7, 21, 60, 9, 33)
SHARED = [
    [7, 8, 9] * 6 + prompt for prompt in ids(4, 5, 11, 90, 1, 21)
]  # with a shared prefix, which is prefilled once


@pytest.mark.parametrize(
    ("methods", "slots"), [((), (4,)), (("prefix",), (4,)), (("prompt",), (4,)), (("prefix", "prompt", "lora"), (1, 4))]
)
def test_continuous_batching_equals_recomputing_everything(base, adapted, methods, slots):
    settings_, tree = adapter_settings(*methods), {name: adapted[1][name] for name in methods}
    soft = adapters.soft_prompt_tokens(settings_).count
    mixed, shared = ([with_soft_tokens(prompt, soft) for prompt in prompts] for prompts in (MIXED, SHARED))
    free = recomputed(settings_, tree, base, mixed + shared, (), 10)
    # End tokens by which some texts end at once, some later, and some not at all.
    pairs = ((first[0], second[4]) for first in free.values() for second in free.values())
    eos = next(pair for pair in pairs if {0, 4, 10} <= set(map(len, trimmed(free, pair).values())))
    expected = trimmed(free, eos)
    for count in slots:
        generator = Generator(settings_, Decoder(CONFIG), MESH, eos, 10, count)
        assert dict(generator(tree, base, mixed + shared)) == expected
    alone = dict(generator(tree, base, shared))
    assert alone == {k: expected[len(MIXED) + k] for k in range(len(SHARED))}


def test_finished_slots_are_refilled_while_others_go_on(base):
    """One long text beside many that end at once: the others all go through the other slot before it ends."""
    settings_ = adapter_settings("lora")
    short, long = ids(5, 6) * 7, ids(6, *[40] * 8)
    eos = {text[0] for text in recomputed(settings_, {}, base, short[:1], (), 1).values()}
    free = recomputed(settings_, {}, base, long, eos, 20)
    prompts = [long[next(k for k, text in free.items() if len(text) == 20)], *short]
    order = [
        index
        for index, _ in Generator(settings_, Decoder(CONFIG), MESH, tuple(eos), 20, num_slots=2)({}, base, prompts)
    ]
    assert sorted(order) == list(range(8)) and order.index(0) >= 6  # the last of the others ends in the same call


def test_mesh_changes_nothing(base, adapted):
    """Slots sharded over data and fsdp, heads and weights over tensor: texts and likelihoods are those of one device."""
    settings_, tree = adapted
    config = default().mesh
    config.data, config.fsdp, config.tensor = 2, 2, 2
    mesh = make_mesh(config, jax.devices()[:8])
    placed = [jax.device_put(t, shardings(t, mesh)) for t in (tree, base)]

    def both(make, *inputs):
        return [dict(make(at)(*trees, *inputs)) for at, trees in ((MESH, (tree, base)), (mesh, placed))]

    one, eight = both(lambda at: Generator(settings_, Decoder(CONFIG), at, (63,), 8, num_slots=6), SHARED * 2)
    assert one == eight
    one, eight = both(lambda at: LikelihoodScorer(settings_, Decoder(CONFIG), at, 48, 3), QUESTIONS)
    for index, options in one.items():
        for ours, theirs in zip(options, eight[index], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_decode_loop_lowered_from_shapes(base, adapted):
    """Lowered without arrays; the cache is donated, not copied."""
    settings_, tree = adapted
    shapes = jax.eval_shape(lambda: (tree, base))
    generator = Generator(settings_, Decoder(CONFIG), MESH, (63,), 8, num_slots=4)
    memory = generator.lower_decode(*shapes, prompt_length=100).compile().memory_analysis()
    cache = 4 * CONFIG.num_layers * 2 * 4 * 128 * CONFIG.num_kv_heads * CONFIG.head_dim
    assert memory.alias_size_in_bytes >= cache > memory.temp_size_in_bytes


@settings(max_examples=100, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), max_size=40),
    length=st.integers(40, 90),
    max_count=st.integers(5, 12),
)
def test_first_fit(sequences, length, max_count):
    """Every sequence is in one row, rows hold no more than their capacity, and none was opened without need."""
    sizes, counts = [size for size, _ in sequences], [count for _, count in sequences]
    rows = first_fit(sizes, counts, length, max_count)
    assert sorted(index for row in rows for index in row) == list(range(len(sequences)))
    full = [(sum(sizes[k] for k in row), sum(counts[k] for k in row)) for row in rows]
    assert all(size <= length and count <= max_count for size, count in full)
    for later, row in enumerate(rows):
        for size, count in full[:later]:
            assert size + sizes[row[0]] > length or count + counts[row[0]] > max_count


def test_packed_prompts_are_nearly_all_real_tokens():
    sizes = np.random.default_rng(1).integers(60, 300, 400).tolist()  # as ScienceQA's in SmolLM2's tokens
    rows = first_fit(sizes, [1] * 400, 512, 16)
    assert sum(sizes) >= 0.95 * 512 * len(rows)


def test_sampling_is_a_function_of_seed_and_question(base):
    prompts = ids(7, 5, 6, 7, 8)

    def sample(seed, batch):
        return dict(
            Generator(adapter_settings("lora"), Decoder(CONFIG), MESH, (0,), 8, batch, temperature=1.0, seed=seed)(
                {}, base, prompts
            )
        )

    two_slots = sample(0, 2)
    assert two_slots == sample(0, 4), "how questions are batched must not change what is sampled"
    assert two_slots != sample(1, 2)


def test_sequences_longer_than_the_student_are_refused(base):
    with pytest.raises(UserError, match="256 positions"):
        list(Generator(adapter_settings("lora"), Decoder(CONFIG), MESH, (0,), 200, 1)({}, base, ids(8, 80)))
    with pytest.raises(UserError, match="256 positions"):
        list(
            LikelihoodScorer(adapter_settings("lora"), Decoder(CONFIG), MESH, 48, 1)(
                {}, base, [MultipleChoice(ids(8, 300)[0], [[1], [2]])]
            )
        )


def test_reasoning_then_likelihood_is_generation_followed_by_scoring(tmp_path):
    """The generated text up to its answer sentence, then the likeliest whole target: against a loop by hand."""
    from sqa_jax.batches.config_data import encoder_for, load_config_problems
    from sqa_jax.inference.answer import make_answerer
    from sqa_jax.prompts.formats import Format
    from sqa_jax.runtime import build_runtime

    config = default()
    config.student.path, config.recipe.format, config.recipe.max_prompt = "random:tiny", "QCM-EA", 700
    config.eval.temperature = 3.0  # greedy decoding with random weights generates nothing visible
    config.eval.max_new_tokens, config.eval.batch_questions, config.eval.batch_rows = 12, 2, 8
    runtime = build_runtime(config)
    problems, base = load_config_problems(config).split("test")[:6], runtime.student.params
    found = {
        prediction.index: (prediction.answer, prediction.text)
        for prediction in make_answerer(config, runtime)({}, base, problems)
    }
    assert sorted(found) == list(range(6))
    encoder = encoder_for(config, runtime.student.tokenizer)

    @jax.jit
    def log_probs_of(tokens, length):
        positions = jnp.arange(1024)[None]
        logits, _ = runtime.decoder.apply(
            {"params": base}, tokens, positions, (positions < length).astype(int), method="logits"
        )
        return jax.nn.log_softmax(logits[0], -1)

    reasons = []
    for index, problem in enumerate(problems):
        answer, text = found[index]
        reason, _, letter = text.rpartition("The answer is ")
        reason = reason.rstrip("\n")
        prompt = encoder.encode([problem], [Format("QCM", "EA")])[0].tokens
        scores = []
        for option in "ABCDEFGHIJ"[: len(problem.choices)]:
            # Reasoning of blanks alone leaves the answer sentence by itself.
            whole = f"{reason}\nThe answer is {option}." if reason else f"The answer is {option}."
            (target,) = encoder.plain([whole])
            row = np.zeros((1, 1024), np.int32)
            row[0, : len(prompt) + len(target)] = prompt + target
            log_probs = np.asarray(log_probs_of(row, len(prompt) + len(target)))
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
def test_answer_mode_that_the_format_does_not_allow(fmt, mode, words):
    from sqa_jax.inference.answer import answer_mode

    config = default()
    config.recipe.format, config.eval.mode = fmt, mode
    with pytest.raises(UserError, match=words):
        answer_mode(config)
