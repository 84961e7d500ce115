"""A stand-in for Google's `gcloud`: plays queued resources, TPU VMs and a bucket in a directory, and scripted failures.

It is put on PATH as `gcloud`; STAND_IN names the directory:

  calls.jsonl   the arguments of every call
  faults.json   [{"on": regex over the arguments, "skip": 0, "times": 1, "code": 1, "stderr": "", "nodes": ""}]: a
                matching call fails with `code`, or first puts all nodes into the state `nodes`
  cloud.json    {"states": what describe answers, one after the other; "resource": whether there is one; "nodes"}
  homes/GENERATION/NODE/WORKER   a worker's home directory, in which ssh runs its commands for real
  bucket/       what gs:// names
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ.get("STAND_IN", ""))
WORKERS = 2  # of each node


def flag(argv: list[str], name: str, default: str = "") -> str:
    return next((arg.partition("=")[2] for arg in argv if arg.startswith(f"--{name}=")), default)


def fail(code: int, message: str) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


def kill_workers(root: Path) -> None:
    """Ends every process that a worker has started, as losing the machine does."""
    for pid in root.glob("homes/**/sqa_jax_run/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


class Cloud:
    def __init__(self) -> None:
        self.file = ROOT / "cloud.json"
        self.state = json.loads(self.file.read_text())

    def save(self) -> None:
        self.file.write_text(json.dumps(self.state))

    def homes(self, node: str) -> list[Path]:
        return [ROOT / "homes" / str(self.state["generation"]) / node / f"{node}-w-{i}" for i in range(WORKERS)]

    def set_nodes(self, state: str) -> None:
        self.state["nodes"] = dict.fromkeys(self.state["nodes"], state)
        kill_workers(ROOT)

    def queued_resources(self, verb: str, name: str, argv: list[str]) -> None:
        there = self.state["resource"]
        if verb == "create":
            if there:
                fail(1, f"ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: {name}")
            count = int(flag(argv, "node-count", "0"))
            names = [f"{flag(argv, 'node-prefix')}-{i}" for i in range(count)] or [flag(argv, "node-id")]
            self.state |= {"resource": True, "nodes": dict.fromkeys(names, "READY"), "answers": self.state["states"]}
            self.state["generation"] += 1
            for home in [home for node in names for home in self.homes(node)]:
                home.mkdir(parents=True)
        elif not there:
            fail(1, f"ERROR: (gcloud.compute.tpus.queued-resources.{verb}) NOT_FOUND: Resource '{name}' was not found")
        elif verb == "describe":
            answers = self.state["answers"]
            print(answers[0] if flag(argv, "format") == "value(state.state)" else "")
            self.state["answers"] = answers[1:] or answers
        elif verb == "delete":
            self.set_nodes("")
            self.state |= {"resource": False, "nodes": {}}

    def tpu_vm(self, verb: str, argv: list[str]) -> None:
        node = argv[1].partition(":")[0] if verb == "scp" else argv[0]
        state = self.state["nodes"].get(node)
        if state is None:
            fail(1, f"ERROR: (gcloud.compute.tpus.tpu-vm.{verb}) NOT_FOUND: Resource '{node}' was not found")
        if verb == "describe":
            print(WORKERS if "len()" in flag(argv, "format") else state)
            return
        if state != "READY":
            fail(1, f"ERROR: (gcloud.compute.tpus.tpu-vm.{verb}) This TPU has state {state}")
        worker = flag(argv, "worker", "0")
        homes = self.homes(node) if worker == "all" else [self.homes(node)[int(worker)]]
        if verb == "scp":
            for home in homes:
                shutil.copy(argv[0], home / argv[1].partition(":")[2])
            return
        codes = []
        for home in homes:
            env = os.environ | {"HOME": str(home), "HOSTNAME": home.name}
            codes.append(subprocess.run(["bash", "-c", flag(argv, "command")], cwd=home, env=env).returncode)
        sys.exit(next(filter(None, codes), 0))

    def storage(self, verb: str, argv: list[str]) -> None:
        paths = [Path(re.sub("^gs:/", str(ROOT / "bucket"), arg)) for arg in argv if not arg.startswith("--")]
        if verb == "cp":
            paths[1].parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(*paths)
        elif verb == "rm":
            paths[0].unlink()
        elif verb == "rsync":
            shutil.copytree(*paths, dirs_exist_ok=True)
        elif not paths[0].exists():
            fail(1, "ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")


def main(argv: list[str]) -> None:
    with (ROOT / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(argv) + "\n")
    cloud = Cloud()
    faults = json.loads((ROOT / "faults.json").read_text())
    for fault in faults:
        if not re.search(fault["on"], " ".join(argv)):
            continue
        fault["seen"] = fault.get("seen", 0) + 1
        (ROOT / "faults.json").write_text(json.dumps(faults))
        if not fault.get("skip", 0) < fault["seen"] <= fault.get("skip", 0) + fault.get("times", 1):
            continue
        if "nodes" in fault:
            cloud.set_nodes(fault["nodes"])
            cloud.save()
        if "code" in fault:
            fail(fault["code"], fault.get("stderr", ""))
    if argv[0] == "storage":
        cloud.storage(argv[1], argv[2:])
    elif argv[2] == "queued-resources":
        cloud.queued_resources(argv[3], argv[4], argv[5:])
    else:
        cloud.tpu_vm(argv[3], argv[4:])
    cloud.save()


if __name__ == "__main__":
    main(sys.argv[1:])
