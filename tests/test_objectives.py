"""The formula: facts 1 to 8 of the objectives, with closed-form networks in one dimension.

Data N(M, S^2), student x0 = a + b xi. Every posterior is Gaussian, so v*, the exact critic and the divergence are known, and
Gauss-Hermite quadrature takes expectations over (xi, x1, z) exactly: all integrands are polynomials.
"""
import itertools

import numpy as np
import pytest
import torch

from distill import OBJECTIVES, check_objective, gap_loss, generator_loss, sample_weight
from interpolants import FAMILIES, Interpolant, coefficients, convert, interpolate, unit_ratio
from model import UserError

M, S = 0.3, 0.5
ROWS = sorted(FAMILIES)
NOISE_ROWS = [row for row in ROWS if row != "bridge"]
TIMES = (0.1, 0.35, 0.6, 0.9)

_nodes, _weights = np.polynomial.hermite_e.hermegauss(6)
_points = list(itertools.product(range(6), repeat=3))
XI, X1, Z = (torch.tensor([[[[_nodes[p[d]]]]] for p in _points], dtype=torch.float64) for d in range(3))  # each (216,1,1,1)
W = torch.tensor([np.prod(_weights[list(p)]) for p in _points], dtype=torch.float64)
W = W / W.sum()


def expectation(values):
    return (W * values).sum()


def posterior(path, mean, std, prediction="velocity"):
    """The exact network for data N(mean, std^2), as (x_t, t, y) -> prediction."""
    def net(x, t, y=None):
        k = coefficients(path, t, x.ndim)
        gain = k.alpha * std ** 2 / (k.alpha ** 2 * std ** 2 + k.s ** 2)
        return convert(path, mean + gain * (x - k.alpha * mean), "data", prediction, x, t)
    return net


def student(a=-0.2, b=0.8):
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, b))
    return a, b, a + b * XI


def times(t):
    return torch.full((len(XI),), t, dtype=torch.float64)


def student_loss(row, t, x0, critic, prediction="velocity", **knobs):
    path = FAMILIES[row] if isinstance(row, str) else row
    knobs = {**OBJECTIVES["gap"], **knobs}
    teacher = posterior(path, M, S, prediction)
    return generator_loss(path, prediction, teacher, critic, x0, X1, Z, times(t), None, **knobs)


def gradients(loss, *parameters):
    return torch.stack([g if g is not None else torch.zeros(()).double()
                        for g in torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)])


@pytest.mark.parametrize("row", ROWS)
def test_fact_1_the_gap_is_one_number_in_three_forms(row):
    path = FAMILIES[row]
    _, _, x0 = student()
    critic = posterior(path, 0.1, 0.7)
    for t in TIMES:
        loss, D2 = student_loss(row, t, x0, critic)
        x_t, target = interpolate(path, x0, X1, times(t), Z)
        star, psi = posterior(path, M, S)(x_t, times(t)), critic(x_t, times(t))
        errors = ((star - target) ** 2 - (psi - target) ** 2).flatten()
        D = star - psi
        cross = (star ** 2 - psi ** 2 - 2 * D * target).flatten()
        torch.testing.assert_close(loss, errors)
        torch.testing.assert_close(loss, cross)
        torch.testing.assert_close(D2, (D ** 2).detach().flatten())


@pytest.mark.parametrize("row", NOISE_ROWS)  # a bridge that does not see x1 has it in expectation only: I' holds x1 and z
@pytest.mark.parametrize("prediction", ["velocity", "data", "noise", "score"])
def test_fact_2_sid_with_a_half_is_half_the_gap(row, prediction):
    """SiD as its paper writes it: (1 - a) |D^|^2 + <D^, x0_psi - x0>, weighted with c^2, against gap / 2, in value and gradient."""
    path = FAMILIES[row]
    critic = posterior(path, 0.1, 0.7, prediction)
    for t in TIMES:
        a, b, x0 = student()
        gap, _ = student_loss(row, t, x0, critic, prediction)
        sid, _ = student_loss(row, t, x0, critic, prediction, kappa=2 * (1 - 0.5), units="data")
        c2 = unit_ratio(path, times(t)) ** 2
        written = 0.5 * c2 * sid
        torch.testing.assert_close(written, 0.5 * gap)
        torch.testing.assert_close(gradients(expectation(written), a, b), gradients(expectation(0.5 * gap), a, b))
    x_t, _ = interpolate(path, x0, X1, times(t), Z)
    to_data = [convert(path, net(x_t, times(t)), prediction, "data", x_t, times(t)) for net in (posterior(path, M, S, prediction), critic)]
    difference = to_data[0] - to_data[1]
    paper = ((1 - 0.5) * difference ** 2 + difference * (to_data[1] - x0)).flatten()
    torch.testing.assert_close(paper, 0.5 * sid)


@pytest.mark.parametrize("row", ROWS)
def test_fact_3_stop_is_dmds_gradient_whatever_kappa(row):
    path = FAMILIES[row]
    critic = posterior(path, 0.1, 0.7)
    for t in TIMES:
        a, b, x0 = student()
        found = [gradients(expectation(student_loss(row, t, x0, critic, kappa=kappa, grad="stop")[0]), a, b) for kappa in (1.0, -7.0)]
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
        x_t, _ = interpolate(path, x0, X1, times(t), Z)
        k = coefficients(path, times(t), 4)
        slope = 2 * (k.dalpha / k.alpha - k.ds / k.s)  # lambda', lambda = log(alpha^2 / s^2)
        s_star, s_psi = posterior(path, M, S, "score")(x_t, times(t)), posterior(path, 0.1, 0.7, "score")(x_t, times(t))
        dmd = (k.dalpha * k.s ** 2 * slope * (s_psi - s_star)).detach()
        torch.testing.assert_close(found[0], gradients(expectation((dmd * x0).flatten()), a, b), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("row", ROWS)
def test_fact_4_with_the_exact_critic_the_gradient_is_that_of_the_divergence(row):
    """The critic is frozen at the optimum for this student, yet the gradient is the total one of E|v* - v_student|^2, in which
    the student's velocity moves with (a, b)."""
    path = FAMILIES[row]
    for t in TIMES:
        a, b, x0 = student()
        frozen = posterior(path, a.detach(), b.detach())
        gap = expectation(student_loss(row, t, x0, frozen)[0])
        x_t, _ = interpolate(path, x0, X1, times(t), Z)
        divergence = expectation(((posterior(path, M, S)(x_t, times(t)) - posterior(path, a, b)(x_t, times(t))) ** 2).flatten())
        torch.testing.assert_close(gap, divergence)
        torch.testing.assert_close(gradients(gap, a, b), gradients(divergence, a, b), rtol=1e-7, atol=1e-9)
        assert divergence.item() > 0


def test_fact_4_the_divergence_vanishes_only_at_the_data():
    path = FAMILIES["linear"]
    a, b, x0 = student(M, S)
    loss = expectation(student_loss("linear", 0.5, x0, posterior(path, M, S))[0])
    assert abs(loss.item()) < 1e-12
    torch.testing.assert_close(gradients(loss, a, b), torch.zeros(2).double(), atol=1e-12, rtol=0)


def realuid(path, t, delta, x0, data, alpha_r, beta_r):
    """RealUID (arXiv:2509.22459) with delta as a function of x_t, in quadrature over student and data."""
    total = 0
    for sample, p, q in ((x0, alpha_r, beta_r), (data, 1 - alpha_r, 1 - beta_r)):
        x_t, velocity = interpolate(path, sample, X1, times(t), Z)
        d, star = delta(x_t), posterior(path, M, S)(x_t, times(t))
        total = total + expectation((-p * d ** 2 + 2 * p * d * star - 2 * q * d * velocity).flatten())
    return total


@pytest.mark.parametrize("row", ROWS)
def test_fact_5_realuid_holds_the_gap_and_rests_at_the_data(row):
    path, t = FAMILIES[row], 0.4
    _, _, x0 = student()
    data = M + S * XI
    critic = posterior(path, 0.1, 0.7)
    gap = expectation(student_loss(row, t, x0, critic)[0])
    written = realuid(path, t, lambda x: posterior(path, M, S)(x, times(t)) - critic(x, times(t)), x0, data, 1.0, 1.0)
    torch.testing.assert_close(written, gap)
    # At student = data, delta = 0 maximises over all affine delta, whatever alpha and beta.
    for alpha_r, beta_r in ((1.0, 1.0), (0.9, 0.88), (0.85, 1.0), (1.0, 0.9)):
        p, q = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
        value = realuid(path, t, lambda x: p + q * x, data, data, alpha_r, beta_r)
        torch.testing.assert_close(gradients(value, p, q), torch.zeros(2).double(), atol=1e-9, rtol=0)
        moved = realuid(path, t, lambda x: 0.1 - 0.2 * x, data, data, alpha_r, beta_r)
        assert float(moved.detach()) < float(value.detach())


def test_fact_6_units_of_a_bridge_that_sees_x1():
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    torch.testing.assert_close(unit_ratio(FAMILIES["bridge"], t, sees_x1=True), -1 / (2 * t))


def test_fact_7_ve_gives_stop_in_velocity_units_no_gradient_and_is_refused():
    a, b, x0 = student()
    critic = posterior(FAMILIES["ve"], 0.1, 0.7)
    nothing = gradients(expectation(student_loss("ve", 0.4, x0, critic, grad="stop")[0]), a, b)
    assert nothing.abs().max() == 0
    something = gradients(expectation(student_loss("ve", 0.4, x0, critic, grad="stop", units="data")[0]), a, b)
    assert something.abs().min() > 0
    with pytest.raises(UserError, match="--units data"):
        check_objective(FAMILIES["ve"], "stop", "velocity")
    check_objective(FAMILIES["ve"], "stop", "data")
    check_objective(FAMILIES["ve"], "full", "velocity")


def test_fact_8_stop_is_refused_where_the_snr_does_not_fall():
    backwards = Interpolant(lambda t: t, lambda t: 1 - t)
    with pytest.raises(UserError, match="--grad full"):
        check_objective(backwards, "stop", "velocity")
    check_objective(backwards, "full", "velocity")
    for row in ("linear", "vp", "gvp", "bridge"):
        check_objective(FAMILIES[row], "stop", "velocity")


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("row", ROWS)
def test_every_objective_moves_the_student_towards_the_data(row, objective):
    """With the exact critic, one small step along -gradient lowers the KL divergence of the student to the data."""
    if row == "ve" and objective == "cross":
        pytest.skip("fact 7")
    path = FAMILIES[row]

    def divergence(a, b):
        return float(torch.log(S / b) + (b ** 2 + (a - M) ** 2) / (2 * S ** 2))
    a, b, x0 = student(-0.2, 0.8)
    critic = posterior(path, a.detach(), b.detach())
    total = sum(expectation(student_loss(row, t, x0, critic, **OBJECTIVES[objective])[0]) for t in (0.3, 0.5, 0.7))
    step = gradients(total, a, b)
    step = 0.02 * step / step.norm()
    assert divergence(a.detach() - step[0], b.detach() - step[1]) < divergence(a.detach(), b.detach())


def test_weights_are_per_sample_and_carry_no_gradient():
    x0 = torch.randn(3, 2, 4, 4, requires_grad=True)
    star = torch.zeros_like(x0)
    assert bool((sample_weight("uniform", x0, star) == 1).all())
    w = sample_weight("l1", x0, star)
    assert w.shape == (3, 1, 1, 1) and not w.requires_grad
    torch.testing.assert_close(w.flatten(), 1 / x0.detach().abs().mean((1, 2, 3)))
    D, e = torch.randn(2, 3, 2, 4, 4)
    torch.testing.assert_close(gap_loss(D, e, 0.5, w), w.flatten() * (0.5 * D ** 2 + 2 * D * e).mean((1, 2, 3)))
