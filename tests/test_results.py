"""The table of results.py: its commands are ones that the scripts take, its pages hold the records' numbers."""
import argparse
import importlib
import json

import numpy as np
import pytest

import results
from common.images import ticks
from common.run import UserError
from conftest import ROOT
from results import (PANELS, WRITES, Runner, call, draw_best, draw_seconds, draw_sheet, make_rows, make_table,
                     place_of, read_records, record_path, write)


def test_every_row_is_made_of_flags_that_the_scripts_take(monkeypatch):
    names = {"data": "mnist.npz", "digits": "digits.npz", "held_out": "held_out.npz", "out": "out"}
    for name, row in make_rows().items():
        made = []
        for stage in row.stages:
            flags = stage.flags.format(*made, **names).split()
            monkeypatch.setattr("sys.argv", [stage.script, *flags])
            importlib.import_module(stage.script).parse_flags()
            made.append(WRITES[stage.script])
        for flags in row.samples.values():
            if row.stages:
                monkeypatch.setattr("sys.argv", ["sample", "--ckpt", made[-1], *flags.format(**names).split()])
                importlib.import_module("sample").parse_flags()
        assert row.stages or name == "real images"


def put_record(folder, name, group, seed, value, seconds=(900, 360)):
    scores = {"1": {"n": 100, "frechet": value, "accuracy": 0.9, "std": 0.3}}
    stages = [{"cpu_seconds": s, "iterations": 10} for s in seconds]
    folder.mkdir(exist_ok=True)
    record_path(folder, name, seed).write_text(json.dumps(
        {"row": name, "group": group, "seed": seed, "scores": scores, "stages": stages}))


def test_tables_are_the_records(tmp_path):
    for seed, value in enumerate((10, 11, 13)):
        put_record(tmp_path / "r", "sid, 360 s", "objectives", seed, value)
        put_record(tmp_path / "r", "linear student", "families", seed, value)
        put_record(tmp_path / "r", "linear student, 1200 iterations", "growth", seed, value)
    put_record(tmp_path / "r", "map lagrange, 900 s", "objectives", 0, 9, (900, 900))
    records = read_records(tmp_path / "r")
    assert make_table(records, "objectives").endswith(
        "\n| sid, 360 s | 3 | 10 | 11.3 ± 1.5 / 0.90 |  |  |\n| map lagrange, 900 s | 1 | 10 | 9.0 / 0.90 |  |  |")
    assert make_table(records, "families").endswith("| linear student | 3 | 10 | 1 | 11.33 ± 1.53 | 0.90 | 0.30 |")
    assert "| linear student, 1200 iterations | 3 | 10 | 11.3 ± 1.5 / 0.90 |" in make_table(records, "summary")
    seen = next(r for r in records if r["group"] == "growth")
    seen["stages"] = [{"iterations": 3000}, {"iterations": 8}, {"iterations": 9}]
    seen["scores"] = {str(k): {"frechet": k, "recall": k / 9} for k in range(7)}
    assert "| 8 + 9 | 0.0 / 0.00 | 1.0 / 0.11 |" in make_table([seen], "growth")
    page = "a\n<!-- results:objectives -->\nold\n<!-- end -->\nb\n<!-- results:bridges -->\n<!-- end -->\n"
    made = write(read_records(tmp_path / "r"), page)
    assert "old" not in made and "9.0" in made and "Not measured yet." in made
    assert write(read_records(tmp_path / "r"), made) == made


def test_curves_are_of_seconds(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(results, "draw_curves", lambda lines, *_: drawn.append(lines))
    assert draw_seconds([]) is None and not drawn
    for seed in (0, 1):
        for seconds in (120, 360):
            put_record(tmp_path / "r", f"linear map, {seconds} s", "growth", seed, seconds / 10 + seed,
                       (900, seconds + seed))
        put_record(tmp_path / "r", "linear student, 10 iterations", "growth", seed, 9, (900, 40 + 2 * seed))
        path = record_path(tmp_path / "r", "linear student, 10 iterations", seed)
        record = json.loads(path.read_text())
        record["scores"] = {"1 after 5": {"frechet": 8 + seed}, "1": {"frechet": 6}, "1 of 10000": {}}
        path.write_text(json.dumps(record))
    put_record(tmp_path / "r", "linear map, 360 s", "growth", 2, 99)  # a seed that other lengths lack
    put_record(tmp_path / "r", "linear map, then student", "families", 0, 7, (900, 100, 200))
    put_record(tmp_path / "r", "linear map", "families", 0, 99)  # not of a line
    path = record_path(tmp_path / "r", "linear teacher", 0)
    path.write_text(json.dumps({"row": "linear teacher", "seed": 0, "scores": {"50": {"frechet": 5}}, "stages": [{}]}))
    draw_seconds(read_records(tmp_path / "r"))
    assert drawn == [{"student: 1 step, 2 seeds": ((20.5, 41), (8.5, 6)),
                      "map: 1 step, 2 seeds": ((120.5, 360.5), (12.5, 36.5)),
                      "map, then student: 1 step, 1 seed": ((300,), (7,)),
                      "teacher: 50 steps, 1 seed": ([20.5, 360.5], [5, 5])}]


def test_a_log_axis_has_three_numbers_at_least():
    for low, high, found in ((6, 21, [6, 7, 8, 9, 10, 20]), (160, 1100, [200, 500, 1000]), (1, 150, [1, 10, 100])):
        assert ticks(low, high, True) == found


def test_the_sheet_shows_what_was_made(tmp_path):
    assert draw_sheet(tmp_path) is None
    (tmp_path / place_of("vp, cross", 0)).mkdir()
    np.savez(tmp_path / place_of("vp, cross", 0) / "1.npz", arr_0=np.zeros((10, 28, 28, 1), np.uint8))
    (tmp_path / place_of("ve student, 1200 iterations", 0)).mkdir()
    np.savez(tmp_path / place_of("ve student, 1200 iterations", 0) / "1_after_400.npz",
             arr_0=np.zeros((10, 28, 28, 1), np.uint8))
    picture = draw_sheet(tmp_path)
    dark = np.argwhere((picture[18:, 60:] < 9).all(2))  # below and beside the captions
    assert len(dark) == 20 * 28 * 28 and dark[:, 0].min() > picture.shape[0] / 5


def test_the_best_are_drawn_with_their_scores(tmp_path):
    for i, (name, label) in enumerate(PANELS):
        put_record(tmp_path / "r", name, "objectives", 0, 20)
        record = json.loads(record_path(tmp_path / "r", name, 0).read_text())
        record["scores"] = {k: {"frechet": 20} for k in ("1", "2", "4", "50")}
        record_path(tmp_path / "r", name, 0).write_text(json.dumps(record))
        assert draw_best(read_records(tmp_path / "r"), tmp_path) is None
        (tmp_path / place_of(name, 0)).mkdir(exist_ok=True)
        np.savez(tmp_path / place_of(name, 0) / f"{label}.npz", arr_0=np.full((60, 28, 28, 1), i, np.uint8))
    picture = draw_best(read_records(tmp_path / "r"), tmp_path)
    for row, shades in zip(np.split(picture, 2), (range(3), range(3, 6))):
        assert [(row[:192] == i).all(2).sum() for i in shades] == [60 * 28 * 28] * 3


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_pages_hold_the_records_numbers(page):
    text = (ROOT / page).read_text()
    assert write(read_records(results.RECORDS), text) == text


def test_what_is_tried_out_is_no_result(tmp_path, monkeypatch):
    (tmp_path / "m.npz").touch()
    monkeypatch.setattr("sys.argv", ["results.py", "sid", "--data", str(tmp_path / "m.npz"), "--scale", "0.1"])
    with pytest.raises(UserError, match="--scale 0.1: is no result"):
        results.main()


@pytest.mark.slow
def test_rows_run_once_and_go_on(run, tmp_path, monkeypatch):
    """The second row finds the teacher of the first. In this process, of two iterations each."""
    rng, calls = np.random.default_rng(0), []
    x, y = rng.integers(0, 256, (300, 28, 28)).astype(np.uint8), np.arange(300) % 10
    np.savez(tmp_path / "the mnist.npz", x_train=x, y_train=y, x_test=x[:60], y_test=y[:60])
    args = argparse.Namespace(data=tmp_path / "the mnist.npz", out=tmp_path / "o", records=tmp_path / "r", scale=1e-3)

    def call(words, log, *budget):
        calls.append(words[0])
        small = ["--model", "SiT-XXS/7"] * (words[0] == "train_teacher.py") + ["--iters", "2"] * bool(budget)
        said = run(words[0].split("/")[-1][:-3], *words[1:], *small)
        log.write_text(said + "stopped after iteration 2" * bool(budget and budget[0]))
        return 1
    monkeypatch.setattr(results, "call", call)
    monkeypatch.setattr(results, "draw_digits", lambda n, size: (x, y))
    rows = {name: make_rows()[name] for name in ("sid, 360 s", "map lagrange, 360 s")}
    runner = Runner(args)
    runner.job("sid, 360 s", rows["sid, 360 s"], 0)
    del calls[:]
    runner.job("map lagrange, 360 s", rows["map lagrange, 360 s"], 0)
    assert calls == ["flow_map.py", *["sample.py", "sample.py"] * 3, "tests/score.py"]
    found = {record["row"]: record for record in read_records(tmp_path / "r")}
    assert found.keys() == rows.keys() and found["map lagrange, 360 s"]["scores"].keys() == {"1", "2", "4"}
    assert [stage["script"] for stage in found["sid, 360 s"]["stages"]] == ["train_teacher", "distill"]


def test_a_budget_is_of_cpu_time_since_training_began(tmp_path):
    """A command that loads for half a second, begins, and works until it is told to stop; and one that fails."""
    program = tmp_path / "p.py"
    program.write_text("""import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print(time.process_time() - began), sys.exit(0)))
while time.process_time() < 0.5: pass
began = time.process_time()
pathlib.Path(sys.argv[1]).touch()
while True: pass
""")
    call([str(program), str(tmp_path / "began")], tmp_path / "log", 1.0, tmp_path / "began")
    assert 0.8 < float((tmp_path / "log").read_text().split()[-1]) < 2
    with pytest.raises(RuntimeError, match="exit code 1"):
        call([str(program)], tmp_path / "log")
