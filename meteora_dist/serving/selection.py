"""Which experts a caller wants: by ``model`` alone, as OpenAI's clients can say it, or with the routing options.

auto                      the gates pick, for every token
auto-sequence             a vote on the prompt, of routers or else of the gates, picks one expert for the whole answer
NAME                      one expert
NAME:WEIGHT,NAME:WEIGHT   a blend of experts
base                      no expert
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from meteora_dist.bank.manifest import VoteRule
from meteora_dist.errors import InvalidRequest

Mode = Literal["auto", "auto-sequence", "named", "blend", "base"]
MODES: tuple[Mode, ...] = get_args(Mode)
CHOOSING: tuple[Mode, ...] = ("auto", "auto-sequence", "base")
"""Modes that ``model`` can name by themselves."""
VOTE_RULES: tuple[VoteRule, ...] = get_args(VoteRule)
MAX_BLEND = 8
"""Most experts of a blend: every token pays for all of them."""
MAX_WEIGHT = 16.0
MIN_TEMPERATURE = 0.001
MAX_TEMPERATURE = 1000.0
"""Of the gates; beyond these, a softmax in fp32 overflows or knows no difference."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What a caller wants.

    Attributes:
        mode: How experts are chosen.
        experts: (name, weight) under ``named``, with weight 1, and ``blend``.
        top_k: Experts a token uses under ``auto``; None for the bank's default.
        temperature: Divides the chosen gate logits under ``auto``; None for the bank's default.
        vote: How routers decide under ``auto-sequence``; None for the bank's default.
    """

    mode: Mode = "auto"
    experts: tuple[tuple[str, float], ...] = ()
    top_k: int | None = None
    temperature: float | None = None
    vote: VoteRule | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """The names a caller must be allowed to use: the experts, or the mode that needs none."""
        return tuple(name for name, _ in self.experts) or (self.mode,)


def select(
    model: str,
    mode: str | None = None,
    experts: Sequence[tuple[str, float | None]] = (),
    top_k: int | None = None,
    temperature: float | None = None,
    vote: str | None = None,
) -> Selection:
    """What ``model`` and the routing options say together.

    Args:
        model: See above.
        mode: ``routing.mode``; None leaves the choice to ``model`` and ``experts``.
        experts: ``routing.experts``: names, and weights for a blend.
        top_k: ``routing.top_k``.
        temperature: ``routing.temperature``.
        vote: ``routing.vote``.

    Raises:
        InvalidRequest: They contradict each other, or a value is out of its range; whether an expert exists is not
            asked here.
    """
    stated = _by_options(mode, experts)
    chosen = _by_model(model) if stated is None else stated
    if stated is not None and model != "auto" and _by_model(model) != stated:
        raise InvalidRequest(
            f"model {model!r} says another choice than routing; leave the choice to one, with model 'auto'", "model"
        )
    if top_k is not None and top_k < 1:
        raise InvalidRequest(f"routing.top_k is {top_k}, but must be at least 1", "routing.top_k")
    if temperature is not None and not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        wanted = f"between {MIN_TEMPERATURE:g} and {MAX_TEMPERATURE:g}"
        raise InvalidRequest(f"routing.temperature is {temperature}, but must be {wanted}", "routing.temperature")
    for name, value in (("top_k", top_k), ("temperature", temperature)):
        if value is not None and chosen.mode != "auto":
            raise InvalidRequest(f"routing.{name} is for mode auto, and this is {chosen.mode}", f"routing.{name}")
    return Selection(chosen.mode, chosen.experts, top_k, temperature, _vote(vote, chosen.mode))


def _vote(vote: str | None, mode: Mode) -> VoteRule | None:
    if vote is None:
        return None
    if mode != "auto-sequence":
        raise InvalidRequest(f"routing.vote is for mode auto-sequence, and this is {mode}", "routing.vote")
    for rule in VOTE_RULES:
        if vote == rule:
            return rule
    raise InvalidRequest(f"routing.vote is {vote!r}, but must be one of {', '.join(VOTE_RULES)}", "routing.vote")


def _by_model(model: str) -> Selection:
    for mode in CHOOSING:
        if model == mode:
            return Selection(mode)
    if ":" not in model and "," not in model:
        return Selection("named", ((model, 1.0),))
    parts = [part.rpartition(":") for part in model.split(",")]
    if not all(name and weight for name, _, weight in parts):
        raise InvalidRequest(f"model {model!r} is no blend; it must read NAME:WEIGHT,NAME:WEIGHT", "model")
    return _blend([(name.strip(), _number(weight, model)) for name, _, weight in parts], "model")


def _by_options(mode: str | None, experts: Sequence[tuple[str, float | None]]) -> Selection | None:
    if mode is None and not experts:
        return None
    if mode is None:
        mode = "named" if len(experts) == 1 and experts[0][1] is None else "blend"
    if mode not in MODES:
        raise InvalidRequest(f"routing.mode is {mode!r}, but must be one of {', '.join(MODES)}", "routing.mode")
    if mode == "blend":
        return _blend([(name, 1.0 if weight is None else weight) for name, weight in experts], "routing.experts")
    if mode == "named":
        if len(experts) != 1 or experts[0][1] not in (None, 1):
            raise InvalidRequest(
                "routing.experts must be one expert, without a weight, for mode named", "routing.experts"
            )
        return Selection("named", ((experts[0][0], 1.0),))
    if experts:
        raise InvalidRequest(f"routing.experts is for named and blend, and this is {mode}", "routing.experts")
    return next(Selection(known) for known in CHOOSING if known == mode)


def _blend(experts: Sequence[tuple[str, float]], param: str) -> Selection:
    names = [name for name, _ in experts]
    if not 1 <= len(names) <= MAX_BLEND:
        raise InvalidRequest(f"{param} blends {len(names)} experts, but must blend 1 to {MAX_BLEND}", param)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidRequest(f"{param} names {twice[0]} more than once", param)
    for name, weight in experts:
        if not abs(weight) <= MAX_WEIGHT:
            raise InvalidRequest(
                f"{param}: the weight of {name} is {weight}, but must be between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}",
                param,
            )
    return Selection("blend", tuple(experts))


def _number(text: str, model: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidRequest(f"model {model!r}: {text!r} is no weight; it must be a number", "model") from None
