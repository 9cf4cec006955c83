"""Train a teacher: regress a SiT on the velocity, data, noise or score of any interpolant.

    python train_teacher.py                                    # procedural digits on whatever device there is
    python train_teacher.py --data mnist --interpolant vp --iters 6000 --out out/mnist_vp
    torchrun --nproc_per_node=8 train_teacher.py --data FOLDER --image_size 64 --model SiT-B/4 --batch 256

Writes OUT/teacher.pt (everything: the same command again goes on from it), OUT/log.jsonl and OUT/samples_XXXXXXX.png.
"""
import contextlib
import functools
import gzip
import hashlib
import json
import pathlib
import signal
import sys
import tarfile
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.parallel import DistributedDataParallel

from interpolants import FAMILIES, PREDICTIONS, interpolate, loss_weight, preconditioning, target
from model import (UserError, build_model, download, ema_update, frozen_copy, load_checkpoint, load_weights, parse_name,
                   save_checkpoint)
from sample import (IMAGE_SUFFIXES, Parser, check_writable, choose_labels, command, enlarge, first_process, generate, generator,
                    grid, minutes, number, one_of, save_picture, start_processes)


# ---------------------------------------------------------------------------------------------------------------------
# Data: every source becomes one uint8 array

class Images(NamedTuple):
    """images (N,H,W,C) uint8, labels (N,) int64, num_classes (0 = unconditional)."""
    images: np.ndarray
    labels: np.ndarray
    num_classes: int


def draw_digits(n=10000, size=24, seed=0):
    """n procedural digits, image i of class i % 10: Pillow's built-in font under a random rotation, shear, scale, shift and
    stroke. Image i is a function of (seed, i, size)."""
    side = 3 * size  # drawn three times too large, so that the affine map and the reduction are smooth
    images = np.empty((n, size, size, 1), np.uint8)
    font = ImageFont.load_default(0.75 * side)
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        angle, shear = rng.uniform(-0.2, 0.2), rng.uniform(-0.25, 0.25)
        scale, stroke = rng.uniform(0.8, 1.1, 2), int(rng.integers(side // 40, side // 24 + 1))
        shift = rng.uniform(-0.05, 0.05, 2) * side
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        inverse = np.linalg.inv(turn @ np.array([[1, shear], [0, 1]]) * scale)  # Pillow maps output to input
        offset = side / 2 - inverse @ (side / 2 + shift)
        image = Image.new("L", (side, side))
        ImageDraw.Draw(image).text((side / 2, side / 2), str(i % 10), 255, font, anchor="mm", stroke_width=stroke)
        image = image.transform((side, side), Image.Transform.AFFINE, (*inverse[0], offset[0], *inverse[1], offset[1]),
                                Image.Resampling.BILINEAR)
        images[i, :, :, 0] = np.asarray(image.reduce(3))
    return images, np.arange(n) % 10


IDX_FILES = {  # data set: (address, ((file, bytes, sha256) of the training images, of the training labels))
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", (
        ("train-images-idx3-ubyte.gz", 9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        ("train-labels-idx1-ubyte.gz", 28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"))),
    "fashion_mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", (
        ("train-images-idx3-ubyte.gz", 26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        ("train-labels-idx1-ubyte.gz", 29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"))),
}
CIFAR10_FILE = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", 170052171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")


def read_idx(path):
    """A gzipped IDX file of unsigned bytes, MNIST's format -> uint8 array."""
    with gzip.open(path) as f:
        content = f.read()
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def read_idx_set(name, data_dir):
    address, files = IDX_FILES[name]
    images, labels = (read_idx(download(address + file, pathlib.Path(data_dir, name, file), sha256, size))
                      for file, size, sha256 in files)
    return images[..., None], labels


def read_cifar10(data_dir):
    """The binary version: records of one label byte and 3x32x32 pixels in five training files inside the archive."""
    address, size, sha256 = CIFAR10_FILE
    records = []
    with tarfile.open(download(address, pathlib.Path(data_dir, "cifar10", "cifar-10-binary.tar.gz"), sha256, size)) as archive:
        for i in range(1, 6):
            content = archive.extractfile(f"cifar-10-batches-bin/data_batch_{i}.bin").read()
            records.append(np.frombuffer(content, np.uint8).reshape(-1, 3073))
    records = np.concatenate(records)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def read_npz(path):
    """x_train/y_train, images/labels or arr_0/arr_1 -> images (N,H,W,C) uint8 and labels or None."""
    try:
        with np.load(path, allow_pickle=False) as npz:
            names = [names for names in (("x_train", "y_train"), ("images", "labels"), ("arr_0", "arr_1")) if names[0] in npz]
            if not names:
                raise UserError(f"--data {path}: no images inside (looked for x_train, images and arr_0, found "
                                f"{', '.join(npz.files) or 'nothing'})")
            images, labels = (npz[name] if name in npz else None for name in names[0])
    except UserError:
        raise
    except Exception as error:  # a damaged archive can fail in any way
        reason = "holds Python objects, refused" if "allow_pickle" in str(error) else "not a readable .npz file"
        raise UserError(f"--data {path}: {reason}") from None
    if not isinstance(images, np.ndarray) or not isinstance(labels, (np.ndarray, type(None))):
        raise UserError(f"--data {path}: {', '.join(names[0])} are not arrays")
    if images.dtype != np.uint8:
        raise UserError(f"--data {path}: {names[0][0]} is {images.dtype}, images must be uint8 (0 to 255)")
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or 0 in images.shape or images.shape[3] > min(images.shape[1:3]):
        raise UserError(f"--data {path}: {names[0][0]} has shape {images.shape}, expected (N,H,W) or (N,H,W,C), channels last")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0
                               or labels.max() >= 1000000):
        raise UserError(f"--data {path}: {names[0][1]} must be {len(images)} whole numbers from 0 to 999999, found "
                        f"{labels.dtype} of shape {labels.shape}")
    return images, labels


def read_image(path, size=None):
    """Any image file -> (H,W,3) uint8, turned upright and, with size, centre-cropped and resized to a square.

    Grey, palette and CMYK are converted, 16 bits are scaled to 8. Raises OSError or ValueError for a broken file."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":
                pixels = np.asarray(image, np.float64)
                pixels = pixels * (255 / 65535) if image.mode.startswith("I") else pixels * (255 if pixels.max() <= 1 else 1)
                image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
            image = image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")
            return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS) if size else image)
    except (SyntaxError, Image.DecompressionBombError, EOFError, IndexError, TypeError) as error:
        raise OSError(str(error)) from None


def read_folder(folder, size, data_dir, skip_broken=False, say=print):
    """Class subfolders or one flat folder of images -> memmap (N,size,size,3) and labels or None. Decoded once; the next run with
    the same files, size and data_dir finds the result by a fingerprint of names, lengths and times."""
    folder = pathlib.Path(folder)
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
    if not files:
        raise UserError(f"--data {folder}: no images in this folder (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    classes = sorted({f.relative_to(folder).parts[0] for f in files if f.parent != folder})
    if classes and any(f.parent == folder for f in files):
        raise UserError(f"--data {folder}: holds images beside class subfolders; use either")
    if size is None:
        try:
            size = min(read_image(files[0]).shape[:2])
        except (OSError, ValueError):
            raise UserError(f"--data {folder}: {files[0]} cannot be read, say --image_size") from None
    listing = repr([(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files] + [size])
    cache = pathlib.Path(data_dir, f"{folder.resolve().name}-{size}-{hashlib.sha256(listing.encode()).hexdigest()[:16]}.npy")
    record = cache.with_suffix(".json")
    if not (cache.is_file() and record.is_file()):
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(".part")
        images = np.lib.format.open_memmap(part, "w+", np.uint8, (len(files), size, size, 3))
        kept, shown, began = [], time.time(), time.time()
        for i, file in enumerate(files):
            try:
                images[len(kept)] = read_image(file, size)
            except (OSError, ValueError) as error:
                if not skip_broken:
                    del images
                    part.unlink()
                    raise UserError(f"--data {folder}: {file} cannot be read ({error}); mend or delete it, or add --skip_broken"
                                    ) from None
                say(f"skipped {file}: {error}")
                continue
            kept.append(classes.index(file.relative_to(folder).parts[0]) if classes else 0)
            if time.time() - shown > 5:
                shown = time.time()
                say(f"decoding {i + 1}/{len(files)}, time left {minutes((shown - began) / (i + 1) * (len(files) - i - 1))}")
        if not kept:
            del images
            part.unlink()
            raise UserError(f"--data {folder}: none of its {len(files)} images can be read")
        images.flush()
        del images
        record.write_text(json.dumps({"labels": kept, "classes": classes, "source": str(folder)}))
        part.replace(cache)
    found = json.loads(record.read_text())
    images = np.load(cache, mmap_mode="r")[:len(found["labels"])]
    return images, np.array(found["labels"], np.int64) if found["classes"] else None


def load_images(data, data_dir="data", image_size=None, seed=0, skip_broken=False, unconditional=False, say=print):
    """--data by name or path -> Images. The one reader of training data and of references."""
    path = pathlib.Path(data)
    if data == "digits":
        images, labels = draw_digits(size=image_size or 24, seed=seed)
    elif data in IDX_FILES:
        images, labels = read_idx_set(data, data_dir)
    elif data == "cifar10":
        images, labels = read_cifar10(data_dir)
    elif path.is_dir():
        images, labels = read_folder(path, image_size, data_dir, skip_broken, say)
    elif path.is_file() and path.suffix == ".npz":
        images, labels = read_npz(path)
    else:
        raise UserError(f"--data {data}: no such data set, .npz file or folder (data sets: digits, {', '.join(IDX_FILES)}, cifar10)")
    size = image_size or min(images.shape[1:3])
    if images.shape[1:3] != (size, size) and images.shape[3] > 4:
        raise UserError(f"--image_size {size}: {data} has {images.shape[3]} channels, only images of up to 4 can be resized")
    if images.shape[1:3] != (size, size):  # arrays are cropped and resized like the files of a folder
        images = np.stack([np.asarray(ImageOps.fit(Image.fromarray(i.squeeze(-1) if i.shape[-1] == 1 else i), (size, size),
                                                   Image.Resampling.LANCZOS)).reshape(size, size, -1) for i in images])
    if labels is None or unconditional:
        return Images(images, np.zeros(len(images), np.int64), 0)
    labels = labels.astype(np.int64)
    return Images(images, labels, int(labels.max()) + 1)


@functools.lru_cache(2)  # a batch meets two passes at most, unless it is larger than the data
def shuffled(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_indices(n, batch, step, seed):
    """The indices of step's batch in an endless sequence of shuffled passes over n items -> (batch,) int64 array."""
    position = np.arange(step * batch, (step + 1) * batch)
    chosen = np.empty(batch, np.int64)
    for epoch in np.unique(position // n):
        here = position // n == epoch
        chosen[here] = shuffled(n, seed, int(epoch))[position[here] % n]
    return chosen


def to_device(images, device):
    """(B,H,W,C) uint8 array -> (B,C,H,W) float32 in [-1, 1] on the device."""
    x = torch.from_numpy(np.ascontiguousarray(images)).to(device, non_blocking=True)
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Randomness, losses and schedules that both trainers share

def draw_noise(shape, part, device, *key):
    """x1, z (n,C,H,W) and t-quantiles u (n,) of rows `part` (a slice) of a global batch of `shape`. Every process draws the
    whole batch from the key and keeps its rows, so any number of processes sees the same noise."""
    g = generator(*key, device=device)
    x1, z = (torch.randn(shape, generator=g, device=device)[part] for _ in range(2))
    # One uniform number a batch, spread evenly: every batch covers all times (arXiv:2107.00630, appendix I.1).
    u = (torch.rand(1, generator=g, device=device) + torch.arange(shape[0], device=device) / shape[0]) % 1
    return x1, z, u[part]


def regression_loss(net, path, prediction, x0, x1, z, t, y):
    """E[w(t) |net(x_t, t, y) - target|^2] per sample, (B,): the teacher's loss on data, the critic's on the student's samples
    (arXiv:2303.08797, eq. 2.13). Its minimiser is the conditional mean of the target given x_t."""
    x_t, _ = interpolate(path, x0, x1, t, z)
    error = net(x_t, t, y) - target(path, prediction, x0, x1, t, z)
    return (loss_weight(path, prediction, t) * error.float() ** 2).flatten(1).mean(1)


def learning_rate(step, lr, warmup, decay_from):
    """Linear warm-up, then constant, then from decay_from (0 = never) falling as 1 / sqrt(step). Never a function of --iters."""
    return lr * min(1.0, (step + 1) / max(1, warmup)) * (min(1.0, (decay_from / max(1, step)) ** 0.5) if decay_from else 1.0)


def precision(device):
    """bf16 autocast on CUDA, nothing elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def optimizer_step(optimizer, net, lr, clip):
    """Clip and step, unless the gradient is not finite. -> (gradient norm, stepped)."""
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
    finite = bool(torch.isfinite(norm))
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


# ---------------------------------------------------------------------------------------------------------------------
# The run: stopping, logging, resuming

class StopSignal:
    """SIGTERM and Ctrl-C finish the iteration at hand; a second Ctrl-C ends at once. All processes stop at the same iteration."""

    def __init__(self):
        self.number = 0
        signal.signal(signal.SIGTERM, self.catch)
        signal.signal(signal.SIGINT, self.catch)

    def catch(self, signum, _):
        if self.number and signum == signal.SIGINT:
            sys.exit(130)
        self.number = signum

    def __call__(self):
        if dist.is_initialized():
            flag = torch.tensor(self.number)  # on the CPU: travels by gloo
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            if not int(flag):
                return False  # a signal that came in the meantime is for the next iteration, when all hear of it
            self.number = int(flag)
        return self.number != 0

    def leave(self, step, rank):
        if dist.is_initialized():
            dist.barrier()
        if rank == 0:
            print(f"stopped after iteration {step}; the same command goes on from here", flush=True)
        sys.exit(130 if self.number == signal.SIGINT else 0)


class Log:
    """Averages of the numbers since the last line: one line for people, one JSON object in OUT/log.jsonl."""

    def __init__(self, out, job, step, iters, batch, rank, world, device):
        self.device = device
        self.file, self.job, self.iters, self.batch = pathlib.Path(out, "log.jsonl"), job, iters, batch
        self.rank, self.world, self.first, self.began = rank, world, step, time.time()
        self.last_step, self.last_time, self.sums = step, self.began, {}
        if rank == 0 and self.file.exists():  # lines after the checkpoint are about to be written again
            lines = [line for line in self.file.read_text().splitlines(True) if self.stays(line, step)]
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text("".join(lines))
            temporary.replace(self.file)

    def stays(self, line, step):
        try:
            record = json.loads(line)
            return record["job"] != self.job or record["step"] <= step
        except (ValueError, TypeError, KeyError):  # cut off by a crash, or nobody's
            return False

    def add(self, **values):
        """Tensors stay on the device: nothing waits for it until a line is due."""
        for name, value in values.items():
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = total + (value.detach() if torch.is_tensor(value) else value), count + 1

    def line(self, step, **facts):
        names = list(self.sums)
        means = torch.tensor([float(self.sums[n][0]) / self.sums[n][1] for n in names], dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(means)
            means /= self.world
        now = time.time()
        rate = (step - self.last_step) * self.batch / max(now - self.last_time, 1e-9)
        left = (now - self.began) / max(1, step - self.first) * (self.iters - step)
        record = {"job": self.job, "step": step, **dict(zip(names, means.tolist())), **facts, "images_per_second": rate,
                  "memory_mib": peak_memory(self.device), "seconds": now - self.began}
        self.last_step, self.last_time, self.sums = step, now, {}
        if self.rank == 0:
            shown = "  ".join(f"{k} {v:.4g}" for k, v in record.items() if k not in ("job", "step", "seconds", "images_per_second",
                                                                                "memory_mib"))
            print(f"{self.job} {step}/{self.iters} ({100 * step / self.iters:.0f}%)  {shown}  {rate:.0f} img/s  "
                  f"{record['memory_mib']:.0f} MiB  {minutes(left)} left", flush=True)
            with open(self.file, "a") as f:
                f.write(json.dumps(record) + "\n")
        return record


def peak_memory(device):
    """MiB: of the card where the run is on one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


# Flags that may differ between a run and its continuation: they do not change what is learnt.
FREE_FLAGS = {"iters", "out", "fresh", "device", "compile", "log_every", "sample_every", "save_every", "data_dir", "skip_broken"}


def resume(path, args, name, needs):
    """The checkpoint at path if it continues this command, None if there is none. Raises UserError when a flag differs.
    needs: the keys that such a checkpoint must have."""
    if args.fresh or not pathlib.Path(path).exists():
        return None
    state = load_checkpoint(path)
    if not {"flags", "step", *needs} <= state.keys():
        raise UserError(f"--out {args.out}: {path} is no {name} run; choose another --out, or start over with --fresh")
    for flag, was in state["flags"].items():
        now = getattr(args, flag, None)
        if flag not in FREE_FLAGS and now != was:
            raise UserError(f"--{flag} {now}: {path} was made with --{flag} {was}; repeat its flags, choose another --out, or "
                            "start over with --fresh")
    if state["step"] > args.iters:
        raise UserError(f"--iters {args.iters}: {path} is at iteration {state['step']} already")
    return state


def check_batch(batch, world, accum=1):
    if batch % (world * accum):
        share = world * accum
        raise UserError(f"--batch {batch}: does not divide over {world} process{'es' * (world > 1)}"
                        + (f" and --accum {accum}" if accum > 1 else "") + f"; {max(share, batch // share * share)} does")


def write_flags(out, job, flags):
    path = pathlib.Path(out, f"{job}.json")
    path.write_text(json.dumps(flags, indent=1) + "\n")
    print("  ".join(f"--{k} {v}" for k, v in flags.items()), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The command

def parse_flags():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", default="digits", help="digits, mnist, fashion_mnist, cifar10, a .npz file or a folder of images")
    add("--data_dir", default="data", help="where downloads and decoded folders are kept")
    add("--image_size", type=number(int, 1), default=None, help="side in pixels (the data's own)")
    add("--skip_broken", action="store_true", help="leave out images of a folder that cannot be read")
    add("--unconditional", action="store_true", help="ignore labels")
    add("--model", default="SiT-XS/4", help="SiT-SIZE/PATCH with a size of XXS, XS, S, B, L, XL")
    add("--qk_norm", action="store_true", help="normalise queries and keys")
    add("--interpolant", type=one_of(FAMILIES), default="linear", help=", ".join(FAMILIES))
    add("--prediction", type=one_of(PREDICTIONS), default=None, help="velocity, data, noise or score (the interpolant's own)")
    add("--label_dropout", type=number(float, 0, 1), default=0.1, help="share of labels replaced by the null class, for guidance")
    add("--iters", type=number(int, 1), default=1200, help="optimizer steps in all; raise it to go on")
    add("--batch", type=number(int, 1), default=64, help="images a step, over all processes")
    add("--accum", type=number(int, 1), default=1, help="pieces that each process cuts its share of the batch into")
    add("--lr", type=number(float, 0, open_low=True), default=3e-3, help="AdamW's learning rate")
    add("--warmup", type=number(int, 0), default=100, help="iterations of linear warm-up")
    add("--decay_from", type=number(int, 0), default=500, help="from here the rate falls as 1/sqrt(iteration); 0 = never")
    add("--weight_decay", type=number(float, 0), default=0.0, help="AdamW's decay")
    add("--clip", type=number(float, 0, open_low=True), default=1.0, help="largest gradient norm")
    add("--ema", type=number(float, 0, 1), default=0.999, help="decay of the averaged weights")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of weights, data order and noise")
    add("--out", default="out", help="folder of the run")
    add("--fresh", action="store_true", help="start over although --out holds a run")
    add("--log_every", type=number(int, 1), default=20, help="iterations between lines")
    add("--sample_every", type=number(int, 1), default=1000, help="iterations between pictures")
    add("--save_every", type=number(int, 1), default=1000, help="iterations between checkpoints")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args()


def main():
    args = parse_flags()
    size, patch = parse_name(args.model)
    if args.image_size and args.image_size % patch:
        raise UserError(f"--image_size {args.image_size}: not a multiple of the patch size {patch} of --model {args.model}")
    rank, world, device = start_processes(args.device)
    check_batch(args.batch, world, args.accum)
    out = pathlib.Path(args.out)
    state = resume(out / "teacher.pt", args, "teacher's", ("model", "ema", "optimizer"))
    torch.set_float32_matmul_precision("high")
    say = print if rank == 0 else lambda *_: None

    # Data. The first process downloads or decodes, the others find the result.
    def load():
        return load_images(args.data, args.data_dir, args.image_size, args.seed, args.skip_broken, args.unconditional, say)
    data = first_process(load, rank, world) or load()
    side, channels = data.images.shape[1], data.images.shape[3]
    if side % patch:
        raise UserError(f"--model {args.model}: its patch does not divide the {side}x{side} images; add --image_size "
                        f"{max(patch, side // patch * patch)} or choose another patch")

    # The network, its average and its optimizer.
    path, prediction = FAMILIES[args.interpolant], args.prediction or FAMILIES[args.interpolant].predict
    config = {"network": {"size": size, "patch": patch, "image_size": side, "channels": channels, "num_classes": data.num_classes,
                          "qk_norm": args.qk_norm, "precondition": preconditioning(path) if path.precondition else None},
              "model": args.model, "interpolant": args.interpolant, "prediction": prediction, "data": args.data}
    if path.precondition and prediction != "data":
        raise UserError(f"--prediction {prediction}: {args.interpolant} is preconditioned, its networks predict data; leave it out")
    torch.manual_seed(args.seed)
    net = build_model(config).to(device)
    ema = frozen_copy(net)
    optimizer = torch.optim.AdamW(net.parameters(), args.lr, weight_decay=args.weight_decay, fused=device.type != "mps")
    step = 0
    if state:
        load_weights(net, state["model"], out / "teacher.pt")
        load_weights(ema, state["ema"], out / "teacher.pt")
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        say(f"going on from iteration {step} of {out / 'teacher.pt'}")
    if args.compile:
        net.compile()
    wrapped = DistributedDataParallel(net) if world > 1 else net
    if rank == 0:
        check_writable("--out", out)
        write_flags(out, "train_teacher", vars(args))
    say(f"{args.model}: {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {len(data.images)} images "
        f"{side}x{side}x{channels}, {data.num_classes} classes, {args.interpolant} path, {prediction} prediction, {device}"
        + (f" x {world}" if world > 1 else ""))

    def save():
        if rank == 0:
            save_checkpoint(out / "teacher.pt", {"config": config, "flags": vars(args), "step": step, "model": net.state_dict(),
                                                 "ema": ema.state_dict(), "optimizer": optimizer.state_dict()})

    def picture():
        if rank == 0:
            n = 10 * (data.num_classes if 0 < data.num_classes <= 10 else 10)
            images = generate(ema, config, choose_labels("balanced", n, data.num_classes), args.seed, range(n), 25)
            save_picture(out / f"samples_{step:07d}.png", enlarge(grid(images, n // 10)))

    stop, skipped = StopSignal(), 0
    log = Log(out, "teacher", step, args.iters, args.batch, rank, world, device)
    share = args.batch // world
    mine = slice(rank * share, (rank + 1) * share)
    while step < args.iters:
        # The batch: images, labels with dropout, noise and times, all functions of (seed, step, global index).
        chosen = batch_indices(len(data.images), args.batch, step, args.seed)[mine]
        x0 = to_device(data.images[chosen], device)  # (B,C,H,W)
        y = torch.from_numpy(data.labels[chosen]).to(device)  # (B,)
        x1, z, u = draw_noise((args.batch, channels, side, side), mine, device, args.seed, step, "teacher")
        t = 1e-3 + (1 - 2e-3) * u
        drop = torch.rand(args.batch, generator=generator(args.seed, step, "dropout", device=device), device=device)[mine]
        y = torch.where(drop < args.label_dropout, data.num_classes, y)

        # Regression on the prediction's target; gradients are averaged over processes in the last piece's backward pass.
        pieces = zip(*(v.chunk(args.accum) for v in (x0, x1, z, t, y)))
        for i, piece in enumerate(pieces):
            sync = contextlib.nullcontext() if world == 1 or i == args.accum - 1 else wrapped.no_sync()
            with sync, precision(device):
                loss = regression_loss(wrapped, path, prediction, *piece).mean()
                (loss / args.accum).backward()
            log.add(loss=loss)
        norm, stepped = optimizer_step(optimizer, net, learning_rate(step, args.lr, args.warmup, args.decay_from), args.clip)
        log.add(grad_norm=norm)
        step += 1
        skipped = 0 if stepped else skipped + 1
        if skipped >= 10:
            raise UserError(f"iteration {step}: the loss or its gradient was not finite 10 times in a row; lower --lr. The last "
                            "good checkpoint is untouched")
        ema_update(ema, net, args.ema, step)

        if step % args.log_every == 0 or step == args.iters:
            log.line(step)
        if step % args.sample_every == 0 or step == args.iters:
            picture()
        if step % args.save_every == 0 or step == args.iters:
            save()
        if stop() and step < args.iters:
            save()
            stop.leave(step, rank)
    if rank == 0:
        print(f"wrote {out / 'teacher.pt'}")


if __name__ == "__main__":
    command(main)
