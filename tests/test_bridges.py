"""Bridges from any reference, real data, several steps, guidance: closed forms first, then whole runs and what is refused."""
import json
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import SMALL
from distill import Head, check_objective, generator_loss, middle_tokens, real_critic_loss
from interpolants import FAMILIES, coefficients, convert, family, interpolate, posterior, prediction_scale, solve, time_grid, unit_ratio
from model import SiT, guided, load_checkpoint
from sample import DEGRADATIONS, degrade, fewer, one_step, psnr, step_input
from test_runs import log, same, torchrun, weights
from train_teacher import load_images, load_reference, regression_loss

BRIDGE = FAMILIES["bridge"]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw32(*shape, seed=0):
    return draw(*shape, seed=seed, dtype=torch.float32)


def times(t, n):
    return torch.full((n,), t, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# The path

@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_posterior_is_the_brownian_bridges(scale):
    """x_r | x_0, x_t of a Brownian bridge: mean (1 - r/t) x0 + (r/t) x_t, variance s^2 r (t - r) / t; and marginals compose."""
    path, t, r = family("bridge", scale), 0.7, 0.2
    x0, x_t, z = draw(3, 1000, 1, 1, 1)
    x_r = posterior(path, x0, x_t, times(t, 1000), times(r, 1000), z)
    torch.testing.assert_close(x_r, (1 - r / t) * x0 + r / t * x_t + scale * (r * (t - r) / t) ** 0.5 * z)
    # From x_t | x0, x1 to x_r | x0, x1: the coefficient of x1 and the variance must be those of the path at r.
    k, j = coefficients(path, times(t, 1)), coefficients(path, times(r, 1))
    b = j.beta / k.beta
    torch.testing.assert_close(b * k.beta, j.beta)
    torch.testing.assert_close(b ** 2 * k.gamma ** 2 + times(scale ** 2 * r * (t - r) / t, 1), j.gamma ** 2)


def test_the_posterior_without_gamma_is_ddims_step():
    path, t, r = FAMILIES["vp"], times(0.6, 5), times(0.3, 5)
    x0, eps, z = draw(3, 5, 1, 1, 1)
    x_t, x_r = (interpolate(path, x0, eps, time)[0] for time in (t, r))
    torch.testing.assert_close(posterior(path, x0, x_t, t, r, z), x_r, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solver, steps", [("posterior", 200), ("euler", 200), ("heun", 50), ("sde", 400)])
@pytest.mark.parametrize("prediction", ["data", "velocity"])
def test_sampling_a_bridge_from_x1_draws_the_conditional_law(solver, steps, prediction):
    """Data N(m + a x1, q^2) given x1, exact teacher: mean and spread come back from every solver."""
    m, a, q, n, s = 0.3, 0.5, 0.4, 4000, 0.8
    path, x1 = family("bridge", s), draw(n, 1, 1, 1).float()

    def teacher(x_t, t):
        k = coefficients(path, t, 4, True)
        prior, r = m + a * x1, x_t - k.beta * x1
        gain = k.alpha * q ** 2 / (k.alpha ** 2 * q ** 2 + k.s ** 2)
        return convert(path, prior + gain * (r - k.alpha * prior), "data", prediction, x_t, t, x1)
    start = times(float(time_grid(path, steps, prediction, sees_x1=True)[0]), n)
    k = coefficients(path, start, 4)
    x = (k.alpha * (m + a * x1) + k.beta * x1 + k.gamma * draw(n, 1, 1, 1, seed=1)).float()
    x0 = solve(path, teacher, x, steps, solver, prediction, noise=lambda i: draw(n, 1, 1, 1, seed=2 + i).float(), x1=x1)
    residual = x0 - (m + a * x1)
    assert float(residual.mean().abs()) < 0.03 and float(residual.std()) == pytest.approx(q, rel=0.05)
    assert float((residual * x1).mean().abs()) < 0.03


def test_time_grid_of_a_bridge_is_smooth_in_u():
    grid = time_grid(BRIDGE, 10, "data", sees_x1=True)
    assert len(grid) == 11 and float(grid[0]) == pytest.approx(0.999) and float(grid[-1]) == 0
    angle = grid.sqrt().asin()
    torch.testing.assert_close(angle.diff(), angle.diff()[:1].expand(10))


def test_differences_of_predictions_scale_as_stated():
    t, x_t = times(0.4, 2), draw(2, 1, 3, 3, seed=1)
    one, two = draw(2, 2, 1, 3, 3, seed=2)
    for path, x1 in ((FAMILIES["vp"], None), (BRIDGE, draw(2, 1, 3, 3, seed=3))):
        for prediction in ("data", "velocity", "noise", "score"):
            a, b = (convert(path, v, "data", prediction, x_t, t, x1) for v in (one, two))
            torch.testing.assert_close(a - b, prediction_scale(path, prediction, t, 4, x1 is not None) * (one - two))


def test_fact_6_velocity_and_data_units_of_a_bridge():
    """gap_v = gap_data / (4 t^2) per sample, in value and in full gradient: gamma' has dropped out."""
    torch.manual_seed(0)
    net = SiT("XXS", 2, 4, 1, 0, reference_channels=1)
    other = SiT("XXS", 2, 4, 1, 0, reference_channels=1)
    for i, n in enumerate((net, other)):
        for j, p in enumerate(n.parameters()):
            p.data += 0.1 * draw32(*p.shape, seed=100 * i + j)
    x1, z = draw32(2, 5, 1, 4, 4, seed=3)
    t, found = torch.tensor([0.05, 0.3, 0.5, 0.7, 0.95]), {}
    for units in ("velocity", "data"):
        x0 = draw32(5, 1, 4, 4).requires_grad_()
        loss, _ = generator_loss(BRIDGE, "data", net, other, x0, x1, z, t, None, 1.0, "full", "uniform", units, sees_x1=True)
        found[units] = loss, torch.autograd.grad(loss.sum(), x0)[0]
    c2 = 1 / (4 * t ** 2)
    torch.testing.assert_close(unit_ratio(BRIDGE, t, sees_x1=True) ** 2, c2, rtol=1e-5, atol=0)
    torch.testing.assert_close(found["velocity"][0], c2 * found["data"][0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found["velocity"][1], c2.reshape(-1, 1, 1, 1) * found["data"][1], rtol=1e-3, atol=1e-4)


def test_antithetic_pairs_cut_the_variance_of_a_velocity_network():
    """Near the ends gamma' z rules the velocity target; over a pair its share of the gradient at the start of training cancels."""
    net = SiT("XXS", 2, 4, 1, 0, reference_channels=1)
    x0, x1 = torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    variance = {}
    for pair in (False, True):
        gradients = []
        for seed in range(100):
            z = draw(2, 1, 4, 4, seed=seed, dtype=torch.float32)
            if pair:
                z[1] = -z[0]
            loss = regression_loss(net, BRIDGE, "velocity", x0, x1, z, torch.full((2,), 0.98), None, True).mean()
            gradients.append(torch.autograd.grad(loss, net.final_layer.linear.bias)[0])
        variance[pair] = float(torch.stack(gradients).var(0).sum())
    assert variance[True] < 0.2 * variance[False]


# ---------------------------------------------------------------------------------------------------------------------
# Real data

def setup(seed=0):
    torch.manual_seed(seed)
    net = SiT("XXS", 2, 4, 1, 3, reference_channels=1)
    for j, p in enumerate(net.parameters()):
        if p.requires_grad:
            p.data += 0.1 * draw32(*p.shape, seed=1000 * seed + j)
    return net


@pytest.mark.parametrize("row, prediction, units", [("linear", "velocity", "velocity"), ("linear", "velocity", "data"),
                                                    ("vp", "noise", "data"), ("bridge", "data", "data"), ("bridge", "data", "velocity")])
def test_realuid_with_one_and_one_is_the_gap(row, prediction, units):
    """Identical gradients: of the critic to the plain regression's, of the student to the gap's."""
    path, sees_x1 = FAMILIES[row], row == "bridge"
    teacher, critic = setup(1), setup(2)
    if not sees_x1:
        teacher.reference_channels = critic.reference_channels = 0
        for net in (teacher, critic):
            net.x_embedder.proj.weight.data = net.x_embedder.proj.weight.data[:, :1]
    t, y = torch.tensor([0.2, 0.5, 0.8]), torch.tensor([0, 1, 2])
    fake, real = ((draw32(3, 1, 4, 4, seed=s), draw32(3, 1, 4, 4, seed=s + 1), draw32(3, 1, 4, 4, seed=s + 2), t, y) for s in (10, 20))
    parameters = [p for p in critic.parameters() if p.requires_grad]
    plain = torch.autograd.grad(regression_loss(critic, path, prediction, *fake, sees_x1).mean(), parameters)
    written = torch.autograd.grad(real_critic_loss(path, prediction, teacher, critic, fake, real, units, 1.0, 1.0, sees_x1).mean(), parameters)
    for one, two in zip(plain, written):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    knobs = dict(kappa=1.0, grad="full", weight="uniform", units=units, sees_x1=sees_x1)
    losses = [generator_loss(path, prediction, teacher, critic, *fake, **knobs, **ab)[0] for ab in ({}, dict(a=1.0, b=1.0))]
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_realuid_is_the_formula_of_its_paper():
    """Critic and student against -a|d|^2 + 2a<d,v*> - 2b<d,I'> written out, on the linear path in velocity units."""
    path, a, b = FAMILIES["linear"], 0.9, 0.882
    star, psi = (lambda x, t, y, w=w: w * x + t.reshape(-1, 1, 1, 1) for w in (0.3, 0.8))
    t = torch.tensor([0.2, 0.5, 0.8])
    fake, real = ((draw32(3, 1, 4, 4, seed=s), draw32(3, 1, 4, 4, seed=s + 1), None, t, None) for s in (1, 2))
    total, student_term = 0, None
    for (x0, x1, _, t, y), p, q in ((fake, a, b), (real, 1 - a, 1 - b)):
        x_t, velocity = interpolate(path, x0, x1, t)
        d = star(x_t, t, y) - psi(x_t, t, y)
        term = (-p * d ** 2 + 2 * p * d * star(x_t, t, y) - 2 * q * d * velocity).mean((1, 2, 3))
        student_term = term if student_term is None else student_term
        total = total + term
    torch.testing.assert_close(real_critic_loss(path, "velocity", star, psi, fake, real, "velocity", a, b), -total, rtol=1e-5, atol=1e-6)
    loss, _ = generator_loss(path, "velocity", star, psi, *fake, 1.0, "full", "uniform", "velocity", a=a, b=b)
    torch.testing.assert_close(loss, student_term, rtol=1e-5, atol=1e-6)


def test_the_head_reads_the_middle_of_the_critic_and_gives_x0_a_gradient():
    critic = setup(1)
    critic.eval()
    seen = []
    critic.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    x0 = draw32(3, 1, 4, 4).requires_grad_()
    tokens = middle_tokens(critic, BRIDGE, x0, draw32(3, 1, 4, 4, seed=1), draw32(3, 1, 4, 4, seed=2), times(0.3, 3).float(), None, True)
    assert tokens.shape == (3, 4, 64) and not seen  # one block of three has run
    out = Head(64)(tokens)
    assert out.shape == (3,) and float(torch.autograd.grad(out.sum(), x0)[0].abs().sum()) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Several steps, guidance

def test_steps_of_a_student():
    assert fewer([4, 3, 2, 1], 4) == [4, 3, 2, 1] and fewer([4, 3, 2, 1], 2) == [4, 2] and fewer([4, 3, 2, 1], 1) == [4]
    path, weight = FAMILIES["linear"], torch.tensor(0.5, requires_grad=True)
    seen = []

    def net(x_t, t, y):
        seen.append(round(float(t[0]), 3))
        return weight * torch.ones_like(x_t)  # a data prediction of 0.5 everywhere
    noise = [draw(2, 3, 1, 2, 2, seed=i).float() for i in range(3)]
    x_t = step_input(path, net, "data", [0.7, 0.4, 0.1], 2, lambda i: noise[i], None)
    torch.testing.assert_close(x_t, 0.9 * 0.5 + 0.1 * noise[2][0])  # re-noised to the third time with noise of its own
    assert seen == [0.7, 0.4] and not x_t.requires_grad
    x0 = one_step(path, net, "data", 0.1, x_t, None)
    assert x0.requires_grad  # the gradient goes through the last step alone
    x1 = torch.full((3, 1, 2, 2), 2.0)
    bridge = step_input(BRIDGE, lambda x, t, y, x1: torch.zeros_like(x), "data", [0.8, 0.4], 1, lambda i: noise[i], None, x1)
    start = 0.8 * x1 + 0.4 * noise[0][1]
    torch.testing.assert_close(bridge, 0.5 * start + (0.4 * 0.4 / 0.8) ** 0.5 * noise[1][1])


def test_guidance_by_interval():
    net = setup(3)
    x, x1 = draw(2, 4, 1, 4, 4).float()
    t, y = torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0, 1, 2, 0])
    plain, strong = net(x, t, y, x1), guided(net, x, t, y, 3.0, x1)
    part = guided(net, x, t, y, 3.0, x1, (0.3, 0.7))
    torch.testing.assert_close(part[1:3], strong[1:3])
    torch.testing.assert_close(part[[0, 3]], plain[[0, 3]], rtol=1e-4, atol=1e-5)
    assert (part[1] - plain[1]).abs().max() > 1e-3
    torch.testing.assert_close(guided(net, x, t, y, 0.0, x1, (0.3, 0.7))[1:3], net(x, t, None, x1)[1:3], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# References

def test_degradations():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    for name in DEGRADATIONS:
        one = degrade(name, images, 0)
        assert one.shape == images.shape and one.dtype == np.uint8 and (one != images).any()
        np.testing.assert_array_equal(one, degrade(name, images, 0))
        np.testing.assert_array_equal(one[2:], degrade(name, images[2:], [(0, 2), (0, 3)]))  # row by row
    low = degrade("lowres4", images)
    np.testing.assert_array_equal(low[0, 4:, :4], np.broadcast_to(images[0, 4:, :4].mean((0, 1)).round(), (4, 4, 3)))
    np.testing.assert_array_equal(degrade("lowres4", low), low)
    hole = degrade("inpaint", images, 0)
    assert (hole[:, 2:6, 2:6] != images[:, 2:6, 2:6]).mean() > 0.9
    hole[:, 2:6, 2:6] = images[:, 2:6, 2:6]
    np.testing.assert_array_equal(hole, images)
    gray = np.full((20, 32, 32, 1), 128, np.uint8)
    assert (degrade("noise0.5", gray, 0) / 127.5).std() == pytest.approx(0.5, rel=0.1)
    assert degrade("jpeg10", gray).shape == gray.shape
    assert psnr(gray, gray) > 70 and psnr(gray, gray + 1) == pytest.approx(48.13, abs=0.01)


@pytest.fixture
def references(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.load(images)["x_train"]
    np.savez("pairs.npz", x1=255 - pixels)
    np.savez("other.npz", images=pixels[:30, ::-1])
    return pixels


def test_references_are_read_and_drawn(references, images):
    data = load_images(str(images)).images
    chosen = np.array([3, 1, 4, 1])
    paired = load_reference("pairs.npz", data, "data")
    np.testing.assert_array_equal(paired.rows(data, chosen, 0, 0, "x")[..., 0], 255 - references[chosen])
    other = load_reference("other.npz", data, "data")
    assert (paired.kind, other.kind) == ("paired", "unpaired")
    assert all((row == other.images).all((1, 2, 3)).any() for row in other.rows(data, chosen, 0, 0, "x"))
    for reference in (paired, other, load_reference("inpaint", data, "data")):  # any share of the batch is the batch's
        whole = reference.rows(data, chosen, 5, 7, "x")
        np.testing.assert_array_equal(whole[2:], reference.rows(data, chosen, 5, 7, "x", slice(2, 4)))
        if reference.kind != "paired":
            assert (whole != reference.rows(data, chosen, 5, 8, "x")).any()


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs

BRIDGED = ("--interpolant", "bridge")


def trained(script, images, reference, out, *flags):
    code, _, err = script("train_teacher", "--data", images, *SMALL, *BRIDGED, "--reference", reference, "--iters", 2, "--out", out, *flags)
    assert code == 0, err
    return out / "teacher.pt"


@pytest.mark.parametrize("reference", [*DEGRADATIONS, "pairs.npz", "other.npz"])
def test_every_reference_trains_distills_and_restores(script, references, images, tmp_path, reference):
    teacher = trained(script, images, reference, tmp_path, "--gamma_scale", 0.7)
    config = load_checkpoint(teacher)["config"]
    assert config["gamma_scale"] == 0.7 and config["network"]["reference_channels"] == (0 if reference == "other.npz" else 1)
    code, _, err = script("distill", "--teacher_ckpt", teacher, *SMALL[2:], "--iters", 2, "--student_steps", 2, "--out", tmp_path)
    assert code == 0, err
    assert {"samples_0000002.png", "distill_0000002.png"} <= {f.name for f in tmp_path.iterdir()}
    np.savez("new.npz", images=references, labels=np.arange(40) % 4)
    for name, flags in (("teacher.pt", ("--steps", 3)), ("student.pt", ("--steps", 1)), ("student.pt", ())):
        code, _, err = script("sample", "--ckpt", name, "--reference", "new.npz", "--out", "out.npz", "--device", "cpu", *flags)
        assert code == 0, err
        found = np.load("out.npz")
        assert found["arr_0"].shape == (40, 8, 8, 1) and list(found["arr_1"][:5]) == [0, 1, 2, 3, 0]
    code, out, err = script("sample", "--compare", "teacher.pt", "student.pt", "--reference", "new.npz", "--truth", "new.npz", "--steps", 3,
                            "--out", "c.png", "--device", "cpu")
    assert code == 0 and out.count("PSNR") == 2, err
    if reference in DEGRADATIONS:
        code, out, err = script("sample", "--ckpt", "student.pt", "--reference", "new.npz", "--degrade", "--n", 12, "--out", "o.png", "--device", "cpu")
        assert code == 0 and "PSNR" in out and Image.open("o.png").size[0] > 12 * 8, err


def test_an_unconditional_bridge_with_labelled_data_and_another_gamma(script, references, images, tmp_path):
    teacher = trained(script, images, "lowres4", tmp_path, "--unconditional", "--gamma_scale", 0.03)
    code, out, err = script("distill", "--teacher_ckpt", teacher, *SMALL[2:], "--iters", 1, "--out", tmp_path)
    assert code == 0, err
    flags = json.loads((tmp_path / "distill.json").read_text())
    assert 0.85 < flags["t_init"] < 0.87 and flags["t_min"] == pytest.approx(0.001, abs=1e-4)  # whatever the scale
    np.savez("both.npz", x1=255 - references, x_train=references, y_train=np.arange(40) % 4)
    for name, key in (("both.npz", "x1"), ("new.npz", "x_train")):
        np.savez("new.npz", x_train=255 - references)
        assert script("sample", "--ckpt", teacher, "--reference", name, "--steps", 2, "--out", f"{key}.npz", "--device", "cpu")[0] == 0
    np.testing.assert_array_equal(np.load("x1.npz")["arr_0"], np.load("x_train.npz")["arr_0"])  # a pair's x1 is what is restored
    trained(script, images, "noise", tmp_path / "noise", "--gamma_scale", 2)
    assert load_checkpoint(tmp_path / "noise" / "teacher.pt")["config"]["gamma_scale"] == 2


def test_folders_are_written_twice(script, references, images, tmp_path):
    """The same command again overwrites its own images, however many the reference has."""
    teacher = trained(script, images, "lowres4", tmp_path)
    np.savez("many.npz", images=np.concatenate([references, references]))
    for _ in range(2):
        code, _, err = script("sample", "--ckpt", teacher, "--reference", "many.npz", "--steps", 1, "--out", "folder", "--device", "cpu")
        assert code == 0, err


def test_two_processes_read_a_folder_as_reference(references, images, tmp_path):
    """Decoded by the first process, found by the second."""
    pathlib.Path("ref").mkdir()
    for i in range(20):
        Image.fromarray(references[i]).convert("RGB").save(f"ref/{i}.png")
    np.savez("rgb.npz", x_train=np.repeat(references[..., None], 3, -1))
    done = torchrun(2, "train_teacher.py", "--data", tmp_path / "rgb.npz", *SMALL, *BRIDGED, "--reference", tmp_path / "ref", "--iters", 2,
                    "--data_dir", tmp_path / "d", "--out", tmp_path / "out")
    assert "wrote" in done.stdout


def test_files_and_folders_are_restored(script, references, images, tmp_path):
    teacher = trained(script, images, "lowres4", tmp_path)
    pathlib.Path("in").mkdir()
    for i in range(3):
        Image.fromarray(references[i]).save(f"in/{i}.png")
    for source in ("in", "in/1.png"):
        code, _, err = script("sample", "--ckpt", teacher, "--reference", source, "--truth", source, "--steps", 2, "--out", f"{source[:2]}.npz", "--device", "cpu")
        assert code == 0, err
    assert np.load("in.npz")["arr_0"].shape == (1, 8, 8, 1)


SETTINGS = {
    "bridge": ("--k_psi", 2),
    "realuid": ("--objective", "gap", "--real_alpha", 0.9, "--real_beta", 0.88),
    "gan": ("--gan_weight", 0.1, "--gan_from", 1, "--gan_lr", 1e-3),
    "steps": ("--student_steps", 3, "--k_G", 2),
    "guidance": ("--cfg_scale", 2, "--cfg_interval", 0.2, 0.8, "--critic_cfg_scale", 2),
}


@pytest.mark.parametrize("setting", sorted(SETTINGS))
def test_four_iterations_equal_two_and_two_and_one_process_two(script, images, small_teacher, references, tmp_path, setting):
    """Bit for bit on resuming; to rounding over processes."""
    teacher = trained(script, images, "inpaint", tmp_path) if setting == "bridge" else small_teacher
    flags = ("--teacher_ckpt", teacher, *SMALL[2:], "--sample_every", 100, *SETTINGS[setting])
    if setting in ("realuid", "gan"):
        flags += ("--data", images)
    for out, iters in (("whole", 4), ("parts", 2), ("parts", 4)):
        code, _, err = script("distill", *flags, "--iters", iters, "--out", tmp_path / out)
        assert code == 0, err
    for name in ("student.pt", "resume.pt"):
        assert same(weights(tmp_path / "whole" / name), weights(tmp_path / "parts" / name))
    torchrun(2, "distill.py", *flags, "--iters", 4, "--out", tmp_path / "two")
    one, two = ([[line[k] for k in ("critic_loss", "student_loss", "D2", "spread")] for line in log(tmp_path / out, "distill")]
                for out in ("whole", "two"))
    np.testing.assert_allclose(one, two, atol=1e-4, rtol=1e-3)
    if setting == "gan":
        lines = log(tmp_path / "whole", "distill")
        assert "fooled" not in lines[0] and lines[1]["fooled"] > 0


def test_realuid_with_one_and_one_runs_as_without_data(script, images, small_teacher, tmp_path):
    flags = ("--teacher_ckpt", small_teacher, *SMALL[2:], "--iters", 2, "--objective", "gap")
    assert script("distill", *flags, "--out", tmp_path / "a")[0] == 0
    assert script("distill", *flags, "--out", tmp_path / "b", "--data", images, "--real_alpha", 1, "--real_beta", 1, "--gan_weight", 1e-9,
                  "--gan_from", 5)[0] == 0
    assert same(load_checkpoint(tmp_path / "a" / "student.pt")["ema"], load_checkpoint(tmp_path / "b" / "student.pt")["ema"])


def test_two_processes_train_the_same_bridge(script, images, references, tmp_path):
    flags = ("--data", images, *SMALL, *BRIDGED, "--reference", "inpaint", "--antithetic", "--prediction", "velocity", "--iters", 4, "--sample_every", 100)
    assert script("train_teacher", *flags, "--out", tmp_path / "one")[0] == 0
    torchrun(2, "train_teacher.py", *flags, "--out", tmp_path / "two")
    one, two = ([line["loss"] for line in log(tmp_path / out, "teacher")] for out in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

def test_bad_references(refused, script, references, images, tmp_path):
    train = ("train_teacher", "--data", images, *SMALL, "--iters", 1, "--out", tmp_path)
    np.savez("small.npz", x1=references[:, :4, :4])
    np.savez("few.npz", x1=references[:5])
    np.savez("float.npz", x1=references / 255.0)
    for name, says in (("small.npz", ("(4, 4, 1)", "(8, 8, 1)")), ("few.npz", ("5 paired", "40")), ("float.npz", "uint8"), ("lowres8", "lowres4"),
                       ("missing.npz", "missing.npz")):
        refused(*train, *BRIDGED, "--reference", name, says=("--reference " + name, *([says] if isinstance(says, str) else says)))
    refused(*train, *BRIDGED, says=("--interpolant bridge", "--reference"))
    refused(*train, "--reference", "lowres4", says=("--reference lowres4", "--interpolant bridge"))
    refused(*train, "--gamma_scale", 2, says=("--gamma_scale 2", "bridge"))
    refused(*train, "--antithetic", says=("--antithetic", "bridge"))
    refused(*train, *BRIDGED, "--reference", "other.npz", "--prediction", "velocity", says=("--prediction velocity", "unpaired"))
    refused(*train, *BRIDGED, "--reference", "inpaint", "--antithetic", "--batch", 5, says=("--batch 5", "pairs"))
    np.savez("odd.npz", x_train=references[:, :6, :6])
    refused("train_teacher", "--data", "odd.npz", "--model", "SiT-XXS/2", "--batch", 4, "--iters", 1, *BRIDGED, "--reference", "lowres4", says="multiple of 4")
    assert not (tmp_path / "teacher.pt").exists()


def test_bad_flags_around_real_data_and_steps(refused, script, small_teacher, images, references, tmp_path):
    noise = ("distill", "--teacher_ckpt", small_teacher, *SMALL[2:], "--iters", 1, "--out", tmp_path / "n")
    for flag, value in (("--real_alpha", 0), ("--real_alpha", 1.5), ("--real_beta", 0), ("--real_beta", -1), ("--student_steps", 0),
                        ("--gan_weight", -1), ("--gan_weight", "nan")):
        refused(*noise, flag, value, "--data", images, says=(flag, str(value)))
    refused(*noise, "--real_alpha", 0.9, says=("--real_alpha 0.9", "--data"))
    refused(*noise, "--gan_weight", 0.1, says=("--gan_weight 0.1", "--data"))
    refused(*noise, "--data", images, says=("--data", "nothing uses it"))
    refused(*noise, "--data", "nowhere", "--gan_weight", 1, says="--data nowhere")
    refused(*noise, "--reference", "lowres4", says=("--reference lowres4", "starts from noise"))
    refused(*noise, "--data", images, "--real_beta", 0.9, "--objective", "dmd", says=("--real_beta 0.9", "--grad full"))
    refused(*noise, "--data", images, "--real_beta", 0.9, "--cfg_scale", 2, says=("--real_beta 0.9", "guided"))
    refused(*noise, "--cfg_scale", 2, "--cfg_interval", 0.8, 0.2, says="--cfg_interval 0.8 0.2")
    assert script(*noise, "--student_steps", 2)[0] == 0
    sample = ("sample", "--ckpt", tmp_path / "n" / "student.pt", "--out", tmp_path / "s.npz", "--device", "cpu")
    refused(*sample, "--steps", 3, says=("--steps 3", "student of 2 steps"))
    refused(*sample, "--reference", images, says=("--reference", "starts from noise"))
    refused(*sample, "--cfg_interval", 0.1, 0.5, says="--cfg_interval")


def test_bad_restorations(refused, script, references, images, tmp_path):
    teacher = trained(script, images, "lowres4", tmp_path)
    sample = ("sample", "--ckpt", teacher, "--out", "s.npz", "--device", "cpu")
    np.savez("small.npz", images=references[:, :4, :4])
    np.savez("few.npz", images=references[:3])
    refused(*sample, says=("--reference", "bridge"))
    refused("sample", "--compare", teacher, teacher, "--out", "c.png", says="student")
    refused(*sample, "--reference", "small.npz", says=("--reference small.npz", "(8, 8, 1)"))
    refused(*sample, "--reference", "nowhere", says=("--reference nowhere", "no such file"))
    refused(*sample, "--reference", "few.npz", "--n", 10, says=("--n 10", "3 images"))
    refused(*sample, "--reference", images, "--truth", "few.npz", says=("--truth few.npz", "3 images for 40"))
    refused(*sample, "--reference", images, "--truth", images, "--degrade", says="--truth")
    refused("fid", teacher, images, "--device", "cpu", says=("bridge", "sample.py --reference"))
    other = tmp_path / "unpaired"
    trained(script, images, "other.npz", other)
    refused("sample", "--ckpt", other / "teacher.pt", "--reference", images, "--degrade", "--out", "s.npz", says="--degrade")
    refused("sample", "--ckpt", other / "teacher.pt", "--reference", images, "--solver", "heun", "--out", "s.npz", says="--solver heun")
    refused("distill", "--teacher_ckpt", other / "teacher.pt", *SMALL[2:], "--objective", "gap", "--out", other, says=("--units velocity", "unpaired"))
    assert json.loads((other / "train_teacher.json").read_text())["reference"] == "other.npz"
    with pytest.raises(Exception, match="descent"):
        check_objective(BRIDGE._replace(gamma=lambda t: (1 - t) * t ** 0 * 0.5), "stop", "data", True)
