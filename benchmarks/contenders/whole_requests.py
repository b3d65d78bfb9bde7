"""The service with its engine's policy exchanged: a batch is admitted when the one before it has ended.

Everything else is the service's: what it is slower or faster by, with the same rows a step, is due to joining and
leaving between steps.
"""

from __future__ import annotations

import uvicorn

from app import logs
from app.main import create_app
from app.settings import Settings
from benchmarks.policies import WholeRequests


def main() -> None:
    settings = Settings()
    app = create_app(settings)
    app.state.engines.default.engines[0].scheduler = WholeRequests()  # before the lifespan starts the engine's thread
    uvicorn.run(app, host=settings.host, port=settings.port, log_config=logs.CONFIG)


if __name__ == "__main__":
    main()
