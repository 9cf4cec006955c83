"""Distill a teacher into a flow map: a network with a second time that takes any step of the teacher's ODE in one call.

    python flow_map.py --teacher_ckpt out/teacher.pt --out out/map                   # lagrange, on the teacher's data
    python flow_map.py --teacher_ckpt out/teacher.pt --row freeflow --out out/map    # data-free
    torchrun --nproc_per_node=8 flow_map.py --teacher_ckpt teacher.pt --row shortcut --data FOLDER --batch 256

The network predicts data from two times, X(x_t, t, r); its step from t to r is DDIM's. The loss has two legs, t -> s
-> r with s = t - lam (t - r), the first made by A, the second by B; a published method is a row of the table below, and
docs/formula.md derives them. Architecture, interpolant, prediction, image size and classes come from the teacher.
Writes OUT/flow_map.pt (everything: the same command again goes on from it), OUT/log.jsonl and OUT/flow_map_XXXXXXX.png
(rows: what bridges start from; 1, 2 and 4 steps of the map; 50 of the teacher).
"""
from typing import Callable, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.autoencoder import decoder
from common.data import open_for
from common.files import load_checkpoint, save_checkpoint
from common.images import save_curves, save_picture, send, stack_rows
from common.run import (Parser, Run, UserError, add_run_flags, check_idle, code_commit, command, generator, number,
                        one_of, precision, put_in_training)
from interpolants import (RATIO_RANGE, Batch, Sampler, convert, ddim, last_time, leg_weight, loss_weight,
                          prediction_scale, regression_loss, start_at, time_of_noise_ratio)
from model import build_from, ema_update, frozen_copy, guided, load_weights, round_weights
from sample import add_teacher_flags, choose_labels, column_names, generate, holds_data, load_teacher, noise_levels


class Row(NamedTuple):
    """A method. lam: where the legs meet: mu, 1-mu, random or a number; first, second: who makes them (LEGS); times:
    which (t, r) are drawn (TIMES), with shares `borders` of t = 1 and of r = 0; diagonal: share of rows with r = t,
    which learn the teacher's prediction, of first `data` the data; power: of the loss that it is divided by; tangent:
    finite legs, or jvp, their limit mu -> 0; mu: the short leg's share of the step, over which the teacher's prediction
    stands for its ODE, so that the fixed point is off in proportion; solver_steps: of the solver's leg."""
    lam: str
    first: str
    second: str
    times: str = "triangle"
    diagonal: float = 0.0
    power: float = 0.0
    tangent: str = "finite"
    mu: float = 0.3
    borders: float = 0.15
    solver_steps: int = 8


ROWS = {  # what a row sets, the flags of these names override
    "lagrange": Row("1-mu", "student", "teacher", mu=0.1),  # LMD (arXiv:2406.07507), AYF-LMD (arXiv:2506.14603)
    "freeflow": Row("1-mu", "student", "teacher", "start", mu=0.1),  # BOOT (arXiv:2306.05544), FreeFlow (2511.19428)
    "euler": Row("mu", "teacher", "student"),  # EMD (arXiv:2406.07507), AYF-EMD (arXiv:2506.14603)
    "consistency": Row("mu", "teacher", "average", "end"),  # arXiv:2303.01469; sCD as mu -> 0 (arXiv:2410.11081)
    "shortcut": Row("0.5", "average", "average", diagonal=0.25),  # arXiv:2410.12557; PSD (arXiv:2505.18825)
    "split": Row("random", "average", "average", diagonal=0.25),  # SplitMeanFlow (arXiv:2507.16884)
    "progressive": Row("0.5", "before", "before", "grid"),  # arXiv:2202.00512
    "ctm": Row("random", "solver", "average"),  # CTM's legs (arXiv:2310.02279)
    "direct": Row("1", "solver", "solver", "ends"),  # knowledge distillation (arXiv:2101.02388)
    "meanflow": Row("mu", "data", "student", "lognormal", 0.75, 1.0, "jvp"),  # from data alone (arXiv:2505.13447)
}
LEGS = ("teacher", "student", "average", "before", "solver", "data")
TIMES = ("triangle", "start", "end", "ends", "grid", "lognormal")
DATA_FREE = ("start", "ends")  # all of their steps begin at t = 1, which knows nothing of the data


class Legs(NamedTuple):
    """Functions of a Batch -> (B,C,H,W): the data predictions of both legs from b.t to b.r and the teacher's at b.t,
    and the trained network's own output, for its derivative."""
    first: Callable
    second: Callable
    teacher: Callable
    output: Callable


class Trip(NamedTuple):
    """Rows of a batch that go from b.t over s to b.r, all (B,), w (B,) of the legs, which of them stay (r = t; on the
    host), and the share of the tangent in the jvp's target."""
    b: Batch
    s: torch.Tensor
    w: torch.Tensor
    stay: torch.Tensor
    share: float = 1.0

    def rows(self, part):
        return Trip(self.b.rows(part), self.s[part], self.w[part], self.stay[part], self.share)


# ---------------------------------------------------------------------------------------------------------------------
# The loss

def map_loss(problem, row, legs, net, trip):
    """The trajectory loss of net on these rows, (B,): w(t) |out - convert(X_tgt)|^2 / stopgrad(. + 1e-3)^power, with
    the teacher's prediction as X_tgt where r = t, but for rows from data."""
    b, stay = trip.b, send(trip.stay.nonzero()[:, 0], trip.b.t.device)
    out = problem.call(net, b)  # (B,C,H,W)
    X = convert(problem, out.detach().float(), "data", b)
    X_tgt = (tangent_target if row.tangent == "jvp" else trajectory_target)(problem, row, legs, trip, X)
    if len(stay) and row.first != "data":
        X_tgt[stay] = legs.teacher(b.rows(stay)).float()
    wanted = convert(problem._replace(prediction="data"), X_tgt, problem.prediction, b)
    loss = (map_weight(problem, b.t, out.ndim) * (out.float() - wanted) ** 2).flatten(1).mean(1)
    return loss / (loss.detach() + 1e-3) ** row.power


@torch.no_grad()
def trajectory_target(problem, row, legs, trip, X):
    """X + (w A + (1 - w) B - X) / k (B,C,H,W), what X(x_t, t, r) (B,C,H,W) is drawn to: the one step t -> r that ends
    where A's leg t -> s and then B's s -> r do. k is the short leg's share, so that the loss does not fall with it: 1 -
    w of a short last leg, mu of a short first one (whose w is 0 at r = 0), else 1."""
    b, s, w = trip.b, trip.s, trip.w.reshape(-1, *[1] * (X.ndim - 1))
    target = A = legs.first(b._replace(r=s))
    if row.lam != "1":
        B = legs.second(b._replace(x_t=ddim(problem, A, b, s), t=s))
        target = w * A + (1 - w) * B
    k = {"1-mu": (1 - w).clamp_min(row.mu), "mu": row.mu}.get(row.lam, 1)  # 1 - w is 0 at r = t, not learnt from here
    return X + (target - X) / k


@torch.no_grad()
def tangent_target(problem, row, legs, trip, X):
    """The same as mu -> 0. With rho = alpha / s the ODE is d(x/s) = X* d rho, so that X is drawn to X + R,

        euler:     R = omega_t (X* - X) - (t - r) dX/dt along the ODE        with X* at x_t
        lagrange:  R = omega_r (X* - X) + (t - r) dX/dr                      with X* at f(x_t, t, r)

    omega_u = -(t - r) rho'_u / (rho_r - rho_t), 1 at r = t. omega_r grows without bound as r falls to 0, where
    draw_trip draws none: that R is divided by it where it is above 1. R is normalised as sCM's tangent
    (arXiv:2410.11081, section 4.2), but not from data, where X* is x0 and the ODE's velocity I': only R's mean is right
    there."""
    b, euler = trip.b, row.lam == "mu"
    at = b if euler else b._replace(x_t=ddim(problem, X, b, b.r), t=b.r)
    star = (legs.first if euler else legs.second)(at)
    k, j = (problem.at(time.double(), X.ndim) for time in (b.t, b.r))
    m, span = (k if euler else j), (b.t - b.r).reshape(-1, *[1] * (X.ndim - 1))
    omega = span * (m.alpha * m.ds - m.dalpha * m.s) * j.s * k.s / (j.alpha * k.s - k.alpha * j.s) / m.s ** 2
    omega = torch.where(span == 0, 1, omega).float()

    one, zero = torch.ones_like(b.t), torch.zeros_like(b.t)
    v = convert(problem._replace(prediction="data"), star, "velocity", b) if euler else torch.zeros_like(X)
    step = (v, one, zero) if euler else (v, zero, one)  # of x_t, t and r
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(X.device.type, enabled=False):  # the one with such a derivative
        out, slope = torch.func.jvp(lambda x_t, t, r: legs.output(b._replace(x_t=x_t, t=t, r=r)),
                                    (b.x_t, b.t, b.r), step)

    def X_at(h):  # the conversion to data is smooth: for it differences in float64 do
        x_t, t = b.x_t + h * step[0].double(), b.t + h * step[1].double()
        return convert(problem, out + h * slope.double(), "data", b._replace(x_t=x_t, t=t))
    dX = ((X_at(1e-4) - X_at(-1e-4)) / 2e-4).float()
    R = omega * (star - X) + trip.share * (-span if euler else span) * dX
    if row.first == "data":
        return X + R
    R = R if euler else R / omega.clamp_min(1)
    return X + R / (R.flatten(1).square().mean(1).sqrt().reshape(span.shape) + 0.1)


def map_weight(problem, t, ndim):
    """loss_weight, raised to what weighs errors of the data prediction by 1 where it weighs them less, (B,1,..,1): for
    noise, score and vp's velocity, near t = 1, where one-step samples start (arXiv:2202.00512, section 4)."""
    weight = loss_weight(problem, t, ndim)
    return weight / (weight * prediction_scale(problem, problem.prediction, t, ndim) ** 2).clamp_max(1)


def make_legs(problem, row, v_star, net, average, before=None):
    """The row's legs, made by the guided teacher, the student, its average or the stage before (at first the
    teacher)."""
    def own(net):
        return lambda b: problem.data(net, b)

    def teacher(b):
        return problem.data(v_star, b._replace(r=None))
    makers = {"teacher": teacher, "student": own(net), "average": own(average), "data": lambda b: b.x0,
              "before": own(before) if before else teacher,
              "solver": lambda b: solve_leg(problem, v_star, b, row.solver_steps)}
    return Legs(makers[row.first], makers[row.second], teacher, lambda b: problem.call(net.forward, b))


def solve_leg(problem, net, b, n):
    """The teacher's leg by n steps of DDIM from b.t to b.r, as the one data prediction that makes it, (B,C,H,W)."""
    x, far = b, b.r
    for i in range(n):
        r = far + (b.t - far) * (n - 1 - i) / n  # ends at far itself, not just below 0
        x0 = problem.data(net, x._replace(r=None))
        x = x._replace(x_t=ddim(problem, x0, x, r), t=r)
    k, j = (problem.at(time, b.x_t.ndim) for time in (b.t, far))
    found = (x.x_t - ddim(problem, 0, b, far)) / (j.alpha - k.alpha * j.s / k.s)  # a step is affine in x0
    short = b.t - far < 1e-3  # too short to be told from rounding: its limit
    return torch.where(short.reshape(k.s.shape), x0, found)


# ---------------------------------------------------------------------------------------------------------------------
# What the loss is taken on

def draw_times(row, n, span, g, intervals=1):
    """t in [low, high] = span and r in [0, t], (n,) float64 on the host; of a grid the ends of one of its intervals."""
    low, high = span
    u, v, to_high, to_zero = torch.rand(4, n, generator=g, dtype=torch.float64)
    if row.times == "lognormal":  # the sigmoid of a normal: MeanFlow's pairs (arXiv:2505.13447, table 1d)
        pair = high * (torch.randn(2, n, generator=g, dtype=torch.float64) - 0.4).sigmoid()
        return pair.amax(0).clamp_min(low), pair.amin(0)
    if row.times == "grid":
        i = (intervals * u.clamp_min(1e-9)).ceil()
        return high * i / intervals, high * (i - 1) / intervals
    t = torch.where(to_high < (1 if row.times in DATA_FREE else row.borders), high, low + (high - low) * u)
    return t, torch.where(to_zero < (1 if row.times in ("end", "ends") else row.borders), 0, t * v)


def draw_trip(problem, row, stream, b, key, intervals=1):
    """Rows b (x0, unless they start at t = 1, x1, z, y) with their times, as functions of (seed, key, row of the
    whole batch) -> Trip. intervals: of the grid that progressive distillation has come to."""
    n, g = stream.batch, generator(stream.seed, key, "times")
    t, r = draw_times(row, n, stream.times, g, intervals)
    lam = torch.rand(n, generator=g, dtype=torch.float64)
    stay = (torch.arange(n + 1) * row.diagonal).floor().diff() > 0  # spread evenly: pieces and processes are alike
    r = torch.where(stay, t, r)
    if row.tangent == "jvp" and row.lam == "1-mu":
        r = r.clamp_min(stream.times[0])
    lam = lam if row.lam == "random" else {"mu": row.mu, "1-mu": 1 - row.mu}.get(row.lam) or float(row.lam)
    s = t - lam * (t - r)
    t, s, r, w = (send(v[stream.part].float(), stream.device) for v in (t, s, r, leg_weight(problem, t, s, r)))
    free = row.times in DATA_FREE
    b = start_at(problem, b, stream.times[1]) if free else problem.noised(b._replace(t=t))[0]
    return Trip(b._replace(r=r), s, w, stay[stream.part])


# ---------------------------------------------------------------------------------------------------------------------
# The command

def parse_flags():
    parser = Parser(__doc__)
    add_teacher_flags(parser)
    add = parser.group("the trajectory loss")
    add("--row", type=one_of(ROWS), default="lagrange", help=", ".join(ROWS) + ": sets the flags that say "
        "\"the row's\", unless given")
    add("--lam", default=None, help="where the two legs t -> s -> r meet, s = t - lam (t - r): mu, 1-mu, random, or a "
        "number in (0, 1] (the row's)")
    add("--first", type=one_of(LEGS), default=None, help="who makes the first leg: " + ", ".join(LEGS) + " (the "
        "row's)")
    add("--second", type=one_of(LEGS[:-1]), default=None, help="who makes the second leg: the same but data (the "
        "row's)")
    add("--times", type=one_of(TIMES), default=None, help=", ".join(TIMES) + " (the row's); start and ends need no "
        "data (bridges do)")
    add("--diagonal", type=number(float, 0, 1), default=None, help="share of rows with r = t, which learn the "
        "teacher's prediction, with --first data the data (the row's)")
    add("--power", type=number(float, 0), default=None, help="p of loss / stopgrad(loss + 0.001)^p (the row's)")
    add("--tangent", type=one_of(("finite", "jvp")), default=None, help="finite legs, or jvp: their limit mu -> 0 by "
        "forward-mode derivatives (the row's)")
    add("--mu", type=number(float, 0, 1, open_low=True), default=None, help="the short leg's share of a step, in "
        "(0, 1) (the row's)")
    add("--borders", type=number(float, 0, 1), default=None, help="share of steps from t = 1, and share of steps to "
        "r = 0 (the row's)")
    add("--tangent_warmup", type=number(int, 0), default=0, help="iterations over which the derivative's share of a "
        "jvp's target rises to 1")
    add("--anchor", type=number(float, 0), default=0.0, help="weight of the flow-matching loss on data at r = t "
        "(FACM from data)")
    add("--solver_steps", type=number(int, 1), default=None, help="steps of the solver's leg (the row's)")
    add("--grid", type=number(int, 1), default=16, help="progressive distillation: steps of its first student, a power "
        "of two")
    add("--stage_iters", type=number(int, 1), default=120, help="progressive distillation: iterations of a stage, "
        "after which the steps are half as many")
    add("--t_min", type=number(float, 0, 1, open_low=True), default=None, help="smallest time t (s/alpha = 0.02)")
    add("--t_max", type=number(float, 0, 1, open_low=True), default=None, help="largest time, where the map starts (1; "
        "0.999 on bridges, s/alpha = 50 for noise and score predictions)")
    add("--ema", type=number(float, 0, 1), default=0.98, help="decay of the map's average")
    add = parser.group("data")
    add("--data", default=None, help="images to noise, as in train_teacher.py (the teacher's, for rows that need them)")
    add_run_flags(parser, iters=600, batch=32, lr=1e-3, decay_from=100, warmup=0, log_every=10, sample_every=200)
    args, defaults = parser.parse_args(), vars(parser.parse_args([]))
    for knob, value in ROWS[args.row]._asdict().items():
        if getattr(args, knob) is None:
            setattr(args, knob, value)
    return args, defaults


def check_row(args, defaults):
    """The flags' Row. Raises UserError where they do not make one, or where one of them does nothing."""
    row = Row(*(getattr(args, knob) for knob in Row._fields))
    if row.lam not in ("mu", "1-mu", "random"):
        try:
            lam = float(row.lam)
        except ValueError:
            lam = 0.0
        if not 0 < lam <= 1:
            raise UserError(f"--lam {row.lam}: give mu, 1-mu, random or a number in (0, 1]")
        row = row._replace(lam=f"{lam:g}")
    if row.lam == "1" and row.first in ("student", "average"):
        raise UserError(f"--lam {row.lam}: the whole step by --first {row.first} is what the map makes already; choose "
                        "--first teacher or solver")
    if row.mu == 1:
        raise UserError("--mu 1: must be below 1")
    if (row.first == "data" or args.anchor) and args.cfg_scale != 1:
        raise UserError(f"--cfg_scale {args.cfg_scale:g}: --first data and --anchor know no guidance; leave it out")
    own = {"mu": row.first in ("teacher", "data") and row.second in ("student", "average"),
           "1-mu": row.first == "student" and row.second == "teacher"}
    if row.tangent == "jvp" and not own.get(row.lam):
        raise UserError(f"--tangent jvp: --lam {row.lam} --first {row.first} --second {row.second} have no such limit; "
                        "choose the legs of euler, lagrange or meanflow, or leave it out")
    if row.first == "data" and row.tangent != "jvp":
        raise UserError("--first data: a finite leg from data is biased; add --tangent jvp")
    if (row.first == "data" or args.anchor) and row.times in DATA_FREE:
        raise UserError(f"--times {row.times}: its steps know no data, which --first data and --anchor need; choose "
                        "triangle")
    if args.grid & (args.grid - 1):
        raise UserError(f"--grid {args.grid}: must be a power of two")
    check_idle(args, {**defaults, **ROWS[args.row]._asdict()}, (
        ("cfg_interval", "--cfg_scale", args.cfg_scale != 1),
        ("mu", "finite legs and --lam mu or 1-mu", "mu" in row.lam and row.tangent != "jvp"),
        ("solver_steps", "a solver's leg (--row ctm, direct)", "solver" in row),
        *((flag, "--row progressive or --times grid", "before" in row or row.times == "grid")
          for flag in ("grid", "stage_iters")),
        ("tangent_warmup", "--tangent jvp", row.tangent == "jvp"),
        ("second", "--lam below 1 and finite legs", row.lam != "1" and (row.lam, row.tangent) != ("mu", "jvp")),
        ("borders", "--times triangle, start or end", row.times in ("triangle", "start", "end")),
        ("t_min", "times below --t_max (--times triangle, end or lognormal)", row.times in (
            "triangle", "end", "lognormal") or row.tangent == "jvp")))
    return row


def check_tangent(row, device):
    if row.tangent == "jvp" and device.type == "mps":
        raise UserError("--tangent jvp: needs float64, which mps has not; add --device cpu")


def main():
    args, defaults = parse_flags()
    row = check_row(args, defaults)
    run = Run(args, defaults, "flow_map")
    device = run.device
    check_tangent(row, device)
    teacher, config, problem = load_teacher(args, device)
    kind, latest = config.get("reference"), last_time(problem)
    if kind == "unpaired":
        raise UserError(f"--teacher_ckpt {args.teacher_ckpt}: an unpaired bridge knows no velocity, so there is no ODE "
                        "to follow; use distill.py --units data")
    args.t_max = args.t_max or latest
    args.t_min = args.t_min or time_of_noise_ratio(noise_levels(problem, config), RATIO_RANGE[0])
    if args.t_max > latest or args.t_max < latest and holds_data(config, args.t_max):
        raise UserError(f"--t_max {args.t_max:g}: a map starts from noise alone; give {latest:g}, where networks on "
                        "this path end, or little less")
    if args.t_min >= args.t_max:
        raise UserError(f"--t_min {args.t_min:g}: must be below --t_max {args.t_max:g}")
    free = row.times in DATA_FREE and not kind
    if free and args.data:
        raise UserError(f"--data {args.data}: --row {args.row} is data-free, nothing uses it; leave it out")
    args.data = args.data or (None if free else config.get("data"))
    if not free and not args.data:
        raise UserError(f"--row {args.row}: needs data to noise; add --data")
    state = run.resume("flow_map.pt", load_checkpoint, ("model", "ema", "before", "optimizer"))
    stream, made_with = open_for(teacher, args, run, config, state)
    decode = decoder(args.vae, config, device, needed=False)

    torch.manual_seed(args.seed)
    mapped = {**config, "network": {**config["network"], "second_time": True}}
    net = build_from(mapped, teacher)
    mapped["student"] = {"times": [args.t_max], "steps": 1, "cfg_scale": args.cfg_scale,
                         "cfg_interval": args.cfg_interval, "flow_map": args.row}
    average, before = frozen_copy(net), frozen_copy(net) if "before" in row else None
    with precision(device):
        round_weights(teacher)  # after its checksum, and after the map that starts from it
    for one in filter(None, (teacher, net, average, before)):
        one.grad_checkpoint = args.grad_checkpoint
        if args.compile:
            one.compile()
    X, step = put_in_training(net, torch.optim.Adam, args.lr, args, betas=(0.9, 0.99)), 0
    v_star = guided(teacher, args.cfg_scale, args.cfg_interval)
    if state:
        for one, key in ((net, "model"), (average, "ema"), *[(before, "before")] * bool(before)):
            load_weights(one, state[key], run.out / "flow_map.pt")
        X.load_moments(state["optimizer"])
        step, state = state["step"], None  # what was read is let go of
    run.begin(step)
    frozen = {"average": average, "teacher": teacher, "stage before": before}
    run.introduce(args.row, config, stream.data, {"map": net}, {name: one for name, one in frozen.items() if one})

    def save(step):
        moments = X.moments()
        if run.rank == 0:
            save_checkpoint(run.out / "flow_map.pt", {
                "config": mapped, "flags": vars(args), "step": step, "commit": code_commit(), **made_with,
                "model": net.state_dict(), "ema": average.state_dict(), "before": before and before.state_dict(),
                "optimizer": moments})

    panels = {}

    def picture(step):
        save_curves(run.out)
        path = run.out / f"flow_map_{step:07d}.png"
        return draw_picture(path, (average, mapped), (teacher, config), stream, decode, panels)

    batches = None if stream.data is None else stream.epochs(step)
    while step < args.iters:
        stage = min(step // args.stage_iters, args.grid.bit_length() - 1)  # the last has one step
        if before and step == stage * args.stage_iters > 0:
            before.load_state_dict(average.state_dict())
        legs = make_legs(problem, row, v_star, net, average, before if stage else None)
        b = stream.draw(step, "map")
        if batches:
            images = next(batches)
            b = b._replace(x0=images.x0, y=images.y, x1=b.x1 if images.x1 is None else images.x1)
        trip = draw_trip(problem, row, stream, b, step, args.grid >> stage)
        trip = trip._replace(share=min(1, (step + 1) / max(1, args.tangent_warmup)))
        for rows in run.pieces(X):
            part = trip.rows(rows)
            loss = total = map_loss(problem, row, legs, X.wrapped, part).mean()
            if args.anchor:
                anchor = regression_loss(problem, X.wrapped, part.b._replace(r=part.b.t)).mean()
                total = loss + args.anchor * anchor
                run.add(anchor=anchor)
            (total / args.accum).backward()
            run.add(loss=loss)
        run.descend(step, grad_norm=X)
        step += 1
        ema_update(average, net, args.ema, step)
        run.report(step, save, picture)


def draw_picture(path, flow_map, teacher, stream, decode, panels):
    """Twenty samples a row: what bridges start from, 1, 2 and 4 steps of the map, 50 of its teacher, which panels
    keeps -> path."""
    (average, mapped), (teacher, config), n = flow_map, teacher, 20
    x1, y = None, choose_labels("balanced", n, mapped)
    if stream.reference:
        _, x1, y = stream.pictured(n)
    if "teacher" not in panels:
        how = Sampler(50, cfg_scale=mapped["student"]["cfg_scale"], cfg_interval=mapped["student"]["cfg_interval"])
        panels["teacher"] = generate(teacher, config, y, stream.seed, range(n), how, x1, decode)
    steps = [generate(average, mapped, y, stream.seed, range(n), Sampler(k), x1, decode) for k in (1, 2, 4)]
    captions = ["from"] * (x1 is not None) + ["1 step", "2 steps", "4 steps", "teacher, 50"]
    rows = [*[x1] * (x1 is not None), *steps, panels["teacher"]]
    return save_picture(path, stack_rows(rows, 640, captions, column_names(mapped, y) if x1 is None else ()))


if __name__ == "__main__":
    command(main)
