"""The same work with transformers + PEFT, as their documentation does it, without needless slowdowns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from sqa_jax.files import read_json
from tests.benchmarks.grouping import group_by_length
from tests.benchmarks.process import PRODUCTS, WARM, cores, host_peak, seconds_of, serve


def train(root: Path, started: float) -> dict[str, Any]:
    """Each step's examples padded to the longest of them."""
    work = _work(root)
    return _train(root, work, work["batches"], started)


def train_grouped(root: Path, started: float) -> dict[str, Any]:
    """The same examples regrouped, so that those of a step are of like length (the Trainer's `group_by_length`)."""
    work = _work(root)
    return _train(root, work, group_by_length(work["batches"]), started)


def _train(root: Path, work: dict[str, Any], batches: Sequence[Sequence[dict]], started: float) -> dict[str, Any]:
    model = _model(root, work, training=True)
    collate = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(root / "student", padding_side="right"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = work["optimizer"]
    optimizer = torch.optim.AdamW(
        trained, betas=(settings["b1"], settings["b2"]), weight_decay=settings["weight_decay"]
    )
    losses, norms = [], []
    for number, (batch, rate) in enumerate(zip(batches, work["rates"], strict=True), start=1):
        inputs = collate([_feature(**example) for example in batch]).to(model.device)
        # Of bfloat16 weights PEFT keeps the adapter in float32; autocast is how a Trainer with bf16=True computes.
        with torch.autocast(work["device"], torch.bfloat16, enabled=work["dtype"] == "bfloat16"):
            loss = model(**inputs).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, settings["clip_norm"]).detach())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if number == 1:
            _wait()
            first = time.time() - started
        if number == WARM:
            _wait()
            clock = time.perf_counter()
    _wait()
    seconds = time.perf_counter() - clock
    tokens = sum(len(example["tokens"]) for batch in batches[WARM:] for example in batch)
    return {
        "rate": tokens / seconds,
        "first_step_s": first,
        "peak_bytes": _peak(),
        "losses": [float(loss) for loss in losses],
        "gradient_norms": [float(norm) for norm in norms],
    }


@torch.no_grad()
def likelihood(root: Path, _: float) -> dict[str, Any]:
    """Log-likelihood of each option after its whole prompt, in padded batches of like length."""
    work = _work(root)
    model = _model(root, work)
    pad = AutoTokenizer.from_pretrained(root / "student").pad_token_id
    asked = [
        (prompt + option, len(prompt), question, number)
        for question, (prompt, options) in enumerate(zip(work["prompts"], work["options"], strict=True))
        for number, option in enumerate(options)
    ]
    asked.sort(key=lambda one: -len(one[0]))  # the longest first, so that running out of memory shows at once
    size = work["batch_options"]
    batches = [asked[start : start + size] for start in range(0, len(asked), size)]
    scores = [[0.0] * len(options) for options in work["options"]]

    def score(batch) -> None:
        tokens, mask = _padded([ids for ids, *_ in batch], pad, model.device)
        logits = model(input_ids=tokens, attention_mask=mask).logits
        for row, (ids, begin, question, number) in enumerate(batch):
            log_probs = logits[row, begin - 1 : len(ids) - 1].float().log_softmax(-1)
            scores[question][number] = log_probs.gather(-1, tokens[row, begin : len(ids), None]).sum().item()

    score(batches[0])
    _wait()
    clock = time.perf_counter()
    for batch in batches:
        score(batch)
    _wait()
    seconds = time.perf_counter() - clock
    answers = [int(np.argmax(of_question)) for of_question in scores]
    return {"rate": len(answers) / seconds, "peak_bytes": _peak(), "answers": answers}


@torch.no_grad()
def generate(root: Path, _: float) -> dict[str, Any]:
    """`generate`, greedy, of left-padded prompts of like length."""
    work = _work(root)
    model, tokenizer = _model(root, work), AutoTokenizer.from_pretrained(root / "student")
    order = sorted(range(len(work["prompts"])), key=lambda k: len(work["prompts"][k]))
    size = work["batch_questions"]
    texts, generated = [""] * len(order), 0

    def continue_prompts(members: Sequence[int], max_new_tokens: int) -> list[list[int]]:
        tokens, mask = _padded([work["prompts"][k] for k in members], tokenizer.pad_token_id, model.device, left=True)
        out = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
        return out[:, tokens.shape[1] :].tolist()

    continue_prompts(order[:size], 2)
    _wait()
    clock = time.perf_counter()
    for start in range(0, len(order), size):
        members = order[start : start + size]
        for k, ids in zip(members, continue_prompts(members, work["max_new_tokens"]), strict=True):
            length = next((index for index, token in enumerate(ids) if token in work["ends"]), len(ids))
            generated += min(length + 1, work["max_new_tokens"])
            texts[k] = tokenizer.decode(ids[:length], skip_special_tokens=True)
    seconds = time.perf_counter() - clock
    return {"rate": generated / seconds, "peak_bytes": _peak(), "texts": texts}


def products(root: Path, _: float) -> dict[str, float]:
    """The forward pass's matrix products with weights, and nothing else, in PyTorch."""
    work, total = _work(root), 0.0
    like = {"dtype": getattr(torch, work["dtype"]), "device": work["device"]}
    for times, n, width_in, width_out in work["products"]:
        x, w = torch.randn((n, width_in), **like), torch.randn((width_in, width_out), **like)

        def multiply(x=x, w=w) -> None:
            for _ in range(PRODUCTS):
                torch.matmul(x, w)
            _wait()

        total += times * seconds_of(multiply) / PRODUCTS
    return {"seconds": total}


def _work(root: Path) -> dict[str, Any]:
    torch.set_num_threads(cores())  # as many as XLA uses
    return read_json(root / "work.json", "the work of this benchmark")


def _model(root: Path, work: dict[str, Any], training: bool = False) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(root / "student", dtype=getattr(torch, work["dtype"]))
    model = PeftModel.from_pretrained(
        base.to(work["device"]), root / "adapter", is_trainable=training, autocast_adapter_dtype=training
    )
    return model.train(training)


def _feature(tokens: list[int], prompt_length: int) -> dict[str, list[int]]:
    return {"input_ids": tokens, "labels": [-100] * prompt_length + tokens[prompt_length:]}


def _padded(
    rows: Sequence[list[int]], pad: int, device: torch.device, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] ids and attention mask."""
    width = max(map(len, rows))
    tokens, mask = torch.full((len(rows), width), pad), torch.zeros((len(rows), width), dtype=torch.long)
    for row, ids in enumerate(rows):
        span = slice(width - len(ids), None) if left else slice(len(ids))
        tokens[row, span], mask[row, span] = torch.tensor(ids), 1
    return tokens.to(device), mask.to(device)


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else host_peak()


if __name__ == "__main__":
    tasks = (train, train_grouped, likelihood, generate, products)
    serve({task.__name__: task for task in tasks})
