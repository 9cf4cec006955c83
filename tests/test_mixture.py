"""A Gaussian mixture in the plane: teacher and critic in closed form, and every objective on every kind of path recovers it.

The student is a mixture as well, x0 = mean_k + std_k eps with learnt means and stds, so that its critic's optimum is exact: the
posterior mean of its own law. One test learns the critic instead."""
import pytest
import torch

from distill import OBJECTIVES, generator_loss
from interpolants import FAMILIES, coefficients, time_of_noise_ratio
from train_teacher import regression_loss

MEANS = torch.tensor([[1.0, 1.0], [-1.2, 0.8], [-0.8, -1.0], [1.1, -0.9]])
STDS = torch.tensor([0.15, 0.3, 0.2, 0.4])
BATCH = 256


def exact(path, means, stds, sees_x1):
    """E[x0 | x_t (, x1)] of the mixture: x_t [- beta x1] = alpha x0 + s eps. net(x_t (B,2,1,1), t, y, x1)."""
    def net(x_t, t, y=None, x1=None):
        k = coefficients(path, t, 2, sees_x1)
        r = (x_t - (coefficients(path, t, 4).beta * x1 if sees_x1 else 0)).flatten(1)  # (B,2)
        variance = k.alpha ** 2 * stds ** 2 + k.s ** 2  # (B,K)
        distance = ((r[:, None] - k.alpha[..., None] * means) ** 2).sum(2)  # (B,K)
        weights = (-0.5 * distance / variance - variance.log()).softmax(1)
        gain = k.alpha * stds ** 2 / variance  # (B,K)
        inside = means + gain[..., None] * (r[:, None] - k.alpha[..., None] * means)  # (B,K,2)
        return (weights[..., None] * inside).sum(1)[..., None, None]
    return net


class Student(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.means = torch.nn.Parameter(0.5 * MEANS + torch.tensor([0.2, -0.1]))
        self.log_stds = torch.nn.Parameter(torch.full((4,), -0.7))

    def forward(self, g):
        k = torch.randint(4, (BATCH,), generator=g)
        return (self.means[k] + self.log_stds.exp()[k, None] * torch.randn(BATCH, 2, generator=g))[..., None, None]


def draw(g, t_range, sees_x1):
    x1, z = torch.randn(2, BATCH, 2, 1, 1, generator=g)
    if sees_x1:  # a reference of its own: two far points
        x1 = 3 * torch.sign(x1)
    u = (torch.rand(1, generator=g) + torch.arange(BATCH) / BATCH) % 1
    return x1, z, t_range[0] + (t_range[1] - t_range[0]) * u


def recovers(student, tolerance):
    """Each mode of the truth has a mode of the student near it, of its width."""
    distance, nearest = torch.cdist(MEANS, student.means.detach()).min(1)
    widths = (student.log_stds.detach().exp()[nearest] - STDS).abs()
    assert sorted(nearest.tolist()) == [0, 1, 2, 3] and float(distance.max()) < tolerance and float(widths.max()) < tolerance, (
        distance, widths)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("row", ["linear", "vp", "gvp", "bridge"])
def test_every_objective_recovers_the_mixture(row, objective):
    path, sees_x1, g = FAMILIES[row], row == "bridge", torch.Generator().manual_seed(0)
    t_range = [time_of_noise_ratio(path, ratio, sees_x1) for ratio in (0.1, 3.0)]
    student, teacher = Student(), exact(path, MEANS, STDS, sees_x1)
    steps = 350
    optimizer = torch.optim.Adam(student.parameters(), 0.03, betas=(0.0, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        critic = exact(path, student.means.detach().clone(), student.log_stds.detach().exp(), sees_x1)
        x1, z, t = draw(g, t_range, sees_x1)
        loss, _ = generator_loss(path, "data", teacher, critic, student(g), x1, z, t, None, **OBJECTIVES[objective], sees_x1=sees_x1)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    recovers(student, 0.08)


class Critic(torch.nn.Module):
    """The teacher and a small network added to it, so that it starts from the teacher."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))
        torch.nn.init.zeros_(self.net[-1].weight), torch.nn.init.zeros_(self.net[-1].bias)

    def forward(self, x_t, t, y=None, x1=None):
        seen = torch.zeros_like(x_t) if x1 is None else x1
        correction = self.net(torch.cat([x_t.flatten(1), t[:, None], seen.flatten(1)], 1))
        return self.teacher(x_t, t, y, x1) + correction[..., None, None]


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("row", ["linear", "bridge"])
def test_with_a_learnt_critic(row, objective):
    path, sees_x1, g = FAMILIES[row], row == "bridge", torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    t_range = [time_of_noise_ratio(path, ratio, sees_x1) for ratio in (0.2, 3.0)]
    student, teacher = Student(), exact(path, MEANS, STDS, sees_x1)
    critic, steps = Critic(teacher), 600
    optimizers = [torch.optim.Adam(net.parameters(), lr, betas=(0.0, 0.99)) for net, lr in ((student, 0.01), (critic, 0.003))]
    for step in range(steps):
        optimizers[0].param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        for _ in range(2):
            x1, z, t = draw(g, t_range, sees_x1)
            optimizers[1].zero_grad()
            regression_loss(critic, path, "data", student(g).detach(), x1, z, t, None, sees_x1).mean().backward()
            optimizers[1].step()
        x1, z, t = draw(g, t_range, sees_x1)
        loss, _ = generator_loss(path, "data", teacher, critic, student(g), x1, z, t, None, **OBJECTIVES[objective], sees_x1=sees_x1)
        optimizers[0].zero_grad()
        loss.mean().backward()
        optimizers[0].step()
    recovers(student, 0.3)  # so small a network blurs the sharp modes
