"""The listings of docs/hacking.md run as they are printed, from top to bottom; the README's example, too."""

import re

import pytest
import torch
from conftest import ROOT


def listings(path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@torch.no_grad()
def test_every_listing_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    names, found = {"__name__": "hacking"}, listings(ROOT / "docs" / "hacking.md")
    assert len(found) > 6
    for listing in found:
        exec(compile(listing, "docs/hacking.md", "exec"), names)
    suffix, target, tokenizer = names["SuffixDrafter"], names["target"], names["tokenizer"]
    stats = names["Stats"]()  # the drafter is not only right, it drafts
    prompt = tokenizer.encode("x = 1\ny = 2\n" * 6)
    list(names["generate"](target, prompt, suffix(), max_new_tokens=40, compile=False, stats=stats))
    assert stats.tokens_per_step > 1.5


def test_a_listing_that_is_wrong_would_be_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nassert 1 == 2\n```\n")
    with pytest.raises(AssertionError):
        exec(listings(page)[0], {})


def test_the_longest_suffix_wins(monkeypatch):
    """`guess` of the page's drafter, which is an example to copy: the longest, and of equals the latest."""
    names = {"__name__": "hacking"}
    monkeypatch.chdir(ROOT)
    [listing] = [text for text in listings(ROOT / "docs" / "hacking.md") if "class SuffixDrafter" in text]
    exec(listing, names)
    guess = names["SuffixDrafter"]().guess
    assert guess([1, 2, 3, 9, 2, 3, 5, 1, 2, 3], 3) == [3, 9, 2]  # 1 2 3 beats 2 3
    assert guess([7, 1, 7, 2, 7], 2) == [7, 2]
    assert guess([1, 2, 3], 4) == [3]
