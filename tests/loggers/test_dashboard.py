"""`optuna-dashboard`, started as a user would on what a run left."""

from __future__ import annotations

import json
import socket
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import pytest

from tests.support.bitwise import Case, fit, merges_dir
from tests.support.trainers import make_merge, manifests
from tests.support.waiting import wait_until

ATTEMPTS = 3
TIMEOUT_S = 600


@contextmanager
def dashboard(journal: Path) -> Iterator[str]:
    """Serve a journal, and yield the server's address once it answers."""
    for _ in range(ATTEMPTS):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [f"{sysconfig.get_path('scripts')}/optuna-dashboard", str(journal), "--port", str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            if answers(f"http://127.0.0.1:{port}", process):
                yield f"http://127.0.0.1:{port}"
                return
        finally:
            process.kill()
            output = process.communicate()[0].decode()
        if "already in use" not in output:
            break  # nobody took the port in between
    pytest.fail(f"optuna-dashboard does not answer: {output}")


def answers(address: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether the process answers, and does not end before it could."""

    def there() -> bool:
        with suppress(URLError, ConnectionError):
            return bool(get(f"{address}/api/meta"))
        return process.poll() is not None

    wait_until(there, timeout_s=TIMEOUT_S, every_s=0.1)
    return process.poll() is None


def get(address: str) -> Any:
    with build_opener(ProxyHandler({})).open(address, timeout=TIMEOUT_S) as answer:
        return json.load(answer)


def test_the_dashboard_shows_each_search_with_its_trials(tmp_path: Path) -> None:
    run = fit(Case(), tmp_path, [make_merge()])
    published = manifests(merges_dir(run))
    assert len(published) > 1
    with dashboard(merges_dir(run) / "study.journal") as address:
        studies = get(f"{address}/api/studies")["study_summaries"]
        details = [get(f"{address}/api/studies/{s['study_id']}") for s in studies]
    assert len(studies) == len(published)
    for study, detail, manifest in zip(studies, details, published, strict=True):
        assert str(manifest["step"]) in study["study_name"]
        assert detail["directions"] == ["minimize"]
        assert detail["objective_names"] == ["val_loss"]
        candidates = [t for t in [*manifest["anchors"], *manifest["trials"]] if t["coordinates"] is not None]
        expected = [(t["name"], [t["search"]["value"]]) for t in candidates]
        assert [(name_of(t), t["values"]) for t in detail["trials"]] == expected
        assert {t["state"] for t in detail["trials"]} == {"Complete"}


def name_of(trial: Any) -> str:
    return str(next(a["value"] for a in trial["user_attrs"] if a["key"] == "name"))
