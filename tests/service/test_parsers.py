"""Everything that parses what strangers send, against what nobody thought of: the answer is always a whole one."""

from __future__ import annotations

import json
import math
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.schemas import GenerateRequest
from tests.service.conftest import Service, assert_problem, encode_grey

EXPECTED = {200, 204, 304, 404, 405, 406, 409, 413, 415, 422, 429}
QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)

numbers = st.integers() | st.floats() | st.sampled_from([1e400, -0.0, 2**53, 2**63, 10**400, math.nan, math.inf])
text = st.text(st.characters(), max_size=30)  # lone surrogates too
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from([*GenerateRequest.model_fields, "t", "fit", "image", "model"]) | text


def check(response: httpx.Response) -> None:
    """A success, or a whole problem, as UTF-8."""
    assert response.status_code in EXPECTED, response.text
    response.content.decode() if response.status_code >= 400 else None
    if response.status_code >= 400 and response.request.method != "HEAD":
        json.dumps(assert_problem(response, response.status_code), ensure_ascii=False).encode()


def small(body: Any) -> Any:
    """The same, but not hours of work where it happens to be a good request."""
    if isinstance(body, dict):
        for name, most in (("n", 3), ("steps", 5)):
            if type(body.get(name)) is int:
                body[name] = min(body[name], most)
        body.setdefault("steps", 2)
    return body


@QUICK
@given(body=st.dictionaries(fields, values, max_size=6) | values)
@example(body={"\ud800": 1})
@example(body={"eta": math.nan})
@example(body={"label": [math.inf, "\udfff"]})
@example(body={"seed": 10**400})
def test_any_json_has_a_whole_answer(service: Service, body: Any) -> None:
    content = json.dumps(small(body))
    check(service.request("POST", "/generate", content=content, headers={"content-type": "application/json"}))


@QUICK
@given(content=st.binary(max_size=300) | st.text(max_size=100).map(lambda s: s.encode("utf-16")))
@example(content=b"[" * 10_000)
@example(content=b'{"a":' * 2_000)
@example(content=b'{"n": 1e1000000000}')
@example(content=b'{"n": ' + b"1" * 10_000 + b"}")
@example(content=b'{"eta": NaN, "label": -Infinity}')
@example(content=b"\xff\xfe{\x00}\x00")
def test_any_bytes_as_json_have_a_whole_answer(service: Service, content: bytes) -> None:
    check(service.request("POST", "/generate", content=content, headers={"content-type": "application/json"}))


@QUICK
@given(given=st.dictionaries(fields, text | numbers.map(str), max_size=6), path=st.sampled_from(["/noise", "/denoise"]))
def test_any_text_fields_of_a_form_have_a_whole_answer(service: Service, given: dict[str, str], path: str) -> None:
    """Lone surrogates cannot be sent in UTF-8; what a strange charset makes of bytes is below."""
    data = {
        name.encode("utf-8", "replace").decode(): v.encode("utf-8", "replace").decode() for name, v in given.items()
    }
    data = {"t": "3", "steps": "2", **data} if path == "/denoise" else {"t": "3", **data}
    data.pop("n", None)
    check(service.request("POST", path, data=data, files={"image": ("x", encode_grey())}))


CHARSETS = ["utf-8", "utf-7", "utf-16", "utf-32", "unicode_escape", "raw_unicode_escape", "idna", "punycode",
            "undefined", "hex", "zlib", "rot13", "mbcs", "cp1252", "nonsense", "\u00e9"]  # fmt: skip


@QUICK
@given(
    charset=st.sampled_from(CHARSETS),
    name=st.binary(max_size=20),
    value=st.binary(max_size=20),
    cut=st.integers(0, 400),
)
@example(charset="unicode_escape", name=rb"\ud800", value=rb"\udfff", cut=0)
@example(charset="utf-7", name=b"+2AA-", value=b"+2AA-", cut=0)
def test_any_form_has_a_whole_answer(service: Service, charset: str, name: bytes, value: bytes, cut: int) -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="t"\r\n\r\n3\r\n'
        b'--b\r\nContent-Disposition: form-data; name="' + name + b'"\r\n\r\n' + value + b"\r\n"
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + encode_grey() + b"\r\n--b--\r\n"
    )
    headers = {"content-type": f"multipart/form-data; boundary=b; charset={charset}".encode()}
    check(service.request("POST", "/noise", content=body[: len(body) - cut], headers=headers))  # type: ignore[arg-type]


@QUICK
@given(content=st.binary(max_size=300), kind=st.text(st.characters(max_codepoint=255), max_size=40))
def test_any_content_type_has_a_whole_answer(service: Service, content: bytes, kind: str) -> None:
    headers = {b"content-type": kind.encode("latin-1")}
    check(service.request("POST", "/noise", content=content, headers=headers))  # type: ignore[arg-type]
    check(service.request("POST", "/generate", content=content, headers=headers))  # type: ignore[arg-type]


visible = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=40)
ACCEPTS = ["*/*", "image/png", "text/html", "q=0.5", ";q=2", "*", "a/b;q=nan", "image/*;q=-1", ",", "/", "//", "*/;q="]


@QUICK
@given(accept=st.lists(st.sampled_from(ACCEPTS) | visible, max_size=5).map(",".join))
def test_any_accept_has_a_whole_answer(service: Service, accept: str) -> None:
    headers = {b"accept": accept.encode("latin-1")}
    for method, path in (("POST", "/generate"), ("GET", "/metrics"), ("GET", "/health")):
        check(service.request(method, path, headers=headers))  # type: ignore[arg-type]


@QUICK
@given(
    name=st.sampled_from(
        [
            "x-request-id",
            "if-none-match",
            "host",
            "content-length",
            "origin",
            "authorization",
            "x-api-key",
            "cookie",
            "range",
            "expect",
            "x-forwarded-for",
            "forwarded",
            "traceparent",
            "content-encoding",
            "transfer-encoding",
        ]
    ),
    value=visible,
)
@example(name="host", value="[")
@example(name="host", value="x:99999999")
@example(name="content-length", value="9" * 5000)
@example(name="content-length", value="\u00b2")
def test_any_header_has_a_whole_answer(service: Service, name: str, value: str) -> None:
    headers = {name.encode(): value.encode("latin-1")}
    for method, path in (
        ("POST", "/generate"), ("GET", "/images/tiny/ddim-1/1/1.png"), ("GET", "/nowhere"), ("PUT", "/health"),
    ):  # fmt: skip
        check(service.request(method, path, headers=headers))  # type: ignore[arg-type]


@QUICK
@given(
    parts=st.lists(
        st.sampled_from(["images", "tiny", "ddim-1", "7", "1.png", "..", "requests", "%2e"]) | text, max_size=6
    ),
    query=st.text(st.characters(max_codepoint=255), max_size=30),
    method=st.sampled_from(["GET", "HEAD", "DELETE", "OPTIONS", "PATCH"]),
)  # fmt: skip
@example(parts=["images", "tiny", "ddim-" + "9" * 5000, "7", "1.png"], query="", method="GET")
@example(parts=["images", "tiny", "ddim-\u0661", "7", "\u0661.png"], query="", method="GET")
@example(parts=["images", "tiny", "ddim-1", "7", "1.png"], query="scale=%ff&eta=nan", method="GET")
@example(parts=["%\x1f"], query="", method="GET")
@example(parts=["images", "tiny", "ddim-1", "7", "1.png"], query="&".join(["eta=0"] * 2000), method="GET")
def test_any_path_and_query_have_a_whole_answer(service: Service, parts: list[str], query: str, method: str) -> None:
    escapes = ("%" if part.startswith("%") else "" for part in parts)  # as they are: broken ones come, too
    path = "/" + "/".join(quote(part, safe=kept, errors="replace") for part, kept in zip(parts, escapes, strict=True))
    check(service.request(method, f"http://test{path}?{quote(query, safe='&=%')}"))


@pytest.mark.parametrize("how_long", [100, 10_000])
def test_an_error_does_not_grow_with_what_was_sent(service: Service, how_long: int) -> None:
    """Names that clients chose are shortened: an answer must not be a copy of the request."""
    long = "x" * how_long
    sent = [
        service.generate({long: 1}),
        service.noise(encode_grey(), **{"t": 1, long: 1}),
        service.request("GET", f"/images/tiny/ddim-{long}/1/1.png"),
        service.request("GET", f"/{long}"),
    ]
    assert all(len(response.content) < 6_000 for response in sent)
    assert {response.status_code for response in sent} == {404, 422}
