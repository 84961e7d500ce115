"""Adapters that were trained with PEFT, read as our trees; see `sqa_jax.adapters.peft_format` for the files.

What PEFT ignores with a warning (a tensor that no module takes, a module without a tensor) is an error here, and so is
every option that would change what the adapter computes and is not implemented here.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sqa_jax.adapters import lora
from sqa_jax.adapters.peft_format import (
    CONFIG,
    EMBEDDINGS,
    WEIGHTS,
    lora_keys,
    lora_modules,
    num_submodules,
    prefix_layers_in_file,
)
from sqa_jax.adapters.prefix import num_prefixes
from sqa_jax.checkpoints.load import student_config
from sqa_jax.checkpoints.safetensors_file import open_safetensors
from sqa_jax.errors import UserError
from sqa_jax.files import local_path, read_json, sha256_file, sha256_json
from sqa_jax.models.param_spec import ParamSpec, ParamTree
from sqa_jax.models.params import vision_linear_layers
from sqa_jax.models.student_config import StudentConfig

# Options that say where an adapter comes from, how it was initialised or how it was trained, not what it computes.
_IGNORED_KEYS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
    "corda_config", "ensure_weight_tying", "eva_config", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "qalora_group_size", "runtime_config",
    "encoder_hidden_size", "init_weights", "num_attention_heads", "num_layers", "prefix_projection",
    "prompt_tuning_init", "prompt_tuning_init_text", "token_dim", "tokenizer_kwargs", "tokenizer_name_or_path",
}  # fmt: skip
_SUPPORTED_KEYS = {
    "alpha_pattern", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "r",
    "rank_pattern", "target_modules", "use_rslora", "num_transformer_submodules", "num_virtual_tokens",
}  # fmt: skip
# Initialisations that move a part of the base's weights into A and B, so that these do not fit the base any more.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class PeftAdapter(NamedTuple):
    """An adapter from PEFT's files.

    Attributes:
      settings: values for `config.adapter`, by flat keys such as "lora.rank".
      tree: as `sqa_jax.adapters.adapter.init_adapter` makes it with these settings, in NumPy.
      fingerprint: hash of the files.
    """

    settings: dict[str, Any]
    tree: ParamTree
    fingerprint: str


def resolve_peft_adapter(config: Any) -> tuple[Any, PeftAdapter | None]:
    """(configuration with that adapter's settings, the adapter that `config.adapter.peft` names), or None for neither.

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
        method_settings, tree[method] = files.guarded(read, student)
        settings |= {f"{method}.{key}": value for key, value in method_settings.items()}
    hashes = [sha256_file(folder / name) for folder in folders for name in (CONFIG, WEIGHTS)]
    return PeftAdapter({"methods": tuple(tree), **settings}, tree, sha256_json(hashes))


class _Files:
    """One adapter's two files, checked.

    Attributes:
      config: the content of `adapter_config.json`.
      kind: PEFT's name of the method.
      keys: names of its tensors.
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
            if key not in _IGNORED_KEYS | _SUPPORTED_KEYS and value not in (None, False, "none", [], {}):
                raise UserError(f"{self.where}: {key} = {value!r} is not supported; train the adapter without it")
        self._file = folder / WEIGHTS
        if not self._file.exists() and (folder / "adapter_model.bin").exists():
            raise UserError(
                f"{folder}: adapter_model.bin is pickled, which is not read; load it with PEFT and save it again, "
                f"which writes {WEIGHTS}"
            )
        self._handle = open_safetensors(self._file)
        self.keys = set(self._handle.keys())

    def guarded(self, read: _Reader, student: StudentConfig) -> tuple[dict[str, Any], ParamTree]:
        """Calls a reader; an exception from a damaged value in `adapter_config.json` becomes a `UserError`."""
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


_Reader = Callable[[_Files, StudentConfig], tuple[dict[str, Any], ParamTree]]


class _ModuleScale(NamedTuple):
    """Rank and scaling of one adapted module; `lora.scale` takes it as settings."""

    rank: int
    alpha: float
    rslora: bool


def _read_lora(files: _Files, student: StudentConfig) -> tuple[dict[str, Any], ParamTree]:
    """LoRA of any ranks and scales as one stacked tree of the largest rank.

    Modules of a smaller rank are padded with zeros in both a and b: the padding adds nothing, has no gradient and stays
    zero, and so do layers without LoRA. The scale is that of most modules; the difference of the others' goes into b.
    """
    config, specs, modules = files.config, lora.adaptable(student), lora_modules(student, files.keys)
    initialised = str(config.get("init_lora_weights")).lower()
    if initialised.startswith(_CHANGES_BASE):
        raise UserError(
            f"{files.where}: init_lora_weights = {initialised!r} has changed the base's weights; save the adapter with "
            "PEFT's path_initial_model_for_weight_conversion, or train with another initialisation"
        )
    scales = {
        module: _ModuleScale(
            int(_by_pattern(config.get("rank_pattern"), module, config["r"])),
            _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]),
            bool(config.get("use_rslora")),
        )
        for module in _adapted(files, [module for layers in modules.values() for module in layers])
    }
    shapes = {}
    for name, layers in modules.items():
        *_, width_in, width_out = specs[name].shape
        for module in filter(scales.__contains__, layers):
            rank = scales[module].rank
            shapes |= dict(zip(lora_keys(module), [(rank, width_in), (width_out, rank)], strict=True))
    tensors = files.read(shapes)
    names = [name for name, layers in modules.items() if not scales.keys().isdisjoint(layers)]
    common = _common_scale(list(scales.values()))
    settings = {
        **common._asdict(),
        "targets": tuple(dict.fromkeys(map(lora.target_of, names))),
        "vision_encoder": any(name in vision_linear_layers(student) for name in names),
    }
    tree = {
        name: _stacked(tensors, modules[name], scales, common, spec)
        for name, spec in lora.adaptable(student, settings["vision_encoder"]).items()
        if lora.target_of(name) in settings["targets"]
    }
    return settings, tree


def _common_scale(scales: list[_ModuleScale]) -> _ModuleScale:
    """The largest rank, with the alpha that gives most modules their scale."""
    rank, rslora = max(scale.rank for scale in scales), scales[0].rslora
    counts = collections.Counter((scale.rank, scale.alpha) for scale in scales)
    usual, alpha = max(counts, key=lambda pair: (counts[pair], pair))
    return _ModuleScale(rank, float(alpha * (rank / usual) ** (0.5 if rslora else 1.0)), rslora)


def _stacked(
    tensors: dict[str, np.ndarray],
    modules: Sequence[str],
    scales: dict[str, _ModuleScale],
    common: _ModuleScale,
    spec: ParamSpec,
) -> dict[str, Float[np.ndarray, ...]]:
    """a [L, in, r] and b [L, r, out] of one layer name, in the common rank and scale."""
    *_, width_in, width_out = spec.shape
    a = np.zeros((len(modules), width_in, common.rank), np.float32)
    b = np.zeros((len(modules), common.rank, width_out), np.float32)
    unit = lora.scale(common)
    for index, module in enumerate(modules):
        if module in scales:
            rank, (key_a, key_b) = scales[module].rank, lora_keys(module)
            a[index, :, :rank] = tensors[key_a].T
            b[index, :rank] = tensors[key_b].T * np.float32(lora.scale(scales[module]) / unit)
    return {"a": a, "b": b} if spec.stacked else {"a": a[0], "b": b[0]}


def _adapted(files: _Files, modules: list[str]) -> list[str]:
    """The modules that `adapter_config.json` selects, by the rules of `peft.tuners.tuners_utils.check_target_module_exists`.

    Raises:
      UserError: it names modules that the student does not have.
    """
    config = files.config
    targets, excluded = config["target_modules"], config.get("exclude_modules") or ()
    if str(targets).lower() == "all-linear":
        targets = list(modules)
    entries = [targets] if isinstance(targets, str) else [[name] for name in targets]
    unknown = [entry for entry in entries if not any(_matches(entry, module) for module in modules)]
    if unknown or not entries:
        last = dict.fromkeys(module.rpartition(".")[2] for module in modules)
        raise UserError(
            f"{files.where}: target_modules {', '.join(map(repr, unknown)) or 'is empty'}: the student has no such linear "
            f"layer that LoRA may adapt; it has {', '.join(last)}"
        )
    adapted = [module for module in modules if _matches(targets, module) and not _matches(excluded, module)]
    layers = config.get("layers_to_transform")
    if layers is not None and layers != []:
        layers = [layers] if isinstance(layers, int) else layers
        pattern = config.get("layers_pattern")
        adapted = [module for module in adapted if module in targets or _layer_index(pattern, module) in layers]
    if not adapted:
        raise UserError(
            f"{files.where}: exclude_modules and layers_to_transform leave no module of the student; "
            "the adapter is for another base"
        )
    return adapted


def _matches(names: str | Iterable[str], module: str) -> bool:
    """Whether a module matches a regular expression, or one of several names or ends of names."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _layer_index(pattern: str | list[str] | None, module: str) -> int | None:
    """The index of a module's layer; `pattern` is the name before it, or several such names."""
    patterns = [pattern] if isinstance(pattern, str) else pattern
    for name in patterns or [r"[^.]*"]:
        if match := re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", module):
            return int(match[1])
    return None


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a module's name matches, as `peft.utils.other.get_pattern_key`."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _read_prefix(files: _Files, student: StudentConfig) -> tuple[dict[str, Any], ParamTree]:
    length, width = _length(files, student), student.num_kv_heads * student.head_dim
    flat = files.read({EMBEDDINGS: (length, 2 * student.num_layers * width)})[EMBEDDINGS]
    stacked = flat.reshape(length, student.num_layers, 2, width).transpose(2, 1, 0, 3)
    distinct = stacked[:, prefix_layers_in_file(student)[: num_prefixes(student)]]
    tree = {name: np.ascontiguousarray(values) for name, values in zip(("key", "value"), distinct, strict=True)}
    return {"length": length, "reparametrize": False}, tree


def _read_prompt(files: _Files, student: StudentConfig) -> tuple[dict[str, Any], ParamTree]:
    length = _length(files, student)
    stored = files.read({EMBEDDINGS: (num_submodules(student) * length, student.hidden_size)})[EMBEDDINGS]
    return {"length": length}, {"embedding": stored[:length]}


def _length(files: _Files, student: StudentConfig) -> int:
    found, expected = files.config.get("num_transformer_submodules"), num_submodules(student)
    if found not in (None, expected):
        raise UserError(
            f"{files.where}: num_transformer_submodules is {found}, but the student has {expected}; the adapter is for "
            "another base, or of a kind that is not supported"
        )
    return int(files.config["num_virtual_tokens"])


_READERS: dict[str, tuple[str, _Reader]] = {
    "LORA": ("lora", _read_lora),
    "PREFIX_TUNING": ("prefix", _read_prefix),
    "PROMPT_TUNING": ("prompt", _read_prompt),
}
