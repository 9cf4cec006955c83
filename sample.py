"""Samples from any checkpoint of this project, teacher or student; the checkpoint says which it is.

    python sample.py --ckpt out/student.pt --n 64 --out samples.png
    python sample.py --ckpt out/teacher.pt --n 10000 --steps 50 --out teacher.npz
    python sample.py --compare out/teacher.pt out/student.pt --out compare.png
    python sample.py --ckpt out/student.pt --export student.safetensors
    torchrun --nproc_per_node=2 sample.py --ckpt out/student.pt --samples 50000 --out samples.npz

Image i depends on (--seed, i) alone: not on the batch, the device's generator or the number of processes.
"""
import math
import pathlib
import re
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

from common.autoencoder import decoder
from common.data import read_names, uneven_counts
from common.files import reading, save_file, save_safetensors
from common.images import (DEGRADATIONS, SUFFIXES, as_pillow, degrade, psnr, read_images, save_picture, side_by_side,
                           square_grid, stack_rows, to_device, to_uint8)
from common.run import (Parser, UserError, alone, check_idle, check_other, check_writable, command, generator, number,
                        one_of, precision, progress, start_processes, writing)
from interpolants import (DIFFUSIONS, FAMILIES, PREDICTIONS, SOLVERS, Batch, Problem, Sampler, family, follow_map,
                          solve, start_at, student_input, time_grid)
from model import guided, load_model


LABELS = ("data", "balanced", "uniform")


# ---------------------------------------------------------------------------------------------------------------------
# From a checkpoint to images

def problem_of(config):
    """A checkpoint's configuration -> Problem. A bridge's networks are called with x1, whether they read it or not."""
    path, scales = family(config["interpolant"], config.get("gamma_scale", 1.0)), config["network"].get("precondition")
    edm = scales is not None and any(scales[1])
    return Problem(path, config["prediction"], config.get("reference") is not None, edm)


def noise_levels(problem, config):
    """The problem whose noise levels name times: whatever a bridge's gamma_scale."""
    return problem._replace(path=FAMILIES[config["interpolant"]]) if problem.sees_x1 else problem


def holds_data(config, t):
    """Whether x_t at the time t holds data (alpha / s above 0.05) that a flow map, which starts from noise alone, would
    miss if it started there."""
    k = noise_levels(problem_of(config), config).at(torch.tensor([t]))
    return bool(k.alpha / k.s > 0.05)


def is_flow_map(config):
    return bool(config.get("student", {}).get("flow_map"))


def load_named(flag, path, device, average=None):
    """model.load_model, with errors that name the flag, of a configuration that this project's trainers write."""
    try:
        net, config = load_model(path, device, average)
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
    with reading(f"{flag} {path}: its configuration is unknown here"):
        problem, kind = problem_of(config), config.get("reference")
        times = config["student"]["times"] if "student" in config else []
        joined = 0 if kind in (None, "unpaired") else net.channels  # channels of x1 that the network reads
        if (problem.prediction not in PREDICTIONS or kind not in (None, "paired", "unpaired", *DEGRADATIONS)
                or net.reference_channels != joined or not config.get("gamma_scale", 1.0) > 0
                or not all(0 < t <= 1 for t in times)):
            raise ValueError(f"{config['prediction']} prediction, reference {kind}, times {times}")
    return net, config


def add_teacher_flags(parser):
    """The flags of every stage that distills a teacher."""
    add = parser.group("teacher")
    add("--teacher_ckpt", default="out/teacher.pt", help="the teacher's checkpoint")
    add("--model", default=None, help="if given, must be the teacher's network, such as SiT-XL/2")
    add("--cfg_scale", type=number(float, 0), default=1.0, help="guidance of the teacher: 1 = conditional, 0 = "
        "unconditional")
    add("--cfg_interval", type=number(float, 0, 1), nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"), help="times "
        "at which the teacher is guided")
    add("--data_dir", default="data", help="where downloads and decoded folders are kept")
    add("--skip_broken", action="store_true", help="leave out images of a folder that cannot be read")
    add("--vae", default=None, help="autoencoder that decodes the latents for pictures")
    add("--reference", default=None, help="what a bridge starts from (its teacher's)")


def check_guidance(flag, scale, net, config):
    """Raise UserError where there is nothing to guide with."""
    if scale != 1 and (net.num_classes == 0 or config.get("null_class") is False):
        without = "classes" if net.num_classes == 0 else "null class (--label_dropout 0)"
        raise UserError(f"--{flag} {scale:g}: the teacher has no {without} to guide with")


def load_teacher(args, device):
    """--teacher_ckpt -> its network, configuration and problem, with --reference filled. Raises UserError where it is
    none, or where --model, --reference or the guidance does not fit it."""
    teacher, config = load_named("--teacher_ckpt", args.teacher_ckpt, device)
    if "student" in config:
        raise UserError(f"--teacher_ckpt {args.teacher_ckpt}: is a {'flow map' if is_flow_map(config) else 'student'}, "
                        "give its teacher")
    if args.reference is not None and not config.get("reference"):
        raise UserError(f"--reference {args.reference}: the teacher starts from noise, not from a reference; leave it "
                        "out")
    if args.model not in (None, config["model"]):
        raise UserError(f"--model {args.model}: the teacher {args.teacher_ckpt} is a {config['model']}; leave --model "
                        "out")
    args.reference = args.reference or config.get("reference_source")
    check_interval(args.cfg_interval)
    for flag in ("cfg_scale", "critic_cfg_scale"):
        check_guidance(flag, getattr(args, flag, 1), teacher, config)
    return teacher, config, problem_of(config)


@torch.no_grad()
def generate(net, config, labels, seed=0, indices=None, sampler=Sampler(), x1=None, decode=None):
    """Images number `indices` (None: 0, 1, ..., one for each label) of the stream `seed` -> (n,H,W,C) uint8 array.
    labels: (n,) int64, a list of numbers and names, or None. Raises UserError for a name that is no class and for a
    bridge without x1.

    A student's configuration says so and holds its times, of which it takes sampler.steps (and at most all); a flow map
    takes any number of steps (1) from its first time; a teacher takes 50, by euler, on bridges by the posterior.
    x1 (n,H,W,C) uint8: what a bridge starts from. decode: latents (n,c,h,w) -> pixels, where the network makes latents.
    Networks run in the trainers' precision, decode in float32 (TF32)."""
    problem, device = problem_of(config), next(net.parameters()).device
    if x1 is None and problem.sees_x1:
        raise UserError(f"x1 is missing: a bridge ({config['reference']}) starts from images, (n,H,W,C) uint8")
    if net.num_classes and isinstance(labels, (list, tuple)):
        labels = find_classes("labels", labels, config)
    indices = range(len(x1 if labels is None else labels)) if indices is None else indices
    if x1 is not None and len(x1) != len(indices):
        raise UserError(f"x1: {len(x1)} images to start from for {len(indices)} asked for")
    draw = image_noise(net, config, seed, indices)
    y = None if labels is None or net.num_classes == 0 else torch.as_tensor(labels, device=device)
    b = Batch(x1=draw() if x1 is None else to_device(x1, device), z=draw(), y=y)
    with precision(device):
        if is_flow_map(config) and (sampler.steps or 1) > 1:
            grid = time_grid(problem, sampler.steps)
            if config["student"]["flow_map"] == "progressive":  # which knows these times alone
                grid = torch.linspace(1, 0, sampler.steps + 1, dtype=torch.float64)
            grid = grid * config["student"]["times"][0] / grid[0]
            x0 = follow_map(problem, net, start_at(problem, b, float(grid[0])), grid, sampler.restart, draw)
        elif "student" in config:
            times = config["student"]["times"]
            steps = min(sampler.steps or len(times), len(times))
            times = [times[i * len(times) // steps] for i in range(steps)]  # the first always among them
            x0 = problem.data(net, student_input(problem, net, times, b, lambda _: (draw(), draw())))
        else:
            sampler = sampler._replace(steps=sampler.steps or 50)
            b = start_at(problem, b, float(time_grid(problem, sampler.steps)[0]))
            x0 = solve(problem, guided(net, sampler.cfg_scale, sampler.cfg_interval), b, sampler, draw)
    if lost := int((~x0.isfinite()).flatten(1).any(1).sum()):
        print(f"note: {lost} of {len(x0)} samples are not finite and come out black", file=sys.stderr)
    return to_uint8(decode(x0) if decode else x0)


def image_noise(net, config, seed, indices):
    """-> draw() of fresh noise (n,C,H,W) for the images of these numbers; generate() makes a teacher's from the
    first."""
    shape, device = (net.channels, *[config["network"]["image_size"]] * 2), next(net.parameters()).device
    streams = [generator(seed, int(i), "image") for i in indices]  # drawn on the CPU: the same image on every device
    return lambda _=None: torch.stack([torch.randn(shape, generator=g) for g in streams]).to(device)


def find_classes(flag, wanted, config):
    """Classes by name, or by place where names are no numbers -> their labels (n,) int64. flag begins the error."""
    numbers = [str(i) for i in range(config["network"]["num_classes"])]
    names = config.get("classes") or numbers
    places = {} if all(name.isdigit() for name in names) else dict(zip(numbers, range(len(names))))
    places.update(zip(names, range(len(names))))
    labels = [places.get(str(name), places.get(str(name).strip())) for name in wanted]
    if None in labels:
        raise UserError(f"{flag}: this checkpoint has no class {wanted[labels.index(None)]}, only "
                        f"{numbers[0] + ' to ' + numbers[-1] if names == numbers else ', '.join(names)[:200]}")
    return np.array(labels, np.int64)


def column_names(config, labels):
    """Names of these labels' classes, to stand above the columns of a picture; none where they are unknown or many."""
    names = config.get("classes") or ()
    return [names[int(i)] for i in labels] if 0 < len(names) <= 10 else []


def choose_labels(spec, n, config, seed=0):
    """data (as often as in the teacher's data; balanced where those are or are unknown) | balanced | uniform | a
    comma-separated list of classes, repeated to length n -> (n,) int64 array; zeros without classes."""
    K, counts = config["network"]["num_classes"], uneven_counts(config)
    if K == 0:
        if spec not in LABELS:
            raise UserError(f"--labels {spec}: this checkpoint has no classes")
        return np.zeros(n, np.int64)
    if spec == "balanced" or spec == "data" and not counts:
        return np.arange(n) % K
    if spec in LABELS:  # label i, too, is a function of (seed, i)
        u = [float(torch.rand((), generator=generator(seed, i, "label"), dtype=torch.float64)) for i in range(n)]
        shares = np.cumsum(counts if spec == "data" else [1] * K, dtype=np.float64)
        return np.searchsorted(shares / shares[-1], u, side="right")
    return np.resize(find_classes(f"--labels {spec}", spec.split(","), config), n)


# ---------------------------------------------------------------------------------------------------------------------
# Flags of every command that samples

def add_sampling_flags(parser, **defaults):
    add = parser.group("sampling a checkpoint")
    add("--n", "--samples", dest="n", type=number(int, 1), default=None, help="how many images; under torchrun write "
        "--samples, since torchrun takes --n for a flag of its own")
    add("--steps", type=number(int, 1), default=None, help="network steps of a teacher (50) or a flow map (1), or "
        "fewer than a student's own")
    add("--restart", type=number(float, 0, 1), default=0.0, help="of a flow map's steps: 0 follows the ODE, 1 makes an "
        "image at each step and noises it again")
    add("--solver", type=one_of(SOLVERS), default=None, help="/".join(SOLVERS) + "; steps are intervals for each "
        "(euler; posterior on bridges)")
    add("--diffusion", type=one_of(DIFFUSIONS), default="sigma", help="w(t) of --solver sde: " + "/".join(DIFFUSIONS))
    add("--cfg_scale", type=number(float, 0), default=None, help="guidance of a teacher (1; in sample.py "
        "--compare what the student was distilled with): 1 = conditional, 0 = unconditional")
    add("--cfg_interval", type=number(float, 0, 1), nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"), help="times "
        "at which a teacher is guided")
    add("--average", type=number(float, 0, 1), default=None, help="decay of the student's average that samples, one of "
        "those of distill.py --ema (the first)")
    add("--labels", help="data (as often as in the teacher's), balanced, uniform, or a list of "
        "classes such as 3,1,4 or cat,dog (repeated); sample.py: balanced, on bridges the file's own")
    add("--seed", type=number(int, 0, 2 ** 63 - 2), default=0, help="image i depends on (seed, i) alone")
    add("--vae", default=None, help="autoencoder that decodes a checkpoint's latents")
    add("--batch", type=number(int, 1), help="images at a time and process")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.set_defaults(**defaults)


def check_interval(interval):
    if interval[0] >= interval[1]:
        raise UserError(f"--cfg_interval {interval[0]:g} {interval[1]:g}: the first must be below the second")


def choose_sampler(args, net, config, name):
    """The sampling flags -> Sampler of the checkpoint `name`. Raises UserError where they do not fit it."""
    check_interval(args.cfg_interval)
    scale, solver = 1.0 if args.cfg_scale is None else args.cfg_scale, args.solver
    if args.restart and not is_flow_map(config):
        raise UserError(f"--restart {args.restart:g}: {name} is no flow map, leave it out")
    if config.get("pairs") and (args.restart or solver == "sde"):
        flag = f"--restart {args.restart:g}" if args.restart else "--solver sde"
        raise UserError(f"{flag}: {name} learnt on pairs, whose noise belongs to its images: fresh noise leaves their "
                        "law; leave it out")
    if "student" in config:
        times = config["student"]["times"]
        most = len(times)
        if args.steps is not None and args.steps > most and not is_flow_map(config):
            raise UserError(f"--steps {args.steps}: {name} is a student of {most} step{'s' * (most > 1)}; take at "
                            "most that, or leave --steps out")
        if args.cfg_scale is not None or args.cfg_interval != [0.0, 1.0]:
            flag = "--cfg_interval" if args.cfg_scale is None else f"--cfg_scale {args.cfg_scale:g}"
            raise UserError(f"{flag}: {name} is a student, its guidance was distilled into it "
                            f"(scale {config['student']['cfg_scale']:g}), leave it out")
        if solver:
            raise UserError(f"--solver {solver}: {name} is a student, it has steps of its own; leave it out")
        check_idle(args, {"restart": 0.0, "diffusion": "sigma"}, (
            ("restart", "--steps above 1", (args.steps or most) > 1), ("diffusion", "a teacher's --solver sde", False)))
        if is_flow_map(config) and (args.steps or 1) > 1 > args.restart and holds_data(config, times[0]):
            raise UserError(f"--steps {args.steps}: {name} starts at t = {times[0]:.3g}, from noise where its steps "
                            "expect data as well; add --restart 1")
        return Sampler(args.steps or most, restart=args.restart)
    check_guidance("cfg_scale", scale, net, config)
    if config.get("reference") == "unpaired" and solver not in (None, "posterior"):
        raise UserError(f"--solver {solver}: an unpaired bridge knows no velocity, leave it out (posterior)")
    solver = solver or ("posterior" if config.get("reference") else "euler")
    check_idle(args, {"diffusion": "sigma", "cfg_interval": [0.0, 1.0]}, (
        ("diffusion", "--solver sde", solver == "sde"), ("cfg_interval", "--cfg_scale", scale != 1)))
    times, (low, high) = time_grid(problem_of(config), args.steps or 50)[:-1].float(), args.cfg_interval
    if scale != 1 and not any(low <= t <= high for t in times):
        raise UserError(f"--cfg_interval {low:g} {high:g}: none of the {len(times)} steps begins there; widen it")
    return Sampler(args.steps or 50, solver, args.diffusion, scale, args.cfg_interval)


def check_output(out, n):
    out = pathlib.Path(out)
    if out.suffix.lower() in (".png", ".npz"):
        if out.is_dir():
            raise UserError(f"--out {out}: is a folder")
        check_writable("--out", out.parent)
    elif not out.is_dir() and (out.exists() or out.suffix.lower() in SUFFIXES | {".npy"}):
        raise UserError(f"--out {out}: choose a name ending in .png or .npz, or a folder")
    elif out.is_dir():
        other = next((f.name for f in out.iterdir() if f.name != "labels.txt"
                      and not (re.fullmatch(r"\d{6}\.png", f.name) and int(f.name[:6]) < n)), None)
        if other:
            raise UserError(f"--out {out}: the folder already holds {other}, which is none of these {n} images: "
                            "choose another")


# ---------------------------------------------------------------------------------------------------------------------
# The command

def read_starts(args, net, config):
    """--n and --labels, or the images of --reference, with --truth or --degrade, for the checkpoint that is named first
    -> labels (n,) int64 and, on bridges, x1 (n,H,W,C) uint8 and the truth where it is known."""
    kind, name = config.get("reference"), args.ckpt or args.compare[0]
    if not kind:
        for flag in ("reference", "truth", "degrade"):
            if getattr(args, flag):
                raise UserError(f"--{flag} {getattr(args, flag)}: {name} starts from noise, leave it out")
        n = args.n or (100 if args.compare else 64)
        return choose_labels(args.labels or "balanced", n, config, args.seed), None, None
    if not args.reference:
        raise UserError(f"--reference is missing: {name} is a bridge ({kind}) and needs images to start from: "
                        "--reference FILE_OR_FOLDER")
    side, truth = config["network"]["image_size"], None
    x1, labels = read_images("--reference", args.reference, side, net.channels, args.degrade)
    if args.degrade:
        if kind not in DEGRADATIONS:
            raise UserError(f"--degrade: the bridge's reference is {kind}, not one of {', '.join(DEGRADATIONS)}; "
                            "leave it out")
        if args.truth:
            raise UserError(f"--truth {args.truth}: with --degrade the images of --reference are the truth, leave one "
                            "out")
        truth = x1
    elif args.truth:
        truth, _ = read_images("--truth", args.truth, side, net.channels)
        if len(truth) != len(x1):
            raise UserError(f"--truth {args.truth}: {len(truth)} images for {len(x1)} of --reference {args.reference}")
    n = args.n or (min(10, len(x1)) if args.compare else len(x1))
    if n > len(x1):
        raise UserError(f"--n {n}: --reference {args.reference} has {len(x1)} images")
    x1, truth = x1[:n], None if truth is None else truth[:n]
    if args.labels:  # goes before the file's own
        labels = choose_labels(args.labels, n, config, args.seed)
    elif labels is None or net.num_classes == 0:  # the null class
        if args.cfg_scale not in (None, 0, 1) and not args.compare:
            raise UserError(f"--cfg_scale {args.cfg_scale:g}: the images of --reference {args.reference} have no "
                            "labels to guide with; add --labels")
        if config.get("null_class") is False:
            raise UserError(f"--reference {args.reference}: has no labels, and {name} learnt none but with them; add "
                            "--labels")
        labels = np.full(n, net.num_classes)
    else:
        names = read_names(f"--reference {args.reference}", args.reference)  # of a file by sample.py
        labels = find_classes(f"--reference {args.reference}", [names[y] for y in labels] if names else labels, config)
    return labels[:n].astype(np.int64), degrade(kind, truth, args.seed) if args.degrade else x1, truth


def compare(args, device):
    """Teacher and student panels with the same labels and seeds, captioned with steps and time; for bridges the input
    comes first and the truth, where it is known, last."""
    (teacher, config), (student, student_config) = (load_named("--compare", path, device, average) for path, average in
                                                    zip(args.compare, (None, args.average)))
    if "student" not in student_config or "student" in config:
        raise UserError("--compare TEACHER STUDENT: give the teacher's checkpoint first and the student's second")
    for name in ("image_size", "channels", "num_classes", "reference"):
        one, other = ({**c, **c["network"]}.get(name) for c in (config, student_config))
        if one != other:
            raise UserError(f"--compare TEACHER STUDENT: the two differ in {name}")
    if args.cfg_scale is None:
        args.cfg_scale = student_config["student"]["cfg_scale"]
        if args.cfg_interval == [0.0, 1.0]:
            args.cfg_interval = student_config["student"].get("cfg_interval", [0.0, 1.0])
    sampler, times = choose_sampler(args, teacher, config, args.compare[0]), student_config["student"]["times"]
    (labels, x1, truth), decode = read_starts(args, teacher, config), decoder(args.vae, config, device)
    n, panels, captions, made = len(labels), [], [], []
    for net, settings, how, name in ((teacher, config, sampler, "teacher"), (
            student, student_config, Sampler(len(times)), "one-step student" if len(times) == 1 else "student")):
        def take(rows, how):
            return generate(net, settings, labels[rows], args.seed, range(rows.start, rows.stop), how,
                            None if x1 is None else x1[rows], decode)
        take(slice(0, 1), how._replace(steps=1))  # the first call is slow for its own reasons
        began = time.perf_counter()
        made.append(np.concatenate([take(slice(i, min(i + args.batch, n)), how) for i in range(0, n, args.batch)]))
        elapsed = time.perf_counter() - began
        panels.append(square_grid(made[-1], 560))
        guidance = f", guidance {how.cfg_scale:g}" if how.cfg_scale != 1 else ""
        captions.append([f"{name}: {how.steps} step{'s' * (how.steps > 1)}{guidance}",
                         f"{1000 * elapsed / n:.3g} ms an image"])
        fidelity = "" if truth is None else f", PSNR {psnr(made[-1], truth):.2f} dB"
        print(f"{name}: {n} images, {how.steps} steps, {elapsed:.2f} s{fidelity}")
    if x1 is not None:
        rows = [x1, *made] + ([] if truth is None else [truth])
        legend = f"rows: input, teacher ({sampler.steps} steps), student ({len(times)})"
        panels, captions = [stack_rows(rows, 840)], [[legend + ", truth" * (truth is not None)]]
    save_picture(args.out, side_by_side(panels, captions))
    print(f"wrote {args.out}")


def parse_flags():
    parser = Parser(__doc__)
    add = parser.group("what to sample")
    add("--ckpt", help="checkpoint of a teacher or a student")
    add("--compare", nargs=2, metavar=("TEACHER", "STUDENT"), help="draw both side by side instead")
    add("--out", default="samples.png", help="FILE.png (a grid), FILE.npz (arr_0 images, arr_1 labels, which "
        "count among the names `classes`) or a FOLDER of PNGs with the names in labels.txt")
    add("--pairs", default=None, help="FILE.npz: a teacher's images as --out writes them, with the noise that they "
        "were made from, for train_teacher.py --pairs")
    add("--export", default=None, help="FILE.safetensors: write the averaged weights and the configuration there, and "
        "sample nothing; every script takes it for a checkpoint")
    add_sampling_flags(parser, batch=100, labels=None)
    add = parser.group("bridges")
    add("--reference", default=None, help="FILE, FOLDER or .npz of images that a bridge starts from")
    add("--degrade", action="store_true", help="degrade them first as the bridge's training did; they are the truth "
        "then")
    add("--truth", default=None, help="FILE, FOLDER or .npz to measure the restored images against (PSNR)")
    args = parser.parse_args()
    if bool(args.ckpt) == bool(args.compare):
        raise UserError("give either --ckpt FILE or --compare TEACHER STUDENT")
    if args.pairs:
        if args.compare or not args.pairs.lower().endswith(".npz"):
            raise UserError(f"--pairs {args.pairs}: is for --ckpt TEACHER, choose a name ending in .npz")
        args.out = args.pairs
    if args.export:
        if args.compare or args.pairs or not args.export.endswith(".safetensors"):
            raise UserError(f"--export {args.export}: is for --ckpt FILE alone, choose a name ending in .safetensors")
        check_writable("--export", pathlib.Path(args.export).parent)
        check_other("--export", args.export, args.ckpt)
    if args.compare and not args.out.lower().endswith(".png"):
        raise UserError(f"--out {args.out}: --compare draws a picture, choose a name ending in .png")
    return args


def main():
    args = parse_flags()
    if not args.export:
        check_output(args.out, math.inf if args.reference else args.n or 64)
        check_other("--out", args.out, args.reference, args.truth)
    rank, world, device = start_processes(args.device)
    if args.compare:
        return compare(args, device) if rank == 0 else None
    net, config = load_named("--ckpt", args.ckpt, device, args.average)
    if args.export:
        if rank == 0:
            save_safetensors(args.export, config, net.state_dict())
            print(f"wrote {args.export}")
        return
    if args.pairs and ("student" in config or FAMILIES[config["interpolant"]].noisy or config.get("latent")):
        raise UserError(f"--pairs {args.pairs}: {args.ckpt} is no teacher that makes pixels from noise; leave it out")
    sampler, decode = choose_sampler(args, net, config, args.ckpt), decoder(args.vae, config, device)
    if args.pairs and sampler.solver == "sde":
        raise UserError("--solver sde: draws more noise than the x1 that --pairs keeps; leave one out")
    labels, x1, truth = read_starts(args, net, config)
    n, out = len(labels), pathlib.Path(args.out)
    check_output(out, n)
    folder = out.suffix.lower() not in (".png", ".npz")
    if folder:
        check_writable("--out", out)

    # Batches are dealt out in turn. Their borders do not depend on the number of processes, so neither does a single
    # bit.
    images, began, tell = [], time.time(), progress(lambda text: print(text, flush=True), "images")
    starts = range(0, n, args.batch)
    for turn in range(0, len(starts), world):
        mine = None
        if turn + rank < len(starts):
            rows = slice(starts[turn + rank], min(starts[turn + rank] + args.batch, n))
            mine = generate(net, config, labels[rows], args.seed, range(rows.start, rows.stop), sampler,
                            None if x1 is None else x1[rows], decode)
            if folder:
                with alone(), writing(out):
                    for i, image in enumerate(mine, rows.start):
                        as_pillow(image).save(out / f"{i:06d}.png")
            mine = mine if truth is not None or not folder else None  # a folder's are on the disk
        parts = [mine] * world
        if world > 1:
            dist.gather_object(mine, parts if rank == 0 else None)
        if rank == 0:
            images += [part for part in parts if part is not None]
            tell(min(n, (turn + world) * args.batch), n)
    if rank > 0:
        return
    images = np.concatenate(images) if images else None
    labelled = net.num_classes and (labels < net.num_classes).all()  # the null class is nobody's label
    if truth is not None:
        print(f"PSNR {psnr(images, truth):.2f} dB over {n} images")
    if folder:
        (out / "labels.txt").unlink(missing_ok=True)
        if labelled:
            names = config.get("classes") or range(net.num_classes)
            lines = "".join(" ".join(str(names[y]).split()) + "\n" for y in labels)
            save_file(out / "labels.txt", lambda f: f.write(lines.encode(errors="surrogateescape")))  # a folder's bytes
    elif out.suffix.lower() == ".npz":
        more = {"arr_1": labels, "classes": np.array(config.get("classes") or ())} if labelled else {}
        if args.pairs:
            noise = torch.cat([image_noise(net, config, args.seed, [i])().half().cpu() for i in range(n)])
            more.update(interpolant=config["interpolant"], noise=noise.numpy())
        save_file(out, lambda f: np.savez(f, arr_0=images, **more))
    elif x1 is None:
        save_picture(out, square_grid(images))
    else:  # rows of what went in, what came out and, where it is known, the truth
        save_picture(out, stack_rows([row[:20] for row in (x1, images, truth) if row is not None], 840))
    shown = f"20 of {n}" if x1 is not None and out.suffix.lower() == ".png" and n > 20 else n
    print(f"wrote {shown} images to {out} in {time.time() - began:.1f} s")


if __name__ == "__main__":
    command(main)
