"""The RayJob against KubeRay's reference of ray.io/v1: no package carries the schema itself."""

import re

from tests.cluster_files.files import ROOT, read

JOB = read("clusters/kuberay-rayjob.yaml")
CLUSTER = JOB["spec"]["rayClusterSpec"]
HEAD = CLUSTER["headGroupSpec"]
(WORKERS,) = CLUSTER["workerGroupSpecs"]
PODS = {"head": HEAD["template"]["spec"], "workers": WORKERS["template"]["spec"]}
# of KubeRay's reference, https://docs.ray.io/en/master/cluster/kubernetes/references/api.html
FIELDS = {
    "job": "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector "
    "submitterConfig managedBy deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources "
    "entrypointNumCpus entrypointNumGpus ttlSecondsAfterFinished shutdownAfterJobFinishes suspend",
    "cluster": "suspend managedBy autoscalerOptions headServiceAnnotations enableInTreeAutoscaling authOptions "
    "gcsFaultToleranceOptions headGroupSpec rayVersion workerGroupSpecs",
    "head": "template headService enableIngress rayStartParams serviceType",
    "workers": "suspend groupName replicas minReplicas maxReplicas idleTimeoutSeconds rayStartParams template "
    "scaleStrategy numOfHosts",
    "autoscaler": "resources image imagePullPolicy securityContext idleTimeoutSeconds upscalingMode version env "
    "envFrom volumeMounts",
}


def test_its_fields_are_kuberays():
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    parts = {"job": JOB["spec"], "cluster": CLUSTER, "head": HEAD, "workers": WORKERS,
             "autoscaler": CLUSTER["autoscalerOptions"]}  # fmt: skip
    for name, part in parts.items():
        assert set(part) <= set(FIELDS[name].split()), name
    assert all(isinstance(value, str) for value in {**HEAD["rayStartParams"], **WORKERS["rayStartParams"]}.values())


def test_the_head_runs_no_trials_and_gpu_workers_start_from_none():
    assert HEAD["rayStartParams"]["num-cpus"] == HEAD["rayStartParams"]["num-gpus"] == "0"
    assert "nvidia.com/gpu" not in PODS["head"]["containers"][0]["resources"]["limits"]
    assert CLUSTER["enableInTreeAutoscaling"] is True
    assert WORKERS["minReplicas"] == WORKERS["replicas"] == 0 < WORKERS["maxReplicas"]
    asked = PODS["workers"]["containers"][0]["resources"]
    assert asked["limits"]["nvidia.com/gpu"] == 1 and asked["limits"] == asked["requests"]


def test_it_is_closed():
    assert CLUSTER["authOptions"] == {"mode": "token"} and HEAD["serviceType"] == "ClusterIP"
    assert "enableIngress" not in HEAD
    for pod in PODS.values():
        assert pod["securityContext"]["runAsNonRoot"] and "hostNetwork" not in pod and "hostPID" not in pod
        (container,) = pod["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert not any("TOKEN" in each["name"] or "KEY" in each["name"] for each in container["env"])
        assert all("emptyDir" in volume for volume in pod["volumes"])


def test_its_ray_is_the_pinned_one_and_its_caches_are_on_the_nodes_disk():
    assert f"ray=={CLUSTER['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    for pod in PODS.values():
        (container,) = pod["containers"]
        environment = {each["name"]: each["value"] for each in container["env"]}
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        for name in ("HF_HOME", "MINITRON_SEARCH_CACHE"):
            assert any(environment[name].startswith(f"{path}/") for path in mounted)
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_its_job_is_the_documented_command_on_a_bucket():
    words = JOB["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "minitron_search.run"]
    assert (ROOT / words[words.index("--config") + 1]).is_file()
    assert re.match(r"(s3|gs)://", words[words.index("--output") + 1])


def test_the_image_copies_what_exists():
    lines = [
        line.split() for line in (ROOT / "clusters/Dockerfile").read_text().splitlines() if line.startswith("COPY")
    ]
    assert lines and all((ROOT / name).exists() for words in lines for name in words[1:-1])
