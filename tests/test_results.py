"""The table of results.py: its commands are ones that the scripts take, its pages hold the records' numbers."""
import argparse
import importlib
import json

import numpy as np
import pytest

import results
from conftest import ROOT
from results import WRITES, call, make_rows, pictures, read_records, record_path, table, write


def test_every_row_is_made_of_flags_that_the_scripts_take(monkeypatch):
    names = {"data": "mnist.npz", "digits": "digits.npz", "held_out": "held_out.npz"}
    for name, row in make_rows().items():
        made = []
        for stage in row.stages:
            flags = stage.flags.format(*made, **names).split()
            monkeypatch.setattr("sys.argv", [stage.script, *flags])
            importlib.import_module(stage.script).parse_flags()
            made.append(WRITES[stage.script])
        for flags in row.samples.values():
            if flags is not None:
                monkeypatch.setattr("sys.argv", ["sample", "--ckpt", made[-1], *flags.format(**names).split()])
                importlib.import_module("sample").parse_flags()
        assert row.stages or row.samples == {"held out": None}, name


def put_record(folder, name, group, seed, value, seconds=(900, 360)):
    scores = {"1": {"n": 100, "frechet": value, "accuracy": 0.9, "std": 0.3}}
    stages = [{"cpu_seconds": s, "iterations": 10} for s in seconds]
    folder.mkdir(exist_ok=True)
    record_path(folder, name, seed).write_text(json.dumps(
        {"row": name, "group": group, "seed": seed, "scores": scores, "stages": stages}))


def test_tables_are_the_records(tmp_path):
    for seed, value in enumerate((10, 11, 13)):
        put_record(tmp_path / "r", "sid, 360 s", "objectives", seed, value)
    put_record(tmp_path / "r", "sid, 900 s", "objectives", 0, 9, (900, 900))
    records = read_records(tmp_path / "r")
    assert "| sid, 360 s | 1 | 3 | 100 | 11.33 ± 1.53 | 0.900 ± 0.000 |" in table(records, "objectives")
    page = "a\n<!-- results:objectives -->\nold\n<!-- end -->\nb\n<!-- results:growth -->\n<!-- end -->\n"
    made = write(records, page)
    assert "old" not in made and "9.00" in made and "Not measured yet." in made and write(records, made) == made
    assert [path.name for path in pictures(records, tmp_path)] == ["seconds.png"]


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_pages_hold_the_records_numbers(page):
    text = (ROOT / page).read_text()
    assert write(read_records(results.RECORDS), text) == text


@pytest.mark.slow
def test_rows_run_once_and_go_on(tmp_path, monkeypatch):
    """A row of two stages at a thousandth of its budget; the second row finds the teacher of the first."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (300, 28, 28)).astype(np.uint8), np.arange(300) % 10
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x[:60], y_test=y[:60])
    args = argparse.Namespace(data=tmp_path / "mnist.npz", out=tmp_path / "o", records=tmp_path / "r", seeds=[0],
                              jobs=1, scale=1e-3)
    rows = {name: make_rows()[name] for name in ("sid, 360 s", "map lagrange, 360 s")}
    results.run(args, {"sid, 360 s": rows["sid, 360 s"]})
    calls, real = [], call
    monkeypatch.setattr(results, "call", lambda words, *rest: (calls.append(words[0]), real(words, *rest)))
    results.run(args, rows)
    assert calls == ["flow_map.py", *["sample.py", "sample.py", "tests/score.py"] * 3]
    found = {record["row"]: record for record in read_records(tmp_path / "r")}
    assert found.keys() == rows.keys() and found["map lagrange, 360 s"]["scores"].keys() == {"1", "2", "4"}
    assert [stage["script"] for stage in found["sid, 360 s"]["stages"]] == ["train_teacher", "distill"]
