"""Renamed settings work under their old names, wherever one can stand, and one line says the new name."""

import json

import pytest

from sqa_jax import config_aliases
from sqa_jax.config import default
from sqa_jax.config_aliases import current_arguments, current_names, original_names
from sqa_jax.errors import UserError
from sqa_jax.training.workdir import bind_config, check_evaluable, read_saved, with_defaults
from tests.support.verbs import run_verb


@pytest.fixture(autouse=True)
def renamed(monkeypatch):
    """Two settings of today as if they had been called otherwise."""
    keys = {"train.log_each": "train.log_every", "adapter.lora.size": "adapter.lora.rank"}
    for name, value in (("RENAMED", keys), ("RENAMED_VALUES", {"data.source": {"example": "sample"}})):
        monkeypatch.setattr(f"sqa_jax.config_aliases.{name}", value)
    monkeypatch.setattr(config_aliases, "_announced", set())


def test_arguments_with_old_names_become_new_ones(capsys):
    argv = [
        "verb",
        "--config.train.log_each=5",
        "-config.adapter.lora.size",
        "8",
        "--config.data.source=example",
        "--x",
    ]
    assert current_arguments(argv) == [
        "verb", "--config.train.log_every=5", "-config.adapter.lora.rank", "8", "--config.data.source=sample", "--x",
    ]  # fmt: skip
    assert capsys.readouterr().err.splitlines() == [
        "note: config.train.log_each is now called config.train.log_every",
        "note: config.adapter.lora.size is now called config.adapter.lora.rank",
        "note: config.data.source=example is now called sample",
    ]
    assert current_arguments(["verb", "--config.data.source", "example"])[2] == "sample"
    assert current_arguments(["verb", "--config", "example"])[2] == "example"


def test_both_names_on_the_command_line_are_refused():
    with pytest.raises(UserError, match=r"command line: config\.train\.log_each and config\.train\.log_every"):
        current_arguments(["verb", "--config.train.log_every=5", "--config.train.log_each=5"])
    assert current_arguments(["verb", "--config.train.log_each=5", "--config.train.log_each=6"])


def test_a_configuration_file_may_use_old_names(tmp_path, capsys):
    config = default()
    config.train.log_each = 7
    config.adapter.lora.size += 4
    config.data.source = "example"
    assert (config.train.log_every, config.adapter.lora.rank, config.data.source) == (7, 20, "sample")
    assert "log_each" not in config.train.to_dict()
    assert len(capsys.readouterr().err.splitlines()) == 3
    other = config.copy_and_resolve_references()
    other.train.log_each = 9
    assert (other.train.log_every, config.train.log_every) == (9, 7)
    with pytest.raises(AttributeError, match="log_evry"):
        config.train.log_evry = 7


def _file(tmp_path, *lines: str):
    file = tmp_path / "settings.py"
    body = "\n".join(f"    {line}" for line in ("config = get_test()", *lines, "return config"))
    file.write_text(f"from configs.test import get_config as get_test\n\n\ndef get_config():\n{body}\n")
    return file


def test_a_verb_understands_old_names_and_says_so_once(tmp_path):
    file = _file(tmp_path, "config.train.log_each = 7", 'config.data.source = "example"')
    done = run_verb(
        "preprocess", "--config", file, "--config.train.log_each=3", f"--config.data.cache={tmp_path / 'cache'}",
        "--config.data.train_limit=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: config.train.log_each is now called config.train.log_every",
        "note: config.data.source=example is now called sample",
    ]


def test_a_file_with_both_names_is_refused_and_the_command_line_goes_before_it(tmp_path):
    file = _file(tmp_path, "config.train.log_each = 7", "config.train.log_every = 8")
    done = run_verb("preprocess", "--config", file)
    assert done.returncode == 2
    assert f"--config: {file}: config.train.log_each and config.train.log_every are the old and the new" in done.stderr
    file = _file(tmp_path, "config.train.log_each = 7")
    done = run_verb(
        "preprocess", "--config", file, "--config.train.log_every=3", f"--config.data.cache={tmp_path / 'cache'}",
        "--config.data.train_limit=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def _old_run(workdir, config) -> dict:
    """config.json of a run from before the names changed."""
    saved = json.loads(json.dumps({"config": config.to_dict(), "student": "s"}))
    saved["config"]["train"]["log_each"] = saved["config"]["train"].pop("log_every")
    saved["config"]["adapter"]["lora"]["size"] = saved["config"]["adapter"]["lora"].pop("rank")
    saved["config"]["data"]["source"] = "example"
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(saved))
    return saved


def test_an_old_runs_directory_opens(tmp_path, capsys):
    config = default()
    saved = _old_run(tmp_path / "run", config)
    bind_config(tmp_path / "run", config, {"student": "s"})
    check_evaluable(tmp_path / "run", config, "s")
    assert len(capsys.readouterr().err.splitlines()) == 3, "one line for each name"
    assert with_defaults(read_saved(tmp_path / "run" / "config.json")["config"]).adapter.lora.rank == 16
    config.adapter.lora.rank = 4
    with pytest.raises(UserError, match="config.adapter.lora.rank was 16 and is 4"):
        bind_config(tmp_path / "run", config, {"student": "s"})
    saved["config"]["adapter"]["lora"]["rank"] = 16
    with pytest.raises(UserError, match=r"config.json: config\.adapter\.lora\.size and config\.adapter\.lora\.rank"):
        current_names(saved["config"], "config.json")


def test_a_setting_that_did_not_exist_yet_has_its_default(tmp_path):
    config = default()
    saved = _old_run(tmp_path / "run", config)
    del saved["config"]["adapter"]["visual"], saved["config"]["eval"]["normalize"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    check_evaluable(tmp_path / "run", config, "s")
    opened = with_defaults(read_saved(tmp_path / "run" / "config.json")["config"])
    assert (opened.adapter.visual.length, opened.eval.normalize) == (8, "none")
    saved["config"]["train"]["log_each"] = "often"
    with pytest.raises(UserError, match="from another version"):
        with_defaults(current_names(saved["config"], "x"))


def test_identities_are_hashed_under_the_first_names():
    config = default()
    whole = original_names(config.to_dict())
    assert whole["adapter"]["lora"]["size"] == 16 and "rank" not in whole["adapter"]["lora"]
    assert whole["data"]["source"] == "example" and config.data.source == "sample"
    assert original_names(config.adapter.to_dict(), "adapter") == whole["adapter"]
    assert original_names(config.recipe.to_dict(), "recipe") == config.recipe.to_dict()
