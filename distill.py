"""Distill a teacher into a one-step student by the interpolant generalisation gap.

    python distill.py --teacher_ckpt out/teacher.pt --out out
    python distill.py --teacher_ckpt out/teacher.pt --objective dmd --cfg_scale 2 --iters 2000 --out out/dmd
    torchrun --nproc_per_node=8 distill.py --model SiT-XL/2 --teacher_ckpt teacher.pt --batch 128 --lr 1e-5 --ema 0.9999

The critic learns the velocity of the student's samples; the student descends   E w [ kappa |D|^2 + 2 <D, e> ]   with
D = v* - v_psi and e = v_psi - I'. Architecture, interpolant, prediction, image size and classes come from the teacher.
Writes OUT/student.pt, OUT/student_one_step_XXXXXXX.pth, OUT/resume.pt (the same command again goes on), OUT/log.jsonl
and OUT/distill_XXXXXXX.png (rows: on bridges what the student starts from; the student's samples; what teacher and
critic make of them at one noise level).
"""
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F

from common.autoencoder import decoder
from common.data import open_for
from common.files import load_checkpoint, save_checkpoint
from common.images import save_curves, save_picture, stack_rows, to_device, to_uint8
from common.run import (Parser, Run, Trained, UserError, add_run_flags, check_idle, code_commit, command, generator,
                        number, one_of, precision, put_in_training)
from flow_map import DATA_FREE, ROWS, check_tangent, draw_trip, make_legs, map_loss
from interpolants import (RATIO_RANGE, Batch, Problem, Sampler, check_log_snr, convert, last_time, loss_weight,
                          prediction_scale, regression_loss, solve, start_at, student_input, time_grid,
                          time_of_noise_ratio)
from model import build_from, ema_update, frozen_copy, guided, load_weights, round_weights
from sample import (add_teacher_flags, column_names, holds_data, is_flow_map, load_named, load_teacher,
                    noise_levels)


class Objective(NamedTuple):
    """The knobs of   a kappa |D|^2 + 2 <D, a psi - b target>   in `units`, times w, each a flag. Under grad `stop` the
    gradient reaches the student through the target alone and kappa means nothing. a, b: real_alpha and real_beta,
    RealUID's, 1 without real data."""
    kappa: float
    grad: str  # full or stop
    weight: str  # uniform or l1
    units: str  # velocity or data
    real_alpha: float = 1.0
    real_beta: float = 1.0


OBJECTIVES = {  # what a row sets, its flags override
    "gap": Objective(1.0, "full", "uniform", "velocity"),  # UID; FGM as written (arXiv:2410.19310)
    "cross": Objective(1.0, "stop", "uniform", "velocity"),  # Diff-Instruct (arXiv:2305.18455); 2/t on D in data units
    "sid": Objective(2 * (1 - 1.2), "full", "l1", "data"),  # SiD, a = 1.2 (arXiv:2404.04057, eq. 23)
    "dmd": Objective(1.0, "stop", "l1", "data"),  # DMD2 without its GAN (arXiv:2405.14867)
}
FLOW_ROWS = [name for name, row in ROWS.items() if "before" not in row]
START_RATIO = 2.5  # s / alpha at which the student starts by default: SiD's sigma, t = 0.714 on the linear path


# ---------------------------------------------------------------------------------------------------------------------
# The losses

def gap_loss(D, e, kappa=1.0, weight=1.0):
    """w [ kappa |D|^2 + 2 <D, e> ] per sample: D = star - psi, e = psi - target, each (B,C,H,W), w (B,) -> (B,), mean
    over the pixels. With kappa = 1 it is |star - target|^2 - |psi - target|^2, the generalisation gap of the two."""
    return weight * (kappa * D * D + 2 * D * e).flatten(1).mean(1)


WEIGHTS = {  # w (B,) of the samples x0, the teacher's guess x0_star of them, and the times t (B,)
    "uniform": lambda x0, x0_star, t: torch.ones_like(t),
    # 1 / mean|x0 - x0*| (SiD, arXiv:2404.04057, eq. 24; the code of DMD2, arXiv:2405.14867)
    "l1": lambda x0, x0_star, t: 1 / (x0 - x0_star).abs().mean((1, 2, 3)).clamp_min(1e-4),
}


def student_loss(problem, objective, teacher, critic, b):
    """The student's loss on its samples b.x0, noised to b.t -> loss (B,), |D|^2 (B,) without gradient. grad full: the
    gradient reaches b.x0 through the target and through x_t into both frozen networks; stop: through the target
    only."""
    b, velocity = problem.noised(b)
    with torch.set_grad_enabled(objective.grad == "full"):
        star, psi = problem.call(teacher, b), problem.call(critic, b)
        psi_u = convert(problem, psi, objective.units, b)
        D = convert(problem, star, objective.units, b) - psi_u
    alpha, beta = objective.real_alpha, objective.real_beta
    e = alpha * psi_u - beta * (velocity if objective.units == "velocity" else b.x0)
    with torch.no_grad():
        w = WEIGHTS[objective.weight](b.x0, convert(problem, star, "data", b), b.t)
    return gap_loss(D, e, alpha * objective.kappa, w), D.detach().square().flatten(1).mean(1)


def critic_loss(problem, objective, critic, fake, real=None):
    """What the critic minimises on the student's samples, (B,): its regression loss; with a or b below 1 RealUID's
    (arXiv:2509.22459, with delta = D), on real data as well:

        - E_student[ -a |D|^2 + 2 a <D, v*> - 2 b <D, I'> ] - E_data[ -(1-a) |D|^2 + 2 (1-a) <D, v*> - 2 (1-b) <D, I'> ]

    in `units`, weighted so that a = b = 1 has the gradient of the regression loss, and without the terms that are free
    of v_psi, so that v* drops out: with D = v* - v_psi, p |v_psi|^2 - 2 q <v_psi, I'> is left of each expectation."""
    a, b, units = objective.real_alpha, objective.real_beta, objective.units
    if a == b == 1:
        return regression_loss(problem, critic, fake)
    loss = 0
    for batch, p, q in ((fake, a, b), (real, 1 - a, 1 - b)):
        batch, velocity = problem.noised(batch)
        psi = convert(problem, problem.call(critic, batch), units, batch)
        own, other = (prediction_scale(problem, name, batch.t) for name in (problem.prediction, units))
        w = loss_weight(problem, batch.t) * (own / other) ** 2
        target = velocity if units == "velocity" else batch.x0
        loss = loss + (w * (p * psi * psi - 2 * q * psi * target)).flatten(1).mean(1)
    return loss


class Head(torch.nn.Module):
    """A discriminator's head: one logit out of the critic's middle tokens, positive for real."""

    def __init__(self, width):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, width), torch.nn.SiLU(),
                                       torch.nn.Linear(width, 1))

    def forward(self, tokens):
        return self.net(tokens).mean((1, 2))  # (B,T,D) -> (B,)


def discriminate(problem, critic, head, *batches):
    """Logits (B,) of each batch in turn, of what the critic's middle tokens show of it once it is noised."""
    noised = [problem.noised(b)[0] for b in batches]
    return head(torch.cat([critic(b.x_t, b.t, b.y, *[b.x1] * problem.sees_x1, middle=True) for b in noised]))


# ---------------------------------------------------------------------------------------------------------------------
# What the losses are taken on

def draw_start(problem, stream, net, times, *key):
    """What the student reads at the last of these times: labels and x1 or noise as functions of the key, the steps
    before made by net -> Batch with x_t and t."""
    b = stream.draw(*key)
    if stream.reference:
        given = stream.draw_data(*key)
        b = b._replace(x1=given.x1, y=given.y)
    with precision(stream.device):  # a context of its own: autocast remembers weights cast without gradient
        return student_input(problem, net, times, b, lambda i: stream.draw(*key, i)[1:3])  # x1, z


def renoise(problem, b, fresh):
    """Samples b.x0 with their labels, to be noised by fresh z, t and x1; a bridge keeps the x1 it came from."""
    return b._replace(z=fresh.z, t=fresh.t, x1=b.x1 if problem.sees_x1 else fresh.x1)


def draw_flow(problem, row, stream, *key):
    """What the trajectory loss is taken on -> flow_map.Trip."""
    b = stream.draw(*key, "map")
    if row.times not in DATA_FREE or stream.reference:
        b = renoise(problem, stream.draw_data(*key, "map"), b)
    return draw_trip(problem, row, stream, b, key)


class Watched(NamedTuple):
    """Starts that stay the same for the whole run: x1, z, y of b; and the time t, where signal and noise are equal, at
    which teacher and critic are shown the samples."""
    problem: Problem
    times: list
    b: Batch
    t: float
    seed: int

    def noise(self, *key):
        return torch.randn(self.b.z.shape, generator=generator(self.seed, "watched", *key)).to(self.b.z.device)

    @torch.no_grad()
    def samples(self, net):
        """net's samples from these starts, (50,C,H,W)."""
        b = student_input(self.problem, net, self.times, self.b, lambda i: (self.noise(i, 0), self.noise(i, 1)))
        return self.problem.data(net, b)

    @torch.no_grad()
    def spread(self, teacher):
        """Mean over pixels of the std over the teacher's samples from these labels and, on bridges, x1, by 25 steps."""
        b = start_at(self.problem, self.b, float(time_grid(self.problem, 25)[0]))
        x0 = solve(self.problem, teacher, b, Sampler(25), lambda i: self.noise("teacher", i))
        return float(x0.std(0).mean())

    @torch.no_grad()
    def rows(self, student, teacher, critic, n=10):
        """What a bridge starts from, the student's samples, and what teacher and critic make of them -> (n,C,H,W)
        each."""
        x0, b, given = self.samples(student)[:n], self.b.rows(slice(n)), self.problem.sees_x1
        t = torch.full((n,), self.t, device=x0.device)
        x1, z = b.x1 if given else b.x1.flip(0), b.z.flip(0)  # noise, but none that the sample was made from
        b, _ = self.problem.noised(b._replace(x0=x0, x1=x1, z=z, t=t))
        return [*[b.x1] * given, x0, self.problem.data(teacher, b), self.problem.data(critic, b)]


def watch(problem, stream, times, t, n=50):
    """-> Watched, n starts of this stream."""
    x1, z = (torch.randn((n, *stream.shape), generator=generator(stream.seed, "watched", i)).to(stream.device)
             for i in range(2))
    y = torch.arange(n, device=stream.device) % max(1, stream.num_classes)
    if stream.reference:
        rows, x1, _ = stream.pictured(n)
        x1, y = to_device(x1, stream.device), stream.labels(rows)
    return Watched(problem, times, Batch(x1=x1, z=z, y=y), t, stream.seed)


class Players(NamedTuple):
    """What is trained: student G, critic psi, the discriminator's head or None; and the student's averages."""
    G: Trained
    psi: Trained
    head: Optional[Trained]
    averages: list

    def trained(self):
        return [one for one in (self.G, self.psi, self.head) if one]

    def state(self):
        """For a checkpoint; called by all processes."""
        return {"student": self.G.net.state_dict(), "critic": self.psi.net.state_dict(),
                "head": self.head and self.head.net.state_dict(),
                "averages": [net.state_dict() for net in self.averages],
                "optimizers": [one.moments() for one in self.trained()]}

    def load(self, state, path):
        weights = [state["student"], state["critic"], *[state["head"]] * bool(self.head), *state["averages"]]
        for net, w in zip((*(one.net for one in self.trained()), *self.averages), weights):
            load_weights(net, w, path)
        for one, moments in zip(self.trained(), state["optimizers"]):
            one.load_moments(moments)


def make_players(args, config, teacher, first):
    """The student, of this configuration, starts from `first`, the critic from the teacher's average. Everyone stays in
    eval(): no dropout anywhere. Beta1 = 0: momentum chases a target that the other network has already moved."""
    torch.manual_seed(args.seed)  # a second time's embedding is new
    one_time = {**config, "network": {**config["network"], "second_time": False}}
    nets, device = [build_from(config, first), build_from(one_time, teacher)], next(teacher.parameters()).device
    averages = [frozen_copy(nets[0]) for _ in args.ema]
    torch.manual_seed(args.seed)
    nets.append(Head(nets[1].width).to(device) if args.gan_weight else None)
    for net in (teacher, *nets[:2]):
        net.grad_checkpoint = args.grad_checkpoint
        if args.compile:
            net.compile()
    rates = args.lr, args.critic_lr, args.gan_lr or args.critic_lr
    return Players(*(net and put_in_training(net, torch.optim.Adam, lr, args, betas=(0.0, 0.999))
                     for net, lr in zip(nets, rates)), averages)


# ---------------------------------------------------------------------------------------------------------------------
# The command

def parse_flags():
    parser = Parser(__doc__)
    add_teacher_flags(parser)
    add = parser.group("objective")
    add("--objective", type=one_of(OBJECTIVES), default="sid", help=", ".join(OBJECTIVES) + ": sets the flags below "
        "that say \"the objective's\", unless given")
    add("--kappa", type=number(float, -100, 100), default=None, help="factor of |D|^2 (the objective's)")
    add("--grad", type=one_of(("full", "stop")), default=None, help="full or stop (the objective's)")
    add("--weight", type=one_of(WEIGHTS), default=None, help=", ".join(WEIGHTS) + " = 1/mean|x0 - x0*| per sample "
        "(the objective's)")
    add("--units", type=one_of(("velocity", "data")), default=None, help="velocity or data (the objective's)")
    add("--t_min", type=number(float, 0, 1, open_low=True), default=None, help="smallest time of the losses (s/alpha = "
        f"{RATIO_RANGE[0]})")
    add("--t_max", type=number(float, 0, 1, open_low=True), default=None, help="largest time of the losses (s/alpha = "
        f"{RATIO_RANGE[1]:g})")
    add("--critic_cfg_scale", type=number(float, 0), default=1.0, help="guidance of the critic, in its training and "
        "in the student's loss (with --cfg_scale: SiD's long and short guidance)")
    add = parser.group("student and critic")
    add("--t_init", type=number(float, 0, 1, open_low=True), default=None, help=f"time at which the student starts "
        f"(where s/alpha = {START_RATIO}: 0.714 on the linear path; where it is a flow map, that one's own start)")
    add("--student_steps", type=number(int, 1), default=1, help="steps K of the student: it maps x_t at K times, "
        "evenly from --t_init down to --t_init / K, to data, and is re-noised in between")
    add("--k_psi", type=number(int, 1), default=1, help="critic steps an iteration")
    add("--k_G", type=number(int, 1), default=1, help="student steps an iteration")
    add("--reuse_samples", action="store_true", help="all critic steps of an iteration share the student step's "
        "samples (fresh times and noise): cheaper for --k_psi above 1")
    add("--critic_lr", type=number(float, 0, open_low=True), default=None, help="the critic's learning rate (twice "
        "--lr)")
    add("--ema", type=number(float, 0, 1), default=[0.98], nargs="+", help="decays of the student's averages; the "
        "first is sampled")
    add("--student_ckpt", default=None, help="a flow map of this teacher (flow_map.py) that the student starts "
        "from, at the map's own first time")
    add("--flow_weight", type=number(float, 0), default=0.0, help="weight of a trajectory loss on the student, "
        "which is a flow map then and takes several steps as well; 0 = off")
    add("--flow_row", type=one_of(FLOW_ROWS), default="freeflow", help="the row of flow_map.py that makes it: "
        + ", ".join(FLOW_ROWS) + "; freeflow and direct need no data and serve one step alone")
    add("--keep", type=number(int, 0), default=5, help="numbered checkpoints that stay: the newest, and every tenth; "
        "0 keeps all")
    add = parser.group("real data")
    add("--data", default=None, help="real data, for the flags below, --flow_row and bridges (which take their "
        "teacher's); as in train_teacher.py")
    add("--real_alpha", type=number(float, 0, 1, open_low=True), default=None, help="RealUID's alpha in (0, 1]: below "
        "1 the critic also learns from real data (the objective's)")
    add("--real_beta", type=number(float, 0, 1, open_low=True), default=None, help="RealUID's beta in (0, 1]; its "
        "authors' code keeps beta / alpha at 0.98 or 1.02 (the objective's)")
    add("--gan_weight", type=number(float, 0), default=0.0, help="weight of an adversarial loss on real data in the "
        "student's loss; 0 = off")
    add("--gan_critic_weight", type=number(float, 0, open_low=True), default=None, help="its weight in the critic's "
        "loss (--gan_weight)")
    add("--gan_lr", type=number(float, 0, open_low=True), default=None, help="the discriminator head's learning rate "
        "(the critic's)")
    add("--gan_from", type=number(int, 0), default=0, help="iteration at which the adversarial loss starts")
    add_run_flags(parser, iters=300, lr=3e-4, warmup=0, decay_from=0, log_every=10, sample_every=100)
    args, defaults = parser.parse_args(), vars(parser.parse_args([]))
    for knob, value in OBJECTIVES[args.objective]._asdict().items():
        if getattr(args, knob) is None:
            setattr(args, knob, value)
    args.critic_lr = args.critic_lr or 2 * args.lr
    check_idle(args, {**defaults, "kappa": OBJECTIVES[args.objective].kappa}, (
        ("cfg_interval", "--cfg_scale", args.cfg_scale != 1), ("kappa", "--grad full", args.grad == "full"),
        ("reuse_samples", "--k_psi above 1", args.k_psi > 1), ("flow_row", "--flow_weight", args.flow_weight > 0),
        *((flag, "--gan_weight", args.gan_weight > 0) for flag in ("gan_critic_weight", "gan_lr", "gan_from"))))
    return args, defaults


def check_objective(problem, objective):
    """Raise UserError where the stop-gradient objective gives no descent direction on this path."""
    if objective.grad != "stop" or objective.units == "data":  # there the weight is 2 s^2 / alpha^2 on any path
        return
    if bool((problem.at(torch.linspace(0.1, 0.9, 9)).dalpha == 0).all()):
        raise UserError("--units velocity: with --grad stop the student gets no gradient on a path whose alpha is "
                        "constant (alpha' = 0); use --units data")
    try:
        check_log_snr(problem)
    except ValueError as error:
        raise UserError(f"--grad stop: not a descent direction on this path ({error}); use --grad full") from None


def check_real(args, config):
    """Raise UserError where real data are asked for and missing, or where their loss has no meaning."""
    kind, changed = config.get("reference"), [f for f in ("real_alpha", "real_beta") if getattr(args, f) < 1]
    flag = f"--{changed[0]} {getattr(args, changed[0]):g}" if changed else f"--gan_weight {args.gan_weight:g}"
    flow = args.flow_weight and ROWS[args.flow_row].times not in DATA_FREE
    if kind == "unpaired" and args.units == "velocity":
        raise UserError(f"--units velocity: an unpaired bridge knows no velocity; use --units data (--objective "
                        f"{args.objective} --units data)")
    if (changed or args.gan_weight) and args.data is None and not kind:
        raise UserError(f"{flag}: needs real data; add --data")
    if args.data and not kind and not changed and not args.gan_weight and not flow:
        raise UserError(f"--data {args.data}: nothing uses it; add --real_alpha, --real_beta, --gan_weight or "
                        "--flow_weight with a row that needs data, or leave it out")
    if args.flow_weight and ROWS[args.flow_row].first == "data" and args.cfg_scale != 1:
        raise UserError(f"--cfg_scale {args.cfg_scale:g}: --flow_row {args.flow_row} knows no guidance; leave it out")
    if flow and args.data is None and not kind:
        raise UserError(f"--flow_row {args.flow_row}: needs data to noise; add --data, or take freeflow")
    if changed and args.grad == "stop":
        raise UserError(f"{flag}: under --grad stop (--objective {args.objective}) the student's direction is that of "
                        "a KL divergence only with a critic of the student alone; use --grad full, or leave it out")
    if changed and (args.cfg_scale != 1 or args.critic_cfg_scale != 1):
        raise UserError(f"{flag}: the data do not follow the law of a guided teacher (--cfg_scale {args.cfg_scale:g}, "
                        f"--critic_cfg_scale {args.critic_cfg_scale:g}); leave one out")


def open_start(args, config, device):
    """--student_ckpt -> what the student starts from, its network and configuration."""
    net, own = load_named("--student_ckpt", args.student_ckpt, device)
    for key in ("interpolant", "prediction", "reference", "gamma_scale"):
        if own.get(key) != config.get(key):
            raise UserError(f"--student_ckpt {args.student_ckpt}: its {key} is {own.get(key)}, the teacher's "
                            f"{config.get(key)}")
    if not is_flow_map(own) or own["network"] != {**config["network"], "second_time": True}:
        raise UserError(f"--student_ckpt {args.student_ckpt}: is no flow map with the sizes of the teacher "
                        f"{args.teacher_ckpt}")
    return net, own


def open_teacher(args, objective, device):
    """-> the teacher's network, the one that the student starts from (--student_ckpt, else the same), the student's
    configuration, and the problem; the flags that the checkpoints answer are filled."""
    if args.flow_weight:
        check_tangent(ROWS[args.flow_row], device)
    teacher, config, problem = load_teacher(args, device)
    kind = config.get("reference")
    if config.get("pairs"):
        raise UserError(f"--teacher_ckpt {args.teacher_ckpt}: learnt on pairs, whose noise belongs to its images, the "
                        "gap draws its own; distill it by flow_map.py")
    check_objective(problem, objective)
    check_real(args, config)
    if kind == "unpaired" and args.flow_weight:
        raise UserError(f"--flow_weight {args.flow_weight:g}: an unpaired bridge knows no velocity; leave it out")
    start = open_start(args, config, device) if args.student_ckpt else None

    shape, latest = noise_levels(problem, config), last_time(problem)
    first = start[1]["student"]["times"][0] if start else latest if args.flow_weight else None
    args.t_init = args.t_init or first or time_of_noise_ratio(shape, START_RATIO)
    if args.flow_weight and (args.t_init > latest or args.t_init < latest and holds_data(config, args.t_init)):
        raise UserError(f"--t_init {args.t_init:g}: with --flow_weight the student is a flow map, which starts from "
                        f"noise alone; give {latest:g}, where networks on this path end, or little less")
    if first and args.student_steps > 1:
        raise UserError(f"--student_steps {args.student_steps}: a flow map takes any number of steps; leave it out")
    one, t = torch.ones(1, 1), torch.tensor([args.t_init])
    if not float(convert(problem, one, "data", Batch(x1=one, t=t, x_t=2 * one)).abs()) < 1e3:
        raise UserError(f"--t_init {args.t_init:g}: there a {problem.prediction} prediction says nothing of the data "
                        f"on the {config['interpolant']} path; use less, such as 0.99")
    args.t_min, args.t_max = (given or min(time_of_noise_ratio(shape, ratio), 1 - 1e-3 if kind else 1.0)
                              for given, ratio in zip((args.t_min, args.t_max), RATIO_RANGE))
    if args.t_min >= args.t_max:
        raise UserError(f"--t_min {args.t_min}: must be below --t_max {args.t_max}")
    args.data = args.data or (config["data"] if kind else None)
    return teacher, start[0] if start else teacher, configure(args, config, start), problem


def configure(args, config, start):
    """The teacher's configuration -> the student's, which starts from `start`."""
    times = [args.t_init * (args.student_steps - i) / args.student_steps for i in range(args.student_steps)]
    config = {**config, "student": {"times": times, "steps": args.student_steps, **{key: getattr(args, key) for key in (
        "t_init", "cfg_scale", "cfg_interval", "objective", *Objective._fields)}}}
    if start or args.flow_weight:  # the student is a flow map
        config["network"] = {**config["network"], "second_time": True}
        config["student"]["flow_map"] = args.flow_row if args.flow_weight else start[1]["student"]["flow_map"]
    return config


def save_student(path, args, config, step, averages):
    first, *others = [net.state_dict() for net in averages]
    save_checkpoint(path, {"config": config, "step": step, "commit": code_commit(), "ema": first, "decays": args.ema,
                           "other_averages": others})


def save_copy(out, args, config, step, averages):
    """The student under a name of its own; of older ones --keep stay, and every tenth."""
    save_student(out / f"student_one_step_{step:07d}.pth", args, config, step, averages)
    copies = sorted(out.glob(f"student_one_step_{'[0-9]' * 7}.pth"))
    for old in copies[-args.keep - 1:-args.keep] if args.keep else ():  # those before may be of another --save_every
        if int(old.stem[-7:]) % (10 * args.save_every):
            old.unlink()


def draw_picture(path, rows, decode, config, labels):
    """What Watched.rows has shown -> path."""
    images = [to_uint8(decode(x) if decode else x) for x in rows]
    captions = ["from"] * (len(rows) - 3) + ["student", "teacher of it", "critic of it"]
    columns = () if config.get("reference") else column_names(config, labels[:10])
    return save_picture(path, stack_rows(images, 640, captions, columns))


def main():
    args, defaults = parse_flags()
    run, objective = Run(args, defaults, "distill"), Objective(*(getattr(args, knob) for knob in Objective._fields))
    device = run.device
    teacher, source, config, problem = open_teacher(args, objective, device)
    state = run.resume("resume.pt", load_checkpoint, ("student", "critic", "averages", "optimizers", "teacher"))
    stream, made_with = open_for(teacher, args, run, config, state)
    decode, times = decoder(args.vae, config, device, needed=False), config["student"]["times"]

    players, step, source = make_players(args, config, teacher, source), 0, None  # a map's own network is not kept
    G, psi, head, averages = players
    if state:
        players.load(state, run.out / "resume.pt")
        step, state = state["step"], None  # what was read is let go of
    with precision(device):
        round_weights(teacher)  # after its checksum, and after those that start from it
    v_star = guided(teacher, args.cfg_scale, args.cfg_interval)
    v_psi, trained_v_psi = (guided(net, args.critic_cfg_scale) for net in (psi.net, psi.wrapped))
    row, flow_stream = ROWS[args.flow_row], stream._replace(times=(args.t_min, args.t_init))
    legs = make_legs(problem, row, v_star, G.net, averages[0])
    watched = watch(problem, stream, times, time_of_noise_ratio(noise_levels(problem, config), 1.0))
    run.begin(step)
    trained = {name: one.net for name, one in zip(("student", "critic", "head"), players) if one}
    run.introduce(args.objective, config, stream.data, trained,
                  {"teacher": teacher, **{f"average {decay:g}:": net for decay, net in zip(args.ema, averages)}})

    def save(step):
        content = {"flags": vars(args), "step": step, "commit": code_commit(), **made_with, **players.state()}
        if run.rank == 0:
            save_checkpoint(run.out / "resume.pt", content)
            save_student(run.out / "student.pt", args, config, step, averages)
            if step % args.save_every == 0:
                save_copy(run.out, args, config, step, averages)

    def picture(step):
        save_curves(run.out)
        with precision(device):
            rows = watched.rows(averages[0], v_star, v_psi)
        return draw_picture(run.out / f"distill_{step:07d}.png", rows, decode, config, watched.b.y)

    seen = {"spread_data": stream.data_spread()} if stream.data else {}

    def facts():
        with precision(device):
            if args.sample_every and "spread_teacher" not in seen:
                seen["spread_teacher"] = watched.spread(v_star)
            seen["spread"] = float(watched.samples(G.net).std(0).mean())  # over the samples: falls on collapse
        D2 = run.first_line().get("D2")  # None before there is one, and where it was not finite
        return seen if D2 is None else {**seen, "D2_first": D2}

    while step < args.iters:
        adversarial = head is not None and step >= args.gan_from
        trains = int(torch.randint(args.student_steps, (), generator=generator(args.seed, step, "step")))
        upto = times[:trains + 1]  # of the student's steps the last of these is trained

        # The student's samples, with the graph of its own step. (With --accum that step builds one for each piece.)
        start = draw_start(problem, stream, G.net, upto, step, "student", 0)
        with precision(device), torch.set_grad_enabled(args.accum == 1):
            x0 = problem.data(G.wrapped, start)  # (B,C,H,W)

        # The critic learns the law of the student's samples, with fresh times and noise in every step; the last of its
        # steps learns on those that the student's step goes on from.
        for k in range(args.k_psi):
            made = start._replace(x0=x0.detach())
            if k < args.k_psi - 1 and not args.reuse_samples:
                made = draw_start(problem, stream, G.net, upto, step, "sample", k)
                with precision(device), torch.no_grad():
                    made = made._replace(x0=problem.data(G.net, made))
            fake, real = renoise(problem, made, stream.draw(step, "critic", k)), None
            if adversarial or min(objective.real_alpha, objective.real_beta) < 1:
                real = renoise(problem, stream.draw_data(step, "real", k), stream.draw(step, "real noise", k))
                real = real._replace(t=fake.t)
            for rows in run.pieces(psi, *[head] * adversarial):
                f, r = fake.rows(rows), real and real.rows(rows)
                loss = total = critic_loss(problem, objective, trained_v_psi, f, r).mean()
                if adversarial:  # non-saturating, on the critic's own tokens, which learn from it too
                    low, high = discriminate(problem, psi.net, head.wrapped, f, r).chunk(2)
                    head_loss = F.softplus(low).mean() + F.softplus(-high).mean()
                    total = loss + (args.gan_critic_weight or args.gan_weight) * head_loss
                    run.add(head_loss=head_loss)
                (total / args.accum).backward()
                run.add(critic_loss=loss)
            run.descend(step, critic_norm=psi, **{"head_norm": head} if adversarial else {})

        # The student descends the gap, through the frozen networks and on through its own graph.
        for k in range(args.k_G):
            if k > 0:
                start = draw_start(problem, stream, G.net, upto, step, "student", k)
            fake = renoise(problem, start, stream.draw(step, "gap", k))
            trip = draw_flow(problem, row, flow_stream, step, k) if args.flow_weight else None
            for rows in run.pieces(G, held=[one.net for one in (psi, head) if one]):
                if k > 0 or args.accum > 1:
                    x0 = problem.data(G.wrapped, start.rows(rows))
                b = fake.rows(rows)._replace(x0=x0)
                loss, D2 = (values.mean() for values in student_loss(problem, objective, v_star, v_psi, b))
                total = loss
                if adversarial:
                    fooled = F.softplus(-discriminate(problem, psi.net, head.net, b)).mean()
                    total = total + args.gan_weight * fooled
                    run.add(fooled=fooled)
                run.add(student_loss=loss, D2=D2)
                if trip:
                    flow_loss = map_loss(problem, row, legs, G.wrapped, trip.rows(rows)).mean()
                    total = total + args.flow_weight * flow_loss
                    run.add(flow_loss=flow_loss)
                (total / args.accum).backward()  # once: processes average their gradients in it
            run.descend(step, student_norm=G)

        step += 1
        for average, decay in zip(averages, args.ema):
            ema_update(average, G.net, decay, step)
        run.report(step, save, picture, facts)
    if step == run.first and run.rank == 0:  # nothing to do, but the file may be gone
        save_student(run.out / "student.pt", args, config, step, averages)


if __name__ == "__main__":
    command(main)
