"""Plots: marks lie where their values are, names keep clear of each other, and the text is well-formed."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from medseg3d.report.svg import DARK, LIGHT, Axis, Chart, legend, pareto_front


def elements(chart, tag):
    return [e for e in ET.fromstring(chart.svg()).iter() if e.tag.endswith(f"}}{tag}")]


def texts(chart, look):
    return [e for e in elements(chart, "text") if look in e.get("class", "").split()]


def test_values_lie_where_they_should():
    chart = Chart(Axis("cost", 1, 100, log=True), Axis("worth", 0, 2), (400, 300), left=50, head=20)
    left, top, right, bottom = chart.inside
    assert chart.place(1, 0) == (left, bottom) and chart.place(100, 2) == (right, top)
    assert chart.place(10, 1) == pytest.approx(((left + right) / 2, (top + bottom) / 2))
    chart.point(10, 1, 0)
    (circle,) = elements(chart, "circle")
    assert float(circle.get("cx")) == pytest.approx((left + right) / 2, abs=0.1)
    assert chart.place(0.5, 3) == (left, top), "what lies beyond is drawn at the edge"


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (Axis("", 0, 1), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (Axis("", 0.71, 0.82), ["0.72", "0.74", "0.76", "0.78", "0.8", "0.82"]),
        (Axis("", 0, 1200), ["0", "200", "400", "600", "800", "1000", "1200"]),
        (Axis("", 0.5, 200, log=True), ["1", "10", "100"]),
        (Axis("", 8, 300, log=True), ["10", "30", "100", "300"]),
        (Axis("", 9000, 60000, log=True), ["10\u202f000", "20\u202f000", "50\u202f000"]),
        (Axis("", 0, 4, marks=((1, "one"),)), ["one"]),
    ],
)
def test_ticks_are_round(axis, expected):
    assert [text for _, text in axis.ticks()] == expected


@pytest.mark.parametrize("values", [[], [5.0], [5.0, 5.0], [0.0], [-3.0, -3.0], [0.99, 1.0]])
@pytest.mark.parametrize("log", [False, True])
def test_an_axis_has_a_length_whatever_it_is_around(values, log):
    axis = Axis.around("", values, log, within=(-10, 10))
    assert axis.low < axis.high and axis.ticks()
    assert all(axis.low <= value <= axis.high for value in values if value > 0 or not log)


def test_an_axis_stays_within_what_is_possible():
    assert Axis.around("", [0.2, 1.0], within=(0, 1)).high == 1
    assert Axis.around("", [0.0, 0.5], within=(0, 1)).low == 0


def test_every_character_is_written_safely():
    chart = Chart(Axis("<x> & 'y'", 0, 1), Axis("</text>", 0, 1), name='a "name"')
    chart.point(0.5, 0.5, 3, "1 < 2 & 3")
    chart.label(0.5, 0.5, "<script>", 0)
    assert [e.text for e in texts(chart, "f0")] == ["<script>"]
    assert [e.text for e in elements(chart, "title")] == ["1 < 2 & 3"]
    ET.fromstring(legend(["a < b", "b"]))


def test_names_of_points_in_one_place_do_not_cover_each_other():
    chart = Chart(Axis("", 0, 1), Axis("", 0, 1), (500, 400))
    for n in range(4):
        chart.point(0.5, 0.5, n)
        chart.label(0.5, 0.5, f"model {n}", n)
    names = [e for n in range(4) for e in texts(chart, f"f{n}") if e.text.startswith("model")]
    places = {(e.get("x"), e.get("y"), e.get("text-anchor")) for e in names}
    rows = sorted((e.get("text-anchor"), float(e.get("y"))) for e in names)
    assert len(places) == 4
    for (anchor, y), (other, below) in pairwise(rows):
        assert anchor != other or below - y >= 14, "a line of text is 14 pixels high"


def test_a_name_near_the_edge_stays_inside():
    chart = Chart(Axis("", 0, 1), Axis("", 0, 1), (400, 300))
    chart.label(1, 0.5, "a rather long name", 0)
    (name,) = texts(chart, "f0")
    assert name.get("text-anchor") == "end"


def test_series_differ_in_shape_and_colour():
    assert len(set(LIGHT)) == len(set(DARK)) == len(LIGHT) == len(DARK)
    drawn = set()
    for n in range(len(LIGHT)):
        chart = Chart(Axis("", 0, 1), Axis("", 0, 1))
        chart.point(0.5, 0.5, n)
        (mark,) = [*elements(chart, "circle"), *elements(chart, "polygon")]
        drawn.add((mark.get("points"), mark.get("class")))
    assert len({points for points, _ in drawn}) == len({look for _, look in drawn}) == len(LIGHT)


def test_the_front_by_hand():
    points = [(5, 0.7), (1, 0.5), (2, 0.4), (3, 0.7), (3, 0.6), (9, 0.9)]
    assert pareto_front(points) == [(1, 0.5), (3, 0.7), (9, 0.9)]
    assert pareto_front([]) == []
