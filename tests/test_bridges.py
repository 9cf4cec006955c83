"""Bridges from any reference, students of several steps, real data: closed forms, then whole runs and mistakes."""
import io
import json
import math
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image

import sample as sampling
import train_teacher
from common.data import load_images, load_reference
from common.files import load_checkpoint
from common.images import DEGRADATIONS, degrade, psnr
from conftest import SMALL
from distill import OBJECTIVES, Head, discriminate, student_loss
from interpolants import (FAMILIES, Batch, Problem, Sampler, coefficients, family, interpolate, posterior,
                          prediction_scale, solve, start_at, student_input, time_grid)
from model import SiT
from sample import generate, problem_of
from test_interpolants import draw, gaussian
from test_model import shaken
from test_runs import Life, losses, same, unix, weights

BRIDGE = Problem(FAMILIES["bridge"], "data", True)


# ---------------------------------------------------------------------------------------------------------------------
# The path

@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_posterior_is_the_brownian_bridges(scale):
    """x_r | x_0, x_t: mean (1 - r/t) x0 + (r/t) x_t, variance s^2 r (t - r) / t; and marginals compose."""
    path, t, r = family("bridge", scale), 0.7, 0.2
    x0, x_t, z = draw(3, 1000, 1, 1, 1)
    x_r = posterior(path, x0, x_t, *(torch.full((1000,), u).double() for u in (t, r)), z)
    torch.testing.assert_close(x_r, (1 - r / t) * x0 + r / t * x_t + scale * (r * (t - r) / t) ** 0.5 * z)
    # From x_t | x0, x1 to x_r | x0, x1: the coefficient of x1 and the variance must be those of the path at r.
    k, j = (coefficients(path, torch.tensor(u).double()) for u in (t, r))
    torch.testing.assert_close((j.beta / k.beta * k.gamma) ** 2 + scale ** 2 * r * (t - r) / t, j.gamma ** 2)


def test_the_posterior_adds_no_noise_where_gamma_falls_faster_than_beta():
    """Exact steps of an own row, whose gamma is back at 0 in the end, keep the law of the data."""
    problem = Problem(FAMILIES["linear"]._replace(gamma=lambda t: (math.pi * t).sin() ** 2), "data")
    x, net = draw(4000, 1, 1, 1).float(), gaussian(problem, 0.3, 0.4)
    x0 = solve(problem, net, Batch(x_t=x), Sampler(100, "posterior"), lambda i: draw(4000, 1, 1, 1, seed=i + 1).float())
    assert float(x0.std()) == pytest.approx(0.4, abs=0.03)


def test_the_posterior_without_gamma_is_ddims_step():
    path, t, r = FAMILIES["vp"], *torch.tensor([[0.6] * 5, [0.3] * 5], dtype=torch.float64)
    x0, eps, z = draw(3, 5, 1, 1, 1)
    x_t, x_r = (interpolate(path, x0, eps, time)[0] for time in (t, r))
    torch.testing.assert_close(posterior(path, x0, x_t, t, r, z), x_r, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("prediction, solver, steps", [
    ("data", "posterior", 100), ("velocity", None, 100), ("data", "euler", 100), ("velocity", "heun", 50),
    ("data", "sde", 200)])
def test_sampling_a_bridge_from_x1_draws_the_conditional_law(prediction, solver, steps):
    """Data N(m + a x1, q^2) given x1, exact teacher: mean and spread come back from every solver; the usual one is the
    posterior."""
    a, q, n, problem = 0.5, 0.4, 4000, Problem(family("bridge", 0.8), prediction, True)
    x1, z = draw(2, n, 1, 1, 1).float()
    mean = 0.3 + a * x1

    def teacher(x_t, t, y, x1):
        return gaussian(problem, 0.3 + a * x1, q)(x_t, t, y, x1)
    k = problem.at(time_grid(problem, steps)[:1], 4)
    b = Batch(x1=x1, x_t=(k.alpha * mean + k.beta * x1 + k.gamma * z).float())
    x0, again = (solve(problem, teacher, b, Sampler(steps, how), lambda i: draw(n, 1, 1, 1, seed=2 + i).float())
                 for how in (solver, solver or "posterior"))
    residual = x0 - mean
    assert float(residual.mean().abs()) < 0.03 and float(residual.std()) == pytest.approx(q, rel=0.05)
    assert (x0 == again).all()
    assert float((residual * x1).mean().abs()) < 0.03


def test_time_grid_of_a_bridge_is_smooth_in_u():
    grid = time_grid(BRIDGE, 10)
    assert len(grid) == 11 and float(grid[0]) == pytest.approx(0.999) and float(grid[-1]) == 0
    torch.testing.assert_close(grid.sqrt().asin().diff(), grid.sqrt().asin().diff()[:1].expand(10))


def test_fact_6_velocity_and_data_units_of_a_bridge():
    """gap_v = gap_data / (4 t^2) per sample, in value and in full gradient: gamma' has dropped out."""
    problem, (x1, z) = BRIDGE._replace(path=family("bridge", 0.3)), draw(2, 5, 1, 4, 4, seed=1)
    t, found = torch.tensor([0.05, 0.3, 0.5, 0.7, 0.95], dtype=torch.float64), []
    teacher, critic = (lambda x, t, y, x1, w=w: (w * x * x1 + t.reshape(-1, 1, 1, 1)).sin() for w in (0.5, 0.8))
    for units in ("velocity", "data"):
        x0 = draw(5, 1, 4, 4).requires_grad_()
        loss, _ = student_loss(problem, OBJECTIVES["gap"]._replace(units=units), teacher, critic, Batch(x0, x1, z, t))
        found.append((loss, torch.autograd.grad(loss.sum(), x0)[0]))
    c2 = prediction_scale(problem, "velocity", t) ** 2
    torch.testing.assert_close(c2.flatten(), 1 / (4 * t ** 2))
    torch.testing.assert_close(found[0][0], c2.flatten() * found[1][0])
    torch.testing.assert_close(found[0][1], c2 * found[1][1])


# ---------------------------------------------------------------------------------------------------------------------
# The discriminator, several steps

def test_the_head_reads_the_middle_of_the_critic_and_gives_x0_a_gradient():
    critic, seen, head = shaken(image_size=4, channels=1, reference_channels=1), [], Head(64)
    critic.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    x0, x1, z, other = draw(4, 3, 1, 4, 4).float()
    fake = Batch(x0.requires_grad_(), x1, z, torch.tensor([0.2, 0.3, 0.4]))
    logits = discriminate(BRIDGE, critic, head, fake, fake._replace(x0=other))
    assert logits.shape == (6,) and not seen  # one block of three has run
    b, _ = BRIDGE.noised(fake)
    torch.testing.assert_close(logits[:3], head(critic(b.x_t, b.t, None, x1, middle=True)))
    gradient = torch.autograd.grad(logits.sum(), x0)[0]
    assert float(gradient.abs().amin((1, 2, 3)).min()) > 0


def test_steps_of_a_student():
    weight, seen = torch.tensor(0.5, requires_grad=True), []

    def net(x_t, t, y):
        seen.append(round(float(t[0]), 3))
        return weight * torch.ones_like(x_t)  # a data prediction of 0.5 everywhere
    linear, noise = Problem(FAMILIES["linear"], "data"), [draw(2, 3, 1, 2, 2, seed=i).float() for i in range(3)]
    b = student_input(linear, net, [0.7, 0.4, 0.1], Batch(x1=noise[0][0], z=noise[0][1]), lambda i: noise[i])
    torch.testing.assert_close(b.x_t, 0.9 * 0.5 + 0.1 * noise[2][0])  # re-noised with noise of its own
    assert seen == [0.7, 0.4] and (b.t == 0.1).all() and not b.x_t.requires_grad
    assert linear.data(net, b).requires_grad  # the gradient goes through the last step alone
    torch.testing.assert_close(start_at(linear, b, 0.7).x_t, 0.7 * noise[0][0])

    # sample.py may take fewer of them, the first always among them, and draws anew for each.
    config = {"network": {"image_size": 4, "num_classes": 3}, "interpolant": "linear", "prediction": "data",
              "student": {"times": [0.8, 0.6, 0.4, 0.2]}}
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "student_input", lambda problem, net, times, b, draw: (
            drawn.extend([(b.x1, b.z), draw(1), draw(2)]), student_input(problem, net, times, b, draw))[1])
        generate(SiT("XXS", 2, 4, 1, 3), config, [0], 0, [0], Sampler(2))
    assert len({x.flatten()[0].item() for pair in drawn for x in pair}) == 6
    for steps, taken in ((None, [0.8, 0.6, 0.4, 0.2]), (9, [0.8, 0.6, 0.4, 0.2]), (2, [0.8, 0.4]), (1, [0.8])):
        small, seen = SiT("XXS", 2, 4, 1, 3), []
        small.register_forward_hook(lambda _, given, __: seen.append(round(float(given[1][0]), 3)))
        generate(small, config, [0], 0, [0], Sampler(steps))
        assert seen == taken

    b = Batch(x1=torch.full((3, 1, 2, 2), 2.0), z=noise[0][1])
    b = student_input(BRIDGE, lambda x, t, y, x1: 0 * x1, [0.8, 0.4], b, lambda i: noise[i])
    start, fresh = 0.8 * b.x1 + 0.4 * noise[0][1], (0.4 * 0.4 / 0.8) ** 0.5 * noise[1][1]
    torch.testing.assert_close(b.x_t, 0.5 * start + fresh)
    b = student_input(BRIDGE, lambda x, t, y, x1: 0 * x1 + 3, [0.8, 0.4], b, lambda i: noise[i])
    torch.testing.assert_close(b.x_t, 0.6 * 3 + 0.5 * start + fresh)  # alpha x0, as on the path
    last = student_input(BRIDGE, lambda x, t, y, x1: 0 * x1 + 3, [0.8, 0.4, 0.2], Batch(x1=2 + 0 * b.x1, z=noise[0][1]),
                         lambda i: noise[i])
    fresh = (0.2 * 0.2 / 0.4) ** 0.5 * noise[2][1]
    torch.testing.assert_close(last.x_t, 0.5 * b.x_t + 0.5 * 3 + fresh)


# ---------------------------------------------------------------------------------------------------------------------
# References

def test_degradations():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    made = {name: degrade(name, images, 0) for name in DEGRADATIONS}
    for name, one in made.items():
        assert one.shape == images.shape and one.dtype == np.uint8 and (one != images).any()
        assert (one == degrade(name, images, 0)).all()
    low, hole = made["lowres4"], made["inpaint"]
    assert (low[0, 4:, :4] == images[0, 4:, :4].mean((0, 1)).round()).all() and (low == degrade("lowres4", low)).all()
    assert (hole[:, 2:6, 2:6] != images[:, 2:6, 2:6]).mean() > 0.9
    hole[:, 2:6, 2:6] = images[:, 2:6, 2:6]
    assert (hole == images).all()
    buffer = io.BytesIO()
    Image.fromarray(images[0]).save(buffer, "JPEG", quality=10)
    assert (made["jpeg10"][0] == np.asarray(Image.open(buffer))).all()
    gray = np.full((20, 32, 32, 1), 128, np.uint8)
    assert (degrade("noise0.5", gray, 0) / 127.5).std() == pytest.approx(0.5, rel=0.1)
    off = np.stack([gray[0] + 1, gray[0] + 100])
    assert psnr(gray[:2], off) == psnr(off, gray[:2]) == pytest.approx((48.13 + 8.13) / 2, abs=0.01)
    assert psnr(gray, gray) > 70 and psnr(gray, gray + 1) == pytest.approx(48.13, abs=0.01)


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):
    """References of every kind for `images`, and some that do not fit."""
    folder, pixels = tmp_path_factory.mktemp("bridges"), np.load(images)["x_train"]
    for name, arrays in {
            "data": {"x_train": pixels, "y_train": np.arange(40) % 4}, "pairs": {"x1": 255 - pixels, "x_train": pixels},
            "other": {"images": pixels[:30, ::-1]}, "x1": {"images": 255 - pixels},
            "named": {"arr_0": pixels[:4], "arr_1": [0, 1, 0, 1], "classes": ["3", "1"]},
            "many": {"images": np.concatenate([pixels, pixels])},
            "small": {"x1": pixels[:, :4, :4]}, "few": {"x1": pixels[:5]}, "float": {"x1": pixels * 1.0},
            "rgb": {"x_train": pixels[..., None].repeat(3, -1)}, "odd": {"x_train": pixels[:, :6, :6]}}.items():
        np.savez(folder / f"{name}.npz", **arrays)
    (folder / "in").mkdir()
    for i in range(12):
        Image.fromarray(pixels[i]).save(folder / "in" / f"{i}.png")
    return folder


def test_references_are_read_and_drawn(folder, images, monkeypatch):
    monkeypatch.chdir(folder)
    data, chosen = load_images(str(images)).images, np.array([3, 1, 4, 1])
    rows = {}
    for name in ("pairs.npz", "other.npz", *DEGRADATIONS):
        reference = load_reference(name, data, "cache")
        assert reference.kind == {"pairs.npz": "paired", "other.npz": "unpaired"}.get(name, name)
        rows[name], again = (reference.rows(data, chosen, (0, step, "x")) for step in (0, 1))
        assert rows[name].shape == (4, 8, 8, 1)
        if name in ("other.npz", "inpaint", "noise0.5"):  # drawn anew at each step, and for each row
            assert (rows[name] != again).any() and (rows[name][1] != rows[name][3]).any()
    np.testing.assert_array_equal(rows["pairs.npz"], 255 - data[chosen])
    np.testing.assert_array_equal(rows["lowres4"], degrade("lowres4", data[chosen]))
    others = data[:30, ::-1]
    assert all((row == others).all((1, 2, 3)).any() for row in rows["other.npz"])


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs

FEW = (*SMALL[2:], "--iters", 2)


@pytest.fixture
def trained(run, folder, images, monkeypatch):
    """trained("lowres4") -> the checkpoint of a bridge, which is trained once, inside the folder of references."""
    monkeypatch.chdir(folder)

    def call(reference, *flags):
        out = folder / "runs" / "_".join(map(str, (reference, *flags)))
        if not out.exists():
            run("train_teacher", "--data", images, *SMALL[:2], *FEW, "--interpolant", "bridge", "--reference",
                reference, "--out", out, *flags)
        return out / "teacher.pt"
    return call


@pytest.mark.parametrize("reference, scale, flags", [
    ("inpaint", 0.03, ("--unconditional",)), ("pairs.npz", 1, ()), ("other.npz", 2, ())])
def test_every_reference_trains_distills_and_restores(run, trained, tmp_path, monkeypatch, reference, scale, flags):
    problems, loss = [], train_teacher.regression_loss
    monkeypatch.setattr(train_teacher, "regression_loss", lambda problem, *given: (
        problems.append(problem), loss(problem, *given))[1])
    teacher, student = trained(reference, "--gamma_scale", scale, *flags), tmp_path / "student.pt"
    config = load_checkpoint(teacher)["config"]
    assert config["gamma_scale"] == scale and config["network"]["reference_channels"] == (reference != "other.npz")
    for problem in (problems[0], problem_of(config)):
        assert float(problem.path.gamma(torch.tensor(0.5))) == pytest.approx(0.5 * scale)
    run("distill", "--teacher_ckpt", teacher, "--student_steps", 2, "--out", tmp_path, *FEW)
    assert (teacher.parent / "samples_0000002.png").exists() and (tmp_path / "distill_0000002.png").exists()
    chosen = json.loads((tmp_path / "distill.json").read_text())
    assert 0.85 < chosen["t_init"] < 0.87 and chosen["t_min"] == pytest.approx(0.001, abs=1e-4)  # whatever the scale

    def sample(source, *flags, out="s.npz"):
        return run("sample", "--device", "cpu", "--reference", source, "--out", tmp_path / out, *flags)

    def sampled(*flags):
        sample(*flags)
        return np.load(tmp_path / "s.npz")
    for ckpt, steps in ((teacher, 2), (student, 1)):
        found = sampled("data.npz", "--ckpt", ckpt, "--steps", steps)
        assert found["arr_0"].shape == (40, 8, 8, 1)
        assert "arr_1" not in found if flags else list(found["arr_1"][:5]) == [0, 1, 2, 3, 0]
    if not flags:  # a file's labels by their names; --labels goes before the file's own
        assert list(sampled("named.npz", "--ckpt", student)["arr_1"]) == [3, 1, 3, 1]
        assert set(sampled("data.npz", "--ckpt", student, "--labels", 2)["arr_1"]) == {2}
        assert list(sampled("x1.npz", "--ckpt", student, "--labels", "balanced")["arr_1"][:5]) == [0, 1, 2, 3, 0]
    assert "arr_1" not in sampled("x1.npz", "--ckpt", student)  # the null class is nobody's label
    x1, pairs = (sampled(source, "--ckpt", student)["arr_0"] for source in ("x1.npz", "pairs.npz"))
    assert (x1 == pairs).all()  # of a pair, x1 is what is restored
    said = sample("data.npz", "--compare", teacher, student, "--truth", "data.npz", "--steps", 2, out="c.png")
    assert said.count("PSNR") == 2
    if reference in DEGRADATIONS:
        assert "PSNR" in sample("data.npz", "--ckpt", student, "--degrade", "--n", 12, out="o.png")
        assert Image.open(tmp_path / "o.png").size[0] > 12 * 8


def test_antithetic_pairs_come_from_the_stream_and_reach_the_loss(run, folder, tmp_path, monkeypatch):
    asked, taken, draw_batch = [], [], train_teacher.draw_batch
    monkeypatch.setattr(train_teacher, "draw_batch", lambda *given: asked.append(given[2]) or taken.append(
        draw_batch(*given)) or taken[-1])
    run("train_teacher", "--data", folder / "pairs.npz", *SMALL, "--interpolant", "bridge", "--reference",
        folder / "pairs.npz", "--antithetic", "--iters", 2, "--out", tmp_path)
    assert len(asked) == 2
    for images, b in zip(asked, taken):
        assert torch.equal(images.x0[::2], images.x0[1::2])
        assert torch.equal(b.z[::2], -b.z[1::2]) and torch.equal(b.t[::2], b.t[1::2])


def test_what_a_bridge_starts_from_stays_the_same(run, refused, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.load(folder / "pairs.npz")
    np.savez("pairs.npz", **pixels)
    train = ("train_teacher", "--data", "pairs.npz", *SMALL, "--interpolant", "bridge", "--reference", "pairs.npz")
    distill = ("distill", *SMALL[2:])
    run(*train, "--iters", 2), run(*distill, "--iters", 1)
    np.savez("pairs.npz", x_train=pixels["x_train"], x1=pixels["x1"] // 2)  # made anew, under the same name
    for command in (train, distill):
        refused(*command, "--iters", 3, says="--reference pairs.npz: is not what the run in out was made with")
    np.savez("pairs.npz", **pixels)
    run(*train, "--iters", 3)


def test_files_and_folders_are_restored_and_written_again(run, trained, tmp_path):
    sample = ("sample", "--ckpt", trained("lowres4"), "--steps", 1, "--device", "cpu", "--out")
    for source, n in (("in", 12), ("in/1.png", 1)):
        run(*sample, tmp_path / "s.npz", "--reference", source, "--truth", source)
        assert np.load(tmp_path / "s.npz")["arr_0"].shape == (n, 8, 8, 1)
    for _ in range(2):  # the same command again overwrites its own images, however many the reference has
        run(*sample, tmp_path / "out", "--reference", "many.npz")


@unix
@pytest.mark.slow
def test_four_iterations_equal_two_and_two_and_one_process_two(run, trained, tmp_path):
    """Bit for bit on resuming; to rounding over processes."""
    flags = ("--teacher_ckpt", trained("inpaint"), *SMALL[2:], "--k_psi", 1, "--student_steps", 2, "--real_alpha", 0.9,
             "--real_beta", 0.88, "--gan_weight", 0.1, "--gan_from", 1, "--gan_lr", 1e-3)
    for out, iters in (("whole", 4), ("parts", 2), ("parts", 4)):
        run("distill", *flags, "--iters", iters, "--out", tmp_path / out)
    for name in ("student.pt", "resume.pt"):
        assert same(weights(tmp_path / "whole" / name), weights(tmp_path / "parts" / name))
    lines = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert "fooled" not in lines[0] and lines[1]["fooled"] > 0
    Life(tmp_path, "distill", *flags, "--iters", 4, "--out", tmp_path / "two", world=2).end()
    one, two = (losses(tmp_path / out, "distill") for out in ("whole", "two"))
    np.testing.assert_allclose(one, two, atol=1e-4, rtol=1e-3)


@unix
@pytest.mark.slow
def test_two_processes_train_the_same_bridge_from_a_folder(run, folder, tmp_path):
    """Decoded by the first process, found by the second."""
    flags = ("--data", folder / "rgb.npz", *SMALL[:2], *FEW, "--interpolant", "bridge", "--reference", folder / "in")
    run("train_teacher", *flags, "--data_dir", tmp_path / "a", "--out", tmp_path / "one")
    Life(tmp_path, "train_teacher", *flags, "--data_dir", tmp_path / "b", "--out", tmp_path / "two", world=2).end()
    np.testing.assert_allclose(*(losses(tmp_path / out, "train_teacher") for out in ("one", "two")), rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused: flags, words of the message

@pytest.mark.parametrize("flags, says", [
    ("train_teacher {train} --reference lowres4 --interpolant linear", ("--reference lowres4", "bridge")),
    *((f"train_teacher {{train}} --reference {name}", ("--reference " + name, *says)) for name, *says in (
        ("small.npz", "(4, 4, 1)", "(8, 8, 1)"), ("few.npz", "5 paired", "40"), ("float.npz", "uint8"),
        ("lowres8", "lowres4"), ("missing.npz",))),
    ("train_teacher {train} --reference lowres4 --data odd.npz --model SiT-XXS/2", "multiple of 4"),
    ("train_teacher {train} --reference other.npz --prediction velocity", ("--prediction velocity", "unpaired")),
    ("sample --ckpt {paired}", ("--reference", "bridge")),
    ("sample --ckpt {paired} --reference small.npz", ("--reference small.npz", "(8, 8, 1)")),
    ("sample --ckpt {paired} --reference nowhere", ("--reference nowhere", "no such file")),
    ("sample --ckpt {paired} --reference few.npz --n 10", ("--n 10", "5 images")),
    ("sample --ckpt {paired} --reference data.npz --truth other.npz", ("--truth other.npz", "30 images for 40")),
    ("sample --ckpt {paired} --reference data.npz --truth data.npz --degrade", "--truth data.npz"),
    ("sample --ckpt {unpaired} --reference data.npz --degrade", "--degrade"),
    ("sample --ckpt {unpaired} --reference data.npz --solver heun", "--solver heun"),
    ("distill --teacher_ckpt {unpaired} --objective gap", ("--units velocity", "unpaired")),
    ("fid {paired} data.npz", ("bridge", "sample.py --reference"))])
def test_bad_restorations(refused, trained, images, flags, says):
    name, *flags = flags.format(paired=trained("lowres4"), unpaired=trained("other.npz"), train=" ".join(map(str, (
        "--data", images, *SMALL, "--interpolant bridge --out no")))).split()
    refused(name, *flags, "--device", "cpu", says=says)
    assert not pathlib.Path("no").exists()
