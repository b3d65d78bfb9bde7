"""The page in a real browser, at the real service: what a visitor sees is what the API sends."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, Route, expect

from tests.browser.conftest import Visit
from tests.networks import call_distilled
from tests.service.process import QUIET_S, Server, server, until

expect.set_options(timeout=QUIET_S * 1000)

KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def narrow(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service that wants a key for everything, and has room for four images of each of its models.

    One of them cannot denoise.
    """
    student = tmp_path_factory.mktemp("models") / "student"
    shutil.copytree(model_dir, student)
    call_distilled(student)
    settings = {"api_keys": KEY, "metrics_key": True, "queue_slots": 4, "max_images": 4, "docs": False}
    with server(models=f"{model_dir},{student}", **settings) as it:
        yield it


def step(page: Page, name: str) -> Locator:
    return page.locator(f"#{name}")


def fill(place: Locator, **fields: object) -> None:
    for name, value in fields.items():
        field = place.locator(f"[name={name}]")
        if name == "sampler":
            field.select_option(str(value))
        else:
            field.fill(str(value))


def label(place: Locator, *names: str) -> None:
    for name in names:
        place.get_by_role("checkbox", name=name, exact=True).check()


def go(place: Locator) -> None:
    place.locator(".go").click()


def done(place: Locator, n: int) -> list[bytes]:
    """The pictures, once they are there."""
    expect(place.locator(".tile input:enabled")).to_have_count(n)
    return shown(place)


def shown(place: Locator) -> list[bytes]:
    return [png_of(source) for source in place.locator(".tile img").evaluate_all("all => all.map(one => one.src)")]


def png_of(source: str) -> bytes:
    return base64.b64decode(source.removeprefix("data:image/png;base64,"))


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def generated(it: Server, **body: object) -> list[bytes]:
    headers = {"accept": "application/json", "x-api-key": KEY}
    answer = it.post("/generate", json=body, headers=headers).raise_for_status()
    return [base64.b64decode(image["b64_json"]) for image in answer.json()["images"]]


def picture(path: Path, size: int = 56) -> Path:
    """A file to upload: a slope with a bright square."""
    slope = np.tile(np.linspace(0, 200, size).astype(np.uint8), (size, 1))
    slope[size // 4 : size // 2, size // 4 : size // 2] = 255
    Image.fromarray(slope).save(path)
    return path


def draw_by_hand(page: Page) -> None:
    """A seven on the paper."""
    paper = page.locator("#sketch")
    paper.scroll_into_view_if_needed()
    box = paper.bounding_box()
    assert box is not None
    x, y, side = box["x"], box["y"], box["width"]
    page.mouse.move(x + 0.3 * side, y + 0.25 * side)
    page.mouse.down()
    for u, v in ((0.7, 0.25), (0.45, 0.8)):
        page.mouse.move(x + u * side, y + v * side, steps=4)
    page.mouse.up()


# ---- 1. draw


def test_pictures_form_live_and_are_those_of_the_api(tiny: Server, visit: Visit) -> None:
    page = visit(tiny, reduced_motion="no-preference")
    draw = step(page, "draw")
    fill(draw, n=3, sampler="ddim", steps=40, seed=5, scale=4)
    label(draw, "7")
    page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(() => window.seen.push([
                document.querySelector("#draw progress").value,
                document.querySelector("#draw .tile img").src,
            ])).observe(document.querySelector("#draw .tiles"), {subtree: true, attributeFilter: ["src"]});
        }"""
    )
    go(draw)
    final = done(draw, 3)
    seen = page.evaluate("window.seen")
    before = {source for value, source in seen if 0 < value < 1}
    assert len(before) > 5  # x_0_hat, again and again
    assert final == generated(tiny, n=3, sampler="ddim", steps=40, seed=5, scale=4, label=7)
    expect(draw.locator(".said")).to_have_text("seeds 5 to 7 · ddim, 40 steps")
    expect(page.locator("#live")).to_have_text("done, seeds 5 to 7")


def test_the_same_seed_draws_the_same_and_the_dice_another(tiny: Server, visit: Visit) -> None:
    page = visit(tiny)
    draw = step(page, "draw")
    fill(draw, n=1, seed=9)
    go(draw)
    first = done(draw, 1)
    draw.locator(".tile").evaluate("tile => tile.className += ' old'")
    go(draw)
    expect(draw.locator(".old")).to_have_count(0)
    assert done(draw, 1) == first
    draw.get_by_role("button", name="Draw with another seed").click()
    expect(draw.locator(".caption")).not_to_contain_text("Seed 9,")
    seed = int(draw.locator("[name=seed]").input_value())
    assert done(draw, 1) == generated(tiny, seed=seed, scale=8) != first


def test_several_labels_take_turns(tiny: Server, visit: Visit) -> None:
    page = visit(tiny)
    draw = step(page, "draw")
    label(draw, "3", "8")
    fill(draw, n=4, seed=1, scale=1)
    go(draw)
    assert done(draw, 4) == generated(tiny, n=4, seed=1, label=[3, 8, 3, 8])
    label(draw, "any")
    expect(draw.get_by_role("checkbox", name="3", exact=True)).not_to_be_checked()
    draw.get_by_role("checkbox", name="any").click(force=True)  # there is always one
    expect(draw.get_by_role("checkbox", name="any")).to_be_checked()


def test_cancel_frees_the_slots(tiny: Server, visit: Visit) -> None:
    page = visit(tiny)
    draw = step(page, "draw")
    fill(draw, n=64, sampler="reference")
    go(draw)
    expect(draw.locator(".said")).to_contain_text("of 1000 ·")
    assert tiny.metric("slots_running") > 0
    expect(draw.locator("[data-do=save]")).to_be_disabled()
    draw.get_by_role("button", name="Cancel").click()
    expect(draw.locator(".said")).to_contain_text("cancelled at step")
    tiny.wait_until_idle()
    expect(draw.locator(".cancel")).to_be_hidden()
    expect(draw.locator(".go")).to_be_focused()


def test_nothing_moves_while_it_draws(tiny: Server, visit: Visit) -> None:
    page = visit(tiny)
    draw = step(page, "draw")
    fill(draw, n=4, sampler="ddim", steps=40)
    expect(page.locator("#noise .strip img")).to_have_count(11)
    page.evaluate(
        """() => {
            window.moved = 0;
            new PerformanceObserver((list) => {
                for (const entry of list.getEntries()) window.moved += entry.value;
            }).observe({type: "layout-shift"});
        }"""
    )
    go(draw)
    done(draw, 4)
    assert page.evaluate("window.moved") == 0


def test_a_picture_is_saved_copied_and_has_its_url(tiny: Server, visit: Visit, tmp_path: Path) -> None:
    page = visit(tiny)
    draw = step(page, "draw")
    label(draw, "2")
    fill(draw, n=2, seed=30, scale=3, guidance_scale=2)
    go(draw)
    pictures = done(draw, 2)
    draw.get_by_role("radio", name="seed 31, label 2").check()
    with page.expect_download() as download:
        draw.get_by_role("button", name="Save").click()
    assert download.value.suggested_filename == "seed-31.png"
    assert download.value.path().read_bytes() == pictures[1]
    assert Image.open(io.BytesIO(pictures[1])).text["ddpm"]  # type: ignore[attr-defined]
    draw.get_by_role("button", name="Copy", exact=True).click()
    expect(draw.locator(".caption")).to_have_text("Copied")
    with page.context.expect_page() as tab:
        draw.get_by_role("link", name="Open").click()
    url = tab.value.url
    assert "/images/tiny@" in url
    assert httpx.get(url).content == pictures[1]


# ---- errors, the queue, the service's state


def test_errors_are_shown_at_their_fields(tiny: Server, visit: Visit) -> None:
    page = visit(tiny, expected=("status of 422",))
    draw = step(page, "draw")
    fill(draw, n=2)
    go(draw)
    before = done(draw, 2)
    fill(draw, n=65, scale=17)
    go(draw)
    expect(draw.locator(".error")).to_have_count(1)
    scale = draw.locator("[name=scale]")
    expect(scale).to_be_focused()
    expect(scale).to_have_attribute("aria-invalid", "true")
    described = scale.get_attribute("aria-describedby")
    expect(page.locator(f"#{described}")).to_have_text("Input should be less than or equal to 16")
    assert shown(draw) == before  # nothing is lost by an error
    fill(draw, scale=2)
    go(draw)
    expect(draw.locator("[data-field=n] .error")).to_have_text("65 is over the limit of 64 images a request")
    expect(scale).not_to_have_attribute("aria-invalid", "true")
    fill(draw, n=1, seed="many")
    go(draw)
    expect(draw.locator("[data-field=seed] .error")).to_have_text("a number is needed")
    fill(draw, seed=1)
    go(draw)
    done(draw, 1)
    expect(draw.locator(".error")).to_have_count(0)


def test_a_full_queue_is_waited_for(narrow: Server, visit: Visit) -> None:
    """With a countdown; and then it is drawn."""
    page = visit(narrow, expected=("status of 401", "status of 429"))
    give_key(page)
    headers = {"x-api-key": KEY}
    body = {"n": 4, "sampler": "reference"}
    long = threading.Thread(
        target=lambda: narrow.post("/generate", json=body, headers={**headers, "x-request-id": "long"})
    )
    long.start()
    engine = lambda: narrow.get("/health", headers=headers).json()["engine"]  # noqa: E731
    until(lambda: engine()["slots_running"] + engine()["slots_waiting"] == 4, "it is not full")
    draw = step(page, "draw")
    fill(draw, n=1, seed=3)
    go(draw)
    expect(draw.locator(".said")).to_have_text(re.compile(r"image slots .*; again in \d+ s"))
    expect(page.locator("#live")).to_contain_text("image slots")
    httpx.delete(f"{narrow.url}/requests/long", headers=headers)
    long.join()
    assert pixels(done(draw, 1)[0]).shape == (224, 224)


def test_the_key_is_asked_for_and_kept_from_urls(narrow: Server, visit: Visit) -> None:
    page = visit(narrow, expected=("status of 401",))
    expect(page.get_by_role("link", name="API")).to_have_count(0)  # DDPM_DOCS=false
    keys = page.locator("#key")
    expect(keys.locator("input")).to_be_focused()
    keys.locator("input").fill("wrong-0123456789")
    keys.locator("input").press("Enter")
    expect(keys.locator(".error")).to_have_text("this API key is not known here")
    give_key(page)
    expect(keys).to_be_hidden()
    draw = step(page, "draw")
    fill(draw, n=1, seed=12, scale=1)
    go(draw)
    drawn = done(draw, 1)[0]
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    with page.context.expect_page() as tab:
        draw.get_by_role("link", name="Open").click()
    tab.value.wait_for_url(re.compile("^blob:"), wait_until="commit")
    url = next(one for one in asked if "/images/" in one)
    assert httpx.get(url, headers={"x-api-key": KEY}).content == drawn
    assert KEY not in page.url + "".join(asked) + str(draw.locator("code").text_content())
    for language in ("curl", "python"):
        assert run_code(page, "draw", language, narrow) == [drawn]
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.reload()
    expect(draw.locator(".go")).to_be_enabled()  # the tab remembers
    page.get_by_role("button", name="Forget the key").click()
    expect(keys).to_be_visible()


def give_key(page: Page) -> None:
    page.locator("#key input").fill(KEY)
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#draw .go")).to_be_enabled()


def test_the_state_of_the_service_is_told_and_it_recovers(tiny: Server, visit: Visit) -> None:
    page = visit(tiny, expected=("status of 503",))
    state, banner = page.locator("#state"), page.locator("#banner")
    expect(state).to_have_text("ready · tiny · cpu · exact · 0 running, 0 waiting")
    health = tiny.get("/health").json()
    page.route("**/health", lambda route: route.fulfill(status=503, json={**health, "status": "draining"}))
    expect(banner).to_have_text("The service is shutting down. It takes no new work.")
    page.unroute("**/health")
    expect(banner).to_be_hidden()
    expect(page.locator("#exactness")).to_contain_text(health["engine"]["exactness"])


def test_a_lost_connection_is_told(tiny: Server, visit: Visit) -> None:
    page = visit(tiny, expected=("net::ERR",))
    draw = step(page, "draw")
    fill(draw, n=1)
    progress = {"step": 3, "steps": 9, "queue_position": 0, "eta_s": 1.0, "previews": []}
    cut = f"event: progress\ndata: {json.dumps(progress)}\n\nevent: prog"
    page.route("**/generate", lambda route: route.fulfill(content_type="text/event-stream", body=cut))
    go(draw)
    expect(draw.locator(".problem")).to_have_text("The connection was lost at step 3 of 9.")
    page.unroute("**/generate")
    page.context.set_offline(True)
    expect(page.locator("#banner")).to_have_text("The service cannot be reached. Trying again.")
    go(draw)
    expect(draw.locator(".problem")).to_have_text("The service cannot be reached.")
    page.context.set_offline(False)
    expect(page.locator("#banner")).to_be_hidden()
    go(draw)
    done(draw, 1)
    expect(draw.locator(".problem")).to_be_hidden()


# ---- 2. noise


def noised(it: Server, image: bytes, **fields: object) -> dict[int, bytes]:
    data = {"fit": "model", **{name: str(value) for name, value in fields.items()}}
    headers = {"accept": "application/json"}
    answer = it.post("/noise", files={"image": image}, data=data, headers=headers).raise_for_status()
    return {image["t"]: base64.b64decode(image["b64_json"]) for image in answer.json()["images"]}


def x_t(page: Page, t: int) -> bytes:
    """What is shown of t, once its own frame is there."""
    expect(page.locator(f'#x_t[data-t="{t}"]')).to_be_visible()
    source = page.locator("#x_t").get_attribute("src")
    assert source is not None
    return png_of(source)


def slide(page: Page, t: int) -> None:
    page.locator("#noise [name=t]").evaluate(
        "(slider, t) => { slider.value = t; slider.dispatchEvent(new Event('input', {bubbles: true})); }", t
    )


def test_an_upload_is_noised_and_scrubbed(tiny: Server, visit: Visit, tmp_path: Path) -> None:
    page = visit(tiny)
    upload = picture(tmp_path / "my picture.png")
    noise = step(page, "noise")
    fill(noise, seed=4)
    noise.locator("[type=file]").set_input_files(upload)
    expect(noise.locator("code")).to_contain_text("my picture.png")
    for t in (700, 0, 123, 999):
        slide(page, t)
        assert x_t(page, t) == noised(tiny, upload.read_bytes(), t=t, seed=4)[t]
        answer = tiny.post("/noise", files={"image": upload.read_bytes()}, data={"t": str(t)})
        alpha_bar = float(answer.headers["x-alpha-bar"])
        assert float(noise.locator("[data-is=alpha_bar]").inner_text()) == pytest.approx(alpha_bar, rel=0.05)
        assert noise.locator("[data-is=t]").inner_text() == str(t)
    for language in ("curl", "python"):
        made = run_code(page, "noise", language, tiny, upload)[0]
        assert np.array_equal(pixels(made), pixels(x_t(page, 999)))


def test_the_slider_asks_once_for_a_strip(tiny: Server, visit: Visit, tmp_path: Path) -> None:
    page = visit(tiny)
    expect(page.locator("#noise .strip img")).to_have_count(11)
    asked: list[Any] = []
    page.on("request", lambda request: asked.append(request) if request.url.endswith("/noise") else None)
    page.locator("#noise [type=file]").set_input_files(picture(tmp_path / "a.png"))
    expect(page.locator("#noise code")).to_contain_text("@a.png")
    x_t(page, 700)
    strip = len(asked)
    assert strip == 1  # and where the slider stands is in it
    for t in (0, 999):  # both are of the strip
        slide(page, t)
        x_t(page, t)
    assert len(asked) == strip


def test_the_slider_moved_while_the_strip_loads_spoils_nothing(tiny: Server, visit: Visit) -> None:
    page = visit(tiny)
    expect(page.locator("#noise .strip img")).to_have_count(11)
    held: list[Route] = []
    page.route("**/noise", lambda route: held.append(route))
    draw_by_hand(page)
    until(lambda: page.wait_for_timeout(20) or len(held) == 1, "the strip is not asked for")
    slide(page, 333)
    until(lambda: page.wait_for_timeout(20) or len(held) == 2, "the slider's t is not asked for")
    for route in list(held):
        route.continue_()
    x_t(page, 333)
    strip = page.locator("#noise .strip img")
    until(lambda: len(set(strip.evaluate_all("all => all.map(one => one.src)"))) == 11, "the strip has collapsed")


def test_what_is_no_picture_is_told_at_the_picture(tiny: Server, visit: Visit, tmp_path: Path) -> None:
    page = visit(tiny, expected=("status of 422",))
    noise = step(page, "noise")
    expect(noise.locator(".strip img")).to_have_count(11)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    noise.locator("[type=file]").set_input_files(bad)
    expect(noise.locator("[data-field=image] .error")).to_contain_text("not an image of a supported format")


def test_a_picture_is_dropped_and_another_pasted(tiny: Server, visit: Visit, tmp_path: Path) -> None:
    page = visit(tiny)
    expect(page.locator("#noise .strip img")).to_have_count(11)
    content = base64.b64encode(picture(tmp_path / "a.png").read_bytes()).decode()
    page.evaluate(
        """([content]) => {
            const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
            const transfer = (name) => {
                const all = new DataTransfer();
                all.items.add(new File([bytes], name, {type: "image/png"}));
                return all;
            };
            window.send = (kind, name) => (kind === "drop"
                ? document.querySelector("#noise").dispatchEvent(
                    new DragEvent("drop", {dataTransfer: transfer(name), bubbles: true, cancelable: true}))
                : document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer(name)})));
        }""",
        [content],
    )
    for kind in ("drop", "paste"):
        page.evaluate(f"window.send('{kind}', '{kind}.png')")
        expect(page.locator("#noise code")).to_contain_text(f"@{kind}.png")


# ---- 3. denoise


def test_a_digit_drawn_by_hand_is_noised_and_redrawn(tiny: Server, visit: Visit) -> None:
    page = visit(tiny)
    denoise = step(page, "denoise")
    expect(denoise.locator(".hint")).to_be_visible()
    expect(denoise.locator(".go")).to_be_disabled()
    draw_by_hand(page)
    expect(denoise.locator(".hint")).to_be_hidden()
    slide(page, 400)
    x_t(page, 400)
    label(denoise, "7")
    fill(denoise, n=2, scale=1, sampler="ddim", steps=6)
    expect(denoise.locator(".go")).to_have_text("Redraw from t = 400")
    go(denoise)
    pictures = done(denoise, 2)
    drawn = page.locator("#sketch").evaluate("canvas => canvas.toDataURL()")
    assert (pixels(png_of(drawn))[..., 0] > 200).sum() > 20  # ink
    fields = {"t": "400", "seed": "1", "label": "7", "n": "2", "sampler": "ddim", "steps": "6"}
    headers = {"accept": "application/json"}
    answer = tiny.post("/denoise", files={"image": png_of(drawn)}, data=fields, headers=headers).json()
    assert pictures == [base64.b64decode(image["b64_json"]) for image in answer["images"]]
    for language in ("curl", "python"):
        assert run_code(page, "denoise", language, tiny) == pictures
    page.locator("#noise [data-do=undo]").click()
    expect(denoise.locator(".go")).to_be_disabled()


def test_a_picture_of_step_1_goes_on_to_2_and_3(tiny: Server, visit: Visit) -> None:
    page = visit(tiny)
    draw, denoise = step(page, "draw"), step(page, "denoise")
    fill(draw, n=2, seed=77)
    go(draw)
    done(draw, 2)
    draw.get_by_role("radio", name="seed 78, label any").check()
    draw.get_by_role("button", name="Noise it").click()
    expect(page.locator("#noise [name=t]")).to_be_focused()
    native = generated(tiny, seed=78)[0]
    assert x_t(page, 700) == noised(tiny, native, t=700, seed=1)[700]
    fill(denoise, n=1, steps=4)
    go(denoise)
    redrawn = done(denoise, 1)
    for language in ("curl", "python"):
        assert run_code(page, "denoise", language, tiny) == redrawn


def test_the_first_picture_is_noised_until_somebody_has_an_own_one(tiny: Server, visit: Visit) -> None:
    page = visit(tiny)
    draw, noise = step(page, "draw"), step(page, "noise")
    for seed in (1, 2):
        fill(draw, n=1, seed=seed)
        go(draw)
        expect(noise.locator("code")).to_contain_text(f"/{seed}.png")
    draw_by_hand(page)
    expect(noise.locator("code")).to_contain_text("base64")
    fill(draw, seed=3)
    go(draw)
    expect(draw.locator(".said")).to_contain_text("seed 3 ·")
    expect(noise.locator("code")).to_contain_text("base64")


# ---- code


def run_code(page: Page, name: str, language: str, it: Server, *files: Path) -> list[bytes]:
    """What the code on the screen writes, run as it is."""
    place = step(page, name)
    place.locator(f".segments [value={language}]").check()
    expect(place.locator("code")).to_contain_text("import httpx" if language == "python" else "curl ")
    place.get_by_role("button", name="Copy code").click()
    code = page.evaluate("navigator.clipboard.readText()")
    assert code == place.locator("code").text_content()
    assert it.url in code
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            (Path(folder) / file.name).write_bytes(file.read_bytes())
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
        environment = {"PATH": "/usr/bin:/bin", "DDPM_API_KEY": KEY}
        subprocess.run(command, cwd=folder, check=True, timeout=QUIET_S, env=environment, capture_output=True)
        made = next(Path(folder).glob("*.zip"), None)
        if made is None:
            (made,) = (path for path in Path(folder).glob("*.png") if path.stem in ("generate", "noise", "denoise"))
            return [made.read_bytes()]
        with zipfile.ZipFile(made) as archive:
            return [archive.read(entry) for entry in archive.namelist()]


@pytest.mark.parametrize("n", [1, 3])
def test_the_code_writes_the_pictures_on_the_screen(tiny: Server, visit: Visit, n: int) -> None:
    page = visit(tiny)
    draw = step(page, "draw")
    label(draw, "1")
    fill(draw, n=n, sampler="ddim", eta=0.5, steps=7, guidance_scale=1.5, seed=6)
    go(draw)
    pictures = done(draw, n)
    for language in ("curl", "python"):
        assert run_code(page, "draw", language, tiny) == pictures


# ---- the link


def test_a_link_brings_the_screen_back(tiny: Server, visit: Visit) -> None:
    page = visit(tiny)
    draw, denoise = step(page, "draw"), step(page, "denoise")
    label(draw, "4", "6")
    fill(draw, n=2, sampler="ddim", steps=5, seed=21)
    go(draw)
    pictures = done(draw, 2)
    draw_by_hand(page)
    slide(page, 350)
    x_t(page, 350)
    label(denoise, "9")
    fill(denoise, n=1, steps=3)
    go(denoise)
    redrawn = done(denoise, 1)
    expect(page).to_have_url(re.compile("x_0=.*generate=.*denoise="))
    again = visit(tiny, fragment=page.url.partition("/#")[2].join(("#", "")))
    assert done(step(again, "draw"), 2) == pictures
    assert done(step(again, "denoise"), 1) == redrawn
    assert x_t(again, 350) == x_t(page, 350)
    expect(step(again, "draw").get_by_role("checkbox", name="6", exact=True)).to_be_checked()


def test_a_link_of_a_picture_and_what_was_made_of_it_brings_both_back(tiny: Server, visit: Visit) -> None:
    page = visit(tiny)
    draw, denoise = step(page, "draw"), step(page, "denoise")
    fill(draw, n=1, sampler="ddim", steps=5, seed=22)
    go(draw)
    pictures = done(draw, 1)
    fill(denoise, n=2, steps=3)
    go(denoise)
    redrawn = done(denoise, 2)
    expect(page).to_have_url(re.compile("generate=&denoise="))
    assert "x_0=" not in page.url
    again = visit(tiny, fragment=page.url.partition("/#")[2].join(("#", "")))
    assert done(step(again, "denoise"), 2) == redrawn
    assert done(step(again, "draw"), 1) == pictures


@pytest.mark.parametrize("spoilt", ["sampler=gone", "x_0=%25%25", "x_0=AAAA", "model=gone", "label=77", "t=many"])
def test_a_link_that_does_not_fit_brings_back_what_fits(tiny: Server, visit: Visit, spoilt: str) -> None:
    page = visit(tiny, fragment=f"#{spoilt}&n=2&steps=3&seed=8&generate=")
    assert len(done(step(page, "draw"), 2)) == 2
    asked: list[Any] = []
    page.on("request", lambda request: asked.append(request) if request.url.endswith("/health") else None)
    expect(page.locator("#state")).to_contain_text("ready")
    if "x_0=%" in spoilt:
        expect(page.locator("#noise .problem")).to_have_text("The picture in this link cannot be read.")
    until(lambda: page.wait_for_timeout(100) or len(asked), "the state is no longer asked for")


# ---- for everybody


def test_it_is_used_by_the_keyboard_alone(tiny: Server, visit: Visit) -> None:
    page = visit(tiny)
    expect(page.locator("#draw .go")).to_be_enabled()
    expect(page.locator("#noise .strip img")).to_have_count(11)
    order: list[str] = []

    def tab_to(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.name || document.activeElement.className"))
            focused = page.locator(":focus")
            assert focused.evaluate("one => one.getBoundingClientRect().width > 0")
            if focused.evaluate("(one, selector) => one.matches(selector)", selector):
                return
        raise AssertionError(f"{selector} is not reached: {order}")

    tab_to("#draw [name=label][value='5']")
    page.keyboard.press("Space")
    tab_to("#draw [name=n]")
    page.keyboard.type("2")
    page.keyboard.press("Enter")
    done(step(page, "draw"), 2)
    tab_to("#draw .tile input")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#draw .tile input").nth(1)).to_be_checked()
    tab_to("#draw [data-do=noise]")
    page.keyboard.press("Enter")
    slider = page.locator("#noise [name=t]")
    expect(slider).to_be_focused()
    page.keyboard.press("ArrowLeft")
    x_t(page, 699)
    page.locator("#sketch").focus()
    before = page.locator("#noise code").text_content()
    for key in ("Space", "ArrowRight", "ArrowDown", "ArrowRight", "Space"):
        page.keyboard.press(key)
    expect(page.locator("#noise code")).not_to_have_text(str(before))
    tab_to("#denoise .go")
    page.keyboard.press("Enter")
    done(step(page, "denoise"), 4)
    assert order.index("sampler") < order.index("seed") < order.index("primary go")


def test_every_control_has_a_name_and_every_picture_words(tiny: Server, visit: Visit) -> None:
    page = visit(tiny)
    fill(step(page, "draw"), n=2)
    go(step(page, "draw"))
    done(step(page, "draw"), 2)
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    found = [
        (node["role"]["value"], node.get("name", {}).get("value", "").strip())
        for node in nodes
        if not node["ignored"] and "role" in node
    ]
    controls = {
        "button", "checkbox", "radio", "textbox", "spinbutton", "slider", "combobox", "link", "image", "radiogroup",
        "progressbar", "region", "group",
    }  # fmt: skip
    named = [(role, name) for role, name in found if role in controls]
    assert len(named) > 60
    assert not [role for role, name in named if not name]
    assert [name for role, name in found if role == "heading"] == [
        "Pictures out of noise", "1 Draw", "2 Noise", "3 Denoise",
    ]  # fmt: skip
    assert not page.locator("[onclick], div[tabindex]").count()


CONTRAST = """() => {
    const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = (color) => color.slice(0, 3).map((v) => v / 255)
        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = (one) => {
        for (; one; one = one.parentElement) {
            const color = rgb(getComputedStyle(one).backgroundColor);
            if (color[3] !== 0) return color;
        }
    };
    const poor = [];
    for (const one of document.querySelectorAll("body *")) {
        const text = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        if (!text || !one.checkVisibility() || one.closest(":disabled, label:has(:disabled), svg, .unseen")) continue;
        if (one.matches(".button:not([href])")) continue;  // as good as disabled
        const pair = [light(rgb(getComputedStyle(one).color)), light(ground(one))].sort((a, b) => b - a);
        const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
        if (ratio < 4.5) poor.push([one.outerHTML.slice(0, 90), ratio]);
    }
    return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(tiny: Server, visit: Visit, scheme: str) -> None:
    page = visit(tiny, color_scheme=scheme, expected=("status of 422",))
    draw = step(page, "draw")
    fill(draw, n=2)
    go(draw)
    done(draw, 2)
    fill(draw, scale=17)
    go(draw)
    expect(draw.locator(".error")).to_be_visible()
    assert page.evaluate(CONTRAST) == []


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_no_width_scrolls_sideways(tiny: Server, visit: Visit, width: int) -> None:
    page = visit(tiny, viewport={"width": width, "height": 740}, has_touch=width == 360)
    draw = step(page, "draw")
    fill(draw, n=10)
    go(draw)
    done(draw, 10)
    draw_by_hand(page)
    expect(page.locator("#denoise .code")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input:not([type=file], [type=radio])")]
            .filter((one) => one.checkVisibility())
            .map((one) => [one.name || one.textContent, one.getBoundingClientRect().height])
            .filter(([, height]) => height < 24)"""
    )
    assert small == []  # WCAG 2.2, 2.5.8


def test_a_finger_draws(tiny: Server, visit: Visit) -> None:
    page = visit(tiny, viewport={"width": 360, "height": 740}, has_touch=True)
    paper = page.locator("#sketch")
    expect(page.locator("#noise .strip img")).to_have_count(11)
    paper.scroll_into_view_if_needed()
    box = paper.bounding_box()
    assert box is not None
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(page.locator("#noise code")).to_contain_text("base64")
    expect(page.locator("#denoise .go")).to_be_enabled()


# ---- several models, and one that cannot denoise


def test_the_models_take_turns(narrow: Server, visit: Visit) -> None:
    page = visit(narrow, expected=("status of 401",))
    give_key(page)
    draw, denoise = step(page, "draw"), step(page, "denoise")
    expect(draw.locator("[name=model] option")).to_have_text(["tiny", "student"])
    draw.locator("[name=model]").select_option("student")
    expect(denoise.locator(".without")).to_contain_text("student is distilled")
    expect(denoise.locator(".go")).to_be_hidden()
    expect(draw.locator("[name=steps]")).to_be_disabled()
    fill(draw, n=1, seed=2, scale=1)
    go(draw)
    assert done(draw, 1) == generated(narrow, model="student", seed=2)
    assert run_code(page, "draw", "curl", narrow) == shown(draw)
    expect(page).to_have_url(re.compile("model=student.*generate="))
    page.reload()
    expect(draw.locator("[name=model]")).to_have_value("student")
