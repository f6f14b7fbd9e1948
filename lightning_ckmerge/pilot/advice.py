"""Plain advice from a pilot study: a config of the callback, and no more than was measured."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lightning_ckmerge.core.objectives import sign_of
from lightning_ckmerge.core.outcome import Status
from lightning_ckmerge.core.wording import change_told
from lightning_ckmerge.pilot.findings import Found, by_distance
from lightning_ckmerge.pilot.study import BEST_CHECKPOINT, BEST_MEAN, BEST_PAIR, NEWEST

# What the callback's spaces hold: a pair, and means of the newest. A great circle, or an older checkpoint, they do not.
CONFIGURABLE = (BEST_PAIR, BEST_MEAN)


def advise(found: Mapping[str, Any], steps_K: Sequence[int], monitor: str, mode: Any) -> Found:
    """Return what to do: ``status``, ``choice``, sentences by question, their ``text``, ``config`` and ``yaml``.

    The choice is made on the search half alone; its gain is told on the confirmation half.

    Args:
        found: What ``find`` returned.
        steps_K: The checkpoints' steps.
        monitor: The metric.
        mode: Whether lower or higher values are better.
    """
    finalists = {f["name"]: f for f in found["finalists"]}
    choice = _choice(finalists)
    status = _status(choice)
    config = _config(choice, status, steps_K, monitor, mode)
    sentences = {
        "what": _what(choice, finalists, status, monitor, mode),
        "which": _which(found["pairs"]),
        "how_many": _how_many(found["means"]),
        "how": _how(found["lines"], sign_of(mode)),
        "limits": _limits(choice, status),
    }
    return {
        "status": status,
        "choice": choice["name"],
        **sentences,
        "text": " ".join(s for s in sentences.values() if s),
        "config": config,
        "yaml": as_yaml(config),
    }


def as_yaml(config: Mapping[str, Any]) -> str:
    """Return the callback's arguments as they stand in a LightningCLI file.

    >>> print(as_yaml({"monitor": "val_loss", "search": {"space": "window"}}))
    trainer:
      callbacks:
        - class_path: lightning_ckmerge.CheckpointMergeCallback
          init_args:
            monitor: val_loss
            search: {space: window}
    """
    lines = [f"        {name}: {_flow(value)}" for name, value in config.items()]
    head = ["trainer:", "  callbacks:", "    - class_path: lightning_ckmerge.CheckpointMergeCallback"]
    return "\n".join([*head, "      init_args:", *lines])


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_flow(item)}" for name, item in value.items()) + "}"
    # JSON is YAML; only what is no plain word needs its quotes.
    is_plain = isinstance(value, str) and value.replace("_", "a").isalnum() and not value[0].isdigit()
    return str(value) if is_plain else json.dumps(value)


def _choice(finalists: Mapping[str, Found]) -> Found:
    """The better, on the search half, of what a space holds; the newest checkpoint, where none beats it."""
    gaining = [f for name, f in finalists.items() if name in CONFIGURABLE and (f["search_gain"] or 0) > 0]
    return max(gaining, key=lambda f: f["search_gain"], default=finalists[NEWEST])


def _status(choice: Found) -> Status:
    if choice["name"] == NEWEST or (choice["interval"] is not None and choice["interval"][1] < 0):
        return "rejected"
    return "accepted" if choice["interval"] is not None and choice["interval"][0] > 0 else "unconfirmed"


def _config(choice: Found, status: Status, steps_K: Sequence[int], monitor: str, mode: Any) -> Found:
    config: Found = {"monitor": monitor, **({"mode": mode} if mode != "min" else {})}
    if status == "rejected":
        return config
    steps = [steps_K[k] for k in choice["merge"]["places"]]
    every = round(statistics.median(newer - older for older, newer in pairwise(steps)))
    # The newest of a window is the latest weights, or a snapshot of the same step.
    buffer = {"snapshot": "point", "layout": "uniform", "capacity": len(steps), "every_n_train_steps": every}
    space = "pairwise" if choice["name"] == BEST_PAIR else "window"
    return {**config, "buffer": buffer, "search": {"space": space}}


def _what(choice: Found, finalists: Mapping[str, Found], status: Status, monitor: str, mode: Any) -> str:
    newest = finalists[NEWEST]
    if choice["name"] == NEWEST:
        return (
            "Merging these checkpoints did not help: no pair with the newest one and no uniform mean beats it on the "
            "search half. Use the newest checkpoint."
        )
    chosen = f"Of what the callback can merge, the best on the search half is {choice['told']}."
    if choice["confirm"] is None or newest["confirm"] is None:
        return f"{chosen} No batches were left to confirm it: its gain there is flattered by the choice."
    change, interval = change_told(monitor, mode, newest["confirm"], choice["confirm"], choice["interval"])
    ends = f"; 95 % interval {interval}" if interval else ""
    on = f" on {choice['num_differences']} batches" if choice["num_differences"] else ""
    told = f"{chosen} On the confirmation half, which chose nothing, it {change}{ends},{on or ' there'}"
    told += ", against the newest checkpoint."
    if status == "unconfirmed":
        told += " That does not tell a gain from none: use more validation batches."
    if status == "rejected":
        told += " So it does not hold up: use the newest checkpoint."
    return told + _others(choice, finalists)


def _others(choice: Found, finalists: Mapping[str, Found]) -> str:
    """The other of pair and mean, and an older checkpoint that is better than the newest."""
    told = ""
    for name in (*CONFIGURABLE, BEST_CHECKPOINT):
        other = finalists.get(name)
        if other is not None and other is not choice and other["gain"] is not None:
            told += f" The {name}, {other['told']}, gains {_signed(other['gain'])} there."
    return told + (f" The choice gains {_signed(choice['gain'])}." if told and choice["gain"] is not None else "")


def _which(pairs: Sequence[Mapping[str, Any]]) -> str:
    measured = [p for p in pairs if p["gain_over_better"] is not None]
    num_gaining = sum(p["gain_over_better"] > 0 for p in measured)
    if not measured:
        return ""
    told = f"Which: {num_gaining} of {len(measured)} pairs beat both of their checkpoints on the search half."
    gaps = by_distance(measured)
    if len(gaps) < 2:
        return told
    best, worst = max(gaps, key=lambda g: g[1]), min(gaps, key=lambda g: g[1])
    return told + (
        f" By distance, the median gain over the better one is largest at {best[0]} steps ({_signed(best[1])}) and "
        f"smallest at {worst[0]} ({_signed(worst[1])})."
    )


def _how_many(means: Sequence[Mapping[str, Any]]) -> str:
    every = [m for m in means if m["stride"] == 1 and m["gain"] is not None]
    measured = [m for m in means if m["gain"] is not None]
    if len(every) < 2:
        return ""
    best, longest = max(every, key=lambda m: m["gain"]), max(every, key=lambda m: m["num"])
    told = f"How many: the mean of the newest {best['num']} is the best of those that leave none out"
    told += f", {_signed(best['gain'])} over the newest one on the search half"
    if best is longest:
        told += "; it is the longest that was scored, so a longer one may gain more."
    else:
        told += f"; the longest, of {longest['num']}, comes to {_signed(longest['gain'])}."
    top = max(measured, key=lambda m: m["gain"])
    if top["stride"] > 1 and top["gain"] > best["gain"]:
        told += f" Taking every {ordinal(top['stride'])} one, {top['num']} in all, gains {_signed(top['gain'])}."
    return told


def _how(lines: Sequence[Mapping[str, Any]], sign: int) -> str:
    told = [text for line in sorted(lines, key=lambda line: line["steps"]) if (text := _along(line, sign))]
    return (
        " ".join(["How:", *(text[0].upper() + text[1:] for text in told), _circle(lines, sign)]).strip() if told else ""
    )


def _along(line: Mapping[str, Any], sign: int) -> str:
    points = [(lam, sign * value) for lam, value in line["linear"] if value is not None]
    if len(points) < 3:
        return ""
    lam = min(points, key=lambda p: p[1])[0]
    told = f"{line['steps']} steps apart, the best `lam` measured is {lam:.4g}"
    beyond = [b for at, b in points if at > 1]
    newer = next((b for at, b in points if at == 1), None)
    if lam <= 1 and beyond and newer is not None:
        told += f", and the best place past the newer one is {_better(newer - min(beyond))} than that one"
    return told + (", past the newer one." if lam > 1 else ", past the older one." if lam < 0 else ".")


def _circle(lines: Sequence[Mapping[str, Any]], sign: int) -> str:
    """How far the great circle is from the straight line at the same ``lam``, and which of them is better there."""
    found = []
    for line in lines:
        straight = {lam: v for lam, v in line["linear"] if v is not None}
        found += [
            sign * (straight[lam] - v)
            for lam, v in line["slerp"]
            if v is not None and 0 < lam < 1 and straight.get(lam) is not None
        ]
    if not found:
        return ""
    num_better = sum(gain > 0 for gain in found)
    return (
        f"Between the ends, SLERP is better than the straight line at {num_better} of {len(found)} places, and differs "
        f"from it by at most {max(map(abs, found)):.2g}."
    )


def _limits(choice: Found, status: Status) -> str:
    use = {
        "accepted": "The config below merges such snapshots in training",
        "unconfirmed": "The config below would merge such snapshots in training",
        "rejected": "The config below is the callback's default, each of whose searches states its own verdict",
    }[status]
    return (
        f"{use}. All of this was measured at one moment of one run; means over steps, which are the callback's default "
        "snapshots, are not among checkpoints, and were not scored."
    )


def ordinal(number: int) -> str:
    """Return a small number's ordinal.

    >>> ordinal(2), ordinal(3), ordinal(4)
    ('2nd', '3rd', '4th')
    """
    return str(number) + {2: "nd", 3: "rd"}.get(number, "th")


def _signed(value: float) -> str:
    places = max(0, 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:+.{min(places, 12)}f}"


def _better(gain: float) -> str:
    return f"{_signed(abs(gain)).lstrip('+')} {'better' if gain > 0 else 'worse'}"
