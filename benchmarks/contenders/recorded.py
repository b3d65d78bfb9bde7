"""The service as it is, which also prints of each step its rows and the milliseconds that the engine took for it."""

from __future__ import annotations

import time

import uvicorn

from app import logs
from app.engine.engine import Engine
from app.engine.scheduler import Image, Scheduler
from app.main import create_app
from app.settings import Settings


class Noted(Scheduler):
    """The shipped policy, which keeps what it chose last."""

    chosen: list[Image]

    def next(self, rows: int) -> list[Image]:
        self.chosen = super().next(rows)
        return self.chosen


def record(engine: Engine) -> None:
    """Before its thread starts."""
    scheduler, tick = Noted(), engine.tick

    def recorded(waited_s: float = 0.0) -> None:
        start = time.perf_counter()
        tick(waited_s)
        if scheduler.chosen:
            print(f"step {len(scheduler.chosen)} {1000 * (time.perf_counter() - start):.3f}", flush=True)

    engine.scheduler = scheduler
    engine.tick = recorded  # type: ignore[method-assign]


def main() -> None:
    settings = Settings()
    app = create_app(settings)
    record(app.state.engines.default.engines[0])
    uvicorn.run(app, host=settings.host, port=settings.port, log_config=logs.CONFIG)


if __name__ == "__main__":
    main()
