"""`python -m app`: the service on one process, configured by DDPM_* environment variables."""

from __future__ import annotations

import math
import signal
import sys

import uvicorn
from pydantic import ValidationError

from app.main import create_app
from app.settings import Settings


def main() -> int:
    try:
        settings = Settings()
    except ValidationError as error:
        for e in error.errors(include_url=False):
            name = "".join(f"DDPM_{field}: ".upper() for field in e["loc"])
            print(f"error: {name}{e['msg']}", file=sys.stderr)
        return 2
    app = create_app(settings)
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, timeout_graceful_shutdown=math.ceil(settings.drain_s)
    )
    server = uvicorn.Server(config)

    def on_failure(error: BaseException) -> None:
        if app.state.engine.info is None:  # it never became ready: nothing to serve
            server.should_exit = True

    app.state.engine.on_failure = on_failure
    for signum in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again once it has ended: the exit code is ours
        signal.signal(signum, lambda signum, frame: None)
    server.run()
    failure = app.state.engine.failure
    if failure is not None:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
