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
import io
import logging
import math
import os
import pathlib
import re
import sys
import tempfile
import time
import warnings
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps

from interpolants import (DIFFUSIONS, FAMILIES, PREDICTIONS, SOLVERS, coefficients, convert, family, interpolate, posterior, solve,
                          time_grid)
from model import UserError, guided, load_autoencoder, load_model

# About odd files Pillow warns and logs: what matters is whether they can be read.
warnings.filterwarnings("ignore", module="PIL")
logging.getLogger("PIL").addHandler(logging.NullHandler())


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
    """Run a script's main(): a UserError becomes `file.py: error: ...` (once, from the first process) and exit code 2, a lost
    process the same with exit code 1, Ctrl-C exit code 130."""
    for stream in (sys.stdout, sys.stderr):  # names of files may be of another alphabet, or no text at all
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def say(text):  # one line, whatever the names of files are made of
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
        print(f"{pathlib.Path(sys.argv[0]).name}: error: {text}", file=sys.stderr, flush=True)

    try:
        main()
        wait_for_all()  # nobody leaves while another still talks
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0 or not error.everywhere:
            say(str(error))
        sys.exit(2)
    except OSError as error:  # a disk that is full, a folder that cannot be written: named, with nothing hidden
        if error.errno is None:
            raise
        say(("" if error.filename is None else f"{error.filename}: ") + error.strerror)
        sys.exit(2)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        sys.stdout.flush()
        say(f"process {os.environ.get('RANK')}: another process has ended or hangs, or cannot be reached ({' '.join(str(error).split())[:600]}); nothing that was saved is lost, "
            "the same command goes on from it")
        os._exit(1)  # taking leave of the others would wait for them
    except KeyboardInterrupt:
        print(f"{pathlib.Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
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
    try:
        odd = odd_value(config)
    except (KeyError, TypeError, AttributeError):  # of its parts
        odd = "student"
    if odd:
        raise UserError(f"{flag} {path}: its {odd} {str(config.get(odd))[:60]} is unknown here")
    return net, config


def odd_value(config):
    """The first name in a checkpoint's configuration, its network aside, whose value no trainer writes, or None."""
    def within(value, low, high=1e300):
        return isinstance(value, (int, float)) and low <= value <= high
    reference, latent, network = config.get("reference"), config.get("latent"), config["network"]
    joined = 0 if reference in (None, "unpaired") else network["channels"]  # channels of x1 that the network sees
    sound = {
        "model": isinstance(config.get("model"), str),
        "interpolant": config.get("interpolant") in list(FAMILIES),
        "prediction": config.get("prediction") in list(PREDICTIONS),
        "gamma_scale": within(config.get("gamma_scale", 1.0), 1e-300),
        "reference": reference in (None, "paired", "unpaired", *DEGRADATIONS) and network.get("reference_channels", 0) == joined,
        "reference_source": reference is None or isinstance(config.get("reference_source"), str),
        "data": reference is None or isinstance(config.get("data"), str),
        "latent": latent is None or (isinstance(latent, dict) and isinstance(latent.get("autoencoder"), (str, type(None)))
                                     and isinstance(latent.get("image_size"), int)),
        "student": "student" not in config or (within(config["student"]["cfg_scale"], 0)
                                               and all(within(t, 1e-300, 1) for t in student_times(config))),
    }
    return next((name for name in sound if not sound[name]), None)


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

def start_processes(device="auto", timeout=86400):
    """-> rank, world size, device. Plain python is one process without a group; torchrun's variables make a group, in which a process
    gives up on another after timeout seconds."""
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
        store = None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps one store through its restarts, with the addresses of the dead in it: each attempt gets names of its own
            # (github.com/pytorch/pytorch/issues/135712). Several machines do not count attempts alike; the README says what they need.
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        # Both back ends on CUDA: small facts (stop now?) travel by gloo without waiting for the card.
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind.startswith("cuda") else "gloo", timeout=datetime.timedelta(seconds=timeout),
                                store=store, rank=rank, world_size=world)
        start_processes.patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
        start_processes.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    return rank, world, torch.device(kind)


start_processes.patient = start_processes.launcher = None


def from_first(value):
    """The first process' value, in all of them."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, group=start_processes.patient)
    return box[0]


def wait_for_all():
    """Where one process may work for hours while the others wait."""
    if dist.is_initialized():
        dist.barrier(start_processes.patient)


def first_process(action, rank, world):
    """action() in the first process while the others wait -> its result there, None elsewhere. Its UserError is raised in all."""
    result = problem = None
    if rank == 0:
        try:
            result = action()
        except UserError as error:
            problem = error
    problem = from_first(problem)
    if problem:
        raise problem
    return result


def generator(*key, device="cpu"):
    """A torch.Generator that is a function of the key: numbers and strings, such as (seed, step, 'noise')."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


# ---------------------------------------------------------------------------------------------------------------------
# Images from files, and what bridges start from

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def image_files(label, folder):
    """Every image below the folder, in order. Raises UserError, which begins with label, where there is none."""
    def stop(error):  # a folder that cannot be listed is not one without images
        raise UserError(f"{label}: {error.filename} cannot be listed ({error.strerror}); mend its permissions or move it away")

    def leads_out(path):  # a link to another part of this folder would read images twice, one to a folder around it would never end
        root, target = os.path.realpath(folder), os.path.realpath(path)
        return os.path.commonpath([root, target]) not in (root, target)
    found, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # links outside may form loops of their own
            folders.clear()
            continue
        seen.add(real)
        paths = [os.path.join(place, name) for name in sorted(folders)]
        folders[:] = [os.path.basename(p) for p in paths if os.path.basename(p) != "lost+found" and (not os.path.islink(p) or leads_out(p))]
        found += [pathlib.Path(place, name) for name in names]
    files = sorted(f for f in found if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
    if not files:
        raise UserError(f"{label}: no images in this folder (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    return files


IMAGE_NAMES = (("x_train", "y_train"), ("images", "labels"), ("arr_0", "arr_1"))  # pairs of images and labels inside an .npz
REFERENCE_NAMES = (("x1", "y1"), *IMAGE_NAMES)


def check_archive(path):
    """ValueError where a zip claims to unpack to more than 256 MiB and 100 times its size: images do not, files made to fill the memory do.
    BadZipFile where its directory is damaged: labels must not go missing unseen."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            archive.open(member).close()  # compares the directory's name with the member's own
            if b"PK\1\2" in member.comment + member.extra:
                raise zipfile.BadZipFile(f"the entry of {member.filename} swallows the next")
            if member.file_size > max(1 << 28, 100 * member.compress_size):
                raise ValueError(f"{member.filename} unpacks {member.compress_size} bytes to {member.file_size}")


def read_npz(path, flag="--data", names=IMAGE_NAMES):
    """The first of these pairs that is there -> images (N,H,W,C) uint8 and labels or None."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"{flag} {path}: not a readable .npz file")
    try:
        check_archive(path)
        with np.load(path, allow_pickle=False) as npz:
            found = next((pair for pair in names if pair[0] in npz), None)
            if found is None:
                raise UserError(f"{flag} {path}: no images inside (looked for {', '.join(pair[0] for pair in names)}; found "
                                f"{', '.join(npz.files) or 'nothing'})")
            images, labels = (npz[name] if name in npz else None for name in found)
    except UserError:
        raise
    except Exception as error:  # a damaged archive can fail in any way
        reason = "holds Python objects, refused" if "allow_pickle" in str(error) else f"not a readable .npz file ({str(error)[:200]})"
        raise UserError(f"{flag} {path}: {reason}") from None
    if not isinstance(images, np.ndarray) or not isinstance(labels, (np.ndarray, type(None))):
        raise UserError(f"{flag} {path}: {', '.join(found)} are not arrays")
    if images.dtype != np.uint8:
        raise UserError(f"{flag} {path}: {found[0]} is {images.dtype}, images must be uint8 (0 to 255)")
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or 0 in images.shape or images.shape[3] > min(images.shape[1:3]):
        raise UserError(f"{flag} {path}: {found[0]} has shape {images.shape}, expected (N,H,W) or (N,H,W,C), channels last")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0
                               or labels.max() >= 1000000):
        raise UserError(f"{flag} {path}: {found[1]} must be {len(images)} whole numbers from 0 to 999999, found "
                        f"{labels.dtype} of shape {labels.shape}")
    return images, labels


IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM", "WEBP")  # whatever a file is named: none of them starts another program


def read_image(path, size=None):
    """Any image file -> (H,W,3) uint8, turned upright and, with size, centre-cropped and resized to a square.

    Grey, palette and CMYK are converted, 16 bits are scaled to 8. Raises OSError for a broken file, or one of more pixels than Pillow
    thinks safe."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if not 0 < image.width * image.height <= Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, at most {Image.MAX_IMAGE_PIXELS} in all are read")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":
                pixels = np.asarray(image, np.float64)
                if not np.isfinite(pixels).all():
                    raise ValueError("pixels that are not finite")
                pixels = pixels * (255 / 65535) if image.mode.startswith("I") else pixels * (255 if pixels.max() <= 1 else 1)
                image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
            image = image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")
            return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS) if size else image)
    except OSError:
        raise
    except Exception as error:  # a damaged image can fail in any way
        raise OSError(f"{type(error).__name__}: {error}") from None


def read_images(flag, path, side, channels):
    """A file, a folder of files or an .npz, each image side x side -> images (n,side,side,channels) uint8, labels (n,) or None."""
    path = pathlib.Path(path)
    if path.is_file() and path.suffix.lower() == ".npz":
        images, labels = read_npz(path, flag, REFERENCE_NAMES if flag == "--reference" else IMAGE_NAMES)
        if images.shape[1:] != (side, side, channels):
            raise UserError(f"{flag} {path}: images of shape {images.shape[1:]}, the checkpoint works on {(side, side, channels)}")
        return images, labels
    if not path.exists():
        raise UserError(f"{flag} {path}: no such file or folder")
    images = []
    for file in [path] if path.is_file() else image_files(f"{flag} {path}", path):
        try:
            image = read_image(file)
        except OSError as error:
            raise UserError(f"{flag} {path}: {file} cannot be read ({error})") from None
        if image.shape[:2] != (side, side) or channels not in (1, 3):
            raise UserError(f"{flag} {path}: {file} is {image.shape[1]}x{image.shape[0]}, the checkpoint works on {side}x{side}x{channels}")
        images.append(image if channels == 3 else np.asarray(Image.fromarray(image).convert("L"))[..., None])
    return np.stack(images), None


def to_device(images, device):
    """(B,H,W,C) uint8 array or tensor -> (B,C,H,W) float32 in [-1, 1] on the device."""
    x = images if torch.is_tensor(images) else torch.from_numpy(np.ascontiguousarray(images))
    x = x.to(device, non_blocking=True)
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


def lowres4(image, rng):
    """4x4 boxes replaced by their mean."""
    height, width, channels = image.shape
    small = image.reshape(height // 4, 4, width // 4, 4, channels).mean((1, 3))
    return small.repeat(4, 0).repeat(4, 1)


def inpaint(image, rng):
    """The central square of half the side filled with noise."""
    out, side = image.astype(np.float64), image.shape[0]
    hole = slice(side // 4, side // 4 + side // 2)
    out[hole, hole] = 127.5 * (1 + rng.standard_normal(out[hole, hole].shape))
    return out


def jpeg10(image, rng):
    """Through JPEG at quality 10."""
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, "JPEG", quality=10)
    return np.asarray(Image.open(buffer)).reshape(image.shape)


def noisy(image, rng):
    """Gaussian noise of half the range's half: x0 + 0.5 z in units of [-1, 1]."""
    return image + 0.5 * 127.5 * rng.standard_normal(image.shape)


DEGRADATIONS = {"lowres4": lowres4, "inpaint": inpaint, "jpeg10": jpeg10, "noise0.5": noisy}


def degrade(name, images, *key):
    """The reference x1 of a restoration bridge: images (n,H,W,C) uint8 -> the same, degraded. Row i depends on (key, i) alone;
    key is one sequence of whole numbers per row, or one for all, to which the row is appended."""
    keys = key[0] if key and not np.isscalar(key[0]) else [(*key, i) for i in range(len(images))]
    rows = [DEGRADATIONS[name](image, np.random.default_rng(k)) for image, k in zip(images, keys)]
    return np.stack(rows).round().clip(0, 255).astype(np.uint8)


def check_degradation(flag, name, side, channels):
    if name == "lowres4" and side % 4:
        raise UserError(f"{flag} lowres4: the image side {side} is not a multiple of 4")
    if name == "jpeg10" and channels not in (1, 3):
        raise UserError(f"{flag} jpeg10: JPEG has 1 or 3 channels, not {channels}")


def psnr(images, truth):
    """Mean over the images of 10 log10(255^2 / mean squared error), both (n,H,W,C) uint8."""
    error = ((images.astype(np.float64) - truth) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255 ** 2 / np.maximum(error, 1e-3))).mean())


# ---------------------------------------------------------------------------------------------------------------------
# Generation

def start_noise(path, t, x1, z):
    """beta(t) x1 + gamma(t) z, (B,C,H,W): where sampling starts, the path at t with nothing known of the data."""
    k = coefficients(path, t, x1.ndim)
    return k.beta * x1 + k.gamma * z


def one_step(path, net, prediction, t, x_t, y, x1=None):
    """One step of the student G: x_t (B,C,H,W) at time t (a number) -> x0 (B,C,H,W), its data prediction. Differentiable.
    x1: the reference that a bridge's networks are given."""
    t = torch.full((len(x_t),), t, device=x_t.device)
    return convert(path, net(x_t, t, y) if x1 is None else net(x_t, t, y, x1), prediction, "data", x_t, t, x1)


def step_input(path, net, prediction, times, k, draw, y, x1=None):
    """What step k of the student reads, x_t (B,C,H,W) at times[k]: steps 0 to k-1 made without gradient and re-noised in between,
    with fresh noise, or by the posterior on a bridge. draw(i) gives x1, z (B,C,H,W) of step i; x1 as in one_step."""
    fresh, z = draw(0)
    x_t = start_noise(path, torch.full((len(z),), times[0], device=z.device), fresh if x1 is None else x1, z)
    for i in range(k):
        with torch.no_grad():
            x0 = one_step(path, net, prediction, times[i], x_t, y, x1)
        fresh, z = draw(i + 1)
        t, r = (torch.full((len(z),), time, device=z.device) for time in times[i:i + 2])
        x_t = interpolate(path, x0, fresh, r, z)[0] if x1 is None else posterior(path, x0, x_t, t, r, z)
    return x_t


def fewer(times, steps):
    """steps of a student's times, the first always among them."""
    return [times[i * len(times) // steps] for i in range(steps)]


def check_autoencoder(name, autoencoder, sha256, latent, channels):
    """--vae against the latents of a checkpoint or a cache: latent is their record, None for pixels; channels are theirs."""
    if name and not latent:
        raise UserError(f"--vae {name}: these are pixels, not latents; leave it out")
    if name and autoencoder.latents != channels:
        raise UserError(f"--vae {name}: makes latents of {autoencoder.latents} channels, here are {channels}")
    if name and latent.get("autoencoder") not in (None, sha256):
        raise UserError(f"--vae {name}: is not the autoencoder that the latents were made with ({sha256[:8]}…, not "
                        f"{latent['autoencoder'][:8]}…)")


def decoder(name, config, device, needed=True):
    """--vae of a checkpoint -> what turns its output into pixels, None where it makes pixels itself (or, unless needed, none is named)."""
    if config.get("latent") and name is None and needed:
        raise UserError("--vae is missing: this checkpoint makes latents; give the autoencoder that decodes them "
                        "(diffusion_pytorch_model.safetensors)")
    autoencoder, sha256 = load_autoencoder(name, device) if name else (None, None)
    check_autoencoder(name, autoencoder, sha256, config.get("latent"), config["network"]["channels"])
    return autoencoder.decode if autoencoder else None


def path_of(config):
    return family(config["interpolant"], config.get("gamma_scale", 1.0))


@torch.no_grad()
def generate(net, config, labels, seed, indices, steps=None, solver=None, cfg_scale=1.0, diffusion="sigma", x1=None,
             cfg_interval=(0.0, 1.0), decode=None):
    """Images number `indices` of the stream `seed` -> (n,H,W,C) uint8 array. labels (n,) int64 or None.

    A student's configuration says so and holds its times, of which it takes `steps` (all); solver and guidance are the teacher's
    (50 steps; euler, on bridges posterior). x1 (n,H,W,C) uint8: what a bridge starts from.
    decode: latents (n,c,h,w) -> pixels, where the network makes latents.
    """
    path, prediction, decode = path_of(config), config["prediction"], decode or (lambda x: x)
    device = next(net.parameters()).device
    shape = (net.channels, config["network"]["image_size"], config["network"]["image_size"])
    streams = [generator(seed, int(i), "image") for i in indices]  # drawn on the CPU: the same image on every device

    def draw(_=None):
        return torch.stack([torch.randn(shape, generator=g) for g in streams]).to(device)

    y = None if labels is None or net.num_classes == 0 else torch.as_tensor(labels, device=device)
    given = None if x1 is None else to_device(x1, device)
    if "student" in config:
        times = student_times(config)
        times = fewer(times, steps or len(times))
        x_t = step_input(path, net, prediction, times, len(times) - 1, lambda _: (draw(), draw()), y, given)
        return to_uint8(decode(one_step(path, net, prediction, times[-1], x_t, y, given)))
    steps, solver = steps or 50, solver or default_solver(config)
    t = torch.full((len(streams),), float(time_grid(path, steps, prediction, sees_x1=given is not None)[0]), device=device)
    x = start_noise(path, t, draw() if given is None else given, draw())
    return to_uint8(decode(solve(path, lambda x, t: guided(net, x, t, y, cfg_scale, given, cfg_interval), x, steps, solver,
                                 prediction, diffusion, draw, given)))


def student_times(config):
    return config["student"].get("times") or [config["student"]["t_init"]]


def default_solver(config):
    return "posterior" if config.get("reference") else "euler"


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


def save_file(path, write):
    """write(file) to a temporary file beside path, then rename; straight to path where that is a device."""
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        with open(path, "wb") as f:
            write(f)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_picture(path, picture):
    save_file(path, lambda f: Image.fromarray(picture).save(f, format="PNG"))


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
        save_file(out, lambda f: np.savez(f, arr_0=images, arr_1=labels))


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
        def ours(name):
            return name == "labels.txt" or (re.fullmatch(r"\d{6}\.png", name) and int(name[:6]) < n)
        other = next((f.name for f in out.iterdir() if not ours(f.name)), None)
        if other:
            raise UserError(f"--out {out}: the folder already holds {other}, which is none of these {n} images: choose another")


def read_references(args, config, n=None):
    """--reference (and --truth or --degrade) of a bridge -> x1 (n,H,W,C) uint8, labels or None, truth or None."""
    kind, side, channels = config.get("reference"), config["network"]["image_size"], config["network"]["channels"]
    if not kind:
        for flag in ("reference", "truth", "degrade"):
            if getattr(args, flag):
                raise UserError(f"--{flag} {getattr(args, flag)}: {args.ckpt or args.compare[0]} starts from noise, leave it out")
        return None, None, None
    if not args.reference:
        raise UserError(f"--reference is missing: {args.ckpt or args.compare[0]} is a bridge ({kind}) and needs images to start from: "
                        "--reference FILE_OR_FOLDER")
    x1, labels = read_images("--reference", args.reference, side, channels)
    truth = None
    if args.degrade:
        if kind not in DEGRADATIONS:
            raise UserError(f"--degrade: the bridge's reference is {kind}, not one of {', '.join(DEGRADATIONS)}; leave it out")
        if args.truth:
            raise UserError(f"--truth {args.truth}: with --degrade the images of --reference are the truth, leave one out")
        truth = x1
    elif args.truth:
        truth, _ = read_images("--truth", args.truth, side, channels)
        if len(truth) != len(x1):
            raise UserError(f"--truth {args.truth}: {len(truth)} images for {len(x1)} of --reference {args.reference}")
    n = n or len(x1)
    if n > len(x1):
        raise UserError(f"--n {n}: --reference {args.reference} has {len(x1)} images")
    x1, truth = x1[:n], None if truth is None else truth[:n]
    return degrade(kind, truth, args.seed) if args.degrade else x1, None if labels is None else labels[:n], truth


def label_references(labels, net, args):
    """A bridge's labels: the file's own where it has them, else --labels, else the null class."""
    if labels is None or net.num_classes == 0:
        return choose_labels(args.labels, args.n, net.num_classes, args.seed) if args.labels != "balanced" else (
            np.full(args.n, net.num_classes))
    if labels.max() >= net.num_classes:
        raise UserError(f"--reference {args.reference}: has label {labels.max()}, classes of this checkpoint go to {net.num_classes - 1}")
    return labels.astype(np.int64)


def check_interval(interval):
    if interval[0] >= interval[1]:
        raise UserError(f"--cfg_interval {interval[0]:g} {interval[1]:g}: the first must be below the second")


def check_solver(solver, config):
    if config.get("reference") == "unpaired" and solver not in (None, "posterior"):
        raise UserError(f"--solver {solver}: an unpaired bridge knows no velocity, leave it out (posterior)")


def check_steps(args, config, name):
    """--steps and --cfg_scale against a student's checkpoint."""
    if "student" not in config:
        return
    most = len(student_times(config))
    if args.steps is not None and args.steps > most:
        raise UserError(f"--steps {args.steps}: {name} is a student of {most} step{'s' * (most > 1)}; take at most that, or leave --steps out")
    if args.cfg_scale is not None or args.cfg_interval != [0.0, 1.0]:
        flag = "--cfg_interval" if args.cfg_scale is None else f"--cfg_scale {args.cfg_scale:g}"
        raise UserError(f"{flag}: {name} is a student, its guidance was distilled into it "
                        f"(scale {config['student']['cfg_scale']:g}), leave it out")


def compare(args, device):
    """Teacher and student panels with the same labels and seeds, captioned with steps and time; for bridges the input comes
    first and the truth, where it is known, last."""
    panels, captions, made = [], [], []
    (teacher, teacher_config), (student, student_config) = (load_named("--compare", path, device) for path in args.compare)
    if "student" not in student_config or "student" in teacher_config:
        raise UserError("--compare TEACHER STUDENT: give the teacher's checkpoint first and the student's second")
    for name in ("image_size", "channels", "num_classes"):
        if teacher_config["network"][name] != student_config["network"][name]:
            raise UserError(f"--compare TEACHER STUDENT: the two differ in {name}")
    if teacher_config.get("reference") != student_config.get("reference"):
        raise UserError("--compare TEACHER STUDENT: the two differ in their reference")
    check_solver(args.solver, teacher_config)
    scale = student_config["student"]["cfg_scale"] if args.cfg_scale is None else args.cfg_scale
    if scale != 1 and teacher.num_classes == 0:
        raise UserError(f"--cfg_scale {scale:g}: {args.compare[0]} has no classes to guide with")
    x1, labels, truth = read_references(args, teacher_config, args.n if args.given_n else None)
    args.n = args.n if x1 is None else min(len(x1), args.n if args.given_n else 10)
    labels = choose_labels(args.labels, args.n, teacher.num_classes, args.seed) if x1 is None else label_references(
        None if labels is None else labels[:args.n], teacher, args)
    times, decode = student_times(student_config), decoder(args.vae, teacher_config, device)
    for net, config, name in ((teacher, teacher_config, "teacher"),
                              (student, student_config, "one-step student" if len(times) == 1 else "student")):
        steps = len(times) if name != "teacher" else args.steps or 50
        images, elapsed = [], 0.0
        generate(net, config, labels[:1], args.seed, [0], 1, x1=None if x1 is None else x1[:1], decode=decode)  # the first call is slow for its own reasons
        for start in range(0, args.n, args.batch):
            began = time.perf_counter()
            rows = slice(start, min(start + args.batch, args.n))
            images.append(generate(net, config, labels[rows], args.seed, range(rows.start, rows.stop), steps, args.solver, scale,
                                   args.diffusion, None if x1 is None else x1[rows], args.cfg_interval, decode))
            elapsed += time.perf_counter() - began
        made.append(np.concatenate(images))
        panels.append(enlarge(grid(made[-1], min(args.n, max(10, math.ceil(args.n ** 0.5)))), 560))
        guidance = f", guidance {scale:g}" if scale != 1 and name == "teacher" else ""
        captions.append([f"{name}: {steps} step{'s' * (steps > 1)}{guidance}", f"{1000 * elapsed / args.n:.3g} ms an image"])
        fidelity = "" if truth is None else f", PSNR {psnr(made[-1], truth[:args.n]):.2f} dB"
        print(f"{name}: {args.n} images, {steps} steps, {elapsed:.2f} s{fidelity}")
    if x1 is not None:
        rows = [x1[:args.n], *made] + ([] if truth is None else [truth[:args.n]])
        legend = f"rows: input, teacher ({args.steps or 50} steps), student ({len(times)})" + ", truth" * (truth is not None)
        panels, captions = [enlarge(grid(np.concatenate(rows), args.n), 840)], [[legend]]
    save_picture(args.out, side_by_side(panels, captions))
    print(f"wrote {args.out}")


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", help="checkpoint of a teacher or a student")
    add("--compare", nargs=2, metavar=("TEACHER", "STUDENT"), help="draw both side by side instead")
    add("--n", "--samples", type=number(int, 1), default=None, help="how many images (64; with --compare 100); under torchrun "
        "write --samples, since torchrun takes --n for a flag of its own")
    add("--steps", type=number(int, 1), default=None, help="network steps of a teacher (50), or fewer than a student's own")
    add("--solver", type=one_of(SOLVERS), default=None, help="/".join(SOLVERS) + "; steps are intervals for each (euler; posterior "
        "on bridges)")
    add("--diffusion", type=one_of(DIFFUSIONS), default="sigma", help="w(t) of --solver sde: " + "/".join(DIFFUSIONS))
    add("--cfg_scale", type=number(float, 0), default=None, help="guidance of a teacher (1; with --compare what the student "
        "was distilled with): 1 = conditional, 0 = unconditional")
    add("--cfg_interval", type=number(float, 0, 1), nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"), help="times at which a "
        "teacher is guided")
    add("--vae", default=None, help="autoencoder that decodes a checkpoint's latents")
    add("--reference", default=None, help="FILE, FOLDER or .npz of images that a bridge starts from")
    add("--degrade", action="store_true", help="degrade them first as the bridge's training did; they are the truth then")
    add("--truth", default=None, help="FILE, FOLDER or .npz to measure the restored images against (PSNR)")
    add("--labels", default="balanced", help="random, balanced, or a list such as 3,1,4 (repeated)")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="image i depends on (seed, i) alone")
    add("--batch", type=number(int, 1), default=100, help="images at a time and process")
    add("--out", default="samples.png", help="FILE.png (a grid), FILE.npz (arr_0 images, arr_1 labels) or a FOLDER of PNGs")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    if bool(args.ckpt) == bool(args.compare):
        raise UserError("give either --ckpt FILE or --compare TEACHER STUDENT")
    args.given_n = args.n is not None
    args.n = args.n or (100 if args.compare else 64)
    check_output(args.out, math.inf if args.reference else args.n)
    check_interval(args.cfg_interval)
    if args.compare and not args.out.lower().endswith(".png"):
        raise UserError(f"--out {args.out}: --compare draws a picture, choose a name ending in .png")
    rank, world, device = start_processes(args.device)
    if args.compare:
        if rank == 0:
            compare(args, device)
        return

    net, config = load_named("--ckpt", args.ckpt, device)
    check_steps(args, config, args.ckpt)
    decode = decoder(args.vae, config, device)
    check_solver(args.solver, config)
    if "student" in config and args.solver:
        raise UserError(f"--solver {args.solver}: {args.ckpt} is a student, it has steps of its own; leave it out")
    scale = 1.0 if args.cfg_scale is None else args.cfg_scale
    if scale != 1 and net.num_classes == 0:
        raise UserError(f"--cfg_scale {scale:g}: {args.ckpt} has no classes to guide with")
    x1, labels, truth = read_references(args, config, args.n if args.given_n else None)
    if x1 is None:
        labels = choose_labels(args.labels, args.n, net.num_classes, args.seed)
    else:
        args.n = len(x1)
        check_output(args.out, args.n)
        labels = label_references(labels, net, args)
    out, folder = pathlib.Path(args.out), pathlib.Path(args.out).suffix.lower() not in (".png", ".npz")
    if folder:
        check_writable("--out", out)

    # Batches are dealt out in turn. Their borders do not depend on the number of processes, so neither does a single bit.
    images, quality, began, shown = [], [], time.time(), time.time()
    starts = range(0, args.n, args.batch)
    for turn in range(0, len(starts), world):
        mine = None
        if turn + rank < len(starts):
            indices = range(starts[turn + rank], min(starts[turn + rank] + args.batch, args.n))
            rows = slice(indices.start, indices.stop)
            mine = generate(net, config, labels[rows], args.seed, indices, args.steps, args.solver, scale, args.diffusion,
                            None if x1 is None else x1[rows], args.cfg_interval, decode)
            if truth is not None:
                quality += [psnr(image[None], other[None]) for image, other in zip(mine, truth[rows])]
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
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, quality)
        quality = sum(parts, [])
    if rank == 0:
        if truth is not None:
            print(f"PSNR {np.mean(quality):.2f} dB over {args.n} images")
        if folder:
            (out / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
        else:
            images = np.concatenate(images)
            if x1 is not None and out.suffix.lower() == ".png":  # rows of what went in, what came out and, where it is known, the truth
                rows = [x1, images] + ([] if truth is None else [truth])
                save_picture(out, enlarge(grid(np.concatenate([row[:20] for row in rows]), min(20, args.n)), 840))
            else:
                write_images(out, images, labels)
        print(f"wrote {args.n} images to {out} in {time.time() - began:.1f} s")


if __name__ == "__main__":
    command(main)
