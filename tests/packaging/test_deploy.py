"""Dockerfile, compose file and Kubernetes manifests against their schemas, each other, and vLLM's
own parser.

No container is built or started here.
"""

import importlib.resources
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import dockerfile_parse
import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
KUSTOMIZATION = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())


def manifests() -> dict[str, dict[str, Any]]:
    """Every object of deploy/kubernetes by its kind; the kustomization, which no cluster stores, is
    apart.
    """
    paths = sorted(path for path in KUBERNETES.glob("*.yaml") if path.name != "kustomization.yaml")
    objects = [one for path in paths for one in yaml.safe_load_all(path.read_text())]
    return {one["kind"]: one for one in objects}


def container() -> dict[str, Any]:
    (found,) = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


# --- Docker ---------------------------------------------------------------------------------------


@pytest.fixture
def instructions(tmp_path) -> Any:
    copy = tmp_path / "Dockerfile"
    copy.write_text((ROOT / "docker" / "Dockerfile").read_text())
    return dockerfile_parse.DockerfileParser(path=str(copy), env_replace=True)


def test_the_base_image_is_pinned_to_a_vllm_of_the_window(instructions):
    image, _, tag = instructions.baseimage.partition(":")
    assert image == "vllm/vllm-openai"
    assert re.fullmatch(r"v\d+\.\d+\.\d+", tag), f"{tag!r} is not a release"
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (window,) = [r.specifier for r in map(Requirement, requirements) if r.name == "vllm"]
    assert window.contains(tag.removeprefix("v"))


def test_the_image_keeps_its_vllm_and_its_entry_point(instructions):
    steps = [(step["instruction"], step["value"]) for step in instructions.structure]
    assert {name for name, _ in steps} <= {"ARG", "FROM", "COPY", "RUN", "ENTRYPOINT", "COMMENT"}
    assert json.loads(dict(steps)["ENTRYPOINT"]) == ["vllm", "serve"]
    installs = [value for name, value in steps if name == "RUN" and "pip install" in value]
    assert installs and all("--no-deps" in value for value in installs)


def test_what_the_dockerfile_copies_exists_and_is_sent_to_docker(instructions):
    sent = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        source
        for step in instructions.structure
        if step["instruction"] == "COPY"
        for source in step["value"].split()[:-1]
    }
    assert copied == sent
    for name in copied:
        assert (ROOT / name).exists(), name


def test_compose_follows_its_schema():
    folder = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    schema = json.loads((folder / "compose-spec.json").read_text())
    jsonschema.validators.validator_for(schema)(schema).validate(COMPOSE)


def test_compose_asks_for_a_gpu_keeps_its_cache_and_watches_health():
    (service,) = COMPOSE["services"].values()
    assert (ROOT / "docker" / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]).is_file()
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (
        device["driver"] == "nvidia" and device["capabilities"] == ["gpu"] and device["count"] == 1
    )
    (mount,) = service["volumes"]
    assert mount.split(":")[0] in COMPOSE["volumes"]
    assert "/health" in service["healthcheck"]["test"][-1]
    assert service["ipc"] == "host" or service["shm_size"]


def test_the_compose_file_reads_only_variables_of_the_example():
    example = (ROOT / "docker" / ".env.example").read_text()
    offered = set(re.findall(r"^(\w+)=", example, re.M))
    assert offered == set(re.findall(r"\$\{(\w+)", (ROOT / "docker" / "compose.yaml").read_text()))


# --- Kubernetes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.28", "1.32", "1.37"])
@pytest.mark.parametrize("kind", ["Deployment", "Service", "PersistentVolumeClaim"])
def test_manifests_follow_the_schemas_of_kubernetes(kind, version):
    kubernetes_validate.validate(manifests()[kind], version, strict=True)


def test_a_misspelt_field_would_be_found():
    deployment = manifests()["Deployment"]
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.37", strict=True)


def test_the_manifests_fit_together():
    found = manifests()
    assert set(found) == {"Deployment", "Service", "PersistentVolumeClaim"}
    pod = found["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"].items()
    assert found["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels
    assert found["Service"]["spec"]["selector"].items() <= labels
    ports = {port["name"] for port in container()["ports"]}
    assert {port["targetPort"] for port in found["Service"]["spec"]["ports"]} <= ports
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container()["volumeMounts"]} == set(volumes)
    claims = {
        v["persistentVolumeClaim"]["claimName"]
        for v in volumes.values()
        if "persistentVolumeClaim" in v
    }
    assert claims == {found["PersistentVolumeClaim"]["metadata"]["name"]}
    assert "/dev/shm" in {mount["mountPath"] for mount in container()["volumeMounts"]}


def test_the_pod_has_one_gpu_and_is_watched_on_health():
    assert container()["resources"]["limits"]["nvidia.com/gpu"] == "1"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container()[probe]["httpGet"] == {"path": "/health", "port": "http"}, probe
    startup = container()["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1200, (
        "a first start downloads the model"
    )


def test_the_kustomization_names_every_manifest_and_the_image():
    assert set(KUSTOMIZATION["resources"]) == {p.name for p in KUBERNETES.glob("*.yaml")} - {
        "kustomization.yaml"
    }
    (image,) = KUSTOMIZATION["images"]
    assert container()["image"].split(":") == [image["name"], image["newTag"]]


# --- the commands ---------------------------------------------------------------------------------

PARSE = """
import json, sys
from vllm.entrypoints.cli import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
(command,) = serve.cmd_init()
command.subparser_init(parser.add_subparsers())
parsed = [vars(parser.parse_args(["serve", *line])) for line in json.loads(sys.argv[1])]
keys = ("model_tag", "plugin", "fsr_budget", "fsr_max_budget", "max_model_len")
print("PARSED", json.dumps([{key: one.get(key) for key in keys} for one in parsed]))
"""


def test_vllm_with_the_plugin_understands_both_commands():
    """VLLM's own parser, to which the installed plugin adds its options, reads both; unknown
    options would stop it.
    """
    (service,) = COMPOSE["services"].values()
    lines = [service["command"], container()["args"]]
    done = subprocess.run(
        [sys.executable, "-c", PARSE, json.dumps(lines)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (answer,) = [line for line in done.stdout.splitlines() if line.startswith("PARSED ")]
    for parsed in json.loads(answer.removeprefix("PARSED ")):
        assert "fsr" in parsed["plugin"]
        assert parsed["model_tag"] == "llava-hf/llava-1.5-7b-hf"
        assert 0 < parsed["fsr_budget"] <= 576
        assert parsed["fsr_max_budget"] is None, (
            "a request for a whole page of text must not be refused"
        )
        assert parsed["max_model_len"] == 4096
    assert lines[0] == lines[1], "the compose file and the Deployment serve the same way"
