"""A Gaussian mixture in the plane: teacher and critic in closed form, and every objective on every path recovers it.

The student is a mixture as well, x0 = mean_k + std_k eps with learnt means and stds, so that its critic's optimum is
exact: the posterior mean of its own law. A slow test learns the critic instead."""
import argparse

import pytest
import torch

from distill import OBJECTIVES, student_loss
from flow_map import ROWS as MAPS
from interpolants import FAMILIES, Batch, Problem, regression_loss, time_of_noise_ratio
from plane import MEANS, STDS, Added, descend, exact, make_row

BATCH = 256


class Student(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.means = torch.nn.Parameter(0.5 * MEANS + torch.tensor([0.2, -0.1]))
        self.log_stds = torch.nn.Parameter(torch.full((4,), -0.7))

    def forward(self, g):
        k = torch.randint(4, (BATCH,), generator=g)
        return (self.means[k] + self.log_stds.exp()[k, None] * torch.randn(BATCH, 2, generator=g))[..., None, None]


def setting(row, lowest):
    """-> the problem, and what draws a student's samples with the rest of their batch."""
    problem, g = Problem(FAMILIES[row], "data", row == "bridge"), torch.Generator().manual_seed(0)
    low, high = (time_of_noise_ratio(problem, ratio) for ratio in (lowest, 3.0))

    def draw(student):
        x1, z = torch.randn(2, BATCH, 2, 1, 1, generator=g)
        u = (torch.rand(1, generator=g) + torch.arange(BATCH) / BATCH) % 1
        x1 = 3 * torch.sign(x1) if problem.sees_x1 else x1  # a reference of its own: four far points
        return Batch(student(g), x1, z, low + (high - low) * u)
    return problem, draw


def recover(problem, objective, draw, make_critic, steps, tolerance, critic_steps=0):
    """Each mode of the truth has, after so many steps, a mode of the student near it, of its width."""
    student, teacher = Student(), exact(problem, MEANS, STDS)
    own = torch.optim.Adam(student.parameters(), betas=(0.0, 0.99))
    critic = make_critic(student, teacher)
    other = torch.optim.Adam(critic.parameters(), 0.01, betas=(0.0, 0.99)) if critic_steps else None
    for step in range(steps):
        own.param_groups[0]["lr"] = 7.5 / steps * (1 - step / steps)
        for _ in range(critic_steps):
            made = draw(student)
            descend(other, regression_loss(problem, critic, made._replace(x0=made.x0.detach())))
        descend(own, student_loss(problem, OBJECTIVES[objective], teacher, critic, draw(student))[0])
    distance, nearest = torch.cdist(MEANS, student.means.detach()).min(1)
    widths = (student.log_stds.detach().exp()[nearest] - STDS).abs()
    assert sorted(nearest.tolist()) == [0, 1, 2, 3]
    assert max(distance.max(), widths.max()) < tolerance, (distance, widths)


@pytest.mark.parametrize("row, objective", [
    pytest.param(row, objective, marks=[pytest.mark.slow] * ((i + j) % 2)) for i, row in enumerate(FAMILIES)
    for j, objective in enumerate(sorted(OBJECTIVES)) if (row, objective) != ("ve", "cross")])  # it has no gradient
def test_every_objective_recovers_the_mixture(row, objective):
    def best(student, _):  # of the student as it is at each call
        return lambda *args: exact(problem, student.means.detach(), student.log_stds.detach().exp())(*args)
    problem, draw = setting(row, 0.1)
    recover(problem, objective, draw, best, 250 if (row, objective) == ("bridge", "gap") else 150, 0.08)


@pytest.mark.slow
@pytest.mark.parametrize("row, objective", [("linear", "sid"), ("bridge", "cross")])
def test_with_a_learnt_critic(row, objective):
    torch.manual_seed(0)
    problem, draw = setting(row, 0.2)
    recover(problem, objective, draw, lambda *_: Added(problem), 250, 0.25, critic_steps=2)  # so small a
    # network blurs the sharp modes


@pytest.mark.parametrize("family", ["ve", pytest.param("bridge", marks=pytest.mark.slow)])
def test_the_planes_cells(family):
    """As many as objectives of both kinds, with points in all, but for the one without a gradient."""
    cells = make_row(family, argparse.Namespace(iters=2, batch=8, n=40))
    empty = [i for i, cell in enumerate(cells) if (cell == 255).all()]
    assert len(cells) == 2 + len(OBJECTIVES) + len(MAPS) and cells[0].shape == (80, 80, 1)
    assert empty == [2 + list(OBJECTIVES).index("cross")] * (family == "ve")
