"""What Ray Serve deploys: the app as ingress, and an autoscaled deployment of engines for each model.

    serve run deploy.ray.service:build

Arguments (`serve run ... replicas=4 gpus=1`, or `args` of a config file) are those of Scale; everything else is set by
the DDPM_* variables, which are read where this is run.
"""

import itertools

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from ray import serve
from ray.exceptions import TaskCancelledError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.engine.engines import Engines
from app.main import create_app
from app.metrics import Metrics
from app.settings import Settings
from ddpm_core.hub import name_of
from deploy.ray.autoscaling import ByWaiting
from deploy.ray.engine import Engine
from deploy.ray.remote import RemoteReplicas, Together
from deploy.ray.router import FewestImages

NO_BOUND = 1_000_000  # requests
INGRESS_REQUESTS = 4096  # at once: the engines bound what is drawn, the ingress's own budgets what is uploaded
ON_HEAD = {"node:__internal_head__": 0.001}  # no other node that is lost takes connections with it
LOOK_BACK_S = 11.0  # over which the images that wait are averaged: Ray Serve asks for more than 10
QUIET = LoggingConfig(enable_access_log=False)  # every look at a replica would be a line


class Scale(BaseModel):
    """How large it may become."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_replicas: int = Field(1, ge=1, description="Engines of each model at least.")
    max_replicas: int = Field(1, ge=1, description="And at most.")
    gpus: float = Field(0, ge=0, description="GPUs of an engine; 0: it runs on the CPU.")
    cpus: float = Field(1, gt=0, description="CPUs of an engine: as many threads compute.")
    waiting: float = Field(1.0, gt=0, description="Images that may wait in each engine, in full steps.")
    upscale_delay_s: float = Field(10.0, ge=0, description="How long more must be wanted.")
    downscale_delay_s: float = Field(300.0, ge=0, description="How long less must be enough.")


class Proxied:
    """ASGI middleware for an app behind Ray Serve's proxy, which has ways of its own.

    It tells of a client that leaves by an error, and puts the request's id on every answer itself.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_or_gone() -> Message:
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": "http.disconnect"}

        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive_or_gone, send_without_id)


class Ingress:
    """The app in a replica: what it serves is drawn elsewhere."""

    def __init__(self, settings: Settings, handles: list[DeploymentHandle[Engine]]) -> None:
        self._settings, self._handles = settings, handles

    def __serve_build_asgi_app__(self) -> FastAPI:
        def remote(settings: Settings, metrics: Metrics) -> Engines:
            found = [
                RemoteReplicas(name_of(model), handle, metrics)
                for model, handle in zip(settings.served, self._handles, strict=True)
            ]
            own = metrics.registry
            metrics.registry = Together(own, lambda: itertools.chain(*(replicas.metrics() for replicas in found)))
            return Engines(found)

        app = create_app(self._settings, remote)
        app.add_middleware(Proxied)
        return app


def build(scale: Scale) -> serve.Application:  # Ray Serve reads this annotation: no `from __future__` here
    """The application, by the settings of the environment.

    Raises:
        ValueError: settings that this cannot honour.
    """
    settings = Settings()
    device = _device(settings.device, scale.gpus)
    engines = []
    for model, pin in itertools.zip_longest(settings.served, settings.model_sha256):
        own = settings.model_copy(
            update={
                "models": (),
                "model": model,
                "model_sha256": () if pin is None else (pin,),
                "device": device,
                "api_keys": SecretStr(""),  # the ingress asks for them; here only their share counts
                "key_slots": settings.slots_of_key,
            }
        )
        policy = AutoscalingPolicy(policy_function=ByWaiting, policy_kwargs={"waiting": scale.waiting})  # type: ignore[no-untyped-call]
        engine = serve.deployment(
            name=f"engine-{name_of(model)}",
            ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
            max_ongoing_requests=NO_BOUND,  # it has one of its own, which counts images and refuses at once
            max_queued_requests=settings.queue_slots,  # while no replica is up
            request_router_config=RequestRouterConfig(request_router_class=FewestImages),  # type: ignore[arg-type]
            graceful_shutdown_timeout_s=settings.drain_s,
            health_check_period_s=5,
            logging_config=QUIET,
            autoscaling_config=AutoscalingConfig(
                min_replicas=scale.min_replicas,
                max_replicas=scale.max_replicas,
                upscale_delay_s=scale.upscale_delay_s,
                downscale_delay_s=scale.downscale_delay_s,
                look_back_period_s=max(LOOK_BACK_S, scale.upscale_delay_s),
                policy=policy,
            ),
        )(Engine)
        engines.append(engine.bind(own))
    ingress = serve.deployment(
        name="ingress",
        num_replicas=1,
        max_ongoing_requests=INGRESS_REQUESTS,
        graceful_shutdown_timeout_s=2 * settings.drain_s,  # for clients that wait, and for asynchronous requests
        ray_actor_options={"num_cpus": 0, "resources": ON_HEAD},
    )(serve.ingress()(Ingress))
    return ingress.bind(settings, engines)


def _device(name: str, gpus: float) -> str:
    """What each replica has, of those that Ray gives it. Raises ValueError."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"DDPM_DEVICE={name}: each replica has one device, which Ray chooses: auto, cpu or cuda")
    if name == ("cpu" if gpus else "cuda"):
        raise ValueError(f"DDPM_DEVICE={name} and gpus={gpus:g} contradict each other: leave DDPM_DEVICE out")
    return "cuda" if gpus else "cpu"
