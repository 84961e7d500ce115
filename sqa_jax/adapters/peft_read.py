"""Adapters that were trained with PEFT, read as ours; see `sqa_jax.adapters.peft_format` for the files.

What PEFT passes over with a warning (a tensor that no module takes, a module that no tensor fills) is an error here, and
so is every option that would change what the adapter computes and is not known here.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from sqa_jax.adapters import lora
from sqa_jax.adapters.peft_format import (
    CONFIG,
    EMBEDDINGS,
    WEIGHTS,
    lora_keys,
    lora_modules,
    stored_prefix,
    submodules,
)
from sqa_jax.adapters.prefix import depth
from sqa_jax.checkpoints.load import student_config
from sqa_jax.checkpoints.safetensors_file import open_safetensors
from sqa_jax.errors import UserError
from sqa_jax.files import local_path, read_json, sha256_file, sha256_json
from sqa_jax.models.decoder_config import StudentConfig
from sqa_jax.models.params import vision_linear_layers

Tree = dict[str, Any]

# Options that say where an adapter comes from, how it was begun or how it was trained, not what it computes.
_IGNORED_KEYS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
    "corda_config", "ensure_weight_tying", "eva_config", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "qalora_group_size", "runtime_config",
    "encoder_hidden_size", "init_weights", "num_attention_heads", "num_layers", "prefix_projection",
    "prompt_tuning_init", "prompt_tuning_init_text", "token_dim", "tokenizer_kwargs", "tokenizer_name_or_path",
}  # fmt: skip
_READ = {
    "alpha_pattern", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "r",
    "rank_pattern", "target_modules", "use_rslora", "num_transformer_submodules", "num_virtual_tokens",
}  # fmt: skip
# Ways to begin that move a part of the base's weights into A and B, so that these do not fit the base any more.
_MOVES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class PeftAdapter(NamedTuple):
    """An adapter from PEFT's files.

    Attributes:
      settings: of `config.adapter`, by flat keys such as "lora.rank".
      tree: as `sqa_jax.adapters.adapter.init_adapter` makes it with these settings, in NumPy.
      fingerprint: hash of the files.
    """

    settings: dict[str, Any]
    tree: Tree
    fingerprint: str


def resolve_peft_adapter(config) -> tuple[Any, PeftAdapter | None]:
    """The adapter that `config.adapter.peft` names, behind the configuration with that adapter's settings in it.

    Raises:
      UserError: as `read_peft`, or there is no such student.
    """
    if not config.adapter.peft:
        return config, None
    adapter = read_peft(config.adapter.peft, student_config(config.student.path, config.student.revision))
    config = config.copy_and_resolve_references()
    config.adapter.update_from_flattened_dict(adapter.settings)
    return config, adapter


def read_peft(directory: str | Path, student: StudentConfig) -> PeftAdapter:
    """Reads a directory with PEFT's two files, or one with such a folder for each of several methods.

    Raises:
      UserError: a file is missing or damaged, the adapter is of a kind that is not supported, or it does not fit the
        student; the option, key or tensor is named.
    """
    root = local_path(directory, "an adapter of PEFT")
    folders = [root] if (root / CONFIG).exists() else sorted(file.parent for file in root.glob(f"*/{CONFIG}"))
    if not folders:
        raise UserError(
            f"{root}: holds no {CONFIG}; config.adapter.peft is a directory that PEFT saved an adapter in "
            "(fetch one from the hub with: hf download OWNER/NAME --local-dir DIR)"
        )
    settings, tree = {}, {}
    for files in map(_Files, folders):
        method, read = _READERS[files.kind]
        if method in tree:
            raise UserError(f"{root}: holds two adapters for {method}; name the folder of one of them")
        own, tree[method] = files.guarded(read, student)
        settings |= {f"{method}.{key}": value for key, value in own.items()}
    hashes = [sha256_file(folder / name) for folder in folders for name in (CONFIG, WEIGHTS)]
    return PeftAdapter({"methods": tuple(tree), **settings}, tree, sha256_json(hashes))


class _Files:
    """One adapter's two files, and what can be wrong with them.

    Attributes:
      config: what `adapter_config.json` holds.
      kind: PEFT's name of the method.
      keys: of its tensors.
    """

    def __init__(self, folder: Path):
        self.where = folder / CONFIG
        self.config = read_json(self.where, "what kind of adapter it is")
        if not isinstance(self.config, dict):
            raise UserError(f"{self.where}: not a JSON object; save the adapter again with PEFT")
        self.kind = str(self.config.get("peft_type"))
        if self.kind not in _READERS:
            raise UserError(f"{self.where}: peft_type {self.kind!r} is not supported; supported: {', '.join(_READERS)}")
        for key, value in self.config.items():
            if key not in _IGNORED_KEYS | _READ and value not in (None, False, "none", [], {}):
                raise UserError(f"{self.where}: {key} = {value!r} is not supported; train the adapter without it")
        self._file = folder / WEIGHTS
        if not self._file.exists() and (folder / "adapter_model.bin").exists():
            raise UserError(
                f"{folder}: adapter_model.bin is pickled, which is not read; load it with PEFT and save it again, "
                f"which writes {WEIGHTS}"
            )
        self._handle = open_safetensors(self._file)
        self.keys = set(self._handle.keys())

    def guarded(self, read, student: StudentConfig) -> tuple[dict[str, Any], Tree]:
        """Calls a reader; what a damaged value in `adapter_config.json` makes of it becomes a `UserError`."""
        try:
            return read(self, student)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, re.error) as error:
            raise UserError(
                f"{self.where}: a value is missing or not of the kind that PEFT writes ({type(error).__name__}: {error}); "
                "save the adapter again with PEFT"
            ) from None

    def read(self, expected: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """All tensors, in float32; they are exactly those expected, {key: shape}."""
        another = f"the adapter is for another base ({self.config.get('base_model_name_or_path')}) or for another version of it"
        if extra := sorted(self.keys - set(expected)):
            more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
            raise UserError(
                f"{self._file}: tensor {extra[0]}{more} is for nothing that {CONFIG} adapts and the student has; {another}"
            )
        for key, shape in expected.items():
            if key not in self.keys:
                raise UserError(
                    f"{self._file}: tensor {key} {shape} is missing, but {CONFIG} asks for it; save the adapter again with PEFT"
                )
            if (found := tuple(self._handle.get_slice(key).get_shape())) != shape:
                raise UserError(
                    f"{self._file}: tensor {key} has shape {found}, but the student needs {shape}; {another}"
                )
        return {key: np.asarray(self._handle.get_tensor(key), np.float32) for key in expected}


def _read_lora(files: _Files, student: StudentConfig) -> tuple[dict[str, Any], Tree]:
    """LoRA of any ranks and scales as one stacked tree of the largest rank.

    What is missing in rank is zero in both a and b: it adds nothing, has no gradient and stays zero, and so do layers
    without LoRA. The scale is the one that most modules have; the b of the others takes up what theirs differs by.
    """
    config, layers_of, modules = files.config, lora.adaptable(student), lora_modules(student, files.keys)
    began = str(config.get("init_lora_weights")).lower()
    if began.startswith(_MOVES_WEIGHTS):
        raise UserError(
            f"{files.where}: init_lora_weights = {began!r} has changed the base's weights; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, or begin in another way"
        )
    adapted = _adapted(files, [module for layers in modules.values() for module in layers])
    ranks = {module: int(_by_pattern(config.get("rank_pattern"), module, config["r"])) for module in adapted}
    alphas = {module: _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]) for module in adapted}
    rslora = bool(config.get("use_rslora"))
    shapes = {}
    for name, layers in modules.items():
        *_, width_in, width_out = layers_of[name].shape
        for module in filter(ranks.__contains__, layers):
            shapes |= dict(zip(lora_keys(module), [(ranks[module], width_in), (width_out, ranks[module])], strict=True))
    tensors = files.read(shapes)

    rank = max(ranks.values())
    counts = collections.Counter((ranks[module], alphas[module]) for module in adapted)
    usual, alpha = max(counts, key=lambda pair: (counts[pair], pair))
    names = [name for name, layers in modules.items() if not ranks.keys().isdisjoint(layers)]
    settings = {
        "rank": rank,
        "alpha": float(alpha * (rank / usual) ** (0.5 if rslora else 1.0)),
        "rslora": rslora,
        "targets": tuple(dict.fromkeys(map(lora.target_of, names))),
        "tower": any(name in vision_linear_layers(student) for name in names),
    }
    unit = lora.scale(SimpleNamespace(**settings))
    tree = {}
    for name, leaf in lora.adaptable(student, settings["tower"]).items():
        if lora.target_of(name) not in settings["targets"]:
            continue
        *_, width_in, width_out = leaf.shape
        a = np.zeros((len(modules[name]), width_in, rank), np.float32)
        b = np.zeros((len(modules[name]), rank, width_out), np.float32)
        for index, module in enumerate(modules[name]):
            if module in ranks:
                own, (key_a, key_b) = ranks[module], lora_keys(module)
                scale = lora.scale(SimpleNamespace(alpha=alphas[module], rank=own, rslora=rslora))
                a[index, :, :own] = tensors[key_a].T
                b[index, :own] = tensors[key_b].T * np.float32(scale / unit)
        tree[name] = {"a": a, "b": b} if leaf.stacked else {"a": a[0], "b": b[0]}
    return settings, tree


def _adapted(files: _Files, modules: list[str]) -> list[str]:
    """The modules that `adapter_config.json` means, as `peft.tuners.tuners_utils.check_target_module_exists` tells.

    Raises:
      UserError: it names modules that the student does not have.
    """
    config = files.config
    targets, excluded = config["target_modules"], config.get("exclude_modules") or ()
    if str(targets).lower() == "all-linear":
        targets = list(modules)
    entries = [targets] if isinstance(targets, str) else [[name] for name in targets]
    unknown = [entry for entry in entries if not any(_means(entry, m) for m in modules)]
    if unknown or not entries:
        last = dict.fromkeys(module.rpartition(".")[2] for module in modules)
        raise UserError(
            f"{files.where}: target_modules {', '.join(map(repr, unknown)) or 'is empty'}: the student has no such linear "
            f"layer that LoRA may adapt; it has {', '.join(last)}"
        )
    adapted = [m for m in modules if _means(targets, m) and not _means(excluded, m)]
    layers = config.get("layers_to_transform")
    if layers is not None and layers != []:
        layers = [layers] if isinstance(layers, int) else layers
        adapted = [m for m in adapted if m in targets or _layer(config.get("layers_pattern"), m) in layers]
    if not adapted:
        raise UserError(
            f"{files.where}: exclude_modules and layers_to_transform leave no module of the student; "
            "the adapter is for another base"
        )
    return adapted


def _means(names: str | Iterable[str], module: str) -> bool:
    """Whether a regular expression, or one of some names or ends of names, is the module."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _layer(pattern: str | list[str] | None, module: str) -> int | None:
    """The number of a module's layer; `pattern` is what stands in front of it, or one of several."""
    patterns = [pattern] if isinstance(pattern, str) else pattern
    for one in patterns or [r"[^.]*"]:
        if match := re.match(rf"(?:^|.*?\.){one}\.(\d+)\.", module):
            return int(match[1])
    return None


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a module's name matches, as `peft.utils.other.get_pattern_key`."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _read_prefix(files: _Files, student: StudentConfig) -> tuple[dict[str, Any], Tree]:
    length, width = _length(files, student), student.num_kv_heads * student.head_dim
    flat = files.read({EMBEDDINGS: (length, 2 * student.num_layers * width)})[EMBEDDINGS]
    stacked = flat.reshape(length, student.num_layers, 2, width).transpose(2, 1, 0, 3)
    own = stacked[:, stored_prefix(student)[: depth(student)]]
    tree = dict(zip(("key", "value"), map(np.ascontiguousarray, own), strict=True))
    return {"length": length, "reparametrize": False}, tree


def _read_prompt(files: _Files, student: StudentConfig) -> tuple[dict[str, Any], Tree]:
    length = _length(files, student)
    stored = files.read({EMBEDDINGS: (submodules(student) * length, student.hidden_size)})[EMBEDDINGS]
    return {"length": length}, {"embedding": stored[:length]}


def _length(files: _Files, student: StudentConfig) -> int:
    found, stacks = files.config.get("num_transformer_submodules"), submodules(student)
    if found not in (None, stacks):
        raise UserError(
            f"{files.where}: num_transformer_submodules is {found}, but the student has {stacks}; the adapter is for another "
            "base, or of a kind that is not supported"
        )
    return int(files.config["num_virtual_tokens"])


_READERS = {
    "LORA": ("lora", _read_lora),
    "PREFIX_TUNING": ("prefix", _read_prefix),
    "PROMPT_TUNING": ("prompt", _read_prompt),
}
