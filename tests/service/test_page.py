"""The page and its files as HTTP has them; what they do is tested in a browser (tests/browser)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from app.routes import page
from tests.service.conftest import Service, assert_problem

ROOT = Path(__file__).parent.parent.parent
WEIGHT_BYTES = 80_000  # of everything


def test_the_page_is_light_and_names_no_other_host(service: Service) -> None:
    index = service.request("GET", "/")
    assert index.headers["content-type"] == "text/html; charset=utf-8"
    texts = [index.text]
    for path in sorted((ROOT / "app" / "web").iterdir()):
        if path.name == "index.html":
            continue
        file = service.request("GET", f"/web/{path.name}")
        assert file.headers["content-type"] == page.MEDIA_TYPES[path.suffix]
        texts.append(file.text)
    assert sum(len(text.encode()) for text in texts) < WEIGHT_BYTES
    hosts = set(re.findall(r"https?://([^/\"'\s]+)", "".join(texts)))
    assert hosts == {"www.w3.org"}  # the name of SVG
    asked = re.findall(r"(?:src|href)=\"([^#\"][^\"]*)\"", index.text)
    assert asked
    assert all(not url.startswith("/") for url in asked)  # relative: any prefix of a proxy's will do


def test_nothing_inline_is_needed_or_allowed(service: Service) -> None:
    index = service.request("GET", "/")
    policy = index.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script>", index.text)
    assert service.request("GET", "/web/main.js").headers["content-security-policy"] == policy


def test_a_visitor_who_has_it_gets_304(service: Service) -> None:
    for path in ("/", "/web/page.css", "/web/main.js"):
        first = service.request("GET", path)
        assert first.headers["cache-control"] == "no-cache"
        again = service.request("GET", path, headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
        head = service.request("HEAD", path)
        assert (head.status_code, head.headers["etag"], head.content) == (200, first.headers["etag"], b"")


def test_only_its_own_files_are_sent(service: Service) -> None:
    for name in ("nothing.js", "..%2Fsettings.py", "%2e%2e%2fsettings.py", "index.html"):
        assert_problem(service.request("GET", f"/web/{name}"), 404)


def test_the_page_can_be_turned_off_and_does_not_link_docs_that_are(make_service: Callable[..., Service]) -> None:
    assert 'href="docs"' in make_service().request("GET", "/").text
    assert 'href="docs"' not in make_service(docs=False).request("GET", "/").text
    closed = make_service(page=False)
    for path in ("/", "/web/main.js"):
        assert_problem(closed.request("GET", path), 404)
    assert closed.request("GET", "/docs").status_code == 200
