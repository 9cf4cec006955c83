"""Distill a teacher into a one-step student by the interpolant generalisation gap.

    python distill.py --teacher_ckpt out/teacher.pt --out out
    python distill.py --teacher_ckpt out/teacher.pt --objective dmd --cfg_scale 2 --iters 2000 --out out/dmd
    torchrun --nproc_per_node=8 distill.py --model SiT-XL/2 --teacher_ckpt teacher.pt --batch 128 --lr 1e-5 --cfg_scale 4.0 --k_psi 5

The critic learns the velocity of the student's samples; the student descends   E w [ kappa |D|^2 + 2 <D, e> ]   with
D = v* - v_psi and e = v_psi - I'. Architecture, interpolant, prediction, image size and classes come from the teacher.
Writes OUT/student.pt, OUT/student_one_step_XXXXXXX.pth, OUT/resume.pt (the same command again goes on), OUT/log.jsonl and
OUT/distill_XXXXXXX.png (rows: student, teacher's and critic's data prediction of the student's samples at one noise level).
"""
import pathlib

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from interpolants import FAMILIES, check_log_snr, convert, interpolate, time_of_noise_ratio
from model import UserError, build_model, ema_update, fingerprint, frozen_copy, guided, load_weights, save_checkpoint
from sample import (Parser, check_writable, command, enlarge, generator, grid, load_named, number, one_of, one_step, save_picture,
                    start_processes, to_uint8)
from train_teacher import (Log, StopSignal, check_batch, draw_noise, learning_rate, optimizer_step, precision, regression_loss,
                           resume, write_flags)

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


def generator_loss(path, prediction, teacher, critic, x0, x1, z, t, y, kappa, grad, weight, units):
    """The student's loss on its samples x0 (B,C,H,W), re-noised to t (B,) -> loss (B,), |D|^2 (B,) without gradient.

    grad full: the gradient reaches x0 through the target and through x_t into both frozen networks. stop: through the target only.
    units: velocity (target I') or data (target x0). teacher and critic map (x_t, t, y) to `prediction`."""
    x_t, velocity = interpolate(path, x0, x1, t, z)
    with torch.set_grad_enabled(grad == "full"):
        star, psi = teacher(x_t, t, y), critic(x_t, t, y)
        p_psi = convert(path, psi, prediction, units, x_t, t)
        D = convert(path, star, prediction, units, x_t, t) - p_psi
    e = p_psi - (velocity if units == "velocity" else x0)
    with torch.no_grad():
        w = sample_weight(weight, x0, convert(path, star, prediction, "data", x_t, t))
    return gap_loss(D, e, kappa, w), D.detach().square().flatten(1).mean(1)


def check_objective(path, grad, units):
    """Raise UserError where the stop-gradient objective gives no descent direction on this path."""
    if grad != "stop":
        return
    if units == "velocity" and bool((path.alpha(torch.linspace(0.1, 0.9, 9)) == 1).all()):
        raise UserError("--units velocity: with --grad stop the student gets no gradient on a path whose alpha is constant "
                        "(alpha' = 0); use --units data")
    try:
        check_log_snr(path)
    except ValueError as error:
        raise UserError(f"--grad stop: not a descent direction on this path ({error}); use --grad full") from None


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
    add("--cfg_scale", type=number(float, 0), default=1.0, help="guidance of the teacher: 1 = conditional, 0 = unconditional")
    add("--iters", type=number(int, 1), default=300, help="iterations in all; raise it to go on")
    add("--batch", type=number(int, 1), default=64, help="images a step, over all processes")
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
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    for knob, value in OBJECTIVES[args.objective].items():
        if getattr(args, knob) is None:
            setattr(args, knob, value)
    args.critic_lr = args.critic_lr or 3 * args.lr
    return args


def main():
    args = parse_flags()
    rank, world, device = start_processes(args.device)
    check_batch(args.batch, world)
    out = pathlib.Path(args.out)
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
    path, prediction = FAMILIES[config["interpolant"]], config["prediction"]
    check_objective(path, args.grad, args.units)
    args.t_init = args.t_init or time_of_noise_ratio(path, START_RATIO)
    one = torch.ones(1, 1)
    if not float(convert(path, one, prediction, "data", 2 * one, torch.tensor([args.t_init])).abs()) < 1e3:
        raise UserError(f"--t_init {args.t_init:g}: there a {prediction} prediction says nothing of the data on the "
                        f"{config['interpolant']} path; use less, such as 0.99")
    args.t_min, args.t_max = (given or time_of_noise_ratio(path, ratio)
                              for given, ratio in zip((args.t_min, args.t_max), RATIO_RANGE))
    if args.t_min >= args.t_max:
        raise UserError(f"--t_min {args.t_min}: must be below --t_max {args.t_max}")
    config = {**config, "student": {"t_init": args.t_init, "steps": 1, "cfg_scale": args.cfg_scale, "objective": args.objective,
                                    "kappa": args.kappa, "grad": args.grad, "weight": args.weight, "units": args.units}}
    state = resume(out / "resume.pt", args, "distillation", ("student", "critic", "averages", "optimizers", "teacher"))
    teacher_id = fingerprint(teacher)
    if state and state["teacher"] != teacher_id:
        raise UserError(f"--teacher_ckpt {args.teacher_ckpt}: is not the teacher that {out / 'resume.pt'} was made with; choose "
                        "another --out, or start over with --fresh")

    # Student and critic start from the teacher's average. Everyone stays in eval(): no dropout anywhere.
    student, critic = build_model(config).to(device).eval(), build_model(config).to(device).eval()
    student.load_state_dict(teacher.state_dict())
    critic.load_state_dict(teacher.state_dict())
    averages = [frozen_copy(student) for _ in args.ema]
    optimizers = [torch.optim.Adam(net.parameters(), lr, betas=(0.0, 0.999), fused=device.type != "mps")
                  for net, lr in ((student, args.lr), (critic, args.critic_lr))]
    step = 0
    if state:
        for net, weights in zip((student, critic, *averages), (state["student"], state["critic"], *state["averages"])):
            load_weights(net, weights, out / "resume.pt")
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        step = state["step"]
        say(f"going on from iteration {step} of {out / 'resume.pt'}")
    if args.compile:
        for net in (teacher, student, critic):
            net.compile()
    wrap = DistributedDataParallel if world > 1 else (lambda net: net)
    wrapped_student, wrapped_critic = wrap(student), wrap(critic)
    if rank == 0:
        check_writable("--out", out)
        write_flags(out, "distill", vars(args))
    say(f"from the teacher: {config['model']}, {config['interpolant']} path, {prediction} prediction, "
        f"{student.num_classes} classes; {device}" + (f" x {world}" if world > 1 else ""))

    channels, side = student.channels, config["network"]["image_size"]
    share = args.batch // world
    mine = slice(rank * share, (rank + 1) * share)

    def draw(*key):
        """Fresh x1, z, times and labels of this process' part of the batch: functions of (seed, step, key, global index)."""
        x1, z, u = draw_noise((args.batch, channels, side, side), mine, device, args.seed, step, *key)
        g = generator(args.seed, step, *key, "labels", device=device)
        y = torch.randint(max(1, student.num_classes), (args.batch,), generator=g, device=device)[mine]
        return x1, z, args.t_min + (args.t_max - args.t_min) * u, y

    def guided_teacher(x_t, t, y):
        return guided(teacher, x_t, t, y, args.cfg_scale)

    # What pictures and the spread are measured on: ten columns of fixed noise, and the time where signal and noise are equal.
    watched = [torch.randn((50, channels, side, side), generator=generator(args.seed, "watched", i)).to(device) for i in range(3)]
    watched_y = torch.arange(50, device=device) % max(1, student.num_classes)

    @torch.no_grad()
    def spread():
        """Mean over the pixels of the student's std over the watched batch: falls when it collapses."""
        x1, z, _ = watched
        return float(one_step(path, student, prediction, args.t_init, x1, z, watched_y).std(0).mean())

    @torch.no_grad()
    def picture():
        if rank > 0:
            return
        x1, z, noise = (w[:10] for w in watched)
        y, t = watched_y[:10], torch.full((10,), time_of_noise_ratio(path, 1.0), device=device)
        x0 = one_step(path, averages[0], prediction, args.t_init, x1, z, y)
        x_t, _ = interpolate(path, x0, noise, t, z)
        rows = [x0] + [convert(path, net(x_t, t, y), prediction, "data", x_t, t) for net in (guided_teacher, critic)]
        save_picture(out / f"distill_{step:07d}.png", enlarge(grid(np.concatenate([to_uint8(row) for row in rows]), 10)))

    def result():
        weights = [net.state_dict() for net in averages]
        return {"config": config, "step": step, "ema": weights[0], "decays": args.ema, "other_averages": weights[1:]}

    def save():
        if rank > 0:
            return
        save_checkpoint(out / "resume.pt", {"flags": vars(args), "step": step, "teacher": teacher_id, "student": student.state_dict(),
                                            "critic": critic.state_dict(), "averages": [net.state_dict() for net in averages],
                                            "optimizers": [o.state_dict() for o in optimizers]})
        if step % args.save_every == 0:
            save_checkpoint(out / f"student_one_step_{step:07d}.pth", result())

    stop, skipped = StopSignal(), 0
    log = Log(out, "distill", step, args.iters, args.batch, rank, world, device)
    while step < args.iters:
        finite, rates = True, [learning_rate(step, lr, args.warmup, args.decay_from) for lr in (args.lr, args.critic_lr)]

        # The student's samples, with the graph of its own step. It is built once; a critic step uses the same images.
        with precision(device):
            x1, z, _, y = draw("student", 0)
            x0 = one_step(path, wrapped_student, prediction, args.t_init, x1, z, y)  # (B,C,H,W)

        # The critic: velocity regression on the student's samples, fresh noise and times in every step.
        for k in range(args.k_psi):
            samples, labels = x0.detach(), y
            new_x1, new_z, t, new_y = draw("critic", k)
            with precision(device):
                if k < args.k_psi - 1 and not args.reuse_samples:
                    with torch.no_grad():
                        start_x1, start_z, _, labels = draw("sample", k)
                        samples = one_step(path, student, prediction, args.t_init, start_x1, start_z, labels)
                critic_loss = regression_loss(wrapped_critic, path, prediction, samples, new_x1, new_z, t, labels).mean()
                critic_loss.backward()
            critic_norm, stepped = optimizer_step(optimizers[1], critic, rates[1], args.clip)
            log.add(critic_loss=critic_loss, critic_norm=critic_norm)
            finite &= stepped

        # The student: the gap's gradient with respect to its samples, carried on through its own graph.
        for k in range(args.k_G):
            with precision(device):
                if k > 0:
                    x1, z, _, y = draw("student", k)
                    x0 = one_step(path, wrapped_student, prediction, args.t_init, x1, z, y)
                new_x1, new_z, t, _ = draw("gap", k)
                leaf = x0.detach().requires_grad_()
                loss, D2 = generator_loss(path, prediction, guided_teacher, critic, leaf, new_x1, new_z, t, y,
                                          args.kappa, args.grad, args.weight, args.units)
                x0.backward(torch.autograd.grad(loss.mean(), leaf)[0])
            student_norm, stepped = optimizer_step(optimizers[0], student, rates[0], args.clip)
            log.add(student_loss=loss.mean(), D2=D2.mean(), student_norm=student_norm)
            finite &= stepped
        step += 1
        skipped = 0 if finite else skipped + 1
        if skipped >= 10:
            raise UserError(f"iteration {step}: losses or gradients were not finite 10 times in a row; lower --lr. The last good "
                            "checkpoint is untouched")
        for average, decay in zip(averages, args.ema):
            ema_update(average, student, decay, step)

        if step % args.log_every == 0 or step == args.iters:
            log.line(step, spread=spread())
        if step % args.sample_every == 0 or step == args.iters:
            picture()
        if step % args.save_every == 0 or step == args.iters:
            save()
        if stop() and step < args.iters:
            save()
            stop.leave(step, rank)
    if rank == 0:
        save_checkpoint(out / "student.pt", result())
        print(f"wrote {out / 'student.pt'}")


if __name__ == "__main__":
    command(main)
