"""The commands, whole: resume, signals, several processes, and every mistake a user can make, at tiny sizes."""
import json
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, SMALL
from model import SiT, load_checkpoint, load_model
from train_teacher import count_skipped, make_optimizer, optimizer_step

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def shell(*command, **options):
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
                          **options)


def torchrun(processes, *command):
    done = shell("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command)
    assert done.returncode == 0, done.stderr
    return done


def log(out, job):
    lines = [json.loads(line) for line in (pathlib.Path(out) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["job"] == job]


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


@pytest.fixture
def trainers(images, small_teacher):
    """job -> (script, checkpoint that holds everything, flags)."""
    return {"teacher": ("train_teacher", "teacher.pt", ("--data", images, *SMALL)),
            "distill": ("distill", "resume.pt", ("--teacher_ckpt", small_teacher, *SMALL[2:], "--k_psi", 2, "--k_G", 2, "--ema", 0.9, 0.99))}


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind

def test_teacher_leaves_checkpoint_log_flags_and_picture(script, images, tmp_path):
    code, stdout, _ = script("train_teacher", "--data", images, *SMALL, "--iters", 3, "--out", tmp_path, "--sample_every", 2)
    assert code == 0 and "3/3 (100%)" in stdout and "left" in stdout
    assert {"teacher.pt", "log.jsonl", "train_teacher.json", "samples_0000002.png", "samples_0000003.png"} <= set(os.listdir(tmp_path))
    assert [line["step"] for line in log(tmp_path, "teacher")] == [1, 2, 3]
    assert {"loss", "grad_norm", "images_per_second", "memory_mib"} <= log(tmp_path, "teacher")[0].keys()
    net, config = load_model(tmp_path / "teacher.pt")
    assert config["network"]["num_classes"] == 4 and config["interpolant"] == "linear" and config["prediction"] == "velocity"
    assert net(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 3])).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("row, prediction", [("linear", "noise"), ("vp", None), ("gvp", "score"), ("ve", None), ("bridge", None)])
def test_every_row_trains_distills_and_samples(script, images, tmp_path, row, prediction):
    flags = ("--prediction", prediction) if prediction else ("--reference", "noise") if row == "bridge" else ()
    assert script("train_teacher", "--data", images, *SMALL, "--iters", 2, "--out", tmp_path, "--interpolant", row, *flags)[0] == 0
    code, stdout, err = script("distill", "--teacher_ckpt", tmp_path / "teacher.pt", *SMALL[2:], "--iters", 2, "--out", tmp_path)
    assert code == 0, err
    assert script("sample", "--ckpt", tmp_path / "student.pt", "--n", 3, "--out", tmp_path / "s.npz", "--device", "cpu")[0] == 0
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (3, 8, 8, 1)
    assert all(np.isfinite(line["student_loss"]) for line in log(tmp_path, "distill"))


@pytest.mark.parametrize("objective", ["gap", "cross", "sid", "dmd"])
def test_every_objective_leaves_a_student(script, small_teacher, tmp_path, objective):
    code, stdout, err = script("distill", "--teacher_ckpt", small_teacher, *SMALL[2:], "--objective", objective, "--iters", 4, "--out",
                               tmp_path, "--save_every", 2, "--sample_every", 2, "--cfg_scale", 2, "--k_psi", 3, "--reuse_samples")
    assert code == 0, err
    assert {"student.pt", "resume.pt", "student_one_step_0000002.pth", "student_one_step_0000004.pth", "distill_0000002.png",
            "distill.json", "log.jsonl"} <= set(os.listdir(tmp_path))
    assert {"critic_loss", "student_loss", "D2", "spread", "student_norm", "critic_norm"} <= log(tmp_path, "distill")[0].keys()
    _, config = load_model(tmp_path / "student.pt")
    assert config["student"]["steps"] == 1 and config["student"]["cfg_scale"] == 2 and config["student"]["objective"] == objective
    assert config["student"]["t_init"] == pytest.approx(5 / 7, abs=1e-4)
    assert Image.open(tmp_path / "distill_0000002.png").size[0] > 100


def test_knobs_override_the_objectives_row(script, small_teacher, tmp_path):
    flags = ("--objective", "sid", "--kappa", 0.5, "--units", "velocity")
    assert script("distill", "--teacher_ckpt", small_teacher, *SMALL[2:], "--iters", 1, "--out", tmp_path, *flags)[0] == 0
    resolved = json.loads((tmp_path / "distill.json").read_text())
    assert (resolved["kappa"], resolved["units"], resolved["grad"], resolved["weight"]) == (0.5, "velocity", "full", "l1")


def test_critic_and_student_start_from_the_teachers_average(script, small_teacher, tmp_path):
    """With vanishing learning rates they still are the teacher."""
    assert script("distill", "--teacher_ckpt", small_teacher, *SMALL[2:], "--iters", 1, "--lr", 1e-30, "--out", tmp_path)[0] == 0
    state, teacher = load_checkpoint(tmp_path / "resume.pt"), load_checkpoint(small_teacher)
    for name in ("student", "critic"):
        torch.testing.assert_close(state[name], teacher["ema"])


def test_the_original_projects_command(small_teacher, tmp_path):
    """As written, with a small teacher and few iterations."""
    done = shell("-m", "torch.distributed.run", "--nnodes=1", "--nproc_per_node=2", "--master_port=29533", "distill.py", "--model", "SiT-XXS/4",
                 "--teacher_ckpt", small_teacher, "--batch", 8, "--iters", 2, "--lr", "1e-5", "--cfg_scale", "4.0", "--k_psi", 5,
                 "--k_G", 1, "--sample_every", 1, "--out", tmp_path, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    resolved = json.loads((tmp_path / "distill.json").read_text())
    assert resolved["k_psi"] == 5 and resolved["cfg_scale"] == 4.0 and resolved["critic_lr"] == pytest.approx(3e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Resume

@pytest.mark.parametrize("job", ["teacher", "distill"])
def test_four_iterations_are_two_and_two(script, trainers, tmp_path, job):
    name, file, flags = trainers[job]
    assert script(name, *flags, "--iters", 4, "--out", tmp_path / "whole")[0] == 0
    assert script(name, *flags, "--iters", 2, "--out", tmp_path / "parts")[0] == 0
    code, stdout, _ = script(name, *flags, "--iters", 4, "--out", tmp_path / "parts")
    assert code == 0 and "going on from iteration 2" in stdout
    assert same(weights(tmp_path / "whole" / file), weights(tmp_path / "parts" / file))
    assert [line["step"] for line in log(tmp_path / "parts", job)] == [1, 2, 3, 4]
    if job == "distill":
        assert same(weights(tmp_path / "whole" / "student.pt"), weights(tmp_path / "parts" / "student.pt"))


@pytest.mark.parametrize("job", ["teacher", "distill"])
def test_sigterm_saves_and_the_same_command_goes_on(script, trainers, tmp_path, job):
    name, file, flags = trainers[job]
    command = [sys.executable, f"{name}.py", *map(str, flags), "--iters", "400", "--out", str(tmp_path / "cut"), "--sample_every", "1000"]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if re.search(r" 3/400 ", line):
            process.send_signal(signal.SIGTERM)
            break
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and "goes on from here" in stdout, stderr
    step = load_checkpoint(tmp_path / "cut" / file)["step"]
    assert 3 <= step < 400
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for out in ("cut", "whole"):
            assert script(name, *flags, "--iters", step + 2, "--out", tmp_path / out)[0] == 0
    finally:
        torch.set_num_threads(threads)
    assert same(weights(tmp_path / "cut" / file), weights(tmp_path / "whole" / file))


@pytest.mark.parametrize("job", ["teacher", "distill"])
def test_resume_refuses_other_flags_and_fresh_starts_over(script, refused, trainers, tmp_path, job):
    name, file, flags = trainers[job]
    script(name, *flags, "--iters", 2, "--out", tmp_path)
    before = (tmp_path / file).read_bytes()
    refused(name, *flags, "--iters", 4, "--out", tmp_path, "--batch", 8, says=("--batch 8", "--fresh"))
    refused(name, *flags, "--iters", 1, "--out", tmp_path, says=("--iters 1", "iteration 2"))
    assert (tmp_path / file).read_bytes() == before
    code, stdout, _ = script(name, *flags, "--iters", 2, "--out", tmp_path, "--lr", 0.001, "--fresh")
    assert code == 0 and "going on" not in stdout


def test_nonfinite_gradients_are_skipped_and_then_stop_the_run(script, refused, images, tmp_path, monkeypatch):
    import train_teacher
    real, calls = train_teacher.regression_loss, []

    def sick(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 2 or len(calls) > 4 else 1.0)
    monkeypatch.setattr(train_teacher, "regression_loss", sick)
    refused("train_teacher", "--data", images, *SMALL, "--iters", 40, "--save_every", 4, "--out", tmp_path, says=("iteration 14", "10 times"))
    state = load_checkpoint(tmp_path / "teacher.pt")
    assert state["step"] == 12 and all(bool(v.isfinite().all()) for v in state["model"].values())


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

@pytest.mark.parametrize("job", ["teacher", "distill"])
def test_two_processes_walk_the_path_of_one(script, trainers, tmp_path, job):
    name, _, flags = trainers[job]
    flags = (*flags, "--iters", 20, "--sample_every", 100, "--accum", 2)
    assert script(name, *flags, "--out", tmp_path / "one")[0] == 0
    torchrun(2, f"{name}.py", *flags, "--out", tmp_path / "two")
    keys = {"teacher": ["loss", "grad_norm"], "distill": ["critic_loss", "student_loss", "D2", "spread"]}[job]
    one, two = ([[line[k] for k in keys] for line in log(tmp_path / out, job)] for out in ("one", "two"))
    assert len(one) == 20
    np.testing.assert_allclose(one, two, atol=1e-4, rtol=1e-4)


def test_accumulation_walks_the_same_path(script, images, tmp_path):
    losses = []
    for accum in (1, 2):
        assert script("train_teacher", "--data", images, *SMALL, "--iters", 6, "--accum", accum, "--out", tmp_path / str(accum))[0] == 0
        losses.append([line["loss"] for line in log(tmp_path / str(accum), "teacher")])
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.parametrize("more", [(), ("--student_steps", 2, "--reuse_samples", "--data", "images", "--gan_weight", 0.1, "--real_alpha", 0.95)])
def test_accumulation_walks_the_same_path_when_distilling(script, images, small_teacher, tmp_path, more):
    losses = []
    for accum in (1, 2):
        flags = [images if flag == "images" else flag for flag in more]
        code, _, err = script("distill", "--teacher_ckpt", small_teacher, *SMALL[2:], "--iters", 4, "--k_psi", 2, "--k_G", 2, "--accum", accum, *flags,
                              "--out", tmp_path / str(accum))
        assert code == 0, err
        losses.append([[line[k] for k in ("critic_loss", "critic_norm", "student_loss", "D2", "student_norm")] for line in log(tmp_path / str(accum), "distill")])
    np.testing.assert_allclose(*losses, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("out", ["s.npz", "s.png", "folder"])
def test_two_processes_sample_the_same_file(script, small_teacher, tmp_path, out):
    # --samples is --n for torchrun, which before Python 3.12 takes --n for an ambiguous flag of its own.
    flags = ("--ckpt", small_teacher, "--samples", 10, "--steps", 3, "--batch", 3, "--labels", "random", "--device", "cpu", "--cfg_scale", 1.5)
    assert script("sample", *flags, "--out", tmp_path / "one" / out)[0] == 0
    torchrun(2, "sample.py", *flags, "--out", tmp_path / "two" / out)
    if out == "folder":
        assert sorted(os.listdir(tmp_path / "one" / out)) == [*(f"{i:06d}.png" for i in range(10)), "labels.txt"]
        for file in os.listdir(tmp_path / "one" / out):
            assert (tmp_path / "one" / out / file).read_bytes() == (tmp_path / "two" / out / file).read_bytes()
    else:
        assert (tmp_path / "one" / out).read_bytes() == (tmp_path / "two" / out).read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Samples

def test_image_i_depends_on_seed_and_i_alone(script, small_teacher, tmp_path):
    arrays = {}
    for name, flags in {"a": ("--n", 6, "--batch", 6), "b": ("--n", 4, "--batch", 1), "c": ("--n", 6, "--seed", 1)}.items():
        for solver in ("euler", "sde"):
            file = tmp_path / f"{name}_{solver}.npz"
            code, _, err = script("sample", "--ckpt", small_teacher, "--steps", 4, "--solver", solver, "--out", file, "--device", "cpu", *flags)
            assert code == 0, err
            arrays[name, solver] = np.load(file)
    for solver in ("euler", "sde"):
        a, b, c = (arrays[name, solver]["arr_0"].astype(int) for name in "abc")
        assert np.abs(a[:4] - b).max() <= 1 and (a != c).any()  # other batches: other rounding of sums at most
    assert list(arrays["a", "euler"]["arr_1"]) == [0, 1, 2, 3, 0, 1] and arrays["a", "euler"]["arr_0"].dtype == np.uint8


def test_labels(script, small_teacher, tmp_path):
    for spec, expected in {"2": [2] * 5, "3,1": [3, 1, 3, 1, 3], "balanced": [0, 1, 2, 3, 0], "random": None}.items():
        assert script("sample", "--ckpt", small_teacher, "--n", 5, "--steps", 1, "--labels", spec, "--out", tmp_path / "s.npz")[0] == 0
        labels = np.load(tmp_path / "s.npz")["arr_1"]
        assert labels.tolist() == expected if expected else len(set(labels.tolist())) > 1


def test_compare_draws_both(script, small_teacher, tmp_path):
    script("distill", "--teacher_ckpt", small_teacher, *SMALL[2:], "--iters", 1, "--cfg_scale", 2, "--out", tmp_path)
    code, stdout, err = script("sample", "--compare", small_teacher, tmp_path / "student.pt", "--n", 20, "--steps", 3, "--out", tmp_path / "c.png")
    assert code == 0 and "teacher: 20 images, 3 steps" in stdout, err
    width, height = Image.open(tmp_path / "c.png").size
    assert width > 2 * height


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

@pytest.fixture
def bad_checkpoints(small_teacher, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)
    whole = small_teacher.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 3])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"config": Bomb()}))
    torch.save({"config": Bomb()}, tmp_path / "code2.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    yield [tmp_path / name for name in ("missing.pt", "cut.pt", "text.pt", "code.pt", "code2.pt", "other.pt")]
    assert not (tmp_path / "executed").exists()


def test_bad_checkpoints(refused, bad_checkpoints, small_teacher, tmp_path):
    for path in bad_checkpoints:
        refused("sample", "--ckpt", path, "--out", tmp_path / "s.png", says=("--ckpt", path.name))
        refused("sample", "--compare", small_teacher, path, "--out", tmp_path / "s.png", says=("--compare", path.name))
        refused("distill", "--teacher_ckpt", path, "--out", tmp_path / "d", says=("--teacher_ckpt", path.name))
    assert not (tmp_path / "s.png").exists() and not (tmp_path / "d").exists()


def test_bad_flags_of_the_trainers(refused, images, small_teacher, tmp_path):
    teacher = ("train_teacher", "--data", images, "--out", tmp_path / "run", "--device", "cpu")
    student = ("distill", "--teacher_ckpt", small_teacher, "--out", tmp_path / "run", "--device", "cpu")
    for flag in ("--iters", "--batch", "--lr", "--log_every", "--sample_every", "--save_every"):
        for value in ("0", "-1", "many", "nan", "inf"):
            for command in (teacher, student):
                refused(*command, f"{flag}={value}", says=f"{flag} {value}: must be")
    for flag, value, words in (("--interpolant", "cosine", "linear"), ("--prediction", "epsilon", "velocity"), ("--label_dropout", "1.5", "at most 1"),
                               ("--model", "SiT-H/2", "SiT-SIZE/PATCH"), ("--model", "SiT-XXS/3", "does not divide"),
                               ("--image_size", "9", "patch"), ("--accum", "3", "--batch 64"), ("--data", "imagenet", "no such data set"),
                               ("--unknown", "1", "--unknown"), ("--device", "tpu", "cuda"), ("--ite", "4", "--ite")):
        refused(*teacher, flag, value, says=(flag.lstrip("-"), value, words))
    for flag, value, words in (("--objective", "fgm", "gap, cross, sid, dmd"), ("--grad", "half", "full, stop"), ("--units", "noise", "velocity"),
                               ("--weight", "l2", "uniform"), ("--seed", "-1", "at least 0"), ("--t_init", "0", "above 0"), ("--t_init", "1.5", "at most 1"), ("--t_init", "-1", "above 0"),
                               ("--k_psi", "0", "at least 1"), ("--k_G", "0", "at least 1"), ("--cfg_scale", "-2", "at least 0"), ("--kappa", "x", "a number"),
                               ("--model", "SiT-XL/2", "SiT-XXS/4"), ("--t_min", "0.99", "below --t_max"), ("--ema", "1.5", "at most 1")):
        refused(*student, f"{flag}={value}", says=(flag, value, words))
    assert not (tmp_path / "run").exists()


def test_batch_that_does_not_divide_names_one_that_does(tmp_path, images, small_teacher):
    for name, flags in (("train_teacher", ("--data", images)), ("distill", ("--teacher_ckpt", small_teacher))):
        done = shell("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"{name}.py", *flags, "--batch", 5, "--out", tmp_path / "run",
                     "--device", "cpu")
        lines = [line for line in done.stderr.splitlines() if line.startswith(f"{name}.py: error")]
        assert done.returncode != 0 and len(lines) == 1 and "--batch 5" in lines[0] and "4 does" in lines[0]
    assert not (tmp_path / "run").exists()


def test_guidance_without_classes_is_refused(script, refused, images, tmp_path):
    script("train_teacher", "--data", images, *SMALL, "--iters", 1, "--unconditional", "--out", tmp_path)
    refused("distill", "--teacher_ckpt", tmp_path / "teacher.pt", "--cfg_scale", 4, says=("--cfg_scale 4", "no classes"))
    refused("sample", "--ckpt", tmp_path / "teacher.pt", "--cfg_scale", 4, "--out", tmp_path / "s.npz", says=("--cfg_scale 4", "no classes"))
    refused("sample", "--ckpt", tmp_path / "teacher.pt", "--labels", 3, "--out", tmp_path / "s.npz", says=("--labels 3", "no classes"))
    assert script("sample", "--ckpt", tmp_path / "teacher.pt", "--n", 3, "--steps", 2, "--out", tmp_path / "s.npz")[0] == 0


def test_a_log_line_is_never_there_twice(script, images, tmp_path):
    """Iterations after the last checkpoint run again after a crash; --fresh runs all of them again."""
    flags = ("--data", images, *SMALL, "--out", tmp_path)
    script("train_teacher", *flags, "--iters", 2)
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"job": "teacher", "step": 3, "loss": 0}\n{"job": "distill", "step": 9}\n{"job": "tea')
    script("train_teacher", *flags, "--iters", 4)
    assert [line["step"] for line in log(tmp_path, "teacher")] == [1, 2, 3, 4] and len(log(tmp_path, "distill")) == 1
    script("train_teacher", *flags, "--iters", 1, "--fresh")
    assert [line["step"] for line in log(tmp_path, "teacher")] == [1]


def test_a_changed_teacher_is_noticed_and_a_finished_run_writes_its_student_again(script, refused, small_teacher, tmp_path):
    teacher = tmp_path / "teacher.pt"
    teacher.write_bytes(small_teacher.read_bytes())
    flags = ("--teacher_ckpt", teacher, *SMALL[2:], "--out", tmp_path)
    script("distill", *flags, "--iters", 2)
    before = weights(tmp_path / "student.pt")
    (tmp_path / "student.pt").unlink()
    assert script("distill", *flags, "--iters", 2)[0] == 0 and same(before, weights(tmp_path / "student.pt"))
    state = load_checkpoint(teacher)
    state["ema"]["x_embedder.proj.bias"] += 1
    torch.save(state, teacher)
    refused("distill", *flags, "--iters", 4, says=("--teacher_ckpt", "is not the teacher", "--fresh"))
    assert same(before, weights(tmp_path / "student.pt"))


def test_places_that_cannot_be_written(refused, images, small_teacher, tmp_path):
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        refused("train_teacher", "--data", images, *SMALL, "--iters", 1, "--out", out, says=("--out", "cannot be written"))
        refused("distill", "--teacher_ckpt", small_teacher, *SMALL[2:], "--iters", 1, "--out", out, says=("--out", "cannot be written"))
        refused("sample", "--ckpt", small_teacher, "--out", f"{out}/s.png", says=("--out", "cannot be written"))
    (tmp_path / "set").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "set" / "a.png")
    refused("train_teacher", "--data", tmp_path / "set", *SMALL, "--data_dir", tmp_path / "file", "--out", tmp_path / "run", says="file")
    refused("sample", "--ckpt", small_teacher, "--out", tmp_path / "photo.jpg", says=("--out", ".png"))
    assert (tmp_path / "file").read_text() == "kept" and not (tmp_path / "photo.jpg").exists()


def test_bad_data_under_torchrun_is_one_line(tmp_path):
    done = shell("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_teacher.py", "--data", "nothere", "--out", tmp_path / "run",
                 "--device", "cpu")
    assert done.returncode != 0 and done.stderr.count("--data nothere: no such data set") == 1 and "RuntimeError" not in done.stderr


def test_a_signal_that_only_one_process_has_seen_yet_is_not_lost(monkeypatch):
    from train_teacher import StopSignal
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    stop = StopSignal()
    monkeypatch.setattr("train_teacher.dist.is_initialized", lambda: True)

    def reduce(flag, _):  # the signal comes while this process waits for the others
        stop.catch(signal.SIGTERM, None)
    monkeypatch.setattr("train_teacher.dist.all_reduce", reduce)
    assert not stop()
    assert stop()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_stop_in_velocity_units_is_refused_on_ve(script, refused, images, tmp_path):
    script("train_teacher", "--data", images, *SMALL, "--iters", 1, "--interpolant", "ve", "--out", tmp_path)
    refused("distill", "--teacher_ckpt", tmp_path / "teacher.pt", "--grad", "stop", "--units", "velocity", says=("--units velocity", "--units data"))
    refused("distill", "--teacher_ckpt", tmp_path / "teacher.pt", "--objective", "cross", says="--units data")


def test_bad_data_reaches_the_user_in_one_line(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "floats.npz", images=np.zeros((3, 8, 8)))
    np.savez(tmp_path / "objects.npz", images=np.array([None]))
    np.savez(tmp_path / "none.npz", weights=np.zeros(3))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "broken.png").write_bytes(b"no")
    for name in ("empty", "floats.npz", "objects.npz", "none.npz", "set"):
        refused("train_teacher", "--data", tmp_path / name, "--out", tmp_path / "run", "--data_dir", tmp_path / "cache", says=("--data", name))
    assert not (tmp_path / "run").exists()


def test_bad_flags_of_sample(script, refused, small_teacher, tmp_path):
    sample = ("sample", "--ckpt", small_teacher, "--out", tmp_path / "s.npz", "--device", "cpu")
    for flag, value, words in (("--n", "0", "at least 1"), ("--steps", "0", "at least 1"), ("--steps", "2.5", "whole"), ("--steps", "x", "whole"),
                               ("--solver", "rk45", "euler, heun, sde"), ("--labels", "4", "0 to 3"), ("--labels", "-1", "0 to 3"),
                               ("--labels", "cat", "balanced"), ("--cfg_scale", "-1", "at least 0"), ("--batch", "0", "at least 1"),
                               ("--diffusion", "none", "sigma"), ("--out", "s.jpg/", ".png")):
        if flag == "--out":
            (tmp_path / "s.jpg").write_text("kept")
            value = tmp_path / "s.jpg"
        refused(*sample, f"{flag}={value}", says=(flag, str(value), words))
    refused("sample", says="--ckpt")
    refused("sample", "--ckpt", small_teacher, "--compare", small_teacher, small_teacher, says="--compare")
    refused("sample", "--compare", small_teacher, small_teacher, "--out", tmp_path / "c.png", says="student")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "holiday.jpg").write_text("kept")
    refused(*sample[:3], "--out", tmp_path / "full", says=("--out", "holiday.jpg"))
    assert not (tmp_path / "s.npz").exists() and (tmp_path / "full" / "holiday.jpg").read_text() == "kept"
    script("distill", "--teacher_ckpt", small_teacher, *SMALL[2:], "--iters", 1, "--out", tmp_path)
    student = ("sample", "--ckpt", tmp_path / "student.pt", "--out", tmp_path / "s.npz")
    refused(*student, "--steps", 50, says=("--steps 50", "student of 1 step"))
    refused(*student, "--cfg_scale", 4, says=("--cfg_scale 4", "distilled into it"))
    refused("distill", "--teacher_ckpt", tmp_path / "student.pt", says="is a student")


def test_help_names_every_flag_of_the_original_project(script):
    _, stdout, _ = script("distill", "--help")
    for flag in "--model --teacher_ckpt --batch --iters --lr --cfg_scale --k_psi --k_G --sample_every".split():
        assert flag in stdout
    for name in ("train_teacher", "sample"):
        assert "default" in script(name, "--help")[1]


# ---------------------------------------------------------------------------------------------------------------------
# Scale

@pytest.mark.parametrize("job", ["teacher", "distill"])
def test_sharded_moments_walk_the_same_path_and_load_anywhere(script, trainers, tmp_path, job):
    """Two processes with --shard for two iterations, then one plain process for two more: as one process throughout."""
    name, file, flags = trainers[job]
    flags = (*flags, "--sample_every", 100, "--save_every", 2)
    assert script(name, *flags, "--iters", 4, "--out", tmp_path / "plain")[0] == 0
    torchrun(2, f"{name}.py", *flags, "--iters", 2, "--shard", "--out", tmp_path / "shard")
    code, _, err = script(name, *flags, "--iters", 4, "--out", tmp_path / "shard")
    assert code == 0, err
    key = {"teacher": "loss", "distill": "critic_loss"}[job]
    one, two = ([line[key] for line in log(tmp_path / out, job)] for out in ("plain", "shard"))
    np.testing.assert_allclose(one, two, rtol=1e-4)


def test_recomputed_blocks_give_the_same_gradients():
    torch.manual_seed(0)
    net = SiT("XXS", 2, 4, 1, 3)
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    x, t, y, found = torch.randn(2, 1, 4, 4), torch.rand(2), torch.tensor([0, 2]), []
    for net.grad_checkpoint in (False, True):
        found.append(torch.autograd.grad(net(x, t, y).square().sum(), [p for p in net.parameters() if p.requires_grad]))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wait", [True, False])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(wait):
    """Also where the host does not look and the fused optimizer skips by itself."""
    net = torch.nn.Linear(2, 1)
    optimizer, skipped = make_optimizer(torch.optim.AdamW, net, 0.1, torch.device("cpu")), 0
    before = net.weight.clone()
    for scale, expected in ((1.0, 0), (float("nan"), 1), (float("inf"), 2), (1.0, 0)):
        kept = net.weight.clone()
        (scale * net(torch.ones(1, 2))).sum().backward()
        _, stepped = optimizer_step(optimizer, net, 0.1, 1.0, wait)
        skipped = count_skipped(skipped, stepped)
        assert int(skipped) == expected and bool(stepped) == (expected == 0)
        assert torch.equal(net.weight, kept) == (expected > 0) and bool(net.weight.isfinite().all())
    assert not torch.equal(net.weight, before)


@pytest.mark.parametrize("what", [["plan", "--model", "SiT-XL/2"], ["scale", "--models", "SiT-XXS/2"], ["iteration", "--model", "SiT-XXS/4"]])
def test_benchmarks_run_at_tiny_size(what):
    """They are commands of the README; one day a machine with GPUs will run them."""
    done = shell(str(ROOT / "tests" / "bench.py"), *what, "--side", "8", "--channels", "4", "--batch", "2", "--iterations", "1", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    if what[0] == "plan":
        assert "M parameters" in done.stdout and "distillation" in done.stdout
    if what[0] == "scale":
        assert "of the matrix rate" in done.stdout and "one-step samples" in done.stdout


def test_compiled_runs(images, tmp_path):
    """torch.compile in place: weights keep their names, so an uncompiled command goes on from the checkpoint."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    flags = ("--data", str(images), *map(str, SMALL), "--out", str(tmp_path))
    for extra in (("--iters", "2", "--compile"), ("--iters", "3")):
        done = shell(str(ROOT / "train_teacher.py"), *flags, *extra)
        assert done.returncode == 0, done.stderr
    assert not any("_orig_mod" in name for name in load_checkpoint(tmp_path / "teacher.pt")["model"])
