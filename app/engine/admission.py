"""Whether a request is accepted, and how long it will take: by the work before it and the measured time of a step."""

from __future__ import annotations

import math

from app.engine.request import DeadlineTooSoon, EngineBusy, GenerateParams
from app.engine.scheduler import Scheduler
from app.engine.steptime import StepTime


def admit(
    params: GenerateParams, scheduler: Scheduler, step_time: StepTime, rows_limit: int, queue_slots: int
) -> float:
    """The seconds until the request will have ended.

    Raises:
        EngineBusy: the queue has no room for its images.
        DeadlineTooSoon: it would end after its deadline.
    """
    slots = scheduler.slots
    if (missing := slots + params.slots - queue_slots) > 0:
        wait_s = step_time.finish_s(scheduler.work_until_free(missing), 0, rows_limit, rows_limit)
        raise EngineBusy(slots, queue_slots, max(1, math.ceil(wait_s)))
    needed_s = step_time.finish_s(*scheduler.left_of_new(params.flow, params.images), rows_limit)
    if params.deadline_s is not None and needed_s > params.deadline_s:
        alone = Scheduler().left_of_new(params.flow, params.images)
        alone_s = step_time.finish_s(*alone, rows_limit, lately=False)
        if slots or alone_s > params.deadline_s:  # an idle engine may have become faster than it was lately
            raise DeadlineTooSoon(needed_s, alone_s)
    return needed_s
