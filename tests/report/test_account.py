"""The page of an account, and its Markdown."""

from __future__ import annotations

import html
import re

import pytest

from lightning_ckmerge.report.account import TITLES, render_account_html, render_account_markdown
from lightning_ckmerge.report.text import ReportPlace
from tests.report.test_report import HOSTILE
from tests.support.account_toy import C_K, SNAPSHOTS, bowl, make_account
from tests.support.outcomes import DIRPATH, make_history

PLACE = ReportPlace(path=DIRPATH / "step=000004000", up="report.html")
MANIFEST = make_history().manifests["step=000004000"]


def test_each_figure_has_its_sentence_and_what_is_left_out_its_reason() -> None:
    account = make_account(bowl, SNAPSHOTS, C_K)
    page, markdown = render_account_html(account, MANIFEST, PLACE), render_account_markdown(account)
    shown = html.unescape(re.sub(r"<[^>]+>", "", page))
    plain = re.sub(r"\\(.)", r"\1", markdown)
    for key, title in TITLES.items():
        assert title in shown
        assert title in plain
        if key in account["figures"]:
            assert account["figures"][key]["sentence"] in shown
            assert account["figures"][key]["sentence"] in plain
    assert "on 12 batches, 48 samples, of the confirmation half, which the search did not see" in shown
    assert page.count("<svg") == 5
    assert 'href="report.html"' in page


def test_an_account_of_the_search_half_says_that_the_merge_was_chosen_there() -> None:
    account = {**make_account(bowl, SNAPSHOTS, C_K), "half": "search"}
    assert "search half, on which the merge was chosen" in render_account_html(account, MANIFEST, PLACE)


@pytest.mark.parametrize("render", ["html", "markdown"])
def test_names_are_text(render: str) -> None:
    account = make_account(bowl, SNAPSHOTS, C_K, monitor=HOSTILE)
    if render == "html":
        assert HOSTILE not in render_account_html(account, MANIFEST, PLACE)
    else:
        assert HOSTILE not in render_account_markdown(account)
