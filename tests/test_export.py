"""The export verb, and training and evaluation that begin with an adapter of PEFT."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from ml_collections import ConfigDict
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models

from sqa_jax import export as verb
from sqa_jax.adapters import init_adapter, peft_format
from sqa_jax.agent.run import PolicyRunner
from sqa_jax.batches.config_data import encoder_for, load_config_problems
from sqa_jax.checkpoints.load import load_student
from sqa_jax.checkpoints.tokenizer import byte_tokenizer
from sqa_jax.config import default
from sqa_jax.errors import UserError
from sqa_jax.evaluation.evaluate import evaluate
from sqa_jax.export import export
from sqa_jax.inference.generate import Generator
from sqa_jax.models.api import model_class
from sqa_jax.parallel.mesh import make_mesh
from sqa_jax.prompts.formats import option_targets
from sqa_jax.prompts.recipes import arm_format
from sqa_jax.training.loop import train
from tests.support.peft_pair import Pair, their_logits
from tests.test_train import last_adapter, tiny_config

LORA = peft.LoraConfig(
    task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2],
    rank_pattern={"q_proj": 2},
)  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(pair, its adapter, workdir, the run's own configuration) of a training that began with an adapter of PEFT."""
    root = tmp_path_factory.mktemp("begun")
    pair = Pair("llama", root / "base")
    config = tiny_config(
        root,
        **{
            "student.path": str(root / "base"), "adapter.peft": str(pair.save(LORA, root / "adapter")), "adapter.methods": ("prompt",),
            "optimizer.learning_rate": 1e-4, "data.train_limit": 8, "train.steps": 2, "train.eval_every": 0, "eval.val_limit": 2,
            "eval.checkpoint": "last", "eval.max_new_tokens": 6,
        },
    )  # fmt: skip
    train(config, str(root / "run"))
    own = ConfigDict(json.loads((root / "run/config.json").read_text())["config"]).lock()
    return pair, root / "adapter", root / "run", own


def trained_lora(run, config):
    return last_adapter(run, config)[1]["adapter"]["lora"]


def test_training_begins_with_it(begun):
    """The settings are the adapter's, its weights are where training starts, and what it left out stays out."""
    pair, adapter, run, config = begun
    lora = config.adapter.lora
    assert tuple(config.adapter.methods) == ("lora",) and tuple(lora.targets) == ("q_proj", "down_proj")
    assert (lora.rank, lora.alpha, lora.rslora) == (4, 6.0, False)
    _, tree = pair.ours(adapter)
    for name, layer in trained_lora(run, config).items():
        for part, values in layer.items():
            before = tree["lora"][name][part]
            assert 0 < np.abs(values - before).max() < 1e-3
            assert not np.any(values[before == 0]) and np.sum(before == 0) >= before.size // 3


def test_another_content_is_another_run(begun):
    _, adapter, run, config = begun
    file = adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match="belongs to another configuration .*peft was"):
            train(config, str(run))
    finally:
        file.write_bytes(content)


def test_evaluation_chooses_what_peft_finds_likeliest(begun, tmp_path):
    pair, adapter, _, config = begun
    config = config.copy_and_resolve_references()
    config.adapter.methods, config.adapter.lora.rank = ("prompt",), 16  # what the adapter says counts
    config.eval.checkpoint, config.eval.limit = "none", 4
    evaluate(config, str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "eval/test/predictions.jsonl").read_text().splitlines()]
    model, encoder = pair.theirs(adapter), encoder_for(config, pair.student.tokenizer)
    problems = load_config_problems(config).split("test")[:4]
    prompts = encoder.encode(problems, [arm_format(config.recipe)] * 4)
    for row, problem, prompt in zip(rows, problems, prompts, strict=True):
        scores = []
        for option in encoder.plain(option_targets(problem, "", config.recipe.answer)):
            with torch.no_grad():
                logits = model(torch.tensor([prompt.tokens + option])).logits[0, len(prompt.tokens) - 1 : -1]
            scores.append(float(torch.log_softmax(logits, -1)[range(len(option)), option].sum()))
        assert row["answer"] == int(np.argmax(scores))


def test_an_agent_may_have_it(begun, tmp_path):
    pair, adapter, _, config = begun
    config = config.copy_and_resolve_references()
    config.adapter.lora.rank = 16
    runner = PolicyRunner(config, tmp_path)
    assert runner.config.adapter.lora.rank == 4
    jax.tree.map(np.testing.assert_array_equal, runner.student.adapter, pair.ours(adapter)[1])


def card_of(out: Path) -> tuple[dict, str, str]:
    """Front matter, text, and the Python in it."""
    _, front, text = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return yaml.safe_load(front), text, code


def ran(code: str) -> tuple[str, dict]:
    """What the code prints, and its names."""
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "README.md", "exec"), names)
    return out.getvalue(), names


def asked(student, config) -> list[int]:
    """The prompt of the question that a model card asks."""
    problem = load_config_problems(config).split("test")[0]
    (prompt,) = encoder_for(config, student.tokenizer).encode([problem], [arm_format(config.recipe)])
    return prompt.tokens


def said(student, settings, tree, config) -> str:
    """What our generator answers to it."""
    mesh, module = make_mesh(default().mesh, jax.devices()[:1]), model_class(student.config)(student.config)
    generator = Generator(settings, module, mesh, student.eos_ids, config.eval.max_new_tokens, 1)
    ((_, ids),) = generator(tree, student.params, [asked(student, config)])
    return student.tokenizer.decode(ids, skip_special_tokens=True) + "\n"


def test_adapter_for_peft(begun, tmp_path):
    pair, _, run, config = begun
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
    out = tmp_path / "lora"
    export(config, str(run), "peft", str(out))
    tensors = load_file(out / "adapter_model.safetensors")
    for name, module in (("q_proj", "self_attn"), ("down_proj", "mlp")):
        layer = trained_lora(run, config)[name]
        for index in range(3):
            key = f"base_model.model.model.layers.{index}.{module}.{name}.lora_"
            np.testing.assert_array_equal(tensors[key + "A.weight"], layer["a"][index].T)
            np.testing.assert_array_equal(tensors[key + "B.weight"], layer["b"][index].T)
    settings, tree = pair.ours(out)
    np.testing.assert_allclose(their_logits(pair.theirs(out)), pair.logits(settings, tree), atol=1e-4)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == config.student.path
    front, text, code = card_of(out)
    assert front["library_name"] == "peft" and "lora" in front["tags"] and front["license"] == "apache-2.0"
    assert "| test | likelihood | 12.50 | 8 | 1 |" in text and "older" not in text and "`golden`" in text
    assert ran(code)[0] == said(pair.student, settings, tree, config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_model(begun, tmp_path, dtype):
    pair, _, run, config = begun
    out = tmp_path / "merged"
    export(config, str(run), "hf", str(out), dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    assert model.dtype == getattr(torch, dtype)
    settings = config.adapter
    tree = {"lora": trained_lora(run, config)}
    if dtype == "bfloat16":  # of the rounded weights, as we read them
        pair, tree = copy.copy(pair), {}
        pair.student = load_student(str(out))
    np.testing.assert_allclose(their_logits(model.float()), pair.logits(settings, tree), atol=1e-4)
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(out), pair.student.tokenizer
    messages = [{"role": "user", "content": "Which  of these? 12 é\n"}]
    for one in (
        lambda t: t(messages[0]["content"])["input_ids"],
        lambda t: t.apply_chat_template(messages, tokenize=False),
    ):
        assert one(tokenizer) == one(ours)
    assert model.generation_config.eos_token_id == list(pair.student.eos_ids)
    front, _, code = card_of(out)
    assert front["library_name"] == "transformers"
    if dtype == "float32":
        assert ran(code)[0] == said(pair.student, settings, tree, config)


def test_bare_and_full_students_are_models_too(begun, tmp_path):
    pair, _, _, config = begun
    config = config.copy_and_resolve_references()
    config.adapter.peft, config.eval.checkpoint = "", "none"
    export(config, str(tmp_path), "hf", str(tmp_path / "bare"))
    bare = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bare").eval()
    np.testing.assert_array_equal(their_logits(bare), their_logits(pair.reference()))
    config.adapter.methods = ("full",)
    student = load_student(str(pair.directory))
    tree = jax.tree.map(lambda leaf: 1.1 * leaf, init_adapter(config.adapter, student.config, student.params, 0))
    (tmp_path / "full").mkdir()
    verb._write_model(config.adapter, student, tree, tmp_path / "full", "float32")
    full = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    for name, values in full.state_dict().items():
        torch.testing.assert_close(values, 1.1 * pair.reference().state_dict()[name])


def test_a_card_writes_the_prompt_of_training_whatever_its_parts_would_merge_into(begun, tmp_path):
    """By a vocabulary with a token for a question mark and the line's end behind it, as Llama 3's and Qwen's."""
    pair, _, _, config = begun
    base = Path(shutil.copytree(pair.directory, tmp_path / "base"))
    vocabulary = byte_tokenizer().get_vocab() | {"?\u010a": 260}
    model = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    model.model = models.BPE(vocab=vocabulary, merges=[("?", "\u010a")])
    ends = dict(eos_token="<|im_end|>", pad_token="<|pad|>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, **ends).save_pretrained(base)
    config = config.copy_and_resolve_references()
    config.student.path, config.adapter.peft, config.eval.checkpoint = str(base), "", "none"
    export(config, str(tmp_path), "hf", str(tmp_path / "out"))
    _, names = ran(card_of(tmp_path / "out")[2])
    student = load_student(str(base))
    assert names["inputs"]["input_ids"][0].tolist() == asked(student, config)
    assert 260 in student.tokenizer("".join(names["prompt"]))["input_ids"], "the trap"


def test_what_does_not_read_back_gets_no_name(begun, tmp_path, monkeypatch):
    _, _, run, config = begun
    write = peft_format.write_safetensors
    monkeypatch.setattr(
        peft_format, "write_safetensors", lambda path, tensors: write(path, {k: 1.01 * v for k, v in tensors.items()})
    )
    with pytest.raises(RuntimeError, match="other logits"):
        export(config, str(run), "peft", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_refusals(begun, tmp_path):
    pair, _, run, config = begun
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text("x")
    for arguments, words in [
        ((config, str(run), "peft", str(tmp_path / "kept")), "exists already"),
        ((config, "", "peft", str(tmp_path / "out")), "--workdir and --out"),
        ((config, str(run), "peft", str(tmp_path / "out"), "bfloat16"), "--format hf"),
        ((config, str(tmp_path / "nowhere"), "peft", str(tmp_path / "out")), "nowhere"),
    ]:
        with pytest.raises(UserError, match=words):
            export(*arguments)
    settings = config.adapter.copy_and_resolve_references()
    settings.methods = ("prompt",)
    student = load_student(str(pair.directory))
    with pytest.raises(UserError, match="prompt cannot be merged"):
        verb._write_model(
            settings, student, init_adapter(settings, student.config, student.params, 0), tmp_path, "float32"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept/file").read_text() == "x"


def test_command_line(begun, tmp_path):
    """The run's own configuration is used, and a mistake is one line."""
    _, _, run, _ = begun
    command = [sys.executable, "-m", "sqa_jax.export", "--workdir", str(run), "--out", str(tmp_path / "out")]
    result = subprocess.run([*command, "--config.eval.checkpoint=best"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "exists already" in result.stderr and len(result.stderr.splitlines()) == 1


def test_studies_train_new_adapters():
    from configs.study_test import get_config
    from sqa_jax.study.matrix import study_runs

    config = get_config()
    config.adapter.peft = "anything"
    with pytest.raises(UserError, match="config.adapter.peft"):
        study_runs(config)
