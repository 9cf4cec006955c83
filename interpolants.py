"""Stochastic interpolants: one row a family, everything else follows from the row.

    x_t  = alpha(t) x0 + beta(t) x1 + gamma(t) z        t = 0 is data, t = 1 is the reference, z ~ N(0, I)
    I'_t = alpha'(t) x0 + beta'(t) x1 + gamma'(t) z     the velocity target

(Albergo, Boffi and Vanden-Eijnden, arXiv:2303.08797.) A family is three functions of t. Derivatives are taken by
automatic differentiation, conversions between velocity, data, noise and score predictions are the solution of two
linear equations, and the solvers need nothing but these. All coefficients are tensors of shape (B,) or broadcast
(B,1,1,1).
"""
import math
from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor

PREDICTIONS = ("velocity", "data", "noise", "score")
RATIO_RANGE = (0.02, 50.0)  # s / alpha of the times that losses are taken at
SIGMA_DATA = 0.5  # the std that preconditioning assumes of the data (EDM, arXiv:2206.00364, table 1)


# ---------------------------------------------------------------------------------------------------------------------
# The rows

class Interpolant(NamedTuple):
    """One family. `predict` is the prediction of its networks of size S and larger, unless told otherwise;
    `scale_input` asks for what networks read to be brought to unit size, for rows where x_t strays far from it (they
    predict data or edm)."""
    alpha: Callable
    beta: Callable
    gamma: Callable = torch.zeros_like
    predict: str = "velocity"
    scale_input: bool = False

    @property
    def noisy(self):
        """Whether there is a gamma, and with it a z beside x0 and x1."""
        return self.gamma is not torch.zeros_like


def vp_log_abar(t, beta_min=0.1, beta_max=20.0):
    """log abar_t of the continuous variance-preserving schedule (Song et al., arXiv:2011.13456, eq. 33)."""
    return -(beta_min * t + 0.5 * (beta_max - beta_min) * t ** 2)


def ve_sigma(t, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM's noise levels (arXiv:2206.00364, eq. 5): a uniform grid of t is EDM's sampling grid."""
    return (sigma_min ** (1 / rho) + t * (sigma_max ** (1 / rho) - sigma_min ** (1 / rho))) ** rho


FAMILIES = {
    "linear": Interpolant(lambda t: 1 - t, lambda t: t),
    "vp": Interpolant(lambda t: (0.5 * vp_log_abar(t)).exp(), lambda t: (-vp_log_abar(t).expm1()).sqrt(),
                      predict="noise"),
    "gvp": Interpolant(lambda t: (math.pi / 2 * t).cos(), lambda t: (math.pi / 2 * t).sin()),
    "ve": Interpolant(torch.ones_like, ve_sigma, predict="edm", scale_input=True),
    "bridge": Interpolant(lambda t: 1 - t, lambda t: t, lambda t: (t * (1 - t)).sqrt(), predict="data"),
}


def family(name, gamma_scale=1.0):
    """The row of this name, its gamma times gamma_scale (the s of a bridge's s sqrt(t (1 - t)))."""
    row = FAMILIES[name]
    return row if gamma_scale == 1 else row._replace(gamma=lambda t: gamma_scale * row.gamma(t))


# ---------------------------------------------------------------------------------------------------------------------
# What travels together

class Batch(NamedTuple):
    """Rows of a batch: x0, x1, z (B,C,H,W), times t (B,), labels y (B,), x_t (B,C,H,W), what networks read at t, and
    r (B,), the time that a flow map steps to. What is not known yet, or not there, is None."""
    x0: Optional[Tensor] = None
    x1: Optional[Tensor] = None
    z: Optional[Tensor] = None
    t: Optional[Tensor] = None
    y: Optional[Tensor] = None
    x_t: Optional[Tensor] = None
    r: Optional[Tensor] = None

    def rows(self, part):
        return Batch(*(v if v is None else v[part] for v in self))


class Problem(NamedTuple):
    """An interpolant as its networks know it: the path, what they predict, whether they are given x1 (bridges), and
    whether EDM's preconditioning makes their data prediction."""
    path: Interpolant
    prediction: str = "velocity"
    sees_x1: bool = False
    edm: bool = False

    def at(self, t, ndim=1):
        """The Coefficients at t (B,), as its networks see them."""
        return coefficients(self.path, t, ndim, self.sees_x1)

    def noised(self, b):
        """b with its x_t, and the velocity target I'_t (B,C,H,W)."""
        x_t, velocity = interpolate(self.path, b.x0, b.x1, b.t, b.z)
        return b._replace(x_t=x_t), velocity

    def call(self, net, b):
        """net's prediction on b (B,C,H,W)."""
        second = {} if b.r is None else {"r": b.r}
        return net(b.x_t, b.t, b.y, *[b.x1] * self.sees_x1, **second)

    def data(self, net, b):
        """net's data prediction on b, x0 (B,C,H,W): one step of a student. Differentiable."""
        return convert(self, self.call(net, b), "data", b)


# ---------------------------------------------------------------------------------------------------------------------
# Coefficients

class Coefficients(NamedTuple):
    """Values and time derivatives at t. `s` is the std of the Gaussian part as the networks see it: sqrt(beta^2 +
    gamma^2) where x1 is noise, gamma where the networks are given x1."""
    alpha: Tensor
    beta: Tensor
    gamma: Tensor
    s: Tensor
    dalpha: Tensor
    dbeta: Tensor
    dgamma: Tensor
    ds: Tensor


def coefficients(path, t, ndim=1, sees_x1=False):
    """t (B,) -> Coefficients, each (B, 1, ..., 1) with ndim dimensions."""
    with torch.inference_mode(False), torch.enable_grad():
        t = t.detach().clone().requires_grad_()
        alpha, beta, gamma = (f(t) + 0 * t for f in (path.alpha, path.beta, path.gamma))  # f may be constant
        s = gamma if sees_x1 else torch.hypot(beta, gamma) if path.noisy else beta
        values = alpha, beta, gamma, s
        slopes = [torch.autograd.grad(v.sum(), t, retain_graph=True)[0] for v in values]
    return Coefficients(*(c.detach().reshape(c.shape + (1,) * (ndim - c.ndim)) for c in (*values, *slopes)))


def prediction_scale(problem, prediction, t, ndim=4):
    """How far this prediction moves when the data prediction moves by 1, (B,1,..,1): c(t) = alpha' - alpha s'/s for the
    velocity, so that (difference of velocities) = c (difference of data predictions)."""
    k = problem.at(t, ndim)
    return {"data": torch.ones_like(k.s), "velocity": k.dalpha - k.alpha * k.ds / k.s, "noise": -k.alpha / k.s,
            "score": k.alpha / k.s ** 2}[prediction]


def check_log_snr(problem, t_min=1e-3, t_max=1 - 1e-3):
    """Raise ValueError unless log SNR = 2 log(alpha / s) falls in t and alpha' c >= 0 on [t_min, t_max].

    The stop-gradient objectives are descent directions only then: their gradient is
    E[alpha' s^2 lambda' (s_psi - s*) dG], lambda the log SNR.
    """
    t = torch.linspace(t_min, t_max, 1001, dtype=torch.float64)
    k = problem.at(t)
    slope = 2 * (k.dalpha / k.alpha - k.ds / k.s)
    if not bool((slope < 0).all()):
        raise ValueError(f"log SNR does not fall at t = {float(t[~(slope < 0)][0]):.3f}")
    if not bool((k.dalpha * k.alpha * slope >= 0).all()):  # c = alpha slope / 2
        raise ValueError("alpha' c(t) is negative: alpha must not grow with t")


def time_of_noise_ratio(problem, ratio):
    """The time t at which s(t) / alpha(t) = ratio, clamped to [1e-3, 1]: how noise levels carry over between
    families."""
    lo, hi = 1e-3, 1.0
    for _ in range(50):
        mid = 0.5 * (lo + hi)
        k = problem.at(torch.tensor(mid, dtype=torch.float64))
        lo, hi = (mid, hi) if k.s < ratio * k.alpha else (lo, mid)
    return round(hi, 6)


# ---------------------------------------------------------------------------------------------------------------------
# The path, its predictions and their loss

def interpolate(path, x0, x1, t, z=None):
    """x0, x1, z (B,C,H,W), t (B,) -> x_t, I'_t (B,C,H,W). z may be None where gamma = 0."""
    k = coefficients(path, t, x0.ndim)
    x_t, velocity = k.alpha * x0 + k.beta * x1, k.dalpha * x0 + k.dbeta * x1
    if path.noisy:
        x_t, velocity = x_t + k.gamma * z, velocity + k.dgamma * z
    return x_t, velocity


def convert(problem, out, to, b):
    """A network's output on b turned into another prediction, all (B,C,H,W).

    With r = x_t - [beta x1] the Gaussian part obeys   r = alpha x0 + s eps   and   v - [beta' x1] = alpha' x0 + s'
    eps, [.] where the networks see x1; velocity, data (x0), noise (eps) and score (-eps / s) are four views of the
    same pair.
    """
    source = problem.prediction
    for name in (source, to):
        if name not in PREDICTIONS:
            raise ValueError(f"unknown prediction {name!r}: choose from {', '.join(PREDICTIONS)}")
    if source == to:
        return out
    k = problem.at(b.t, b.x_t.ndim)
    r, drift = (b.x_t - k.beta * b.x1, k.dbeta * b.x1) if problem.sees_x1 else (b.x_t, 0)
    if source == "velocity":
        v = out - drift
        det = k.alpha * k.ds - k.dalpha * k.s  # = -c s, never zero while the SNR falls
        x0, eps = (k.ds * r - k.s * v) / det, (k.alpha * v - k.dalpha * r) / det
    elif source == "data":
        x0, eps = out, (r - k.alpha * out) / k.s
    else:
        eps = out if source == "noise" else -k.s * out
        x0 = (r - k.s * eps) / k.alpha
    if to == "data":
        return x0
    if to == "velocity":
        return k.dalpha * x0 + k.ds * eps + drift
    return eps if to == "noise" else -eps / k.s


def target(problem, b, velocity):
    """The regression target of the problem's prediction on b, (B,C,H,W): its conditional mean given x_t is what a
    network learns. velocity: I'_t, as noised() gives it."""
    if problem.prediction == "velocity":
        return velocity
    return convert(problem._replace(prediction="data"), b.x0, problem.prediction, b)


def loss_weight(problem, t, ndim=4):
    """Weight of the squared error at t, (B,1,..,1). Velocity and noise: 1. Score: s^2, which is the noise loss. Data:
    with EDM's preconditioning SNR + 1/sigma_d^2, its weight (arXiv:2206.00364, table 1), without it the SNR between 1
    (arXiv:2202.00512, section 4) and 5 (arXiv:2303.09556): a plain network cannot follow an SNR without bound."""
    k = problem.at(t, ndim)
    if problem.prediction == "data":
        snr = (k.alpha / k.s) ** 2
        return snr + 1 / SIGMA_DATA ** 2 if problem.edm else snr.clamp(1, 5)
    return k.s ** 2 if problem.prediction == "score" else torch.ones_like(k.s)


def regression_loss(problem, net, b):
    """E[w(t) |net(x_t, t, y) - target|^2] per sample, (B,): the teacher's loss on data, the critic's on the student's
    samples (arXiv:2303.08797, eq. 2.13). Its minimiser is the mean of the target given x_t (and x1 on bridges)."""
    b, velocity = problem.noised(b)
    error = problem.call(net, b) - target(problem, b, velocity)
    return (loss_weight(problem, b.t, b.x0.ndim) * error.float() ** 2).flatten(1).mean(1)


def posterior(path, x0, x_t, t, r, z):
    """x_r given x_t and x0 for r < t: x0, x_t, z (B,C,H,W), t, r (B,) -> (B,C,H,W).

    A Brownian bridge is Markov, so x1 drops out: mean alpha_r x0 + b (x_t - alpha_t x0), variance gamma_r^2 - b^2
    gamma_t^2 with b = beta_r / beta_t (for gamma = s sqrt(t (1-t)): s^2 r (t-r) / t). Where gamma is 0, or falls faster
    than beta, this is DDIM's step (arXiv:2010.02502, eq. 12)."""
    k, j = coefficients(path, t, x_t.ndim), coefficients(path, r, x_t.ndim)
    b = j.beta / k.beta
    kept, fresh = torch.minimum(b, j.s / k.s), (j.gamma ** 2 - (b * k.gamma) ** 2).clamp_min(0).sqrt()
    return j.alpha * x0 + kept * (x_t - k.alpha * x0) + fresh * z


def ddim(problem, x0, b, r):
    """The step from b.t to r (B,) along which the data prediction stays x0 (B,C,H,W) -> x_r (B,C,H,W):

        x_r = alpha_r x0 + (s_r / s_t) (x_t - alpha_t x0)        (DDIM, arXiv:2010.02502, eq. 12)

    where the networks see x1 for x - beta x1 in place of x. With x0 = X(x_t, t, r) it is a flow map's step."""
    k, j = problem.at(b.t, b.x_t.ndim), problem.at(r, b.x_t.ndim)
    given = (k.beta * b.x1, j.beta * b.x1) if problem.sees_x1 else (0, 0)
    return j.alpha * x0 + j.s / k.s * (b.x_t - k.alpha * x0 - given[0]) + given[1]


def leg_weight(problem, t, s, r):
    """w (B,) with which the legs t -> s and s -> r make the step t -> r, all (B,), r <= s <= t: two DDIM steps with A
    and B end where one with w A + (1 - w) B does. w = (rho_s - rho_t) / (rho_r - rho_t), rho = alpha / std; finite at
    r = 0 and at t = 1, and 1 where s = r. It is a difference of near numbers: give float64."""
    k, m, j = (problem.at(time) for time in (t, s, r))
    w = j.s * (m.alpha * k.s - k.alpha * m.s) / (m.s * (j.alpha * k.s - k.alpha * j.s))
    return torch.where(s == r, 1, w)


def preconditioning(path, edm=True, points=513):
    """EDM's c_in, c_skip, c_out of this path on a uniform grid of t, three lists of floats for a network's
    configuration.

    data prediction = c_skip x_t + c_out F(c_in x_t, t)    (arXiv:2206.00364, eq. 7, with alpha in front of the data)

    Its F learns noise where there is little of it, which small networks with large patches cannot (docs/findings.md).
    Without edm c_skip is 0 and c_out 1: the input alone is scaled."""
    k = coefficients(path, torch.linspace(0, 1, points, dtype=torch.float64))
    size = (k.alpha * SIGMA_DATA) ** 2 + k.s ** 2
    c_skip, c_out = k.alpha * SIGMA_DATA ** 2 / size, SIGMA_DATA * k.s * size.rsqrt()
    return [c.tolist() for c in (size.rsqrt(), *((c_skip, c_out) if edm else (0 * size, torch.ones_like(size))))]


# ---------------------------------------------------------------------------------------------------------------------
# A student's steps

def start_at(problem, b, t):
    """b at the time t (a number), its x_t = beta x1 + gamma z: the path with nothing known of the data. The fresh x1 of
    paths that start from noise is spent."""
    b = b._replace(t=torch.full((len(b.z),), t, device=b.z.device))
    k = coefficients(problem.path, b.t, b.z.ndim)
    return b._replace(x_t=k.beta * b.x1 + k.gamma * b.z)


@torch.no_grad()
def student_input(problem, net, times, b, draw):
    """What a student reads at the last of its times: the steps before it, re-noised in between with fresh noise, or by
    the posterior on a bridge. b has x1, z (B,C,H,W) and y (B,); draw(i) gives x1, z of step i > 0 -> b with its t and
    x_t."""
    b = start_at(problem, b, times[0])
    for i, time in enumerate(times[1:], 1):
        x0, (x1, z), r = problem.data(net, b), draw(i), torch.full_like(b.t, time)
        if problem.sees_x1 and i == 1:  # the start lacks the data's part, which the posterior takes away
            b = b._replace(x_t=b.x_t + coefficients(problem.path, b.t, x0.ndim).alpha * x0)
        x_t = (posterior(problem.path, x0, b.x_t, b.t, r, z) if problem.sees_x1 else
               interpolate(problem.path, x0, x1, r, z)[0])
        b = b._replace(t=r, x_t=x_t)
    return b


def follow_map(problem, net, b, grid, restart=0.0, noise=None):
    """Steps of a flow map along these times, the last of them 0; b has x_t at the first -> x0 (B,C,H,W). With restart
    g above 0 a step from t to r lands at (1 - g) r and fresh noise(i) (B,C,H,W) brings it back up to r: 0 is the ODE, 1
    the sampler of consistency models (arXiv:2303.01469, algorithm 1)."""
    for i, (t, r) in enumerate(zip(grid[:-1], grid[1:])):
        t, up, down = (torch.full((len(b.x_t),), float(v), device=b.x_t.device) for v in (t, r, (1 - restart) * r))
        b = b._replace(t=t, r=down)
        x0 = problem.data(net, b)
        if r == 0:
            return x0
        x = ddim(problem, x0, b, down)
        if restart:
            k, j = (problem.at(time, x.ndim) for time in (down, up))
            shift = j.beta * b.x1 - j.alpha / k.alpha * k.beta * b.x1 if problem.sees_x1 else 0
            # x_up given x_down: alpha_up / alpha_down x and as much noise as makes its std s_up
            fresh = (j.s ** 2 - (j.alpha / k.alpha * k.s) ** 2).clamp_min(0).sqrt() * noise(i)
            x = j.alpha / k.alpha * x + shift + fresh
        b = b._replace(x_t=x)


# ---------------------------------------------------------------------------------------------------------------------
# Solvers: from t = 1 to t = 0 in N intervals

SOLVERS = ("euler", "heun", "sde", "posterior")
DIFFUSIONS = {  # w(t) of the reverse SDE; the marginals do not depend on it, the discretisation error does
    "sigma": lambda k: k.s,
    "constant": lambda k: torch.ones_like(k.s),
    "sbdm": lambda k: 2 * (k.s * k.ds - k.s ** 2 * k.dalpha / k.alpha.clamp_min(1e-3)),  # the forward SDE's own
}


class Sampler(NamedTuple):
    """How a teacher is sampled. Steps left empty are sample.py's choice; the solver is then the posterior where
    networks see x1, else euler. restart is for flow maps."""
    steps: Optional[int] = None
    solver: Optional[str] = None
    diffusion: str = "sigma"
    cfg_scale: float = 1.0
    cfg_interval: tuple = (0.0, 1.0)
    restart: float = 0.0


def time_grid(problem, steps):
    """steps intervals -> (steps+1,) float64 times from 1 down to 0. Starts at 0.999 where the prediction says nothing
    of the velocity or the data at t = 1 (noise on the linear path, or gamma' there); it always ends at 0, where no
    solver evaluates the network. Paths with gamma get sin^2(pi u / 2), u uniform: gamma' is infinite at both ends in t,
    but not in u."""
    if int(steps) != steps or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, not {steps}")
    one = torch.ones(1, 1, dtype=torch.float64)
    b = Batch(x1=one, t=one[0], x_t=2 * one)
    v, x0 = (convert(problem, one, name, b).abs() for name in ("velocity", "data"))  # 1e16 on gvp: its cos is not 0
    regular = bool(((v < 1e6) & (x0 < 1e6) & problem.at(b.t).ds.isfinite()).all())
    start = 1.0 if regular else 1 - 1e-3
    if problem.path.noisy:
        u = torch.linspace(2 / math.pi * math.asin(start ** 0.5), 0, int(steps) + 1, dtype=torch.float64)
        return (math.pi / 2 * u).sin() ** 2
    return torch.linspace(start, 0, int(steps) + 1, dtype=torch.float64)


def last_time(problem):
    """Where a flow map starts: where grids do, and s / alpha = 50 at most where the prediction (noise, score, or a
    velocity, where alpha' is 0) says nothing of the data beyond."""
    first = float(time_grid(problem, 1)[0])
    says = prediction_scale(problem, problem.prediction, torch.tensor([first], dtype=torch.float64), 1).abs()
    largest = RATIO_RANGE[1]
    return first if float(says) > 1 / largest else min(first, time_of_noise_ratio(problem, largest))


def solve(problem, net, b, sampler, noise=None):
    """Integrate from the reference to data. b has x_t (B,C,H,W) at the grid's first time, y, and x1 where the networks
    see it -> x0 (B,C,H,W).

    euler: exactly `steps` network calls, heun: 2 steps - 1 (both for the probability-flow ODE dx = v dt), sde:
    Euler-Maruyama on dx = (v - w/2 score) dt + sqrt(w) dW backwards in time, posterior: draws from posterior() between
    the data prediction and x_t, exact in law for a bridge as the steps grow; these two make `steps` calls, with
    noise(i) -> (B,C,H,W) for step i.

    Velocities step in the clock that is regular: s where alpha is constant (ve), whose t only labels the noise level,
    as EDM does (arXiv:2206.00364, algorithm 1); u = 2/pi asin(sqrt(t)) where there is gamma; else t. The last interval
    ends at t = 0, where s = 0 makes a velocity meaningless on several rows: it returns the data prediction, which on
    the linear path is the Euler step.
    """
    solver = sampler.solver or ("posterior" if problem.sees_x1 else "euler")
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: choose from {', '.join(SOLVERS)}")
    grid, path, in_u = time_grid(problem, sampler.steps), problem.path, problem.path.noisy
    in_s = bool((problem.at(torch.linspace(0.1, 0.9, 9)).dalpha == 0).all())
    clock = 2 / math.pi * grid.sqrt().asin() if in_u else coefficients(path, grid).s if in_s else grid

    def slope(out, b):  # dx / d clock
        v = convert(problem, out, "velocity", b)
        if in_u:
            return v * (math.pi * (b.t * (1 - b.t)).sqrt()).reshape(-1, *[1] * (v.ndim - 1))
        return v / coefficients(path, b.t, v.ndim).ds if in_s else v

    for i in range(len(grid) - 1):
        x, t = b.x_t, torch.full((len(b.x_t),), float(grid[i]), dtype=torch.float32, device=b.x_t.device)
        b, r = b._replace(t=t), torch.full_like(t, float(grid[i + 1]))
        dt, step = float(grid[i + 1] - grid[i]), float(clock[i + 1] - clock[i])
        out = problem.call(net, b)
        if i == len(grid) - 2:
            return convert(problem, out, "data", b)
        if solver == "posterior":
            x = posterior(path, convert(problem, out, "data", b), x, t, r, noise(i))
        elif solver == "euler":
            x = x + step * slope(out, b)
        elif solver == "heun":
            v = slope(out, b)
            ahead = b._replace(x_t=x + step * v, t=r)
            x = x + 0.5 * step * (v + slope(problem.call(net, ahead), ahead))
        else:
            w = DIFFUSIONS[sampler.diffusion](problem.at(t, x.ndim))
            x = x + step * slope(out, b) + (-dt * w).sqrt() * noise(i)
            x = x - 0.5 * dt * w * convert(problem, out, "score", b)
        b = b._replace(x_t=x)
