"""What the trainers learn, through their main(): a two-class mixture drawn as 4x4 pixels, seconds a run.

Class 0 is bright above and dark below or the other way round, class 1 the same from side to side: two modes a class,
so that a guess by the mean is grey and the sign has to come out of the noise."""
import json
from typing import NamedTuple

import numpy as np
import pytest
import torch

import distill
import model
import sample
from common.data import Stream
from common.files import load_checkpoint
from fid import frechet
from interpolants import FAMILIES, Problem, Sampler
from sample import generate

HALVES = np.where(np.arange(4) < 2, 1.0, -1.0)[:, None].repeat(4, 1)
PATTERNS = np.stack([HALVES, HALVES.T])
N = 500
LABELS = np.arange(N) % 2
TINY = "--model", "SiT-T/4", "--sample_every", 0, "--device", "cpu"
model.SIZES["T"] = (32, 2, 2)  # learns this in seconds


def draw(seed, brighter=0):
    """-> images (N,4,4) uint8 of LABELS."""
    rng = np.random.default_rng(seed)
    pixels = 128 + brighter + rng.choice([-60, 60], N)[:, None, None] * PATTERNS[LABELS] + rng.normal(0, 8, (N, 4, 4))
    return pixels.clip(0, 255).round().astype(np.uint8)


def distance(images):
    """Fréchet distance in pixel space between images (n,4,4,1) and fresh data."""
    a, b = (v.reshape(len(v), -1) / 127.5 for v in (images, draw(1)))
    return frechet(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))


def sampled(path, sampler=Sampler()):
    return generate(*model.load_model(path), LABELS, 5, range(N), sampler)


@pytest.fixture(scope="session")
def mixture(tmp_path_factory, run_script):
    """A folder with the data, brighter data, and teachers of the mixture: one from noise, and a bridge from x1, which
    shows the class but not the sign."""
    folder = tmp_path_factory.mktemp("mixture")
    np.savez(folder / "data.npz", x_train=draw(0), y_train=LABELS)
    np.savez(folder / "brighter.npz", x_train=draw(2, brighter=40), y_train=LABELS)
    np.savez(folder / "pairs.npz", x1=(128 + 30 * PATTERNS[LABELS]).astype(np.uint8), labels=LABELS)
    flags = ("--data", folder / "data.npz", *TINY, "--batch", 32, "--ema", 0.98, "--iters", 400, "--out")
    run_script("train_teacher", *flags, folder / "linear")
    run_script("train_teacher", *flags, folder / "bridge", "--interpolant", "bridge", "--reference",
               folder / "pairs.npz")
    return folder


def trained(run, mixture, out, *flags):
    run("train_teacher", "--data", mixture / "data.npz", *TINY, "--out", out, *flags)
    return out / "teacher.pt"


def distilled(run, mixture, out, *flags, teacher="linear", iters=70):
    run("distill", "--teacher_ckpt", mixture / teacher / "teacher.pt", *TINY, "--batch", 32, "--lr", 2e-3,
        "--ema", 0.95, "--iters", iters, "--out", out, *flags)
    return out / "student.pt"


SETTINGS = {
    **{name: (name,) for name in distill.OBJECTIVES},
    "gan": ("sid", "--data", "data.npz", "--gan_weight", 0.03),
    "realuid": ("gap", "--data", "data.npz", "--real_alpha", 0.9, "--real_beta", 0.9),
    "few steps": ("dmd", "--student_steps", 2),
    "bridge": ("sid", "--lr", 1e-3, "--k_psi", 3),
}


@pytest.mark.parametrize("setting", [name if name == "sid" else pytest.param(
    name, marks=pytest.mark.slow) for name in SETTINGS])
def test_the_students_average_comes_closer_to_the_data(run, mixture, tmp_path, monkeypatch, setting):
    """Closer than at iteration 0, when it is the teacher's guess from --t_init, and than that from t = 1."""
    monkeypatch.chdir(mixture)
    objective, *flags = SETTINGS[setting]
    kind, x1 = ("bridge", np.load("pairs.npz")["x1"][..., None]) if setting == "bridge" else ("linear", None)
    student = distilled(run, mixture, tmp_path, "--objective", objective, *flags, teacher=kind)
    (net, config), (teacher, plain) = (model.load_model(path) for path in (student, f"{kind}/teacher.pt"))
    start, end, guess = (distance(generate(n, c, LABELS, 5, range(N), Sampler(steps), x1)) for n, c, steps in (
        (teacher, config, None), (net, config, None), (teacher, plain, 1)))
    assert end < 0.5 * start and end < 0.5 * guess


# ---------------------------------------------------------------------------------------------------------------------
# Guidance, the discriminator, averages

def strength(images):
    """How much of its class's pattern an image holds, whatever the sign, in grey levels; the mean over the images."""
    return np.abs(((images[..., 0].astype(float) - 128) * PATTERNS[LABELS]).mean((1, 2))).mean()


def test_a_guided_student_goes_where_its_guided_teacher_is(run, mixture, tmp_path):
    """Guidance moves samples away from what the classes share, towards stronger patterns."""
    plain, guided = (strength(sampled(mixture / "linear/teacher.pt", Sampler(10, cfg_scale=scale))) for scale in (1, 3))
    student = strength(sampled(distilled(run, mixture, tmp_path, "--cfg_scale", 3)))
    assert guided > plain + 5 and student - plain > 0.3 * (guided - plain)


def test_a_discriminator_draws_the_student_to_the_real_data(run, mixture, tmp_path):
    """Real images that are brighter than the teacher's make a brighter student, and the more weight the brighter."""
    flags = ("--data", mixture / "brighter.npz", "--iters", 40)
    means = [sampled(distilled(run, mixture, tmp_path / str(weight), *flags, "--gan_weight", weight)).mean()
             for weight in (1e-3, 1)]
    assert means[1] > means[0] + 5


@pytest.mark.parametrize("job", ["teacher", "distill"])
def test_averages_are_of_the_trained_network_and_are_what_is_sampled(run, mixture, tmp_path, job):
    """The saved averages after four iterations, from the raw weights after each of them."""
    weights, flags = [], ("--ema", 0.5, *[0.9] * (job == "distill"))
    for iters in range(1, 5):
        if job == "teacher":
            state = load_checkpoint(trained(run, mixture, tmp_path, *flags, "--iters", iters))
            weights.append((state["model"], [state["ema"]]))
        else:
            distilled(run, mixture, tmp_path, *flags, iters=iters)
            state = load_checkpoint(tmp_path / "resume.pt")
            weights.append((state["student"], state["averages"]))
    net, _ = model.load_model(tmp_path / ("teacher.pt" if job == "teacher" else "student.pt"))
    assert all(torch.equal(value, weights[-1][1][0][name]) for name, value in net.named_parameters())
    for i, decay in enumerate(flags[1:]):
        average, now = model.frozen_copy(net), model.frozen_copy(net)
        average.load_state_dict(weights[0][1][i])
        for step, (raw, _) in enumerate(weights[1:], 2):
            now.load_state_dict(raw)
            model.ema_update(average, now, decay, step)
        assert all(torch.equal(value, weights[-1][1][i][name]) for name, value in average.named_parameters())
    first, last = (w[1][0]["final_layer.linear.weight"] for w in (weights[0], weights[-1]))
    assert not torch.equal(first, last)


# ---------------------------------------------------------------------------------------------------------------------
# What the networks are called with, in main() itself

class Call(NamedTuple):
    net: str
    x_t: torch.Tensor
    t: torch.Tensor
    y: torch.Tensor
    x1: torch.Tensor
    trains: bool


@pytest.fixture
def spied(run, mixture, tmp_path, monkeypatch):
    """spied(flags) -> the calls of teacher, student (G) and critic (psi) in one iteration of distill.py, in order."""
    def call(*flags, teacher="linear"):
        nets, calls, names, forward, load = {}, [], iter(("G", "psi")), model.SiT.forward, sample.load_named

        def remember(name, net):
            nets[id(net)] = name
            return net

        def load_named(*args):
            net, config = load(*args)
            return remember("teacher", net), config

        def spy(self, x_t, t, y=None, x1=None, r=None, middle=False):
            calls.append(Call(nets.get(id(self)), x_t.detach(), t, y, x1, torch.is_grad_enabled()))
            return forward(self, x_t, t, y, x1, r, middle)
        with monkeypatch.context() as patch:
            patch.setattr(distill, "build_from", lambda *given: remember(next(names), model.build_from(*given)))
            patch.setattr(sample, "load_named", load_named)
            patch.setattr(model.SiT, "forward", spy)
            distilled(run, mixture, tmp_path, "--batch", 8, *flags, teacher=teacher, iters=1)
        last = max(i for i, c in enumerate(calls) if c.net == "psi" and c.trains)  # then pictures
        return [c for c in calls[:last + 1] if c.net]
    return call


def of(calls, net):
    return [c for c in calls if c.net == net]


def test_the_student_starts_at_t_init_and_losses_keep_to_their_times(spied):
    calls = spied("--t_init", 0.6, "--t_min", 0.3, "--t_max", 0.4, "--k_psi", 3)
    assert all(torch.equal(c.t, torch.full((8,), 0.6)) for c in of(calls, "G"))
    for c in of(calls, "teacher") + of(calls, "psi"):
        assert 0.3 <= c.t.min() and c.t.max() <= 0.4 and c.t.max() - c.t.min() > 0.05


@pytest.mark.parametrize("more", [(), ("--reuse_samples",)])
def test_every_critic_step_has_noise_and_times_of_its_own_and_the_students_labels(spied, more):
    calls = spied("--k_psi", 3, *more)
    critic, student = of(calls, "psi")[:3], of(calls, "G")
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(critic[a].t, critic[b].t) and not torch.equal(critic[a].x_t, critic[b].x_t)
    for c in critic:
        assert any(torch.equal(c.y, g.y) for g in student)
    assert torch.equal(critic[-1].y, student[0].y)  # the last one learns on the samples of the student's own step
    assert torch.equal(of(calls, "teacher")[-1].y, student[0].y) and torch.equal(of(calls, "psi")[-1].y, student[0].y)


def test_guidance_is_the_teachers_alone(spied):
    calls = spied("--cfg_scale", 2)
    assert all(len(c.t) == 16 and (c.y[8:] == 2).all() and (c.y[:8] < 2).all() for c in of(calls, "teacher"))
    assert all(len(c.t) == 8 and (c.y < 2).all() for c in of(calls, "G") + of(calls, "psi"))


def test_the_critic_is_guided_where_it_learns(spied):
    calls = spied("--critic_cfg_scale", 2)
    assert all(len(c.t) == 16 for c in of(calls, "psi")) and all(len(c.t) == 8 for c in of(calls, "teacher"))


def test_the_teacher_is_guided_in_its_interval(run, mixture, tmp_path, monkeypatch):
    """In the gap and in the trajectory loss."""
    given, asked, guided, make_legs = {}, [], distill.guided, distill.make_legs

    def guide(net, *how):
        found = guided(net, *how)
        given[found] = how
        return found
    monkeypatch.setattr(distill, "guided", guide)
    monkeypatch.setattr(distill, "make_legs", lambda *args: asked.append(args[2]) or make_legs(*args))
    distilled(run, mixture, tmp_path, "--cfg_scale", 2, "--cfg_interval", 0.2, 0.6, "--flow_weight", 1, iters=1)
    assert [given[v_star] for v_star in asked] == [(2.0, [0.2, 0.6])]


def test_the_logs_spread_is_that_over_the_samples(run, mixture, tmp_path, monkeypatch):
    same = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8).expand(10, -1, -1, -1)
    monkeypatch.setattr(distill.Watched, "samples", lambda self, net: same)
    distilled(run, mixture, tmp_path, "--log_every", 1, iters=2)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["spread"] == 0


@pytest.mark.parametrize("teacher, flags", [("linear", ("--gan_weight", 0.1)), ("linear", ("--student_steps", 2)),
                                            ("bridge", ())])
def test_no_noise_serves_twice_and_data_keep_their_labels(run, mixture, tmp_path, monkeypatch, teacher, flags):
    """Of all that is drawn in four iterations; and no loss is taken at the noise that its samples were made from."""
    keys, starts, taken, real, told = [], [], [], [], []

    def spy(owner, name, note):
        call = getattr(owner, name)

        def spied(*given):
            found = call(*given)
            note(given, found)
            return found
        monkeypatch.setattr(owner, name, spied)
    spy(Stream, "draw", lambda given, b: keys.append(given[1:]))
    spy(Stream, "draw_data", lambda given, b: real.append(b))
    spy(distill, "draw_start", lambda given, b: starts.append(b))
    spy(distill, "critic_loss", lambda given, _: taken.append(given[3]))
    spy(distill, "student_loss", lambda given, _: taken.append(given[4]))
    spy(distill, "discriminate", lambda given, _: told.extend(given[4:]))
    more = ("--data", mixture / "data.npz") if "--gan_weight" in flags else ()
    distilled(run, mixture, tmp_path, "--k_psi", 2, "--k_G", 2, *flags, *more, teacher=teacher, iters=4)
    assert len(set(keys)) == len(keys)
    assert len({round(float(b.t[0]), 3) for b in starts}) == 1 + ("--student_steps" in flags)
    for b, start in ((b, start) for b in taken for start in starts):
        assert not torch.equal(b.z, start.z) and (teacher == "bridge" or not torch.equal(b.x1, start.x1))
    assert not more or len(real) == len(told) == 8
    assert not more or all(torch.equal(a.x0, b.x0) and torch.equal(a.y, b.y) for a, b in zip(real, told))


def test_the_picture_noises_samples_afresh():
    """With a perfect student of one point of data for each x1, and networks that give the noise away."""
    for path in ("linear", "bridge"):
        problem = Problem(FAMILIES[path], "data", path == "bridge")
        stream = Stream(0, 4, slice(4), torch.device("cpu"), (1, 2, 2), 0, (0.1, 0.9))
        watched, seen = distill.watch(problem, stream, [0.8], 0.5, n=10), []
        student = lambda x, t, *_: 0 * x  # noqa: E731
        watched.rows(student, lambda x, t, *_: seen.append(x) or x, student)
        k = problem.at(torch.full((10,), 0.5), 4)
        eps = (seen[0] - (k.beta * watched.b.x1 if problem.sees_x1 else 0)) / k.s
        assert not any(torch.allclose(eps[i], made[i], atol=1e-4) for made in (watched.b.x1, watched.b.z)
                       for i in range(10))


def test_a_bridges_networks_see_the_x1_that_the_student_came_from(spied, mixture):
    calls = spied("--k_psi", 2, teacher="bridge")
    known = np.load(mixture / "pairs.npz")["x1"][:2] / 127.5 - 1
    for c in calls:
        assert torch.allclose(c.x1, torch.from_numpy(known).float()[c.y][:, None])


def test_student_and_critic_start_from_the_teachers_average(run, mixture, tmp_path):
    distilled(run, mixture, tmp_path, "--lr", 1e-12, iters=1)
    state, teacher = load_checkpoint(tmp_path / "resume.pt"), load_checkpoint(mixture / "linear/teacher.pt")
    for net in ("student", "critic"):
        for name, value in teacher["ema"].items():
            assert torch.allclose(state[net][name], value, atol=1e-9), name
    raw, average = (teacher[key]["x_embedder.proj.weight"] for key in ("model", "ema"))
    assert not torch.allclose(raw, average, atol=1e-6)


def test_labels_are_dropped_as_often_as_told(run, mixture, tmp_path, monkeypatch):
    seen, forward = [], model.SiT.forward
    monkeypatch.setattr(model.SiT, "forward", lambda self, *args: (seen.append(args[2]), forward(self, *args))[1])
    for share in (0, 0.5, 1):
        seen.clear()
        trained(run, mixture, tmp_path / str(share), "--batch", 200, "--iters", 1, "--label_dropout", share)
        assert (seen[0] == 2).float().mean() == pytest.approx(share, abs=0.15 if share == 0.5 else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Flags that must matter

@pytest.mark.parametrize("flags", [
    ("--kappa", 0.5), ("--weight", "uniform"), ("--units", "velocity"), ("--grad", "stop"), ("--real_alpha", 0.5),
    ("--real_beta", 0.5), ("--gan_critic_weight", 0.5)], ids=lambda flags: flags[0])
def test_a_flag_of_the_objective_changes_what_is_learnt(run, mixture, tmp_path, flags):
    net = "critic" if flags[0] == "--gan_critic_weight" else "student"
    real = "gan" in flags[0] or "real" in flags[0]
    data = ("--data", mixture / "data.npz", "--gan_weight", 0.1, "--gan_critic_weight", 0.1) * real
    without, weights = mixture / f"without_{real}", []  # the same for several flags
    for out, more in ((without, ()), (tmp_path, flags)):
        if not (out / "resume.pt").exists():
            distilled(run, mixture, out, *data, *more, iters=2)
        weights.append(load_checkpoint(out / "resume.pt")[net]["final_layer.linear.weight"])
    assert (weights[0] - weights[1]).abs().max() > 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Flow maps

def mapped(run, mixture, out, *flags, teacher="linear"):
    run("flow_map", "--teacher_ckpt", mixture / teacher / "teacher.pt", *TINY, "--batch", 64, "--lr", 3e-3,
        "--ema", 0.9, "--iters", 60, "--out", out, *flags)
    return out / "flow_map.pt"


def off(images, truth):
    return float(((images.astype(float) - truth) ** 2).mean() ** 0.5)


@pytest.mark.parametrize("row", [
    "lagrange", "progressive --grid 8 --stage_iters 15", *(pytest.param(row, marks=pytest.mark.slow) for row in (
        "shortcut", "euler", "lagrange --anchor 0.3"))])
def test_a_flow_map_ends_where_its_teachers_ode_does(run, mixture, tmp_path, row):
    """From the same noise, far closer than the teacher's own guess in as many steps."""
    teacher = mixture / "linear/teacher.pt"
    path, truth = mapped(run, mixture, tmp_path, "--row", *row.split()), sampled(teacher, Sampler(50))
    assert off(sampled(path), truth) < 0.65 * off(sampled(teacher, Sampler(1)), truth)
    if row.split()[0] in ("lagrange", "euler"):
        assert off(sampled(path, Sampler(4)), truth) < 0.9 * off(sampled(teacher, Sampler(4)), truth)


def test_a_guided_map_goes_where_its_guided_teacher_is(run, mixture, tmp_path):
    path, teacher = mapped(run, mixture, tmp_path, "--cfg_scale", 3), mixture / "linear/teacher.pt"
    plain, guided = (strength(sampled(teacher, Sampler(10, cfg_scale=scale))) for scale in (1, 3))
    assert strength(sampled(path)) - plain > 0.3 * (guided - plain)


@pytest.mark.slow
def test_a_student_starts_from_a_flow_map_or_stays_one(run, mixture, tmp_path):
    """After a step of no size the map itself; with --flow_weight its law is the data's, its ends the ODE's."""
    path, teacher = mapped(run, mixture, tmp_path / "map", "--iters", 20), mixture / "linear/teacher.pt"
    same = distilled(run, mixture, tmp_path / "same", "--student_ckpt", path, "--lr", 1e-12, iters=1)
    assert off(sampled(same), sampled(path)) < 0.5 < off(sampled(teacher, Sampler(1)), sampled(path))
    both = distilled(run, mixture, tmp_path / "both", "--flow_weight", 1, "--objective", "dmd")
    assert distance(sampled(both)) < 0.5 * distance(sampled(teacher, Sampler(1)))
    alone = distilled(run, mixture, tmp_path / "alone", "--flow_weight", 1e-9, "--objective", "dmd")
    truth = sampled(teacher, Sampler(50))
    assert off(sampled(both), truth) < 0.9 * off(sampled(alone), truth)
