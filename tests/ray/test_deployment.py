"""The files of docs/how-to that start Pekoe on Slurm and Kubernetes, as far as they can be run or checked here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import tomli_w
import yaml

from pekoe.config.recipes import RLConfig, load_config

# Of KubeRay's reference, ray.io/v1.
FIELDS = {
    "spec": {
        *("entrypoint", "rayClusterSpec", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit"),
        *("activeDeadlineSeconds", "submissionMode", "runtimeEnvYAML", "suspend", "submitterPodTemplate", "metadata"),
    },
    "rayClusterSpec": {"rayVersion", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "authOptions"},
    "headGroupSpec": {"rayStartParams", "template", "serviceType", "headService"},
    "workerGroupSpecs": {
        *("groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"),
    },
}

# What Slurm would do on one node, in place of its commands.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
if [[ $1 == hostname ]]; then echo 127.0.0.1; else exec "$@"; fi
"""
SCONTROL = "#!/bin/bash\necho localhost\n"


@pytest.fixture
def how_to(repository: Path) -> Path:
    return repository / "docs" / "how-to"


def test_kubernetes_takes_the_pods_and_kuberay_knows_the_fields(how_to: Path):
    job: dict[str, Any] = yaml.safe_load((how_to / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for name, part in (
        ("spec", spec),
        ("rayClusterSpec", cluster),
        ("headGroupSpec", head),
        ("workerGroupSpecs", workers),
    ):
        assert set(part) <= FIELDS[name]
    for group in (head, workers):
        kubernetes_validate.validate(pod_of(group["template"]), "1.31", strict=True)
    wrong = pod_of({"spec": head["template"]["spec"] | {"contaners": []}})
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.31", strict=True)


def pod_of(template: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}


def test_the_files_ask_for_the_gpus_of_the_recipe(how_to: Path, repository: Path):
    cluster = load_config(repository / "recipes" / "boba-7b-cluster.toml", kind=RLConfig).cluster
    assert cluster is not None
    generation, training = cluster.generation, cluster.training
    gpus = generation.engines * generation.gpus_per_engine + training.ranks * training.gpus_per_rank
    (workers,) = yaml.safe_load((how_to / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert workers["replicas"] * int(limits["nvidia.com/gpu"]) == gpus == 128
    words = dict(
        line.removeprefix("#SBATCH --").split("=")
        for line in (how_to / "pekoe.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH") and "=" in line
    )
    assert int(words["nodes"]) * int(words["gpus-per-node"]) == gpus


@pytest.mark.cluster
@pytest.mark.timeout(200)
def test_the_slurm_script_trains_on_one_node(how_to: Path, recipe: dict[str, Any], tmp_path: Path):
    """With stand-ins for Slurm's commands, and a real Ray."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    file = tmp_path / "rl.toml"
    half = {"cpus_per_engine": 0.5}, {"cpus_per_rank": 0.5}
    file.write_text(tomli_w.dumps(recipe | {"cluster": {"generation": half[0], "training": half[1]}}))
    slurm = {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "OMP_NUM_THREADS": "1"}
    paths = [str(stubs), str(Path(sys.executable).parent), os.environ["PATH"]]
    done = subprocess.run(
        ["bash", str(how_to / "pekoe.sbatch"), str(file), "num_steps=2"],
        env=os.environ | slurm | {"PATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done: 2 steps" in done.stdout
