"""Whole runs at tiny sizes: what they leave, go on from and survive, in one process and in several; what is refused."""
import argparse
import contextlib
import functools
import importlib
import json
import multiprocessing.forkserver
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import common.run
import distill
import flow_map
import sample
import train_teacher
from common.autoencoder import Autoencoder
from common.data import Images, Stream
from common.files import load_checkpoint, save_checkpoint
from common.run import Run, StopSignal, Trained, UserError, command, frozen, learning_rate, put_in_training
from conftest import ROOT, SMALL
from interpolants import FAMILIES
from model import build_model, load_model
from sample import problem_of
from test_model import shaken

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# What a trainer goes on from.
FILES = {"train_teacher": "teacher.pt", "distill": "resume.pt", "flow_map": "flow_map.pt"}
LOSSES = {"train_teacher": ["loss", "grad_norm"], "flow_map": ["loss", "grad_norm"],
          "distill": ["critic_loss", "critic_norm", "student_loss", "D2", "student_norm", "spread"]}
CHEAP = {"train_teacher": (), "flow_map": (), "distill": ("--k_psi", 1, "--k_G", 1)}
JOBS = pytest.mark.parametrize("job", ["train_teacher", "distill"])  # between them they meet all of common/run.py
ALL = pytest.mark.parametrize("job", list(FILES))
unix = pytest.mark.skipif(not pathlib.Path("/proc/self/environ").exists(), reason="forks, signals, limits and /proc")


# ---------------------------------------------------------------------------------------------------------------------
# Runs in processes of their own, and the files they leave

def shell(*words, **options):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300,
                          **{"cwd": ROOT, "env": ENVIRONMENT, **options})


@functools.cache
def nursery():
    """Runs are forked from a process that has imported everything: a life costs a tenth of a second, not three."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_runs", "bench", "torch._dynamo", "torch.distributed.optim"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()
    return context


def live(name, flags, out, environment, change):
    os.dup2(os.open(out, os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(1, 2)
    os.environ.update(environment)
    sys.argv = [f"{name}.py", *flags]
    change()
    command(importlib.import_module(name).main)


class Life:
    """A script in one process, or in a group of `world`; change() comes first in each."""
    def __init__(self, folder, name, *flags, world=1, change=int, **environment):
        self.out = pathlib.Path(tempfile.mkstemp(dir=folder)[1])
        with socket.create_server(("127.0.0.1", 0)) as free:
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}
        self.processes = [nursery().Process(target=live, daemon=True, args=(name, [*map(str, flags)], self.out, {
            **environment, **({**group, "RANK": str(rank)} if world > 1 else {})}, change)) for rank in range(world)]
        for process in self.processes:
            process.start()

    def said(self):
        return self.out.read_text()

    def until(self, words, seconds=60):
        deadline = time.time() + seconds
        while words not in self.said():
            assert time.time() < deadline, "it never came"
            time.sleep(0.005)
        return self

    def kill(self, number, rank=0):
        os.kill(self.processes[rank].pid, number)
        return self

    def end(self, *codes):
        """-> what it said, once all have ended, with these exit codes (0); those of signals are negative."""
        deadline = time.time() + 120
        for process in self.processes:
            process.join(max(0, deadline - time.time()))
        for process in self.processes:
            process.kill()  # those that hang
        assert [process.exitcode for process in self.processes] == list(codes or [0] * len(self.processes)), self.said()
        return self.said()


def strike(number, step, rank=0, parent=False):
    """This signal comes to process `rank`, or to its parent, in the middle of this iteration, before any restart."""
    report = Run.report

    def struck(run, now, *rest):
        if (now, run.rank, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == (step, rank, "0"):
            os.kill(os.getppid() if parent else os.getpid(), number)
        report(run, now, *rest)
    Run.report = struck


def log(out, job):
    lines = pathlib.Path(out, "log.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # JSON has no NaN
    return [line for line in lines if line["job"] == job.removeprefix("train_")]


def losses(out, job):
    return [[line[name] for name in LOSSES[job]] for line in log(out, job)]


def same(a, b):
    """Two nested checkpoints, bit for bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def weights(path):
    """A checkpoint without the record of its flags."""
    return {k: v for k, v in load_checkpoint(path).items() if k != "flags"}


def check_same_end(job, a, b):
    for name in {FILES[job], FILES[job].replace("resume", "student")}:
        assert same(weights(a / name), weights(b / name)), name
    assert [line["step"] for line in log(a, job)] == [line["step"] for line in log(b, job)]


@pytest.fixture
def flags(images, small_teacher):
    """job -> flags of a tiny run."""
    return {"train_teacher": ("--data", images, *SMALL, "--sample_every", 0),
            "flow_map": ("--teacher_ckpt", small_teacher, *SMALL[2:], "--sample_every", 0, "--data", images, "--row",
                         "progressive", "--stage_iters", 2),
            "distill": ("--teacher_ckpt", small_teacher, *SMALL[2:], "--sample_every", 0, "--k_psi", 2, "--k_G", 2,
                        "--ema", 0.9, 0.99)}


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind

FAMILY, OBJECTIVE = list(FAMILIES), list(distill.OBJECTIVES)
PAIRS = [(FAMILY[i % len(FAMILY)], OBJECTIVE[i % len(OBJECTIVE)]) for i in range(max(len(FAMILY), len(OBJECTIVE)))]
PAIRS = [pair for pair in PAIRS if pair != ("ve", "cross")]  # refused


@pytest.mark.parametrize("row, objective", PAIRS)
def test_every_row_trains_distills_and_samples(run, images, tmp_path, row, objective):
    """And what they leave: checkpoints, log, flags, pictures."""
    more = {"gvp": ("--prediction", "score", "--qk_norm"), "bridge": ("--reference", "noise"),
            "ve": ("--prediction", "edm")}
    tiny = (*SMALL[2:], "--iters", 3, "--save_every", 2, "--sample_every", 2, "--out", tmp_path)
    said = run("train_teacher", "--data", images, *SMALL[:2], *tiny, "--interpolant", row, *more.get(row, ()))
    assert "3/3 (100%)" in said and "left" in said and ("preconditioning:" in said) == (row == "ve")
    assert set(os.listdir(tmp_path)) == {"lock", "teacher.pt", "teacher.json", "log.jsonl", "samples_0000002.png",
                                         "samples_0000003.png", "curves.png"}
    net, config = load_model(tmp_path / "teacher.pt")
    assert (config["network"]["num_classes"], config["interpolant"]) == (4, row)
    assert config["prediction"] == ("score" if row == "gvp" else "data")
    assert (config["network"]["precondition"] is not None) == (row == "ve") == problem_of(config).edm
    assert config["network"]["qk_norm"] == (row == "gvp")
    run("distill", "--teacher_ckpt", tmp_path / "teacher.pt", *tiny, "--objective", objective, "--cfg_scale", 2)
    assert {"student.pt", "resume.pt", "student_one_step_0000002.pth", "distill.json", "distill_0000002.png",
            "distill_0000003.png"} < set(os.listdir(tmp_path))
    for job in ("train_teacher", "distill"):
        assert {"images_per_second", "memory_mib", "seconds", "skipped"} <= log(tmp_path, job)[0].keys()
        assert [line["step"] for line in log(tmp_path, job)] == [1, 2, 3] and np.isfinite(losses(tmp_path, job)).all()
    student = load_model(tmp_path / "student.pt")[1]["student"]
    assert (student["steps"], student["cfg_scale"], student["objective"]) == (1, 2, objective)
    assert student["t_init"] == pytest.approx(5 / 7, abs=1e-4) or row != "linear"
    run("sample", "--ckpt", tmp_path / "student.pt", "--n", 3, "--out", tmp_path / "s.npz")
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (3, 8, 8, 1)


def test_what_a_network_predicts_where_no_flag_says_so(run, images, tmp_path):
    """Data where it is small, else the row's; a run of an earlier version goes on with what it predicts."""
    def prediction(out, *flags):
        run("train_teacher", "--data", images, *SMALL[2:], "--out", tmp_path / out, *flags)
        return load_checkpoint(tmp_path / out / "teacher.pt")["config"]["prediction"]
    assert prediction("ve", "--model", "SiT-S/8", "--iters", 1, "--interpolant", "ve", "--label_dropout", 0) == "data"
    config = load_model(tmp_path / "ve" / "teacher.pt")[1]
    assert config["null_class"] is False and problem_of(config).edm
    for path in ("vp", "ve"):
        assert prediction("XXS", "--model", "SiT-XXS/8", "--iters", 1, "--interpolant", path, "--fresh") == "data"
        assert not problem_of(load_model(tmp_path / "XXS" / "teacher.pt")[1]).edm
    assert prediction("XS", "--model", "SiT-XS/8", "--iters", 1) == "data"
    assert prediction("S", "--model", "SiT-S/8", "--iters", 1) == "velocity"
    for path, own, kept in (("gvp", "velocity", "velocity"), ("ve", "edm", "data")):
        flags, file = ("--model", "SiT-XXS/8", "--interpolant", path), tmp_path / own / "teacher.pt"
        assert prediction(own, *flags, "--iters", 1, "--prediction", own) == kept
        state = load_checkpoint(file)
        state["flags"]["prediction"] = None
        save_checkpoint(file, state)
        assert prediction(own, *flags, "--iters", 2) == kept
        assert problem_of(load_checkpoint(file)["config"]).edm == (own == "edm")
    state["flags"]["prediction"] = "data"  # once this was EDM's on ve
    save_checkpoint(file, state)
    assert prediction("edm", *flags, "--iters", 2, "--prediction", "data") == "data"
    assert problem_of(load_checkpoint(file)["config"]).edm


def test_what_a_run_says_keeps_and_puts_aside(run, images, small_teacher, tmp_path):
    """Numbered checkpoints that stay, what --fresh does with them, the header, yardsticks, and the end."""
    flags = ("--teacher_ckpt", small_teacher, *SMALL[2:], "--save_every", 1, "--sample_every", 6, "--keep", 2)
    said = run("distill", *flags, "--iters", 12, "--out", tmp_path)
    assert f"--keep 2 --iters 12 --out {tmp_path} (all: " in said and "the first picture comes at iteration 6" in said
    assert said.endswith(f"wrote {tmp_path / 'student.pt'}\n")
    assert [f.name[-6:-4] for f in sorted(tmp_path.glob("*.pth"))] == ["10", "11", "12"]
    longer = ("--iters", 15, "--save_every", 3, "--out", tmp_path / "longer")
    shutil.copytree(tmp_path, tmp_path / "longer")
    run("distill", *flags, *longer)  # keeps what it finds: copies of another rhythm
    assert [f.name[-6:-4] for f in sorted((tmp_path / "longer").glob("*.pth"))] == ["10", "12", "15"]
    last = log(tmp_path, "distill")[-1]
    assert last["spread_teacher"] > 0 and last["D2_first"] == log(tmp_path, "distill")[0]["D2"]
    commit = load_checkpoint(tmp_path / "student.pt")["commit"]
    assert last["commit"] == commit and (commit is None or re.fullmatch(r"[0-9a-f]{12}\+?", commit))
    assert "nothing to do" in run("distill", *flags, "--iters", 12, "--out", tmp_path)
    said = run("distill", *flags, "--iters", 1, "--fresh", "--out", tmp_path)
    assert "7 pictures and checkpoints" in said  # one is what a restart of this run must not go on from
    run("distill", *flags, "--iters", 1, "--fresh", "--out", tmp_path)  # puts its own beside the first, not over it
    assert load_checkpoint(tmp_path / "before_fresh" / "resume.pt")["step"] == 12 == len(log(
        tmp_path / "before_fresh", "distill"))
    assert load_checkpoint(tmp_path / "before_fresh_1" / "student.pt")["step"] == 1
    (tmp_path / "resume.pt").unlink()  # what it goes on from is gone: its result is not written over
    run("distill", *flags, "--iters", 1, "--out", tmp_path)
    assert load_checkpoint(tmp_path / "before_fresh_2" / "student.pt")["step"] == 1
    assert [f.name for f in tmp_path.glob("distill_*.png")] == ["distill_0000001.png"]
    assert len(log(tmp_path, "distill")) == 1


def test_teachers_that_name_no_classes_are_pictured(run, images, small_teacher, tmp_path):
    """Those of earlier versions, and released ones."""
    state = load_checkpoint(small_teacher)
    state["config"] = {key: value for key, value in state["config"].items() if not key.startswith("class")}
    save_checkpoint(tmp_path / "old.pt", state)
    for job, more in (("flow_map", ("--data", images)), ("distill", ())):
        run(job, "--teacher_ckpt", tmp_path / "old.pt", *more, *SMALL[2:], "--iters", 1, "--out", tmp_path / job)
        assert (tmp_path / job / f"{job}_0000001.png").exists()


def test_wandb_is_asked_for_where_it_is_missing(refused, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "teacher.pt").write_bytes(b"of a run before")
    flags = ("--data", images, *SMALL, "--fresh", "--wandb", "p", "--out", tmp_path)
    refused("train_teacher", *flags, says=("--wandb p", "pip install"))
    assert (tmp_path / "teacher.pt").exists()


def test_wandb_gets_the_log_and_the_pictures(run, images, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    spy = mock.Mock(side_effect=wandb.Image)
    monkeypatch.setattr(wandb, "Image", spy)
    run("train_teacher", "--data", images, *SMALL, "--iters", 2, "--wandb", "p", "--out", tmp_path)
    wandb.log({}, step=3)  # the summary is of steps that are over
    assert wandb.run.summary["loss"] == log(tmp_path, "train_teacher")[-1]["loss"]
    assert spy.call_args.args == (str(tmp_path / "samples_0000002.png"),) and [*tmp_path.glob("wandb/offline-run*")]
    wandb.finish()


def test_a_run_and_its_samples_in_the_precision_of_a_card(run, flags, images, tmp_path, monkeypatch):
    """On a CPU: whatever calls a network is in autocast, or the teacher's rounded weights would not fit."""
    def autocast(device):
        return torch.autocast("cpu", torch.bfloat16)
    for module in (common.run, distill, flow_map, sample):
        monkeypatch.setattr(module, "precision", autocast)
    rounded = mock.Mock(side_effect=distill.round_weights)
    for module in (distill, flow_map):
        monkeypatch.setattr(module, "round_weights", rounded)
    run("flow_map", *flags["flow_map"], "--iters", 3, "--out", tmp_path)
    assert rounded.call_args[0][0].blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert {v.dtype for v in load_checkpoint(tmp_path / "flow_map.pt")["model"].values()} == {torch.float32}
    rounded.reset_mock()
    flags = (*flags["distill"], "--out", tmp_path, "--cfg_scale", 2, "--flow_weight", 1, "--flow_row", "lagrange")
    run("distill", *flags, "--data", images, "--iters", 2)
    assert rounded.call_args[0][0].blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert np.isfinite(losses(tmp_path, "distill")).all()
    run("distill", *flags, "--data", images, "--iters", 3)  # the teacher is known again
    made = {v.dtype for v in load_checkpoint(tmp_path / "student.pt")["ema"].values()}
    net, config = load_model(tmp_path / "student.pt")
    seen = []
    net.blocks[0].mlp.fc1.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    sample.generate(net, config, np.arange(2), 0, range(2))
    assert made == {torch.float32} and seen == [torch.bfloat16]


def test_students_draw_classes_as_often_as_the_data_do(run, flags, small_teacher, tmp_path, monkeypatch):
    state, real, seen = load_checkpoint(small_teacher), distill.watch, []
    state["config"]["class_counts"] = [9, 1, 1, 1]
    save_checkpoint(tmp_path / "uneven.pt", state)
    monkeypatch.setattr(distill, "watch", lambda problem, stream, *rest: seen.append(stream) or real(
        problem, stream, *rest))
    run("distill", *flags["distill"], "--teacher_ckpt", tmp_path / "uneven.pt", "--iters", 1, "--out", tmp_path)
    assert seen[0].counts == [9, 1, 1, 1]


def test_a_log_line_is_never_there_twice(run, flags, tmp_path, monkeypatch):
    """Iterations after the last checkpoint run again after a crash; --fresh runs all of them again."""
    flags = (*flags["train_teacher"], "--out", tmp_path, "--iters")
    run("train_teacher", *flags, 2)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"job": "teacher", "step": 3, "loss": 0}\n{"job": "distill", "step": 9}\n{"job": "tea')
    run("train_teacher", *flags, 3)
    assert [line["step"] for line in log(tmp_path, "teacher")] == [1, 2, 3] and len(log(tmp_path, "distill")) == 1
    with monkeypatch.context() as patch:  # a restart, whose first attempt died early: not of the run before
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert "going on" not in run("train_teacher", *flags, 1, "--fresh")
        assert "going on" in run("train_teacher", *flags, 1, "--fresh")
    run("train_teacher", *flags, 1, "--fresh")
    assert [line["step"] for line in log(tmp_path, "teacher")] == [1]


@pytest.mark.slow
def test_other_alphabets_in_the_c_locale_with_warnings_as_errors(small_teacher, tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    flags = ("--ckpt", small_teacher, "--n", 1, "--steps", 1, "--out", "zwei Wörter 文.npz", "--device", "cpu")
    done = shell("-W", "error", ROOT / "sample.py", *flags, cwd=tmp_path, env={**ENVIRONMENT, **ascii_only})
    assert done.returncode == 0 and "wrote 1 images" in done.stdout and not done.stderr, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Going on

@ALL
def test_four_iterations_are_two_and_two(run, flags, tmp_path, job):
    """And a finished run writes its student again."""
    for out, iters, since in (("whole", 4, []), ("parts", 2, []), ("parts", 4, ["2"]), ("parts", 4, ["4"])):
        (tmp_path / out / "student.pt").unlink(missing_ok=True)
        said = run(job, *flags[job], "--iters", iters, "--out", tmp_path / out)
        assert re.findall(r"going on from iteration (\d) of", said) == since
    check_same_end(job, tmp_path / "whole", tmp_path / "parts")
    assert not [*tmp_path.rglob("*.png")]  # --sample_every 0


@unix
@pytest.mark.slow
@JOBS
def test_killed_at_random_moments(flags, tmp_path, job, kills=6):
    """SIGKILL again and again: each life goes on from the last complete checkpoint, and the end is that of an
    undisturbed run, bit for bit."""
    rng, file, done, iters = np.random.default_rng(kills), tmp_path / "cut" / FILES[job], 0, 12 + 7 * kills
    flags = (*flags[job], *CHEAP[job], "--iters", iters, "--save_every", 2, "--out")
    Life(tmp_path, job, *flags, tmp_path / "whole").end()
    for i in range(kills):
        life, more = Life(tmp_path, job, *flags, tmp_path / "cut"), int(rng.integers(6)) if i else 4
        if more:  # the others are killed while they start
            life.until(f" {done + more}/{iters} ")
        time.sleep(rng.uniform(0, 0.1 if more else 0.4))
        said = life.kill(signal.SIGKILL).end(-signal.SIGKILL)
        assert "going on" not in said or f"going on from iteration {done} " in said
        step = load_checkpoint(file)["step"] if file.exists() else 0
        assert step >= max(done, (done + more - 1) // 2 * 2) and step % 2 == 0
        done = step
    assert f"going on from iteration {done} " in Life(tmp_path, job, *flags, tmp_path / "cut").end()
    check_same_end(job, tmp_path / "whole", tmp_path / "cut")


@unix
@pytest.mark.parametrize("job, number, code, world", [
    ("train_teacher", signal.SIGINT, 130, 2), ("distill", signal.SIGINT, 130, 1), ("flow_map", signal.SIGTERM, 0, 1)])
def test_a_signal_finishes_the_iteration_and_saves(flags, tmp_path, job, number, code, world):
    """In all processes, whichever has heard it."""
    struck = functools.partial(strike, number, 3, world - 1)
    flags = (*flags[job], "--out", tmp_path / "cut", "--iters")
    said = Life(tmp_path, job, *flags, 9, world=world, change=struck).end(*[code] * world)
    assert said.count("stopped after iteration 3; the same command goes on from here\n") == 1
    assert "going on from iteration 3 " in Life(tmp_path, job, *flags, 5, world=world).end()
    Life(tmp_path, job, *flags, 5, "--out", tmp_path / "whole", world=world).end()
    check_same_end(job, tmp_path / "whole", tmp_path / "cut")


def test_stop_signals(monkeypatch):
    """A second Ctrl-C ends at once, torchrun's echo of the first does not; a signal that one process alone has seen is
    not lost; the end of torchrun is one, and nothing to those who were started by hand."""
    now, reduce = [100.0], functools.partial(monkeypatch.setattr, common.run.dist, "all_reduce")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = StopSignal()
    assert not stop()
    for number, later in ((signal.SIGINT, 0.5), (signal.SIGINT, 0), (signal.SIGTERM, 5)):
        stop.catch(number, None)
        now[0] += later
    assert stop() and stop.number == signal.SIGINT
    with pytest.raises(SystemExit):
        stop.catch(signal.SIGINT, None)
    monkeypatch.setattr(common.run.dist, "is_initialized", lambda: True)
    stop = StopSignal()
    reduce(lambda *_: stop.catch(signal.SIGTERM, None))  # comes while this process waits for the others
    assert not stop() and stop()
    reduce(lambda flag, _: flag.fill_(signal.SIGTERM))  # another process has heard it
    assert StopSignal()()
    reduce(lambda *_: None)
    for launcher, stops in ((None, False), (os.getppid(), False), (os.getppid() + 1, True)):
        monkeypatch.setattr(common.run.start_processes, "launcher", launcher)
        assert StopSignal()() == stops


@JOBS
def test_rates_may_change_on_the_way_and_nothing_else(run, refused, flags, tmp_path, job):
    flags = (*flags[job], "--out", tmp_path, "--iters")
    run(job, *flags, 2)
    before = (tmp_path / FILES[job]).read_bytes()
    mixing = {"train_teacher": ["--interpolant gvp", "--model SiT-XXS/2", "--flip", "--label_dropout 0.2"],
              "distill": ["--kappa 3.0", "--ema 0.9"]}
    for flag in (*mixing[job], "--batch 8"):
        line = refused(job, *flags, 4, *flag.split(), says=(FILES[job], "choose another --out", "--fresh"))
        assert flag in line, line
    refused(job, *flags, 4, "--batch", 8, "--seed", 1, says=("--batch 8 --seed 1: ", "made with --batch 4 --seed 0;"))
    refused(job, *flags, 1, says=("--iters 1", "at iteration 2 already"))
    assert (tmp_path / FILES[job]).read_bytes() == before
    state = load_checkpoint(tmp_path / FILES[job])
    batch = state["flags"].pop("batch")  # of a version without the flag, which had its default
    save_checkpoint(tmp_path / FILES[job], state)
    refused(job, *flags, 4, says="--batch 4: ")
    state["flags"]["batch"] = batch
    for was, more in ((True, ("no --gone: ", "was made with --gone;")), (False, None)):  # a flag that is no more
        state["flags"]["gone"] = was
        save_checkpoint(tmp_path / FILES[job], state)
        assert not more or refused(job, *flags, 4, says=more)
    decay = ("--weight_decay", 0.5) * (job == "train_teacher")
    said = run(job, *flags, 4, "--lr", 1e-5, "--clip", 0.5, "--accum", 2, "--grad_checkpoint", "--model", "SiT-XXS/4",
               *decay)
    for group in load_checkpoint(tmp_path / FILES[job])["optimizer"]["param_groups"] if decay else ():
        assert group["weight_decay"] == 0.5
    assert "note: --lr 1e-05 from iteration 2 on" in said and "note: --clip 0.5 from iteration 2 on, 1.0 before" in said
    assert "going on" not in run(job, *flags, 2, "--seed", 1, "--fresh")
    assert load_checkpoint(tmp_path / FILES[job])["step"] == 2


@JOBS
def test_teachers_and_data_are_compared_by_content(run, refused, flags, images, small_teacher, tmp_path, job):
    """Moved they are the same, changed they are not."""
    moved, flags = {"--data": shutil.copy(images, tmp_path / "moved.npz")}, flags[job]
    if job == "distill":
        flags += ("--data", images, "--objective", "gap", "--real_alpha", 0.9)
        moved["--teacher_ckpt"] = shutil.copy(small_teacher, tmp_path / "moved.pt")
    run(job, *flags, "--out", tmp_path / "run", "--iters", 2)
    flags += (*(word for pair in moved.items() for word in pair), "--out", tmp_path / "run", "--iters")
    assert "going on from iteration 2 " in run(job, *flags, 3)
    with np.load(images) as npz:
        np.savez(tmp_path / "other.npz", x_train=255 - npz["x_train"], y_train=npz["y_train"])
    state = load_checkpoint(small_teacher)
    state["ema"]["x_embedder.proj.bias"] += 1
    save_checkpoint(tmp_path / "other.pt", state)
    before = (tmp_path / "run" / FILES[job]).read_bytes()
    for flag, path in moved.items():
        other = path.with_stem("other")
        refused(job, *flags[:-1], flag, other, "--iters", 4, says=(f"{flag} {other}: is not what", "--fresh"))
    if job == "train_teacher":
        refused(job, *flags, 4, "--unconditional", says="--data")
    assert (tmp_path / "run" / FILES[job]).read_bytes() == before


def test_latents_go_on_by_the_name_of_their_folder(run, refused, tmp_path, monkeypatch):
    """The command that made them, then --data DIR; another folder of latents is not the same."""
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", images=np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3)).astype(np.uint8))
    train = ("train_teacher", "--model", "SiT-XXS/2", *SMALL[2:])
    torch.save(Autoencoder(3, 4, (32, 32), 1).state_dict(), "vae.bin")
    made = ("--data", "images.npz", "--image_size", 16, "--vae", "vae.bin", "--cache_latents", "cache")
    for iters, flags in ((1, made), (2, ("--data", "cache")), (3, made)):
        assert ("going on" in run(*train, *flags, "--iters", iters)) == (iters > 1)
        assert load_model("out/teacher.pt")[1]["data"] == "cache"  # what flow_map.py goes to by itself
    run(*train, *made[:-1], "turned", "--image_size", 8, "--out", "other", "--iters", 1)
    refused(*train, "--data", "turned", "--iters", 4, says="--data turned: is not what")


@unix
@JOBS
def test_a_checkpoint_stays_on_the_disk_until_it_is_used_and_is_let_go_of(run, flags, tmp_path, monkeypatch, job):
    """It is never in memory as a whole, and once iterations run nothing refers to it."""
    run(job, *flags[job], "--iters", 2, "--out", tmp_path)
    seen, file = [], str(tmp_path / FILES[job])
    for name in ("load_checkpoint", "ema_update"):
        def call(*args, name=name, real=getattr(sys.modules[job], name), **options):
            result = real(*args, **options)
            seen.append((name, file in pathlib.Path("/proc/self/maps").read_text()))
            return result
        monkeypatch.setattr(sys.modules[job], name, call)
    run(job, *flags[job], "--iters", 3, "--out", tmp_path)
    assert seen[:2] == [("load_checkpoint", True), ("ema_update", False)]


@unix
def test_a_second_run_in_the_same_folder_refuses(flags, tmp_path):
    """In all of its processes, while the first lives; a run that was killed leaves nothing in the way."""
    flags = (*flags["train_teacher"], "--save_every", 5, "--out", tmp_path / "run", "--iters")
    first = Life(tmp_path, "train_teacher", *flags, 100000).until("teacher 20/")
    for world in (1, 2):
        said = Life(tmp_path, "train_teacher", *flags, 1, world=world).end(*[2] * world)
        assert f"--out {tmp_path / 'run'}: another run" in said and f"process {first.processes[0].pid} " in said
    first.kill(signal.SIGKILL).end(-9)
    Life(tmp_path, "train_teacher", *flags, 100000).until("going on from").kill(signal.SIGKILL).end(-9)


def test_learning_rates():
    """Linear warm-up, then constant, then falling as the root."""
    assert [learning_rate(step, 8.0, 4, 10) for step in (0, 1, 3, 10, 40)] == [2.0, 4.0, 8.0, 8.0, 4.0]
    assert [learning_rate(step, 8.0, 0, 0) for step in (0, 10 ** 6)] == [8.0, 8.0]


def test_a_step_is_clipped_and_has_the_rate_of_its_network_and_iteration():
    net, args = torch.nn.Linear(1, 1, bias=False), argparse.Namespace(lr=9.0, clip=0.5, warmup=4, decay_from=10)
    trained = put_in_training(net, torch.optim.SGD, 0.8, argparse.Namespace(shard=False))
    for step in (0, 40):
        before, net.weight.grad = net.weight.item(), torch.full((1, 1), 3.0)
        assert float(trained.step(args, step)) == 3
        assert before - float(net.weight) == pytest.approx(0.5 * learning_rate(step, 0.8, 4, 10), rel=1e-3)


def test_the_seed_is_that_of_weights_and_of_draws(run, flags, tmp_path, monkeypatch):
    seeds, draw = set(), Stream.draw
    monkeypatch.setattr(Stream, "draw", lambda stream, *key: seeds.add(stream.seed) or draw(stream, *key))
    for seed in (0, 1):
        run("train_teacher", *flags["train_teacher"], "--iters", 1, "--seed", seed, "--out", tmp_path / str(seed))
    one, two = (load_checkpoint(tmp_path / seed / "teacher.pt")["model"]["x_embedder.proj.weight"] for seed in "01")
    assert seeds == {0, 1} and not torch.allclose(one, two, atol=1e-2)


def test_flips_reach_the_data_of_every_stage(run, images, tmp_path, monkeypatch):
    flips, x0 = [], Images.x0
    monkeypatch.setattr(Images, "x0", lambda data, *rest: flips.append(data.flip) or x0(data, *rest))
    run("train_teacher", "--data", images, *SMALL, "--flip", "--iters", 1, "--out", tmp_path)
    n = len(flips)
    run("flow_map", "--teacher_ckpt", tmp_path / "teacher.pt", "--data", images, *SMALL[2:], "--iters", 1, "--out",
        tmp_path)
    assert 0 < n < len(flips) and all(flips)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

# As the project this one began with documents it, but for sizes.
ORIGINAL = "--model SiT-XXS/4 --batch 8 --lr 1e-5 --cfg_scale 4.0 --k_psi 5 --k_G 1 --sample_every 1"


@unix
@pytest.mark.parametrize("job, more", [
    *((job, "--accum 2 --lr 1e-5") for job in FILES), pytest.param("distill", ORIGINAL, marks=pytest.mark.slow),
    pytest.param("distill", "--flow_weight 1 --lr 1e-5", marks=pytest.mark.slow)])
def test_two_processes_walk_the_path_of_one(run, flags, tmp_path, job, more):
    flags = (*flags[job], *more.split(), "--iters", 4, "--out")
    run(job, *flags, tmp_path / "one")
    Life(tmp_path, job, *flags, tmp_path / "two", world=2).end()
    one, two = (losses(tmp_path / out, job) for out in ("one", "two"))
    assert len(one) == 4
    np.testing.assert_allclose(one, two, atol=1e-4, rtol=1e-4)
    lines, batch = log(tmp_path / "two", job), 8 if "--batch" in more else 4
    for a, b in zip(lines, lines[1:]):  # images of all processes
        assert b["images_per_second"] * (b["seconds"] - a["seconds"]) == pytest.approx(batch, rel=1e-3)


@pytest.mark.parametrize("job, more", [
    ("train_teacher", ()), ("flow_map", ("--anchor", 1)), ("distill", (
    "--student_steps", 2, "--reuse_samples", "--objective", "gap", "--gan_weight", 0.1, "--real_alpha", 0.9)),
    ("distill", ("--flow_weight", 1, "--flow_row", "lagrange"))])
def test_accumulation_walks_the_same_path(run, images, flags, tmp_path, job, more):
    for accum in (1, 2):
        run(job, *flags[job], *more, *["--data", images] * bool(more), "--iters", 4, "--accum", accum, "--out",
             tmp_path / str(accum))
    one, two = ([[*row, line.get("flow_loss", 0)] for row, line in zip(losses(out, job), log(out, job))]
                for out in (tmp_path / "1", tmp_path / "2"))
    np.testing.assert_allclose(one, two, rtol=2e-3, atol=1e-6)


def test_nobody_learns_from_anothers_loss(run, images, flags, tmp_path, monkeypatch):
    """Who has a gradient when critic, head and student step, in this order."""
    nets, found, step = [], [], Trained.step

    def spy(self, *rest):
        nets.extend([self.net] * (self.net not in nets))
        found.append([i for i, net in enumerate(nets) if any(p.grad is not None for p in net.parameters())])
        return step(self, *rest)
    monkeypatch.setattr(Trained, "step", spy)
    more = "--data", images, "--gan_weight", 0.1, "--k_G", 2, "--iters", 2
    run("distill", *flags["distill"], *more, "--out", tmp_path)
    assert len(nets) == 3 and found[-4:] == [[0, 1], [1], [2], [2]]


def test_an_objective_is_a_row(run, images, flags, tmp_path, monkeypatch):
    """One with all of its fields trains as the flags that say the same."""
    more, found = ("--data", images, "--iters", 2, "--out"), []
    monkeypatch.setitem(distill.OBJECTIVES, "new", distill.Objective(0.5, "full", "l1", "data", 0.9, 0.8))
    for i, own in enumerate((("--objective", "new"), ("--objective", "sid", "--kappa", 0.5, "--real_alpha", 0.9,
                                                      "--real_beta", 0.8))):
        run("distill", *flags["distill"], *own, *more, tmp_path / str(i))
        found.append(losses(tmp_path / str(i), "distill"))
    assert found[0] == found[1]


@unix
@pytest.mark.slow
def test_sharded_moments_walk_the_same_path_and_load_anywhere(flags, tmp_path, job="distill"):
    """Two iterations of two processes with --shard, two more of theirs or of one plain process: as four of theirs."""
    whole, parts, mixed = (tmp_path / out for out in ("whole", "parts", "mixed"))
    for out, iters in ((whole, 4), (parts, 2)):
        Life(tmp_path, job, *flags[job], "--iters", iters, "--shard", "--out", out, world=2).end()
    shutil.copytree(parts, mixed)
    for out, *shard in ((parts, "--shard"), (mixed,)):
        life = Life(tmp_path, job, *flags[job], "--iters", 4, *shard, "--out", out, world=1 + len(shard))
        assert "going on from iteration 2 " in life.end()
    check_same_end(job, whole, parts)
    np.testing.assert_allclose(losses(whole, job), losses(mixed, job), rtol=1e-3, atol=1e-6)


def test_moments_are_dealt_and_buffers_do_not_travel(monkeypatch):
    """Buffers are tables, the same everywhere: a broadcast in each pass would cost time for nothing."""
    for name, fake in (("is_initialized", lambda: True), ("get_world_size", lambda: 2)):
        monkeypatch.setattr(common.run.dist, name, fake)
    monkeypatch.setattr("torch.distributed.optim.ZeroRedundancyOptimizer", lambda *_, **options: "dealt")
    for name, wrap in (("broadcast_buffers", lambda net, **options: options),  # up to torch 2.12, and since
                       ("forward_sync_buffers", lambda net, forward_sync_buffers=None, **options: {
                           "forward_sync_buffers": forward_sync_buffers, **options})):
        monkeypatch.setattr(common.run, "DistributedDataParallel", wrap)
        put = put_in_training(torch.nn.Linear(2, 1), torch.optim.Adam, 0.1, argparse.Namespace(shard=True))
        assert (put.wrapped, put.optimizer) == ({name: False, "gradient_as_bucket_view": True}, "dealt")


def count_bytes():
    """Each iteration says what its gradients' all-reduces carried, over what its optimizer steps need."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    real, step, report, sent, needed = put_in_training, Trained.step, Run.report, [], []

    def reduced(group, bucket):
        sent.append(bucket.buffer().nbytes)
        return default_hooks.allreduce_hook(group, bucket)

    def put(*args, **options):
        trained = real(*args, **options)
        trained.wrapped.register_comm_hook(None, reduced)
        return trained

    def stepped(self, *rest):
        needed.append(sum(p.nbytes for p in self.net.parameters() if p.requires_grad))
        return step(self, *rest)

    def reported(run, *rest):
        run.say(f"carried {sum(sent) / sum(needed)} of {len(needed)} steps")
        sent.clear(), needed.clear()
        report(run, *rest)
    train_teacher.put_in_training = distill.put_in_training = put
    Trained.step, Run.report = stepped, reported


@unix
@pytest.mark.parametrize("job, more, steps", [
    ("train_teacher", "--accum 2", 1), ("distill", "--accum 2 --flow_weight 1 --reuse_samples", 4)])
def test_each_gradient_travels_once_for_each_step(flags, tmp_path, job, more, steps):
    said = Life(tmp_path, job, *flags[job], *more.split(), "--iters", 3, "--out", tmp_path / "run", world=2,
                change=count_bytes).end()
    assert re.findall(r"carried (.*) of (\d+) steps", said) == [("1.0", str(steps))] * 3


@unix
@pytest.mark.parametrize("out", ["s.npz", "s.png", "folder"])
def test_two_processes_sample_the_same_file(small_teacher, tmp_path, out):
    flags = ("--ckpt", small_teacher, "--samples", 10, "--steps", 3, "--batch", 3, "--labels", "uniform", "--cfg_scale",
             1.5, "--device", "cpu", "--out")
    for world in (1, 2):
        Life(tmp_path, "sample", *flags, tmp_path / str(world) / out, world=world).end()
    one, two = (sorted(path for path in (tmp_path / world).rglob("*") if path.is_file()) for world in "12")
    folder = [*(f"{i:06d}.png" for i in range(10)), "labels.txt"]
    assert [path.name for path in one] == (folder if out == "folder" else [out])
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


@unix
@pytest.mark.parametrize("job, rank, number", [
    ("train_teacher", 0, signal.SIGKILL), pytest.param("distill", 1, signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_process_that_dies_or_hangs_ends_the_run_and_a_restart_goes_on(flags, tmp_path, job, rank, number):
    """The other one ends soon, and the same command, --fresh as it was, goes on from the last checkpoint as if nothing
    had been, once torchrun has restarted it."""
    flags, struck = (*flags[job], "--save_every", 5, "--fresh", "--out"), functools.partial(strike, number, 7, rank)
    life = Life(tmp_path, job, *flags, tmp_path / "cut", "--iters", 100000, "--timeout", 5, world=2, change=struck)
    life.processes[1 - rank].join(60)
    life.processes[rank].kill()
    said = life.end(*((-9, 1) if rank == 0 else (1, -9)))
    assert "Traceback" in said and "going on" not in said
    for out, restarts in (("cut", "1"), ("whole", "0")):
        life = Life(tmp_path, job, *flags, tmp_path / out, "--iters", 9, world=2, TORCHELASTIC_RESTART_COUNT=restarts)
        assert ("going on from iteration 5 " in life.end()) == (out == "cut")
    check_same_end(job, tmp_path / "whole", tmp_path / "cut")


def under_torchrun(folder, options, change, job, *flags):
    """torchrun itself, with its options; change: how strike() is called in each process."""
    script = folder / "struck.py"
    script.write_text(f"import sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\nimport {job}, test_runs\n"
                      f"test_runs.strike({change})\n{job}.command({job}.main)\n")
    return shell("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options, script, *flags)


@unix
@pytest.mark.slow
def test_no_orphans_when_torchrun_itself_is_killed(flags, tmp_path):
    """Its end is waited for, and that of all who write to its pipe."""
    flags = (*flags["train_teacher"], "--out", tmp_path)
    done = under_torchrun(tmp_path, (), "9, 2, parent=True", "train_teacher", *flags)
    stopped = re.findall(r"\nstopped after iteration (\d+);", done.stdout)
    assert (done.returncode, stopped) == (-9, [str(load_checkpoint(tmp_path / "teacher.pt")["step"])]), done.stderr


@unix
@pytest.mark.slow
def test_a_dead_process_ends_the_others_and_max_restarts_goes_on(flags, tmp_path):
    flags = (*flags["distill"], "--save_every", 5, "--iters", 9, "--fresh", "--out")
    done = under_torchrun(tmp_path, ["--max_restarts=1"], "9, 7, 1", "distill", *flags, tmp_path / "cut")
    assert done.returncode == 0 and "going on from iteration 5 " in done.stdout, done.stderr
    Life(tmp_path, "distill", *flags, tmp_path / "whole", world=2).end()
    check_same_end("distill", tmp_path / "whole", tmp_path / "cut")


def slow_disk():
    real = train_teacher.save_checkpoint
    train_teacher.save_checkpoint = lambda path, content: (time.sleep(6), real(path, content))


@unix
@pytest.mark.slow
def test_a_slow_disk_is_waited_for(flags, tmp_path):
    """--timeout is for a process that hangs, not for one that writes."""
    flags = (*flags["train_teacher"], "--iters", 2, "--save_every", 1, "--timeout", 3, "--out", tmp_path / "run")
    Life(tmp_path, "train_teacher", *flags, world=2, change=slow_disk).end()


def own_folder():
    os.makedirs(os.environ["RANK"], exist_ok=True)
    os.chdir(os.environ["RANK"])


@unix
def test_mistakes_of_a_group_are_one_line(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = flags["train_teacher"]
    pathlib.Path("file").touch()
    for job, *wrong, says in (("train_teacher", *train, "--batch", 5, "--batch 5: does not divide over 2 processes; 4"),
                              ("train_teacher", "--data", "nothere", "--data nothere: no such data set"),
                              ("train_teacher", *train, "--out", "file/in", "--out file/in: cannot be written"),
                              ("sample", "--ckpt", "nothere", "--ckpt nothere: no such file")):
        said = Life(tmp_path, job, *wrong, "--device", "cpu", world=2).end(2, 2)
        assert said.startswith(f"{job}.py: error: {says}") and said.count("\n") == 1, said
    assert not pathlib.Path("out").exists()
    Life(tmp_path, "train_teacher", *train, "--iters", 1, change=own_folder, RANK="0").end()
    apart = Life(tmp_path, "train_teacher", *train, "--iters", 2, world=2, change=own_folder)
    assert "is not there, otherwise than for the first process: give a folder" in apart.end(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and disks

class Card(torch.Tensor):
    """A norm as on a card: nobody looks at it, and the fused optimizer skips by itself."""
    is_cuda = True


def spoil(monkeypatch, where, iterations):
    """NaN in a gradient (of a card's, too) or, for good, in a weight during these iterations."""
    step, clip = Trained.step, torch.nn.utils.clip_grad_norm_

    def stepped(self, args, iteration):
        weight = next(p for p in self.net.parameters() if p.requires_grad)
        if iteration in iterations and where != "weight":
            weight.grad.view(-1)[0] = float("nan")
        norm = step(self, args, iteration)
        if iteration in iterations and where == "weight":
            weight.data.view(-1)[0] = float("nan")
        return norm
    monkeypatch.setattr(Trained, "step", stepped)
    if where == "card":
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: clip(*args).as_subclass(Card))


@pytest.mark.parametrize("job, where", [("train_teacher", "gradient"), ("train_teacher", "card"), ("distill", "card"),
                                        ("distill", "weight")])
def test_nan_is_never_saved(script, flags, tmp_path, monkeypatch, job, where):
    """A spoilt iteration is skipped, on a card too; a spoilt weight stops the run at the next save."""
    flags = (*flags[job], *CHEAP[job], "--save_every", 3, "--out", tmp_path)
    with monkeypatch.context() as patch:
        spoil(patch, where, [4])
        code, _, err = script(job, *flags, "--iters", 8)
    if where == "weight":
        assert code == 2 and re.fullmatch(f"{job}.py: error: iteration 6: .* is not finite; .* --lr .*\n", err), err
        assert load_checkpoint(tmp_path / FILES[job])["step"] == 3
        assert script(job, *flags, "--iters", 8, "--lr", 1e-4)[0] == 0
    else:
        assert code == 0 and load_checkpoint(tmp_path / FILES[job])["step"] == 8, err
        assert [line["skipped"] for line in log(tmp_path, job)] == [0, 0, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("where", ["gradient", "card"])
def test_ten_in_a_row_stop_the_run(refused, flags, tmp_path, monkeypatch, where):
    spoil(monkeypatch, where, [1, *range(4, 40)])
    refused("train_teacher", *flags["train_teacher"], "--iters", 40, "--save_every", 4, "--out", tmp_path,
            says=("iteration 14", "10 times"))
    state = load_checkpoint(tmp_path / "teacher.pt")
    assert state["step"] == 12
    save_checkpoint(tmp_path / "finite.pt", state)


def full_disk():
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))


@unix
@JOBS
def test_a_disk_that_fills_up(flags, tmp_path, job):
    """Two failures are survived, the third in a row stops, and the first checkpoint is whole."""
    out = tmp_path / "run"
    flags = (*flags[job], "--save_every", 2, "--out", out, "--iters")
    Life(tmp_path, job, *flags, 2).end()
    whole = (out / FILES[job]).read_bytes()
    said = Life(tmp_path, job, *flags, 50, change=full_disk).end(2)
    lines = [line for line in said.splitlines() if "MiB free" in line]
    assert len(lines) == 3 and all(FILES[job] in line for line in lines) and "Traceback" not in said, said
    assert "trying again at the next save" in lines[0] and lines[2].startswith(f"{job}.py: error: ")
    assert (out / FILES[job]).read_bytes() == whole and not list(out.glob("*.tmp"))


@unix
def test_saves_pictures_and_lines_that_fail_cost_only_themselves(run, flags, tmp_path, monkeypatch):
    real, begin, tries = os.replace, Run.begin, iter(range(1, 100))

    def replace(source, target):
        if pathlib.Path(target).name == "teacher.pt" and next(tries) in (2, 3, 5, 6):
            raise OSError(30, "Read-only file system", str(target))
        real(source, target)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(Run, "begin", lambda run, *rest: (begin(run, *rest), vars(run).update(
        log=pathlib.Path("/dev/full"))))
    (tmp_path / "samples_0000003.png").mkdir()
    said = run("train_teacher", *flags["train_teacher"], "--out", tmp_path, "--iters", 14, "--save_every", 2,
                "--sample_every", 3)
    assert len(re.findall(r"MiB free\); the last good checkpoint .* at the next save\n", said)) == 4 + 1 + 14, said
    assert said.count("Read-only file system") == 4 and said.count("samples_0000003.png: cannot be written") == 1
    assert load_checkpoint(tmp_path / "teacher.pt")["step"] == 14


def test_a_picture_that_breaks_the_run_comes_after_its_checkpoint(run, refused, flags, tmp_path, monkeypatch):
    def draw(*args):
        raise MemoryError
    teacher = pathlib.Path("a/teacher.pt")
    monkeypatch.chdir(tmp_path)
    flags = (*flags["train_teacher"], "--out", "a", "--sample_every", 2, "--iters")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("train_teacher.draw_picture", draw)
        run("train_teacher", *flags, 2)
    assert load_checkpoint(teacher)["step"] == 2
    teacher.with_name("teacher.pt.77.tmp").touch()  # of a save that was killed
    run("train_teacher", *flags, 3)
    assert not teacher.with_name("teacher.pt.77.tmp").exists()
    pathlib.Path("a/lock").unlink(), pathlib.Path("a/lock").mkdir()
    refused("train_teacher", *flags, 4, says="a/lock: cannot be written")


def test_recomputed_blocks_give_the_same_gradients():
    net = shaken(image_size=4, channels=1)
    x, t, y, found = torch.randn(2, 1, 4, 4), torch.rand(2), torch.tensor([0, 2]), []
    for net.grad_checkpoint in (False, True):
        found.append(torch.autograd.grad(net(x, t, y).square().sum(), [p for p in net.parameters() if p.requires_grad]))
    torch.testing.assert_close(*found)


def test_a_network_that_is_held_passes_gradients_on_and_keeps_nothing_for_its_weights():
    net = shaken(channels=1)
    asked, found = [p.requires_grad for p in net.parameters()], []
    for hold in (contextlib.nullcontext(), frozen(net)):
        x, kept = torch.ones(2, 1, 8, 8, requires_grad=True), []
        with hold, torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.nbytes) or v, lambda v: v):
            found.append((torch.autograd.grad(net(x, torch.rand(2) * 0).square().sum(), x)[0], sum(kept)))
    (one, much), (two, little) = found
    assert torch.equal(one, two) and little < 0.8 * much and [p.requires_grad for p in net.parameters()] == asked


def without_a_compiler():
    real = torch.nn.Module.compile
    torch.nn.Module.compile = lambda net: (print("compiled", flush=True), real(net, backend="aot_eager"))


@unix
@pytest.mark.slow
def test_compiled_runs(flags, tmp_path, job="distill"):
    """torch.compile in place: weights keep their names, so an uncompiled command goes on from the checkpoint."""
    flags = (*flags[job], *CHEAP[job], "--out", tmp_path, "--iters")
    said = Life(tmp_path, job, *flags, 2, "--compile", change=without_a_compiler).end()
    assert said.count("compiled\n") == 3 and said.count("compiled, and ran once, in") == 1
    assert "going on from iteration 2 " in Life(tmp_path, job, *flags, 3).end()


# ---------------------------------------------------------------------------------------------------------------------
# Samples

@pytest.mark.parametrize("solver", ["euler", "sde"])
def test_image_i_depends_on_seed_and_i_alone(run, small_teacher, tmp_path, solver):
    made = []
    for flags in (("--n", 6, "--batch", 6), ("--n", 4, "--batch", 1), ("--n", 6, "--seed", 1)):
        run("sample", "--ckpt", small_teacher, "--steps", 4, "--solver", solver, "--out", tmp_path / "s.npz", *flags)
        made.append(np.load(tmp_path / "s.npz")["arr_0"].astype(int))
    a, b, c = made
    assert np.abs(a[:4] - b).max() <= 1 and (a != c).any()  # other batches: other rounding of sums at most
    assert len(np.unique(a, axis=0)) == 6


def test_every_flag_of_sampling_changes_the_images(run, checkpoints, small_teacher, tmp_path):
    guided, edge = "--cfg_scale 3", "--steps 10 --cfg_interval 0.25 0.3"  # 0.3 is a step, a hair above it in float64
    for ckpt, settings in ((small_teacher, ("", "--steps 5", "--seed 1", guided, f"{guided} --cfg_interval 0.4 0.6",
                                            f"{guided} {edge}", "--solver heun", "--solver sde",
                                            "--solver sde --diffusion constant")),
                           (checkpoints["map"], ("", "--restart 0.5", "--restart 1"))):
        made = set()
        for flags in settings:
            run("sample", "--ckpt", ckpt, "--n", 4, "--steps", 4, *flags.split(), "--out", tmp_path / "s.npz")
            made.add(np.load(tmp_path / "s.npz")["arr_0"].tobytes())
        assert len(made) == len(settings)


def test_samples_that_are_not_finite_say_so(run, checkpoints, tmp_path):
    said = run("sample", "--ckpt", checkpoints["broken"], "--n", 3, "--steps", 2, "--out", tmp_path / "s.npz")
    assert "3 of 3 samples are not finite" in said


def test_an_export_is_a_checkpoint_with_the_average_that_was_chosen(run, refused, small_teacher, tmp_path):
    """The same samples from the file, from the average among others and from it alone; the same teacher for a run."""
    state, made = load_checkpoint(small_teacher), []
    student = {**state["config"], **STUDENT}
    save_checkpoint(tmp_path / "one.pt", {"config": student, "ema": state["ema"]})
    first = {name: value + 0.01 for name, value in state["ema"].items()}
    save_checkpoint(tmp_path / "two.pt", {"config": student, "ema": first, "decays": [0.9, 0.9999],
                                          "other_averages": [state["ema"]]})
    run("sample", "--ckpt", tmp_path / "two.pt", "--average", 0.9999, "--export", tmp_path / "e.safetensors")
    assert not (tmp_path / "samples.png").exists()
    for name, *flags in (("one.pt",), ("e.safetensors",), ("two.pt", "--average", 0.9999), ("two.pt",)):
        run("sample", "--ckpt", tmp_path / name, *flags, "--n", 5, "--out", tmp_path / "s.npz")
        made.append(np.load(tmp_path / "s.npz")["arr_0"])
    assert np.array_equal(made[0], made[1]) and np.array_equal(made[0], made[2]) and (made[0] != made[3]).any()
    run("sample", "--ckpt", small_teacher, "--export", tmp_path / "t.safetensors")
    for iters, teacher in ((1, tmp_path / "t.safetensors"), (2, small_teacher)):  # to the run, the same one
        run("distill", "--teacher_ckpt", teacher, *SMALL[2:], "--iters", iters, "--out", tmp_path / "run")
    refused("sample", "--ckpt", tmp_path / "t.safetensors", "--export", tmp_path / "t.safetensors", says="overwritten")
    for name, says in (("two.pt", "--average 0.5: its averages have the decays 0.9, 0.9999"), ("one.pt", "leave it")):
        refused("sample", "--ckpt", tmp_path / name, "--average", 0.5, says=(name, says))


def test_compare_draws_both(run, checkpoints, tmp_path, monkeypatch):
    """The same labels and seeds; the teacher guided as it was distilled."""
    spy = mock.Mock(side_effect=sample.generate)
    monkeypatch.setattr(sample, "generate", spy)
    flags = ("--compare", checkpoints["teacher"], checkpoints["student"], "--n", 20, "--steps", 3)
    said = run("sample", *flags, "--out", tmp_path / "c.png")
    assert "teacher: 20 images, 3 steps" in said and "one-step student: 20 images, 1 steps" in said
    asked = [(sampler.steps, sampler.cfg_scale, sampler.cfg_interval[0], seed, list(labels))
             for _, _, labels, seed, _, sampler, *_ in (call.args for call in spy.call_args_list)]
    assert (3, 2.0, 0.2, 0, [0, 1, 2, 3] * 5) in asked and (1, 1.0, 0.0, 0, [0, 1, 2, 3] * 5) in asked
    spy.reset_mock()
    run("sample", *flags, "--batch", 8, "--out", tmp_path / "c.png")
    asked = [call.args[4] for call in spy.call_args_list]
    assert asked == [range(1), range(8), range(8, 16), range(16, 20)] * 2
    width, height = Image.open(tmp_path / "c.png").size
    assert width > 2 * height


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

SEEN = {"interpolant": "bridge", "prediction": "data", "reference": "inpaint"}
STUDENT = {"student": {"times": [0.7], "steps": 1, "cfg_scale": 2.0, "cfg_interval": [0.2, 0.8]}}
MAP = {"student": {**STUDENT["student"], "flow_map": "lagrange", "times": [1.0]}}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, images, small_teacher):
    """A student, a teacher without classes, one on ve, with random weights; and one that is cut off."""
    folder, found = tmp_path_factory.mktemp("checkpoints"), {"teacher": small_teacher, "images": images}
    for name, classes, changes in (("student", 4, STUDENT), ("free", 0, {}), ("free_student", 0, STUDENT),
                                   ("ve", 4, {"interpolant": "ve", "prediction": "data"}),
                                   ("map", 4, MAP), ("early", 4, {"student": {**MAP["student"], "times": [0.7]}}),
                                   ("sure", 4, {"null_class": False}), ("broken", 0, {}),
                                   ("noisy", 4, {"interpolant": "bridge", "prediction": "data"}),
                                   ("coupled", 4, {"pairs": True}), ("coupled_map", 4, {"pairs": True, **MAP}),
                                   ("seen", 0, SEEN), ("named", 4, SEEN),
                                   ("sure_bridge", 4, {**SEEN, "null_class": False}),
                                   ("unpaired", 0, {**SEEN, "reference": "unpaired"})):
        network = {"size": "XXS", "patch": 4, "image_size": 8, "channels": 1, "num_classes": classes}
        network["reference_channels"] = int(name in ("seen", "named", "sure_bridge"))
        config = {"network": network, "model": "SiT-XXS/4", "interpolant": "linear", "prediction": "velocity"} | changes
        found[name] = folder / f"{name}.pt"
        weights = build_model(config).state_dict()
        weights["x_embedder.proj.bias"] += 3e38 if name == "broken" else 0
        save_checkpoint(found[name], {"config": config, "ema": weights})
    with np.load(images) as npz:
        np.savez(folder / "bare.npz", images=npz["x_train"])
    found["cut"], found["bare"] = folder / "cut.pt", folder / "bare.npz"
    found["cut"].write_bytes(small_teacher.read_bytes()[:100000])
    return found


@pytest.fixture
def refuses(refused, checkpoints, tmp_path, monkeypatch):
    """One line that holds the words, and nothing is written. Flags may name checkpoints, a file and a full folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "holiday.jpg").write_text("kept")
    (tmp_path / "file").write_text("kept")

    def call(name, flags, says):
        refused(name, *flags.format(**checkpoints).split(), says=says)
        assert sorted(os.listdir()) == ["file", "full"] and os.listdir("full") == ["holiday.jpg"]
        assert pathlib.Path("file").read_text() == "kept"
    return call


MISTAKES = {  # job: (its flags, then those of a mistake and what the line says)
    "train_teacher": ("--data {images} --device cpu --out run", [
        *((f"--iters={value}", f"--iters {value}: must be a whole number of at least 1") for value in ("0", "2.5")),
        *((f"--lr {value}", f"--lr {value}: must be a number above 0") for value in ("0", "nan", "inf", "1e-400")),
        ("--seed=-1", "--seed -1: must be a whole number of at least 0"), ("--clip 0", "above 0"),
        ("--ite 4", "--ite 4"), ("--device tpu", ("--device tpu", "cuda")), ("--accum 3", ("--batch 64", "63 does")),
        ("--out file/in", "--out file/in: cannot be written"), ("--out /proc/no", "--out /proc/no: cannot be written"),
        ("--interpolant none", ("--interpolant none: unknown", "linear, ")),
        ("--vae no", "--cache_latents"), ("--vae no --cache_latents x --image_size 8", "--vae no: no such"),
        ("--prediction eps", "velocity, data, noise, score"),
        ("--interpolant ve --prediction noise", ("--prediction noise", "ve has data, edm")),
        ("--prediction edm", "linear has velocity, data"),
        ("--label_dropout 1.5", "--label_dropout 1.5: must be a number of at least 0 and at most 1"),
        ("--model SiT-H/2", ("--model SiT-H/2", "SiT-SIZE/PATCH")), ("--model SiT-XXS/0", "--model SiT-XXS/0"),
        ("--model SiT-XXS/3", ("does not divide", "--image_size 6")), ("--image_size 9", "patch"),
        ("--data imagenet", "--data imagenet: no such data set"), ("--interpolant bridge", "--reference"),
        ("--antithetic", "without --interpolant bridge"), ("--gamma_scale 2", "--gamma_scale 2.0: does nothing"),
        ("--interpolant bridge --reference noise --antithetic --batch 5", ("--batch 5", "4 does")),
        ("--cache_latents x --skip_broken", "--skip_broken"), ("--cache_latents x", ("--vae", "--image_size")),
        ("--pairs {images} --data digits", ("--pairs", "holds no noise")), ("--pairs {images}", "leave --data"),
        ("--pairs none.npz --data digits", "--pairs none.npz: "),
        ("--pairs {images} --data digits --image_size 8", "leave --data, --image_size")]),
    "distill": ("--teacher_ckpt {teacher} --device cpu --out run", [
        ("--objective fgm", ("--objective fgm", "gap, cross, sid, dmd")), ("--grad half", "full, stop"),
        ("--units noise", "velocity, data"), ("--weight l2", "uniform, l1"), ("--kappa x", "--kappa x: must be a num"),
        ("--t_init 0", "--t_init 0: must be a number above 0 and at most 1"), ("--t_min 0.9 --t_max 0.5", "--t_min 0"),
        ("--k_psi 0", "at least 1"), ("--k_G 0", "at least 1"), ("--cfg_interval 0.5 0.2", "--cfg_interval 0.5 0.2"),
        ("--cfg_scale=-2", "--cfg_scale -2: must be a number of at least 0"), ("--ema 0.9 1.5", "--ema 1.5"),
        ("--model SiT-XL/2", ("--model SiT-XL/2", "SiT-XXS/4")), ("--teacher_ckpt {student}", "is a student"),
        ("--teacher_ckpt none.pt", "--teacher_ckpt none.pt: no such file"), ("--teacher_ckpt {cut}", "damaged"),
        ("--teacher_ckpt {free} --cfg_scale 4", ("--cfg_scale 4", "no classes")), ("--accum 3", "63 does"),
        ("--teacher_ckpt {sure} --critic_cfg_scale 0", ("--critic_cfg_scale 0", "no null class")),
        ("--student_ckpt {student}", ("--student_ckpt", "no flow map")), ("--flow_row imm", "freeflow"),
        ("--teacher_ckpt {ve} --student_ckpt {map}", "interpolant is linear"), ("--flow_row progressive", "unknown"),
        ("--teacher_ckpt {free} --student_ckpt {map}", "sizes"), ("--flow_weight 1 --student_steps 2", "any number"),
        ("--reuse_samples", "--reuse_samples: does nothing without --k_psi"), ("--gan_from 9", "without --gan_weight"),
        ("--kappa 2 --objective dmd", "--kappa 2.0: does nothing without --grad full"), ("--keep=-1", "--keep -1"),
        ("--flow_row euler", "without --flow_weight"), ("--cfg_interval 0 0.5", "--cfg_interval 0.0 0.5: does nothing"),
        ("--flow_weight 1 --flow_row meanflow --cfg_scale 2 --data {images}", ("--cfg_scale 2", "no guidance")),
        ("--gan_weight 1 --data {bare}", ("--data", "0 classes")), ("--flow_weight 1 --flow_row euler", "needs data"),
        ("--teacher_ckpt {unpaired} --flow_weight 1", "velocity"), ("--reference lowres4", "starts from noise"),
        ("--teacher_ckpt {ve} --grad stop --units velocity", ("--units velocity", "--units data")),
        ("--teacher_ckpt {seen} --flow_weight 1 --t_init 1", ("--t_init 1", "0.999")),
        ("--flow_weight 1 --t_init 0.5", ("--t_init 0.5", "noise alone", "give 1,")),
        ("--teacher_ckpt {ve} --objective cross", "--units data"), ("--gan_lr 0.1", ("--gan_lr 0.1", "--gan_weight")),
        ("--data {images} --real_alpha 0", "--real_alpha 0: must be a number above 0 and at most 1"),
        ("--data {images} --real_beta 1.5", "--real_beta 1.5: must be a number above 0 and at most 1"),
        ("--data {images} --gan_weight=-1", "--gan_weight -1: must be a number of at least 0"),
        ("--real_alpha 0.9", ("--real_alpha 0.9", "--data")), ("--gan_weight 0.1", ("--gan_weight 0.1", "--data")),
        ("--data {images}", ("--data", "nothing uses it")), ("--data nowhere --gan_weight 1", "--data nowhere"),
        ("--data {images} --real_beta 0.9 --objective dmd", ("--real_beta 0.9", "--grad full")),
        ("--data {images} --real_beta 0.9 --cfg_scale 2 --objective gap", ("--real_beta 0.9", "guided")),
        ("--out file/in", "--out file/in: cannot be written")]),
    "flow_map": ("--teacher_ckpt {teacher} --data {images} --device cpu --out run", [
        ("--teacher_ckpt {map}", "is a flow map"), ("--teacher_ckpt {student}", "is a student"), ("--mu 0", "above 0"),
        ("--row imm", ("--row imm", "lagrange, freeflow")), ("--mu 1", "must be below"), ("--mu 1.5", "--mu 1.5"),
        ("--row shortcut --tangent jvp", ("--tangent jvp", "--lam 0.5 --first average")),
        ("--lam half", ("--lam half", "random")),
        ("--row euler --first data", ("--first data", "--tangent jvp")), ("--row freeflow", ("--data", "data-free")),
        ("--grid 8", "without --row progressive"), ("--row shortcut --mu 0.2", "--mu 0.2: does nothing"),
        ("--anchor 1 --cfg_scale 2", ("--cfg_scale 2", "--anchor")),
        ("--row progressive --borders 0.5", "--borders 0.5: does"), ("--row progressive --t_min 0.1", "--t_min 0.1"),
        ("--row ctm --lam 1 --second teacher", "--second teacher: does nothing"),
        ("--lam 1", ("--lam 1", "makes already")), ("--row meanflow --mu 0.2", "--mu 0.2: does nothing"),
        ("--row meanflow --second average", "--second average: does nothing"),
        ("--solver_steps 4", "a solver's leg"), ("--tangent_warmup 9", "without --tangent jvp"),
        ("--row progressive --grid 6", "--grid 6: must be a power of two"),
        ("--t_min 0.99 --t_max 0.98", "--t_min 0.99"),
        ("--teacher_ckpt {seen} --t_max 1", ("--t_max 1", "0.999")), ("--teacher_ckpt {unpaired}", "no velocity"),
        ("--t_max 0.7", ("--t_max 0.7", "noise alone")),
        ("--teacher_ckpt {free} --cfg_scale 2", "no classes"), ("--data none", "no such data set"),
        ("--reference lowres4", "starts from noise")]),
    "flow_map ": ("--teacher_ckpt {free} --device cpu --out run", [("", ("--row lagrange", "add --data"))]),
    "sample": ("--ckpt {teacher} --device cpu", [
        ("--n 0", "at least 1"), ("--steps 0", "--steps 0: must be a whole number of at least 1"),
        ("--solver rk45", ("--solver rk45", "euler, heun, sde, posterior")), ("--diffusion none", "sigma"),
        ("--labels 4", ("--labels 4", "0 to 3")), ("--labels=-1", "0 to 3"), ("--labels cat", ("class cat", "0 to 3")),
        ("--cfg_interval 1 0", "below the second"), ("--vae x", "--vae x: no such file"),
        ("--reference x", "--reference x"),
        ("--cfg_interval 0 0.5", "without --cfg_scale"), ("--diffusion sbdm", "without --solver sde"),
        ("--cfg_scale 5 --steps 4 --cfg_interval 0.3 0.45", ("--cfg_interval 0.3 0.45", "none of the 4 steps")),
        ("--ckpt {sure} --cfg_scale 2", "no null class"),
        ("--ckpt {sure_bridge} --reference {bare}", ("--reference", "add --labels")),
        ("--ckpt {named} --reference {bare} --cfg_scale 2", ("--cfg_scale 2", "no labels", "--labels")),
        ("--ckpt {early} --steps 2 --restart 0.5", ("--steps 2", "--restart 1")),
        ("--ckpt {map} --restart 1", "without --steps above 1"), ("--truth x", "--truth x"),
        ("--out file", ("--out file", ".png")), ("--out a.jpg", ("--out a.jpg", ".png")),
        ("--out full", ("--out full", "holiday.jpg")), ("--out file/s.png", "cannot be written"),
        ("--compare {teacher} {student}", "--ckpt FILE"),
        ("--ckpt {cut}", "damaged"), ("--ckpt none.pt", "--ckpt none.pt: no such file"),
        ("--ckpt {free} --cfg_scale 4", "no classes"), ("--ckpt {student} --steps 50", ("--steps 50", "of 1 step")),
        ("--ckpt {student} --restart 1", ("--restart 1", "no flow map")), ("--restart 2", "at most 1"),
        ("--ckpt {map} --pairs p.npz", ("--pairs p.npz", "no teacher")), ("--pairs p.png", "ending in .npz"),
        ("--ckpt {coupled} --solver sde", ("--solver sde", "learnt on pairs")),
        ("--ckpt {coupled_map} --steps 2 --restart 0.5", ("--restart 0.5", "learnt on pairs")),
        ("--ckpt {noisy} --pairs p.npz", "no teacher"), ("--pairs p.npz --solver sde", "--solver sde"),
        ("--ckpt {seen} --reference {bare} --out {bare}", "is what is read"),
        ("--ckpt {free} --labels 3", "--labels 3: this checkpoint has no classes"),
        ("--ckpt {student} --cfg_scale 4", ("--cfg_scale 4", "distilled into it")),
        ("--ckpt {student} --solver heun", "--solver heun"), ("--ckpt {student} --diffusion sbdm", "--diffusion sbdm"),
        ("--export e.pt", ("--export e.pt", ".safetensors")),
        ("--export file/e.safetensors", "cannot be written"), ("--average 0.9", "one average alone")]),
    "sample ": ("--device cpu", [
        ("", "--ckpt FILE or --compare"), ("--compare {teacher} {teacher}", "first"),
        ("--compare {student} {teacher}", "first"), ("--compare {teacher} {student} --out c.npz", ".png"),
        ("--compare {teacher} none.pt", "none.pt: no such file"),
        ("--compare {teacher} {free_student}", "differ in num_classes")])}


@pytest.mark.parametrize("flags, found", [("", (3e-4, 6e-4, -0.4)), ("--lr 1e-5 --kappa -1e-3", (1e-5, 2e-5, -1e-3)),
                                          ("--critic_lr .1 --objective gap", (3e-4, 0.1, 1))])
def test_what_a_row_and_one_rate_say_of_the_others(monkeypatch, flags, found):
    monkeypatch.setattr(sys, "argv", ["distill.py", "--teacher_ckpt", "t.pt", *flags.split()])
    args, _ = distill.parse_flags()
    assert (args.lr, args.critic_lr, args.kappa) == pytest.approx(found)


@pytest.mark.parametrize("job, flags, says", [(job, f"{usual} {flags}", says) for job, (usual, rows) in MISTAKES.items()
                                              for flags, says in rows])
def test_mistakes_are_one_line(refuses, job, flags, says):
    refuses(job.strip(), flags, says)


@pytest.mark.parametrize("script", ["train_teacher", "distill", "flow_map", "sample", "fid"])
def test_help_shows_the_defaults_that_say_something(monkeypatch, capsys, script):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as raised:
        importlib.import_module(script).parse_flags()
    said = " ".join(capsys.readouterr().out.split())
    assert raised.value.code == 0 and "(default: " in said and "default: None" not in said


LOCAL = UserError("--a 1: no")
LOCAL.everywhere = False


@pytest.mark.parametrize("error, rank, code, line", [
    (UserError("--a 1: no"), 0, 2, "a.py: error: --a 1: no\n"), (UserError("--a 1: no"), 1, 2, ""),
    (LOCAL, 1, 2, "a.py: error: --a 1: no\n"), (KeyboardInterrupt(), 0, 130, "a.py: interrupted\n"),
    (UserError("two\nlines \x1b[2J"), 0, 2, "a.py: error: two\\nlines \\x1b[2J\n"), (ValueError("a bug"), 0, None, "")])
def test_only_mistakes_of_the_user_become_a_line(monkeypatch, capsys, error, rank, code, line):
    """Whatever else goes wrong keeps its traceback."""
    monkeypatch.setattr(sys, "argv", ["/some/where/a.py"])
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(type(error) if code is None else SystemExit) as raised:
        command(mock.Mock(side_effect=error))
    assert capsys.readouterr().err == line and (raised.value is error if code is None else raised.value.code == code)


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks: they are commands of the docs

UNITS = {"cross k_psi 5 --reuse_samples": (20, 33), "cross k_psi 5": (24, 33), "cross k_psi 1": (8, 13),
         "sid k_psi 1": (10, 15)}  # of distill.py and of the naive arrangement, as docs/results.md states them


@pytest.mark.slow
@pytest.mark.parametrize("how, objective", [
    (("SiT-XXS/2", 16, 1, 10, 32), "cross"), (("SiT-XXS/2", 16, 3, 10, 16, 2.0), "sid"),
    (("SiT-XS/2", 16, 4, 10, 8), "dmd")])
def test_planned_memory_is_what_distillation_takes(tmp_path, how, objective):
    """Rehearsed on tensors without memory; measured as the allocator's peak over a whole run."""
    import bench
    how = bench.Rehearsal(*how)
    planned = bench.rehearse(bench.rehearse_distillation, how, objective)
    teacher, _, _ = bench.random_teacher(tmp_path, *how[:3])
    flags = ("--batch", how.batch, "--cfg_scale", how.cfg_scale, "--objective", objective, "--device", "cpu")
    with mock.patch("common.run.Run.report", lambda *_: None), torch.profiler.profile(profile_memory=True) as profile:
        bench.run_trainer(distill, teacher, *flags, "--iters", 3)
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert planned == pytest.approx(max(np.cumsum(sizes)), rel=0.05)


@unix
@pytest.mark.slow
@pytest.mark.parametrize("flags, says", [
    ("plan --model SiT-XXS/2", ["M parameters", "distillation .sid", "disk GiB"]),
    ("sampling --model SiT-XXS/4", ["250 steps"]),
    ("maps --model SiT-XXS/4", ["sid: 9.6 units", "lagrange: 5.. units", "meanflow", "euler, jvp", "as sid"]),
    ("scale --models SiT-XXS/2", ["teacher step, eager", "distillation, gap", "of the matrix rate", "one-step"]),
    ("iteration --model SiT-XXS/4", [f"{row}: {a} units.*sgemm.* naive {b} units" for row, (a, b) in UNITS.items()])])
def test_benchmarks_at_tiny_size(tmp_path, flags, says):
    tiny = "--side 8 --channels 4 --batch 2 --iterations 1 --rounds 1"
    said = Life(tmp_path, "bench", *flags.split(), *tiny.split()).end()
    assert all(re.search(words, said) for words in says), said


@unix
@pytest.mark.slow
def test_what_a_map_is_drawn_to_is_sampled(tmp_path):
    import bench
    teacher, _, _ = bench.random_teacher(tmp_path, "SiT-XXS/4", 8, 1)
    Life(tmp_path, "bench", "limit", "--ckpt", str(teacher), "--images", "4", "--batch", "2").end()
    np.savez(tmp_path / "d.npz", images=np.zeros((5, 8, 8), np.uint8), labels=np.arange(5))
    said = Life(tmp_path, "bench", "errors", "--ckpt", str(teacher), "--data", str(tmp_path / "d.npz")).end()
    assert "s/alpha 1, t = 0.500: " in said
    assert [np.load(path)["images"].shape for path in tmp_path.glob("limit_*.npz")] == [(4, 8, 8, 1)] * 4
    whole, first = bench.unroll(0.9, 0.1, 0.3), bench.unroll(0.9, 0.34, 0.3)  # lagrange's first leg, 1 - mu of the way
    np.testing.assert_allclose(first[1:], whole[:-1])  # its teacher takes the rest, in one step


def test_a_first_line_that_is_not_finite_stops_nothing(run, flags, tmp_path, monkeypatch):
    real, factors = distill.student_loss, iter([float("nan")])

    def spoilt(*given):
        factor = next(factors, 1)
        return [v * factor for v in real(*given)]
    monkeypatch.setattr(distill, "student_loss", spoilt)
    run("distill", *flags["distill"], *CHEAP["distill"], "--iters", 3, "--out", tmp_path)
    lines = log(tmp_path, "distill")
    assert [line["skipped"] for line in lines] == [1, 0, 0] and lines[0]["D2"] is None and "D2_first" not in lines[2]


@unix
def test_names_that_are_no_text(run, tmp_path):
    """A class folder in another encoding; and copies that somebody made beside the numbered checkpoints."""
    for name in (b"caf\xe9", b"dog\ncat"):
        folder = tmp_path / "photos" / os.fsdecode(name)
        folder.mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 99, np.uint8)).save(folder / "0.png")
    run("train_teacher", "--data", tmp_path / "photos", *SMALL, "--iters", 1, "--data_dir", tmp_path, "--out", tmp_path)
    run("sample", "--ckpt", tmp_path / "teacher.pt", "--n", 2, "--steps", 1, "--out", tmp_path / "made")
    assert (tmp_path / "made" / "labels.txt").read_bytes() == b"caf\xe9\ndog cat\n"
    (tmp_path / "student_one_step_0000001 (1).pth").touch()
    run("distill", "--teacher_ckpt", tmp_path / "teacher.pt", *SMALL[2:], "--iters", 3, "--save_every", 1, "--keep", 1,
        "--out", tmp_path)
    assert [f.stem[17:] for f in sorted(tmp_path.glob("*.pth"))] == ["0000001 (1)", "0000003"]
