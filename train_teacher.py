"""Train a teacher: regress a SiT on the velocity, data, noise or score of any interpolant.

    python train_teacher.py                                    # procedural digits on whatever device there is
    python train_teacher.py --data mnist --interpolant vp --iters 6000 --out out/mnist_vp
    torchrun --nproc_per_node=8 train_teacher.py --data FOLDER --image_size 64 --model SiT-B/4 --batch 256

Writes OUT/teacher.pt (everything: the same command again goes on from it), OUT/log.jsonl and OUT/samples_XXXXXXX.png.
"""
import concurrent.futures
import contextlib
import functools
import gzip
import hashlib
import io
import json
import math
import os
import pathlib
import platform
import shutil
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

from interpolants import FAMILIES, PREDICTIONS, family, interpolate, loss_weight, preconditioning, target
from model import (LATENT_SCALE, UserError, build_model, checksum, download, ema_update, frozen_copy, load_autoencoder, load_checkpoint,
                   load_weights, parse_name, save_checkpoint)
from sample import (DEGRADATIONS, REFERENCE_NAMES, Parser, check_autoencoder, check_degradation, check_writable, choose_labels, command, degrade,
                    enlarge, first_process, from_first, generate, generator, grid, image_files, minutes, number, one_of, read_image, read_npz, save_picture,
                    start_processes, to_device, wait_for_all)


# ---------------------------------------------------------------------------------------------------------------------
# Data: every source becomes one uint8 array

class Images(NamedTuple):
    """images (N,H,W,C) uint8, labels (N,) int64, num_classes (0 = unconditional). With a latent record instead: images (N,2,2,c,h,w)
    float16, the mean and the log-variance of the latents of image and mirror image."""
    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    latent: dict = None

    @property
    def side(self):
        return self.images.shape[-1 if self.latent else 1]

    @property
    def channels(self):
        return self.images.shape[3]

    def fingerprint(self):
        """Tells data sets apart: sizes, labels, and the images; 64 of them, spread evenly, where they stay on the disk."""
        rows = np.linspace(0, len(self.images) - 1, 64).astype(np.int64) if isinstance(self.images, np.memmap) else slice(None)
        parts = [hashlib.sha256(np.ascontiguousarray(part)).hexdigest() for part in (self.labels, self.images[rows])]
        return checksum([list(self.images.shape), self.num_classes, *parts])

    def x0(self, rows, chosen, part, device, *key):
        """What networks see, (b,C,H,W) float32 on the device, of rows = images[chosen[part]]. Latents draw mirror and posterior anew
        each time, as functions of the key and the row of the whole batch `chosen`."""
        if not self.latent:
            return to_device(rows, device)
        g = generator(*key, "posterior", device=device)
        mirror = torch.rand(len(chosen), generator=g, device=device)[part] < 0.5
        noise = torch.randn((len(chosen), self.channels, self.side, self.side), generator=g, device=device)[part]
        mean, log_variance = torch.as_tensor(rows).to(device, non_blocking=True)[torch.arange(len(mirror), device=device), mirror.long()].float(
            ).unbind(1)  # (b,2,c,h,w)
        return LATENT_SCALE * (mean + (0.5 * log_variance).exp() * noise)


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


def gunzip(path, most=1 << 28):
    """The whole content of a .gz file, its CRC checked. What swells to more than 256 MiB is none of these data sets."""
    with gzip.open(path) as f:
        content = f.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most} bytes inside")
    return content


def read_idx(path, dimensions):
    """A gzipped IDX file of unsigned bytes, MNIST's format -> uint8 array."""
    content = gunzip(path)
    if content[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(f"begins with {content[:4].hex()}")
    shape = np.frombuffer(content, ">u4", dimensions, 4).tolist()
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def read_idx_set(name, data_dir):
    address, files = IDX_FILES[name]
    paths = [download(address + file, pathlib.Path(data_dir, name, file), sha256, size) for file, size, sha256 in files]
    try:
        images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
        if len(images) != len(labels) or 0 in images.shape:
            raise ValueError(f"images of shape {images.shape}, {len(labels)} labels")
    except Exception as error:  # a damaged file can fail in any way
        raise UserError(f"--data {name}: {paths[0]} or {paths[1].name} is damaged ({error}); delete both, and they are fetched again") from None
    return images[..., None], labels


def read_cifar10(data_dir):
    """The binary version: records of one label byte and 3x32x32 pixels in five training files inside the archive."""
    address, size, sha256 = CIFAR10_FILE
    path, records = download(address, pathlib.Path(data_dir, "cifar10", "cifar-10-binary.tar.gz"), sha256, size), []
    try:
        with tarfile.open(fileobj=io.BytesIO(gunzip(path))) as archive:  # nothing is unpacked to the disk
            for i in range(1, 6):
                member = archive.getmember(f"cifar-10-batches-bin/data_batch_{i}.bin")
                if not member.isreg() or member.issparse() or member.size == 0:  # a link leads elsewhere, a sparse file claims any size
                    raise ValueError(f"{member.name} is no plain file")
                records.append(np.frombuffer(archive.extractfile(member).read(), np.uint8).reshape(-1, 3073))
    except Exception as error:  # a damaged archive can fail in any way
        raise UserError(f"--data cifar10: {path} is damaged ({error}); delete it, and it is fetched again") from None
    records = np.concatenate(records)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


def list_folder(folder):
    """-> files in order, labels (N,) int64 or None, names of the classes: the subfolders, or none for a flat folder."""
    folder = pathlib.Path(folder)
    files = image_files(f"--data {folder}", folder)
    classes = sorted({f.relative_to(folder).parts[0] for f in files if f.parent != folder})
    if classes and any(f.parent == folder for f in files):
        raise UserError(f"--data {folder}: holds images beside class subfolders; use either")
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[f.relative_to(folder).parts[0]] for f in files], np.int64) if classes else None
    return files, labels, classes


def read_folder(folder, size, data_dir, skip_broken=False, say=print):
    """Class subfolders or one flat folder of images -> memmap (N,size,size,3) and labels or None. Decoded once; the next run with
    the same files, size and data_dir finds the result by a fingerprint of names, lengths and times."""
    files, labels, classes = list_folder(folder)
    if size is None:
        try:
            size = min(read_image(files[0]).shape[:2])
        except OSError:
            raise UserError(f"--data {folder}: {files[0]} cannot be read, say --image_size") from None
    listing = repr([(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files] + [size])
    cache = pathlib.Path(data_dir, f"{folder.resolve().name}-{size}-{hashlib.sha256(listing.encode()).hexdigest()[:16]}.npy")
    record = cache.with_suffix(".json")
    try:
        found = json.loads(record.read_text())
        images = np.load(cache, mmap_mode="r")
        whole = found.pop("checksum") == checksum(found) and images.dtype == np.uint8 and images.shape == (len(files), size, size, 3)
    except Exception:  # not there, or damaged in any way: decode again
        whole = False
    if not whole:
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(".part")
        images = np.lib.format.open_memmap(part, "w+", np.uint8, (len(files), size, size, 3))
        kept, shown, began = [], time.time(), time.time()
        for i, file in enumerate(files):
            try:
                images[len(kept)] = read_image(file, size)
            except OSError as error:
                if not skip_broken:
                    del images
                    part.unlink()
                    raise UserError(f"--data {folder}: {file} cannot be read ({error}); mend or delete it, or add --skip_broken"
                                    ) from None
                say(f"skipped {file}: {error}")
                continue
            kept.append(int(labels[i]) if classes else 0)
            if time.time() - shown > 5:
                shown = time.time()
                say(f"decoding {i + 1}/{len(files)}, time left {minutes((shown - began) / (i + 1) * (len(files) - i - 1))}")
        if not kept:
            del images
            part.unlink()
            raise UserError(f"--data {folder}: none of its {len(files)} images can be read")
        images.flush()
        del images
        found = {"labels": kept, "classes": classes, "source": str(folder)}
        record.write_text(json.dumps({**found, "checksum": checksum(found)}))
        part.replace(cache)
    images = np.load(cache, mmap_mode="r")[:len(found["labels"])]
    return images, np.array(found["labels"], np.int64) if found["classes"] else None


CHUNK = 16  # images encoded at a time and marked as done together: the file does not depend on who encodes them


def cache_latents(data, directory, autoencoder, sha256, image_size, data_dir, device, rank, world, say):
    """Encode a folder (or any other data) once -> Images with latents. directory gets latents.npy, labels.npy, done.npy (a byte for each chunk,
    set once it is written) and record.json. Processes take chunks in turn; a run cut off goes on with the chunks that are left."""
    directory = pathlib.Path(directory)
    if pathlib.Path(data).is_dir():
        folder = pathlib.Path(data)
        files, labels, classes = list_folder(folder)
        listing = hashlib.sha256(repr([(str(f.relative_to(folder)), f.stat().st_size) for f in files]).encode()).hexdigest()
        n, num_classes = len(files), len(classes)

        def read(i):
            try:
                return read_image(files[i], image_size)
            except OSError as error:
                problem = UserError(f"--data {data}: {files[i]} cannot be read ({error}); mend or delete it")
                problem.everywhere = False
                raise problem from None
    else:
        found = load_images(data, data_dir, image_size)
        images, labels, num_classes, n = found.images, found.labels, found.num_classes, len(found.images)
        if images.shape[3] not in (1, 3):
            raise UserError(f"--data {data}: {images.shape[3]} channels, an autoencoder reads 1 or 3")
        listing, read = hashlib.sha256(images.tobytes()).hexdigest(), lambda i: np.repeat(images[i], 3 // images.shape[3], -1)
    labels = np.zeros(n, np.int64) if labels is None else labels
    side, c = image_size // autoencoder.factor, autoencoder.latents
    record = {"count": n, "shape": [n, 2, 2, c, side, side], "dtype": "float16", "source": str(data), "listing": listing, "image_size": image_size,
              "crop": "centre", "autoencoder": sha256, "num_classes": num_classes, "labels": hashlib.sha256(labels.tobytes()).hexdigest()}

    def begin():  # once, by the first process
        check_writable("--cache_latents", directory)
        if (directory / "record.json").exists():
            made = read_record(directory)
            if not made:
                raise UserError(f"--cache_latents {directory}: its record.json is damaged, or of an older version; delete the folder and start again")
            changed = next((key for key in record if key != "source" and made.get(key) != record[key]), None)
            if changed:
                raise UserError(f"--cache_latents {directory}: was made with another {changed} ({str(made.get(changed))[:40]}, here "
                                f"{str(record[changed])[:40]}); choose another folder")
            return True
        if any(directory.iterdir()):
            raise UserError(f"--cache_latents {directory}: holds other files; choose another folder")
        np.lib.format.open_memmap(directory / "latents.npy", "w+", np.float16, tuple(record["shape"])).flush()
        np.lib.format.open_memmap(directory / "done.npy", "w+", np.uint8, ((n + CHUNK - 1) // CHUNK,)).flush()
        np.save(directory / "labels.npy", labels)
        write_record(directory, {**record, "complete": False})
        return True
    first_process(begin, rank, world)
    try:
        latents, done = (np.lib.format.open_memmap(directory / f"{name}.npy", "r+") for name in ("latents", "done"))
        if [latents.dtype, list(latents.shape), done.dtype, done.shape] != [np.float16, record["shape"], np.uint8, ((n + CHUNK - 1) // CHUNK,)]:
            raise ValueError("other shapes")
    except Exception as error:  # damaged files can fail in any way
        raise UserError(f"--cache_latents {directory}: latents.npy or done.npy is damaged ({error}); delete the folder and start again") from None
    todo = [k for k in range(rank, len(done), world) if not done[k]]
    began, shown = time.time(), time.time()
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as workers:
        for turn, k in enumerate(todo):
            rows = range(k * CHUNK, min((k + 1) * CHUNK, n))
            x = to_device(np.stack(list(workers.map(read, rows))), device)  # (b,3,H,W)
            for m, view in enumerate((x, x.flip(3))):
                for j, value in enumerate(autoencoder.encode(view)):
                    latents[rows.start:rows.stop, m, j] = value.cpu().numpy().astype(np.float16)
            latents.flush()
            done[k] = 1
            if time.time() - shown > 5:
                shown = time.time()
                say(f"encoding {(turn + 1) * CHUNK * world}/{n}, time left {minutes((shown - began) / (turn + 1) * (len(todo) - turn - 1))}")
    done.flush()
    wait_for_all()

    def finish():
        if not np.lib.format.open_memmap(directory / "done.npy", "r").all():
            raise UserError(f"--cache_latents {directory}: some images are not encoded; run the same command again")
        write_record(directory, {**record, "complete": True})
        return True
    first_process(finish, rank, world)
    return read_latents(directory)


def write_record(directory, record):
    temporary = pathlib.Path(directory, "record.tmp")
    temporary.write_text(json.dumps({**record, "checksum": checksum(record)}, indent=1) + "\n")
    temporary.replace(pathlib.Path(directory, "record.json"))


def read_record(directory):
    """The record of cached latents, {} where there is none or it is damaged."""
    try:
        record = json.loads(pathlib.Path(directory, "record.json").read_text())
        return record if record.pop("checksum") == checksum(record) else {}
    except Exception:  # a damaged file can fail in any way
        return {}


def read_latents(directory):
    """A folder written by cache_latents -> Images. The latents themselves, which may be large, are checked for their shape alone."""
    record = read_record(directory)
    if not record.get("complete"):
        raise UserError(f"--data {directory}: its latents are incomplete, or their record is damaged; run the command with --cache_latents again")
    try:
        latents = np.load(pathlib.Path(directory, "latents.npy"), mmap_mode="r")
        labels = np.load(pathlib.Path(directory, "labels.npy"), mmap_mode="r")
        known = isinstance(record["image_size"], int) and isinstance(record["autoencoder"], str) and isinstance(record["num_classes"], int)
        if not known or latents.ndim != 6 or list(latents.shape) != record["shape"] or latents.dtype != np.float16 or labels.shape != latents.shape[:1]:
            raise ValueError(f"latents of shape {latents.shape}")
        labels = np.array(labels)
        if labels.dtype != np.int64 or hashlib.sha256(labels.tobytes()).hexdigest() != record["labels"] or (
                labels.min() < 0 or labels.max() >= max(1, record["num_classes"])):
            raise ValueError("other labels")
        return Images(latents, labels, record["num_classes"], record)
    except Exception as error:  # damaged files can fail in any way
        raise UserError(f"--data {directory}: its latents do not fit its record ({error}); delete the folder and make it again") from None


def load_images(data, data_dir="data", image_size=None, seed=0, skip_broken=False, unconditional=False, say=print):
    """--data by name or path -> Images. The one reader of training data and of references."""
    path = pathlib.Path(data)
    if data == "digits":
        images, labels = draw_digits(size=image_size or 24, seed=seed)
    elif data in IDX_FILES:
        images, labels = read_idx_set(data, data_dir)
    elif data == "cifar10":
        images, labels = read_cifar10(data_dir)
    elif path.is_dir() and (path / "record.json").is_file() and (path / "latents.npy").is_file():
        found = read_latents(path)
        if image_size not in (None, found.latent["image_size"]):
            raise UserError(f"--image_size {image_size}: the latents of {data} are of images of {found.latent['image_size']}; leave it out")
        return found._replace(labels=np.zeros_like(found.labels), num_classes=0) if unconditional else found
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


class Reference(NamedTuple):
    """What a bridge starts from. kind: a name of DEGRADATIONS (x1 is a degraded x0), paired (image i belongs to x0 number i) or
    unpaired (another data set, drawn independently); images (M,H,W,C) uint8 for the latter two."""
    kind: str
    images: np.ndarray = None

    def rows(self, data, chosen, seed, step, job, part=slice(None)):
        """x1 (b,H,W,C) uint8 for the images `chosen` (B,) of a global batch, rows `part` of it: a function of (seed, step, job, row)."""
        rows = range(*part.indices(len(chosen)))
        if self.kind == "paired":
            return self.images[chosen[part]]
        if self.kind == "unpaired":
            g = generator(seed, step, job, "reference")
            return self.images[torch.randint(len(self.images), (len(chosen),), generator=g).numpy()[part]]
        tag = sum(map(ord, job))  # numpy's seeds are numbers
        return degrade(self.kind, data[chosen[part]], [(seed, step, tag, row) for row in rows])


def load_reference(name, images, data_dir, say=print):
    """--reference: a degradation, an .npz with x1 (paired with the data), or another data set -> Reference for images (N,H,W,C)."""
    side, channels = images.shape[1], images.shape[3]
    if name in DEGRADATIONS:
        check_degradation("--reference", name, side, channels)
        return Reference(name)
    if pathlib.Path(name).is_file():
        x1, _ = read_npz(name, "--reference", REFERENCE_NAMES)
        with np.load(name) as npz:
            kind = "paired" if "x1" in npz else "unpaired"
    else:
        try:
            kind, x1 = "unpaired", load_images(name, data_dir, side, say=say).images
        except UserError as error:
            if pathlib.Path(name).exists():
                raise UserError(str(error).replace("--data", "--reference", 1)) from None
            raise UserError(f"--reference {name}: no such degradation ({', '.join(DEGRADATIONS)}), .npz file, folder or data set") from None
    if x1.shape[1:] != images.shape[1:]:
        raise UserError(f"--reference {name}: images of shape {x1.shape[1:]}, the data's are {images.shape[1:]}")
    if kind == "paired" and len(x1) != len(images):
        raise UserError(f"--reference {name}: {len(x1)} paired images for {len(images)} of the data")
    return Reference(kind, x1)


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


def regression_loss(net, path, prediction, x0, x1, z, t, y, sees_x1=False):
    """E[w(t) |net(x_t, t, y) - target|^2] per sample, (B,): the teacher's loss on data, the critic's on the student's samples
    (arXiv:2303.08797, eq. 2.13). Its minimiser is the conditional mean of the target given x_t (and x1, with sees_x1: bridges)."""
    x_t, _ = interpolate(path, x0, x1, t, z)
    out = net(x_t, t, y, x1) if sees_x1 else net(x_t, t, y)
    error = out - target(path, prediction, x0, x1, t, z, sees_x1)
    return (loss_weight(path, prediction, t, x0.ndim, sees_x1) * error.float() ** 2).flatten(1).mean(1)


def learning_rate(step, lr, warmup, decay_from):
    """Linear warm-up, then constant, then from decay_from (0 = never) falling as 1 / sqrt(step). Never a function of --iters."""
    return lr * min(1.0, (step + 1) / max(1, warmup)) * (min(1.0, (decay_from / max(1, step)) ** 0.5) if decay_from else 1.0)


def precision(device):
    """bf16 autocast on CUDA, nothing elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def make_optimizer(kind, net, lr, device, shard=False, **options):
    """An Adam of torch.optim over the network. shard: each process keeps the moments of its part of the weights only (ZeRO stage 1,
    arXiv:1910.02054); the state dict is that of the plain optimizer, so checkpoints load on any number of processes."""
    options = dict(lr=lr, fused=device.type != "mps", **options)
    if shard and dist.is_initialized():
        from torch.distributed.optim import ZeroRedundancyOptimizer
        return ZeroRedundancyOptimizer(net.parameters(), optimizer_class=kind, **options)
    return kind(net.parameters(), **options)


def gather_optimizer(optimizer, rank):
    """The optimizer's whole state dict in the first process, None elsewhere; called by all of them."""
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict(to=0)
    return optimizer.state_dict() if rank == 0 else None


def optimizer_step(optimizer, net, lr, clip, wait=True):
    """Clip and step, unless the gradient is not finite. -> (gradient norm, stepped). Without wait the host does not look: a fused
    optimizer skips by itself on the device, and stepped is a tensor there."""
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
    finite = torch.isfinite(norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if wait:
        finite = bool(finite)
        if finite:
            optimizer.step()
    else:
        inner = getattr(optimizer, "optim", optimizer)
        inner.grad_scale, inner.found_inf = None, (~finite).float()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def count_skipped(skipped, stepped):
    """Skipped steps in a row: an int, or a tensor where stepped is one (see optimizer_step)."""
    return (skipped + 1) * (~stepped if torch.is_tensor(stepped) else int(not stepped))


# ---------------------------------------------------------------------------------------------------------------------
# The run: stopping, logging, resuming

class StopSignal:
    """SIGTERM and Ctrl-C finish the iteration at hand; another Ctrl-C two seconds later or more ends at once (torchrun passes the first one
    on a second time). All processes stop at the same iteration."""

    def __init__(self):
        self.number, self.since = 0, 0.0
        signal.signal(signal.SIGTERM, self.catch)
        signal.signal(signal.SIGINT, self.catch)

    def catch(self, signum, _):
        if self.number and signum == signal.SIGINT and time.monotonic() - self.since > 2:
            sys.exit(130)
        if not self.number:
            self.number, self.since = signum, time.monotonic()

    def __call__(self):
        if dist.is_initialized():
            if start_processes.launcher not in (None, os.getppid()):  # torchrun itself is gone: nobody else would ever stop this process
                self.catch(signal.SIGTERM, None)
            flag = torch.tensor(self.number)  # on the CPU: travels by gloo
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            if not int(flag):
                return False  # a signal that came in the meantime is for the next iteration, when all hear of it
            self.number, self.since = int(flag), self.since or time.monotonic()
        return self.number != 0

    def leave(self, step, rank):
        wait_for_all()
        if rank == 0:
            print(f"stopped after iteration {step}; the same command goes on from here", flush=True)
        sys.exit(130 if self.number == signal.SIGINT else 0)


def lock(out):
    """Keep a second run out of the folder for as long as this process lives: the lock is the system's, so none is left by a crash.
    Raises UserError naming the process that holds it."""
    check_writable("--out", out)
    if lock.held is not None:
        os.close(lock.held)
    lock.held = os.open(pathlib.Path(out, "lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        import fcntl
        fcntl.flock(lock.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        return
    except BlockingIOError:
        raise UserError(f"--out {out}: another run is writing there ({os.read(lock.held, 200).decode(errors='replace').strip() or 'process unknown'}); "
                        "wait for it, stop it, or choose another folder") from None
    except OSError:  # some network file systems have no locks
        return
    os.ftruncate(lock.held, 0)
    os.write(lock.held, f"process {os.getpid()} on {platform.node()}\n".encode())


lock.held = None


def keep(save, path, failures, last):
    """save() -> 0, or the number of failures in a row if the disk is full or the folder read-only: the last good checkpoint is untouched
    and the run goes on to the next save. Raises UserError after three, or when there is no next (last). Pictures and the log are
    kept with failures = 0: they never stop a run."""
    try:
        save()
        return 0
    except OSError as error:
        try:
            space = f"{shutil.disk_usage(pathlib.Path(path).parent).free / 2 ** 20:.0f} MiB free"
        except OSError:
            space = "space unknown"
        reason = error.strerror or str(error)
        if last or failures >= 2:
            raise UserError(f"{path}: cannot be written ({reason}; {space}); the last good checkpoint is untouched, make room and run the same "
                            "command again") from None
        print(f"{path}: cannot be written ({reason}; {space}); the last good checkpoint is untouched, trying again at the next save",
              file=sys.stderr, flush=True)
        return failures + 1


class Log:
    """Averages of the numbers since the last line: one line for people, one JSON object in OUT/log.jsonl."""

    def __init__(self, out, job, step, iters, batch, rank, world, device):
        self.device = device
        self.file, self.job, self.iters, self.batch = pathlib.Path(out, "log.jsonl"), job, iters, batch
        self.rank, self.world, self.first, self.began = rank, world, step, time.time()
        self.last_step, self.last_time, self.sums = step, self.began, {}
        if rank == 0 and self.file.exists():  # lines after the checkpoint are about to be written again
            lines = [line for line in self.file.read_text(errors="replace").splitlines(True) if self.stays(line, step)]
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text("".join(lines))
            temporary.replace(self.file)

    def stays(self, line, step):
        try:
            record = json.loads(line)
            return record["job"] != self.job or record["step"] <= step
        except (ValueError, TypeError, KeyError, RecursionError):  # cut off by a crash, or nobody's
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
            hidden = {"job", "step", "seconds", "images_per_second", "memory_mib"} | ({"skipped"} if not record.get("skipped") else set())
            shown = "  ".join(f"{k} {v:.4g}" for k, v in record.items() if k not in hidden)
            print(f"{self.job} {step}/{self.iters} ({100 * step / self.iters:.0f}%)  {shown}  {rate:.0f} img/s  "
                  f"{record['memory_mib']:.0f} MiB  {minutes(left)} left", flush=True)

            def append():
                plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}  # JSON has no NaN
                with open(self.file, "a") as f:
                    f.write(json.dumps(plain) + "\n")
            keep(append, self.file, 0, False)
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


# Flags that may differ between a run and its continuation: those that do not change what is learnt, and those that may be tuned on the way.
FREE_FLAGS = {"iters", "out", "fresh", "device", "compile", "log_every", "sample_every", "save_every", "data_dir", "skip_broken", "vae", "grad_checkpoint", "shard",
              "timeout", "accum"}
TUNED_FLAGS = {"lr", "critic_lr", "gan_lr", "warmup", "decay_from", "weight_decay", "clip"}


def resume(path, args, defaults, name, needs, say=print):
    """The checkpoint at path if it continues this command, None if there is none. Raises UserError when a flag differs that would mix two
    runs into one; one that the checkpoint does not know had its default. needs: the keys that such a checkpoint must have."""
    restarted = from_first(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0")  # by torchrun: no longer afresh
    found = pathlib.Path(path).exists()
    if found != from_first(found):
        problem = UserError(f"--out {args.out}: {path} is {'' if found else 'not '}there, otherwise than for the first process: give a folder that all "
                            "machines share")
        problem.everywhere = False
        raise problem
    if (args.fresh and not restarted) or not found:
        return None
    state = load_checkpoint(path)
    if not {"flags", "step", *needs} <= state.keys() or not isinstance(state["flags"], dict) or not isinstance(state["step"], int):
        raise UserError(f"--out {args.out}: {path} is no {name} run; choose another --out, or start over with --fresh")
    changed = {flag: (getattr(args, flag, None), was) for flag, was in {**defaults, **state["flags"]}.items()
               if flag not in FREE_FLAGS and getattr(args, flag, None) != was}
    mixed = [f"--{flag} {now}: {path} was made with --{flag} {str(was)[:200]}" for flag, (now, was) in changed.items() if flag not in TUNED_FLAGS]
    if mixed:
        also = ", ".join(line.split(":")[0] for line in mixed[1:])
        raise UserError(mixed[0] + (f" (other too: {also})" if also else "") + "; repeat its flags, choose another --out, or start over with --fresh")
    if state["step"] > args.iters:
        raise UserError(f"--iters {args.iters}: {path} is at iteration {state['step']} already")
    for flag, (now, was) in changed.items():
        say(f"note: --{flag} {now} from iteration {state['step']} on, {was} before")
    return state


def check_same_data(state, fingerprint, path, flag):
    """The checkpoint at path must have been made with the images of this fingerprint."""
    if state and state.get("data") not in (None, fingerprint):
        raise UserError(f"--data {flag}: these are not the images that {path} was made with; choose another --out, or start over with --fresh")


def load_moments(optimizer, state, path):
    """The optimizer's state out of a checkpoint. Raises UserError where it belongs to other weights."""
    try:
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        for i, row in state["state"].items():
            for value in row.values():
                if not torch.is_tensor(value) or value.shape not in ((), weights[i].shape):
                    raise ValueError("a moment of another shape")
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(f"{path}: its optimizer does not fit its weights ({type(error).__name__}: {error}); start over with --fresh") from None


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
    add("--vae", default=None, help="autoencoder of latents: diffusers' diffusion_pytorch_model.safetensors or .bin, or its folder")
    add("--cache_latents", default=None, help="DIR: encode --data once with --vae, both mirrors, and train on the latents; later --data DIR")
    add("--unconditional", action="store_true", help="ignore labels")
    add("--model", default="SiT-XS/4", help="SiT-SIZE/PATCH with a size of XXS, XS, S, B, L, XL")
    add("--qk_norm", action="store_true", help="normalise queries and keys")
    add("--interpolant", type=one_of(FAMILIES), default="linear", help=", ".join(FAMILIES))
    add("--reference", default=None, help="what a bridge starts from: " + ", ".join(DEGRADATIONS) + " (the data, degraded), an .npz with "
        "x1 (paired images), another data set (unpaired), or noise")
    add("--gamma_scale", type=number(float, 0, open_low=True), default=1.0, help="s in a bridge's gamma = s sqrt(t (1 - t))")
    add("--antithetic", action="store_true", help="bridges: every pair of images of a batch is one image with z and with -z")
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
    add("--grad_checkpoint", action="store_true", help="recompute blocks in the backward pass: less memory, a third more time")
    add("--shard", action="store_true", help="split the optimizer's moments over the processes")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--timeout", type=number(float, 1), default=600, help="seconds after which a process gives up on another that hangs")
    return parser.parse_args(), vars(parser.parse_args([]))


def main():
    args, defaults = parse_flags()
    size, patch = parse_name(args.model)
    if args.cache_latents and not (args.vae and args.image_size):
        raise UserError(f"--cache_latents {args.cache_latents}: needs --vae and --image_size, the side in pixels")
    if args.image_size and not args.vae and args.image_size % patch:
        raise UserError(f"--image_size {args.image_size}: not a multiple of the patch size {patch} of --model {args.model}")
    bridge = args.interpolant == "bridge"
    if bridge and args.reference is None:
        raise UserError(f"--interpolant bridge: needs --reference, what it starts from ({', '.join(DEGRADATIONS)}, paired.npz, another "
                        "data set, or noise)")
    for flag, value, default in (("reference", args.reference, None), ("gamma_scale", args.gamma_scale, 1.0),
                                 ("antithetic", args.antithetic, False)):
        if value != default and not bridge:
            raise UserError(f"--{flag} {value}: is for bridges; leave it out or add --interpolant bridge")
    rank, world, device = start_processes(args.device, args.timeout)
    check_batch(args.batch, world, args.accum)
    if args.antithetic and args.batch % (2 * world * args.accum):
        raise UserError(f"--batch {args.batch}: --antithetic needs whole pairs in each process and piece; "
                        f"{args.batch // (2 * world * args.accum) * 2 * world * args.accum or 2 * world * args.accum} does")
    out = pathlib.Path(args.out)
    if from_first(out.is_dir()):  # a new folder is made and locked when there is something to write
        first_process(lambda: lock(out), rank, world)
    say = print if rank == 0 else lambda *_: None
    state = resume(out / "teacher.pt", args, defaults, "teacher's", ("model", "ema", "optimizer"), say)
    torch.set_float32_matmul_precision("high")

    # Data. The first process downloads or decodes, the others find the result.
    def load():
        return load_images(args.data, args.data_dir, args.image_size, args.seed, args.skip_broken, args.unconditional, say)
    autoencoder, sha256 = load_autoencoder(args.vae, device) if args.vae else (None, None)
    if args.cache_latents:
        if args.image_size % autoencoder.factor:
            raise UserError(f"--image_size {args.image_size}: not a multiple of {autoencoder.factor}, what the autoencoder {args.vae} reduces by")
        data = cache_latents(args.data, args.cache_latents, autoencoder, sha256, args.image_size, args.data_dir, device, rank, world, say)
        if args.unconditional:
            data = data._replace(labels=np.zeros_like(data.labels), num_classes=0)
    else:
        data = first_process(load, rank, world) or load()
    wait_for_all()
    check_autoencoder(args.vae, autoencoder, sha256, data.latent, data.channels)
    fingerprint = data.fingerprint()
    check_same_data(state, fingerprint, out / "teacher.pt", args.data)
    side, channels = data.side, data.channels
    if side % patch:
        raise UserError(f"--model {args.model}: its patch does not divide the {side}x{side} images; add --image_size "
                        f"{max(patch, side // patch * patch)} or choose another patch")

    reference = None
    if data.latent and args.reference not in (None, "noise"):
        raise UserError(f"--reference {args.reference}: bridges between latents are not there yet; leave --cache_latents out")
    if args.reference not in (None, "noise"):
        def load():
            return load_reference(args.reference, data.images, args.data_dir, say)
        reference = first_process(load, rank, world) or load()
        wait_for_all()
    sees_x1 = reference is not None

    # The network, its average and its optimizer.
    path, prediction = family(args.interpolant, args.gamma_scale), args.prediction or FAMILIES[args.interpolant].predict
    if reference and reference.kind == "unpaired" and prediction != "data":
        raise UserError(f"--prediction {prediction}: an unpaired bridge is sampled by its posterior, which needs the data prediction; leave it "
                        "out")
    config = {"network": {"size": size, "patch": patch, "image_size": side, "channels": channels, "num_classes": data.num_classes,
                          "qk_norm": args.qk_norm, "precondition": preconditioning(path) if path.precondition else None,
                          "reference_channels": channels if reference and reference.kind != "unpaired" else 0},
              "model": args.model, "interpolant": args.interpolant, "prediction": prediction, "data": args.data}
    if data.latent:
        config["latent"] = {"autoencoder": data.latent["autoencoder"], "image_size": data.latent["image_size"]}
    if bridge:
        config["gamma_scale"] = args.gamma_scale
    if reference:
        config.update(reference=reference.kind, reference_source=args.reference)
    if path.precondition and prediction != "data":
        raise UserError(f"--prediction {prediction}: {args.interpolant} is preconditioned, its networks predict data; leave it out")
    torch.manual_seed(args.seed)
    net = build_model(config).to(device)
    ema = frozen_copy(net)
    net.grad_checkpoint = args.grad_checkpoint
    optimizer = make_optimizer(torch.optim.AdamW, net, args.lr, device, args.shard, weight_decay=args.weight_decay)
    step = 0
    if state:
        load_weights(net, state["model"], out / "teacher.pt")
        load_weights(ema, state["ema"], out / "teacher.pt")
        load_moments(optimizer, state["optimizer"], out / "teacher.pt")
        step = state["step"]
        say(f"going on from iteration {step} of {out / 'teacher.pt'}")
    if args.compile:
        net.compile()
    wrapped = DistributedDataParallel(net) if world > 1 else net
    if rank == 0:
        lock(out)
        write_flags(out, "train_teacher", vars(args))
    say(f"{args.model}: {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {len(data.images)} images "
        f"{side}x{side}x{channels}, {data.num_classes} classes, {args.interpolant} path, {prediction} prediction, {device}"
        + (f" x {world}" if world > 1 else ""))

    def save():
        moments = gather_optimizer(optimizer, rank)
        if rank == 0:
            save_checkpoint(out / "teacher.pt", {"config": config, "flags": vars(args), "step": step, "data": fingerprint, "model": net.state_dict(),
                                                 "ema": ema.state_dict(), "optimizer": moments})

    def picture():
        if rank == 0:
            n = 10 * (data.num_classes if 0 < data.num_classes <= 10 else 10)
            if reference:  # rows: what goes in, what comes out, the data
                first = np.linspace(0, len(data.images) - 1, n).astype(np.int64)  # spread out: data may be sorted
                x1 = reference.rows(data.images, first, args.seed, 0, "picture")
                y = data.labels[first] if data.num_classes else None
                images = generate(ema, config, y, args.seed, first, 25, x1=x1)
                rows = [x1[:20], images[:20], data.images[first[:20]]]
                save_picture(out / f"samples_{step:07d}.png", enlarge(grid(np.concatenate(rows), len(rows[0]))))
                return
            images = generate(ema, config, choose_labels("balanced", n, data.num_classes), args.seed, range(n), 25,
                              decode=autoencoder.decode if autoencoder else None)
            save_picture(out / f"samples_{step:07d}.png", enlarge(grid(images, n // 10)))

    stop, skipped, failures = StopSignal(), 0, 0
    log = Log(out, "teacher", step, args.iters, args.batch, rank, world, device)
    share = args.batch // world
    mine = slice(rank * share, (rank + 1) * share)

    def fetch(step):
        """The images of a step, gathered in a second thread while the step before runs."""
        chosen = batch_indices(len(data.images), args.batch, step, args.seed)
        if args.antithetic:
            chosen = chosen.repeat(2)[:args.batch]
        pin = (lambda a: torch.from_numpy(np.ascontiguousarray(a)).pin_memory()) if device.type == "cuda" else (
            lambda a: torch.from_numpy(np.ascontiguousarray(a)))
        x1 = reference.rows(data.images, chosen, args.seed, step, "teacher", mine) if reference else None
        return chosen, pin(data.images[chosen[mine]]), pin(data.labels[chosen[mine]]), x1 if x1 is None else pin(x1)
    ahead = concurrent.futures.ThreadPoolExecutor(1)
    pending = ahead.submit(fetch, step)
    while step < args.iters:
        # The batch: images, labels with dropout, noise and times, all functions of (seed, step, global index).
        waited = time.perf_counter()
        chosen, rows, y, x1 = pending.result()
        log.add(data_wait=time.perf_counter() - waited)
        pending = ahead.submit(fetch, step + 1)
        x0 = data.x0(rows, chosen, mine, device, args.seed, step)  # (B,C,H,W)
        y = y.to(device, non_blocking=True)  # (B,)
        noise, z, u = draw_noise((args.batch, channels, side, side), mine, device, args.seed, step, "teacher")
        x1 = noise if x1 is None else to_device(x1, device)
        drop = torch.rand(args.batch, generator=generator(args.seed, step, "dropout", device=device), device=device)[mine]
        if args.antithetic:  # rows 2i and 2i + 1 share everything but the sign of z
            x0, x1, z, u, drop, y = (v[::2].repeat_interleave(2, 0) for v in (x0, x1, z, u, drop, y))
            z[1::2] *= -1
        t = 1e-3 + (1 - 2e-3) * u
        y = torch.where(drop < args.label_dropout, data.num_classes, y)

        # Regression on the prediction's target; gradients are averaged over processes in the last piece's backward pass.
        pieces = zip(*(v.chunk(args.accum) for v in (x0, x1, z, t, y)))
        for i, piece in enumerate(pieces):
            sync = contextlib.nullcontext() if world == 1 or i == args.accum - 1 else wrapped.no_sync()
            with sync, precision(device):
                loss = regression_loss(wrapped, path, prediction, *piece, sees_x1).mean()
                (loss / args.accum).backward()
            log.add(loss=loss)
        norm, stepped = optimizer_step(optimizer, net, learning_rate(step, args.lr, args.warmup, args.decay_from), args.clip,
                                       wait=device.type != "cuda")
        log.add(grad_norm=norm)
        step += 1
        skipped = count_skipped(skipped, stepped)
        log.add(skipped=skipped > 0)
        if (isinstance(skipped, int) or step % args.log_every == 0) and skipped >= 10:
            raise UserError(f"iteration {step}: the loss or its gradient was not finite 10 times in a row; lower --lr. The last "
                            "good checkpoint is untouched")
        ema_update(ema, net, args.ema, step)

        if step % args.log_every == 0 or step == args.iters:
            log.line(step)
        if step % args.sample_every == 0 or step == args.iters:
            keep(picture, out / "samples.png", 0, False)
            wait_for_all()  # as long as it takes, whatever --timeout says
        if step % args.save_every == 0 or step == args.iters:
            failures = keep(save, out / "teacher.pt", failures, step == args.iters)
            wait_for_all()
        if stop() and step < args.iters:
            keep(save, out / "teacher.pt", failures, True)
            stop.leave(step, rank)
    if rank == 0:
        print(f"wrote {out / 'teacher.pt'}")


if __name__ == "__main__":
    command(main)
