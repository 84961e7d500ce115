"""Resolving a student's path: a directory, a GGUF file, or a model of the Hugging Face hub in its local cache."""

from __future__ import annotations

from pathlib import Path

from sqa_jax.checkpoints.safetensors_source import INDEX, PROCESSORS, weight_files
from sqa_jax.errors import UserError

_TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
]


def locate(path: str, revision: str = "", weights: bool = True) -> Path:
    """The local directory or .gguf file of a student's path; a model of the hub is downloaded.

    Args:
      path: a Hugging Face directory, a .gguf file, or a hub id of the form owner/name.
      revision: branch, tag or commit of a hub id.
      weights: also fetch the weights, not only configuration and tokenizer.

    Raises:
      UserError: nothing is there, or the hub cannot be reached.
    """
    if not path:
        raise UserError("config.student.path is empty; give a model directory, a hub id, a .gguf file or random:tiny")
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if path.lower().endswith(".gguf"):
        if not local.exists():
            raise UserError(
                f"{path}: not found; `bash launch/fetch_student.sh` fetches the quickstart's student into weights/"
            )
        return local
    if local.exists():
        raise UserError(f"{path}: is not a .gguf file; give the directory that holds config.json and the weights")
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"{path}: no such model directory, and not a hub id of the form owner/name; check config.student.path"
        )
    return _fetch(path, revision, weights)


def _fetch(repository: str, revision: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        files = ["config.json", "generation_config.json", *PROCESSORS, INDEX, *_TOKENIZER_FILES]
        directory = Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
        if weights:
            # Repositories also contain other formats of the same weights: only what the index lists is fetched, from
            # the same commit (which names the directory), whatever has been pushed since.
            snapshot_download(repository, revision=directory.name, allow_patterns=weight_files(directory))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise UserError(
            f"{repository}: neither a directory here nor on the hub (revision {revision or 'main'}); "
            "check config.student.path, or log in for a gated model"
        ) from None
    except OSError as error:
        raise UserError(
            f"{repository}: not a directory here, and the hub cannot be reached ({type(error).__name__}); "
            "download the model and give its directory"
        ) from None
    return directory
