"""Tiny models of each family, in PyTorch with PEFT and as our students: what tests of adapters' files compare."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import peft
import torch
import transformers

from sqa_jax import adapters
from sqa_jax.adapters.peft_read import read_peft
from sqa_jax.checkpoints.load import load_student
from sqa_jax.checkpoints.tokenizer import byte_tokenizer
from sqa_jax.config import default
from sqa_jax.inference.generate import Generator
from sqa_jax.models.api import module_for
from sqa_jax.models.soft_tokens import with_soft_tokens
from sqa_jax.parallel.mesh import make_mesh
from tests.support.torch_models import ENCODER_DECODERS, FAMILIES, make_model

TOKENS = np.random.default_rng(0).integers(4, 264, (2, 9))
ENDS = 1  # a token that ends texts, in both libraries
START = 0  # what the decoder of an encoder–decoder starts from


class Pair:
    """A tiny random model of a family, in PyTorch and as our student."""

    def __init__(self, family: str, directory: Path):
        kind, options = (FAMILIES | ENCODER_DECODERS)[family]
        make_model(kind, **options).save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
        self.directory, self.student = directory, load_student(str(directory))
        self.encodes = family == "t5"
        self.module = module_for(self.student.config)(self.student.config)
        # A prompt ends with the token that a decoder starts from, and is gone on with the same tokens.
        self.prompts = np.pad(TOKENS, ((0, 0), (0, 1)), constant_values=START) if self.encodes else TOKENS
        self.rows = np.concatenate([self.prompts, TOKENS[:, :5]], axis=1) if self.encodes else TOKENS

    def reference(self):
        auto = transformers.AutoModelForSeq2SeqLM if self.encodes else transformers.AutoModelForCausalLM
        return auto.from_pretrained(self.directory).eval()

    def config(self, method: str) -> peft.PeftConfig:
        """A usual configuration of PEFT for this family."""
        task = "SEQ_2_SEQ_LM" if self.encodes else "CAUSAL_LM"
        targets = ["q", "v", "wo"] if self.encodes else ["q_proj", "v_proj", "down_proj"]
        if method == "lora":
            return peft.LoraConfig(task_type=task, r=4, lora_alpha=6, target_modules=targets)
        if method == "prompt":
            return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3)
        shape = (
            dict(num_layers=2, num_attention_heads=4, token_dim=40) if self.encodes else {}
        )  # PEFT takes D for H · d
        projected = dict(prefix_projection=True, encoder_hidden_size=24) if method == "projected prefix" else {}
        return peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=5, **shape, **projected)

    def save(self, config: peft.PeftConfig, directory: Path) -> Path:
        """An adapter as PEFT makes and saves it, of which every parameter is random."""
        model = peft.get_peft_model(self.reference(), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.3)
        model.save_pretrained(directory)
        return directory

    def theirs(self, directory: Path) -> peft.PeftModel:
        """An adapter as PEFT loads it, with each of its tensors in the file and each of the file's in it."""
        model = peft.PeftModel.from_pretrained(self.reference(), directory).eval()
        weights = peft.utils.load_peft_weights(directory, device="cpu")
        if model.active_peft_config.peft_type == "LORA":
            result = peft.set_peft_model_state_dict(model, weights)
            assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
            assert len(weights) == sum("lora_" in name for name, _ in model.named_parameters())
        return model

    def ours(self, directory: Path):
        """(settings, tree) of PEFT's files."""
        read, settings = read_peft(directory, self.student.config), default().adapter
        settings.update_from_flattened_dict(read.settings)
        return settings, read.tree

    def logits(self, settings, tree) -> np.ndarray:
        """Of the tokens that a decoder reads."""
        virtual = adapters.soft_prompt_tokens(settings).count
        tokens = np.asarray([with_soft_tokens(row, virtual) for row in self.rows])
        positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))

        def read(tree, base):
            adaptation = adapters.adapter_inputs(settings, tree, self.student.config)
            return self.module.apply(
                {"params": base}, tokens, positions, np.ones_like(tokens), adaptation, method="logits"
            )[0]

        own = slice(virtual + TOKENS.shape[1] if self.encodes else virtual, None)
        return np.asarray(jax.jit(read)(tree, self.student.params))[:, own]

    def generated(self, settings, tree) -> list[list[int]]:
        mesh = make_mesh(default().mesh, jax.devices()[:1])
        generator = Generator(settings, self.module, mesh, [ENDS], 12, len(TOKENS))
        prompts = [
            with_soft_tokens(prompt, adapters.soft_prompt_tokens(settings).count) for prompt in self.prompts.tolist()
        ]
        return [ids for _, ids in sorted(generator(tree, self.student.params, prompts))]


def _call(model, prompt: np.ndarray, behind: np.ndarray):
    """PEFT's logits at the last tokens: of a prompt [B, T] and what stands behind it, [B, n]."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            started = np.pad(behind, ((0, 0), (1, 0)), constant_values=START)
            return model(input_ids=torch.tensor(prompt), decoder_input_ids=torch.tensor(started)).logits.numpy()
        tokens = np.concatenate([prompt, behind], axis=1)
        return model(torch.tensor(tokens)).logits[:, -tokens.shape[1] :].numpy()


def their_logits(model) -> np.ndarray:
    return _call(model, TOKENS, TOKENS[:, : 5 * model.config.is_encoder_decoder])


def their_texts(model) -> list[list[int]]:
    """Greedy texts by PEFT's forward pass: with transformers 5.24, `generate` of peft 0.21 loses prefixes and prompts."""
    texts = []
    for row in TOKENS:
        ids: list[int] = []
        while len(ids) < 12:
            ids.append(int(_call(model, row[None], np.asarray([ids], int).reshape(1, -1))[0, -1].argmax()))
            if ids[-1] == ENDS:
                ids.pop()
                break
        texts.append(ids)
    return texts
