"""Loss and optimizer step against PyTorch and NumPy; accumulation; sharding on eight simulated devices."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sqa_jax import adapters
from sqa_jax.batches.batch import stack_rows
from sqa_jax.batches.packing import Limits, pack_row
from sqa_jax.checkpoints.weights import param_shapes, random_params, save_safetensors
from sqa_jax.config import default
from sqa_jax.errors import UserError
from sqa_jax.models.decoder import Decoder
from sqa_jax.models.decoder_config import DecoderConfig
from sqa_jax.models.soft_tokens import with_soft_tokens
from sqa_jax.parallel.mesh import check_rows, local_rows, make_mesh, place_rows, replicated
from sqa_jax.parallel.rules import shardings
from sqa_jax.training.loss import row_losses
from sqa_jax.training.optimizer import learning_rates, make_optimizer, make_schedule
from sqa_jax.training.step import compile_step, init_state, make_step
from tests.support.torch_models import torch_model

CONFIG = DecoderConfig(64, 32, 64, 2, 4, 2, 8, tie_embeddings=True)


@pytest.fixture(scope="module")
def base():
    return random_params(CONFIG, 0)


def settings_for(*methods):
    config = default()
    config.adapter.methods = methods
    (
        config.adapter.lora.rank,
        config.adapter.prefix.length,
        config.adapter.prefix.hidden,
        config.adapter.prompt.length,
    ) = 4, 4, 16, 4
    return config


SEQUENCES = [np.random.default_rng(k).integers(1, 64, 6 + k % 7).astype(np.int32) for k in range(24)]
PROMPTS = [2 + k % 3 for k in range(24)]


def batch(rows, soft_tokens=0, accumulate=1):
    """24 sequences in `rows` packed rows, unevenly: [accumulate, rows / accumulate, …]."""
    limits = Limits(96 + 8 * soft_tokens, 56)
    sequences = [np.asarray(with_soft_tokens(sequence, soft_tokens)) for sequence in SEQUENCES]
    packed = [
        pack_row([sequences[k] for k in members], [soft_tokens + PROMPTS[k] for k in members], limits, 0)
        for members in np.array_split(np.arange(24), rows)
    ]
    return jax.tree.map(lambda a: a.reshape(accumulate, rows // accumulate, *a.shape[1:]), stack_rows(packed))


def numpy_params():
    """Random parameters that no release of JAX changes."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(0, 0.2, leaf.shape).astype(np.float32)
        return values + 1 if path[-1].key == "scale" else values

    return jax.tree_util.tree_map_with_path(draw, param_shapes(CONFIG, np.float32))


def test_loss_and_gradient_equal_pytorch(reference, tmp_path):
    """Mean cross-entropy of target tokens: packed rows here, one sequence without padding at a time there."""
    base = numpy_params()

    def compute():
        import torch

        save_safetensors(base, CONFIG, tmp_path / "model")
        model = torch_model(tmp_path / "model")
        total, count = torch.zeros(()), 0
        for tokens, prompt in zip(SEQUENCES, PROMPTS, strict=True):
            labels = torch.tensor(tokens[None].astype(np.int64))
            logits = model(labels).logits
            total = total + torch.nn.functional.cross_entropy(
                logits[0, prompt - 1 : -1], labels[0, prompt:], reduction="sum"
            )
            count += len(tokens) - prompt
        loss = total / count
        loss.backward()
        return {
            "loss": loss.detach().numpy(),
            "down_proj": model.model.layers[1].mlp.down_proj.weight.grad.numpy().T,
            "embed_tokens": model.model.embed_tokens.weight.grad.numpy(),
        }

    expected = reference("training/step/loss_and_gradient", compute)
    config = settings_for("full")
    packed = jax.tree.map(lambda a: jnp.asarray(a[0]), batch(8))

    def loss(params):
        losses = row_losses(config.adapter, Decoder(CONFIG), {"full": params}, {}, packed, None)
        return losses.sum() / packed.target_mask.sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(base)
    np.testing.assert_allclose(value, expected["loss"], atol=1e-5)
    np.testing.assert_allclose(gradient["layers"]["mlp"]["down_proj"]["kernel"][1], expected["down_proj"], atol=1e-6)
    np.testing.assert_allclose(gradient["embed_tokens"]["embedding"], expected["embed_tokens"], atol=1e-6)


def test_only_targets_count(base):
    """Padding tokens and masked targets do not contribute to the loss."""
    config = settings_for("lora")
    decoder = Decoder(CONFIG)
    tree = adapters.init_adapter(config.adapter, CONFIG, base, 0)
    one = jax.tree.map(lambda a: jnp.asarray(a[0]), batch(8))
    loss = jax.jit(lambda rows: row_losses(config.adapter, decoder, tree, base, rows, None))
    padded = one._replace(tokens=jnp.where(one.segments == 0, 63, one.tokens))
    np.testing.assert_array_equal(loss(padded), loss(one))
    unmasked = one._replace(targets=jnp.where(one.target_mask == 0, 63, one.targets))
    np.testing.assert_array_equal(loss(unmasked), loss(one))


def run(config, base, data, mesh, steps=3):
    """Losses and the whole adapter after some steps."""
    # With momentum there is a state to shard; Adam's root of tiny second moments would amplify the last bit of a sum's order.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))

    def new_state(base):
        return init_state(adapters.init_adapter(config.adapter, CONFIG, base, 0), optimizer)

    base = jax.tree.map(np.asarray, base)
    shape = jax.eval_shape(new_state, base)
    state = jax.jit(new_state, out_shardings=shardings(shape, mesh))(base)
    frozen = {} if "full" in config.adapter.methods else jax.tree.map(sharded, base, shardings(base, mesh))
    step = compile_step(make_step(config.adapter, Decoder(CONFIG), optimizer, 0), shape, frozen, mesh)
    rows = data.tokens.shape[1]
    local = local_rows(mesh, rows)
    batch = place_rows(jax.tree.map(lambda a: a[:, local], data), mesh, rows, local, leading=1)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    whole = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(state.adapter)
    return losses, jax.tree.map(np.asarray, whole), metrics


def sharded(array, sharding):
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


METHODS = (("lora", "prefix", "prompt"), ("full",))  # all that can be trained, in two trees


def trained(methods, shape, devices=None):
    """Losses and adapter of some steps on a mesh of that shape, in however many processes."""
    config = settings_for(*methods)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = shape
    data = batch(8, soft_tokens=adapters.soft_prompt_tokens(config.adapter).count)
    losses, adapter, _ = run(config, random_params(CONFIG, 0), data, make_mesh(config.mesh, devices))
    return losses, adapter


def single():
    return make_mesh(default().mesh, jax.devices()[:1])


def test_accumulation_equals_the_big_batch(base):
    config = settings_for("lora")
    expected, tree, _ = run(config, base, batch(8), single())
    for accumulate in (2, 8):
        losses, other, _ = run(config, base, batch(8, accumulate=accumulate), single())
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), other, tree)


@pytest.fixture(scope="module")
def on_one_device():
    return {methods: trained(methods, (1, 1, 1), jax.devices()[:1]) for methods in METHODS}


MESHES = [(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]


# A fully trained student is sharded as a frozen one is, so it gets few meshes: all of each axis, and some of each.
CASES = [(METHODS[0], shape) for shape in MESHES]
CASES += [(METHODS[1], shape) for shape in ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))]


@pytest.mark.parametrize(("methods", "shape"), CASES, ids=lambda sizes: "+".join(map(str, sizes)))
def test_every_mesh_gives_the_single_device_result(on_one_device, methods, shape):
    expected, adapter = on_one_device[methods]
    losses, other = trained(methods, shape)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), other, adapter)


def test_parameters_are_sharded(base):
    config = settings_for("lora")
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 4, 2
    mesh = make_mesh(config.mesh)
    placed = jax.device_put(base, shardings(base, mesh))
    kernel = placed["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 32 // 4, 64 // 2)


def test_metrics_count_what_is_there(base):
    _, _, metrics = run(settings_for("lora"), base, batch(8), single(), steps=1)
    assert int(metrics["tokens"]) == sum(map(len, SEQUENCES))
    assert int(metrics["targets"]) == sum(len(t) - p for t, p in zip(SEQUENCES, PROMPTS, strict=True))
    assert metrics["row_losses"].shape == (1, 8)


def test_dropout_is_a_function_of_seed_and_step(base):
    config = settings_for("lora")
    tree = jax.tree.map(lambda a: a + 0.1, adapters.init_adapter(config.adapter, CONFIG, base, 0))
    one = jax.tree.map(lambda a: jnp.asarray(a[0]), batch(8))

    @partial(jax.jit, static_argnums=0)
    def loss(rate, key):
        return row_losses(config.adapter, Decoder(CONFIG, lora_dropout=rate), tree, base, one, key)

    key = jax.random.key(1)
    np.testing.assert_array_equal(loss(0.3, key), loss(0.3, key))
    assert np.abs(loss(0.3, key) - loss(0.3, jax.random.key(2))).max() > 1e-3
    np.testing.assert_array_equal(loss(0.3, None), loss(0.0, None))


def test_schedule():
    config = default().optimizer
    config.learning_rate, config.warmup_ratio, config.final_ratio = 2.0, 0.1, 0.25
    rates = {name: make_schedule(_with(config, schedule=name), 100) for name in ("cosine", "linear", "constant")}
    with pytest.raises(UserError, match="cosine, linear or constant"):
        make_schedule(_with(config, schedule="step"), 10)
    np.testing.assert_allclose(learning_rates(config, 100), [rates["cosine"](step) for step in range(100)], rtol=1e-6)
    for rate in rates.values():
        assert 0 < rate(0) < rate(5) < rate(10) == pytest.approx(2.0)
    assert rates["cosine"](55) == pytest.approx(2.0 * (0.25 + 0.75 * 0.5), rel=1e-3)
    assert rates["linear"](100) == rates["cosine"](100) == pytest.approx(0.5)
    assert rates["constant"](100) == pytest.approx(2.0)


def _with(config, **change):
    config = config.copy_and_resolve_references()
    for key, value in change.items():
        config[key] = value
    return config


def test_optimizer_equals_pytorch_adamw(reference):
    """Three steps of AdamW with decay on matrices only, against torch.optim.AdamW with parameter groups."""
    config = _with(
        default().optimizer, learning_rate=0.1, schedule="constant", warmup_ratio=0.0, weight_decay=0.3, clip_norm=1e9
    )
    start = {"kernel": np.ones((2, 3), np.float32), "scale": np.full((3,), 2.0, np.float32)}
    gradients = [{"kernel": np.full((2, 3), 0.5 + k, np.float32), "scale": np.full((3,), -1.0, np.float32)} for k in range(3)]  # fmt: skip

    def compute():
        import torch

        kernel, scale = (torch.nn.Parameter(torch.tensor(start[name])) for name in ("kernel", "scale"))
        optimizer = torch.optim.AdamW(
            [{"params": [kernel], "weight_decay": 0.3}, {"params": [scale], "weight_decay": 0.0}],
            lr=0.1, betas=(config.b1, config.b2), eps=1e-8,
        )  # fmt: skip
        for gradient in gradients:
            kernel.grad, scale.grad = (torch.tensor(gradient[name]) for name in ("kernel", "scale"))
            optimizer.step()
        return {"kernel": kernel.detach().numpy(), "scale": scale.detach().numpy()}

    expected = reference("training/step/adamw", compute)
    optimizer, tree = make_optimizer(config, 3), {"a": jax.tree.map(jnp.asarray, start)}
    state = optimizer.init(tree)
    for gradient in gradients:
        updates, state = optimizer.update({"a": gradient}, state, tree)
        tree = optax.apply_updates(tree, updates)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-6), tree["a"], expected)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 1, 1), "8 devices here"),
        ((-1, -1, 1), "one may be -1"),
        ((0, 1, 8), "sizes are positive"),
        ((-1, 3, 1), "8 devices here"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(shape, words):
    config = default()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = shape
    with pytest.raises(UserError, match=words):
        make_mesh(config.mesh)


def test_what_a_mesh_does_not_divide_is_named(base):
    config = default()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 1, 8
    mesh = make_mesh(config.mesh)
    odd = random_params(DecoderConfig(61, 32, 64, 2, 4, 2, 8, tie_embeddings=True), 0)
    with pytest.raises(UserError, match="embed_tokens/embedding.*tensor = 8 does not divide dimension 0 of size 61"):
        shardings(odd, mesh)
    with pytest.raises(UserError, match="no sharding rule matches"):
        shardings({"new_thing": jnp.ones(3)}, mesh)
    config.mesh.data, config.mesh.tensor = 8, 1
    with pytest.raises(UserError, match="config.train.batch_rows is 6"):
        check_rows(6, make_mesh(config.mesh), "train.batch_rows")
