"""The formula: facts 1 to 8 of the objectives and real data, with closed-form networks in one dimension.

Data N(M, S^2), student x0 = a + b xi. Every posterior is Gaussian, so v*, the exact critic and the divergence are
known, and Gauss-Hermite quadrature takes expectations over (xi, x1, z) exactly: all integrands are polynomials.
"""
import numpy as np
import pytest
import torch

from common.run import UserError
from distill import OBJECTIVES, WEIGHTS, Objective, check_objective, critic_loss, gap_loss, student_loss
from interpolants import (FAMILIES, PREDICTIONS, Batch, Interpolant, Problem, convert, prediction_scale,
                          regression_loss)
from test_interpolants import gaussian

M, S = 0.3, 0.5
ROWS = sorted(FAMILIES)
NOISE_ROWS = [row for row in ROWS if not FAMILIES[row].noisy]
TIMES = (0.1, 0.35, 0.6, 0.9)

NODES, WEIGHTS_1D = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(6))
XI, X1, Z = torch.cartesian_prod(NODES, NODES, NODES).T.reshape(3, -1, 1, 1, 1)  # (216,1,1,1) each
W = torch.cartesian_prod(WEIGHTS_1D, WEIGHTS_1D, WEIGHTS_1D).prod(1)
W = W / W.sum()


def expectation(values):
    return (W * values.flatten()).sum()


def student(a=-0.2, b=0.8):
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, b))
    return a, b, a + b * XI


def batch(x0, t):
    return Batch(x0, X1, Z, torch.full((len(XI),), t, dtype=torch.float64))


def losses(problem, t, x0, critic, objective=OBJECTIVES["gap"], **knobs):
    """The student's loss against the exact teacher at each point, and |D|^2."""
    return student_loss(problem, objective._replace(**knobs), gaussian(problem, M, S), critic, batch(x0, t))


def gradients(loss, *parameters):
    return torch.stack([g if g is not None else torch.zeros(()).double()
                        for g in torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)])


@pytest.mark.parametrize("row", ROWS)
def test_fact_1_the_gap_is_one_number_in_three_forms(row):
    problem, (_, _, x0) = Problem(FAMILIES[row]), student()
    critic = gaussian(problem, 0.1, 0.7)
    for t in TIMES:
        loss, D2 = losses(problem, t, x0, critic)
        b, target = problem.noised(batch(x0, t))
        star, psi = gaussian(problem, M, S)(b.x_t, b.t), critic(b.x_t, b.t)
        D = star - psi
        torch.testing.assert_close(loss, ((star - target) ** 2 - (psi - target) ** 2).flatten())
        torch.testing.assert_close(loss, (star ** 2 - psi ** 2 - 2 * D * target).flatten())
        torch.testing.assert_close(D2, (D ** 2).detach().flatten())


@pytest.mark.parametrize("row", NOISE_ROWS)  # a bridge that does not see x1 has it in expectation only
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_fact_2_sid_with_a_half_is_half_the_gap(row, prediction):
    """SiD as its paper writes it, (1 - a) |D^|^2 + <D^, x0_psi - x0>, times c^2, is gap / 2 in value and gradient."""
    problem = Problem(FAMILIES[row], prediction)
    critic = gaussian(problem, 0.1, 0.7)
    for t in TIMES:
        a, b, x0 = student()
        gap, _ = losses(problem, t, x0, critic)
        sid, _ = losses(problem, t, x0, critic, kappa=2 * (1 - 0.5), units="data")
        written = 0.5 * prediction_scale(problem, "velocity", batch(x0, t).t, 1) ** 2 * sid
        torch.testing.assert_close(written, 0.5 * gap)
        torch.testing.assert_close(gradients(expectation(written), a, b), gradients(expectation(0.5 * gap), a, b))
    noised, _ = problem.noised(batch(x0, t))
    star, psi = (problem.data(net, noised) for net in (gaussian(problem, M, S), critic))
    for factor in (0.5, 1.0, 1.2):
        paper = (1 - factor) * (star - psi) ** 2 + (star - psi) * (psi - x0)
        sid, _ = losses(problem, t, x0, critic, kappa=2 * (1 - factor), units="data")
        torch.testing.assert_close(paper.flatten(), 0.5 * sid)


@pytest.mark.parametrize("row", ROWS)
def test_fact_3_stop_is_dmds_gradient_whatever_kappa(row):
    problem = Problem(FAMILIES[row])
    critic = gaussian(problem, 0.1, 0.7)
    for t in TIMES:
        a, b, x0 = student()
        found = [gradients(expectation(losses(problem, t, x0, critic, kappa=kappa, grad="stop")[0]), a, b)
                 for kappa in (1.0, -7.0)]
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
        noised, _ = problem.noised(batch(x0, t))
        k = problem.at(noised.t, 4)
        slope = 2 * (k.dalpha / k.alpha - k.ds / k.s)  # lambda', lambda = log(alpha^2 / s^2)
        s_star, s_psi = (gaussian(problem._replace(prediction="score"), *law)(noised.x_t, noised.t)
                         for law in ((M, S), (0.1, 0.7)))
        dmd = (k.dalpha * k.s ** 2 * slope * (s_psi - s_star)).detach()
        torch.testing.assert_close(found[0], gradients(expectation(dmd * x0), a, b), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("row", ROWS)
def test_fact_4_with_the_exact_critic_the_gradient_is_that_of_the_divergence(row):
    """The critic is frozen at the optimum for this student, yet the gradient is the total one of E|v* - v_student|^2,
    in which the student's velocity moves with (a, b)."""
    problem = Problem(FAMILIES[row])
    for t in TIMES:
        a, b, x0 = student()
        gap = expectation(losses(problem, t, x0, gaussian(problem, a.detach(), b.detach()))[0])
        noised, _ = problem.noised(batch(x0, t))
        star, own = (gaussian(problem, *law)(noised.x_t, noised.t) for law in ((M, S), (a, b)))
        divergence = expectation((star - own) ** 2)
        torch.testing.assert_close(gap, divergence)
        torch.testing.assert_close(gradients(gap, a, b), gradients(divergence, a, b), rtol=1e-7, atol=1e-9)
        assert divergence.item() > 0


def test_fact_4_the_divergence_vanishes_only_at_the_data():
    problem, (a, b, x0) = Problem(FAMILIES["linear"]), student(M, S)
    loss = expectation(losses(problem, 0.5, x0, gaussian(problem, M, S))[0])
    assert abs(loss.item()) < 1e-12
    torch.testing.assert_close(gradients(loss, a, b), torch.zeros(2).double(), atol=1e-12, rtol=0)
    for law in ((M + 0.1, S), (M, 1.1 * S), (M, 0.9 * S)):  # and at one time it tells other laws
        other = expectation(losses(problem, 0.5, student(*law)[2], gaussian(problem, *law))[0])
        assert other.item() > 1e-3


@pytest.mark.parametrize("row", ROWS)
def test_fact_5_realuid_rests_at_the_data(row):
    """At student = data, delta = p + q x_t = 0 is the best of all affine delta, whatever alpha and beta."""
    problem, real = Problem(FAMILIES[row]), batch(M + S * XI, 0.4)
    star = gaussian(problem, M, S)

    def value(p, q, a, b):
        objective = OBJECTIVES["gap"]._replace(real_alpha=a, real_beta=b)
        return expectation(critic_loss(problem, objective, lambda x, t, y: star(x, t) - p - q * x, real, real))
    for ab in ((0.9, 0.88), (0.85, 1.0), (1.0, 0.9)):
        p, q = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
        rest = value(p, q, *ab)
        torch.testing.assert_close(gradients(rest, p, q), torch.zeros(2).double(), atol=1e-9, rtol=0)
        assert float(value(0.1, -0.2, *ab)) > float(rest.detach())


@pytest.mark.parametrize("units", ["velocity", "data"])
def test_realuid_is_the_formula_of_its_paper(units):
    """Critic and student against -a|d|^2 + 2a<d,v*> - 2b<d,I'> written out, on the linear path, where c = -1/t."""
    problem, a, b, t = Problem(FAMILIES["linear"]), 0.9, 0.82, 0.4
    star, psi, terms, free = gaussian(problem, M, S), gaussian(problem, 0.1, 0.7), [], 0
    fake, real = batch(student()[2], t), batch(M + S * XI, t)
    for sample, p, q in ((fake, a, b), (real, 1 - a, 1 - b)):
        noised, velocity = problem.noised(sample)
        v_star, v_psi = (convert(problem, net(noised.x_t, noised.t), units, noised) for net in (star, psi))
        d, aim = v_star - v_psi, velocity if units == "velocity" else sample.x0
        terms.append((-p * d ** 2 + 2 * p * d * v_star - 2 * q * d * aim).flatten())
        free += (p * v_star ** 2 - 2 * q * v_star * aim).flatten()  # of v_psi, left out by critic_loss
    objective = Objective(1.0, "full", "uniform", units, a, b)
    c2 = 1 if units == "velocity" else 1 / t ** 2  # the critic's loss keeps the weight of its own prediction
    torch.testing.assert_close(critic_loss(problem, objective, psi, fake, real), c2 * (free - terms[0] - terms[1]))
    torch.testing.assert_close(student_loss(problem, objective, star, psi, fake)[0], terms[0])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("units", ["velocity", "data"])
def test_realuid_with_one_and_one_is_the_gap(row, prediction, units):
    """The gradient at each of the critic's outputs is the plain regression's; the limit takes the loss's long form."""
    problem = Problem(FAMILIES[row], prediction, FAMILIES[row].noisy)
    fake, real, near = batch(student()[2].detach(), 0.4), batch(M + S * XI, 0.4), 1 - 1e-9
    moved, found = torch.zeros_like(XI, requires_grad=True), []

    def critic(*given):
        return gaussian(problem, 0.1, 0.7)(*given) + moved
    for a, b in ((1.0, 1.0), (near, near)):
        objective = OBJECTIVES["gap"]._replace(units=units, real_alpha=a, real_beta=b)
        found.append(critic_loss(problem, objective, critic, fake, real))
    torch.testing.assert_close(found[0], regression_loss(problem, critic, fake), rtol=0, atol=0)
    plain, limit = (torch.autograd.grad(loss.sum(), moved)[0] for loss in found)
    torch.testing.assert_close(limit, plain, rtol=1e-5, atol=1e-6)


def test_fact_7_ve_gives_stop_in_velocity_units_no_gradient_and_is_refused():
    problem, (a, b, x0) = Problem(FAMILIES["ve"]), student()
    critic = gaussian(problem, 0.1, 0.7)
    nothing, something = (gradients(expectation(losses(problem, 0.4, x0, critic, grad="stop", units=units)[0]), a, b)
                          for units in ("velocity", "data"))
    assert nothing.abs().max() == 0 and something.abs().min() > 0
    with pytest.raises(UserError, match="--units data"):
        check_objective(problem, OBJECTIVES["cross"])
    with pytest.raises(UserError, match="--units data"):
        check_objective(Problem(Interpolant(lambda t: 0.9 * t ** 0, lambda t: 1 + t)), OBJECTIVES["cross"])
    check_objective(problem, OBJECTIVES["dmd"])
    check_objective(problem, OBJECTIVES["gap"])


def test_fact_8_stop_is_refused_where_the_snr_does_not_fall():
    backwards = Problem(Interpolant(lambda t: t, lambda t: 1 - t))
    constant = Problem(FAMILIES["bridge"]._replace(gamma=lambda t: 0.5 * (1 - t)), sees_x1=True)  # alpha / s = 2
    for problem in (backwards, constant):
        with pytest.raises(UserError, match="--grad full"):
            check_objective(problem, OBJECTIVES["cross"])
        check_objective(problem, OBJECTIVES["gap"])
        check_objective(problem, OBJECTIVES["dmd"])  # in data units its weight has one sign on any path
    for row in ("linear", "vp", "gvp", "bridge"):
        check_objective(Problem(FAMILIES[row]), OBJECTIVES["cross"])


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("row", ROWS)
def test_every_objective_moves_the_student_towards_the_data(row, objective):
    """With the exact critic, one small step along -gradient lowers the KL divergence of the student to the data."""
    if row == "ve" and objective == "cross":
        return  # fact 7

    def divergence(a, b):
        return float(torch.log(S / b) + (b ** 2 + (a - M) ** 2) / (2 * S ** 2))
    problem, (a, b, x0) = Problem(FAMILIES[row]), student()
    critic = gaussian(problem, a.detach(), b.detach())
    total = sum(expectation(losses(problem, t, x0, critic, OBJECTIVES[objective])[0]) for t in (0.3, 0.5, 0.7))
    step = gradients(total, a, b)
    step = 0.02 * step / step.norm()
    assert divergence(a.detach() - step[0], b.detach() - step[1]) < divergence(a.detach(), b.detach())


def test_weights_are_per_sample_and_carry_no_gradient():
    x0, t = torch.randn(3, 2, 4, 4), torch.rand(3)
    for name, weight in WEIGHTS.items():
        w = weight(x0, torch.zeros_like(x0), t)
        assert w.shape == (3,) and (name != "uniform" or bool((w == 1).all()))
    w = WEIGHTS["l1"](x0, torch.zeros_like(x0), t)
    torch.testing.assert_close(w, 1 / x0.abs().mean((1, 2, 3)))
    D, e = torch.randn(2, 3, 2, 4, 4)
    torch.testing.assert_close(gap_loss(D, e, 0.5, w), w * (0.5 * D ** 2 + 2 * D * e).mean((1, 2, 3)))
    for grad in ("full", "stop"):  # and the student's loss takes them
        problem, (a, b, x0) = Problem(FAMILIES["vp"], "noise"), student()
        knobs, psi = OBJECTIVES["sid"]._replace(grad=grad), gaussian(problem, 0.1, 0.7)
        plain, weighted = (losses(problem, 0.6, x0, psi, knobs, weight=weight)[0] for weight in ("uniform", "l1"))
        noised, _ = problem.noised(batch(x0, 0.6))
        w = 1 / (x0 - problem.data(gaussian(problem, M, S), noised)).detach().abs().flatten()
        torch.testing.assert_close(weighted, w * plain)
        torch.testing.assert_close(gradients(weighted.sum(), a, b), gradients((w * plain).sum(), a, b))
