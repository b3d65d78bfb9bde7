"""The description of the API is a promise: it changes only on purpose."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from app.main import create_app
from app.settings import Settings

SNAPSHOT = Path(__file__).parent / "openapi.json"
RENEW = "DDPM_RENEW=1 python -m pytest tests/service/test_openapi.py"


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    return json.loads(json.dumps(create_app(Settings()).openapi()))


def test_it_is_as_it_was(description: dict[str, Any]) -> None:
    text = json.dumps(description, indent=1, ensure_ascii=False) + "\n"
    if os.environ.get("DDPM_RENEW"):
        SNAPSHOT.write_text(text)
    assert description == json.loads(SNAPSHOT.read_text()), f"if it is meant: {RENEW}, and tell it in CHANGELOG.md"


def operations(description: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{m} {p}", o) for p, methods in description["paths"].items() for m, o in methods.items()]


def test_every_operation_is_told_and_named_for_generated_clients(description: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, operation in operations(description)]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)
    known = {tag["name"] for tag in description["tags"]}
    for path, operation in operations(description):
        assert operation["description"], path
        assert set(operation["tags"]) <= known, path


def test_every_error_is_described_with_an_example_that_fits(description: dict[str, Any]) -> None:
    wanted = set(description["components"]["schemas"]["ProblemBody"]["required"])
    for path, operation in operations(description):
        assert {"422", "500"} <= operation["responses"].keys(), path
        for status, response in operation["responses"].items():
            if int(status) < 400 or response.get("content", {}).keys() <= {"application/json"}:
                continue  # probes say it by the status, /health in its own form
            problem = response["content"]["application/problem+json"]
            assert problem["schema"] == {"$ref": "#/components/schemas/ProblemBody"}
            assert wanted <= problem["example"].keys()
            assert problem["example"]["status"] == int(status)
            assert ("Retry-After" in response.get("headers", {})) == (status in ("429", "503"))


def test_every_body_has_an_example_or_described_fields(description: dict[str, Any]) -> None:
    for path, operation in operations(description):
        for kind, content in operation.get("requestBody", {}).get("content", {}).items():
            if kind == "application/json":
                assert content["example"], path
                name = content["schema"]["$ref"].rpartition("/")[2]
                properties = description["components"]["schemas"][name]["properties"]
            else:
                properties = content["schema"]["properties"]
            plain = [
                name
                for name, field in properties.items()
                if not {"description", "enum", "anyOf", "const"} & field.keys()
            ]
            assert not plain, f"{path}: {plain}"


def test_limits_are_those_of_the_deployment() -> None:
    schemas = create_app(Settings(max_images=7)).openapi()
    generate = schemas["components"]["schemas"]["GenerateRequest"]["properties"]
    denoise = schemas["paths"]["/denoise"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert generate["n"]["maximum"] == denoise["properties"]["n"]["maximum"] == 7
    assert (generate["scale"]["maximum"], generate["guidance_scale"]["maximum"]) == (16, 20)


def test_no_reference_leads_nowhere(description: dict[str, Any]) -> None:
    text = json.dumps(description)
    found = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert found <= description["components"]["schemas"].keys()
