"""T5 against transformers' PyTorch T5: logits, packing, loss, likelihood, generation; and over a mesh."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from sqa_jax import adapters
from sqa_jax.checkpoints.weights import random_params
from sqa_jax.config import default
from sqa_jax.errors import UserError
from sqa_jax.models.catalogue import CATALOGUE, SHAPES
from sqa_jax.models.flops import forward_flops
from sqa_jax.models.params import build_tree, linear_layers
from sqa_jax.models.t5.model import T5
from sqa_jax.parallel.mesh import batch_sharding, make_mesh
from sqa_jax.parallel.rules import shardings
from sqa_jax.training.loss import row_losses
from tests.support.runs import overfit_eight
from tests.support.t5_adapters import adapter_settings, assert_scores_and_texts, random_tree
from tests.support.t5_checkpoint import (
    SEQUENCES,
    VARIANTS,
    Checkpoint,
    generated,
    packed_row,
    torch_logits,
    torch_results,
)
from tests.support.torch_models import torch_model

NAMES = [name for name in VARIANTS if name != "flan"]


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request, tmp_path_factory):
    return Checkpoint(request.param, tmp_path_factory.mktemp("t5"))


def test_logits_of_packed_sequences(checkpoint, reference):
    """One row of three sequences and padding; the longest exceed the distance that has a bucket."""

    def compute():
        model = torch_model(checkpoint.directory)
        return {f"logits_{k}": torch_logits(model, *sequence) for k, sequence in enumerate(SEQUENCES)}

    expected = reference(f"models/t5/logits-{checkpoint.name}", compute, tolerance=5e-5)
    row = packed_row(SEQUENCES, 80, 40)
    logits, _ = jax.jit(functools.partial(checkpoint.model.apply, method="logits"))(
        {"params": checkpoint.params}, row.tokens, row.positions, row.segments
    )
    start = 0
    for k, (prompt, target) in enumerate(SEQUENCES):
        span = slice(start + len(prompt), start + len(prompt) + 1 + len(target))
        np.testing.assert_allclose(logits[0, span], expected[f"logits_{k}"], atol=1e-4)
        start = span.stop


def test_training_loss(tmp_path, reference):
    """The loss of packed rows whose decoder has as many slots as there are targets equals PyTorch's."""
    checkpoint = Checkpoint("flan", tmp_path)

    def compute():
        import torch

        model, losses = torch_model(tmp_path), []
        for prompt, target in SEQUENCES:
            with torch.no_grad():
                loss = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([target])).loss.item()
            losses.append(loss * len(target))
        return {"loss": np.array([sum(losses)])}

    expected = reference("models/t5/loss", compute, tolerance=1e-3)["loss"]
    row = packed_row(SEQUENCES, 80, sum(len(target) for _, target in SEQUENCES))
    loss = jax.jit(lambda params, row: row_losses(adapter_settings("lora"), checkpoint.model, {}, params, row, None))(
        checkpoint.params, row
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_likelihood_and_generation(checkpoint, reference):
    expected = reference(
        f"models/t5/results-{checkpoint.name}",
        lambda: torch_results(torch_model(checkpoint.directory), generated),
        tolerance=5e-5,
    )
    assert_scores_and_texts(expected, checkpoint, adapter_settings("lora"), {})


def test_eight_devices_and_rematerialisation_change_nothing():
    """All methods together, their MLP included: losses and gradients of rows, weights and heads over a mesh."""
    c = SHAPES["t5-tiny"]
    params, settings_ = random_params(c, 0), adapter_settings("lora", "prefix", "prompt")
    settings_.prefix.reparametrize, settings_.prefix.hidden = True, 8
    settings_.lora.targets = ("q", "wo")  # each costs the compiler a second
    tree = random_tree(settings_, c, params)
    row = packed_row([([5, 9, 11], [3, 4, 2]), ([8], [6, 2])], 32, 8, soft_tokens=5)
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


def test_module_initialises_the_tree_of_the_parameter_table(checkpoint):
    one = jnp.ones((1, 1), int)
    init = jax.eval_shape(lambda: checkpoint.model.init(jax.random.key(0), one, one, one, method="logits"))["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, init) == build_tree(checkpoint.config, lambda spec: spec.shape)
    assert jax.tree.map(jnp.shape, checkpoint.params) == jax.tree.map(lambda leaf: leaf.shape, init)


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
    with pytest.raises(UserError, match="dialogue with tools.*decoder-only"):
        Dialogue(load_tokenizer("random:t5-tiny"), config.recipe, [])
    config.student.attention = "splash"
    with pytest.raises(UserError, match="attention=splash supports no position bias"):
        make_decoder(config, SHAPES["t5-tiny"], make_mesh(config.mesh, jax.devices()[:1]))
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
