"""The path: derivatives, conversions, solvers. Everything here has a closed form."""
import math

import pytest
import torch

from interpolants import (DIFFUSIONS, FAMILIES, PREDICTIONS, SOLVERS, Batch, Interpolant, Problem, Sampler,
                          check_log_snr, coefficients, convert, interpolate, last_time, preconditioning,
                          prediction_scale, regression_loss, solve, target, time_grid, time_of_noise_ratio)

ROWS = sorted(FAMILIES)
SEEN = [*((row, False) for row in ROWS), ("bridge", True)]  # only gamma leaves something to predict once x1 is known
T = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("row, sees_x1", SEEN)
def test_derivatives_are_those_of_finite_differences(row, sees_x1):
    h, problem = 1e-6, Problem(FAMILIES[row], sees_x1=sees_x1)
    k, ahead, behind = (problem.at(T + d) for d in (0, h, -h))
    for name in ("alpha", "beta", "gamma", "s"):
        slope = (getattr(ahead, name) - getattr(behind, name)) / (2 * h)
        torch.testing.assert_close(getattr(k, "d" + name), slope, rtol=1e-5, atol=1e-7)


def test_rows_are_the_published_schedules():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    vp, ve, gvp = (coefficients(FAMILIES[r], t) for r in ("vp", "ve", "gvp"))
    abar = torch.exp(-(0.1 * t + 0.5 * 19.9 * t ** 2))  # beta from 0.1 to 20
    torch.testing.assert_close(vp.alpha, abar.sqrt())
    torch.testing.assert_close(vp.beta, (1 - abar).sqrt(), atol=1e-12, rtol=1e-9)
    assert ve.beta[0] == pytest.approx(0.002) and ve.beta[2] == pytest.approx(80.0)
    torch.testing.assert_close(gvp.alpha ** 2 + gvp.beta ** 2, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("row", ROWS)
def test_velocity_is_the_time_derivative_of_x_t(row):
    x0, x1, z = draw(3, 19, 1, 2, 2)
    h, path = 1e-6, FAMILIES[row]
    _, velocity = interpolate(path, x0, x1, T, z)
    slope = (interpolate(path, x0, x1, T + h, z)[0] - interpolate(path, x0, x1, T - h, z)[0]) / (2 * h)
    torch.testing.assert_close(velocity, slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row, sees_x1", SEEN)
@pytest.mark.parametrize("source", PREDICTIONS)
def test_conversions_agree_with_the_targets(row, sees_x1, source):
    """Where x_t is made from one (x0, noise), every prediction's target is a view of it, so each converts into each."""
    problem = Problem(FAMILIES[row], source, sees_x1)
    b, velocity = problem.noised(Batch(*draw(3, 19, 1, 2, 2), T))
    if problem.path.noisy and not sees_x1:  # only beta x1 + gamma z is visible: the noise is all of it
        k = problem.at(T, 4)
        noise = (k.beta * b.x1 + k.gamma * b.z) / k.s
        targets = {"data": b.x0, "noise": noise, "score": -noise / k.s, "velocity": k.dalpha * b.x0 + k.ds * noise}
    else:
        targets = {name: target(problem._replace(prediction=name), b, velocity) for name in PREDICTIONS}
    for to in PREDICTIONS:
        torch.testing.assert_close(convert(problem, targets[source], to, b), targets[to], rtol=1e-7, atol=1e-7)


def test_unit_ratio_turns_data_differences_into_velocity_differences():
    """c = alpha' - alpha s'/s, as docs/formula.md writes it for each path."""
    log_ve = torch.log(FAMILIES["ve"].beta(T + 1e-6) / FAMILIES["ve"].beta(T - 1e-6)) / 2e-6
    gvp = -math.pi / 2 / (math.pi / 2 * T).sin()
    for row, c in (("linear", -1 / T), ("gvp", gvp), ("ve", -log_ve), ("bridge", -0.5 / T)):
        problem = Problem(FAMILIES[row], sees_x1=row == "bridge")
        torch.testing.assert_close(prediction_scale(problem, "velocity", T, 1), c)


@pytest.mark.parametrize("row, sees_x1", SEEN)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_differences_of_predictions_scale_as_stated(row, sees_x1, prediction):
    problem = Problem(FAMILIES[row], "data", sees_x1)
    one, two, x_t, x1 = draw(4, 19, 1, 2, 2)
    a, b = (convert(problem, x0, prediction, Batch(x1=x1, t=T, x_t=x_t)) for x0 in (one, two))
    torch.testing.assert_close(a - b, prediction_scale(problem, prediction, T) * (one - two), rtol=1e-7, atol=1e-9)


def test_log_snr_falls_on_every_row_and_the_check_refuses_the_reverse():
    for row, sees_x1 in SEEN:
        check_log_snr(Problem(FAMILIES[row], sees_x1=sees_x1))
    with pytest.raises(ValueError, match="SNR"):
        check_log_snr(Problem(Interpolant(lambda t: t, lambda t: 1 - t)))
    with pytest.raises(ValueError, match="alpha"):  # SNR falls, but the data grow with t
        check_log_snr(Problem(Interpolant(lambda t: 1 + t, lambda t: t ** 2 + 3 * t)))


@pytest.mark.parametrize("row, sees_x1", SEEN)
def test_noise_ratios_carry_over_between_rows(row, sees_x1):
    problem = Problem(FAMILIES[row], sees_x1=sees_x1)
    t = time_of_noise_ratio(problem, 2.5)
    k = problem.at(torch.tensor([t], dtype=torch.float64))
    assert float(k.s / k.alpha) == pytest.approx(2.5, rel=1e-4)
    assert row != "linear" or t == pytest.approx(5 / 7, abs=1e-5)


@pytest.mark.parametrize("row", ROWS)
def test_preconditioned_data_prediction_is_exact_for_gaussian_data(row):
    """For data of std sigma_d the optimal data prediction is c_skip x_t, and c_in x_t has unit size."""
    c_in, c_skip, c_out = (torch.tensor(c, dtype=torch.float64) for c in preconditioning(FAMILIES[row], points=101))
    k = coefficients(FAMILIES[row], torch.linspace(0, 1, 101, dtype=torch.float64))
    variance = 0.25 * k.alpha ** 2 + k.s ** 2
    torch.testing.assert_close(c_in ** 2 * variance, torch.ones_like(c_in))
    torch.testing.assert_close(c_skip, 0.25 * k.alpha / variance)
    torch.testing.assert_close(c_out ** 2, 0.25 - c_skip ** 2 * variance, rtol=1e-4, atol=1e-7)  # the posterior's
    assert preconditioning(FAMILIES[row], False, 101) == [c_in.tolist(), [0] * 101, [1] * 101]


@pytest.mark.parametrize("row, prediction", [("linear", "velocity"), ("vp", "noise"), ("gvp", "score"), ("ve", "data"),
                                             ("ve", "edm"), ("linear", "data")])
def test_regression_in_any_prediction_is_a_weighted_data_loss(row, prediction):
    """A network wrong by d in x0 has the loss w |d|^2: w is c^2, the SNR, for data EDM's or the SNR from 1 to 5."""
    edm, prediction = prediction == "edm", prediction.replace("edm", "data")
    problem = Problem(FAMILIES[row], prediction, edm=edm)
    b, d = Batch(*draw(3, 19, 1, 2, 2), T), draw(19, 1, 2, 2, seed=1)
    k, c = problem.at(T), prediction_scale(problem, "velocity", T, 1)
    snr = (k.alpha / k.s) ** 2
    data = (k.s ** 2 + 0.25) / (0.5 * k.s) ** 2 if edm else snr.clamp(1, 5)
    weight = {"velocity": c ** 2, "noise": snr, "score": snr, "data": data}[prediction]

    def net(x_t, t, y):
        return convert(problem._replace(prediction="data"), b.x0 + d, prediction, Batch(t=t, x_t=x_t))
    expected = weight * d.square().mean((1, 2, 3))
    torch.testing.assert_close(regression_loss(problem, net, b).double(), expected, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# Solvers, on data N(mean, std^2), whose exact predictions are affine in x_t

MEAN, STD = 0.3, 0.4


def gaussian(problem, mean, std):
    """The exact network for data N(mean, std^2)."""
    def net(x_t, t, y=None, x1=None):
        k = problem.at(t, x_t.ndim)
        r = x_t - k.beta * x1 if problem.sees_x1 else x_t
        gain = k.alpha * std ** 2 / (k.alpha ** 2 * std ** 2 + k.s ** 2)
        x0 = mean + gain * (r - k.alpha * mean)
        return convert(problem._replace(prediction="data"), x0, problem.prediction, Batch(x1=x1, t=t, x_t=x_t))
    return net


def flow(problem, steps, solver, n=4, diffusion="sigma"):
    """-> samples from x_t at the grid's first time, and the mean + std noise that the affine flow makes of them."""
    k = problem.at(time_grid(problem, steps)[:1], 4)
    noise = draw(n, 1, 1, 1).float()
    x = (k.alpha * MEAN + (k.alpha ** 2 * STD ** 2 + k.s ** 2).sqrt() * noise).float()
    x0 = solve(problem, gaussian(problem, MEAN, STD), Batch(x_t=x), Sampler(steps, solver, diffusion),
               lambda i: draw(n, 1, 1, 1, seed=i + 1).float())
    return x0, MEAN + STD * noise


@pytest.mark.parametrize("row", ROWS)
def test_steps_are_intervals_and_begin_where_the_velocity_exists(row):
    x = draw(2, 1, 1, 1).float()
    for solver, calls in (("euler", 7), ("heun", 13), ("sde", 7)):
        problem, seen = Problem(FAMILIES[row], "data"), []
        solve(problem, lambda x, t, y: seen.append(float(t[0])) or x, Batch(x_t=x), Sampler(7, solver), lambda i: x)
        assert len(seen) == calls and min(seen) > 0
    for problem in (Problem(FAMILIES[row], prediction) for prediction in PREDICTIONS):
        grid = time_grid(problem, 7)
        assert len(grid) == 8 and grid[-1] == 0 and min(abs(grid[0] - 1), abs(grid[0] - 0.999)) < 1e-15
        v = convert(problem, x, "velocity", Batch(t=grid[:1].expand(2), x_t=2 * x))
        assert bool((v.abs() < 1e5).all())  # on gvp cos(pi/2) is not quite 0


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("alpha, beta", [(lambda t: (1 - t) ** 2 * (1 + 2 * t), lambda t: t ** 2 * (3 - 2 * t)),
                                         (lambda t: (math.pi / 2 * t).cos() ** 2, lambda t: (math.pi / 2 * t).sin())])
def test_where_velocities_say_nothing_of_the_data_nobody_starts(alpha, beta, solver):
    """alpha and alpha' are 0 at t = 1: solvers begin below it, flow maps where noise is 50 times the data."""
    problem = Problem(Interpolant(alpha, beta))
    x0, _ = flow(problem, 100, solver, 4000)
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.03) and float(x0.std()) == pytest.approx(STD, abs=0.03)
    k = problem.at(torch.tensor([last_time(problem)], dtype=torch.float64))
    assert float(k.s / k.alpha) == pytest.approx(50, rel=1e-3)


@pytest.mark.parametrize("row, prediction", [*((row, FAMILIES[row].predict.replace("edm", "data")) for row in ROWS),
                                             *(("linear", prediction) for prediction in PREDICTIONS[1:])])
@pytest.mark.parametrize("solver, steps", [("euler", 100), ("heun", 60)])
def test_ode_carries_the_reference_to_the_data(row, prediction, solver, steps):
    torch.testing.assert_close(*flow(Problem(FAMILIES[row], prediction), steps, solver), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("row", ["gvp", "bridge"])
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_orders_of_the_solvers(row, solver, order):
    """On gvp, smooth in t, and a bridge from noise, smooth in u, halving the step divides the error by 2^order (the
    last interval's end is of order 2)."""
    problem, noise, errors = Problem(FAMILIES[row]), draw(4, 1, 1, 1), []
    net = gaussian(problem, MEAN, STD)
    for steps in (20, 40):  # from alpha(1) = 0
        x0 = solve(problem, lambda x, t, y: net(x, t.double()), Batch(x_t=noise), Sampler(steps, solver))
        errors.append(float((x0 - (MEAN + STD * noise)).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("row, diffusion", [*(("linear", name) for name in sorted(DIFFUSIONS)), ("vp", "sbdm"),
                                            ("gvp", "sigma"), ("ve", "sigma"), ("bridge", "constant")])
def test_sde_has_the_same_marginals(row, diffusion):
    problem = Problem(FAMILIES[row], "data")
    x0, _ = flow(problem, 80, "sde", 4000, diffusion)
    # The last interval ends at the data prediction, which lacks the posterior's spread, s(t_last)^2 at most.
    last = float(problem.at(time_grid(problem, 80)[-2:-1]).s)
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x0.std()) == pytest.approx(STD, abs=0.02 + last ** 2)


def test_sbdm_is_the_forward_sdes_diffusion():
    torch.testing.assert_close(DIFFUSIONS["sbdm"](Problem(FAMILIES["vp"]).at(T)), 0.1 + 19.9 * T)  # its beta(t)


def test_unknown_names_and_bad_steps_raise():
    x, problem = draw(1, 1, 1, 1), Problem(FAMILIES["linear"])
    for steps, solver, prediction, says in ((0, "euler", "data", "steps"), (2.5, "euler", "data", "steps"),
                                            (2, "rk45", "data", "rk45"), (2, "euler", "epsilon", "epsilon")):
        with pytest.raises(ValueError, match=says):
            solve(problem._replace(prediction=prediction), lambda x, t, y: x, Batch(x_t=x), Sampler(steps, solver))


def test_a_family_is_one_row():
    """A new row needs nothing but its three functions: here a path with a bump of noise on the way."""
    problem = Problem(Interpolant(lambda t: 1 - t ** 2, lambda t: t ** 2, lambda t: 0.1 * (math.pi * t).sin()))
    check_log_snr(problem, 0.01, 0.99)
    torch.testing.assert_close(*flow(problem, 100, "heun"), rtol=0.05, atol=0.02)


def test_a_row_may_give_a_number():
    for gamma in (lambda t: 0.5, lambda t: 0.5 + 0 * t):
        k = coefficients(Interpolant(lambda t: 1.0, lambda t: t, gamma), T, 4)
        assert all(c.shape == (19, 1, 1, 1) for c in k) and not (k.dalpha.any() or k.dgamma.any())
        torch.testing.assert_close(k.s.flatten(), torch.hypot(T, torch.full_like(T, 0.5)))


def test_euler_on_ve_steps_in_sigma():
    """EDM's first-order sampler, written out: 50 steps keep the data's spread, which Euler in t would shrink."""
    problem = Problem(FAMILIES["ve"], "data")
    x0, exact = flow(problem, 50, "euler", 500)
    grid = time_grid(problem, 50)
    sigma = [*problem.at(grid).s[:-1].tolist(), 0]
    x = MEAN + (STD ** 2 + sigma[0] ** 2) ** 0.5 * (exact - MEAN) / STD
    for i in range(50):
        denoised = gaussian(problem, MEAN, STD)(x, grid[i].float().expand(500))
        x = x + (sigma[i + 1] - sigma[i]) * (x - denoised) / sigma[i]
    torch.testing.assert_close(x0, x, rtol=1e-3, atol=1e-4)
    assert float(x0.std()) == pytest.approx(float(exact.std()), rel=0.1)
