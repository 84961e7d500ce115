"""Tiny random T5 checkpoints, our model of their files, and what PyTorch computes with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from safetensors.numpy import load_file, save_file

from sqa_jax.batches.batch import Batch
from sqa_jax.batches.packing import Limits, pack_row
from sqa_jax.checkpoints.load import load_student
from sqa_jax.models.soft_tokens import with_soft_tokens
from sqa_jax.models.t5.model import T5
from tests.support.torch_models import write_checkpoint

START, END, VOCABULARY = 0, 1, 97
COMMON = dict(
    vocab_size=VOCABULARY, relative_attention_num_buckets=8, relative_attention_max_distance=20, eos_token_id=END,
    decoder_start_token_id=START, dropout_rate=0.0,
)  # fmt: skip
VARIANTS = {
    "1.1, untied, gated": dict(num_layers=3, num_decoder_layers=3),
    # transformers generates only if the encoder has at least as many layers as the decoder.
    "1.0, tied, relu": dict(
        feed_forward_proj="relu",
        tie_word_embeddings=True,
        scale_decoder_outputs=True,
        num_layers=5,
        num_decoder_layers=4,
    ),
    "flan": dict(num_layers=2, num_decoder_layers=2),
}
MAX_NEW_TOKENS, NEVER = 10, 96  # `NEVER` ends texts in both libraries


def ids(rng: np.random.Generator, *sizes: int) -> list[list[int]]:
    return [rng.integers(2, VOCABULARY, n).tolist() for n in sizes]


_RNG = np.random.default_rng(0)
SEQUENCES = list(zip(ids(_RNG, 6, 30, 1), ids(_RNG, 4, 26, 1), strict=True))
# They share a prefix, which an encoder cannot process alone; options share one, too.
PROMPTS = [[7, 8, 9] * 4 + prompt + [END, START] for prompt in ids(_RNG, 9, 4, 30, 12, 70)]
OPTIONS = [[[5, 6, 7], [5, 6, 9, 2], [5, 8]], [[3], [4]], ids(_RNG, 1, 22, 3)]  # of the first three prompts


class Checkpoint:
    """A random T5: its files, and our model and parameters of them."""

    def __init__(self, name: str, directory: Path):
        self.name = name.split(",")[0]
        self.directory = write_checkpoint(directory, "t5", **COMMON | VARIANTS[name])
        if not VARIANTS[name].get("tie_word_embeddings", False):
            _add_output_layer(self.directory / "model.safetensors")
        write_tokenizer(directory)
        student = load_student(str(directory))
        self.config, self.params, self.model = student.config, student.params, T5(student.config)


def _add_output_layer(file: Path) -> None:
    """An untied one, as T5 1.1 has: transformers' configuration does not say so, but the tensor does."""
    tensors = load_file(file)
    tensors["lm_head.weight"] = (
        np.random.default_rng(1).normal(0, 0.1, tensors["shared.weight"].shape).astype(np.float32)
    )
    for name in tensors:  # smaller attention scores, which are not divided by √d, amplify rounding less
        if name.endswith(".q.weight"):
            tensors[name] *= 0.5
    save_file(tensors, file, metadata={"format": "pt"})


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of few words, so that the directory can be loaded."""
    from tokenizers import Tokenizer, models

    words = ["<pad>", "</s>", "<unk>", *map(str, range(90))]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)


def packed_row(sequences, length: int, max_targets: int, soft_tokens: int = 0) -> Batch:
    """A batch of one row of (prompt, target) sequences, as training packs them."""
    tokens = [np.array(with_soft_tokens([*prompt, START, *target], soft_tokens), int) for prompt, target in sequences]
    prompts = [soft_tokens + len(prompt) + 1 for prompt, _ in sequences]
    row = pack_row(tokens, prompts, Limits(length, max_targets), START)
    return jax.tree.map(lambda values: jnp.asarray(values[None]), row)


def torch_logits(model, prompt: list[int], target: list[int]) -> np.ndarray:
    """Logits after a prompt, at the start token and at each token of the target: [1 + target, V]."""
    import torch

    with torch.no_grad():
        inputs = dict(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[START, *target]]))
        return model(**inputs).logits[0].numpy()


def torch_scores(model) -> dict[str, np.ndarray]:
    """Log-probabilities of each option's tokens, each option alone, as {"scores_PROMPT_OPTION": [tokens]}."""
    import torch

    found = {}
    for i, (prompt, options) in enumerate(zip(PROMPTS, OPTIONS, strict=False)):
        for j, option in enumerate(options):
            logits = torch.tensor(torch_logits(model, prompt[:-1], option[:-1])[-len(option) :])
            found[f"scores_{i}_{j}"] = torch.log_softmax(logits, -1)[range(len(option)), option].numpy()
    return found


def generated(model, prompt: list[int]) -> list[int]:
    """Greedy text by transformers' own `generate`."""
    import torch

    tokens = torch.tensor([prompt[:-1]])
    out = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=MAX_NEW_TOKENS, do_sample=False,
        eos_token_id=[NEVER], pad_token_id=0, decoder_start_token_id=START,
    )  # fmt: skip
    return out[0, 1:].tolist()


def generated_without_cache(model, prompt: list[int]) -> list[int]:
    """Greedy text by one forward pass per token: PEFT's own generation leaves a T5's prefix out."""
    text: list[int] = []
    while len(text) < MAX_NEW_TOKENS and text[-1:] != [NEVER]:
        text.append(int(torch_logits(model, prompt[:-1], text)[-1].argmax()))
    return text


def torch_results(model, greedy: Callable) -> dict[str, np.ndarray]:
    """Scores of the options, and a greedy text for each prompt, padded with -1."""
    texts = np.full((len(PROMPTS), MAX_NEW_TOKENS), -1)
    for row, prompt in zip(texts, PROMPTS, strict=True):
        text = greedy(model, prompt)
        row[: len(text)] = text
    return {**torch_scores(model), "texts": texts}
