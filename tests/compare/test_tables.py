"""Tables: what is best and what cannot be told from it, figures that are not there, files that can be read back."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest

from medseg3d.compare import summarise
from medseg3d.compare.tables import cost_table, organ_tables, pair_table, write_tables
from tests.compare.made_up import ORGANS, made_up, row


def cells(table, name):
    found = next(row for row in table.rows if row[0].text == name)
    return dict(zip(table.columns, found, strict=True))


def test_a_row_for_each_model():
    comparison = made_up()
    table = cost_table(comparison, summarise(comparison))
    best, other = cells(table, "ct_unet"), cells(table, "ct_vnet")
    assert best["mean Dice"].best and not other["mean Dice"].best and not other["mean Dice"].alike
    assert (best["GFLOP"].text, best["GFLOP"].detail) == ("100", "18 windows")
    assert (other["seconds"].text, other["seconds"].detail) == ("6.00", "CPU 6.00")
    assert (other["peak memory MiB"].text, other["parameters M"].text) == ("750", "4.50")
    assert "on the device MiB" not in table.columns and "busy" not in table.note


def test_what_cannot_be_told_from_the_best_is_marked():
    comparison = made_up(better=0)
    table = cost_table(comparison, summarise(comparison))
    marks = [(cell.best, cell.alike) for cell in (cells(table, m)["mean Dice"] for m in ("ct_unet", "ct_vnet"))]
    assert sorted(marks) == [(False, True), (True, False)]
    alone = made_up(("ct_unet",))
    assert not any(cell.best for one in cost_table(alone, summarise(alone)).rows for cell in one)


def test_each_measure_has_its_table():
    comparison = made_up(nsd_tolerance_mm=3.0)
    tables = organ_tables(comparison, summarise(comparison))
    assert [table.title for table in tables] == ["Dice", "NSD at 3 mm", "HD95, mm", "Volume error, %"]
    assert [row[0].text for row in tables[0].rows] == [name.replace("_", " ") for name in ORGANS.values()] + ["mean"]
    assert tables[0].columns == ("organ", "unet", "vnet")


def test_missed_organs_are_told_beside_distances():
    missed = {"model": "m", "case": "case0", "patient": "patient0"} | row(1, "brainstem", 0.0)
    known = {"model": "m", "case": "case1", "patient": "patient1"} | row(1, "brainstem", 0.5)
    rows = (missed | {"hd95_mm": None, "volume_ml": 0.0}, known)
    comparison = made_up(("m",), patients=2, rows=rows, shared=("brainstem",))
    table = organ_tables(comparison, summarise(comparison))[2]
    assert "1 missed" in table.rows[0][1].detail
    assert table.rows[1][1].text == "–", "an organ that nobody has"
    assert cells(cost_table(comparison, summarise(comparison)), "m")["missed"].text == "1"


def test_few_patients_are_told():
    few, many = made_up(patients=5), made_up(patients=6)
    assert "fewer than 6 patients" in pair_table(few, summarise(few)).note
    assert "fewer than 6 patients" not in pair_table(many, summarise(many)).note


def test_a_busy_machine_and_failures_are_told():
    comparison = made_up(drop={("ct_vnet", "case0")})
    busy = tuple({**one, "seconds": 9 * one["seconds"]} for one in comparison.costs)
    table = cost_table(replace(comparison, costs=busy), summarise(comparison))
    assert "busy" in table.note
    assert table.rows[1][0].detail == "SubVolumes, 1 failure"


def test_figures_of_a_gpu_have_a_column():
    comparison = made_up(patients=3)
    on_gpu = tuple({**one, "device_peak_mb": 1234.4} for one in comparison.costs)
    table = cost_table(replace(comparison, costs=on_gpu), summarise(comparison))
    assert cells(table, "ct_unet")["on the device MiB"].text == "1234"


def test_a_table_in_markdown_and_on_a_terminal():
    comparison = made_up()
    table = cost_table(comparison, summarise(comparison))
    lines = [line for line in table.markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "**" in lines[2] and "**" not in lines[3]
    head, first, _ = table.plain().splitlines()
    assert head.startswith("model") and first.startswith("ct_unet") and len(head) == len(first)


@pytest.mark.parametrize("models", [("a",), ("a", "b")])
def test_files_hold_all_figures(tmp_path, models):
    comparison = made_up(models, patients=3, notes=("a note",))
    paths = write_tables(comparison, summarise(comparison), tmp_path)
    assert {path.name for path in paths} == {path.name for path in tmp_path.iterdir()}
    read = {}
    for path in tmp_path.glob("*.csv"):
        with path.open(encoding="utf-8") as file:
            read[path.stem] = list(csv.DictReader(file))
    assert set(read) == {"metrics", "costs", "summary", "pairs"}
    assert len(read["metrics"]) == len(comparison.rows) and len(read["costs"]) == 3 * len(models)
    assert float(read["metrics"][0]["dice"]) == pytest.approx(comparison.rows[0]["dice"], rel=1e-5)
    assert len(read["summary"]) == 4 * 8 * len(models)
    assert len(read["pairs"]) == 4 * 8 * (len(models) - 1)
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert text.startswith("# ") and "- a note" in text and ("## Mean Dice in pairs" in text) == (len(models) > 1)


def test_failures_of_an_earlier_run_are_gone(tmp_path):
    failures = ({"model": "ct_vnet", "case": "case0", "error": "what was wrong"},)
    failed = made_up(patients=2, failures=failures, drop={("ct_vnet", "case0")})
    write_tables(failed, summarise(failed), tmp_path)
    assert "what was wrong" in (tmp_path / "failures.csv").read_text()
    whole = made_up(patients=2)
    write_tables(whole, summarise(whole), tmp_path)
    assert not (tmp_path / "failures.csv").exists()
