"""Averaging kernels over the steps of a run, summed over each snapshot's steps.

Letters: K snapshots, oldest first. ``tau`` is the kernel's length in steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from lightning_ckmerge.core.segments import Segment

KernelName = Literal["exponential", "power", "minus_sqrt"]


def kernel(name: KernelName, segments_K: Sequence[Segment], tau: float) -> tuple[float, ...]:
    """Return the named kernel's share of each snapshot; they sum to 1, and pooling adjacent snapshots adds shares up.

    Args:
        name: ``exponential``: an EMA. ``power``: proportional to ``step ** (num_steps / tau)``, which forgets the past
            in proportion to the run's length. ``minus_sqrt``: proportional to ``1 / sqrt(step)``, counted from the
            start of the last ``1.5 tau`` steps.
        segments_K: K segments, oldest first.
        tau: Above 0; the mean age of a step, where the run is long.

    Source:
        Power: Karras et al. 2024, arXiv:2312.02696, equation 5. Minus-sqrt: WSM, arXiv:2507.17634, where a step weighs
        as much as a learning rate falling as ``1 - sqrt`` loses at it.
    """
    return {"exponential": exponential_kernel, "power": power_kernel, "minus_sqrt": minus_sqrt_kernel}[name](
        segments_K, tau
    )


def exponential_kernel(segments_K: Sequence[Segment], tau: float) -> tuple[float, ...]:
    """Return ``exp(-age / tau)`` summed over each segment's steps, normalised to sum 1.

    Args:
        segments_K: K segments, oldest first.
        tau: Decay length in steps; above 0. Infinity gives the uniform mean over all steps.
    """
    newest = max(s.last_step for s in segments_K)

    def share(segment: Segment) -> float:
        if math.isinf(tau):
            return float(segment.num_steps)
        # Sum of a geometric series, up to a factor. expm1 keeps it exact where tau is far above num_steps.
        return math.exp((segment.last_step - newest) / tau) * -math.expm1(-segment.num_steps / tau)

    return normalised([share(s) for s in segments_K])


def power_kernel(segments_K: Sequence[Segment], tau: float) -> tuple[float, ...]:
    """Return ``step ** gamma`` integrated over each segment, ``gamma = num_steps / tau``, normalised to sum 1."""
    newest = max(s.last_step for s in segments_K)
    power = newest / tau + 1

    def share(segment: Segment) -> float:
        part = segment.num_steps / segment.last_step
        # last ** power - (first - 1) ** power, which would cancel late in a run.
        log_before = math.log1p(-part) if part < 1 else -math.inf
        return math.exp(power * math.log(segment.last_step / newest)) * -math.expm1(power * log_before)

    return normalised([share(s) for s in segments_K])


def minus_sqrt_kernel(segments_K: Sequence[Segment], tau: float) -> tuple[float, ...]:
    """Return ``1 / sqrt(step)``, counted from the start of the last ``1.5 tau`` steps, integrated and normalised."""
    newest = max(s.last_step for s in segments_K)
    length = 1.5 * tau

    def share(segment: Segment) -> float:
        end = max(0.0, length - (newest - segment.last_step))
        num_inside = min(float(segment.num_steps), end)
        # sqrt(end) - sqrt(end - num_inside), which would cancel.
        return num_inside / (math.sqrt(end) + math.sqrt(end - num_inside)) if num_inside else 0.0

    return normalised([share(s) for s in segments_K])


def normalised(weights_K: Sequence[float]) -> tuple[float, ...]:
    """Return ``weights_K`` over their sum."""
    total = math.fsum(weights_K)
    return tuple(w / total for w in weights_K)
