"""Distill a teacher into a one-step student by the interpolant generalisation gap.

    python distill.py --teacher_ckpt out/teacher.pt --out out
    python distill.py --teacher_ckpt out/teacher.pt --objective dmd --cfg_scale 2 --iters 2000 --out out/dmd
    torchrun --nproc_per_node=8 distill.py --model SiT-XL/2 --teacher_ckpt teacher.pt --batch 128 --lr 1e-5 --cfg_scale 4.0 --k_psi 5

The critic learns the velocity of the student's samples; the student descends   E w [ kappa |D|^2 + 2 <D, e> ]   with
D = v* - v_psi and e = v_psi - I'. Architecture, interpolant, prediction, image size and classes come from the teacher.
Writes OUT/student.pt, OUT/student_one_step_XXXXXXX.pth, OUT/resume.pt (the same command again goes on), OUT/log.jsonl and
OUT/distill_XXXXXXX.png (rows: student, teacher's and critic's data prediction of the student's samples at one noise level).
"""
import contextlib
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from interpolants import check_log_snr, convert, family, interpolate, loss_weight, prediction_scale, time_of_noise_ratio
from model import UserError, build_model, checksum, ema_update, frozen_copy, guided, load_weights, save_checkpoint
from sample import (Parser, check_interval, command, decoder, enlarge, first_process, from_first, generator, grid, load_named, number, one_of, one_step,
                    path_of, save_picture, start_processes, step_input, to_device, to_uint8, wait_for_all)
from train_teacher import (Log, StopSignal, check_batch, check_same_data, count_skipped, draw_noise, gather_optimizer, keep, learning_rate, load_images,
                           load_moments, load_reference, lock, make_optimizer, optimizer_step, precision, regression_loss, resume, write_flags)

# An objective is a row: what it sets for the knobs that the command line leaves unset. kappa means nothing under `stop`.
OBJECTIVES = {
    "gap": dict(kappa=1.0, grad="full", weight="uniform", units="velocity"),  # UID; FGM as written (arXiv:2410.19310)
    "cross": dict(kappa=1.0, grad="stop", weight="uniform", units="velocity"),  # Diff-Instruct (arXiv:2305.18455) with 2/t
    "sid": dict(kappa=2 * (1 - 1.2), grad="full", weight="l1", units="data"),  # SiD, a = 1.2 (arXiv:2404.04057, eq. 23)
    "dmd": dict(kappa=1.0, grad="stop", weight="l1", units="data"),  # DMD2 without its GAN (arXiv:2405.14867)
}
GRADS, WEIGHTS, UNITS = ("full", "stop"), ("uniform", "l1"), ("velocity", "data")
START_RATIO = 2.5  # s / alpha at which the student starts unless told otherwise: SiD's sigma, t = 0.714 on the linear path
RATIO_RANGE = (0.02, 50.0)  # s / alpha of the times that losses are taken at


# ---------------------------------------------------------------------------------------------------------------------
# The losses

def gap_loss(D, e, kappa=1.0, weight=1.0):
    """w [ kappa |D|^2 + 2 <D, e> ] per sample: D = star - psi, e = psi - target, each (B,C,H,W) -> (B,), mean over the pixels.

    With kappa = 1 it equals |star - target|^2 - |psi - target|^2, the generalisation gap of the two predictions."""
    return (weight * (kappa * D * D + 2 * D * e)).flatten(1).mean(1)


def sample_weight(kind, x0, x0_star):
    """w (B,1,1,1): 1, or 1 / mean|x0 - x0*| per sample (DMD, arXiv:2311.18828, eq. 8; SiD, arXiv:2404.04057, eq. 24)."""
    if kind == "uniform":
        return torch.ones_like(x0[:, :1, :1, :1])
    return 1 / (x0 - x0_star).detach().abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-4)


def generator_loss(path, prediction, teacher, critic, x0, x1, z, t, y, kappa, grad, weight, units, sees_x1=False, a=1.0, b=1.0):
    """The student's loss on its samples x0 (B,C,H,W), re-noised to t (B,) -> loss (B,), |D|^2 (B,) without gradient.

    grad full: the gradient reaches x0 through the target and through x_t into both frozen networks. stop: through the target only.
    units: velocity (target I') or data (target x0). teacher and critic map (x_t, t, y) to `prediction`, and with sees_x1 (x_t, t, y, x1).
    a, b: RealUID's alpha and beta, a kappa |D|^2 + 2 <D, a psi - b target> (arXiv:2509.22459); 1 without real data."""
    given = (x1,) if sees_x1 else ()
    seen = x1 if sees_x1 else None
    x_t, velocity = interpolate(path, x0, x1, t, z)
    with torch.set_grad_enabled(grad == "full"):
        star, psi = teacher(x_t, t, y, *given), critic(x_t, t, y, *given)
        p_psi = convert(path, psi, prediction, units, x_t, t, seen)
        D = convert(path, star, prediction, units, x_t, t, seen) - p_psi
    e = a * p_psi - b * (velocity if units == "velocity" else x0)
    with torch.no_grad():
        w = sample_weight(weight, x0, convert(path, star, prediction, "data", x_t, t, seen))
    return gap_loss(D, e, a * kappa, w), D.detach().square().flatten(1).mean(1)


def real_critic_loss(path, prediction, teacher, critic, fake, real, units, a, b, sees_x1=False):
    """The critic's loss with real data, (B,), what psi minimises (RealUID, arXiv:2509.22459, with delta = D):

        - E_student[ -a |D|^2 + 2 a <D, v*> - 2 b <D, I'> ] - E_data[ -(1-a) |D|^2 + 2 (1-a) <D, v*> - 2 (1-b) <D, I'> ]

    in `units`, weighted so that a = b = 1 has the gradient of regression_loss. fake, real: (x0, x1, z, t, y) of the student's samples and
    of the data. The student's half is generator_loss, exact for kappa = 1."""
    loss = 0
    for (x0, x1, z, t, y), p, q in ((fake, a, b), (real, 1 - a, 1 - b)):
        given, seen = ((x1,), x1) if sees_x1 else ((), None)
        x_t, velocity = interpolate(path, x0, x1, t, z)
        with torch.no_grad():
            star = convert(path, teacher(x_t, t, y, *given), prediction, units, x_t, t, seen)
        D = star - convert(path, critic(x_t, t, y, *given), prediction, units, x_t, t, seen)
        scale = [prediction_scale(path, name, t, x0.ndim, sees_x1) for name in (prediction, units)]
        w = loss_weight(path, prediction, t, x0.ndim, sees_x1) * (scale[0] / scale[1]) ** 2
        target = velocity if units == "velocity" else x0
        loss = loss + (w * (p * D * D - 2 * p * D * star + 2 * q * D * target)).flatten(1).mean(1)
    return loss


class Head(torch.nn.Module):
    """A discriminator's head: one logit out of the critic's middle tokens, positive for real."""

    def __init__(self, width):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, width), torch.nn.SiLU(), torch.nn.Linear(width, 1))

    def forward(self, tokens):
        return self.net(tokens).mean((1, 2))  # (B,T,D) -> (B,)


def middle_tokens(critic, path, x0, x1, z, t, y, sees_x1=False):
    """What the discriminator sees of x0 (B,C,H,W) once it is noised to t -> (B,T,D)."""
    x_t, _ = interpolate(path, x0, x1, t, z)
    return critic(x_t, t, y, x1 if sees_x1 else None, middle=True)


def check_objective(path, grad, units, sees_x1=False):
    """Raise UserError where the stop-gradient objective gives no descent direction on this path."""
    if grad != "stop":
        return
    if units == "velocity" and bool((path.alpha(torch.linspace(0.1, 0.9, 9)) == 1).all()):
        raise UserError("--units velocity: with --grad stop the student gets no gradient on a path whose alpha is constant "
                        "(alpha' = 0); use --units data")
    try:
        check_log_snr(path, sees_x1=sees_x1)
    except ValueError as error:
        raise UserError(f"--grad stop: not a descent direction on this path ({error}); use --grad full") from None


def check_real(args, config):
    """Raise UserError where real data are asked for and missing, or where their loss has no meaning."""
    kind = config.get("reference")
    if not kind and args.reference is not None:
        raise UserError(f"--reference {args.reference}: the teacher starts from noise, not from a reference; leave it out")
    if kind == "unpaired" and args.units == "velocity":
        raise UserError(f"--units velocity: an unpaired bridge knows no velocity; use --units data (--objective {args.objective} --units data)")
    changed = [flag for flag, value in (("real_alpha", args.real_alpha), ("real_beta", args.real_beta)) if value < 1]
    if (changed or args.gan_weight) and args.data is None and not kind:
        flag = changed[0] if changed else "gan_weight"
        raise UserError(f"--{flag} {getattr(args, flag):g}: needs real data; add --data")
    if args.data and not kind and not changed and not args.gan_weight:
        raise UserError(f"--data {args.data}: nothing uses it; add --real_alpha, --real_beta or --gan_weight, or leave it out")
    if changed and args.grad == "stop":
        raise UserError(f"--{changed[0]} {getattr(args, changed[0]):g}: under --grad stop (--objective {args.objective}) the student's direction is "
                        "that of a KL divergence only with a critic of the student alone; use --grad full, or leave it out")
    if changed and (args.cfg_scale != 1 or args.critic_cfg_scale != 1):
        raise UserError(f"--{changed[0]} {getattr(args, changed[0]):g}: the data do not follow the law of a guided teacher (--cfg_scale "
                        f"{args.cfg_scale:g}, --critic_cfg_scale {args.critic_cfg_scale:g}); leave one out")


# ---------------------------------------------------------------------------------------------------------------------
# The command

def parse_flags():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--teacher_ckpt", default="out/teacher.pt", help="the teacher's checkpoint")
    add("--model", default=None, help="if given, must be the teacher's network, such as SiT-XL/2")
    add("--objective", type=one_of(OBJECTIVES), default="sid", help=", ".join(OBJECTIVES) + ": a row of the four flags below")
    add("--kappa", type=number(float, -100, 100), default=None, help="factor of |D|^2 (the objective's)")
    add("--grad", type=one_of(GRADS), default=None, help="full or stop (the objective's)")
    add("--weight", type=one_of(WEIGHTS), default=None, help="uniform, or l1 = 1/mean|x0 - x0*| per sample (the objective's)")
    add("--units", type=one_of(UNITS), default=None, help="velocity or data (the objective's)")
    add("--k_psi", type=number(int, 1), default=1, help="critic steps an iteration")
    add("--k_G", type=number(int, 1), default=1, help="student steps an iteration")
    add("--reuse_samples", action="store_true", help="all critic steps of an iteration share the student step's samples (fresh "
        "times and noise): cheaper for --k_psi above 1")
    add("--t_init", type=number(float, 0, 1, open_low=True), default=None, help=f"time at which the student starts (where s/alpha "
        f"= {START_RATIO}: 0.714 on the linear path)")
    add("--t_min", type=number(float, 0, 1, open_low=True), default=None, help="smallest time of the losses (s/alpha = "
        f"{RATIO_RANGE[0]})")
    add("--t_max", type=number(float, 0, 1, open_low=True), default=None, help="largest time of the losses (s/alpha = "
        f"{RATIO_RANGE[1]:g})")
    add("--student_steps", type=number(int, 1), default=1, help="steps of the student: it maps x_t at this many times, spread evenly below "
        "--t_init, to data, and is re-noised in between")
    add("--cfg_scale", type=number(float, 0), default=1.0, help="guidance of the teacher: 1 = conditional, 0 = unconditional")
    add("--cfg_interval", type=number(float, 0, 1), nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"), help="times at which the "
        "teacher is guided")
    add("--critic_cfg_scale", type=number(float, 0), default=1.0, help="guidance of the critic, in its training and in the student's loss "
        "(with --cfg_scale: SiD's long and short guidance)")
    add("--data", default=None, help="real data, for the three flags below and for bridges (a bridge takes its teacher's); as in "
        "train_teacher.py")
    add("--data_dir", default="data", help="where downloads and decoded folders are kept")
    add("--vae", default=None, help="autoencoder that decodes the latents for pictures")
    add("--reference", default=None, help="what a bridge starts from (its teacher's)")
    add("--real_alpha", type=number(float, 0, 1, open_low=True), default=1.0, help="RealUID's alpha in (0, 1]: below 1 the critic also "
        "learns from real data")
    add("--real_beta", type=number(float, 0, 1, open_low=True), default=1.0, help="RealUID's beta in (0, 1]")
    add("--gan_weight", type=number(float, 0), default=0.0, help="weight of an adversarial loss on real data; 0 = off")
    add("--gan_lr", type=number(float, 0, open_low=True), default=None, help="the discriminator head's learning rate (the critic's)")
    add("--gan_from", type=number(int, 0), default=0, help="iteration at which the adversarial loss starts")
    add("--iters", type=number(int, 1), default=300, help="iterations in all; raise it to go on")
    add("--batch", type=number(int, 1), default=64, help="images a step, over all processes")
    add("--accum", type=number(int, 1), default=1, help="pieces that each process cuts its share of the batch into: less memory, one more pass")
    add("--lr", type=number(float, 0, open_low=True), default=6e-4, help="the student's Adam learning rate")
    add("--critic_lr", type=number(float, 0, open_low=True), default=None, help="the critic's (3 times the student's)")
    add("--warmup", type=number(int, 0), default=0, help="iterations of linear warm-up")
    add("--decay_from", type=number(int, 0), default=0, help="from here the rates fall as 1/sqrt(iteration); 0 = never")
    add("--clip", type=number(float, 0, open_low=True), default=1.0, help="largest gradient norm of either network")
    add("--ema", type=number(float, 0, 1), default=[0.995], nargs="+", help="decays of the student's averages; the first is sampled")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of labels, noise and times")
    add("--out", default="out", help="folder of the run")
    add("--fresh", action="store_true", help="start over although --out holds a run")
    add("--log_every", type=number(int, 1), default=10, help="iterations between lines")
    add("--sample_every", type=number(int, 1), default=100, help="iterations between pictures")
    add("--save_every", type=number(int, 1), default=1000, help="iterations between checkpoints")
    add("--compile", action="store_true", help="torch.compile the three networks")
    add("--grad_checkpoint", action="store_true", help="recompute blocks in the backward pass: less memory, a third more time")
    add("--shard", action="store_true", help="split the optimizers' moments over the processes")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--timeout", type=number(float, 1), default=600, help="seconds after which a process gives up on another that hangs")
    args, defaults = parser.parse_args(), vars(parser.parse_args([]))
    for knob, value in OBJECTIVES[args.objective].items():
        if getattr(args, knob) is None:
            setattr(args, knob, value)
    args.critic_lr = args.critic_lr or 3 * args.lr
    return args, defaults


def main():
    args, defaults = parse_flags()
    rank, world, device = start_processes(args.device, args.timeout)
    check_batch(args.batch, world, args.accum)
    out = pathlib.Path(args.out)
    if from_first(out.is_dir()):  # a new folder is made and locked when there is something to write
        first_process(lambda: lock(out), rank, world)
    torch.set_float32_matmul_precision("high")
    say = print if rank == 0 else lambda *_: None

    # The teacher, and what follows from its checkpoint.
    teacher, config = load_named("--teacher_ckpt", args.teacher_ckpt, device)
    if "student" in config:
        raise UserError(f"--teacher_ckpt {args.teacher_ckpt}: is a student, give its teacher")
    if args.model not in (None, config["model"]):
        raise UserError(f"--model {args.model}: the teacher {args.teacher_ckpt} is a {config['model']}; leave --model out")
    if args.cfg_scale != 1 and teacher.num_classes == 0:
        raise UserError(f"--cfg_scale {args.cfg_scale:g}: the teacher {args.teacher_ckpt} has no classes to guide with")
    path, prediction, kind = path_of(config), config["prediction"], config.get("reference")
    sees_x1 = kind is not None  # a bridge: x1 is given to the networks, not noise
    shape = family(config["interpolant"]) if sees_x1 else path  # noise levels name times whatever a bridge's gamma_scale
    check_objective(path, args.grad, args.units, sees_x1)
    check_real(args, config)
    check_interval(args.cfg_interval)
    if args.critic_cfg_scale != 1 and teacher.num_classes == 0:
        raise UserError(f"--critic_cfg_scale {args.critic_cfg_scale:g}: the teacher {args.teacher_ckpt} has no classes to guide with")
    for flag, value, default in (("gan_lr", args.gan_lr, None), ("gan_from", args.gan_from, 0)):
        if value != default and not args.gan_weight:
            raise UserError(f"--{flag} {value}: there is no adversarial loss; add --gan_weight, or leave it out")
    args.t_init = args.t_init or time_of_noise_ratio(shape, START_RATIO, sees_x1)
    one = torch.ones(1, 1)
    if not float(convert(path, one, prediction, "data", 2 * one, torch.tensor([args.t_init]), one if sees_x1 else None).abs()) < 1e3:
        raise UserError(f"--t_init {args.t_init:g}: there a {prediction} prediction says nothing of the data on the "
                        f"{config['interpolant']} path; use less, such as 0.99")
    args.t_min, args.t_max = (given or min(time_of_noise_ratio(shape, ratio, sees_x1), 1 - 1e-3 if sees_x1 else 1.0)
                              for given, ratio in zip((args.t_min, args.t_max), RATIO_RANGE))
    if args.t_min >= args.t_max:
        raise UserError(f"--t_min {args.t_min}: must be below --t_max {args.t_max}")
    times = [args.t_init * (args.student_steps - i) / args.student_steps for i in range(args.student_steps)]
    config = {**config, "student": {"t_init": args.t_init, "times": times, "steps": args.student_steps, "cfg_scale": args.cfg_scale,
                                    "cfg_interval": args.cfg_interval, "objective": args.objective, "kappa": args.kappa,
                                    "grad": args.grad, "weight": args.weight, "units": args.units}}

    # Real data: what bridges start from, and what RealUID and the discriminator learn from.
    args.data = args.data or (config["data"] if kind else None)
    args.reference = args.reference or (config["reference_source"] if kind else None)
    state = resume(out / "resume.pt", args, defaults, "distillation", ("student", "critic", "averages", "optimizers", "teacher"), say)
    data, reference, fingerprint = None, None, None
    if args.data:
        def load():
            side = None if config.get("latent") else config["network"]["image_size"]
            return load_images(args.data, args.data_dir, side, args.seed, say=say)
        data = first_process(load, rank, world) or load()
        if (data.channels != teacher.channels or data.side != config["network"]["image_size"]
                or (teacher.num_classes and data.num_classes not in (0, teacher.num_classes))):
            raise UserError(f"--data {args.data}: {data.side}x{data.side}x{data.channels} and {data.num_classes} classes, the teacher has "
                            f"{config['network']['image_size']}x{config['network']['image_size']}x{teacher.channels} and {teacher.num_classes}")

        wait_for_all()
        fingerprint = data.fingerprint()
        check_same_data(state, fingerprint, out / "resume.pt", args.data)

        def load_ref():
            return load_reference(args.reference, data.images, args.data_dir, say)
        reference = (first_process(load_ref, rank, world) or load_ref()) if kind else None
        wait_for_all()
        if data.latent and config.get("latent", {}).get("autoencoder") not in (None, data.latent["autoencoder"]):
            raise UserError(f"--data {args.data}: its latents were made with another autoencoder than the teacher's")
        if reference and reference.kind != kind:
            raise UserError(f"--reference {args.reference}: is {reference.kind}, the teacher's is {kind}")
    teacher_id = checksum(teacher.state_dict())
    if state and state["teacher"] != teacher_id:
        raise UserError(f"--teacher_ckpt {args.teacher_ckpt}: is not the teacher that {out / 'resume.pt'} was made with; choose "
                        "another --out, or start over with --fresh")

    decode = decoder(args.vae, config, device, needed=False)

    # Student and critic start from the teacher's average. Everyone stays in eval(): no dropout anywhere.
    student, critic = build_model(config).to(device).eval(), build_model(config).to(device).eval()
    student.load_state_dict(teacher.state_dict())
    critic.load_state_dict(teacher.state_dict())
    averages = [frozen_copy(student) for _ in args.ema]
    torch.manual_seed(args.seed)
    head = Head(critic.width).to(device) if args.gan_weight else None
    for net in (teacher, student, critic):
        net.grad_checkpoint = args.grad_checkpoint
    optimizers = [make_optimizer(torch.optim.Adam, net, lr, device, args.shard, betas=(0.0, 0.999))
                  for net, lr in ((student, args.lr), (critic, args.critic_lr), (head, args.gan_lr or args.critic_lr)) if net]
    step = 0
    if state:
        for net, weights in zip((student, critic, *averages), (state["student"], state["critic"], *state["averages"])):
            load_weights(net, weights, out / "resume.pt")
        if head:
            load_weights(head, state["head"], out / "resume.pt")
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            load_moments(optimizer, saved, out / "resume.pt")
        step = state["step"]
        say(f"going on from iteration {step} of {out / 'resume.pt'}")
    if args.compile:
        for net in (teacher, student, critic):
            net.compile()
    wrap = DistributedDataParallel if world > 1 else (lambda net: net)
    wrapped_student, wrapped_critic, wrapped_head = wrap(student), wrap(critic), wrap(head) if head else None
    if rank == 0:
        lock(out)
        write_flags(out, "distill", vars(args))
    say(f"from the teacher: {config['model']}, {config['interpolant']} path, {prediction} prediction, "
        f"{student.num_classes} classes; {device}" + (f" x {world}" if world > 1 else ""))

    channels, side = student.channels, config["network"]["image_size"]
    share = args.batch // world
    mine = slice(rank * share, (rank + 1) * share)
    pieces = [slice(i, i + share // args.accum) for i in range(0, share, share // args.accum)]  # of this process' rows, one backward pass each

    def take(batch, rows):
        """The rows of each of these tensors; None stays None."""
        return batch and tuple(v if v is None else v[rows] for v in batch)

    def in_piece(rows, *nets):
        """Gradients are averaged over the processes in the last piece's backward pass."""
        stack = contextlib.ExitStack()
        for net in nets if world > 1 and rows != pieces[-1] else ():
            if net:
                stack.enter_context(net.no_sync())
        return stack

    def draw(*key):
        """Fresh x1, z, times and labels of this process' part of the batch: functions of (seed, step, key, global index)."""
        x1, z, u = draw_noise((args.batch, channels, side, side), mine, device, args.seed, step, *key)
        g = generator(args.seed, step, *key, "labels", device=device)
        y = torch.randint(max(1, student.num_classes), (args.batch,), generator=g, device=device)[mine]
        return x1, z, args.t_min + (args.t_max - args.t_min) * u, y

    def labels_of(chosen):
        """Labels of real images, the null class where they have none."""
        y = torch.from_numpy(data.labels[chosen]).to(device)
        return y if data.num_classes and student.num_classes else torch.full_like(y, student.num_classes)

    def draw_data(*key):
        """Real images x0 with their labels and, for bridges, their x1, drawn in the same manner."""
        g = generator(args.seed, step, *key, "images")
        chosen = torch.randint(len(data.images), (args.batch,), generator=g).numpy()
        x0 = data.x0(data.images[chosen[mine]], chosen, mine, device, args.seed, step, *key)
        y = labels_of(chosen[mine])
        x1 = to_device(reference.rows(data.images, chosen, args.seed, step, "-".join(map(str, key)), mine), device) if kind else None
        return x0, x1, y

    def draw_start(*key):
        """Labels and x1 that a student's sample starts from (x1 is None where it starts from noise), and the noise of its steps."""
        first, x1, z, _, y = None, *draw(*key)
        if kind:
            _, first, y = draw_data(*key)
        return first, y, lambda i: (x1, z) if i == 0 else draw(*key, i)[:2]

    def guided_teacher(x_t, t, y, x1=None):
        return guided(teacher, x_t, t, y, args.cfg_scale, x1, args.cfg_interval)

    def guided_critic(x_t, t, y, x1=None):
        return guided(critic, x_t, t, y, args.critic_cfg_scale, x1)

    def trained_critic(x_t, t, y, x1=None):
        return guided(wrapped_critic, x_t, t, y, args.critic_cfg_scale, x1)

    # What pictures and the spread are measured on: ten columns of fixed noise, and the time where signal and noise are equal.
    watched = [torch.randn((50, channels, side, side), generator=generator(args.seed, "watched", i)).to(device) for i in range(3)]
    watched_y, watched_x1 = torch.arange(50, device=device) % max(1, student.num_classes), None
    if kind:
        first = np.random.default_rng(args.seed).integers(len(data.images), size=50)
        watched_x1 = to_device(reference.rows(data.images, first, args.seed, 0, "picture"), device)
        watched_y = labels_of(first)

    @torch.no_grad()
    def watch(net, n):
        """The student's samples from the first n watched starts."""
        x1 = None if watched_x1 is None else watched_x1[:n]
        noise = {0: watched[:2]}

        def draw(i):
            if i not in noise:
                noise[i] = [torch.randn(watched[0].shape, generator=generator(args.seed, "watched", i, j)).to(device) for j in range(2)]
            return [v[:n] for v in noise[i]]
        x_t = step_input(path, net, prediction, times, len(times) - 1, draw, watched_y[:n], x1)
        return one_step(path, net, prediction, times[-1], x_t, watched_y[:n], x1), x1

    def spread():
        """Mean over the pixels of the student's std over the watched batch: falls when it collapses."""
        return float(watch(student, 50)[0].std(0).mean())

    @torch.no_grad()
    def picture():
        if rank > 0:
            return
        x0, x1 = watch(averages[0], 10)
        y, t = watched_y[:10], torch.full((10,), time_of_noise_ratio(shape, 1.0, sees_x1), device=device)
        given = () if x1 is None else (x1,)
        x_t, _ = interpolate(path, x0, watched[2][:10] if x1 is None else x1, t, watched[1][:10])
        rows = [*given, x0] + [convert(path, net(x_t, t, y, *given), prediction, "data", x_t, t, x1)
                               for net in (guided_teacher, guided_critic)]
        rows = [decode(row) for row in rows] if decode else rows
        save_picture(out / f"distill_{step:07d}.png", enlarge(grid(np.concatenate([to_uint8(row) for row in rows]), 10)))

    def result():
        weights = [net.state_dict() for net in averages]
        return {"config": config, "step": step, "ema": weights[0], "decays": args.ema, "other_averages": weights[1:]}

    def save():
        moments = [gather_optimizer(optimizer, rank) for optimizer in optimizers]
        if rank > 0:
            return
        save_checkpoint(out / "resume.pt", {"flags": vars(args), "step": step, "teacher": teacher_id, "student": student.state_dict(),
                                            "critic": critic.state_dict(), "averages": [net.state_dict() for net in averages],
                                            "optimizers": moments,
                                            "head": head.state_dict() if head else None,
                                            "data": fingerprint})
        if step % args.save_every == 0:
            save_checkpoint(out / f"student_one_step_{step:07d}.pth", result())

    real = args.real_alpha < 1 or args.real_beta < 1
    stop, skipped, failures, wait = StopSignal(), 0, 0, device.type != "cuda"
    log = Log(out, "distill", step, args.iters, args.batch, rank, world, device)
    while step < args.iters:
        finite, rates = True, [learning_rate(step, lr, args.warmup, args.decay_from) for lr in (args.lr, args.critic_lr, args.gan_lr or args.critic_lr)]

        adversarial = head is not None and step >= args.gan_from

        # The student's samples, with the graph of its own step. It is built once (with --accum for each piece); a critic step
        # uses the same images. With several steps, one of them, the same for the whole batch, is trained on what those before it have made.
        last = int(torch.randint(args.student_steps, (), generator=generator(args.seed, step, "step")))
        start, y, noise = draw_start("student", 0)
        with precision(device):  # a context of its own: autocast remembers weights cast without gradient
            x_t = step_input(path, student, prediction, times, last, noise, y, start)
        with precision(device), torch.set_grad_enabled(args.accum == 1):  # in pieces, each builds its own graph below
            x0 = one_step(path, wrapped_student, prediction, times[last], x_t, y, start)  # (B,C,H,W)

        # The critic: regression on the student's samples, fresh noise and times in every step; a bridge keeps the x1 it came from.
        for k in range(args.k_psi):
            samples, labels, given = x0.detach(), y, start
            new_x1, new_z, t, _ = draw("critic", k)
            with precision(device):
                if k < args.k_psi - 1 and not args.reuse_samples:
                    with torch.no_grad():
                        given, labels, noise = draw_start("sample", k)
                        samples = one_step(path, student, prediction, times[last],
                                           step_input(path, student, prediction, times, last, noise, labels, given), labels, given)
                fake, true = (samples, given if kind else new_x1, new_z, t, labels), None
                if data and (adversarial or real):
                    real_x0, real_x1, real_y = draw_data("real", k)
                    other_x1, other_z, _, _ = draw("real noise", k)
                    true = (real_x0, real_x1 if kind else other_x1, other_z, t, real_y)
            for rows in pieces:
                with in_piece(rows, wrapped_critic, wrapped_head), precision(device):
                    made, found = take(fake, rows), take(true, rows)
                    if real:
                        critic_loss = real_critic_loss(path, prediction, guided_teacher, trained_critic, made, found, args.units, args.real_alpha,
                                                       args.real_beta, sees_x1).mean()
                    else:
                        critic_loss = regression_loss(trained_critic, path, prediction, *made, sees_x1).mean()
                    total = critic_loss
                    if adversarial:  # non-saturating, on the critic's own tokens, which learn from it too
                        tokens = torch.cat([middle_tokens(critic, path, *side, sees_x1) for side in (made, found)])
                        low, high = wrapped_head(tokens).chunk(2)
                        head_loss = F.softplus(low).mean() + F.softplus(-high).mean()
                        log.add(head_loss=head_loss)
                        total = total + args.gan_weight * head_loss
                    (total / args.accum).backward()
                log.add(critic_loss=critic_loss)
            if adversarial:
                _, stepped = optimizer_step(optimizers[2], head, rates[2], args.clip, wait)
                finite = finite & stepped
            critic_norm, stepped = optimizer_step(optimizers[1], critic, rates[1], args.clip, wait)
            log.add(critic_norm=critic_norm)
            finite = finite & stepped

        # The student: the gap's gradient with respect to its samples, carried on through its own graph.
        for k in range(args.k_G):
            if k > 0:
                start, y, noise = draw_start("student", k)
                with precision(device):
                    x_t = step_input(path, student, prediction, times, last, noise, y, start)
            new_x1, new_z, t, _ = draw("gap", k)
            for rows in pieces:
                with in_piece(rows, wrapped_student), precision(device):
                    if k > 0 or args.accum > 1:
                        x0 = one_step(path, wrapped_student, prediction, times[last], *take((x_t, y, start), rows))
                    leaf = x0.detach().requires_grad_()
                    fake = (leaf, *take((start if kind else new_x1, new_z, t, y), rows))
                    loss, D2 = generator_loss(path, prediction, guided_teacher, guided_critic, *fake, args.kappa, args.grad, args.weight,
                                              args.units, sees_x1, args.real_alpha, args.real_beta)
                    total = loss.mean()
                    if adversarial:
                        fooled = F.softplus(-head(middle_tokens(critic, path, *fake, sees_x1))).mean()
                        total = total + args.gan_weight * fooled
                        log.add(fooled=fooled)
                    x0.backward(torch.autograd.grad(total / args.accum, leaf)[0])
                log.add(student_loss=loss.mean(), D2=D2.mean())
            student_norm, stepped = optimizer_step(optimizers[0], student, rates[0], args.clip, wait)
            log.add(student_norm=student_norm)
            finite = finite & stepped
        step += 1
        skipped = count_skipped(skipped, finite)
        log.add(skipped=skipped > 0)
        if (isinstance(skipped, int) or step % args.log_every == 0) and skipped >= 10:
            raise UserError(f"iteration {step}: losses or gradients were not finite 10 times in a row; lower --lr. The last good "
                            "checkpoint is untouched")
        for average, decay in zip(averages, args.ema):
            ema_update(average, student, decay, step)

        if step % args.log_every == 0 or step == args.iters:
            log.line(step, spread=spread())
        if step % args.sample_every == 0 or step == args.iters:
            keep(picture, out / "distill.png", 0, False)
            wait_for_all()  # as long as it takes, whatever --timeout says
        if step % args.save_every == 0 or step == args.iters:
            failures = keep(save, out / "resume.pt", failures, step == args.iters)
            wait_for_all()
        if stop() and step < args.iters:
            keep(save, out / "resume.pt", failures, True)
            stop.leave(step, rank)
    if rank == 0:
        keep(lambda: save_checkpoint(out / "student.pt", result()), out / "student.pt", 0, True)
        print(f"wrote {out / 'student.pt'}")


if __name__ == "__main__":
    command(main)
