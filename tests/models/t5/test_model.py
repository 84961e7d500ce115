"""T5 against transformers' PyTorch T5: logits, packing, branches, cache, likelihood, generation, adapters, training."""

from __future__ import annotations

import copy
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.t5.modeling_t5 import T5Attention

from sqa_jax import adapters
from sqa_jax.batches.packing import Limits, pack_row
from sqa_jax.checkpoints.load import load_student
from sqa_jax.checkpoints.weights import random_params, save_safetensors
from sqa_jax.config import default
from sqa_jax.errors import UserError
from sqa_jax.inference.generate import Generator, trim
from sqa_jax.inference.likelihood import LikelihoodScorer, MultipleChoice
from sqa_jax.models.catalogue import CATALOGUE, SHAPES
from sqa_jax.models.flops import forward_flops
from sqa_jax.models.params import build_tree, linear_layers
from sqa_jax.models.soft_tokens import with_soft_tokens
from sqa_jax.models.t5.config import from_hf, to_hf
from sqa_jax.models.t5.model import T5, distance_buckets
from sqa_jax.models.t5.split import split
from sqa_jax.parallel.mesh import batch_sharding, make_mesh
from sqa_jax.parallel.rules import shardings
from sqa_jax.training.loss import row_losses
from tests.test_train import overfit_eight

MESH = make_mesh(default().mesh, jax.devices()[:1])
START, END = 0, 1
VARIANTS = {
    "1.1, untied, gated": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_layers=3),
    # transformers generates only if the encoder has at least as many layers as the decoder.
    "1.0, tied, relu": dict(feed_forward_proj="relu", num_layers=5, num_decoder_layers=4),
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def pair(request, tmp_path_factory):
    """A random PyTorch model and our reading of the files that it saves."""
    return make_pair(tmp_path_factory.mktemp("t5"), request.param)


@pytest.fixture(scope="module")
def flan(tmp_path_factory):
    """A pair of the newer kind."""
    return make_pair(tmp_path_factory.mktemp("flan"), {**VARIANTS["1.1, untied, gated"], "num_layers": 2})


def make_pair(directory, options):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97, d_model=48, d_kv=10, d_ff=80, num_heads=4, relative_attention_num_buckets=8,
        relative_attention_max_distance=20, decoder_start_token_id=START, dropout_rate=0.0, **options,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    if not config.scale_decoder_outputs:
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(97, 48))
    with torch.no_grad():
        for name, p in model.named_parameters():  # away from the uniform start, so that a mix-up of two tensors shows
            p.add_(torch.randn_like(p) * (0.2 if "norm" in name else 0.5 if "relative" in name else 0.1))
        model.shared.weight.mul_(0.05)  # so that greedy texts do not repeat one token
    model.save_pretrained(directory)
    tokenizer_at(directory)
    student = load_student(str(directory))
    return model, T5(student.config), student.params


def tokenizer_at(directory):
    """A tokenizer of few words, that the directory may be loaded."""
    from tokenizers import Tokenizer, models

    words = ["<pad>", "</s>", "<unk>", *map(str, range(90))]
    made = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)


def reference(model, prompt, target):
    """Logits behind a prompt, of the start token and each token of the target: [1 + target, V]."""
    with torch.no_grad():
        return (
            model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[START, *target]]))
            .logits[0]
            .numpy()
        )


def packed(sequences, length, room, virtual=0):
    """A row of (prompt, target) sequences as training packs them, with a leading dimension of one row."""
    tokens = [np.array(with_soft_tokens([*prompt, START, *target], virtual), int) for prompt, target in sequences]
    row = pack_row(tokens, [virtual + len(prompt) + 1 for prompt, _ in sequences], Limits(length, room), START)
    return jax.tree.map(lambda values: jnp.asarray(values[None]), row)


def ids(rng, *sizes):
    return [rng.integers(2, 97, n).tolist() for n in sizes]


RNG = np.random.default_rng(0)
SEQUENCES = list(zip(ids(RNG, 6, 30, 1), ids(RNG, 4, 26, 1), strict=True))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (32, 100)])
def test_buckets(bidirectional, buckets, farthest):
    relative = torch.arange(-3 * farthest, 3 * farthest + 1)
    theirs = T5Attention._relative_position_bucket(relative, bidirectional, buckets, farthest).numpy()
    ours = distance_buckets(bidirectional, buckets, farthest)
    np.testing.assert_array_equal(ours[np.clip(relative.numpy(), -farthest, farthest) + farthest], theirs)


def test_logits_of_packed_sequences(pair):
    """One row of three sequences and padding; the longest are beyond the farthest distance that has a bucket."""
    model, student, params = pair
    row = packed(SEQUENCES, 80, 40)
    logits, _ = jax.jit(functools.partial(student.apply, method="logits"))(
        {"params": params}, row.tokens, row.positions, row.segments
    )
    place = 0
    for prompt, target in SEQUENCES:
        span = slice(place + len(prompt), place + len(prompt) + 1 + len(target))
        np.testing.assert_allclose(logits[0, span], reference(model, prompt, target), atol=1e-4)
        place = span.stop


def test_training_loss(flan):
    """The loss of packed rows, whose decoder has just as many places as there are targets, is PyTorch's."""
    model, student, params = flan
    targets = sum(len(target) for _, target in SEQUENCES)
    loss = jax.jit(lambda params, row: row_losses(adapter_settings("lora"), student, {}, params, row, None))(
        params, packed(SEQUENCES, 80, targets)
    )
    expected = sum(
        model(input_ids=torch.tensor([prompt]), labels=torch.tensor([target])).loss.item() * len(target)
        for prompt, target in SEQUENCES
    )
    np.testing.assert_allclose(loss, [expected], rtol=1e-5)


@settings(max_examples=80, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 3), max_size=5)), max_size=4),
    virtual=st.integers(0, 2),
    most=st.sampled_from([None, 8]),
)
def test_split(sequences, virtual, most):
    """Against a plain loop: who decodes, numbered from the start token; what is left out, nobody else sees."""
    row = packed([([7] * size, target) for size, target in sequences], 60, 20, virtual)
    found = _split(row.tokens, row.positions, row.segments, most)
    decoded, numbers, lasts, place = np.zeros(60, bool), np.zeros(60, int), [], 0
    for size, target in sequences:
        start, place = place + virtual + size, place + virtual + size + 1 + len(target)
        decoded[start:place], numbers[start:place] = True, np.arange(place - start)
        lasts.append(place - 1)
    np.testing.assert_array_equal(found.decoded[0], decoded)
    np.testing.assert_array_equal(found.numbers[0], numbers)
    computed = np.asarray(found.gather[0])
    computed = computed[computed < 60].tolist()
    needed = sorted(set(np.flatnonzero(decoded).tolist()) - set(lasts))
    whole = needed + lasts
    assert computed == whole[: most or 60]
    back = np.asarray(found.scatter[0])
    assert [k for k in range(60) if back[k] < len(found.gather[0])] == sorted(computed)
    assert all(found.gather[0][back[k]] == k for k in computed)


@functools.partial(jax.jit, static_argnums=3)
def _split(tokens, positions, segments, most):
    return split(tokens, positions, segments, START, most)


def adapter_settings(*methods):
    config = default().adapter
    config.methods = methods
    config.lora.rank, config.lora.alpha = 4, 4.0
    config.prefix.length, config.prefix.reparametrize, config.prompt.length = 3, False, 5
    return config


# They share a beginning, which an encoder must not read apart; options share one, too.
PROMPTS = [[7, 8, 9] * 4 + prompt + [END, START] for prompt in ids(RNG, 9, 4, 30, 12, 70)]
CHOICES = [
    MultipleChoice(prompt, options)
    for prompt, options in zip(
        PROMPTS, [[[5, 6, 7], [5, 6, 9, 2], [5, 8]], [[3], [4]], ids(RNG, 1, 22, 3)], strict=False
    )
]


def scores(model, choice):
    """Log-probabilities of each option's tokens, in PyTorch, each option alone."""
    for option in choice.options:
        with torch.no_grad():
            prompt, start = torch.tensor([choice.prompt[:-1]]), torch.tensor([[START, *option[:-1]]])
            logits = model(input_ids=prompt, decoder_input_ids=start).logits[0]
        yield torch.log_softmax(logits, -1)[range(len(option)), option].numpy()


def generate(model, prompt):
    """transformers' own greedy text of ten tokens."""
    prompt = torch.tensor([prompt[:-1]])
    out = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False, eos_token_id=[96],
        pad_token_id=0, decoder_start_token_id=START,
    )  # fmt: skip
    return out[0, 1:].tolist()


def reread(model, prompt):
    """The same by reading everything anew for each token: PEFT's own generation leaves a T5's prefix out."""
    text = [START]
    with torch.no_grad():
        while len(text) <= 10 and text[-1] != 96:
            logits = model(input_ids=torch.tensor([prompt[:-1]]), decoder_input_ids=torch.tensor([text])).logits
            text.append(int(logits[0, -1].argmax()))
    return text[1:]


def equals(model, greedy, student, settings_, tree, params):
    """Likelihoods of options that are branches of packed rows, and texts from a cache whose rows are refilled."""
    scorer = LikelihoodScorer(settings_, student, MESH, 96, 2)
    virtual = adapters.soft_prompt_tokens(settings_).count if "prompt" in tree else 0
    prompts = [with_soft_tokens(prompt, virtual) for prompt in PROMPTS]
    found = dict(
        scorer(tree, params, [MultipleChoice(with_soft_tokens(c.prompt, virtual), c.options) for c in CHOICES])
    )
    assert sorted(found) == list(range(len(CHOICES)))
    for index, log_probs in found.items():
        for ours, theirs in zip(log_probs, scores(model, CHOICES[index]), strict=True):
            np.testing.assert_allclose(ours, theirs[len(theirs) - len(ours) :], atol=1e-4)
    free = [greedy(model, prompt) for prompt in PROMPTS]
    # An end token that really comes up, so that rows end at different times.
    end = next(text[k] for text in free for k in range(1, 9) if text[k : k + 1] and text[k] not in text[:k])
    expected = {k: trim(np.array(text), (end, 96)) for k, text in enumerate(free)}
    assert dict(Generator(settings_, student, MESH, (end, 96), 10, num_slots=2)(tree, params, prompts)) == expected
    assert len({len(text) for text in expected.values()}) > 1


def test_likelihood_and_generation(pair):
    model, student, params = pair
    equals(model, generate, student, adapter_settings("lora"), {}, params)


def shaken(tree, scale=0.2):
    """The tree away from its start, so that nothing is zero."""
    keys = iter(jax.random.split(jax.random.key(9), 1000))
    return jax.tree.map(lambda leaf: leaf + scale * jax.random.normal(next(keys), leaf.shape), tree)


def new_adapter(settings_, student, params):
    return shaken(jax.jit(lambda base: adapters.init_adapter(settings_, student.config, base, 0))(params))


def test_lora_equals_peft(flan):
    model, student, params = flan
    settings_ = adapter_settings("lora")
    settings_.lora.targets = ("q", "wo", "k")
    tree = new_adapter(settings_, student, params)
    assert len(tree["lora"]) == 2 * 3 + 2
    lora = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=4, target_modules=["q", "wo", "k"])
    theirs, tensors = peft.get_peft_model(copy.deepcopy(model), lora).eval(), {}
    for name, pair_ in tree["lora"].items():
        for i, key in enumerate(linear_layers(student.config)[name].names):
            key = f"base_model.model.{key.removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"] = torch.tensor(np.asarray(pair_["a"][i]).T.copy())
            tensors[f"{key}.lora_B.weight"] = torch.tensor(np.asarray(pair_["b"][i]).T.copy())
    result = peft.set_peft_model_state_dict(theirs, tensors)
    assert not result.unexpected_keys and not [k for k in result.missing_keys if "lora" in k]
    equals(theirs, reread, student, settings_, tree, params)
    merged = adapters.merge(settings_, tree, params, student.config)
    row = packed(SEQUENCES, 80, 40)
    read = jax.jit(lambda p, adapted: student.apply({"params": p}, row.tokens, row.positions, row.segments, adapted)[0])
    one = read(params, adapters.adapter_inputs(settings_, tree, student.config))
    other = read(merged, adapters.Adaptation())
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_prefix_equals_peft(pair):
    """With an odd number of decoder layers (a prefix each), and an even one (two layers share one, as in PEFT)."""
    model, student, params = pair
    settings_, c = adapter_settings("prefix"), student.config
    tree = new_adapter(settings_, student, params)
    own = np.stack([tree["prefix"]["key"], tree["prefix"]["value"]], axis=1)  # [n, 2, P, H·d]
    assert len(own) == (c.num_layers if c.num_layers % 2 else c.num_layers // 2)
    stored = np.zeros((c.num_layers, *own.shape[1:]), np.float32)
    stored[[2 * j % c.num_layers for j in range(len(own))]] = own
    prefix = peft.PrefixTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, num_layers=c.num_layers, num_attention_heads=4, token_dim=40
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), prefix).eval()
    with torch.no_grad():
        flat = torch.tensor(stored.transpose(2, 0, 1, 3).reshape(3, -1))
        theirs.prompt_encoder["default"].embedding.weight.copy_(flat)
    equals(theirs, reread, student, settings_, tree, params)


def test_prompt_equals_peft(flan):
    model, student, params = flan
    settings_ = adapter_settings("prompt")
    tree = new_adapter(settings_, student, params)
    prompt = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)
    theirs = peft.get_peft_model(copy.deepcopy(model), prompt).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight[:5] = torch.tensor(np.asarray(tree["prompt"]["embedding"]))
    equals(theirs, reread, student, settings_, tree, params)


def test_eight_devices_and_rematerialisation_change_nothing():
    """All methods together, their MLP included: losses and gradients of rows, weights and heads over a mesh."""
    c = SHAPES["t5-tiny"]
    params, settings_ = random_params(c, 0), adapter_settings("lora", "prefix", "prompt")
    settings_.prefix.reparametrize, settings_.prefix.hidden = True, 8
    settings_.lora.targets = ("q", "wo")  # each costs the compiler a second
    tree = new_adapter(settings_, T5(c), params)
    row = packed([([5, 9, 11], [3, 4, 2]), ([8], [6, 2])], 32, 8, virtual=5)
    batch = jax.tree.map(lambda values: jnp.repeat(values, 4, axis=0), row)
    config = default().mesh
    config.data, config.fsdp, config.tensor = 2, 2, 2
    mesh = make_mesh(config, jax.devices()[:8])
    everything = adapter_settings("lora", "prefix")
    assert shardings(jax.eval_shape(lambda base: adapters.init_adapter(everything, c, base, 0), params), mesh)
    results = []
    for remat, place in (
        ("none", lambda x: x),
        ("dots", lambda x: jax.device_put(x, batch_sharding(mesh) if x is batch else shardings(x, mesh))),
    ):
        student = T5(c, remat=remat)

        def loss(tree, params, batch, student=student):
            return row_losses(settings_, student, tree, params, batch, None).sum()

        results.append(jax.jit(jax.value_and_grad(loss))(*map(place, (tree, params, batch))))
    (one, gradient), (eight, sharded) = results
    np.testing.assert_allclose(one, eight, rtol=1e-5)
    for a, b in zip(
        *map(jax.tree.leaves, (gradient, sharded)), strict=True
    ):  # of sums of numbers as large as the largest
        np.testing.assert_allclose(a, b, atol=5e-5 * np.abs(b).max(), rtol=1e-4)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, path


def test_module_initialises_the_tree_that_files_are_read_into(pair):
    _, student, params = pair
    one = jnp.ones((1, 1), int)
    made = jax.eval_shape(lambda: student.init(jax.random.key(0), one, one, one, method="logits"))["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, made) == build_tree(student.config, lambda leaf: leaf.shape)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, made)


def test_saved_weights_load_in_transformers(pair, tmp_path):
    model, student, params = pair
    save_safetensors(params, student.config, tmp_path / "out")
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    prompt, target = SEQUENCES[0]
    np.testing.assert_allclose(reference(again, prompt, target), reference(model, prompt, target), atol=1e-6)
    assert from_hf(json.loads((tmp_path / "out" / "config.json").read_text()), "again") == student.config


def test_copies_of_the_shared_table_are_checked(flan, tmp_path):
    """Files may repeat the table for each stack and hold a bias that is never used; a copy that differs is refused."""
    from safetensors.torch import load_file, save_file

    model, student, params = flan
    model.save_pretrained(tmp_path)
    tokenizer_at(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(8, 4)
    save_file(tensors, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_student(str(tmp_path)).params, params)
    tensors["encoder.embed_tokens.weight"][60, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"encoder.embed_tokens.weight differs from the embeddings \(shared.weight\)"):
        load_student(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj 'gated-silu' is not supported; supported: gated-gelu"),
        ({"d_kv": None}, "head_dim is None"),
        ({"num_layers": 0}, "num_encoder_layers is 0"),
        ({"num_heads": True}, "num_heads is True"),
        ({"decoder_start_token_id": 97}, "decoder_start_token_id 97 is not one of the model's 97 tokens"),
        ({"relative_attention_num_buckets": 30}, "30 buckets of relative positions up to 20"),
        ({"relative_attention_max_distance": 4}, "8 buckets of relative positions up to 4"),
        ("d_ff", "key 'd_ff' is missing"),
    ],
)
def test_a_damaged_configuration_is_refused(flan, change, words):
    raw = to_hf(flan[1].config)
    raw = {k: v for k, v in raw.items() if k != change} if isinstance(change, str) else raw | change
    with pytest.raises(UserError, match=words):
        from_hf(raw, "config.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_decoder_layers": 10**9}, "tensors cannot be the configured 1000000000 layers"),
        ({"num_layers": 3}, r"encoder.block.2.*is missing, but the configuration asks for it"),
        ({"num_decoder_layers": 1}, r"decoder.block.1.*is not part of the configured model"),
        ({"d_ff": 81}, r"has shape \(80, 48\), but the configuration says \(81, 48\)"),
        ({"decoder_start_token_id": 50}, "token 50 .*is not a special token of its tokenizer"),
    ],
)
def test_a_configuration_that_contradicts_the_weights_is_refused(flan, tmp_path, change, words):
    model, student, params = flan
    save_safetensors(params, student.config, tmp_path / "out")
    tokenizer_at(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(to_hf(student.config) | change))
    with pytest.raises(UserError, match=words):
        load_student(str(tmp_path / "out"))


def test_prompts_end_for_the_encoder_and_start_the_decoder():
    """By a vocabulary of sentencepiece, in which special tokens are words: a question that spells them has none."""
    from sqa_jax.checkpoints.tokenizer import byte_tokenizer, fingerprint, load_tokenizer
    from sqa_jax.data.problem import Problem
    from sqa_jax.prompts.encode import Encoder
    from sqa_jax.prompts.formats import Format

    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    words += [(character, -3.0) for character in sorted(set("<pad></s>QuestionContextAnswerOptions:N/AB() is"))]
    tokenizer = transformers.T5Tokenizer(vocab=words, extra_ids=0)
    assert tokenizer("<pad>", add_special_tokens=False, split_special_tokens=True)["input_ids"][-1] == 0, "the trap"
    tokenizer.decoder_start_token = "<pad>"
    problem = Problem("1", "Is <pad> </s> it?", ("a</s><pad>", "<pad>"), 0)
    encoder = Encoder(tokenizer, 400, True, True)
    (one,) = encoder.encode([problem], [Format.parse("QCM-A")], ["The answer is <pad>."])
    start = one.prompt_length - 1
    assert one.tokens[start - 1 : start + 1] == [1, 0] and one.tokens[-1] == 1
    assert not {0, 1} & {*one.tokens[: start - 1], *one.tokens[start + 1 : -1]}
    (pieces,) = encoder.encode_texts(["Question Context"], 9)
    assert all(piece.tokens[:2] == [1, 0] and piece.prompt_length == 2 for piece in pieces)
    tiny = load_tokenizer("random:t5-tiny")
    assert Encoder(tiny, 99, True, True).control([tiny.eos_token + tiny.decoder_start_token]) == [[2, 0]]
    assert fingerprint(tiny) != fingerprint(byte_tokenizer()), "their datasets differ"


def test_what_an_encoder_decoder_cannot_do_is_refused():
    from sqa_jax.checkpoints.tokenizer import load_tokenizer
    from sqa_jax.prompts.tool_dialogue import Dialogue
    from sqa_jax.runtime import make_decoder

    config = default()
    with pytest.raises(UserError, match="conversation with tools.*decoder-only"):
        Dialogue(load_tokenizer("random:t5-tiny"), config.recipe, [])
    config.student.attention = "splash"
    with pytest.raises(UserError, match="attention=splash knows no position bias"):
        make_decoder(config, SHAPES["t5-tiny"], MESH)
    config.adapter.lora.targets = ("q_proj",)
    with pytest.raises(
        UserError, match=r"\['q_proj'\] are no layers of this student; choose from q, k, v, o, wi_0, wi_1, wo"
    ):
        adapters.init_adapter(config.adapter, SHAPES["t5-tiny"], {}, 0)


def test_operations_are_two_for_each_weight_that_a_token_meets():
    """Without attention's scores; cross-attention's keys and values meet what the encoder read."""
    c = CATALOGUE["flan-t5-small"].config
    met = {"encoder": 70, "decoder": 30}
    expected = 30 * c.hidden_size * c.vocab_size
    for name, leaf in linear_layers(c).items():
        across = name in ("decoder.cross_attn.k", "decoder.cross_attn.v")
        expected += (70 if across else met[name.split(".")[0]]) * np.prod(leaf.shape)
    assert forward_flops(c, 100, 0, 30) == 2 * expected


def test_eight_examples_are_learnt_chosen_and_generated(tmp_path):
    """The verbs on a random T5: overfit, choose the answers by likelihood, and generate the targets."""
    overfit_eight(tmp_path, **{"student.path": "random:t5-tiny", "train.steps": 160, "train.row_length": 512})
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["val_accuracy"] == 100, "options are chosen by likelihood"
