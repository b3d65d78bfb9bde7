"""Whether a request is accepted, and how long it will take: by the work before it and the measured time of a step."""

from __future__ import annotations

import dataclasses

from app.engine.request import DeadlineTooSoon, EngineBusy, GenerateParams
from app.engine.scheduler import Scheduler
from app.engine.steptime import StepTime


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What may be in the engine at once."""

    slots: int  # images
    flow_slots: int | None = None  # images of one flow; None: as many as of all
    queue_s: float | None = None  # seconds until its first step that a request may expect; None: any


def admit(
    params: GenerateParams, scheduler: Scheduler, step_time: StepTime, rows_limit: int, bounds: Bounds
) -> float:  # fmt: skip
    """The seconds until the request will have ended.

    Raises:
        EngineBusy: there is no room for it.
        DeadlineTooSoon: it would end after its deadline.
    """
    slots, of_flow = scheduler.slots, scheduler.slots_of(params.flow)

    def until_free_s(missing: int, flow: str | None = None) -> float:
        return step_time.finish_s(scheduler.work_until_free(missing, flow), 0, rows_limit, rows_limit)

    if (missing := slots + params.slots - bounds.slots) > 0:
        raise EngineBusy(
            "queue_full",
            f"{slots} of {bounds.slots} image slots are taken, and this request asks for {params.slots}",
            until_free_s(missing),
        )
    if bounds.flow_slots is not None and (missing := of_flow + params.slots - bounds.flow_slots) > 0:
        raise EngineBusy(
            "key_full",
            f"{of_flow} of {bounds.flow_slots} image slots of this API key are taken, "
            f"and this request asks for {params.slots}",
            until_free_s(missing, params.flow),
        )
    ahead = scheduler.ahead_of_new(params.flow, params.images)
    wait_s = step_time.finish_s(ahead, 0, scheduler.rows, rows_limit)
    if bounds.queue_s is not None and wait_s > bounds.queue_s:
        raise EngineBusy(
            "queue_long",
            f"this request would wait {wait_s:.1f} s for its first step, {bounds.queue_s:g} s are allowed",
            wait_s - bounds.queue_s,
        )
    needed_s = step_time.finish_s(*scheduler.left_of_new(params.flow, params.images), rows_limit)
    if params.deadline_s is not None and needed_s > params.deadline_s:
        alone = Scheduler().left_of_new(params.flow, params.images)
        alone_s = step_time.finish_s(*alone, rows_limit, lately=False)
        if slots or alone_s > params.deadline_s:  # an idle engine may have become faster than it was lately
            raise DeadlineTooSoon(needed_s, min(alone_s, needed_s))
    return needed_s
