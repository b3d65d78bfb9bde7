"""GET /capabilities: what may be asked for here."""

from __future__ import annotations

from fastapi import APIRouter, Request

from app.capabilities import limits, of_model
from app.description import problems
from app.engine.engines import Engines
from app.routes.common import check_ready
from app.schemas_service import Capabilities
from ddpm_core import __version__

router = APIRouter(tags=["models"])


@router.head("/capabilities", include_in_schema=False)
@router.get("/capabilities", responses=problems(503))
async def capabilities(request: Request) -> Capabilities:
    """The models, the samplers of each, and the limits of this deployment."""
    check_ready(request)
    engines: Engines = request.app.state.engines
    return Capabilities(
        version=__version__,
        models=[of_model(info) for info in engines.infos],
        limits=limits(request.app.state.settings),
    )
