"""A tiny model of a family as PEFT has it and as our student, and adapters that PEFT itself saved.

Adapters are committed in `tests/references/peft/NAME/` as PEFT wrote them; with `--reference` they are made again and
compared, and with `--remake` written. What needs PyTorch or PEFT is a method of `Pair` that imports it itself.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from sqa_jax import adapters
from sqa_jax.adapters.peft_format import CONFIG, WEIGHTS
from sqa_jax.adapters.peft_read import read_peft
from sqa_jax.checkpoints.load import load_student
from sqa_jax.checkpoints.tokenizer import byte_tokenizer
from sqa_jax.config import default
from sqa_jax.inference.generate import Generator
from sqa_jax.models.api import model_class
from sqa_jax.models.soft_tokens import with_soft_tokens
from sqa_jax.parallel.mesh import make_mesh
from tests.support.references import FOLDER, References
from tests.support.torch_models import ENCODER_DECODERS, FAMILIES, torch_model, write_checkpoint

if TYPE_CHECKING:
    import peft

METHODS = ("lora", "prefix", "projected prefix", "prompt")
TOKENS = np.random.default_rng(0).integers(4, 264, (2, 9))
EOS = 1  # a token that ends texts, in both libraries
START = 0  # what the decoder of an encoder–decoder starts from
COLUMNS = slice(None, None, 5)  # of the logits that are committed
# Of adapters of the tiny Llama: LoRA of some layers, one of them of a smaller rank.
PARTIAL_LORA = dict(
    task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2],
    rank_pattern={r"2\.self_attn\.q_proj": 2},
)  # fmt: skip


class Pair:
    """A tiny random model of a family, as a directory of transformers and as our student."""

    def __init__(self, family: str, directory: Path):
        kind, options = (FAMILIES | ENCODER_DECODERS)[family]
        write_checkpoint(directory, kind, **options)
        byte_tokenizer().save_pretrained(directory)
        self.family, self.directory, self.student = family, directory, load_student(str(directory))
        self.is_encoder_decoder = self.student.config.is_encoder_decoder
        self.module = model_class(self.student.config)(self.student.config)
        self._compiled: dict[str, Callable[..., jax.Array]] = {}
        # A prompt ends with the token that a decoder starts from; the reply repeats its first tokens.
        self.prompts = np.pad(TOKENS, ((0, 0), (0, 1)), constant_values=START) if self.is_encoder_decoder else TOKENS
        self.rows = np.concatenate([self.prompts, TOKENS[:, :5]], axis=1) if self.is_encoder_decoder else TOKENS

    # ---- ours

    def read(self, directory: Path):
        """(settings, tree) of PEFT's files."""
        adapter, settings = read_peft(directory, self.student.config), default().adapter
        settings.update_from_flattened_dict(adapter.settings)
        return settings, adapter.tree

    def logits(self, settings, tree, params: Any = None) -> np.ndarray:
        """Of the decoder's tokens, [2, T, V]."""
        count = adapters.soft_prompt_tokens(settings).count if "prompt" in tree else 0
        tokens = jnp.asarray([with_soft_tokens(row, count) for row in self.rows])
        positions = jnp.tile(jnp.arange(tokens.shape[1]), (len(tokens), 1))

        def forward(tree, base, tokens, positions):
            adaptation = adapters.adapter_inputs(settings, tree, self.student.config)
            return self.module.apply(
                {"params": base}, tokens, positions, jnp.ones_like(tokens), adaptation, method="logits"
            )[0]

        compiled = self._compiled.setdefault(settings.to_json(), jax.jit(forward))  # one for all of equal settings
        decoder_tokens = slice(count + TOKENS.shape[1] if self.is_encoder_decoder else count, None)
        base = self.student.params if params is None else params
        return np.asarray(compiled(tree, base, tokens, positions))[:, decoder_tokens]

    def generated(self, settings, tree) -> list[list[int]]:
        """Greedy texts."""
        mesh = make_mesh(default().mesh, jax.devices()[:1])
        generator = Generator(settings, self.module, mesh, [EOS], 12, len(TOKENS))
        count = adapters.soft_prompt_tokens(settings).count
        prompts = [with_soft_tokens(prompt, count) for prompt in self.prompts.tolist()]
        return [ids for _, ids in sorted(generator(tree, self.student.params, prompts))]

    # ---- PEFT's, which `reference` commits

    def adapter(self, reference: References, method: str) -> Path:
        """A usual adapter of this family as PEFT saved it."""
        name = f"{self.family}-{method.replace(' ', '-')}"
        return peft_files(reference, name, lambda: (self, self.peft_config(method)))

    def expected(self, reference: References, method: str) -> dict[str, np.ndarray]:
        """PEFT's "logits" and greedy "texts" (padded with -1) with that adapter, and the base's."""

        def compute() -> dict[str, np.ndarray]:
            model, base = self.peft_model(self.adapter(reference, method)), torch_model(self.directory)
            arrays = {
                "logits": peft_logits(model)[..., COLUMNS],
                "base_logits": peft_logits(base)[..., COLUMNS],
                "texts": padded(peft_texts(model)),
                "base_texts": padded(peft_texts(base)),
            }
            assert np.abs(arrays["logits"] - arrays["base_logits"]).max() > 1e-2
            return arrays

        return reference(f"adapters/{self.family}-{method.replace(' ', '-')}", compute, tolerance=1e-4)

    # ---- what needs PyTorch and PEFT

    def peft_config(self, method: str) -> peft.PeftConfig:
        """A usual configuration of PEFT for this family."""
        import peft

        task = "SEQ_2_SEQ_LM" if self.is_encoder_decoder else "CAUSAL_LM"
        targets = ["q", "v", "wo"] if self.is_encoder_decoder else ["q_proj", "v_proj", "down_proj"]
        if method == "lora":
            return peft.LoraConfig(task_type=task, r=4, lora_alpha=6, target_modules=targets)
        if method == "prompt":
            return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3)
        # PEFT's default of token_dim is D, not H · d.
        shape = dict(num_layers=2, num_attention_heads=4, token_dim=40) if self.is_encoder_decoder else {}
        projected = dict(prefix_projection=True, encoder_hidden_size=24) if method == "projected prefix" else {}
        return peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=5, **shape, **projected)

    def save_adapter(self, config: peft.PeftConfig, directory: Path) -> None:
        """An adapter as PEFT makes and saves it, every parameter of which is random."""
        import peft
        import torch

        model = peft.get_peft_model(torch_model(self.directory), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    rng = np.random.default_rng([1, zlib.crc32(name.encode())])
                    parameter.copy_(torch.tensor(rng.normal(0, 0.3, tuple(parameter.shape))))
        model.save_pretrained(directory)

    def peft_model(self, directory: Path) -> peft.PeftModel:
        """An adapter as PEFT loads it, with each of its tensors in the file and each of the file's in it."""
        import peft

        model = peft.PeftModel.from_pretrained(torch_model(self.directory), directory).eval()
        weights = peft.utils.load_peft_weights(directory, device="cpu")
        if model.active_peft_config.peft_type == "LORA":
            result = peft.set_peft_model_state_dict(model, weights)
            assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
            assert len(weights) == sum("lora_" in name for name, _ in model.named_parameters())
        return model


def peft_files(reference: References, name: str, make: Callable[[], tuple[Pair, peft.PeftConfig]]) -> Path:
    """The folder of a committed adapter that PEFT saved; made anew and compared with `--reference`.

    Args:
      name: of the folder in `tests/references/peft`.
      make: returns the model and PEFT's configuration of the adapter.
    """
    folder = FOLDER / "peft" / name
    if not reference.live:
        assert folder.exists(), f"{folder} is missing: run `bash launch/test.sh --reference --remake` and commit it"
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        pair, config = make()
        pair.save_adapter(config, Path(temporary))
        raw = json.loads(Path(temporary, CONFIG).read_text()) | {"base_model_name_or_path": "base"}
        sets = ("target_modules", "exclude_modules")  # in PEFT, whose order in the file is any
        raw |= {key: sorted(raw[key]) for key in sets if isinstance(raw.get(key), list)}
        if reference.remake:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / CONFIG).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
            shutil.copyfile(Path(temporary, WEIGHTS), folder / WEIGHTS)
        assert json.loads((folder / CONFIG).read_text()) == raw, f"{folder} has another configuration"
        committed, made = load_file(folder / WEIGHTS), load_file(Path(temporary, WEIGHTS))
        assert committed.keys() == made.keys(), f"{folder} has other tensors"
        for key, values in made.items():
            np.testing.assert_allclose(committed[key], values, atol=1e-5, err_msg=key)
    return folder


def padded(texts: list[list[int]]) -> np.ndarray:
    """Texts of different lengths as one array, filled with -1."""
    length = max(map(len, texts))
    return np.asarray([text + [-1] * (length - len(text)) for text in texts], np.int32)


def _call(model, prompt: np.ndarray, reply: np.ndarray) -> np.ndarray:
    """PyTorch's logits at the decoder's tokens of a prompt [B, T] and the start of a reply, [B, n]."""
    import torch

    with torch.no_grad():
        if model.config.is_encoder_decoder:
            decoder_input = np.pad(reply, ((0, 0), (1, 0)), constant_values=START)
            return model(input_ids=torch.tensor(prompt), decoder_input_ids=torch.tensor(decoder_input)).logits.numpy()
        tokens = np.concatenate([prompt, reply], axis=1)
        return model(torch.tensor(tokens)).logits[:, -tokens.shape[1] :].numpy()


def peft_logits(model) -> np.ndarray:
    """A PyTorch model's logits of `Pair.rows`, with or without PEFT."""
    return _call(model, TOKENS, TOKENS[:, : 5 * model.config.is_encoder_decoder])


def peft_texts(model) -> list[list[int]]:
    """Greedy texts by PEFT's forward pass: with transformers 5.24, `generate` of peft 0.21 loses prefixes and prompts."""
    texts = []
    for row in TOKENS:
        ids: list[int] = []
        while len(ids) < 12:
            ids.append(int(_call(model, row[None], np.asarray([ids], int).reshape(1, -1))[0, -1].argmax()))
            if ids[-1] == EOS:
                ids.pop()
                break
        texts.append(ids)
    return texts
