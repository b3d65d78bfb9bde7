"""A model in this process: asked as the service asks it, so that the same seed gives the same bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image
from pydantic import ValidationError

from app import answers, drawing, errors, noising
from app.cli.asking import Answer, Question
from app.cli.errors import CommandError
from app.cli.options import MOST_IMAGES
from app.cli.progress import Bar
from app.engine.admission import Bounds
from app.engine.engine import Engine
from app.engine.request import EngineError, GenerateParams, ModelInfo, Progress
from app.engine.runner import Runner, info_of, read
from app.schemas import DenoiseRequest, GenerateRequest, NoiseRequest, parse_fields
from app.settings import Settings, wrong
from ddpm_core.hub import name_of
from ddpm_core.network import devices_of

MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 2**27
# A service bounds what one of many clients may take. Here there is one, and the machine is theirs: what is left are
# the pixels that Pillow takes for an attack, and the memory.
ONE_USER = {
    "max_images": MOST_IMAGES, "queue_slots": MOST_IMAGES, "frame_bytes": 2**40, "max_image_pixels": MOST_PIXELS,
}  # fmt: skip


@contextmanager
def told() -> Iterator[None]:
    """What is wrong with a request, a model or a setting as the one line that a command ends with."""
    try:
        yield
    except errors.Problem as problem:
        raise CommandError(problem.detail) from None
    except ValidationError as error:  # of settings
        raise CommandError("; ".join(wrong(error))) from None
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from None
    except (RuntimeError, MemoryError) as error:  # of torch: the device is full, or has failed
        raise CommandError(f"the step failed: {str(error) or type(error).__name__}") from None


def place(model: str | None) -> tuple[Settings, str, str | None]:
    """The settings of the environment, the model that is meant, and its pin where the model is the environment's."""
    settings = Settings()
    if model is not None:
        return settings, model, None
    return settings, settings.served[0], settings.model_sha256[0] if settings.model_sha256 else None


def ask(question: Question, model: str | None, device: str | None, bar: Bar) -> Answer:
    """Asks a model here, and waits. Raises CommandError."""
    if not bar.shown:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a fetch from the hub has bars of its own
    with told():
        return _noise(question, model) if question.path == "/noise" else _draw(question, model, device, bar)


def _noise(question: Question, model: str | None) -> Answer:
    fields = parse_fields(question.fields, NoiseRequest)
    _, reference, pin = place(model)
    info = info_of(read(reference, pin), "cpu", "torch")
    params = noising.to_noise_params(fields, info)
    assert question.image is not None
    content = noising.noised(question.image, params, info, question.media_type, MOST_PIXELS, _any)
    abars = ", ".join(map(repr, noising.alpha_bars(params, info)))
    return Answer(content, {"seed": params.seed, "model": info.id, "alpha_bar": abars})


def _draw(question: Question, model: str | None, device: str | None, bar: Bar) -> Answer:
    schema = GenerateRequest if question.image is None else DenoiseRequest
    body: GenerateRequest = parse_fields(question.fields, schema)
    settings, reference, pin = place(model)
    asked: list[GenerateParams] = []

    def load() -> Runner:
        """The model; what is wrong with the request is told before the engine looks at what the machine does."""
        runner = Runner.load(reference, device or devices_of(settings.device)[0], pin)
        asked.append(_params(question, body, runner.info, settings))
        bar.say(f"seeing how this machine runs {reference}")
        return runner

    bar.say(f"loading {reference}")
    bounds = Bounds(MOST_IMAGES)
    engine = Engine(
        load, bounds=bounds, exact=settings.exact, batch_rows=settings.batch_rows, brief=True, name=name_of(reference)
    )
    engine.load()
    (params,), info = asked, engine.info
    assert info is not None

    def tell(progress: Progress) -> None:
        bar.at(progress.step, progress.steps, progress.queue_position, progress.eta_s)

    with drawing.refusals_told(params):
        future = engine.submit(params, tell)
    while not future.done():
        engine.tick()  # on this thread: Ctrl-C ends it between two steps
    try:
        result = future.result()
    except EngineError as error:
        raise drawing.to_problem(error, params) from None
    encode = (answers.MOVING if params.frames else answers.STILL)[question.media_type]
    facts = {"seed": params.seeds[0], "model": info.id, "sampler": params.sampler, "steps": params.steps}
    return Answer(encode(result, params, info, body.scale), facts)


def _params(question: Question, body: GenerateRequest, info: ModelInfo, settings: Settings) -> GenerateParams:
    """The request, checked against the model."""
    start = None
    if isinstance(body, DenoiseRequest):
        assert question.image is not None
        start = noising.start(question.image, body, info, MOST_PIXELS, _any)
    return drawing.to_params(body, info, settings.model_copy(update=ONE_USER), "cli", start=start)


def _any(pixels: int) -> None:
    """Takes any number of pixels: nobody else is here."""
