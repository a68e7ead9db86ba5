"""One rank of an engine: a base model, its share of the experts, and the loop that serves requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

from meteora_dist.bank import Bank
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.grammar import GrammarFailed, Grammars
from meteora_dist.engine.lockstep import BACKENDS, COLLECTIVE_TIMEOUT, join
from meteora_dist.engine.manager import LockstepManager, Notes
from meteora_dist.engine.mesh import Mesh
from meteora_dist.engine.report import RankReport
from meteora_dist.engine.request import FinishReason, GenerationRequest, TokenEvent
from meteora_dist.engine.sampler import RequestSampler
from meteora_dist.errors import EngineUnavailable, InvalidRequest, PromptTooLong
from meteora_dist.model.fast_layers import speed_up
from meteora_dist.model.freed import large_blocks_apart
from meteora_dist.model.load import accelerator, load_base, torch_dtype
from meteora_dist.moe.equal_exchange import AdaptiveDispatcher
from meteora_dist.moe.holdings import Holdings, Resident
from meteora_dist.moe.inject import inject_holdings
from meteora_dist.moe.residency import Residency
from meteora_dist.moe.routed_model import Place, RoutedModel
from meteora_dist.moe.shared_swap import quickest_swap
from meteora_dist.moe.swap import GroupSwap
from meteora_dist.moe.wire import EXCHANGE_KINDS, Wire

KV_PAGE_TOKENS = 64
"""Tokens of a page of the KV cache."""
SHARED_PAGE_TOKENS = 16
"""The same where prefixes are shared: only whole pages are."""


@dataclass(slots=True)
class _Live:
    """A request under way: where its events go, and how many tokens were sent."""

    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[TokenEvent | EngineUnavailable | InvalidRequest] = field(default_factory=asyncio.Queue)
    sent: int = 0


class RankEngine:
    """Serves requests on one rank, in lockstep with the other ranks of its world."""

    def __init__(
        self,
        config: EngineConfig,
        rank: int = 0,
        rendezvous: str | None = None,
        residency: Residency | None = None,
    ) -> None:
        """Joins the world, loads base model and own experts, and starts the loop. Blocks until all of it is done.

        Args:
            config: What to serve.
            rank: This rank's number in the mesh.
            rendezvous: ``tcp://host:port`` where the ranks meet; None for a world of one.
            residency: The live bank generations and who holds what of them, on all ranks the same; None for the
                configuration's bank alone, its experts spread evenly.

        Raises:
            CheckpointError: Model or bank cannot be used; the message says why.
        """
        # Each thread that computes in parallel has a team of its own, and with several teams none waits for the next
        # operation awake: the loop shall have the only one. It sets its own number, which new threads start with.
        torch.set_num_threads(1)
        lockstep = join(rank, config.mesh.size, rendezvous, BACKENDS[accelerator().type])
        self._drivers = config.mesh.drivers
        self._rank = rank
        with large_blocks_apart():
            self.routed = load_routed(config, rank, residency)
            speed_up(self.routed.model)
        self.generation_config = _generation_config(self.routed.model)
        self._max_len = config.max_model_len
        self._live: dict[str, _Live] = {}
        self._last_weighed: tuple[Holdings, Resident] | None = None
        vocabulary = self.routed.model.config.get_text_config().vocab_size
        self._grammars = Grammars(config.model, vocabulary, self._eos())
        self._manager = LockstepManager(
            self.routed,
            self.generation_config,
            _batching_config(config),
            RequestSampler(self._grammars),
            self._deliver,
            lockstep,
            config.threads,
        )
        self._manager.start()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        """Yields the request's tokens as they are produced; closing the iterator cancels the request.

        Raises:
            InvalidRequest: The prompt is empty or holds ids outside the vocabulary, as may ``logit_bias``;
                ``max_tokens`` is not positive; the generation or an expert it names is not here; or its grammar turns
                out to be too complex.
            PromptTooLong: Prompt and answer exceed ``max_model_len``.
            EngineUnavailable: The loop has died, before or while the request ran.
            ValueError: This rank is not the first of its tp group.
        """
        if self._rank not in self._drivers:
            raise ValueError(f"rank {self._rank} takes no requests; they go to the ranks {list(self._drivers)}")
        self.check()
        if request.generation is None:
            request = replace(request, generation=self.routed.holdings.residency.roster.newest)
        self._refuse_unservable(request)
        if request.grammar is not None:
            await self._compile(request.grammar)
        live = _Live(request, asyncio.get_running_loop())
        self._live[request.request_id] = live
        try:
            self._submit(request)
            while True:
                event = await live.events.get()
                if not isinstance(event, TokenEvent):
                    raise event
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self.cancel(request.request_id)

    def cancel(self, request_id: str) -> None:
        """Ends a request, if it is still under way, and frees its cache."""
        if self._live.pop(request_id, None) is not None:
            # A world that has fallen apart cannot be woken, and has nothing left to free.
            with contextlib.suppress(dist.DistError):
                self._manager.cancel_request(request_id)

    def check(self) -> None:
        """Raises EngineUnavailable when the loop is not running, or is about to end."""
        status = self._manager.background_thread_status
        # A failing loop refuses first, then tells its callers, and has its error on record only after that.
        refusal = status.can_accept_new_requests()
        if refusal is not None or not self._manager.is_running():
            raise EngineUnavailable(f"the generation loop is not running: {status.fatal_error or refusal}")

    def prepare(self, number: int, residency: Residency) -> None:
        """Loads what this rank lacks of ``residency``, beside what it holds; requests go on as before. Blocks.

        Every rank is told of the same changes. They are numbered from 1, and there is one at a time.

        Raises:
            CheckpointError: A bank cannot be read, or does not fit; nothing has changed.
            EngineUnavailable: The loop is not running.
        """
        self.check()
        self._manager.changes.prepare(number, residency)

    def commit(self, number: int) -> None:
        """Puts a prepared change in force, once every rank has been told to. Blocks until it is.

        Requests of a generation that the change drops keep it waiting until they have ended.

        Raises:
            EngineUnavailable: The loop ended, or the change was not prepared.
        """
        self._manager.changes.commit(number, self._manager.wake, self.check)

    def discard(self, number: int) -> None:
        """Frees what a prepared change has loaded; does nothing when there is no such change."""
        self._manager.changes.discard(number)

    @property
    def resident(self) -> Resident:
        """Memory this rank uses for the bank."""
        return self.routed.resident

    def report(self) -> RankReport:
        """How it is; for any thread. Nothing is counted anew for it, and the loop does not notice."""
        active, waiting, cache_used = self._manager.load()
        resident, wire = self._weighed(), self.routed.wire
        return RankReport(
            expert_bytes=resident.expert_bytes,
            gate_bytes=resident.gate_bytes,
            loads=self.routed.loads,
            linears=self.routed.newest.num_linears,
            active=active,
            waiting=waiting,
            cache_used=cache_used,
            exchanged_bytes={kind: wire.bytes(kind) for kind in EXCHANGE_KINDS},
            exchange_s={kind: wire.seconds_in(kind) for kind in EXCHANGE_KINDS},
        )

    def _weighed(self) -> Resident:
        """What ``resident`` is, worked out once for what is held: there are thousands of tensors to look at."""
        held = self.routed.holdings
        if self._last_weighed is None or self._last_weighed[0] is not held:
            self._last_weighed = held, self.resident
        return self._last_weighed[1]

    def stalled_s(self) -> float | None:
        """Seconds since the loop began its latest step; None while it sleeps for want of work."""
        return self._manager.stalled_s()

    def wait(self) -> None:
        """Blocks for as long as the loop runs."""
        self._manager.wait()

    def stop(self) -> None:
        """Finishes live requests, leaves the world. All ranks have to stop."""
        if self._manager.is_running():
            self._manager.stop(block=True)
        if dist.is_initialized():
            dist.destroy_process_group()

    def abandon(self) -> None:
        """Leaves a world that has lost a rank, or loses this one by it. Blocks until the loop has ended.

        Where the loop waits for a rank that is gone, that ends it; anywhere else it ends before its next step. Live
        requests end with EngineUnavailable.
        """
        self._manager.abandon()
        # A world that has fallen apart cannot be woken, and nobody sleeps in it.
        with contextlib.suppress(dist.DistError):
            self._manager.wake()
        self._manager.wait()
        if dist.is_initialized():
            dist.destroy_process_group()

    async def _compile(self, grammar: str) -> None:
        """Does here what would hold up everybody's batch there."""
        try:
            await asyncio.to_thread(self._grammars.compile, grammar)
        except GrammarFailed as failure:
            raise InvalidRequest(str(failure), "response_format") from None

    def _submit(self, request: GenerationRequest) -> None:
        try:
            self._manager.submit(request, -1 if request.ignore_eos else self._eos())
        except dist.DistError as error:
            raise EngineUnavailable(f"the world has fallen apart: {error}") from error

    def _refuse_unservable(self, request: GenerationRequest) -> None:
        """What a pass would stumble over, for all requests of its batch."""
        vocabulary = self.routed.model.config.get_text_config().vocab_size
        if not request.prompt_ids or min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocabulary:
            raise InvalidRequest(f"the prompt must be one or more token ids from 0 to {vocabulary - 1}", "prompt")
        if any(not 0 <= token < vocabulary for token, _ in request.sampling.logit_bias):
            raise InvalidRequest(f"logit_bias must name token ids from 0 to {vocabulary - 1}", "logit_bias")
        if request.max_tokens < 1:
            raise InvalidRequest(f"max_tokens is {request.max_tokens}, but must be at least 1", "max_tokens")
        self._refuse_unknown_experts(request)
        total = len(request.prompt_ids) + request.max_tokens
        if total > self._max_len:
            raise PromptTooLong(
                f"prompt and answer need {total} tokens, but the context holds {self._max_len}", "prompt"
            )

    def _refuse_unknown_experts(self, request: GenerationRequest) -> None:
        live = self.routed.live
        bank = live.get(-1 if request.generation is None else request.generation)
        if bank is None:
            raise InvalidRequest(f"generation {request.generation} of the bank is not served; {sorted(live)} are")
        if request.vote == "routers" and request.generation not in self.routed.routers:
            raise InvalidRequest(f"generation {request.generation} of the bank has no routers that could vote")
        unknown = [expert for expert, _ in request.routing.experts if not 0 <= expert < bank.num_experts]
        if unknown:
            raise InvalidRequest(
                f"there is no expert number {unknown[0]}: generation {request.generation} of the bank has "
                f"{bank.num_experts}"
            )

    def _eos(self) -> list[int]:
        eos: int | list[int] | None = self.generation_config.eos_token_id
        return eos if isinstance(eos, list) else [] if eos is None else [eos]

    def _deliver(self, output: GenerationOutput, notes: Notes) -> None:
        over = output.is_finished()
        live = self._live.pop(output.request_id, None) if over else self._live.get(output.request_id)
        if live is None:
            return
        for event in self._events(live, output, notes):
            # The caller's loop may be gone already; then nobody waits for the event.
            with contextlib.suppress(RuntimeError):
                live.loop.call_soon_threadsafe(live.events.put_nowait, event)

    def _events(
        self, live: _Live, output: GenerationOutput, notes: Notes
    ) -> list[TokenEvent | EngineUnavailable | InvalidRequest]:
        if notes.failure is not None:
            return [InvalidRequest(notes.failure, "response_format")]
        new = output.generated_tokens[live.sent :]
        reasons = [self._finish_reason(token, live.sent + count, live.request) for count, token in enumerate(new, 1)]
        live.sent += len(new)
        events: list[TokenEvent | EngineUnavailable | InvalidRequest] = [
            TokenEvent(token, reason, notes.shares, notes.logprobs, notes.votes, notes.layers)
            for token, reason in zip(new, reasons, strict=True)
        ]
        # A loop that fails after a request's last token has not failed that request.
        if output.error is not None and not any(reasons):
            events.append(EngineUnavailable(f"the request was interrupted: {output.error}"))
        return events

    def _finish_reason(self, token: int, number: int, request: GenerationRequest) -> FinishReason | None:
        """Why the answer ends with its ``number``-th token, if it does."""
        if token in self._eos() and not request.ignore_eos:
            return "stop"
        return "length" if number == request.max_tokens else None


def load_routed(config: EngineConfig, rank: int, residency: Residency | None = None) -> RoutedModel:
    """This rank's part of the base model, with its share of the experts; all ranks of the world call it.

    Arguments as for ``RankEngine``.
    """
    if residency is None:
        # Each rank hashes the adapters it reads, when it reads them.
        bank = Bank.open(config.bank, hashing=False)
        holdings = Holdings(Residency.of(bank, config.ep), {bank.manifest.generation: bank})
    else:
        holdings = Holdings.open(residency, {})
    for bank in holdings.banks.values():
        bank.check_base(config.model)
    dtype = torch_dtype(config.dtype)
    base = load_base(config.model, dtype, config.ep, config.tp)
    return inject_holdings(base, holdings, dtype, _place(config.mesh, rank))


def _place(mesh: Mesh, rank: int) -> Place:
    """Where the rank stands, and the process group it exchanges token rows in; collective."""
    if mesh.ep == 1:
        return Place()
    wire = Wire()
    # Every rank has to take part in making every group.
    groups = [dist.new_group(mesh.peers(tp_rank), COLLECTIVE_TIMEOUT) for tp_rank in range(mesh.tp)]
    group = groups[mesh.tp_rank(rank)]
    on_cpu = accelerator().type == "cpu"
    swap = quickest_swap(group, COLLECTIVE_TIMEOUT) if on_cpu else GroupSwap(group)
    return Place(mesh.ep_rank(rank), AdaptiveDispatcher(group, swap, wire), wire)


def _generation_config(model: PreTrainedModel) -> GenerationConfig:
    generation_config = GenerationConfig.from_model_config(model.config)
    generation_config.eos_token_id = model.generation_config.eos_token_id
    # Greedy here means argmax of the scores; RequestSampler has put each request's noise into them.
    generation_config.do_sample = False
    return generation_config


def _batching_config(config: EngineConfig) -> ContinuousBatchingConfig:
    page = SHARED_PAGE_TOKENS if config.share_prefixes else KV_PAGE_TOKENS
    return ContinuousBatchingConfig(
        page_size=page,
        num_blocks=-(-config.kv_cache_tokens // page),
        max_batch_tokens=config.max_batch_tokens,
        max_requests_per_batch=config.max_batch_requests,
        # Keys and values depend on the routing, too, which the manager adds to what transformers hashes.
        allow_block_sharing=config.share_prefixes,
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=False,
        cpu_group_timeout=COLLECTIVE_TIMEOUT.total_seconds(),
    )
