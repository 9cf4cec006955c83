"""Flow maps: the two legs in closed form on a mixture in the plane, and what flow_map.py learns."""
import contextlib

import numpy as np
import pytest
import torch

import flow_map
import plane
import sample
from common.data import Stream
from common.files import load_checkpoint, save_checkpoint
from common.images import to_device, to_uint8
from common.run import UserError
from conftest import SMALL
from flow_map import (ROWS, Legs, Trip, check_tangent, draw_times, draw_trip, make_legs, map_loss, map_weight,
                      solve_leg, tangent_target, trajectory_target)
from interpolants import (FAMILIES, PREDICTIONS, Batch, Problem, Sampler, convert, ddim, family, follow_map, last_time,
                          leg_weight, loss_weight, prediction_scale, regression_loss, solve, start_at, student_input,
                          time_of_noise_ratio)
from model import build_model, load_model

MEANS, STDS = plane.MEANS.double(), plane.STDS.double()
PATHS = list(FAMILIES)


def noise(x, sigma):
    """E[eps | x] (B,2) of x = x0 + sigma eps (B,2), sigma (B,1): every path but for a scale."""
    variance, rest = STDS ** 2 + sigma ** 2, x[:, None] - MEANS  # (B,K), (B,K,2)
    share = (-0.5 * rest.square().sum(2) / variance - variance.log()).softmax(1)
    return ((share * sigma / variance)[..., None] * rest).sum(1)


def scaled(problem, b, t):
    """alpha, s (B,1) and [beta x1] (B,2) at t: the path's own functions, which have derivatives of every kind."""
    alpha, beta, gamma = (f(t)[:, None] for f in problem.path[:3])
    return (alpha, gamma, beta * b.x1.flatten(1)) if problem.sees_x1 else (alpha, beta, 0)


def teacher(problem, b):
    """The mixture's exact data prediction on b (B,2,1,1)."""
    return plane.exact(problem, MEANS, STDS)(b.x_t, b.t, x1=b.x1)


def exact_step(problem, b, n=48):
    """f(x_t, t, r) of the ODE dx = eps d sigma, by RK4; b has t, r, x_t."""
    (alpha, s, given), (alpha_r, s_r, given_r) = (scaled(problem, b, t) for t in (b.t, b.r))
    x, begin, end = (b.x_t.flatten(1) - given) / alpha, s / alpha, s_r / alpha_r
    for i in range(n):
        u, v = (end + (begin - end) * (1 - k / n) ** 2 for k in (i, i + 1))
        h, k1 = v - u, noise(x, u)
        k2 = noise(x + h / 2 * k1, u + h / 2)
        k3 = noise(x + h / 2 * k2, u + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + noise(x + h * k3, v))
    return (alpha_r * x + given_r)[..., None, None]


def exact_map(problem, b, n=24):
    """X(x_t, t, r) (B,2,1,1): exact_step as DDIM's data prediction, the posterior mean where r = t."""
    (alpha, s, given), (alpha_r, s_r, given_r) = (scaled(problem, b, t) for t in (b.t, b.r))
    moved = exact_step(problem, b, n).flatten(1) - given_r - s_r / s * (b.x_t.flatten(1) - given)
    same = (b.t == b.r)[:, None]
    X = torch.where(same, teacher(problem, b).flatten(1), moved / torch.where(same, 1, alpha_r - alpha * s_r / s))
    return X[..., None, None]


def setting(path, n=24, to_zero=0.25, dtype=torch.float64):
    """-> the problem (data prediction) and rows of its path with steps t -> r, a quarter of them to r = 0."""
    problem, g = Problem(FAMILIES[path], "data", path == "bridge"), torch.Generator().manual_seed(0)
    low, high = (time_of_noise_ratio(problem, ratio) for ratio in (0.2, 5.0))
    x0, (x1, z) = plane.draw_mixture(n, g).to(dtype), torch.randn(2, n, 2, 1, 1, generator=g, dtype=dtype)
    t = torch.linspace(low, high, n, dtype=dtype)
    r = t * torch.rand(n, generator=g, dtype=dtype) * 0.8
    r[:int(to_zero * n)] = 0
    b, _ = problem.noised(Batch(x0, x1, z, t))
    return problem, b._replace(r=r)


def trip_of(problem, row, b):
    lam = {"mu": row.mu, "1-mu": 1 - row.mu, "random": 0.37}.get(row.lam) or float(row.lam)
    s = b.t - lam * (b.t - b.r)
    return Trip(b, s, leg_weight(problem, b.t, s, b.r), b.t == b.r)


def legs_of(problem, row, X):
    """Exact ones for what is trained or solved; the teacher's is its prediction."""
    own = {"teacher": lambda b: teacher(problem, b), "data": lambda b: b.x0, "solver": lambda b: exact_map(problem, b)}
    return Legs(own.get(row.first, X), own.get(row.second, X), own["teacher"], X)


FINITE = sorted(set(ROWS) - {"meanflow"})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FINITE)
def test_the_exact_map_is_the_fixed_point(name, path):
    """X_tgt - X is nothing for exact legs, of order mu where a leg is the teacher's prediction, and something when X is
    perturbed."""
    problem, b = setting(path)

    def size(mu, wrong=0):
        def X(b):
            return exact_map(problem, b) + wrong * torch.sin(3 * b.x_t + 2 * b.r.reshape(-1, 1, 1, 1))
        row, now = ROWS[name]._replace(mu=mu), X(b)
        target = trajectory_target(problem, row, legs_of(problem, row, X), trip_of(problem, row, b), now)
        return float((target - now).square().mean().sqrt())
    right = size(0.01)
    if "teacher" in ROWS[name][1:3]:
        assert 1.6 < size(0.02) / right < 2.4 and right < 0.05
    else:
        assert right < 1e-5
    assert size(0.01, 0.1) > 3 * right + 1e-4


@pytest.mark.parametrize("path", PATHS)
def test_the_flow_is_a_flow(path):
    """f(f(x,t,s),s,r) = f(x,t,r) as the leg weight says; d_r f = v(f, r); d/dt of f along the ODE is 0."""
    problem, b = setting(path, to_zero=0)
    s = 0.4 * b.t + 0.6 * b.r
    A = exact_map(problem, b._replace(r=s), 48)
    x_s = ddim(problem, A, b, s)
    torch.testing.assert_close(x_s, exact_step(problem, b._replace(r=s)), rtol=1e-7, atol=1e-7)
    B = exact_map(problem, b._replace(x_t=x_s, t=s), 48)
    w = leg_weight(problem, b.t, s, b.r).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(w * A + (1 - w) * B, exact_map(problem, b, 48), rtol=1e-5, atol=1e-5)
    h = 1e-5
    ahead, behind = (exact_step(problem, b._replace(r=b.r + d)) for d in (h, -h))
    f = exact_step(problem, b)
    at = b._replace(x_t=f, t=b.r)
    v = convert(problem, teacher(problem, at), "velocity", at)
    assert float(((ahead - behind) / (2 * h) - v).abs().max() / v.abs().max()) < 1e-4


@pytest.mark.parametrize("path", PATHS)
def test_a_solvers_leg_of_no_length_is_the_teachers_prediction(path):
    """Next to t = 1, in float32, where cos(pi/2 t) is the same number at neighbouring times."""
    problem, b = setting(path, dtype=torch.float32)
    b = start_at(problem, b, 0.999 if problem.sees_x1 else 1.0)
    for r in (torch.nextafter(b.t, 0 * b.t), b.t - 1e-5, b.t - 2e-3):
        found = solve_leg(problem, lambda x_t, *_: 0 * x_t + 0.3, b._replace(r=r), 2)
        torch.testing.assert_close(found, torch.full_like(found, 0.3), rtol=0, atol=0.01)


@pytest.mark.parametrize("path", PATHS)
def test_a_solvers_leg_ends_at_the_data(path):
    """At r = 0 itself, in float32, however many steps it takes: just below 0 some paths are not numbers."""
    problem, b = setting(path, dtype=torch.float32)
    b = start_at(problem, b, last_time(problem))
    for n in (3, 5, 10, 19):
        found = solve_leg(problem, lambda x_t, *_: 0 * x_t + 0.3, b._replace(r=0 * b.t), n)
        torch.testing.assert_close(found, torch.full_like(found, 0.3), rtol=0, atol=1e-3)


@pytest.mark.parametrize("path", PATHS)
def test_leg_weights_are_finite_and_those_of_two_steps(path):
    """Two DDIM steps with A and B end where one with w A + (1 - w) B does, at r = 0 and t = 1, too."""
    problem, b = setting(path)
    one = 1 - 1e-3 * problem.sees_x1
    t = torch.tensor([one, one, 0.7, 0.7, 0.7], dtype=torch.float64)
    s = torch.tensor([0.5, 0.5, 0.3, 0.7, 0.2], dtype=torch.float64)
    r = torch.tensor([0.0, 0.2, 0.0, 0.1, 0.2], dtype=torch.float64)
    w, (A, B) = leg_weight(problem, t, s, r), torch.randn(2, 5, 2, 1, 1, dtype=torch.float64)
    b = b.rows(slice(5))._replace(t=t)
    assert w.isfinite().all() and float(w[4]) == 1 and float(w[3].abs()) < 1e-12
    two = ddim(problem, B, b._replace(x_t=ddim(problem, A, b, s), t=s), r)
    w = w.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(ddim(problem, w * A + (1 - w) * B, b, r), two, rtol=1e-10, atol=1e-10)


def test_on_the_linear_path_it_is_the_average_velocity():
    problem, b = setting("linear")
    X = exact_map(problem, b)
    F = (b.x_t - X) / b.t.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(ddim(problem, X, b, b.r), b.x_t + (b.r - b.t).reshape(-1, 1, 1, 1) * F)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["euler", "lagrange", "meanflow"])
def test_tangents_are_the_limit_of_finite_legs(name, path):
    """On any X, not on the exact map alone, with its derivative by differences in place of the network's."""
    problem, b = setting(path, to_zero=0.0)
    row = ROWS[name]._replace(tangent="jvp")

    def X(b):
        t, r = (v.reshape(-1, 1, 1, 1) for v in (b.t, b.r))
        return torch.sin(b.x_t + 2 * t - r * b.x_t) + r
    legs, now = legs_of(problem, row, X), X(b)
    trip = trip_of(problem, row, b)
    R = tangent_target(problem, row, legs, trip, now) - now
    found = []
    for mu in (2e-4, 1e-4):
        near = row._replace(mu=mu, lam={"euler": "mu", "meanflow": "mu", "lagrange": "1-mu"}[name])
        found.append(trajectory_target(problem, near, legs, trip_of(problem, near, b), now) - now)
    limit = 2 * found[1] - found[0]
    if name != "meanflow":  # normalised, and for lagrange divided by what has no bound
        limit, R = (v / v.square().mean((1, 2, 3), keepdim=True).sqrt() for v in (limit, R))
    torch.testing.assert_close(R, limit, rtol=2e-3, atol=2e-3)


def test_the_teachers_data_leave_the_map_where_it_is():
    """From data the target's mean is right at the exact map, within its error; without the stop-gradient it is not."""
    n, (problem, _) = 2000, setting("linear")
    _, b = setting("linear", n, 0.0)
    row, h = ROWS["meanflow"], 1e-3

    def residual(wrong):
        def X(b):
            return exact_map(problem, b, 16) + wrong * b.x_t
        return tangent_target(problem, row, legs_of(problem, row, X), trip_of(problem, row, b), X(b)) - X(b)
    at, ahead, behind = residual(0), residual(h), residual(-h)
    pull = (at * b.x_t).flatten(1).mean(1)  # of the loss' derivative in `wrong`, with the stop-gradient
    assert abs(pull.mean()) < 3 * pull.std() / n ** 0.5
    whole = ((ahead ** 2).flatten(1).mean(1) - (behind ** 2).flatten(1).mean(1)) / (2 * h)
    assert abs(whole.mean()) > 5 * whole.std() / n ** 0.5


def test_the_warm_up_scales_the_derivatives_share():
    problem, b = setting("linear", to_zero=0.0)
    row = ROWS["meanflow"]
    legs, trip = legs_of(problem, row, lambda b: torch.sin(b.x_t + b.t.reshape(-1, 1, 1, 1))), trip_of(problem, row, b)
    none, half, whole = (tangent_target(problem, row, legs, trip._replace(share=share), b.x_t) for share in (0, 0.5, 1))
    torch.testing.assert_close(half, (none + whole) / 2)
    assert (none - whole).abs().amax() > 0.01


def test_the_power_divides_each_rows_loss():
    problem, b = setting("linear")
    row = ROWS["lagrange"]
    trip, legs = trip_of(problem, row, b), legs_of(problem, row, lambda b: exact_map(problem, b))
    plain, half = (map_loss(problem, row._replace(power=power), legs, lambda x_t, *_, **__: 0 * x_t, trip)
                   for power in (0, 0.5))
    assert plain.min() > 0
    torch.testing.assert_close(half, plain / (plain + 1e-3).sqrt())


def test_restart_1_is_the_students_renoising():
    problem, b = setting("linear")
    net = lambda x_t, t, y=None, r=None: torch.tanh(x_t + t.reshape(-1, 1, 1, 1))  # noqa: E731
    noise = torch.randn(2, *b.x_t.shape, dtype=torch.float64)
    grid = [1.0, 0.6, 0.3, 0.0]
    start = b._replace(t=torch.ones_like(b.t), x_t=b.x1, r=None)
    again = student_input(problem, net, grid[:-1], b._replace(r=None), lambda i: (noise[i - 1], None))
    torch.testing.assert_close(follow_map(problem, net, start, grid, 1.0, lambda i: noise[i]), problem.data(net, again))


@pytest.mark.parametrize("restart", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("path", ["linear", "vp", "bridge"])
def test_steps_of_a_perfect_map_keep_the_marginals(path, restart, n=20000, point=0.7, given=1.3):
    """One point of data: mean and spread of what each step leads to are those of the path."""
    problem, g, seen = Problem(FAMILIES[path], "data", path == "bridge"), torch.Generator().manual_seed(0), []

    def net(x_t, t, *_, **__):
        seen.append((t[:1], x_t))
        return torch.full_like(x_t, point)

    def draw(_):
        return torch.randn(n, 1, 1, 1, generator=g)
    x1 = torch.full((n, 1, 1, 1), given) if problem.sees_x1 else draw(0)
    b, _ = problem.noised(Batch(torch.full((n, 1, 1, 1), point), x1, draw(0), torch.full((n,), 0.8)))
    follow_map(problem, net, b, [0.8, 0.5, 0.2, 0.0], restart, draw)
    for t, x in seen[1:]:
        k = problem.at(t)
        assert float(x.mean()) == pytest.approx(float(k.alpha * point + k.beta * given * problem.sees_x1), abs=0.02)
        assert float(x.std()) == pytest.approx(float(k.s), rel=0.03)


@pytest.mark.parametrize("path", sorted(FAMILIES))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_error_of_the_data_counts(path, prediction):
    """By at least 1 (a data prediction's by what it weighs itself), from where maps start down to small times."""
    for scale in (1, 0.03)[:1 + (path == "bridge")]:
        problem = Problem(family(path, scale), prediction, path == "bridge")
        start = last_time(problem)
        if path == "linear" and prediction in ("noise", "score"):
            assert start == pytest.approx(50 / 51, abs=1e-5)
        assert start < (0.9991 if path == "bridge" else 1.001) and float(problem.at(torch.tensor([start])).s) > 0
        t = torch.linspace(0.05, start, 50, dtype=torch.float64)
        assert float((prediction_scale(problem, prediction, t) ** 2 * map_weight(problem, t, 4)).min()) > 0.99


def test_rows_that_stay_learn_the_teachers_prediction():
    problem, b = setting("linear", dtype=torch.float32)
    row, b = ROWS["shortcut"]._replace(power=0), b._replace(r=b.t)
    found = map_loss(problem, row, legs_of(problem, row, lambda b: 0 * b.x_t), lambda x_t, *_, **__: 0.3 * x_t,
                     trip_of(problem, row, b))
    error = map_weight(problem, b.t, 4) * (0.3 * b.x_t - teacher(problem, b)) ** 2
    torch.testing.assert_close(found.float(), error.float().flatten(1).mean(1), rtol=1e-4, atol=1e-5)


def test_borders_are_drawn_as_often_as_told_and_apart():
    t, r = draw_times(ROWS["lagrange"], 10 ** 5, (0.1, 0.9), torch.Generator().manual_seed(0))
    for drawn, share in ((t == 0.9, 0.15), (r == 0, 0.15), ((t == 0.9) & (r == 0), 0.15 ** 2)):
        assert float(drawn.float().mean()) == pytest.approx(share, abs=0.005)


def learn(name, batch=128, iters=200, **knobs):
    """-> the error of a small map trained by this row, and of the teacher's own guess, against the exact map."""
    torch.manual_seed(0)
    problem, row = Problem(FAMILIES["linear"], "data"), ROWS[name]._replace(**knobs)
    stream = Stream(0, batch, slice(None), torch.device("cpu"), (2, 1, 1), 0, (0.2, 0.8))
    average, g = plane.map_point(problem, row, stream, iters), torch.Generator().manual_seed(0)
    b = draw_trip(problem, row, stream, stream.draw(0, "test")._replace(x0=plane.draw_mixture(batch, g)), 1000).b
    b, exact = b._replace(y=None), exact_map(problem, b)
    return [float((X - exact).square().mean().sqrt()) for X in (problem.data(average, b).detach(), teacher(problem, b))]


@pytest.mark.parametrize("name", [row if row in ("lagrange", "euler") else pytest.param(
    row, marks=pytest.mark.slow) for row in sorted(ROWS)])
def test_a_small_network_learns_the_map(name):
    knobs = dict(diagonal=0.0, power=0.0, iters=400) if name == "meanflow" else {"solver_steps": 3}  # data are noisy
    error, guess = learn(name, mu=0.1, **knobs)
    assert error < 0.75 * guess


def test_a_map_of_discrete_times_is_sampled_at_them(monkeypatch):
    """Those of progressive distillation are even in t; bridges' own grids are not."""
    config = {"network": dict(size="XXS", patch=4, image_size=8, channels=1, num_classes=0, second_time=True,
                              reference_channels=1), "interpolant": "bridge", "prediction": "data",
              "reference": "inpaint", "model": "SiT-XXS/4", "student": {"times": [0.8], "flow_map": "progressive"}}
    grids = []
    monkeypatch.setattr(sample, "follow_map", lambda problem, net, b, grid, *rest: grids.append(grid) or b.x_t)
    for row in ("progressive", "lagrange"):
        config["student"]["flow_map"] = row
        sample.generate(build_model(config), config, None, 0, None, Sampler(4), np.zeros((1, 8, 8, 1), np.uint8))
    np.testing.assert_allclose(grids[0], [0.8, 0.6, 0.4, 0.2, 0])
    assert abs(float(grids[1][1]) - 0.6) > 0.05 and float(grids[1][0]) == pytest.approx(0.8)


def test_a_derivative_wants_float64():
    for name in ROWS:
        with pytest.raises(UserError, match="--device cpu") if name == "meanflow" else contextlib.nullcontext():
            check_tangent(ROWS[name], torch.device("mps"))


def test_the_target_is_without_gradient():
    problem, b = setting("linear", dtype=torch.float32)
    for name in ("lagrange", "shortcut"):
        net = plane.Added(problem)
        torch.nn.init.normal_(net.net[-1].weight, std=0.1)
        row, own = ROWS[name], lambda b: problem.data(net, b)
        trip, target = trip_of(problem, row, b)._replace(w=torch.full((len(b.t),), 0.7)), []
        legs = make_legs(problem, row, net, net, net)

        def watched(b):
            target.append(legs.second(b))
            return target[-1]
        loss = map_loss(problem, row, legs._replace(second=watched), net, trip).mean()
        mine = torch.autograd.grad(loss, net.net[-1].bias)[0]
        with torch.no_grad():
            fixed = trajectory_target(problem, row, legs, trip, own(b))
        weight = loss_weight(problem, b.t)
        own_loss = (weight * (own(b) - fixed) ** 2).flatten(1).mean(1).mean()
        torch.testing.assert_close(mine, torch.autograd.grad(own_loss, net.net[-1].bias)[0])
        assert not target[0].requires_grad


@pytest.fixture(scope="session")
def teachers(images, small_teacher, tmp_path_factory, run_script):
    """Of a bridge, and on vp, where it predicts noise."""
    out = tmp_path_factory.mktemp("teachers")
    for name, *more in (("bridge", "--reference", "inpaint"), ("vp",)):
        run_script("train_teacher", "--data", images, "--model", "SiT-XXS/4", "--batch", 4, "--interpolant", name,
                   *more, "--iters", 1, "--device", "cpu", "--out", out / name)
    return {"linear": small_teacher, **{name: out / name / "teacher.pt" for name in ("bridge", "vp")}}


@pytest.mark.parametrize("flags", [
    "linear --row direct --solver_steps 2", "vp --row freeflow", "bridge --row split --diagonal 0.5",
    "linear --row consistency --tangent jvp --cfg_scale 2 --cfg_interval 0.2 0.8",
    *(pytest.param(flags, marks=pytest.mark.slow) for flags in (
        "bridge --row lagrange --tangent jvp --borders 0.9", "vp --row meanflow", "bridge --row freeflow",
        "linear --row euler --tangent jvp --tangent_warmup 4", "linear --row meanflow", "vp --row shortcut",
        "linear --row lagrange --tangent jvp --compile", "bridge --row meanflow"))])
def test_runs_and_takes_steps(run, images, teachers, tmp_path, monkeypatch, flags):
    """Without a number that is not finite; the data-free rows open no data set."""
    kind, *flags = flags.split()
    real = torch.nn.Module.compile  # without the compiler, which takes a minute
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: real(net, backend="aot_eager"))
    data = () if flags[1] in ("freeflow", "direct") and kind != "bridge" else ("--data", images)
    said = run("flow_map", "--teacher_ckpt", teachers[kind], *data, *SMALL[2:], "--iters", 2, "--out", tmp_path, *flags)
    assert ("data-free" in said) == (not data) and "skipped" not in said and "nan" not in said
    assert (tmp_path / "flow_map_0000002.png").exists() and (tmp_path / "flow_map.json").exists()
    start = ("--reference", images) if kind == "bridge" else ()
    for more in ((), ("--steps", 4), ("--steps", 3, "--restart", 0.5)):
        run("sample", "--ckpt", tmp_path / "flow_map.pt", "--n", 3, "--device", "cpu", *start, *more, "--out",
            tmp_path / "s.npz")


def test_the_stage_before_is_the_average_that_a_stage_ended_with(run, images, small_teacher, tmp_path):
    def trained(iters):
        run("flow_map", "--teacher_ckpt", small_teacher, "--data", images, "--row", "progressive", "--grid", 4,
            "--stage_iters", 2, *SMALL[2:], "--iters", iters, "--out", tmp_path)
        return load_checkpoint(tmp_path / "flow_map.pt")
    ended, on = trained(2), trained(3)
    assert all(torch.equal(on["before"][name], weights) for name, weights in ended["ema"].items())
    assert any(not torch.equal(on["ema"][name], weights) for name, weights in ended["ema"].items())


def test_a_student_begins_as_the_map_it_starts_from(run, images, small_teacher, tmp_path, monkeypatch):
    given, legs_of_run = [], flow_map.make_legs
    monkeypatch.setattr(flow_map, "make_legs", lambda *args: given.append(args) or legs_of_run(*args))
    run("flow_map", "--teacher_ckpt", small_teacher, "--data", images, *SMALL[2:], "--iters", 2, "--lr", 0.01, "--out",
        tmp_path)
    assert all(net is not average for _, _, _, net, average, _ in given)
    run("distill", "--teacher_ckpt", small_teacher, "--student_ckpt", tmp_path / "flow_map.pt", *SMALL[2:],
        "--iters", 1, "--lr", 1e-12, "--out", tmp_path)
    known, begun = (load_checkpoint(tmp_path / name)[key] for name, key in (("flow_map.pt", "ema"),
                                                                             ("resume.pt", "student")))
    teacher = load_checkpoint(small_teacher)["ema"]
    assert all(torch.allclose(begun[name], value, atol=1e-7) for name, value in known.items())
    assert any(not torch.allclose(begun[name], value, atol=1e-4) for name, value in teacher.items())


def test_the_anchor_has_its_weight(run, images, small_teacher, tmp_path, monkeypatch):
    weights, loss = [], flow_map.regression_loss

    def check(problem, net, b):
        assert b.r is b.t  # where the map is the teacher
        return loss(problem, net, b)
    monkeypatch.setattr(flow_map, "regression_loss", check)
    for anchor in (0, 1, 3):
        run("flow_map", "--teacher_ckpt", small_teacher, "--data", images, "--anchor", anchor, *SMALL[2:], "--iters", 2,
            "--out", tmp_path / str(anchor))
        model = load_checkpoint(tmp_path / str(anchor) / "flow_map.pt")["model"]
        weights.append(torch.cat([w.flatten() for w in model.values()]))
    assert not any(torch.equal(a, b) for a, b in zip(weights, weights[1:]))


def test_a_teacher_learns_on_pairs(run, refused, small_teacher, tmp_path, monkeypatch):
    """sample.py writes the noise that an image came from; train_teacher.py joins each image to its own."""
    import train_teacher
    file, drawn = tmp_path / "p.npz", []
    run("sample", "--ckpt", small_teacher, "--n", 6, "--steps", 3, "--seed", 3, "--pairs", file, "--device", "cpu")
    pairs = np.load(file)
    assert pairs["noise"].dtype == np.float16
    net, config = load_model(small_teacher)
    b = Batch(x1=torch.from_numpy(pairs["noise"]).float(), y=torch.from_numpy(pairs["arr_1"]))
    again = solve(Problem(FAMILIES["linear"]), net, start_at(Problem(FAMILIES["linear"]), b._replace(z=b.x1), 1.0),
                  Sampler(3, "euler"))
    assert np.abs(to_uint8(again).astype(int) - pairs["arr_0"]).max() <= 1  # float16 is near enough
    monkeypatch.setattr(train_teacher, "regression_loss", lambda problem, net, b: drawn.append(b) or (
        regression_loss(problem, net, b)))
    run("train_teacher", "--pairs", file, *SMALL, "--batch", 3, "--iters", 2, "--out", tmp_path)
    for x0, x1 in zip(torch.cat([b.x0 for b in drawn]), torch.cat([b.x1 for b in drawn])):
        i = (x0 - to_device(pairs["arr_0"], "cpu")).flatten(1).abs().amax(1).argmin()
        assert torch.equal(x1, torch.from_numpy(pairs["noise"][i]).float())
    refused("train_teacher", "--pairs", file, "--interpolant", "vp", *SMALL, "--out", tmp_path / "q", says="linear")


@pytest.mark.parametrize("classes", [("cat", "dog", "fox"), None])
def test_pairs_keep_the_teachers_classes(run, refused, small_teacher, tmp_path, classes):
    """Their names, how many have none of the images, or that there are none."""
    state, table = load_checkpoint(small_teacher), "y_embedder.embedding_table.weight"
    n, file, tiny = len(classes or ()), tmp_path / "p.npz", ("--batch", 3, "--iters", 1, "--device", "cpu")
    state["ema"][table] = state["ema"][table][:n + 1]
    state["config"]["network"]["num_classes"] = n
    state["config"].update(classes=list(classes or ()), class_counts=[5] * n)
    save_checkpoint(tmp_path / "t.pt", state)
    for words in (("sample", "--ckpt", tmp_path / "t.pt", "--steps", 1, "--n", 6, "--pairs", file, *tiny[4:],
                   *("--labels", "cat,fox") * bool(n)),
                  ("train_teacher", "--pairs", file, "--model", "SiT-XXS/4", *tiny, "--out", tmp_path),
                  ("flow_map", "--teacher_ckpt", tmp_path / "teacher.pt", *tiny, "--out", tmp_path)):
        run(*words)
    for job, *more in (("distill",), ("flow_map", "--data", "digits")):
        refused(job, "--teacher_ckpt", tmp_path / "teacher.pt", *more, *tiny, says=("learnt on pairs", *more))
    config = load_model(tmp_path / "teacher.pt")[1]
    assert config["network"]["num_classes"] == n
    assert (tuple(config["classes"]), config["class_counts"]) == (classes, [3, 0, 3]) if n else "classes" not in config
