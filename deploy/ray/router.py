"""Which replica gets a request: the one that has the fewest images in hand, as far as this ingress knows."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

SENDING_S = 2.0  # in which a replica takes what was chosen for it, or never will


class FewestImages(RequestRouter):
    """Ray Serve's own choice goes by the number of requests, and one may be of 64 images.

    Requests are those of Engine.draw: `avoid` names the replicas that have refused one, which come last.
    """

    def initialize_state(self, **_: Any) -> None:
        self._in_hand: dict[str, tuple[ReplicaID, int]] = {}  # replica and images, by Ray Serve's id of a request
        self._chosen: dict[str, tuple[ReplicaID, int, float]] = {}  # the same of what is being sent, and since when

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One iteration; the replicas in the order in which they are to be tried."""
        now = time.monotonic()
        self._chosen = {key: chosen for key, chosen in self._chosen.items() if now - chosen[2] < SENDING_S}
        images = Counter[ReplicaID]()
        for replica_id, slots in [*self._in_hand.values(), *(chosen[:2] for chosen in self._chosen.values())]:
            images[replica_id] += slots
        draw = pending_request is not None and pending_request.metadata.call_method == "draw"
        avoid = pending_request.kwargs["avoid"] if draw and pending_request else ()
        ranked = sorted(candidate_replicas, key=lambda r: (r.replica_id.unique_id in avoid, images[r.replica_id]))
        if draw and pending_request and ranked:
            key = pending_request.metadata.internal_request_id
            self._chosen[key] = ranked[0].replica_id, pending_request.args[0].slots, now
        return [[replica] for replica in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """It was taken."""
        key = pending_request.metadata.internal_request_id
        if (chosen := self._chosen.pop(key, None)) is not None:
            self._in_hand[key] = replica_id, chosen[1]

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It has ended, in whatever way."""
        self._chosen.pop(internal_request_id, None)
        self._in_hand.pop(internal_request_id, None)
