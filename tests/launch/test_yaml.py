"""``launch/k8s.yaml`` and ``launch/skypilot.yaml`` against schemas of what their platforms document."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = {"k8s.yaml": "jobset.schema.json", "skypilot.yaml": "skypilot.schema.json"}


def document(name: str) -> dict[str, Any]:
    """A file of ``launch/``."""
    return yaml.safe_load((ROOT / "launch" / name).read_text())


def reader(name: str) -> jsonschema.Draft202012Validator:
    """What accepts that which the platform of ``name`` reads."""
    return jsonschema.Draft202012Validator(json.loads((HERE / FILES[name]).read_text()))


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_what_its_platform_reads(name):
    platform = reader(name)
    platform.check_schema(platform.schema)
    platform.validate(document(name))


def maps(node: Any) -> list[dict]:
    """Every mapping in a document."""
    below = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [*([node] if isinstance(node, dict) else []), *(found for child in below for found in maps(child))]


@pytest.mark.parametrize("name", FILES)
def test_the_schema_refuses_a_misspelt_key(name):
    """But for keys that are the user's own."""
    own = ("envs", "nodeSelector", "limits", "file_mounts")
    content, platform = document(name), reader(name)
    free = [id(node[key]) for node in maps(content) for key in own if key in node]
    checked = [number for number, node in enumerate(maps(content)) if id(node) not in free]
    assert len(checked) > 3
    for number in checked:
        wrong = copy.deepcopy(content)
        maps(wrong)[number]["misspelt"] = 1
        assert not platform.is_valid(wrong), maps(content)[number]


# ------------------------------------------------------------------------------------ k8s.yaml


@pytest.fixture
def job() -> dict[str, Any]:
    """The one job of the set."""
    [replicated] = document("k8s.yaml")["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def test_the_processes_of_a_jobset_find_each_other(job):
    whole = document("k8s.yaml")
    name, replicated = whole["metadata"]["name"], whole["spec"]["replicatedJobs"][0]["name"]
    [container] = job["template"]["spec"]["containers"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert variables["COORDINATOR_ADDRESS"].split(":")[0] == f"{name}-{replicated}-0-0.{name}"
    assert variables["NUM_PROCESSES"] == str(job["parallelism"]) == str(job["completions"])
    assert "PROCESS_ID" in variables


def test_a_jobset_starts_again_when_stopped_or_lost_and_ends_with_errors(job):
    [ends] = document("k8s.yaml")["spec"]["failurePolicy"]["rules"]
    assert (ends["action"], ends["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert job["backoffLimit"] == 0, "one pod that fails fails its job"
    disrupted, error = job["podFailurePolicy"]["rules"]
    assert (disrupted["action"], disrupted["onPodConditions"][0]["type"]) == ("Count", "DisruptionTarget")
    codes = error["onExitCodes"]
    assert (error["action"], codes["operator"], codes["values"]) == ("FailJob", "NotIn", [134, 143])
    assert codes["containerName"] == job["template"]["spec"]["containers"][0]["name"]


def test_a_pod_trains(job):
    [container] = job["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "minigpt5_jax.train"]
    [config, workdir] = container["args"]
    assert (ROOT / config.removeprefix("--config=")).is_file()
    [mount] = container["volumeMounts"]
    assert workdir.removeprefix("--workdir=").startswith(f"{mount['mountPath']}/")
    assert [volume["name"] for volume in job["template"]["spec"]["volumes"]] == [mount["name"]]


# ------------------------------------------------------------------------------- skypilot.yaml


def test_skypilot_comes_back_for_143_alone():
    recovery = document("skypilot.yaml")["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [143]}


def test_what_skypilot_runs_is_the_program_with_its_arguments(tmp_path, program):
    task = document("skypilot.yaml")
    subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    program.rename(tmp_path / ".venv/bin/python")
    env = {
        "PATH": os.environ["PATH"],
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "ARGS": "--config a.py --config.tuning.rules=\"(('a b', 'llm'),)\"",
    }
    assert set(task["envs"]) == {"ARGS"}
    subprocess.run(["bash", "-c", task["run"]], check=True, cwd=tmp_path, env=env)
    said = (tmp_path / "said").read_text().splitlines()
    assert said[:5] == ["10.0.0.1:8476", "2", "1", "-m", "minigpt5_jax.train"]
    assert said[5:] == ["--config", "a.py", "--config.tuning.rules=(('a b', 'llm'),)"]
