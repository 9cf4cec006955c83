"""The path: derivatives, conversions, solvers. Everything here has a closed form."""
import math

import pytest
import torch

from interpolants import (DIFFUSIONS, FAMILIES, PREDICTIONS, Interpolant, check_log_snr, coefficients, convert, interpolate,
                          preconditioning, solve, target, time_grid, time_of_noise_ratio, unit_ratio)

ROWS = sorted(FAMILIES)
T = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("sees_x1", [False, True])
def test_derivatives_are_those_of_finite_differences(row, sees_x1):
    h, path = 1e-6, FAMILIES[row]
    if sees_x1 and row != "bridge":
        pytest.skip("gamma = 0: nothing is left of the Gaussian part once x1 is known")
    k, ahead, behind = (coefficients(path, T + d, sees_x1=sees_x1) for d in (0, h, -h))
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


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("sees_x1", [False, True])
@pytest.mark.parametrize("source", PREDICTIONS)
def test_conversions_agree_with_the_targets(row, sees_x1, source):
    """Where x_t is made from one (x0, noise), every prediction's target is a view of it, so each converts into each."""
    path = FAMILIES[row]
    if sees_x1 and row != "bridge":
        pytest.skip("gamma = 0")
    x0, x1, z = draw(3, 19, 1, 2, 2)
    if not sees_x1 and row == "bridge":
        k = coefficients(path, T, 4)  # only beta x1 + gamma z is visible: give x1 all of it
        x1, z = (x1 * k.beta + k.gamma * z) / k.s, None
        noise, x_t = x1, k.alpha * x0 + k.s * x1
        targets = {"data": x0, "noise": noise, "score": -noise / k.s, "velocity": k.dalpha * x0 + k.ds * noise}
    else:
        x_t, _ = interpolate(path, x0, x1, T, z)
        targets = {p: target(path, p, x0, x1, T, z, sees_x1) for p in PREDICTIONS}
    for to in PREDICTIONS:
        got = convert(path, targets[source], source, to, x_t, T, x1 if sees_x1 else None)
        torch.testing.assert_close(got, targets[to], rtol=1e-7, atol=1e-7)


def test_conversion_of_an_unknown_prediction_raises():
    with pytest.raises(ValueError, match="epsilon"):
        convert(FAMILIES["linear"], draw(1, 1, 1, 1), "epsilon", "data", draw(1, 1, 1, 1), torch.tensor([0.5]))


@pytest.mark.parametrize("row", ROWS)
def test_unit_ratio_turns_data_differences_into_velocity_differences(row):
    path = FAMILIES[row]
    a, b, x_t = draw(3, 19, 1, 1, 1)
    difference = convert(path, a, "data", "velocity", x_t, T) - convert(path, b, "data", "velocity", x_t, T)
    torch.testing.assert_close(difference, unit_ratio(path, T, 4) * (a - b), rtol=1e-7, atol=1e-9)


def test_log_snr_falls_on_every_row_and_the_check_refuses_the_reverse():
    for row in ROWS:
        check_log_snr(FAMILIES[row])
    with pytest.raises(ValueError, match="SNR"):
        check_log_snr(Interpolant(lambda t: t, lambda t: 1 - t))
    with pytest.raises(ValueError, match="alpha"):  # SNR falls, but the data grow with t
        check_log_snr(Interpolant(lambda t: 1 + t, lambda t: t ** 2 + 3 * t))


@pytest.mark.parametrize("row", ROWS)
def test_noise_ratios_carry_over_between_rows(row):
    t = torch.tensor([time_of_noise_ratio(FAMILIES[row], 2.5)], dtype=torch.float64)
    k = coefficients(FAMILIES[row], t)
    assert float(k.s / k.alpha) == pytest.approx(2.5, rel=1e-4)


def test_noise_ratio_of_the_linear_path_is_known():
    assert time_of_noise_ratio(FAMILIES["linear"], 2.5) == pytest.approx(5 / 7, abs=1e-5)


@pytest.mark.parametrize("row", ROWS)
def test_preconditioned_data_prediction_is_exact_for_gaussian_data(row):
    """For data of std sigma_d the optimal data prediction is c_skip x_t, and c_in x_t has unit size."""
    c_in, c_skip, c_out = (torch.tensor(c, dtype=torch.float64) for c in preconditioning(FAMILIES[row], 101))
    k = coefficients(FAMILIES[row], torch.linspace(0, 1, 101, dtype=torch.float64))
    variance = 0.25 * k.alpha ** 2 + k.s ** 2
    torch.testing.assert_close(c_in ** 2 * variance, torch.ones_like(c_in))
    torch.testing.assert_close(c_skip, 0.25 * k.alpha / variance)
    torch.testing.assert_close(c_out ** 2, 0.25 - c_skip ** 2 * variance, rtol=1e-4, atol=1e-7)  # what the posterior leaves


# ---------------------------------------------------------------------------------------------------------------------
# Solvers, on data N(mean, std^2), whose exact predictions are affine in x_t

MEAN, STD = 0.3, 0.4


def exact(path, prediction):
    def net(x, t):
        k = coefficients(path, t, x.ndim)
        gain = k.alpha * STD ** 2 / (k.alpha ** 2 * STD ** 2 + k.s ** 2)
        return convert(path, MEAN + gain * (x - k.alpha * MEAN), "data", prediction, x, t)
    return net


def start(path, prediction, steps, n=4, seed=0):
    k = coefficients(path, time_grid(path, steps, prediction)[:1], 4)
    noise = draw(n, 1, 1, 1, seed=seed).float()
    return noise, (k.alpha.float() * MEAN + (k.alpha ** 2 * STD ** 2 + k.s ** 2).sqrt().float() * noise)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("solver, calls", [("euler", 7), ("heun", 13), ("sde", 7)])
def test_steps_are_intervals(row, solver, calls):
    path, seen = FAMILIES[row], []
    net = exact(path, "data")
    solve(path, lambda x, t: seen.append(float(t[0])) or net(x, t), draw(2, 1, 1, 1).float(), 7, solver, "data",
          noise=lambda i: draw(2, 1, 1, 1, seed=i).float())
    assert len(seen) == calls and min(seen) > 0
    assert len(time_grid(path, 7)) == 8


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_grid_starts_where_the_velocity_exists(row, prediction):
    path = FAMILIES[row]
    grid = time_grid(path, 4, prediction)
    assert grid[-1] == 0 and grid[0] in (1.0, 0.999)
    x = draw(1, 1, 1, 1)
    assert bool(convert(path, x, prediction, "velocity", 2 * x, grid[:1]).isfinite().all())


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ode_carries_the_reference_to_the_data(row, prediction):
    """The flow between Gaussians is affine: x0 = mean + std noise."""
    path = FAMILIES[row]
    noise, x = start(path, prediction, 400)
    for solver in ("euler", "heun"):
        x0 = solve(path, exact(path, prediction), x, 400, solver, prediction)
        torch.testing.assert_close(x0, MEAN + STD * noise, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_orders_of_the_solvers(solver, order):
    """On gvp, smooth in t, halving the step divides the error by 2^order (the last interval's data prediction is of order 2)."""
    path = FAMILIES["gvp"]
    errors = []
    for steps in (20, 40):
        noise, x = start(path, "velocity", steps)
        net = exact(path, "velocity")
        x0 = solve(path, lambda x, t: net(x.double(), t.double()), x.double(), steps, solver)
        errors.append(float((x0 - (MEAN + STD * noise)).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("row", ["linear", "vp", "gvp", "bridge"])
@pytest.mark.parametrize("diffusion", sorted(DIFFUSIONS))
def test_sde_has_the_same_marginals(row, diffusion):
    path = FAMILIES[row]
    _, x = start(path, "data", 200, n=4000)
    x0 = solve(path, exact(path, "data"), x, 200, "sde", "data", diffusion,
               noise=lambda i: draw(4000, 1, 1, 1, seed=i + 1).float())
    # The last interval ends at the data prediction, which lacks the posterior's spread, s(t_last)^2 at most.
    last = coefficients(path, time_grid(path, 200)[-2:-1]).s
    assert float(x0.mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(x0.std()) == pytest.approx(STD, abs=0.04 + float(last) ** 2)


def test_bad_steps_and_solvers_raise():
    for steps in (0, -1, 2.5):
        with pytest.raises(ValueError, match="steps"):
            time_grid(FAMILIES["linear"], steps)
    with pytest.raises(ValueError, match="rk45"):
        solve(FAMILIES["linear"], None, draw(1, 1, 1, 1), 2, "rk45")


def test_a_family_is_one_row():
    """A new row needs nothing but its three functions: here a path with a bump of noise on the way."""
    path = Interpolant(lambda t: 1 - t ** 2, lambda t: t ** 2, lambda t: 0.1 * (math.pi * t).sin())
    check_log_snr(path, 0.01, 0.99)
    noise, x = start(path, "velocity", 200)
    x0 = solve(path, exact(path, "velocity"), x, 200, "heun")
    torch.testing.assert_close(x0, MEAN + STD * noise, rtol=0.05, atol=0.02)


def test_euler_on_ve_steps_in_sigma():
    """EDM's first-order sampler, written out: 50 steps keep the data's spread, which Euler in t would shrink by a third."""
    path = FAMILIES["ve"]
    noise, x = start(path, "data", 50, n=500)
    x0 = solve(path, exact(path, "data"), x, 50, "euler", "data")
    sigma, by_hand = coefficients(path, time_grid(path, 50)).s, x
    for i in range(50):
        denoised = exact(path, "data")(by_hand, time_grid(path, 50)[i].float().expand(500))
        last = i == 49  # to sigma = 0
        by_hand = denoised if last else by_hand + (sigma[i + 1] - sigma[i]).float() * (by_hand - denoised) / sigma[i].float()
    torch.testing.assert_close(x0, by_hand, rtol=1e-3, atol=1e-4)
    assert float(x0.std()) == pytest.approx(float((MEAN + STD * noise).std()), rel=0.1)
