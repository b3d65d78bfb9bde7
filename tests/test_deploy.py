"""deploy/k8s and deploy/compose.yaml: valid to their own tools, and true to the service that they run."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from starlette.testclient import TestClient

from app.main import LAST_WORDS_S, create_app
from app.settings import Settings
from ddpm_core import __version__
from tests.test_readme import ROOT

K8S, COMPOSE = ROOT / "deploy" / "k8s", ROOT / "deploy" / "compose.yaml"
README = (K8S / "README.md").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
OVERLAYS = ("cpu", "gpu", "full")
VERSIONS = ("1.30", "1.37")  # the oldest that README.md promises, the newest that there are schemas of
EXTENSIONS = {"PodMonitor", "ScaledObject"}  # kinds that are not Kubernetes' own
SPARE_S = 5  # between the last moment of a drain and SIGKILL
Object = dict[str, Any]


def tool(*names: str) -> str:
    """A program of the environment or the PATH. Skips the test where there is none."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    found = next(filter(None, (shutil.which(name, path=path) for name in names)), None)
    if found is None:
        pytest.skip(f"no {' or '.join(names)}")
    return found


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The overlay that README.md shows: another image and namespace, and every component."""
    folder = tmp_path_factory.mktemp("overlay")
    example = yaml.safe_load(re.search(r"^```yaml\n(apiVersion: kustomize.*?)^```", README, re.M | re.S)[1])
    for part in ("resources", "components"):
        example[part] = [os.path.relpath(K8S / "overlays" / "yours" / path, folder) for path in example[part]]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(example))
    return folder


@functools.cache
def kustomized(folder: Path) -> list[Object]:
    command = [tool("kubectl"), "kustomize", str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    assert not built.stderr, "kustomize warns"
    return list(yaml.safe_load_all(built.stdout))


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest, full: Path) -> dict[str, Object]:
    """All of an overlay, by kind: there is one of each."""
    found = kustomized(full if request.param == "full" else K8S / "overlays" / request.param)
    by_kind = {one["kind"]: one for one in found}
    assert len(by_kind) == len(found)
    return by_kind


@pytest.fixture
def pod(objects: dict[str, Object]) -> Object:
    return objects["Deployment"]["spec"]["template"]


@pytest.fixture
def container(pod: Object) -> Object:
    (only,) = pod["spec"]["containers"]
    return only


@pytest.fixture
def settings(objects: dict[str, Object], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the service makes of the ConfigMap."""
    given = objects["ConfigMap"]["data"]
    assert {name.removeprefix("DDPM_").lower() for name in given} <= set(Settings.model_fields)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return Settings()


# Kubernetes


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid(objects: dict[str, Object], version: str) -> None:
    for kind in objects.keys() - EXTENSIONS:
        kubernetes_validate.validate(objects[kind], version, strict=True)


def test_a_wrong_field_is_not() -> None:
    deployment = yaml.safe_load((K8S / "base" / "deployment.yaml").read_text())
    deployment["spec"]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["sleeps"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[0], strict=True)


def test_a_pod_may_drain_before_it_is_killed(pod: Object, container: Object, settings: Settings) -> None:
    sleep_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    words_s = 2 * LAST_WORDS_S  # of answers on their way, then of the worker thread
    assert pod["spec"]["terminationGracePeriodSeconds"] >= sleep_s + settings.drain_s + words_s + SPARE_S


def test_probes_ask_what_the_service_answers(container: Object) -> None:
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"}
    starting = TestClient(create_app(Settings()))
    assert starting.get(paths["startup"]).status_code == 503
    assert starting.get(paths["liveness"]).status_code == 200
    assert "}/readyz" in DOCKERFILE


def test_a_pod_may_do_nothing_but_serve(pod: Object, container: Object) -> None:
    spec, security = pod["spec"], container["securityContext"]
    assert spec["securityContext"]["runAsUser"] == int(re.search(r"^USER (\d+)$", DOCKERFILE, re.M)[1])
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert security["readOnlyRootFilesystem"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert not security["allowPrivilegeEscalation"]
    assert not spec["automountServiceAccountToken"]
    assert not spec["enableServiceLinks"], "a Service called ddpm would set DDPM_PORT"
    assert "volumes" not in spec


def test_ports_and_selectors_meet(objects: dict[str, Object], pod: Object, container: Object) -> None:
    (port,) = container["ports"]
    assert port["containerPort"] == int(re.search(r"DDPM_PORT=(\d+)", DOCKERFILE)[1])
    (served,) = objects["Service"]["spec"]["ports"]
    (let_in,) = objects["NetworkPolicy"]["spec"]["ingress"][0]["ports"]
    used = [served["targetPort"], let_in["port"]]
    used += [container[f"{name}Probe"]["httpGet"]["port"] for name in ("startup", "readiness", "liveness")]
    selectors = [objects["Service"]["spec"]["selector"], objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]]
    selectors += [objects[kind]["spec"]["selector"]["matchLabels"] for kind in ("Deployment", "PodDisruptionBudget")]
    selectors += [spread["labelSelector"]["matchLabels"] for spread in pod["spec"]["topologySpreadConstraints"]]
    if monitor := objects.get("PodMonitor"):
        selectors.append(monitor["spec"]["selector"]["matchLabels"])
        used += [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
    assert set(used) == {port["name"]}
    assert all(selector and selector.items() <= pod["metadata"]["labels"].items() for selector in selectors)
    assert pod["spec"]["serviceAccountName"] == objects["ServiceAccount"]["metadata"]["name"]


def test_nothing_leaves_a_pod(objects: dict[str, Object]) -> None:
    policy = objects["NetworkPolicy"]["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert not policy.get("egress")
    assert "huggingface-hub" not in (ROOT / "requirements.lock").read_text(), "the image can fetch models: let it"


def test_one_autoscaler_has_the_deployment(objects: dict[str, Object]) -> None:
    assert "replicas" not in objects["Deployment"]["spec"]
    (scaler,) = objects.keys() & {"HorizontalPodAutoscaler", "ScaledObject"}
    assert objects[scaler]["spec"]["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]


def test_both_autoscalers_are_the_same() -> None:
    hpa = yaml.safe_load((K8S / "base" / "hpa.yaml").read_text())["spec"]
    keda = yaml.safe_load((K8S / "components" / "keda" / "scaledobject.yaml").read_text())["spec"]
    (pods,), (trigger,) = hpa["metrics"], keda["triggers"]
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (keda["minReplicaCount"], keda["maxReplicaCount"])
    assert hpa["behavior"] == keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert pods["pods"]["target"] == {"type": "AverageValue", "averageValue": trigger["metadata"]["threshold"]}
    assert pods["pods"]["metric"]["name"] in trigger["metadata"]["query"]


def test_a_device_is_what_the_overlay_says() -> None:
    for name, device in (("cpu", "cpu"), ("gpu", "cuda")):
        found = {one["kind"]: one for one in kustomized(K8S / "overlays" / name)}
        assert found["ConfigMap"]["data"]["DDPM_DEVICE"] == device
        (container,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
        environment = {one["name"]: one.get("value") for one in container["env"]}
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (device == "cuda")
        assert environment.get("NVIDIA_VISIBLE_DEVICES") == (None if device == "cuda" else "void")
        assert "cpu" not in container["resources"]["limits"]


def test_keys_and_settings_come_by_reference(objects: dict[str, Object], container: Object) -> None:
    (source,) = container["envFrom"]
    assert source == {"configMapRef": {"name": objects["ConfigMap"]["metadata"]["name"]}}
    by_name = {one["name"]: one.get("valueFrom") for one in container["env"]}
    assert by_name["DDPM_API_KEYS"]["secretKeyRef"]["optional"]
    assert by_name["OMP_NUM_THREADS"]["resourceFieldRef"]["resource"] == "requests.cpu"


def test_readme_names_what_there_is() -> None:
    for name in re.findall(r"DDPM_([A-Z_]+)", README):
        assert name.lower() in Settings.model_fields, f"DDPM_{name} is no setting"
    for path in re.findall(r"`((?:base|components|overlays)/[\w./]+|deploy/[\w./]+)`", README):
        assert (ROOT / path if path.startswith("deploy") else K8S / path).exists(), path


# Compose


@pytest.fixture(scope="module")
def services() -> dict[str, Object]:
    return yaml.safe_load(COMPOSE.read_text())["services"]


def test_compose_is_valid() -> None:
    docker = tool("docker-compose", "docker")
    command = [docker, *(["compose"] if Path(docker).name == "docker" else []), "-f", str(COMPOSE), "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "unknown" in done.stderr and "-f" in done.stderr:
        pytest.skip("docker without compose")
    assert done.returncode == 0, done.stderr


def test_the_service_in_compose_is_the_container_of_the_readme(
    services: dict[str, Object], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = services["ddpm"]
    for name, value in ours["environment"].items():
        assert name.removeprefix("DDPM_").lower() in Settings.model_fields
        if value is not None:
            monkeypatch.setenv(name, str(value))
    grace_s = int(re.fullmatch(r"(\d+)s", ours["stop_grace_period"])[1])
    assert grace_s >= Settings().drain_s + 2 * LAST_WORDS_S + SPARE_S
    assert ours["read_only"]
    for one in services.values():
        assert one["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in one["ports"]), "published to everybody"
        for volume in one.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (COMPOSE.parent / source).is_dir(), source


def test_images_are_pinned(services: dict[str, Object]) -> None:
    images = [one["image"] for one in services.values()]
    base = yaml.safe_load((K8S / "base" / "kustomization.yaml").read_text())
    images += [f"{image['newName']}:{image['newTag']}" for image in base["images"]]
    assert all(re.search(r":v?\d+\.\d+\.\d+$", image) for image in images), images
    assert {image.rpartition(":")[2] for image in images if "ddpm-service" in image} == {__version__}
