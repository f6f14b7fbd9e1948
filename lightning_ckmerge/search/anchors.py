"""Known candidates, scored before the sampler starts: what a user might do without searching.

Letters: K snapshots, oldest first; the last is the latest weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_ckmerge.core.outcome import Candidate
from lightning_ckmerge.core.segments import Segment
from lightning_ckmerge.core.spaces import Decay, Space, exponential_kernel, normalised

# An EMA's length as a share of the window's steps. Optima on small GPTs lay at 6 to 14 % of the run.
EMA_SHARES = (0.05, 0.12, 0.3)


def make_anchors(
    segments_K: Sequence[Segment], space: Space, previous: Mapping[str, float] | None = None
) -> list[Candidate]:
    """Return the anchors, the latest weights first, no two with equal coefficients.

    Args:
        segments_K: K segments, oldest first; the last is the latest weights.
        space: The searched space; an anchor that lies in it carries its coordinates.
        previous: Coordinates of the previous search's optimum, moved into the space's ranges.
    """
    candidates = [_latest(segments_K), *_uniform(segments_K), *_ema(segments_K, space)]
    candidates = [_placed(c, segments_K, space) for c in candidates]
    for i, z_D in enumerate(space.initial(segments_K)):
        candidates.append(_inside(f"initial-{i}", z_D, segments_K, space))
    if previous is not None and previous.keys() == space.coordinates(segments_K).keys():
        z_D = {n: min(max(previous[n], r.low), r.high) for n, r in space.coordinates(segments_K).items()}
        candidates.append(_inside("previous", z_D, segments_K, space))
    return _distinct(candidates)


def _latest(segments_K: Sequence[Segment]) -> Candidate:
    return Candidate(name="latest", coefficients_K=(0.0,) * (len(segments_K) - 1) + (1.0,))


def _uniform(segments_K: Sequence[Segment]) -> list[Candidate]:
    """The last 2, 4, 8 and all snapshots, weighted by their steps: means over the last so many steps."""
    counted = [i for i, s in enumerate(segments_K) if s.num_steps]
    sizes = [k for k in (2, 4, 8) if k < len(counted)]
    windows = {f"uniform-{k}": set(counted[-k:]) for k in sizes} | {"uniform-all": set(counted)}
    return [
        Candidate(name=name, coefficients_K=normalised([s.num_steps * (i in w) for i, s in enumerate(segments_K)]))
        for name, w in windows.items()
    ]


def _ema(segments_K: Sequence[Segment], space: Space) -> list[Candidate]:
    window = sum(s.num_steps for s in segments_K)
    taus = [round(share * window, 1) for share in EMA_SHARES]
    return [
        Candidate(
            name=f"ema-{tau:g}",
            coefficients_K=exponential_kernel(segments_K, tau),
            coordinates=_ema_coordinates(tau, segments_K, space),
        )
        for tau in taus
        if tau > 0
    ]


def _ema_coordinates(tau: float, segments_K: Sequence[Segment], space: Space) -> dict[str, float] | None:
    """An EMA is `decay` without extrapolation: the sampler learns from it, if its ``tau`` is in range."""
    if not isinstance(space, Decay) or space.kernel != "exponential":
        return None
    ranges = space.coordinates(segments_K)
    if not ranges["tau"].low <= tau <= ranges["tau"].high:
        return None
    return {name: tau if name == "tau" else r.low for name, r in ranges.items()}


def _placed(anchor: Candidate, segments_K: Sequence[Segment], space: Space) -> Candidate:
    """The sampler learns from an anchor whose place in the space is known."""
    return replace(anchor, coordinates=anchor.coordinates or space.inverse(anchor.coefficients_K, segments_K))


def _inside(name: str, z_D: Mapping[str, float], segments_K: Sequence[Segment], space: Space) -> Candidate:
    return Candidate(name=name, coefficients_K=space.coefficients(z_D, segments_K), coordinates=dict(z_D))


def _distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The first of each set of coefficients; it takes over the coordinates of a later twin."""
    kept: dict[tuple[float, ...], Candidate] = {}
    for c in candidates:
        key = tuple(round(x, 12) for x in c.coefficients_K)
        first = kept.setdefault(key, c)
        if first.coordinates is None and c.coordinates is not None:
            kept[key] = replace(first, coordinates=c.coordinates)
    return list(kept.values())
