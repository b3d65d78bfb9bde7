"""Several models in one process: which one a request means, what each is said to take, and that they do not mix."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from app.settings import Settings
from ddpm_core import hub
from ddpm_core.checkpoint import WEIGHTS_NAME, CheckpointError, sha256_of
from tests.networks import save_tiny
from tests.service.conftest import Service, assert_problem, encode_grey, pixels
from tests.service.process import refused_start


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a shorter chain."""
    return save_tiny(tmp_path_factory.mktemp("models") / "short", num_train_timesteps=50)


@pytest.fixture(scope="module")
def two(model_dir: Path, other_dir: Path) -> Iterator[Service]:
    running = Service(Settings(models=(str(model_dir), str(other_dir)), device="cpu"))
    running.start()
    yield running
    running.stop()


BODY = {"label": 3, "seed": 5, "steps": 4, "sampler": "ddim"}


def test_a_request_means_the_model_it_names_or_the_first(
    two: Service, make_service: Callable[..., Service], other_dir: Path
) -> None:
    first, named, other = (two.generate({**BODY, **more}) for more in ({}, {"model": "tiny"}, {"model": "short"}))
    assert first.headers["x-model"].startswith("tiny@")
    assert first.content == named.content
    assert other.headers["x-model"] == f"short@{sha256_of(other_dir / 'unet' / WEIGHTS_NAME)[:12]}"
    assert other.content == two.generate({**BODY, "model": other.headers["x-model"]}).content
    assert other.content == make_service(model=other_dir).generate(BODY).content  # the same bytes as alone
    assert (pixels(other.content) != pixels(first.content)).any()


def test_the_limits_are_those_of_the_model_that_is_meant(two: Service) -> None:
    assert_problem(two.generate({"steps": 51, "model": "short"}), 422, "steps")
    assert two.generate({"steps": 51, "sampler": "ddim"}).status_code == 200
    assert_problem(two.noise(encode_grey(), t=50, model="short"), 422, "t")
    alpha_bars = {two.noise(encode_grey(), t=25, model=model).headers["x-alpha-bar"] for model in ("tiny", "short")}
    assert len(alpha_bars) == 2
    denoised = two.request(
        "POST", "/denoise", files={"image": ("x", encode_grey())}, data={"t": "49", "steps": "2", "model": "short"}
    )
    assert denoised.headers["x-model"].startswith("short@")


@pytest.mark.parametrize("model", ["none", "short@000000000000", "", "tiny@"])
def test_an_unknown_model_is_404_with_the_list(two: Service, model: str) -> None:
    for response in (
        two.generate({"model": model}),
        two.noise(encode_grey(), t=1, model=model),
        two.request("POST", "/denoise", files={"image": ("x", encode_grey())}, data={"t": "1", "model": model}),
    ):
        detail = assert_problem(response, 404)["detail"]
        assert "tiny@" in detail
        assert "short@" in detail


def test_pictures_have_urls_under_every_model(two: Service) -> None:
    linked = two.request("GET", "/images/short/ddim-4/3/5.png")
    assert linked.content == two.generate({**BODY, "model": "short"}).content
    assert linked.content != two.request("GET", "/images/tiny/ddim-4/3/5.png").content
    assert_problem(two.request("GET", "/images/none/ddim-4/3/5.png"), 404)


def test_both_work_at_once_and_an_id_in_flight_is_of_both(two: Service, hold: threading.Event) -> None:
    engines = two.app.state.engines
    hold.clear()

    async def crowd() -> list[int]:
        ask = two.client.post
        held = [
            asyncio.ensure_future(ask("/generate", json={**BODY, "model": m}, headers={"x-request-id": m}))
            for m in ("tiny", "short")
        ]
        while any(not one.states[0].slots_waiting for one in engines.by_name.values()):
            await asyncio.sleep(0.01)
        again = await ask("/generate", json={**BODY, "model": "tiny"}, headers={"x-request-id": "short"})
        ended = await two.client.delete("/requests/short")
        hold.set()
        return [again.status_code, ended.status_code, *(r.status_code for r in await asyncio.gather(*held))]

    assert two.run(crowd()) == [409, 204, 200, 410]
    assert engines.idle


def test_health_and_metrics_name_every_model(two: Service) -> None:
    health = two.request("GET", "/health").json()
    assert [model["model"] for model in health["models"]] == ["tiny", "short"]
    assert {k: health[k] for k in health["models"][0]} == health["models"][0]
    metrics = two.request("GET", "/metrics").text
    assert 'ddpm_slots_limit{model="tiny"}' in metrics
    assert 'ddpm_slots_limit{model="short"}' in metrics


def test_one_that_has_failed_is_a_service_that_has(two: Service) -> None:
    engine = two.app.state.engines.by_name["short"].engines[0]
    engine.status = "failed"
    try:
        assert two.request("GET", "/livez").status_code == 503
        assert two.request("GET", "/health").json()["status"] == "failed"
        assert [m["status"] for m in two.request("GET", "/health").json()["models"]] == ["ok", "failed"]
    finally:
        engine.status = "ok"


def test_capabilities_say_what_each_takes(two: Service) -> None:
    found = two.request("GET", "/capabilities").json()
    tiny, short = found["models"]
    assert (tiny["name"], tiny["image_shape"], tiny["num_train_steps"]) == ("tiny", [1, 28, 28], 1000)
    assert (short["num_train_steps"], short["num_classes"], short["guidance"]) == (50, 10, True)
    for model in (tiny, short):
        for sampler in model["samplers"]:
            body = {"sampler": sampler["name"], "model": model["id"], "label": 1}
            if sampler["steps"] <= 50:
                answer = two.generate(body, accept="application/json").json()
                assert (answer["sampler"], answer["steps"]) == (sampler["sampler"], sampler["steps"])
    assert found["limits"]["n"] == 64
    assert found["limits"]["scale"] == 16
    assert_problem(two.generate({"scale": 17}), 422, "scale")


def test_a_model_that_cannot_be_loaded_ends_the_process(model_dir: Path, tmp_path: Path) -> None:
    refused = refused_start(models=f"{model_dir},{tmp_path / 'none'}")
    assert "no model directory" in refused.stderr.splitlines()[-1]


def test_settings_of_several_models_that_do_not_fit_are_refused(model_dir: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(model_dir, tmp_path / model_dir.name)
    with pytest.raises(ValidationError, match="2 models are called tiny"):
        Settings(models=(str(model_dir), str(twin)))
    with pytest.raises(ValidationError, match="must be called by letters"):
        Settings(model=str(shutil.copytree(model_dir, tmp_path / "модель")))
    with pytest.raises(ValidationError, match="both set"):
        Settings(model=str(model_dir), models=(str(twin),))
    with pytest.raises(ValidationError, match="1 entries for 2 models"):
        Settings(models=(str(model_dir), "other"), model_sha256=("0" * 12,))


def test_the_default_model_is_never_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (model,) = Settings().served
    with pytest.raises(CheckpointError, match="it is no owner/name"):
        hub.locate(model)
    assert Settings(model="weights/mnist").served == ("weights/mnist",)  # who says so means it


# The Open Inference Protocol


def infer(service: Service, body: object, path: str = "/v2/models/tiny/infer"):
    return service.request("POST", path, json=body)


def tensor(name: str, *data: int) -> dict[str, object]:
    return {"name": name, "shape": [len(data)], "datatype": "INT64", "data": list(data)}


def test_the_protocols_metadata(two: Service) -> None:
    assert two.request("GET", "/v2").json()["name"] == "ddpm-service"
    metadata = two.request("GET", "/v2/models/short").json()
    assert metadata["inputs"] == [
        {"name": "seed", "datatype": "INT64", "shape": [-1]},
        {"name": "label", "datatype": "INT64", "shape": [-1]},
    ]
    assert metadata["outputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 1, 28, 28]}]
    (version,) = metadata["versions"]
    for path in ("/v2/models/short", f"/v2/models/short/versions/{version}"):
        assert two.request("GET", path).json() == metadata
        assert two.request("GET", f"{path}/ready").status_code == 200
    for path in ("/v2/models/none", "/v2/models/short/versions/1", "/v2/models/none/ready"):
        problem = assert_problem(two.request("GET", path), 404)
        assert problem["error"] == problem["detail"]  # what the protocol's clients read


def test_inference_draws_the_same_pixels_as_generate(two: Service) -> None:
    """Seeds need not follow one another."""
    body = {
        "id": "mine", "inputs": [tensor("seed", 9, 5), tensor("label", -1, 3)],
        "parameters": {"sampler": "ddim", "steps": 4},
    }  # fmt: skip
    answer = infer(two, body).json()
    assert (answer["model_name"], answer["id"]) == ("tiny", "mine")
    (images,) = answer["outputs"]
    assert (images["shape"], images["datatype"]) == ([2, 1, 28, 28], "UINT8")
    got = np.array(images["data"], np.uint8).reshape(images["shape"])
    for i, (seed, label) in enumerate([(9, None), (5, 3)]):
        wanted = two.generate({**BODY, "seed": seed, "label": label})
        assert np.array_equal(got[i, 0], pixels(wanted.content))


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "inputs"),
        ({"inputs": [tensor("label", 1)]}, "inputs"),
        ({"inputs": [tensor("seed", 1), tensor("seed", 1)]}, "inputs"),
        ({"inputs": [tensor("seed", 1, 2), tensor("label", 1)]}, "inputs"),
        ({"inputs": [tensor("seed", -1)]}, "inputs"),
        ({"inputs": [{**tensor("seed", 1, 2), "shape": [3]}]}, "inputs"),
        ({"inputs": [tensor("image", 1)]}, "inputs"),
        ({"inputs": [tensor("seed", 1), tensor("label", 10)]}, "label"),
        ({"inputs": [tensor("seed", 1)], "parameters": {"cheese": 1}}, "parameters"),
        ({"inputs": [tensor("seed", 1)], "parameters": {"steps": 0}}, "parameters"),
        ({"inputs": [tensor("seed", *range(65))]}, "n"),
    ],
)
def test_inference_that_cannot_be_is_422_and_named(two: Service, body: object, field: str) -> None:
    assert_problem(infer(two, body), 422, field)


@pytest.mark.parametrize(
    ("change", "parameters", "field", "said"),
    [
        ({}, {"priority": 1}, "parameters.priority", "unknown field; known: sampler, steps, eta"),
        ({}, {"steps": 0}, "parameters.steps", "greater than or equal to 1"),
        ({"kind": 1}, {}, "inputs.0.kind", "unknown field; known: name, shape, datatype"),
        ({"datatype": "INT32"}, {}, "inputs.0.datatype", "should be 'INT64'"),
        ({"shape": [1, 1]}, {}, "inputs.0.shape", "at most 1 item"),
        ({"data": [2**53]}, {}, "inputs.0.data.0", "less than or equal"),
    ],
)
def test_what_is_wrong_within_is_named_by_its_whole_path(
    two: Service, change: dict[str, object], parameters: dict[str, object], field: str, said: str
) -> None:
    body = {"inputs": [{**tensor("seed", 1), **change}], "parameters": parameters}
    (error,) = assert_problem(infer(two, body), 422)["errors"]
    assert error["field"] == field
    assert said in error["detail"]
