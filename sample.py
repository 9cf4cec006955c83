"""Samples from any checkpoint of this project, teacher or student; the checkpoint says which it is.

    python sample.py --ckpt out/student.pt --n 64 --out samples.png
    python sample.py --ckpt out/teacher.pt --n 10000 --steps 50 --out teacher.npz
    python sample.py --compare out/teacher.pt out/student.pt --out compare.png
    torchrun --nproc_per_node=2 sample.py --ckpt out/student.pt --samples 50000 --out samples.npz

Image i depends on (--seed, i) alone: not on the batch, the device's generator or the number of processes.
"""
import argparse
import datetime
import hashlib
import math
import os
import pathlib
import re
import sys
import tempfile
import time

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

from interpolants import DIFFUSIONS, FAMILIES, PREDICTIONS, SOLVERS, coefficients, convert, solve, time_grid
from model import UserError, guided, load_model


# ---------------------------------------------------------------------------------------------------------------------
# The command line, shared by every script of the project

class Parser(argparse.ArgumentParser):
    """argparse with errors of one line (no usage block), every default shown, and no abbreviated flags."""

    def __init__(self, doc):
        first, _, rest = doc.partition("\n")
        super().__init__(description=first, epilog=rest, allow_abbrev=False, formatter_class=HelpFormatter)

    def error(self, message):
        raise UserError(re.sub(r"^argument (\S+): ", r"\1 ", message))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def command(main):
    """Run a script's main(): a UserError becomes `file.py: error: ...` (once, from the first process) and exit code 2."""
    try:
        main()
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while another still talks
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0 or not error.everywhere:
            print(f"{pathlib.Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a disk that is full, a folder that cannot be written: named, with nothing hidden
        if error.filename is None:
            raise
        print(f"{pathlib.Path(sys.argv[0]).name}: error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def load_named(flag, path, device):
    """model.load_model, with errors that name the flag."""
    try:
        net, config = load_model(path, device)
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
    for name, table in (("interpolant", FAMILIES), ("prediction", PREDICTIONS), ("model", None)):
        if name not in config or (table and config[name] not in table):
            raise UserError(f"{flag} {path}: its {name} {config.get(name)} is unknown here")
    return net, config


def check_writable(flag, folder):
    """Make the folder, or raise UserError before any work is done that could not be kept."""
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written ({error.strerror}); choose another folder") from None


def number(kind, low, high=math.inf, open_low=False):
    """An argparse type: a finite int or float in [low, high], or (low, high] with open_low."""
    what = ("a whole number" if kind is int else "a number") + (f" above {low}" if open_low else f" of at least {low}")
    what += f" and at most {high}" if high < math.inf else ""

    def parse(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not (value > low if open_low else value >= low) or value > high or value in (math.inf, -math.inf):
            raise argparse.ArgumentTypeError(f"{text}: must be {what}")
        return value
    return parse


def one_of(table):
    """An argparse type: one of these names."""
    def parse(text):
        if text not in table:
            raise argparse.ArgumentTypeError(f"{text}: unknown, choose from {', '.join(table)}")
        return text
    return parse


# ---------------------------------------------------------------------------------------------------------------------
# Processes, devices and random numbers

def start_processes(device="auto"):
    """-> rank, world size, device. Plain python is one process without a group; torchrun's variables make a group."""
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"--device {device}: choose from auto, cpu, cuda, mps")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k in available if available[k]) if device == "auto" else device
    if not available[kind]:
        raise UserError(f"--device {kind}: not available here, try --device cpu")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if kind == "cuda":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if local > torch.cuda.device_count():
            raise UserError(f"--device cuda: {local} processes but {torch.cuda.device_count()} GPUs; start fewer, or use --device cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        kind = f"cuda:{torch.cuda.current_device()}"
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # Both back ends on CUDA: small facts (stop now?) travel by gloo without waiting for the card.
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind.startswith("cuda") else "gloo",
                                timeout=datetime.timedelta(hours=3))  # the first process may have a large folder to decode
    return rank, world, torch.device(kind)


def first_process(action, rank, world):
    """action() in the first process while the others wait -> its result there, None elsewhere. Its UserError is raised in all."""
    result, problem = None, [None]
    if rank == 0:
        try:
            result = action()
        except UserError as error:
            problem = [error]
    if world > 1:
        dist.broadcast_object_list(problem)
    if problem[0]:
        raise problem[0]
    return result


def generator(*key, device="cpu"):
    """A torch.Generator that is a function of the key: numbers and strings, such as (seed, step, 'noise')."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


# ---------------------------------------------------------------------------------------------------------------------
# Generation

def start_noise(path, t, x1, z):
    """beta(t) x1 + gamma(t) z, (B,C,H,W): where sampling starts, the path at t with nothing known of the data."""
    k = coefficients(path, t, x1.ndim)
    return k.beta * x1 + k.gamma * z


def one_step(path, net, prediction, t_init, x1, z, y):
    """The student G: noise x1, z (B,C,H,W) -> x0 (B,C,H,W), the data prediction from t_init. Differentiable."""
    t = torch.full((len(x1),), t_init, device=x1.device)
    x_t = start_noise(path, t, x1, z)
    return convert(path, net(x_t, t, y), prediction, "data", x_t, t)


@torch.no_grad()
def generate(net, config, labels, seed, indices, steps=50, solver="euler", cfg_scale=1.0, diffusion="sigma"):
    """Images number `indices` of the stream `seed` -> (n,H,W,C) uint8 array. labels (n,) int64 or None.

    A student's configuration says so and takes its one step; steps, solver and cfg_scale are the teacher's.
    """
    path, prediction = FAMILIES[config["interpolant"]], config["prediction"]
    device = next(net.parameters()).device
    shape = (net.channels, config["network"]["image_size"], config["network"]["image_size"])
    streams = [generator(seed, int(i), "image") for i in indices]  # drawn on the CPU: the same image on every device

    def draw(_=None):
        return torch.stack([torch.randn(shape, generator=g) for g in streams]).to(device)

    y = None if labels is None or net.num_classes == 0 else torch.as_tensor(labels, device=device)
    if "student" in config:
        x0 = one_step(path, net, prediction, config["student"]["t_init"], draw(), draw(), y)
    else:
        t = torch.full((len(streams),), float(time_grid(path, steps, prediction)[0]), device=device)
        x0 = solve(path, lambda x, t: guided(net, x, t, y, cfg_scale), start_noise(path, t, draw(), draw()), steps, solver,
                   prediction, diffusion, draw)
    return to_uint8(x0)


def to_uint8(x):
    """(B,C,H,W) in [-1, 1] -> (B,H,W,C) uint8, rounded: the only place where pixels leave floating point."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def choose_labels(spec, n, num_classes, seed=0):
    """random | balanced | a comma-separated list, repeated to length n -> (n,) int64 array; zeros without classes."""
    if num_classes == 0:
        if spec not in ("random", "balanced"):
            raise UserError(f"--labels {spec}: this checkpoint has no classes")
        return np.zeros(n, np.int64)
    if spec == "random":  # label i, too, is a function of (seed, i)
        return np.array([int(torch.randint(num_classes, (), generator=generator(seed, i, "label"))) for i in range(n)])
    if spec == "balanced":
        return np.arange(n) % num_classes
    try:
        chosen = np.array([int(part) for part in spec.split(",")])
    except ValueError:
        raise UserError(f"--labels {spec}: give random, balanced or numbers such as 3,1,4") from None
    if chosen.min() < 0 or chosen.max() >= num_classes:
        raise UserError(f"--labels {spec}: classes of this checkpoint go from 0 to {num_classes - 1}")
    return np.resize(chosen, n)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and files

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def grid(images, columns, gap=2):
    """(n,H,W,C) uint8 -> (H',W',3) uint8, row by row; more than three channels show the first three."""
    n, height, width, channels = images.shape
    images = images[..., :3] if channels >= 3 else np.repeat(images[..., :1], 3, -1)
    rows = math.ceil(n / columns)
    out = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        out[top:top + height, left:left + width] = image
    return out


def enlarge(picture, pixels=640):
    """Repeat pixels so that small images can be seen: a whole factor, nothing is interpolated."""
    factor = max(1, pixels // max(picture.shape[:2]))
    return picture.repeat(factor, 0).repeat(factor, 1)


def save_picture(path, picture):
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(temporary, format="PNG")
    os.replace(temporary, path)


def side_by_side(panels, captions):
    """Pictures of one height, each with its captions (a list of lines) under it -> one picture on white."""
    size = max(14, panels[0].shape[1] // 30)
    font, gap, line = ImageFont.load_default(size), size, size + size // 3
    height, width = panels[0].shape[0], sum(p.shape[1] for p in panels) + gap * (len(panels) + 1)
    canvas = Image.new("RGB", (width, height + gap + line * max(map(len, captions)) + gap), "white")
    draw, left = ImageDraw.Draw(canvas), gap
    for panel, lines in zip(panels, captions):
        canvas.paste(Image.fromarray(panel), (left, gap))
        for i, text in enumerate(lines):
            draw.text((left + panel.shape[1] / 2, height + gap + gap // 2 + i * line), text, "black", font, anchor="ma")
        left += panel.shape[1] + gap
    return np.asarray(canvas)


def write_images(out, images, labels):
    """FILE.png: one grid. FILE.npz: arr_0 (n,H,W,C) uint8 and arr_1 (n,) labels."""
    out = pathlib.Path(out)
    if out.suffix.lower() == ".png":
        save_picture(out, enlarge(grid(images, min(len(images), max(10, math.ceil(len(images) ** 0.5))))))
    else:
        temporary = out.with_name(out.name + ".tmp")
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            np.savez(f, arr_0=images, arr_1=labels)
        os.replace(temporary, out)


def minutes(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


# ---------------------------------------------------------------------------------------------------------------------
# The command

def check_output(out, n):
    out = pathlib.Path(out)
    if out.suffix.lower() in (".png", ".npz"):
        if out.is_dir():
            raise UserError(f"--out {out}: is a folder")
        check_writable("--out", out.parent)
    elif out.suffix.lower() in IMAGE_SUFFIXES | {".npy"} and not out.is_dir():
        raise UserError(f"--out {out}: choose a name ending in .png or .npz, or a folder")
    elif out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: choose a name ending in .png or .npz, or a folder")
    elif out.is_dir():
        ours = {f"{i:06d}.png" for i in range(n)} | {"labels.txt"}
        other = next((f.name for f in out.iterdir() if f.name not in ours), None)
        if other:
            raise UserError(f"--out {out}: the folder already holds {other}, which is none of these {n} images: choose another")


def compare(args, device):
    """Teacher and student panels with the same labels and seeds, captioned with steps and time."""
    panels, captions = [], []
    (teacher, teacher_config), (student, student_config) = (load_named("--compare", path, device) for path in args.compare)
    if "student" not in student_config or "student" in teacher_config:
        raise UserError("--compare TEACHER STUDENT: give the teacher's checkpoint first and the student's second")
    for name in ("image_size", "channels", "num_classes"):
        if teacher_config["network"][name] != student_config["network"][name]:
            raise UserError(f"--compare TEACHER STUDENT: the two differ in {name}")
    scale = student_config["student"]["cfg_scale"] if args.cfg_scale is None else args.cfg_scale
    if scale != 1 and teacher.num_classes == 0:
        raise UserError(f"--cfg_scale {scale:g}: {args.compare[0]} has no classes to guide with")
    labels = choose_labels(args.labels, args.n, teacher.num_classes, args.seed)
    for net, config, name in ((teacher, teacher_config, "teacher"), (student, student_config, "one-step student")):
        steps = 1 if name != "teacher" else args.steps or 50
        images, elapsed = [], 0.0
        generate(net, config, labels[:1], args.seed, [0], 1)  # the first call is slow for reasons of its own
        for start in range(0, args.n, args.batch):
            began = time.perf_counter()
            chosen = labels[start:start + args.batch]
            images.append(generate(net, config, chosen, args.seed, range(start, start + len(chosen)), steps, args.solver, scale,
                                   args.diffusion))
            elapsed += time.perf_counter() - began
        panels.append(enlarge(grid(np.concatenate(images), min(args.n, max(10, math.ceil(args.n ** 0.5)))), 560))
        guidance = f", guidance {scale:g}" if scale != 1 and name == "teacher" else ""
        captions.append([f"{name}: {steps} step{'s' * (steps > 1)}{guidance}", f"{1000 * elapsed / args.n:.3g} ms an image"])
        print(f"{name}: {args.n} images, {steps} steps, {elapsed:.2f} s")
    save_picture(args.out, side_by_side(panels, captions))
    print(f"wrote {args.out}")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", help="checkpoint of a teacher or a student")
    add("--compare", nargs=2, metavar=("TEACHER", "STUDENT"), help="draw both side by side instead")
    add("--n", "--samples", type=number(int, 1), default=None, help="how many images (64; with --compare 100); under torchrun "
        "write --samples, since torchrun takes --n for a flag of its own")
    add("--steps", type=number(int, 1), default=None, help="network steps of a teacher (50); a student takes one")
    add("--solver", type=one_of(SOLVERS), default="euler", help="/".join(SOLVERS) + "; steps are intervals for each")
    add("--diffusion", type=one_of(DIFFUSIONS), default="sigma", help="w(t) of --solver sde: " + "/".join(DIFFUSIONS))
    add("--cfg_scale", type=number(float, 0), default=None, help="guidance of a teacher (1; with --compare what the student "
        "was distilled with): 1 = conditional, 0 = unconditional")
    add("--labels", default="balanced", help="random, balanced, or a list such as 3,1,4 (repeated)")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="image i depends on (seed, i) alone")
    add("--batch", type=number(int, 1), default=100, help="images at a time and process")
    add("--out", default="samples.png", help="FILE.png (a grid), FILE.npz (arr_0 images, arr_1 labels) or a FOLDER of PNGs")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    if bool(args.ckpt) == bool(args.compare):
        raise UserError("give either --ckpt FILE or --compare TEACHER STUDENT")
    args.n = args.n or (100 if args.compare else 64)
    check_output(args.out, args.n)
    if args.compare and not args.out.lower().endswith(".png"):
        raise UserError(f"--out {args.out}: --compare draws a picture, choose a name ending in .png")
    rank, world, device = start_processes(args.device)
    if args.compare:
        if rank == 0:
            compare(args, device)
        return

    net, config = load_named("--ckpt", args.ckpt, device)
    if "student" in config:
        if (args.steps or 1) != 1:
            raise UserError(f"--steps {args.steps}: {args.ckpt} is a one-step student, leave --steps out")
        if args.cfg_scale is not None:
            raise UserError(f"--cfg_scale {args.cfg_scale:g}: {args.ckpt} is a student, its guidance was distilled into it "
                            f"(scale {config['student']['cfg_scale']:g}), leave it out")
    steps, scale = args.steps or 50, 1.0 if args.cfg_scale is None else args.cfg_scale
    if scale != 1 and net.num_classes == 0:
        raise UserError(f"--cfg_scale {scale:g}: {args.ckpt} has no classes to guide with")
    labels = choose_labels(args.labels, args.n, net.num_classes, args.seed)
    out, folder = pathlib.Path(args.out), pathlib.Path(args.out).suffix.lower() not in (".png", ".npz")
    if folder:
        check_writable("--out", out)

    # Batches are dealt out in turn. Their borders do not depend on the number of processes, so neither does a single bit.
    images, began, shown = [], time.time(), time.time()
    starts = range(0, args.n, args.batch)
    for turn in range(0, len(starts), world):
        mine = None
        if turn + rank < len(starts):
            indices = range(starts[turn + rank], min(starts[turn + rank] + args.batch, args.n))
            mine = generate(net, config, labels[indices.start:indices.stop], args.seed, indices, steps, args.solver, scale,
                            args.diffusion)
            if folder:
                for i, image in zip(indices, mine):
                    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image[..., :3]).save(out / f"{i:06d}.png")
        if not folder:
            parts = [None] * world if rank == 0 else None
            dist.gather_object(mine, parts) if world > 1 else parts.__setitem__(0, mine)
            images += [part for part in parts or () if part is not None]
        done = min(args.n, (turn + world) * args.batch)
        if rank == 0 and time.time() - shown > 5:
            shown = time.time()
            print(f"{done}/{args.n} images, time left {minutes((shown - began) / done * (args.n - done))}", flush=True)
    if rank == 0:
        if folder:
            (out / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
        else:
            write_images(out, np.concatenate(images), labels)
        print(f"wrote {args.n} images to {out} in {time.time() - began:.1f} s")


if __name__ == "__main__":
    command(main)
