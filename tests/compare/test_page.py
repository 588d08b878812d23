"""The page: whole, safe, and without anything from elsewhere."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from medseg3d.compare import summarise
from medseg3d.compare.figures import organ_plot, pareto_plot, size_plot
from medseg3d.compare.page import page
from tests.compare.made_up import made_up

VOID = {"meta", "img", "br"}


class Tags(HTMLParser):
    """All tags with their attributes; an error where one is not closed."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.texts = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def written(**changes):
    comparison = made_up(**changes)
    return page(comparison, summarise(comparison))


def test_nothing_comes_from_elsewhere():
    text = written()
    tags = Tags(text).found
    assert not {"script", "link", "iframe"} & {tag for tag, _ in tags}
    for tag, attributes in tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:"), tag
    assert not re.search(r"url\(|@import", text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg"}


def test_it_has_its_parts():
    text = written(notes=("left out of all means",))
    assert text.count("<h2>") == 5 and text.count("<svg") > 5
    for part in ("What each one costs", "Organ by organ", "Small organs", "Mean Dice in pairs", "left out of all"):
        assert part in text
    assert "prefers-color-scheme:dark" in text and "@media print" in text


def test_names_cannot_break_it():
    odd = "<b onclick='x'>&amp;"
    text = written(models=(odd, "other"), patients=3, title="<script>alert(1)</script>")
    parsed = Tags(text)
    assert "b" not in {tag for tag, _ in parsed.found} and "script" not in {tag for tag, _ in parsed.found}
    assert any(odd in one for one in parsed.texts)


@pytest.mark.parametrize("changes", [{"models": ("alone",)}, {"patients": 1}, {"rows": (), "costs": ()}])
def test_little_is_enough(changes):
    parsed = Tags(written(**changes))
    assert "table" in {tag for tag, _ in parsed.found} and "nan" not in " ".join(parsed.texts).split()


def test_failures_are_told():
    failures = ({"model": "ct_vnet", "case": "", "error": "no weights"},)
    assert "ct_vnet failed on all cases: no weights" in written(failures=failures)


def test_plots_show_each_model():
    comparison = made_up(("a", "b", "c"), patients=4)
    summary = summarise(comparison)
    names = {f"s{n}" for n in range(3)}
    for plot in (
        pareto_plot(comparison, summary, "gflop", "GFLOP"),
        organ_plot(comparison, summary, "dice"),
        size_plot(comparison),
    ):
        looks = " ".join(element.get("class", "") for element in ET.fromstring(plot).iter())
        assert all(f"f{name[1:]}" in looks.split() for name in names)


def test_a_plot_of_nothing_is_none():
    comparison = made_up(patients=2, rows=(), costs=())
    summary = summarise(comparison)
    assert pareto_plot(comparison, summary, "gflop", "GFLOP") is None
    assert organ_plot(comparison, summary, "dice") is None and size_plot(comparison) is None
