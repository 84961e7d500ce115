"""Tiny models of each family, in PyTorch with PEFT and as our students: what tests of adapters' files compare."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import peft
import torch
import transformers

from sqa_jax.adapters import adapter as adapters
from sqa_jax.adapters.peft_read import read_peft
from sqa_jax.config import default
from sqa_jax.inference.generate import Generator
from sqa_jax.parallel.mesh import make_mesh
from sqa_jax.students.decoder import Decoder
from sqa_jax.students.load import load_student
from sqa_jax.students.tokenizer import byte_tokenizer

VOCABULARY, SIZES = 264, dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
# A family is one line: any decoder that `load_student` reads, tiny, with grouped-query heads.
FAMILIES = {"llama": transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **SIZES)}
TOKENS = np.random.default_rng(0).integers(4, VOCABULARY, (2, 9))
ENDS = 1  # a token that ends texts, in both libraries


class Pair:
    """A tiny random model of a family, in PyTorch and as our student."""

    def __init__(self, family: str, directory: Path):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
        self.directory, self.student = directory, load_student(str(directory))

    def reference(self):
        return transformers.AutoModelForCausalLM.from_pretrained(self.directory).eval()

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

    def logits(self, settings, tree, tokens=TOKENS) -> np.ndarray:
        virtual = adapters.virtual_tokens(settings)
        tokens = np.pad(tokens, ((0, 0), (virtual, 0)))
        positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
        config = self.student.config
        out, _ = jax.jit(
            lambda tree, base: Decoder(config).apply(
                {"params": base}, tokens, positions, np.ones_like(tokens), adapters.activate(settings, tree, config),
                method="logits",
            )
        )(tree, self.student.params)  # fmt: skip
        return np.asarray(out)[:, virtual:]

    def generated(self, settings, tree) -> list[list[int]]:
        mesh = make_mesh(default().mesh, jax.devices()[:1])
        generator = Generator(settings, Decoder(self.student.config), mesh, [ENDS], 12, len(TOKENS))
        return [ids for _, ids in sorted(generator(tree, self.student.params, TOKENS.tolist()))]


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits[:, -TOKENS.shape[1] :].numpy()


def their_texts(model) -> list[list[int]]:
    """Greedy texts by PEFT's forward pass: with transformers 5.24, `generate` of peft 0.21 loses prefixes and prompts."""
    texts = []
    for row in TOKENS.tolist():
        ids = list(row)
        while len(ids) < len(row) + 12:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == ENDS:
                ids.pop()
                break
        texts.append(ids[len(row) :])
    return texts
