"""The plane: a Gaussian mixture, every family a row of the picture, every objective of both kinds a column.

    python tests/plane.py --out assets/plane.png

The teacher is the mixture's exact data prediction, student and flow map are small networks added to it, and the critic
is the exact prediction of a batch of the student's samples. Each cell shows one-step samples, as a density, of one that
was trained for --iters iterations: by the losses of distill.py and flow_map.py, without anything else of a run.
"""
import concurrent.futures
import copy
import math
import os
import pathlib
import sys
import time

import torch
import torch.nn as nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from common.data import Stream  # noqa: E402
from common.images import save_picture, stack_rows  # noqa: E402
from common.run import Parser, UserError, command, number  # noqa: E402
from distill import OBJECTIVES, START_RATIO, check_objective, renoise, student_loss  # noqa: E402
from flow_map import ROWS, draw_trip, make_legs, map_loss  # noqa: E402
from interpolants import (FAMILIES, RATIO_RANGE, Problem, Sampler, last_time, solve, start_at,  # noqa: E402
                          time_grid, time_of_noise_ratio)
from model import ema_update  # noqa: E402

MEANS = torch.tensor([[1.0, 1.0], [-1.2, 0.8], [-0.8, -1.0], [1.1, -0.9]])
STDS = torch.tensor([0.15, 0.3, 0.2, 0.4])


def draw_mixture(n, g):
    """-> (n,2,1,1)."""
    k = torch.randint(len(MEANS), (n,), generator=g)
    return (MEANS[k] + STDS[k, None] * torch.randn(n, 2, generator=g))[..., None, None]


def sizes(problem, t):
    """alpha and s at t (B,), each (B,1): Problem.at() without slopes, for networks that are differentiated in t."""
    path, t = problem.path, t[:, None]
    return path.alpha(t), path.gamma(t) if problem.sees_x1 else torch.hypot(path.beta(t), path.gamma(t))


def without_x1(problem, x_t, t, x1):
    """x_t [- beta x1] = alpha x0 + s eps, (B,2)."""
    return x_t.flatten(1) - (problem.path.beta(t[:, None]) * x1.flatten(1) if problem.sees_x1 else 0)


def exact(problem, means=MEANS, stds=STDS):
    """E[x0 | x_t (, x1)] of the mixture, net(x_t (B,2,1,1), t, y, x1)."""
    def net(x_t, t, y=None, x1=None):
        alpha, s = sizes(problem, t)
        variance = alpha ** 2 * stds ** 2 + s ** 2  # (B,K)
        rest = without_x1(problem, x_t, t, x1)[:, None] - alpha[..., None] * means  # (B,K,2)
        weights = (-0.5 * rest.square().sum(2) / variance - variance.log()).softmax(1)
        inside = means + (alpha * stds ** 2 / variance)[..., None] * rest
        return (weights[..., None] * inside).sum(1)[..., None, None]
    return net


class Added(nn.Module):
    """The teacher and a small network of everything that it is given, of x_t in waves as well, at first 0."""

    def __init__(self, problem, width=96):
        super().__init__()
        self.problem, self.teacher = problem, exact(problem)
        self.net = nn.Sequential(nn.Linear(14, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                 nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x_t, t, y=None, x1=None, r=None):
        (alpha, s), end = sizes(self.problem, t), sizes(self.problem, torch.zeros_like(t) if r is None else r)
        x = without_x1(self.problem, x_t, t, x1) / torch.hypot(alpha, s)  # (B,2)
        given = [x, torch.atan2(s, alpha), torch.atan2(*end[::-1]), (0 * x_t if x1 is None else x1).flatten(1),
                 *(wave(k * x) for k in (2, 4) for wave in (torch.sin, torch.cos))]
        return self.teacher(x_t, t, y, x1) + self.net(torch.cat(given, 1))[..., None, None]


def draw(problem, stream, *key):
    """stream's batch; a bridge's x1 are four far points."""
    b = stream.draw(*key)
    return b._replace(x1=2 * b.x1.sign()) if problem.sees_x1 else b


def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.mean().backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)  # as runs do
    optimizer.step()


def make_optimizer(net, iters, betas):
    """-> Adam, and what lets its rate fall to 0 over these iterations."""
    optimizer = torch.optim.Adam(net.parameters(), 5e-3, betas=betas)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / iters)


def distill_point(problem, objective, stream, start, iters):
    """A student trained by the gap from the time `start` -> its samples, a function of a batch. The critic is the exact
    prediction of fresh samples of the student, each a narrow Gaussian."""
    teacher, G, average = exact(problem), Added(problem), Added(problem)
    own, schedule = make_optimizer(G, iters, (0.0, 0.99))
    for step in range(iters):
        b, others = (start_at(problem, draw(problem, stream, step, "start", i), start) for i in range(2))
        with torch.no_grad():
            centres = problem.data(G, others).flatten(1)
        critic = exact(problem, centres, torch.full((len(centres),), 0.1))
        fake = renoise(problem, b._replace(x0=problem.data(G, b)), draw(problem, stream, step, "gap"))
        descend(own, student_loss(problem, objective, teacher, critic, fake)[0])
        schedule.step()
        ema_update(average, G, 0.98, step + 1)
    return lambda b: problem.data(average, start_at(problem, b, start)).detach()


def map_point(problem, row, stream, iters):
    """-> the average of a flow map that is trained along the row."""
    teacher, net = exact(problem), Added(problem)
    average, before, g = copy.deepcopy(net), copy.deepcopy(net), torch.Generator().manual_seed(1)
    own, schedule = make_optimizer(net, iters, (0.9, 0.99))
    for step in range(iters):
        stage = min(5 * step // iters, 4)  # progressive distillation: 16, 8, 4, 2, 1 steps
        if step == -(-stage * iters // 5):
            before.load_state_dict(average.state_dict())
        legs = make_legs(problem, row, teacher, net, average, before if stage else None)
        b = draw(problem, stream, step, "map")._replace(x0=draw_mixture(stream.batch, g))
        trip = draw_trip(problem, row, stream, b, step, 16 >> stage)
        descend(own, map_loss(problem, row, legs, net, trip))
        schedule.step()
        ema_update(average, net, 0.98, step + 1)
    return average


def density(x, side=80, span=2.2):
    """Points (N,2,1,1) -> (side,side,1) uint8, dark where there are many."""
    seen = torch.histogramdd(x.flatten(1).nan_to_num(99.0).double(), [side, side], range=[-span, span] * 2)[0]
    ink = 255 * (1 - (seen / (len(x) / 400)).clamp(0, 1).sqrt())
    return ink.T.flip(0).to(torch.uint8)[..., None].numpy()


def distance(x, y):
    """Energy distance between two sets of as many points, on average 0 for the same law."""
    a, b = x.flatten(1), y.flatten(1)
    own = (torch.cdist(a, a).sum() + torch.cdist(b, b).sum()) / (len(a) * (len(a) - 1))  # of no point to itself
    return float(2 * torch.cdist(a, b).mean() - own)


def make_row(name, args):
    """A family's cells -> their densities."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # its networks are too small for more, and a process a row is at work
    problem = Problem(FAMILIES[name], "data", name == "bridge", name == "ve")  # EDM's weight
    times = [min(time_of_noise_ratio(problem, ratio), 0.999) for ratio in RATIO_RANGE]
    stream = Stream(0, args.batch, slice(None), torch.device("cpu"), (2, 1, 1), 0, times)
    shown = draw(problem, stream._replace(batch=args.n), "shown")
    truth = draw_mixture(args.n, torch.Generator().manual_seed(2))
    first = start_at(problem, shown, float(time_grid(problem, 50)[0]))
    cells = {"data": truth, "teacher, 50": solve(problem, exact(problem), first, Sampler(50),
                                                 lambda i: torch.randn_like(truth))}
    start, to_the_end = time_of_noise_ratio(problem, START_RATIO), stream._replace(times=(times[0], last_time(problem)))
    end = start_at(problem, shown, last_time(problem))
    for column, objective in OBJECTIVES.items():
        try:
            check_objective(problem, objective)
            cells[column] = distill_point(problem, objective, stream, start, args.iters)(shown)
        except UserError:  # it has no gradient there
            cells[column] = torch.full_like(truth, math.nan)
    for column, row in ROWS.items():
        row = row._replace(power=0.0)  # in the plane meanflow's 1 lets single samples pull it into a mode
        average = map_point(problem, row, to_the_end, args.iters)
        cells[column] = problem.data(average, end._replace(r=torch.zeros_like(end.t))).detach()
    print(name, *(f"{column} {distance(x, truth):.3f}" for column, x in cells.items()), sep="  ", flush=True)
    return [density(x) for x in cells.values()]


def main():
    parser = Parser(__doc__)
    parser.add_argument("--out", default="plane.png", help="the picture")
    parser.add_argument("--iters", type=number(int, 1), default=600, help="iterations of each cell")
    parser.add_argument("--batch", type=number(int, 1), default=256, help="points of each")
    parser.add_argument("--n", type=number(int, 2), default=4000, help="points of a cell")
    args, began = parser.parse_args(), time.time()
    print("energy distances to the data; 0 for the same law")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as workers:
        rows = list(workers.map(make_row, FAMILIES, [args] * len(FAMILIES)))
    names = ["data", "teacher, 50", *OBJECTIVES, *ROWS]
    save_picture(args.out, stack_rows(rows, 84 * len(names), list(FAMILIES), names))
    print(f"wrote {args.out} in {time.time() - began:.0f} s")


if __name__ == "__main__":
    command(main)
