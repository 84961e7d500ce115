"""The export verb, and training and evaluation that start from an adapter of PEFT."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from ml_collections import ConfigDict
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models

from sqa_jax import export as verb
from sqa_jax.adapters import init_adapter, peft_format
from sqa_jax.agent.run import PolicyRunner
from sqa_jax.batches.config_data import encoder_for, load_config_problems
from sqa_jax.checkpoints.load import load_student
from sqa_jax.checkpoints.tokenizer import byte_tokenizer
from sqa_jax.errors import UserError
from sqa_jax.evaluation.evaluate import evaluate
from sqa_jax.export import export
from sqa_jax.prompts.formats import option_targets
from sqa_jax.prompts.recipes import arm_format
from sqa_jax.training.loop import train
from tests.support.exported import card_of, card_prompt, card_reply, run_snippet, snippet_prompt
from tests.support.peft_pair import PARTIAL_LORA, Pair, peft_files, peft_logits
from tests.support.runs import last_adapter, tiny_config
from tests.support.torch_models import torch_model
from tests.support.verbs import run_verb

pytestmark = pytest.mark.xdist_group("export")  # the run is trained once


@pytest.fixture(scope="module")
def peft_run(tmp_path_factory, reference):
    """(pair, an adapter of PEFT, workdir, the run's configuration) of a training that started from the adapter."""
    root = tmp_path_factory.mktemp("run")
    pair = Pair("llama", root / "base")

    def make():
        import peft

        return pair, peft.LoraConfig(**PARTIAL_LORA)

    adapter = Path(shutil.copytree(peft_files(reference, "lora-partial", make), root / "adapter"))
    config = tiny_config(
        root,
        **{
            "student.path": str(root / "base"), "adapter.peft": str(adapter), "adapter.methods": ("prompt",),
            "optimizer.learning_rate": 1e-4, "data.train_limit": 8, "train.steps": 2, "train.eval_every": 0, "eval.val_limit": 2,
            "eval.checkpoint": "last", "eval.max_new_tokens": 6,
        },
    )  # fmt: skip
    train(config, str(root / "run"))
    saved = ConfigDict(json.loads((root / "run/config.json").read_text())["config"]).lock()
    return pair, adapter, root / "run", saved


def trained_lora(run, config):
    return last_adapter(run, config)[1]["adapter"]["lora"]


def test_training_starts_from_the_adapter(peft_run):
    """The settings are the adapter's, training starts from its weights, and its padding stays zero."""
    pair, adapter, run, config = peft_run
    lora = config.adapter.lora
    assert tuple(config.adapter.methods) == ("lora",) and tuple(lora.targets) == ("q_proj", "down_proj")
    assert (lora.rank, lora.alpha, lora.rslora) == (4, 6.0, False)
    _, tree = pair.read(adapter)
    for name, layer in trained_lora(run, config).items():
        for part, values in layer.items():
            before = tree["lora"][name][part]
            assert 0 < np.abs(values - before).max() < 1e-3
            assert not np.any(values[before == 0]) and np.sum(before == 0) >= before.size // 3


def test_another_content_is_another_run(peft_run):
    _, adapter, run, config = peft_run
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match="belongs to another configuration .*peft was"):
            train(config, str(run))
    finally:
        file.write_bytes(content)


def test_evaluation_chooses_the_most_likely_option_of_peft(peft_run, reference, tmp_path):
    pair, adapter, _, config = peft_run
    config = config.copy_and_resolve_references()
    config.adapter.methods, config.adapter.lora.rank = ("prompt",), 16  # the adapter's own settings count
    config.eval.checkpoint, config.eval.limit = "none", 4
    evaluate(config, str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "eval/test/predictions.jsonl").read_text().splitlines()]
    encoder = encoder_for(config, pair.student.tokenizer)
    problems = load_config_problems(config).split("test")[:4]

    def compute() -> dict[str, np.ndarray]:
        import torch

        model, answers, margins = pair.peft_model(adapter), [], []
        for problem, prompt in zip(problems, encoder.encode(problems, [arm_format(config.recipe)] * 4), strict=True):
            scores = []
            for option in encoder.plain(option_targets(problem, "", config.recipe.answer)):
                with torch.no_grad():
                    logits = model(torch.tensor([prompt.tokens + option])).logits[0, len(prompt.tokens) - 1 : -1]
                scores.append(float(torch.log_softmax(logits, -1)[range(len(option)), option].sum()))
            answers.append(int(np.argmax(scores)))
            margins.append(np.diff(sorted(scores)[-2:])[0])
        assert min(margins) > 1e-2, "two options are equally likely"
        return {"answers": np.asarray(answers)}

    assert [row["answer"] for row in rows] == reference("export/likelihoods", compute)["answers"].tolist()


def test_an_agent_may_use_the_adapter(peft_run, tmp_path):
    pair, adapter, _, config = peft_run
    config = config.copy_and_resolve_references()
    config.adapter.lora.rank = 16
    runner = PolicyRunner(config, tmp_path)
    assert runner.config.adapter.lora.rank == 4
    jax.tree.map(np.testing.assert_array_equal, runner.student.adapter, pair.read(adapter)[1])


@pytest.fixture(scope="module")
def exported(peft_run, tmp_path_factory):
    """{format: directory} of the run's exports."""
    _, _, run, config = peft_run
    root = tmp_path_factory.mktemp("exported")
    for name, step in (("test", 2), ("older", 1)):
        (run / "eval" / name).mkdir(parents=True)
        metrics = {
            "AVG": 12.5,
            "n": {"AVG": 8},
            "unparsed": 1,
            "mode": "likelihood",
            "checkpoint": "last",
            "step": step,
        }
        (run / "eval" / name / "metrics.json").write_text(json.dumps(metrics))
    export(config, str(run), "peft", str(root / "peft"))
    for dtype in ("float32", "bfloat16"):
        export(config, str(run), "hf", str(root / dtype), dtype)
    return {path.name: path for path in root.iterdir()}


def test_adapter_for_peft(peft_run, exported):
    pair, _, run, config = peft_run
    out = exported["peft"]
    tensors, lora = load_file(out / "adapter_model.safetensors"), trained_lora(run, config)
    for name, module in (("q_proj", "self_attn"), ("down_proj", "mlp")):
        for index in range(3):
            key = f"base_model.model.model.layers.{index}.{module}.{name}.lora_"
            np.testing.assert_array_equal(tensors[key + "A.weight"], lora[name]["a"][index].T)
            np.testing.assert_array_equal(tensors[key + "B.weight"], lora[name]["b"][index].T)
    jax.tree.map(np.testing.assert_array_equal, pair.read(out)[1]["lora"], lora)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == config.student.path
    front, text, code = card_of(out)
    assert front["library_name"] == "peft" and "lora" in front["tags"] and front["license"] == "apache-2.0"
    assert "| test | likelihood | 12.50 | 8 | 1 |" in text and "older" not in text and "`golden`" in text
    assert f'PeftModel.from_pretrained(model, "{out}")' in code
    assert snippet_prompt(code)[1] == card_prompt(pair.student, config)


@pytest.mark.live
def test_peft_answers_as_we_do(peft_run, exported):
    """By the snippet of the model card."""
    pair, _, _, config = peft_run
    out = exported["peft"]
    settings, tree = pair.read(out)
    np.testing.assert_allclose(peft_logits(pair.peft_model(out)), pair.logits(settings, tree), atol=1e-4)
    assert run_snippet(card_of(out)[2])[0] == card_reply(pair.student, settings, tree, config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_model(peft_run, exported, dtype):
    pair, _, run, config = peft_run
    out = exported[dtype]
    assert {str(values.dtype) for values in load_file(out / "model.safetensors").values()} == {dtype}
    lora = trained_lora(run, config)
    for name, module in (("q_proj", "self_attn"), ("down_proj", "mlp")):
        for index in range(3):
            key = f"model.layers.{index}.{module}.{name}.weight"
            update = (lora[name]["a"][index].astype(np.float64) @ lora[name]["b"][index]).T * 6 / 4
            expected = load_file(pair.directory / "model.safetensors")[key] + update
            found = load_file(out / "model.safetensors")[key].astype(np.float32)
            np.testing.assert_allclose(found, expected, atol=1e-6, rtol=2**-8 if dtype == "bfloat16" else 1e-6)
    written = load_student(str(out))
    if dtype == "float32":
        adapted = pair.logits(config.adapter, {"lora": lora})
        np.testing.assert_allclose(pair.logits(config.adapter, {}, written.params), adapted, atol=1e-4)
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(out), pair.student.tokenizer
    messages = [{"role": "user", "content": "Which  of these? 12 é\n"}]
    assert tokenizer(messages[0]["content"])["input_ids"] == ours(messages[0]["content"])["input_ids"]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == ours.apply_chat_template(messages, tokenize=False)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == list(pair.student.eos_ids) == list(written.eos_ids)
    front, _, code = card_of(out)
    assert front["library_name"] == "transformers" and f'from_pretrained("{out}")' in code


@pytest.mark.live
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_answers_as_we_do(peft_run, exported, dtype):
    pair, _, run, config = peft_run
    out, tree = exported[dtype], {"lora": trained_lora(run, config)}
    model = torch_model(out)
    assert str(model.dtype) == f"torch.{dtype}"
    assert model.generation_config.eos_token_id == list(pair.student.eos_ids)
    if dtype == "bfloat16":  # with the rounded weights
        pair, tree = copy.copy(pair), {}
        pair.student = load_student(str(out))
    np.testing.assert_allclose(peft_logits(model.float()), pair.logits(config.adapter, tree), atol=1e-4)
    if dtype == "float32":
        assert run_snippet(card_of(out)[2])[0] == card_reply(pair.student, config.adapter, tree, config)


def test_bare_and_fully_trained_students_are_models_too(peft_run, tmp_path):
    pair, _, _, config = peft_run
    config = config.copy_and_resolve_references()
    config.adapter.peft, config.eval.checkpoint = "", "none"
    export(config, str(tmp_path), "hf", str(tmp_path / "bare"))
    base = load_file(pair.directory / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_file(tmp_path / "bare/model.safetensors"), base)
    config.adapter.methods = ("full",)
    student = load_student(str(pair.directory))
    tree = jax.tree.map(lambda leaf: 1.1 * leaf, init_adapter(config.adapter, student.config, student.params, 0))
    (tmp_path / "full").mkdir()
    verb.write_merged_model(config.adapter, student, tree, tmp_path / "full", "float32")
    for name, values in load_file(tmp_path / "full/model.safetensors").items():
        np.testing.assert_array_equal(values, np.float32(1.1) * base[name], err_msg=name)


def test_a_card_writes_the_prompt_of_training_whatever_its_parts_would_merge_into(peft_run, tmp_path):
    """With a vocabulary that has a token for a question mark and a following newline, as Llama 3's and Qwen's."""
    pair, _, _, config = peft_run
    base = Path(shutil.copytree(pair.directory, tmp_path / "base"))
    vocabulary = byte_tokenizer().get_vocab() | {"?\u010a": 260}
    model = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    model.model = models.BPE(vocab=vocabulary, merges=[("?", "\u010a")])
    ends = dict(eos_token="<|im_end|>", pad_token="<|pad|>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, **ends).save_pretrained(base)
    config = config.copy_and_resolve_references()
    config.student.path, config.adapter.peft, config.eval.checkpoint = str(base), "", "none"
    export(config, str(tmp_path), "hf", str(tmp_path / "out"))
    parts, ids = snippet_prompt(card_of(tmp_path / "out")[2])
    student = load_student(str(base))
    assert ids == card_prompt(student, config)
    assert 260 in student.tokenizer("".join(parts))["input_ids"], "the case that the test is for"


def test_what_does_not_read_back_equal_is_not_kept(peft_run, tmp_path, monkeypatch):
    _, _, run, config = peft_run
    write = peft_format.write_safetensors
    monkeypatch.setattr(
        peft_format, "write_safetensors", lambda path, tensors: write(path, {k: 1.01 * v for k, v in tensors.items()})
    )
    with pytest.raises(RuntimeError, match="other logits"):
        export(config, str(run), "peft", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_refusals(peft_run, tmp_path):
    pair, _, run, config = peft_run
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text("x")
    for arguments, message in [
        ((config, str(run), "peft", str(tmp_path / "kept")), "exists already"),
        ((config, "", "peft", str(tmp_path / "out")), "--workdir and --out"),
        ((config, str(run), "peft", str(tmp_path / "out"), "bfloat16"), "--format hf"),
        ((config, str(tmp_path / "nowhere"), "peft", str(tmp_path / "out")), "nowhere"),
    ]:
        with pytest.raises(UserError, match=message):
            export(*arguments)
    settings = config.adapter.copy_and_resolve_references()
    settings.methods = ("prompt",)
    student = load_student(str(pair.directory))
    tree = init_adapter(settings, student.config, jax.tree.map(jnp.asarray, student.params), 0)
    with pytest.raises(UserError, match="prompt cannot be merged"):
        verb.write_merged_model(settings, student, tree, tmp_path, "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept/file").read_text() == "x"


def test_command_line(peft_run, tmp_path):
    """The run's own configuration is used, and a mistake is one line."""
    _, _, run, _ = peft_run
    arguments = ["--workdir", str(run), "--out", str(tmp_path / "out")]
    result = run_verb("export", *arguments, "--config.eval.checkpoint=best")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}  # fmt: skip
    result = run_verb("export", *arguments)
    assert result.returncode == 2 and "exists already" in result.stderr and len(result.stderr.splitlines()) == 1


def test_studies_train_new_adapters():
    from configs.study_test import get_config
    from sqa_jax.study.matrix import study_runs

    config = get_config()
    config.adapter.peft = "anything"
    with pytest.raises(UserError, match="config.adapter.peft"):
        study_runs(config)
