"""Continuous batching with routed experts: transformers' manager, stepping together with the other ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput, RequestState

from meteora_dist.engine.changes import Changes
from meteora_dist.engine.lockstep import Lockstep, Vote
from meteora_dist.engine.prefixes import salt_prefixes
from meteora_dist.engine.request import GenerationRequest, LayerExperts, Logprobs
from meteora_dist.engine.sampler import RequestSampler
from meteora_dist.engine.shares import ShareKeeper, Shares
from meteora_dist.engine.votes import VoteKeeper, Votes, ballots_of
from meteora_dist.engine.zeros import ZerosOnDemand
from meteora_dist.errors import EngineUnavailable
from meteora_dist.model.paged_attention import NAME as PAGED_ATTENTION
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.moe.routers import pooled_states
from meteora_dist.moe.routing import plan_pass, slots_of_pass


@dataclass(frozen=True, slots=True)
class Notes:
    """What is known of a request's newest token.

    Attributes:
        shares: The experts', when the request asked for them.
        logprobs: Likewise.
        failure: Why the request cannot go on; the token is none of its answer then.
        votes: The layer routers', when the request asked for them.
        layers: The dominating expert of each layer, when the request asked for them.
    """

    shares: Shares | None = None
    logprobs: Logprobs | None = None
    failure: str | None = None
    votes: Votes | None = None
    layers: LayerExperts | None = None


Deliver = Callable[[GenerationOutput, Notes], None]
"""Receives a request's output so far and what is known of its newest token, on the generation thread."""


class LockstepManager(ContinuousBatchingManager):
    """One rank's batches. All ranks pass through every routed linear together, with or without tokens of their own.

    Attributes:
        changes: Of what the ranks hold.
    """

    def __init__(
        self,
        routed: RoutedModel,
        generation_config: GenerationConfig,
        batching_config: ContinuousBatchingConfig,
        sampler: RequestSampler,
        deliver: Deliver,
        lockstep: Lockstep,
        threads: int = 1,
    ) -> None:
        """Prepares the manager; ``start`` runs it.

        Args:
            routed: The model, its groups bound to the dispatcher of the world.
            generation_config: Defaults of the model.
            batching_config: Limits of batch and cache.
            sampler: Draws the tokens.
            deliver: Receives every new token.
            lockstep: Keeps the ranks of the world together.
            threads: Torch threads of the loop on the CPU.
        """
        # transformers names a private protocol that its own PreTrainedModel does not spell out.
        super().__init__(routed.model, generation_config, batching_config)  # type: ignore[arg-type]
        self.logit_processor = self._sampler = sampler
        self.output_router = _Router(self)
        self._routed = routed
        self._lockstep = lockstep
        self.changes = Changes(routed)
        self._stepped = time.monotonic()
        self._asleep = False
        self._abandoned = False
        self._wake_up_loop = _WakeUp(lockstep)
        self._deliver = deliver
        self._threads = threads
        self._keep = ShareKeeper()
        self._votes = VoteKeeper()

    def submit(self, request: GenerationRequest, eos_token_id: int | list[int]) -> None:
        """Queues a request; its tokens arrive at ``deliver``.

        Raises:
            EngineUnavailable: The loop has ended or is about to, and will not see the request.
        """
        self.add_request(
            list(request.prompt_ids),
            request_id=request.request_id,
            max_new_tokens=request.max_tokens,
            eos_token_id=eos_token_id,
            streaming=True,
            request=request,
        )
        # Asked after queueing: a loop that dies fails what it finds queued, and refuses from before that on.
        refusal = self.background_thread_status.can_accept_new_requests()
        if refusal is not None:
            raise EngineUnavailable(f"the request was interrupted: {refusal}")

    def wake(self) -> None:
        """Wakes all ranks, should they be asleep; for any thread."""
        self._lockstep.wake()

    def abandon(self) -> None:
        """Lets the loop fail before its next step, whatever the other ranks do; for any thread."""
        self._abandoned = True

    def stalled_s(self) -> float | None:
        """Seconds since the loop began its latest step, or None while it sleeps for want of work."""
        return None if self._asleep else time.monotonic() - self._stepped

    def load(self) -> tuple[int, int, float]:
        """Requests in the batches, requests that wait for room, and the part of the KV cache that is taken."""
        processor = self.batch_processor
        if processor is None:
            return 0, self.input_queue.qsize(), 0.0
        scheduler = processor.scheduler
        waiting = len(scheduler.waiting_requests) + self.input_queue.qsize()
        return len(scheduler.active_requests), waiting, 1.0 - processor.cache.compute_free_capacity()

    def wait(self) -> None:
        """Blocks for as long as the loop runs."""
        if self._generation_thread is not None:
            self._generation_thread.join()

    def join(self, stop_trigger_time: float, timeout: float | None = None) -> None:
        """Waits for the loop to end; it may have to be woken for that."""
        self._lockstep.wake()
        super().join(stop_trigger_time, timeout)

    def deliver(self, output: GenerationOutput) -> None:
        """Passes on an output with what is known of its newest token."""
        key = output.request_id
        notes = Notes(
            self._keep.take(key),
            self._sampler.logprobs.pop(key, None),
            self._sampler.failures.pop(key, None),
            self._votes.take(key),
            self._keep.take_layers(key),
        )
        self._deliver(output, notes)

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Leaves our own attention where it is; see ``transformers``."""
        if model.config._attn_implementation != PAGED_ATTENTION:
            super().switch_to_cb_friendly_attn(model, auto_switch_to_flash)

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        # The loop's own thread begins here.
        torch.set_num_threads(self._threads)
        with ZerosOnDemand():
            processor = super()._create_batch_processor()
        if processor.cache.use_prefix_sharing:
            scheduler = processor.scheduler
            salt_prefixes(
                processor.cache, lambda key: _request_of((scheduler.active_requests | scheduler.waiting_requests)[key])
            )
        return processor

    def _generation_loop_body(self, batch_processor: ContinuousBatchProcessor, bootstrapping: bool) -> bool:
        """One step, taken by all ranks together; False ends the loop."""
        self._stepped = time.monotonic()
        if self._abandoned:
            raise EngineUnavailable("the rank has left its world")
        ready = batch_processor.prepare_next_batch()
        batch = batch_processor.inputs_and_outputs
        assert isinstance(batch, ContinuousBatchingIOs), "the engine does not batch asynchronously"
        futures = batch.requests_in_batch if ready else []
        requests = [_request(future) for future in futures]
        stopping = not ready and self.background_thread_status.local_status != BackgroundThreadStatus.DONT_STOP
        routings = [request.routing for request in requests]
        needed = slots_of_pass(routings, [_generation(request) for request in requests], self._routed.live)
        change = self.changes.vote(lambda: self._in_use(batch_processor))
        tokens = sum(future.query_length for future in futures)
        vote = self._lockstep.agree(Vote(ready, needed, not stopping, change, tokens))
        # A change keeps every generation that is in use, so what was needed before it still is after it.
        self.changes.make(vote.change)
        self._routed.dispatcher.expect(vote.tokens)
        if ready:
            self._step(batch_processor, futures, requests, vote.slots)
        elif vote.slots:
            with torch.no_grad():
                self._routed.serve(vote.slots)
        elif not vote.working and vote.staying:
            self._sleep()
        return vote.working or vote.staying

    def _in_use(self, batch_processor: ContinuousBatchProcessor) -> set[int]:
        """The generations of all requests that this rank works on or has queued."""
        scheduler = batch_processor.scheduler
        states = [*scheduler.active_requests.values(), *scheduler.waiting_requests.values()]
        with self.input_queue.mutex:
            states += self.input_queue.queue
        return {_generation(_request_of(state)) for state in states}

    def _sleep(self) -> None:
        self._asleep = True
        self._lockstep.sleep()
        # In this order: whoever asks in between must not take the sleep for a stall.
        self._stepped = time.monotonic()
        self._asleep = False

    def _step(
        self,
        batch_processor: ContinuousBatchProcessor,
        futures: list[FutureRequestState],
        requests: list[GenerationRequest],
        slots: int,
    ) -> None:
        lengths = [future.query_length for future in futures]
        step = None
        if slots:
            choices = [request.routing for request in requests]
            generations = [_generation(request) for request in requests]
            traced = any(request.trace or request.vote == "gates" for request in requests)
            layered = [place for place, request in enumerate(requests) if request.trace and request.trace_layers]
            # The pass reads its plan where the model is.
            with torch.device(self.model.device):
                step = plan_pass(choices, lengths, generations, self._routed.live, slots, traced, layered)
        ballots = ballots_of(futures, requests, self._routed.routers)
        spans = [ballot.span for ballot in ballots]
        with self._routed.context.routed(step), pooled_states(self._routed.model, spans) as pooled:
            self._generation_step()
        active = batch_processor.scheduler.active_requests
        self._keep.start(active)
        self._votes.note(ballots, pooled, active)
        for future, request, end in zip(futures, requests, accumulate(lengths), strict=True):
            live = self._routed.live[_generation(request)]
            self._keep.note(future, request, end - future.query_length, step, live)
        batch_processor.update_batch()


class _WakeUp(threading.Event):
    """What transformers sets when it has put something into a queue: this wakes the other ranks as well."""

    def __init__(self, lockstep: Lockstep) -> None:
        super().__init__()
        self._lockstep = lockstep

    def set(self) -> None:
        self._lockstep.wake()


class _Router(OutputRouter):
    """Hands outputs to the manager instead of a queue."""

    def __init__(self, manager: LockstepManager) -> None:
        super().__init__()
        self._manager = manager

    def deliver(self, output: GenerationOutput) -> None:
        self._manager.deliver(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self._manager.deliver(output)


def _request(future: FutureRequestState) -> GenerationRequest:
    return _request_of(future.state)


def _request_of(state: RequestState) -> GenerationRequest:
    request = state.logit_processor_kwargs["request"]
    assert isinstance(request, GenerationRequest), "submit puts the request there"
    return request


def _generation(request: GenerationRequest) -> int:
    assert request.generation is not None, "RankEngine names the generation of every request"
    return request.generation
