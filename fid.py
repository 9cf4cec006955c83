"""Fréchet Inception Distance and its companions, comparable with published figures.

    python fid.py out/student.pt digits --n 2000                # a checkpoint: its samples are made on the fly and not stored
    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz --metrics fid,sfid,is,precision,recall --json score.json
    python fid.py mnist --save_stats mnist_stats.npz            # once; later: python fid.py FOLDER mnist_stats.npz
    torchrun --nproc_per_node=8 fid.py out/student.pt cifar10 --samples 50000

SAMPLES and REFERENCE are each a folder of images, an .npz of images (arr_0, images or x_train), an .npz of statistics (mu, sigma), a data
set's name or a checkpoint. Metrics go to stdout, one a line; progress goes to stderr.
"""
import collections
import concurrent.futures
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import platform
import re
import sys
import time
import zipfile
from typing import Callable, NamedTuple, Optional

import numpy as np
import PIL
import scipy
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from model import UserError, download, file_sha256, load_checkpoint
from sample import (DIFFUSIONS, IMAGE_SUFFIXES, SOLVERS, Parser, check_archive, check_interval, check_steps, check_writable, choose_labels, command,
                    decoder, default_solver, first_process, generate, image_files, load_named, minutes, number, one_of, read_image, save_file,
                    start_processes, student_times)
from train_teacher import IDX_FILES, load_images

METRICS = ("fid", "sfid", "is", "kid", "precision", "recall")
STORED = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}  # the metrics that statistics serve, and their names in a file
WEIGHTS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth", 95628359,
           "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")
DATA_SETS = ("digits", *IDX_FILES, "cifar10")
SIDE, POOL, SPATIAL, LOGITS = 299, 2048, 17 * 17 * 7, 1008


# ---------------------------------------------------------------------------------------------------------------------
# Inception-v3 as TensorFlow published it in 2015 (arXiv:1512.00567), names as in the ported weights

class Conv(nn.Module):
    """Convolution and ReLU; the batch norm between them is folded into weight and bias by load_inception."""

    def __init__(self, inputs, width, kernel, stride=1, padding=None):
        super().__init__()
        same = tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else kernel // 2
        self.conv = nn.Conv2d(inputs, width, kernel, stride, padding if padding is not None else same if stride == 1 else 0)

    def forward(self, x):
        return F.relu(self.conv(x), inplace=True)


class Mixed(nn.Module):
    """Parallel chains of convolutions and one of pooling, joined by channel. chains: {name: layers}, a layer is (width, kernel[,
    stride]), a list of two layers is a fork whose halves read the same input. pooled: width of the convolution after the pooling."""

    def __init__(self, inputs, chains, pool, pooled=None):
        super().__init__()
        self.chains, self.pool, self.pooled = [], pool, pooled
        for name, layers in chains.items():
            width, steps = inputs, []
            for i, layer in enumerate(layers, 1):
                fork = isinstance(layer, list)
                keys = [f"{name}_{i}{letter}" for letter in "ab"] if fork else [name if len(layers) == 1 else f"{name}_{i}"]
                for key, (out, kernel, *stride) in zip(keys, layer if fork else [layer]):
                    setattr(self, key, Conv(width, out, kernel, *stride))
                steps.append(keys)
                width = out * len(keys)
            self.chains.append(steps)
        if pooled:
            self.branch_pool = Conv(inputs, pooled, 1)

    def forward(self, x):
        outputs = []
        for steps in self.chains:
            h = x
            for keys in steps:
                parts = [getattr(self, key)(h) for key in keys]
                h = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            outputs.append(h)
        h = self.pool(x)
        return torch.cat([*outputs, self.branch_pool(h) if self.pooled else h], 1)


def average(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)  # TensorFlow does not average in the padding


def largest(x):
    return F.max_pool2d(x, 3, 1, 1)  # the last block pools by maximum: a slip of 2015 that FID's numbers rest on


def halve(x):
    return F.max_pool2d(x, 3, 2)


def mixed_a(inputs, pooled):
    return Mixed(inputs, {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]},
                 average, pooled)


def mixed_c(c):
    return Mixed(768, {"branch1x1": [(192, 1)], "branch7x7": [(c, 1), (c, (1, 7)), (192, (7, 1))],
                       "branch7x7dbl": [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))]}, average, 192)


def mixed_e(inputs, pool):
    fork = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(inputs, {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), fork], "branch3x3dbl": [(448, 1), (384, 3), fork]},
                 pool, 192)


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_a(192, 32), mixed_a(256, 64), mixed_a(288, 64)
        self.Mixed_6a = Mixed(288, {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]}, halve)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (mixed_c(c) for c in (128, 160, 160, 192))
        self.Mixed_7a = Mixed(768, {"branch3x3": [(192, 1), (320, 3, 2)],
                                    "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)]}, halve)
        self.Mixed_7b, self.Mixed_7c = mixed_e(1280, average), mixed_e(2048, largest)
        self.fc = nn.Linear(POOL, LOGITS)

    def forward(self, x):
        """x (B,3,299,299) in [-1, 1] -> pool (B,2048) for FID, spatial (B,2023) for sFID, logits (B,1008) without bias for IS."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B,64,147,147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x)))  # (B,192,71,71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halve(x))))  # (B,288,35,35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B,768,17,17), the 1x1 branch first
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B,17*17*7), channels last as in ADM's statistics
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B,2048,8,8)
        pool = x.mean((2, 3))
        return pool, spatial, F.linear(pool, self.fc.weight)


def load_inception(path, device="cpu"):
    """The ported weights, batch norms (eps 0.001) folded into the convolutions -> Inception, frozen, in eval()."""
    net, folded = Inception(), {}
    try:
        state = dict(load_checkpoint(path))
        for name in net.state_dict():
            if name.endswith("conv.bias"):
                continue
            if name.startswith("fc."):
                folded[name] = state.pop(name)
                continue
            block = name[:-len("conv.weight")]
            weight, bn = state.pop(name), {k: state.pop(f"{block}bn.{k}") for k in ("weight", "bias", "running_mean", "running_var")}
            state.pop(f"{block}bn.num_batches_tracked", None)
            if weight.shape != net.get_parameter(name).shape or any(v.shape != weight.shape[:1] for v in bn.values()):
                raise RuntimeError(f"{name} has shape {tuple(weight.shape)}")  # before a product of odd shapes fills the memory
            scale = bn["weight"].double() / (bn["running_var"].double() + 1e-3).sqrt()
            folded[name] = weight.double() * scale[:, None, None, None]
            folded[f"{block}conv.bias"] = bn["bias"].double() - bn["running_mean"].double() * scale
        if state:
            raise KeyError(f"unexpected {next(iter(state))}")
        net.load_state_dict(folded)
    except UserError as error:
        raise UserError(f"--weights {error}") from None
    except (KeyError, RuntimeError, AttributeError, TypeError, IndexError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else str(error).splitlines()[-1].strip()
        raise UserError(f"--weights {path}: not the Inception of FID ({reason})") from None
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def find_weights(given, data_dir):
    """-> (path, sha256). A file whose name ends in -XXXXXXXX.pth must have a sha256 that begins so."""
    if given is None:
        url, size, sha256 = WEIGHTS
        return download(url, pathlib.Path(data_dir, url.rsplit("/", 1)[1]), sha256, size), sha256
    path = pathlib.Path(given)
    if not path.is_file():
        raise UserError(f"--weights {path}: no such file")
    sha256 = file_sha256(path)
    promised = re.search(r"-([0-9a-f]{8})\.pth?$", path.name)
    if promised and not sha256.startswith(promised[1]):
        raise UserError(f"--weights {path}: its sha256 begins with {sha256[:8]}, its name says {promised[1]}: damaged or changed, "
                        f"fetch it again from {WEIGHTS[0]}")
    return path, sha256


@functools.lru_cache(8)  # every batch of one size needs the same
def tf1_matrix(n):
    """(299,n) float32: TensorFlow 1's bilinear resize along one side, whose sample i sits at i n / 299 (no half pixels)."""
    position = torch.arange(SIDE, dtype=torch.float32) * (n / SIDE)
    low = position.floor().long()
    weight, rows, out = position - low, torch.arange(SIDE), torch.zeros(SIDE, n)
    out[rows, low] = 1 - weight
    out[rows, (low + 1).clamp(max=n - 1)] += weight
    return out


def inception_input(pixels, resize):
    """(B,C,H,W) uint8, C = 1 or 3 -> (B,3,299,299) float32 in [-1, 1]. tf1: as TensorFlow's graph of 2015, which ADM's evaluator
    and torch-fidelity follow, (x - 128) / 128 included. torch: half-pixel bilinear and 2 x / 255 - 1, as pytorch-fid."""
    x = pixels.float()
    if resize == "tf1":
        if x.shape[2:] != (SIDE, SIDE):
            rows, columns = (tf1_matrix(n).to(x.device) for n in x.shape[2:])
            x = rows @ (x @ columns.T)
        x = (x - 128) / 128
    else:
        x = 2 * F.interpolate(x / 255, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------------------
# Where images come from

class Source(NamedTuple):
    """n images (0 = none) that read(start, stop) gives in order, as a (B,H,W,C) uint8 array or a list of single ones; statistics
    stored in a file, with the number of images they were made from where it is known; and a record of what all this is."""
    name: str
    n: int
    read: Optional[Callable]
    record: dict
    statistics: dict = {}
    made_from: Optional[int] = None

    def count(self, metric):
        """How many images this metric rests on, None if nobody knows."""
        return self.made_from if set(STORED.get(metric, ("images",))) <= self.statistics.keys() else self.n


class NpzImages:
    """Rows of an image array inside an .npz, read in order, never all at once."""

    def __init__(self, archive, member, label):
        self.archive, self.member, self.label = archive, member, label
        with archive.open(member) as f:
            version = np.lib.format.read_magic(f)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, fortran, dtype = read_header(f)
            self.start = f.tell()
        name = member.removesuffix(".npy")
        if dtype.hasobject:
            raise UserError(f"{label}: {name} holds Python objects, refused")
        if dtype != np.uint8:
            raise UserError(f"{label}: {name} is {dtype}, images must be uint8 (0 to 255)")
        if len(self.shape) not in (3, 4) or (len(self.shape) == 4 and self.shape[3] not in (1, 3)) or min(self.shape) < 1 or fortran:
            raise UserError(f"{label}: {name} has shape {self.shape}{' in Fortran order' * fortran}, expected (N,H,W), (N,H,W,1) or "
                            "(N,H,W,3)")
        if archive.getinfo(member).file_size < self.start + math.prod(self.shape):
            raise UserError(f"{label}: {name} claims shape {self.shape}, more than the file holds")
        self.file = None

    def __len__(self):
        return self.shape[0]

    def __call__(self, start, stop):
        row = int(np.prod(self.shape[1:]))
        place = self.start + start * row
        try:
            if self.file is None or self.file.tell() > place:
                self.file = self.archive.open(self.member)
            while self.file.tell() < place:  # read, not sought: from Python 3.13 on a seek ends the check of the CRC
                if not self.file.read(min(place - self.file.tell(), 1 << 20)):
                    raise EOFError("cut off")
            content = self.file.read((stop - start) * row)
            if len(content) < (stop - start) * row:
                raise EOFError("cut off")
        except Exception as error:  # a damaged archive can fail in any way
            raise UserError(f"{self.label}: damaged ({error})") from None
        return np.frombuffer(content, np.uint8).reshape(stop - start, *self.shape[1:3], -1)


def open_npz(label, path):
    """An .npz of images, of statistics or (ADM's reference batches) of both -> Source."""
    try:
        check_archive(path)
        archive = zipfile.ZipFile(path)
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        images = next((NpzImages(archive, f"{name}.npy", label) for name in ("arr_0", "images", "x_train") if name in names), None)
        statistics, record = {}, {}
        with np.load(path, allow_pickle=False) as npz:
            for name in {"mu", "sigma", "mu_s", "sigma_s"} & names:
                statistics[name] = np.asarray(npz[name], np.float64)
            stored = max(0, int(npz["n"])) if "n" in names and statistics and npz["n"].size == 1 else None
            record = json.loads(str(npz["record"])) if "record" in names and statistics else {}
            record = record if isinstance(record, dict) else {}
    except UserError:
        raise
    except Exception as error:  # a damaged archive can fail in any way
        reason = "holds Python objects, refused" if "allow_pickle" in str(error) else "not a readable .npz file, or cut off"
        raise UserError(f"{label}: {reason}") from None
    if not images and not any(set(pair) <= statistics.keys() for pair in STORED.values()):
        raise UserError(f"{label}: neither images (arr_0, images or x_train) nor statistics (mu and sigma, mu_s and sigma_s) inside, found "
                        f"{', '.join(sorted(names)) or 'nothing'}")
    for mean, covariance, width in (("mu", "sigma", POOL), ("mu_s", "sigma_s", SPATIAL)):
        if mean in statistics or covariance in statistics:
            shapes = [statistics[name].shape if name in statistics else "no" for name in (mean, covariance)]
            if shapes != [(width,), (width, width)]:
                raise UserError(f"{label}: {mean} {shapes[0]} and {covariance} {shapes[1]} where this Inception has {width} features: "
                                "statistics of another network or layer")
            if not all(np.isfinite(statistics[name]).all() for name in (mean, covariance)):
                raise UserError(f"{label}: {mean} or {covariance} is not finite, nothing can be compared with it")
    kind = "images and statistics" if images and statistics else "images" if images else "statistics"
    record = {"kind": kind, "path": str(path), "sha256": file_sha256(path), **({"made": record} if record else {})}
    return Source(str(path), len(images) if images else 0, images, record, statistics, stored or None)


def open_folder(label, folder, size):
    files = image_files(label, folder)

    def read_one(file):
        try:
            return read_image(file, size)
        except OSError as error:
            raise UserError(f"{label}: {file} cannot be read ({error}); mend or delete it") from None
    workers = concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1))  # Pillow decodes outside Python's lock
    return Source(str(folder), len(files), lambda start, stop: list(workers.map(read_one, files[start:stop])),
                  {"kind": "folder", "path": str(folder), "image_size": size})


def open_checkpoint(label, path, args, seed, device):
    """Samples of a checkpoint, made as they are asked for: image i depends on (seed, i) alone."""
    net, config = load_named(label, path, device)
    student = "student" in config
    check_steps(args, config, path)
    if config.get("reference"):
        raise UserError(f"{label} {path}: is a bridge; restore images with sample.py --reference first and give their .npz")
    steps, scale = args.steps or (len(student_times(config)) if student else 50), 1.0 if args.cfg_scale is None else args.cfg_scale
    solver, decode = args.solver or default_solver(config), decoder(args.vae, config, device)
    if scale != 1 and net.num_classes == 0:
        raise UserError(f"--cfg_scale {scale:g}: {path} has no classes to guide with")
    if decode is None and net.channels not in (1, 3):
        raise UserError(f"{label} {path}: makes {net.channels} channels, images have 1 or 3")
    labels = choose_labels(args.labels, args.n, net.num_classes, seed)

    def read(start, stop):
        return generate(net, config, labels[start:stop], seed, range(start, stop), steps, solver, scale, args.diffusion,
                        cfg_interval=args.cfg_interval, decode=decode)
    record = {"kind": "checkpoint", "path": str(path), "sha256": file_sha256(path), "interpolant": config["interpolant"],
              "sampler": "student" if student else solver, "diffusion": args.diffusion if solver == "sde" else None, "steps": steps,
              "cfg_scale": config["student"]["cfg_scale"] if student else scale,
              "cfg_interval": config["student"].get("cfg_interval", [0.0, 1.0]) if student else args.cfg_interval, "seed": seed,
              "labels": args.labels, "image_size": config.get("latent", config["network"])["image_size"], "vae": args.vae}
    return Source(str(path), args.n, read, record)


def open_source(label, name, args, seed, device, size=None):
    """label says SAMPLES or REFERENCE in errors; size resizes folders and data sets, exactly as in training."""
    path, label = pathlib.Path(name), f"{label} {name}"
    if name in DATA_SETS:
        try:
            images = load_images(name, args.data_dir, args.image_size or size).images
        except UserError as error:
            raise UserError(f"{label}: {error}") from None
        return Source(name, len(images), lambda start, stop: images[start:stop],
                      {"kind": "data set", "path": name, "image_size": images.shape[1]})
    if path.is_dir():
        return open_folder(label, path, args.image_size)
    if not path.is_file():
        raise UserError(f"{label}: no such file, folder or data set (data sets: {', '.join(DATA_SETS)})")
    if path.suffix.lower() == ".npz":
        return open_npz(label, path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise UserError(f"{label}: is one image; give a folder of them")
    return open_checkpoint(label.split()[0], path, args, seed, device)


# ---------------------------------------------------------------------------------------------------------------------
# One pass over the images

class Moments:
    """Count, sum and sum of outer products in float64: a mean and a covariance of n features in memory that does not grow."""

    def __init__(self, width, device):
        device = "cpu" if device.type == "mps" else device  # no float64 there
        self.n, self.sum = 0, torch.zeros(width, dtype=torch.float64, device=device)
        self.outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features):
        features = features.to(self.sum.device, torch.float64)
        self.n += len(features)
        self.sum += features.sum(0)
        self.outer.addmm_(features.T, features)

    def statistics(self):
        """-> mu (D,), sigma (D,D) as float64 arrays, over all processes."""
        if dist.is_initialized():
            n = torch.tensor(self.n)
            for part in (n, self.sum, self.outer):
                dist.all_reduce(part)
            self.n = int(n)
        mu = self.sum / self.n
        sigma = (self.outer - self.n * torch.outer(mu, mu)) / max(1, self.n - 1)
        return mu.cpu().numpy(), (0.5 * (sigma + sigma.T)).cpu().numpy()


class InceptionScore:
    """exp E KL(p(y|x) | p(y)) (arXiv:1606.03498) over `splits` parts of n images, dealt by a fixed shuffle so that images
    sorted by class do no harm. Only sums are kept."""

    def __init__(self, n, splits=10):
        self.part = np.random.default_rng(0).permutation(n) * splits // max(n, 1)
        self.p = torch.zeros(splits, LOGITS, dtype=torch.float64)
        self.plogp = torch.zeros(splits, dtype=torch.float64)

    def add(self, start, logits):
        logp = logits.cpu().double().log_softmax(1)
        part = torch.from_numpy(self.part[start:start + len(logits)])
        self.p.index_add_(0, part, logp.exp())
        self.plogp.index_add_(0, part, (logp.exp() * logp).sum(1))

    def result(self):
        """-> mean and standard deviation over the splits."""
        if dist.is_initialized():
            dist.all_reduce(self.p), dist.all_reduce(self.plogp)
        count = torch.from_numpy(np.bincount(self.part, minlength=len(self.p))).double()
        mean = self.p / count[:, None]
        scores = (self.plogp / count - torch.xlogy(mean, mean).sum(1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))


def read_ahead(source, spans):
    """source.read(start, stop) for each span; files are decoded in a second thread while the batch before is measured."""
    if source.record["kind"] == "checkpoint":
        yield from (source.read(*span) for span in spans)
        return
    with concurrent.futures.ThreadPoolExecutor(1) as worker:
        jobs = collections.deque()
        for span in spans:
            jobs.append(worker.submit(source.read, *span))
            if len(jobs) > 1:
                yield jobs.popleft().result()
        yield from (job.result() for job in jobs)


@torch.no_grad()
def measure(source, net, needs, batch, resize, device, rank=0, world=1, say=print):
    """One pass over source -> dict of mu, sigma (FID), mu_s, sigma_s (sFID), is (mean, std), features (n,2048) float32, pixels
    (sha256 over the images). needs: a subset of {"pool", "spatial", "is", "features"}. Batches are dealt to the processes in turn;
    features are complete in the first process only."""
    moments = {name: Moments(width, device) for name, width in (("pool", POOL), ("spatial", SPATIAL)) if name in needs}
    score = InceptionScore(source.n) if "is" in needs else None
    features, digests, began, shown = {}, {}, time.time(), time.time()
    spans = [(start, min(start + batch, source.n)) for start in range(rank * batch, source.n, world * batch)]
    try:
        for (start, stop), images in zip(spans, read_ahead(source, spans)):
            images = [np.ascontiguousarray(image) for image in images]
            digests[start] = b"".join(hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest() for image in images)
            groups = [images] if len({image.shape for image in images}) == 1 else [[image] for image in images]
            x = torch.cat([inception_input(torch.from_numpy(np.stack(group)).to(device).permute(0, 3, 1, 2), resize)
                           for group in groups])  # (B,3,299,299)
            pool, spatial, logits = net(x)
            for name, value in (("pool", pool), ("spatial", spatial)):
                if name in moments:
                    moments[name].add(value)
            if score:
                score.add(start, logits)
            if "features" in needs:
                features[start] = pool.cpu().numpy()
            if rank == 0 and time.time() - shown > 5:
                shown = time.time()
                done = min(stop + (world - 1) * batch, source.n)
                say(f"{source.name}: {done}/{source.n} images, {done / (shown - began):.1f} a second, time left "
                    f"{minutes((shown - began) / done * (source.n - done))}")
    except UserError as error:
        error.everywhere = False  # the other processes do not know of it
        raise

    found = {}
    for name, ending in (("pool", ""), ("spatial", "_s")):
        if name in moments:
            found["mu" + ending], found["sigma" + ending] = moments[name].statistics()
    if score:
        found["is"] = score.result()
    parts = [(features, digests)]
    if world > 1:
        parts = [None] * world if rank == 0 else None
        dist.gather_object((features, digests), parts)
    if rank == 0:
        features, digests = ({k: v for part in parts for k, v in part[i].items()} for i in (0, 1))
        found["pixels"] = hashlib.sha256(b"".join(digests[k] for k in sorted(digests))).hexdigest()
        if "features" in needs:
            found["features"] = np.concatenate([features.pop(k) for k in sorted(features)])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The metrics

@np.errstate(over="ignore", invalid="ignore")  # what is not finite in the end is refused
def frechet(mu_a, sigma_a, mu_b, sigma_b):
    """|mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 (sigma_a sigma_b)^(1/2)), float64 (arXiv:1706.08500, eq. 6).

    sigma_a sigma_b has the eigenvalues of the symmetric R sigma_b R^T with sigma_a = R^T R: two symmetric decompositions, no
    matrix square root. Raises ValueError where a matrix is not finite or no covariance."""
    if not all(np.isfinite(m).all() for m in (mu_a, sigma_a, mu_b, sigma_b)):
        raise ValueError("a mean or covariance is not finite")
    values, vectors = scipy.linalg.eigh(sigma_a, driver="evd", check_finite=False)
    if values[0] < -1e-6 * max(values[-1], 1e-300):
        raise ValueError(f"a covariance has the negative eigenvalue {values[0]:.3g}")
    root = vectors[:, values > 0] * np.sqrt(values[values > 0])  # (D,r) = R^T
    values = scipy.linalg.eigh(root.T @ sigma_b @ root, eigvals_only=True, driver="evd", check_finite=False)
    if len(values) and values[0] < -1e-6 * max(values[-1], 1e-300):
        raise ValueError(f"a product of covariances has the negative eigenvalue {values[0]:.3g}")
    difference = mu_a - mu_b
    distance = float(difference @ difference + np.trace(sigma_a) + np.trace(sigma_b) - 2 * np.sqrt(values.clip(min=0)).sum())
    if not math.isfinite(distance):
        raise ValueError(f"the distance is {distance}")
    return distance


def kernel_distance(a, b, subsets=100, size=1000, seed=0):
    """KID (arXiv:1801.01401): unbiased MMD^2 with the kernel (x.y / D + 1)^3 over random subsets of the features a (n,D) and
    b (m,D) -> mean and standard deviation over the subsets."""
    rng, results = np.random.default_rng(seed), []
    for _ in range(subsets):
        x, y = (torch.from_numpy(f[rng.choice(len(f), size, replace=False)]).double() for f in (a, b))
        xx, yy, xy = ((u @ v.T / x.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        results.append(float((xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1)) - 2 * xy.mean()))
    return float(np.mean(results)), float(np.std(results))


def squared_distances(x, y):
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min_(0)  # (n,m)


def neighbour_radii(x, k=3, block=2000):
    """Squared distance of each row of x (n,D) to its k-th nearest other row, block by block -> (n,)."""
    radii = []
    for rows in x.split(block):
        best = torch.empty(len(rows), 0, dtype=x.dtype, device=x.device)
        for columns in x.split(block):  # a row itself is at distance 0: hence k + 1
            both = torch.cat([best, squared_distances(rows, columns)], 1)
            best = both.topk(min(k + 1, both.shape[1]), largest=False).values
        radii.append(best[:, -1])
    return torch.cat(radii)


def coverage(x, y, radii, block=2000):
    """Share of the rows of x that lie within the radius of some row of y."""
    hits, slack = 0, 1e-9 * float(y.square().sum(1).mean())  # a row must be found within its own radius in spite of rounding
    for rows in x.split(block):
        inside = torch.zeros(len(rows), dtype=torch.bool, device=x.device)
        for columns, r in zip(y.split(block), radii.split(block)):
            inside |= (squared_distances(rows, columns) <= r + slack).any(1)
        hits += int(inside.sum())
    return hits / len(x)


def precision_recall(samples, reference, device="cpu", k=3):
    """Improved precision and recall (arXiv:1904.06991) of features (n,D), (m,D): the share of samples inside the reference's
    neighbourhoods, and of reference images inside the samples'."""
    device = "cpu" if torch.device(device).type == "mps" else device
    centre = reference.mean(0, dtype=np.float64)  # about the mean, squares lose no digits
    x, y = (torch.from_numpy(f - centre).to(device) for f in (samples, reference))
    return coverage(x, y, neighbour_radii(y, k)), coverage(y, x, neighbour_radii(x, k))


# ---------------------------------------------------------------------------------------------------------------------
# The command

NEEDS = {"fid": {"pool"}, "sfid": {"spatial"}, "is": {"is"}, "kid": {"features"}, "precision": {"features"}, "recall": {"features"}}


def missing(source, metrics, role):
    """What a pass over this source has to find (a set), after checking that it can and that there are images enough."""
    needs = set()
    for metric in metrics:
        if metric == "is" and role == "REFERENCE":
            continue
        if source.statistics.keys() >= set(STORED.get(metric, ("nothing",))):
            continue
        if source.read is None or (source.statistics and metric in STORED):
            how = (f"make it with fid.py IMAGES --metrics fid,{metric} --save_stats FILE.npz" if metric in STORED else
                   "statistics cannot serve it, give the images themselves")
            raise UserError(f"--metrics {metric}: {role} {source.name} has no {' and '.join(STORED.get(metric, ('images',)))}; {how}")
        needs |= NEEDS[metric]
        least = {"is": 10, "kid": 1000, "precision": 4, "recall": 4}.get(metric, 2)
        if source.n < least:
            raise UserError(f"{role} {source.name}: {source.n} image{'s' * (source.n != 1)}, {metric} needs at least {least}")
    return needs


def check_rank(source, metrics, role, allowed):
    for metric in set(metrics) & set(STORED):
        width, n = POOL if metric == "fid" else SPATIAL, source.count(metric)
        if n is not None and n < width // 2 and not allowed:
            raise UserError(f"{role} {source.name}: {n} images for {width} features: the covariance is rank-poor, {metric} would say more "
                            f"about n than about the images; use at least {width // 2} (better 50000), or --allow_rank_poor")


def same_ruler(sides, weights_sha256, resize, needs):
    """Statistics that say with which weights and resize they were made must agree with this run's pass and with one another."""
    rulers = [("this run", weights_sha256, resize)] if any(needs.values()) else []
    for side in sides.values():
        made = side.record.get("made", {})
        rulers.append((f"the statistics of {side.name}", *(str(made.get(key) or "") for key in ("weights_sha256", "resize"))))
    for one, two in itertools.combinations(rulers, 2):
        for i, what in ((1, "Inception weights"), (2, "--resize")):
            if one[i] and two[i] and one[i] != two[i]:
                raise UserError(f"{what}: {one[0]} used {one[i][:8]}, {two[0]} used {two[i][:8]}; they cannot be compared")


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__,
            "pillow": PIL.__version__}


def metric_list(text):
    chosen = [one_of(METRICS)(name) for name in text.split(",")]
    return [name for name in METRICS if name in chosen]


SAMPLING = ("n", "steps", "solver", "diffusion", "cfg_scale", "cfg_interval", "labels", "vae")  # flags that only a checkpoint has a use for


def parse_flags():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("samples", metavar="SAMPLES", help="what is judged")
    add("reference", metavar="REFERENCE", nargs="?", help="what it is compared with; may be left out with --save_stats or "
        "--metrics is")
    add("--metrics", type=metric_list, default="fid", help="comma-separated: " + ",".join(METRICS))
    add("--weights", default=None, help="Inception weights (pt_inception-2015-12-05-6726825d.pth; downloaded to --data_dir if not given)")
    add("--resize", type=one_of(("tf1", "torch")), default="tf1", help="tf1: as ADM's evaluator and torch-fidelity; torch: as pytorch-fid")
    add("--image_size", type=number(int, 1), default=None, help="crop and resize folders and data sets to this side first, as "
        "training does (folders: as they are; data sets: the checkpoint's side, or their own)")
    add("--save_stats", default=None, help="FILE.npz for the statistics of REFERENCE (of SAMPLES if there is none)")
    add("--json", default=None, help="FILE for the record of everything at full precision")
    add("--allow_rank_poor", action="store_true", help="compute FID from fewer than 1024 images, for trying things out")
    add("--n", "--samples", dest="n", type=number(int, 1), default=None, help="samples of a checkpoint (50000); under torchrun write "
        "--samples, since torchrun takes --n for a flag of its own")
    add("--steps", type=number(int, 1), default=None, help="network steps of a teacher (50), or fewer than a student's own")
    add("--solver", type=one_of(SOLVERS), default=None, help="/".join(SOLVERS) + " (euler)")
    add("--diffusion", type=one_of(DIFFUSIONS), default="sigma", help="w(t) of --solver sde: " + "/".join(DIFFUSIONS))
    add("--cfg_scale", type=number(float, 0), default=None, help="guidance of a teacher (1)")
    add("--cfg_interval", type=number(float, 0, 1), nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"), help="times at which a "
        "teacher is guided")
    add("--vae", default=None, help="autoencoder that decodes a checkpoint's latents")
    add("--labels", default="balanced", help="random, balanced, or a list such as 3,1,4 (repeated)")
    add("--seed", type=number(int, 0, 2 ** 63 - 2), default=0, help="of the samples; a checkpoint as REFERENCE uses seed + 1")
    add("--batch", type=number(int, 1), default=50, help="images at a time and process")
    add("--data_dir", default="data", help="where downloads are kept")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args, defaults = parser.parse_args(), vars(parser.parse_args(["SAMPLES"]))
    args.metrics = metric_list(args.metrics) if isinstance(args.metrics, str) else args.metrics
    return args, defaults


def main():
    args, defaults = parse_flags()
    if args.reference is None and not args.save_stats and args.metrics != ["is"]:
        raise UserError("REFERENCE is missing: give what to compare with, or --save_stats FILE.npz to keep statistics of SAMPLES")
    for flag, file in (("--save_stats", args.save_stats), ("--json", args.json)):
        if file is not None:
            if pathlib.Path(file).is_dir() or (flag == "--save_stats" and not file.endswith(".npz")):
                raise UserError(f"{flag} {file}: give a file name" + " ending in .npz" * (flag == "--save_stats"))
            check_writable(flag, pathlib.Path(file).parent)
    rank, world, device = start_processes(args.device)
    torch.backends.cudnn.allow_tf32 = False  # a metric is not the place to save digits
    torch.set_float32_matmul_precision("highest")
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if rank == 0 else lambda text: None

    # The two sides. A checkpoint's image size is the data's as well, unless told otherwise.
    check_interval(args.cfg_interval)
    sampling = [flag for flag in SAMPLING if getattr(args, flag) != defaults[flag]]
    args.n = args.n or 50000
    names = [("SAMPLES", args.samples), ("REFERENCE", args.reference)][:1 if args.reference is None else 2]
    sides, size = {}, args.image_size
    for role, name in sorted(names, key=lambda pair: pair[1] in DATA_SETS):  # data sets last, when the size is known
        def opened():
            return open_source(role, name, args, args.seed + (role == "REFERENCE"), device, size)
        sides[role] = first_process(opened, rank, world) or opened()  # downloads happen once
        if sides[role].record["kind"] == "checkpoint":
            size = size or sides[role].record["image_size"]
    if sampling and not any(side.record["kind"] == "checkpoint" for side in sides.values()):
        raise UserError(f"--{sampling[0]} {getattr(args, sampling[0])}: is for samples of a checkpoint, and neither side is one; leave it "
                        "out")
    sides = {role: sides[role] for role, _ in names}
    if args.save_stats and not set(args.metrics) & set(STORED):
        raise UserError(f"--save_stats {args.save_stats}: --metrics {','.join(args.metrics)} has no statistics to keep, add fid or sfid")
    alone = [metric for metric in args.metrics if metric not in (*STORED, "is")] if args.reference is None else []
    if alone:
        raise UserError(f"--metrics {alone[0]}: needs REFERENCE; give what to compare with")
    needs = {role: missing(side, args.metrics, role) for role, side in sides.items()}
    for role, side in sides.items():
        check_rank(side, args.metrics, role, args.allow_rank_poor)

    # One pass over each side that needs one.
    weights, weights_sha256, net = None, None, None
    if any(needs.values()):
        def found():
            return find_weights(args.weights, args.data_dir)
        weights, weights_sha256 = first_process(found, rank, world) or found()
        net = load_inception(weights, device)
    same_ruler(sides, weights_sha256, args.resize, needs)
    results = {}
    for role, side in sides.items():
        results[role] = dict(side.statistics)
        if needs[role]:
            results[role].update(measure(side, net, needs[role], args.batch, args.resize, device, rank, world, say))
    about = {"weights": str(weights) if weights else None, "weights_sha256": weights_sha256, "resize": args.resize,
             "dtype": "float32, moments and distances float64", "device": str(device), "processes": world, "batch": args.batch,
             "versions": versions()}
    first_process(lambda: conclude(args, sides, results, about, device, say), rank, world)


def conclude(args, sides, results, about, device, say):
    """Metrics, statistics and record out of both passes; in the first process."""
    sources = {role.lower(): {**side.record, "n": side.count(args.metrics[0]), "pixels_sha256": results[role].get("pixels")} for role, side in sides.items()}
    if args.save_stats:
        role = "REFERENCE" if args.reference else "SAMPLES"
        kept = {name: results[role][name] for name in ("mu", "sigma", "mu_s", "sigma_s") if name in results[role]}
        carried = sides[role].record.get("made", {"weights_sha256": None, "resize": None, "source": sources[role.lower()]})
        made = json.dumps({**about, "source": sources[role.lower()]} if "pixels" in results[role] else carried)  # stored ones stay what they were
        save_file(args.save_stats, lambda f: np.savez(f, **kept, n=np.array(sides[role].count("fid") or 0), record=np.array(made)))
        say(f"wrote {args.save_stats}")
    values = compare(results, args.metrics, device, say) if args.reference else {}
    if "is" in args.metrics:
        values["is"], values["is_std"] = results["SAMPLES"]["is"]
        if not np.isfinite(values["is"]):
            raise UserError("--metrics is: the score is not finite; look at the images and at the weights")
    if args.json:
        record = {**values, "n": sources["samples"]["n"], **sources, **about}
        save_file(args.json, lambda f: f.write((json.dumps(record, indent=1) + "\n").encode()))
    report(values, args.metrics, sides)


def compare(results, metrics, device, say):
    """The numbers of two sides -> {metric: value}."""
    a, b, values = results["SAMPLES"], results["REFERENCE"], {}
    for metric, (mean, covariance) in STORED.items():
        if metric in metrics:
            for side, what in ((a, "SAMPLES"), (b, "REFERENCE")):
                if not (np.isfinite(side[mean]).all() and np.isfinite(side[covariance]).all()):
                    raise UserError(f"--metrics {metric}: the mean or covariance of {what} is not finite; look at its images and at the weights")
            try:
                for side, what in ((a, "SAMPLES"), (b, "REFERENCE")):
                    rank = int(np.linalg.matrix_rank(side[covariance], hermitian=True))
                    if rank < len(side[mean]):
                        say(f"note: the covariance of {what} for {metric} is rank-poor: {rank} of {len(side[mean])}")
                values[metric] = frechet(a[mean], a[covariance], b[mean], b[covariance])
            except ValueError as error:
                raise UserError(f"--metrics {metric}: {error}; these statistics cannot be compared") from None
    if "kid" in metrics:
        values["kid"], values["kid_std"] = kernel_distance(a["features"], b["features"])
    if {"precision", "recall"} & set(metrics):
        both = dict(zip(("precision", "recall"), precision_recall(a["features"], b["features"], device)))
        values.update({name: value for name, value in both.items() if name in metrics})
    return values


def report(values, metrics, sides):
    """One line a metric; what cannot stand beside a published figure says so."""
    for metric in metrics:
        if metric not in values:
            continue
        n, other = (sides[role].count(metric) if role in sides else None for role in ("SAMPLES", "REFERENCE"))
        name = metric if n is None or n >= 50000 else f"{metric}@{n}"
        digits = 6 if metric == "kid" else 4
        spread = f" +- {values[metric + '_std']:.{digits}f}" if metric + "_std" in values else ""
        notes = []
        if n is not None and n < 50000:
            notes.append(f"not comparable with {metric.upper().replace('SFID', 'sFID')}-50k")
        elif metric in STORED and other and other < 50000:
            notes.append(f"reference of {other} images: not comparable with FID-50k")
        print(f"{name} {values[metric]:.{digits}f}{spread}" + (f" ({'; '.join(notes)})" if notes else ""), flush=True)


if __name__ == "__main__":
    command(main)
