"""Known candidates, scored before the sampler starts: merges that need no search.

Anchors that depend on the scores of others are proposed one by one, as the scores become known.

Letters: K snapshots, oldest first; the last is the latest weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from lightning_ckmerge.config import DEFAULT_ANCHORS, AnchorName
from lightning_ckmerge.core.outcome import Candidate, Scored
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces import KernelName, Space, kernel, normalised

UNIFORM_SIZES = (2, 4, 8)
# An EMA's length as a share of the window's steps. Optima on small GPTs lay at 6 to 14 % of the run.
EMA_SHARES = (0.05, 0.12, 0.3)
# Snapshots' values differ by a few percent: a power of 1 hardly tells them apart, one of 100 leaves few.
PENALTIES = (1, 10, 100)
# Where a search begins.
PREVIOUS, INITIAL = "previous", "initial-"

# Coefficients -> loss: the value, or its negative where higher ones are better; infinite where it may not win.
Losses = Mapping[tuple[float, ...], float]


def make_anchors(
    segments_K: Sequence[Segment],
    space: Space,
    previous: Mapping[str, float] | None = None,
    names: Sequence[AnchorName] = DEFAULT_ANCHORS,
) -> list[Candidate]:
    """Return the anchors that depend on no score, no two with equal coefficients.

    The latest weights come first, then the likely best: the sooner a good one is known, the sooner others
    are dropped.

    Args:
        segments_K: K segments, oldest first; the last is the latest weights.
        space: The searched space; an anchor that lies in it carries its coordinates.
        previous: Coordinates of the previous search's optimum, moved into the space's ranges.
        names: Which ones, in their order.
    """
    candidates = [_placed(_latest(segments_K), segments_K, space)]
    if previous is not None and previous.keys() == space.coordinates(segments_K).keys():
        z_D = {n: min(max(previous[n], r.low), r.high) for n, r in space.coordinates(segments_K).items()}
        candidates.append(candidate_at(PREVIOUS, z_D, segments_K, space))
    for i, z_D in enumerate(space.initial(segments_K)):
        candidates.append(candidate_at(f"{INITIAL}{i}", z_D, segments_K, space))
    named = [c for name in names for c in FIXED[name](segments_K, space)]
    return _distinct([*candidates, *(_placed(c, segments_K, space) for c in named)])


def next_anchor(
    segments_K: Sequence[Segment], space: Space, names: Sequence[AnchorName], scored: Sequence[Scored], sign: int
) -> Candidate | None:
    """Return the next anchor that depends on scores; ``None`` once all of them are scored.

    Args:
        segments_K: As for ``make_anchors``.
        space: As for ``make_anchors``.
        names: As for ``make_anchors``.
        scored: All that has been scored, the anchors of ``make_anchors`` among it.
        sign: 1 if lower values are better, -1 if higher ones are.
    """
    losses: dict[tuple[float, ...], float] = {}
    for one in scored:
        value = sign * one.search.value
        usable = one.feasible and math.isfinite(value) and not one.candidate.by_group
        losses.setdefault(_key(one.candidate.coefficients_K), value if usable else math.inf)
    candidates = (c for name in names if name in DERIVED for c in DERIVED[name](losses))
    found = next((c for c in candidates if _key(c.coefficients_K) not in losses), None)
    return _placed(found, segments_K, space) if found is not None else None


def is_known_merge(anchor: Candidate) -> bool:
    """Whether one might do this without a search; else it is where the search begins."""
    return anchor.name != PREVIOUS and not anchor.name.startswith(INITIAL)


def candidate_at(name: str, z_D: Mapping[str, float], segments_K: Sequence[Segment], space: Space) -> Candidate:
    """Return the space's candidate at these coordinates."""
    return Candidate(
        name=name,
        coefficients_K=space.coefficients(z_D, segments_K),
        coordinates=dict(z_D),
        by_group=space.by_group(z_D, segments_K),
    )


def most_anchors(names: Sequence[AnchorName], capacity: int) -> int:
    """Return how many anchors there are at most, for a buffer of ``capacity`` snapshots."""
    counts = {"uniform": len(UNIFORM_SIZES) + 1, "ema": len(EMA_SHARES), "wsm-linear": 1, "wsm-minus-sqrt": 1}
    num_singles = capacity if any(FIXED[name] is _singles for name in names) else 0
    num_fixed = sum(counts.get(name, 0) for name in set(names)) + num_singles
    # The latest weights, the previous optimum, and the space's initial candidates.
    return 3 + num_fixed + most_derived(names, capacity + 1)


def most_derived(names: Sequence[AnchorName], num_snapshots: int) -> int:
    """Return how many of the anchors depend on scores, at most, for K = ``num_snapshots``."""
    return (num_snapshots - 1) * ("greedy-soup" in names) + len(PENALTIES) * ("metrics-weighted" in names)


def _latest(segments_K: Sequence[Segment]) -> Candidate:
    return Candidate(name="latest", coefficients_K=_one(len(segments_K) - 1, len(segments_K)))


def _uniform(segments_K: Sequence[Segment], space: Space) -> list[Candidate]:
    """The last 2, 4, 8 and all snapshots, weighted by their steps: means over the last so many steps.

    Source:
        Kaddour 2022 (LAWA), arXiv:2209.14981.
    """
    counted = [i for i, s in enumerate(segments_K) if s.num_steps]
    sizes = [k for k in UNIFORM_SIZES if k < len(counted)]
    windows = {f"uniform-{k}": set(counted[-k:]) for k in sizes} | {"uniform-all": set(counted)}
    return [
        Candidate(name=name, coefficients_K=normalised([s.num_steps * (i in w) for i, s in enumerate(segments_K)]))
        for name, w in windows.items()
    ]


def _ema(segments_K: Sequence[Segment], space: Space) -> list[Candidate]:
    taus = [round(share * _window(segments_K), 1) for share in EMA_SHARES]
    return [_kernel(f"ema-{tau:g}", "exponential", tau, segments_K, space) for tau in taus if tau > 0]


def _wsm_linear(segments_K: Sequence[Segment], space: Space) -> list[Candidate]:
    """The coefficients that stand for a learning rate falling linearly over the window: its mean.

    Source:
        WSM, arXiv:2507.17634.
    """
    return [Candidate(name="wsm-linear", coefficients_K=normalised([s.num_steps for s in segments_K]))]


def _wsm_minus_sqrt(segments_K: Sequence[Segment], space: Space) -> list[Candidate]:
    """The coefficients that stand for a learning rate falling as ``1 - sqrt`` over the window. Source: as above."""
    # The kernel begins 1.5 tau before the newest step.
    return [_kernel("wsm-minus-sqrt", "minus_sqrt", _window(segments_K) / 1.5, segments_K, space)]


def _singles(segments_K: Sequence[Segment], space: Space) -> list[Candidate]:
    """Each snapshot alone; the last one is ``latest``."""
    return [
        Candidate(name=f"single-{segment.last_step}", coefficients_K=_one(k, len(segments_K)))
        for k, segment in enumerate(segments_K[:-1])
    ]


def _greedy_soup(losses: Losses) -> Iterator[Candidate]:
    """From the best snapshot to the worst, each joins if the mean over those that have joined does not get worse.

    Snapshots count equally, whatever their steps; one that was dropped early has its place by its estimate.

    Source:
        Wortsman et al. 2022, arXiv:2203.05482, recipe 1.
    """
    loss_K = _single_losses(losses)
    best, *others = sorted(range(len(loss_K)), key=loss_K.__getitem__)
    soup, loss = {best}, loss_K[best]
    for i, k in enumerate(others):
        c_K = normalised([float(j in soup | {k}) for j in range(len(loss_K))])
        yield Candidate(name=f"greedy-soup-{i}", coefficients_K=c_K)
        if losses[_key(c_K)] <= loss:
            soup, loss = soup | {k}, losses[_key(c_K)]


def _metrics_weighted(losses: Losses) -> Iterator[Candidate]:
    """Snapshots weighted by powers of the ratio of their own value to the best one's; none if values differ in sign.

    Source:
        Yu and Choi 2025, arXiv:2504.18580, who weight by training loss with one penalty factor. Their formula could
        not be read: this one is ours.
    """
    loss_K = _single_losses(losses)
    finite = [loss for loss in loss_K if math.isfinite(loss)]
    if not (min(finite) > 0 or max(finite) < 0):
        return
    best = min(finite)
    # Of two losses below 0 the better one is further from it.
    ratio_K = [best / loss if best > 0 else max(0.0, -loss) / -best for loss in loss_K]
    for penalty in PENALTIES:
        c_K = normalised([ratio**penalty for ratio in ratio_K])
        yield Candidate(name=f"metrics-weighted-{penalty}", coefficients_K=c_K)


def _single_losses(losses: Losses) -> list[float]:
    """The loss of each snapshot alone."""
    num_snapshots = len(next(iter(losses)))
    return [losses[_one(k, num_snapshots)] for k in range(num_snapshots)]


def _one(k: int, num_snapshots: int) -> tuple[float, ...]:
    return tuple(float(i == k) for i in range(num_snapshots))


def _window(segments_K: Sequence[Segment]) -> int:
    return sum(s.num_steps for s in segments_K)


def _kernel(name: str, shape: KernelName, tau: float, segments_K: Sequence[Segment], space: Space) -> Candidate:
    return Candidate(
        name=name,
        coefficients_K=kernel(shape, segments_K, tau),
        coordinates=space.place_of_kernel(shape, tau, segments_K),
    )


def _placed(anchor: Candidate, segments_K: Sequence[Segment], space: Space) -> Candidate:
    """The sampler learns from an anchor whose place in the space is known."""
    return replace(anchor, coordinates=anchor.coordinates or space.inverse(anchor.coefficients_K, segments_K))


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The first of each set of coefficients; it takes over the coordinates of a later twin."""
    kept: dict[object, Candidate] = {}
    for c in candidates:
        key = (_key(c.coefficients_K), *((group, _key(c_K)) for group, c_K in c.by_group.items()))
        first = kept.setdefault(key, c)
        if first.coordinates is None and c.coordinates is not None:
            kept[key] = replace(first, coordinates=c.coordinates)
    return list(kept.values())


def _key(c_K: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(c, 12) for c in c_K)


FIXED: dict[AnchorName, Callable[[Sequence[Segment], Space], list[Candidate]]] = {
    "uniform": _uniform,
    "ema": _ema,
    "wsm-linear": _wsm_linear,
    "wsm-minus-sqrt": _wsm_minus_sqrt,
    "best-single": _singles,
    "greedy-soup": _singles,
    "metrics-weighted": _singles,
}
DERIVED: dict[AnchorName, Callable[[Losses], Iterator[Candidate]]] = {
    "greedy-soup": _greedy_soup,
    "metrics-weighted": _metrics_weighted,
}
