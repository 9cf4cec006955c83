"""Fréchet Inception Distance and its companions, comparable with published figures.

    python fid.py out/student.pt digits --n 2000      # a checkpoint: its samples are made on the fly and not stored
    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz --metrics fid,sfid,is,precision,recall --json score.json
    python fid.py mnist --save_stats mnist_stats.npz  # once; later: python fid.py FOLDER mnist_stats.npz
    torchrun --nproc_per_node=8 fid.py out/student.pt cifar10 --samples 50000
    python fid.py out/student.pt digits --sweep average=0.999,0.9999 labels=balanced,uniform   # a table of all four

SAMPLES and REFERENCE are each a folder of images, an .npz of images (arr_0, images or x_train), an .npz of statistics
(mu, sigma), a data set's name or a checkpoint. Metrics go to stdout, one a line; progress goes to stderr.
"""
import argparse
import concurrent.futures
import contextlib
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
import zipfile
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import PIL
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common.autoencoder import decoder
from common.data import DATA_SETS, load_images, uneven_counts
from common.files import (check_archive, checksum, describe_files, download, file_sha256, load_checkpoint, locked,
                          reading, save_file, save_json)
from common.images import IMAGE_NAMES, SUFFIXES, image_files, read_image, resize_images
from common.run import (Parser, UserError, alone, check_other, check_writable, code_commit, command, first_process,
                        from_first, in_turn, number, one_of, progress, start_processes)
from sample import add_sampling_flags, choose_labels, choose_sampler, generate, load_named

# What one pass must collect for a metric, and from how many images at least.
METRICS = {"fid": ("fid", 2), "sfid": ("sfid", 2), "is": ("logits", 10), "kid": ("features", 2),
           "precision": ("features", 4), "recall": ("features", 4)}
STORED = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}  # what statistics serve, and their names in a file
WEIGHTS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
           95628359, "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")
PLAIN = {"steps": None, "restart": 0.0, "solver": None, "diffusion": "sigma", "cfg_scale": None,
         "cfg_interval": [0.0, 1.0], "average": None}  # how a REFERENCE checkpoint is sampled beside one of SAMPLES
SAMPLING = (*PLAIN, "labels", "vae", "seed")
SIDE, POOL, SPATIAL, LOGITS = 299, 2048, 17 * 17 * 7, 1008


# ---------------------------------------------------------------------------------------------------------------------
# Inception-v3 as TensorFlow published it in 2015 (arXiv:1512.00567), names as in the ported weights

class Conv(nn.Module):
    """Convolution, batch norm and ReLU; load_inception folds the norm into the convolution."""

    def __init__(self, inputs, width, kernel, stride=1, padding=None):
        super().__init__()
        padding = padding or ("same" if stride == 1 else "valid")
        self.conv = nn.Conv2d(inputs, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Parallel chains of convolutions, name=layers, joined by channel; a layer is (width, kernel[, stride]), a list at
    the end a fork of two that read the same input. The last chain pools first; pooled: the width of its convolution."""

    def __init__(self, inputs, pool, pooled, **chains):
        super().__init__()
        self.pool, self.chains = pool, {}
        for name, layers in {**chains, "branch_pool": [(pooled, 1)] if pooled else []}.items():
            width, self.chains[name] = inputs, []
            for i, layer in enumerate(layers, 1):
                key = name + f"_{i}" * (len(layers) > 1)
                parts = {key + "a": layer[0], key + "b": layer[1]} if isinstance(layer, list) else {key: layer}
                for key, (out, kernel, *stride) in parts.items():
                    self.add_module(key, Conv(width, out, kernel, *stride))
                self.chains[name].append(list(parts))
                width = out

    def forward(self, x):
        outputs = []
        for name, chain in self.chains.items():
            parts = [self.pool(x) if name == "branch_pool" else x]
            for keys in chain:
                parts = [getattr(self, key)(parts[0]) for key in keys]
            outputs += parts
        return torch.cat(outputs, 1)


average = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)  # TensorFlow's
largest = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halve = functools.partial(F.max_pool2d, kernel_size=3, stride=2)


def mixed_a(inputs, pooled):
    return Mixed(inputs, average, pooled, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                 branch3x3dbl=[(64, 1), (96, 3), (96, 3)])


def mixed_c(c):
    return Mixed(768, average, 192, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, (1, 7)), (192, (7, 1))],
                 branch7x7dbl=[(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))])


def mixed_e(inputs, pool):
    fork = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(inputs, pool, 192, branch1x1=[(320, 1)], branch3x3=[(384, 1), fork],
                 branch3x3dbl=[(448, 1), (384, 3), fork])


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding="valid")
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding="valid")
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_a(192, 32), mixed_a(256, 64), mixed_a(288, 64)
        self.Mixed_6a = Mixed(288, halve, None, branch3x3=[(384, 3, 2)], branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)])
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (mixed_c(c) for c in (128, 160, 160, 192))
        self.Mixed_7a = Mixed(768, halve, None, branch3x3=[(192, 1), (320, 3, 2)],
                              branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)])
        # The last block pools by maximum: a slip of 2015 that FID's numbers rest on.
        self.Mixed_7b, self.Mixed_7c = mixed_e(1280, average), mixed_e(2048, largest)
        self.fc = nn.Linear(POOL, LOGITS)

    def forward(self, x):
        """x (B,3,299,299) in [-1, 1] -> pool (B,2048) for FID, spatial (B,2023) for sFID, logits (B,1008), for IS."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B,64,147,147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x)))  # (B,192,71,71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halve(x))))  # (B,288,35,35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B,768,17,17), the 1x1 branch first
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B,17*17*7), channels last as in ADM's statistics
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # (B,2048,8,8)
        pool = x.mean((2, 3))
        return pool, spatial, F.linear(pool, self.fc.weight)  # logits have no bias


def load_inception(path, device="cpu"):
    """The ported weights, batch norms folded into the convolutions -> Inception, frozen, in eval()."""
    net = Inception().eval()
    with reading(f"--weights {path}: not the Inception of FID"):
        net.load_state_dict(load_checkpoint(path))
    for layer in [module for module in net.modules() if isinstance(module, Conv)]:
        layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
    return net.to(device, memory_format=torch.channels_last).requires_grad_(False)


def find_weights(given, data_dir):
    """-> (path, sha256). A file whose name ends in -XXXXXXXX.pth must have a sha256 that begins so."""
    if given is None:
        url, size, sha256 = WEIGHTS
        return str(download(url, pathlib.Path(data_dir, url.rsplit("/", 1)[1]), sha256, size)), sha256
    with reading(f"--weights {given}"):
        sha256 = file_sha256(given)
    promised = re.search(r"-([0-9a-f]{8})\.pth?$", given)
    if promised and not sha256.startswith(promised[1]):
        raise UserError(f"--weights {given}: its sha256 begins with {sha256[:8]}, its name says {promised[1]}: damaged "
                        f"or changed, fetch it again from {WEIGHTS[0]}")
    return given, sha256


def inception_input(pixels, resize):
    """(B,C,H,W) uint8, C = 1 or 3 -> (B,3,299,299) float32 in [-1, 1]. tf1: as in TensorFlow's graph of 2015, ADM's
    evaluator and torch-fidelity, (x - 128) / 128 included. torch: as pytorch-fid, half pixels and 2 x / 255 - 1."""
    x = pixels.float()
    if resize == "torch":
        x = 2 * F.interpolate(x / 255, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1
    else:
        # Sample i sits at i n / 299: corners that meet, of one pixel and one sample more, both cut off again.
        x = F.interpolate(F.pad(x, (0, 1, 0, 1), "replicate"), (SIDE + 1,) * 2, mode="bilinear", align_corners=True)
        x = (x[..., :SIDE, :SIDE] - 128) / 128
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------------------
# Where images come from

class Source(NamedTuple):
    """n images (0 = none), which read(rows) gives, rows increasing from call to call, as (B,H,W,C) uint8 or a list of
    single ones; a record of what they are; statistics stored in a file, and the number of images these rest on, where
    it is known."""
    name: str
    n: int
    read: Optional[Callable]
    record: dict
    statistics: dict = {}
    made_from: Optional[int] = None

    def stores(self, metric):
        return metric in STORED and set(STORED[metric]) <= self.statistics.keys()

    def count(self, metric):
        """How many images this metric rests on, None if nobody knows."""
        return self.made_from if self.stores(metric) else self.n


def open_array(label, archive, name):
    """An image array inside an .npz -> n, read(rows): rows are read once and in order, never all at once."""
    file = archive.open(f"{name}.npy")
    np.lib.format.read_magic(file)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    row_shape, begin = (*shape[1:], 1) if len(shape) == 3 else shape[1:], file.tell()
    if dtype != np.uint8 or len(row_shape) != 3 or row_shape[2] not in (1, 3) or min(shape) < 1 or fortran:
        raise UserError(f"{label}: {name} is {dtype} of shape {shape}{' in Fortran order' * fortran}, images must be "
                        "uint8 (0 to 255) of shape (N,H,W), (N,H,W,1) or (N,H,W,3)")
    if archive.getinfo(file.name).file_size != begin + math.prod(shape):
        raise UserError(f"{label}: {name} claims shape {shape}, which is not what the file holds")

    def read_row(row):
        while (left := begin + row * math.prod(row_shape) - file.tell()) > 0 and file.read(min(left, 1 << 20)):
            pass  # not sought: from Python 3.13 on that ends the check of the CRC
        return np.frombuffer(file.read(math.prod(row_shape)), np.uint8).reshape(row_shape)

    def read(rows):
        with reading(label):
            return np.stack([read_row(row) for row in rows])
    return shape[0], read


def open_npz(label, path):
    """An .npz of images, of statistics or (ADM's reference batches) of both -> Source."""
    with reading(label):
        check_archive(path)
        with np.load(path, allow_pickle=False) as npz:
            held = npz.files
            statistics = {key: np.asarray(npz[key], np.float64) for key in sum(STORED.values(), ()) if key in held}
            made_from = int(npz["n"]) or None if statistics and "n" in held else None
            made = {"made": dict(json.loads(str(npz["record"])))} if statistics and "record" in held else {}
        name = next((name for name, _ in IMAGE_NAMES if name in held), None)
        n, read = open_array(label, zipfile.ZipFile(path), name) if name else (0, None)
    if not name and not statistics:
        raise UserError(f"{label}: neither images (arr_0, images or x_train) nor statistics (mu and sigma, mu_s and "
                        f"sigma_s) inside, found {', '.join(held) or 'nothing'}")
    for (mu, sigma), width in zip(STORED.values(), (POOL, SPATIAL)):
        found = {key: statistics[key].shape for key in (mu, sigma) if key in statistics}
        finite = all(np.isfinite(statistics[key]).all() for key in found)
        if found and not (finite and found == {mu: (width,), sigma: (width, width)}):
            raise UserError(f"{label}: statistics of shapes {found}, where finite ones of {width} features are "
                            "expected: damaged, or of another network or layer")
    kind = " and ".join(["images"] * bool(name) + ["statistics"] * bool(statistics))
    return Source(str(path), n, read, {"kind": kind, "sha256": file_sha256(path), **made}, statistics, made_from)


def open_folder(label, folder, size):
    files = image_files(label, folder)
    listing = checksum(repr(describe_files(files, folder)))
    workers = concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count()))  # Pillow decodes outside Python's lock

    def read(rows):
        return list(workers.map(lambda row: read_image(label, files[row], size), rows))
    return Source(str(folder), len(files), read, {"kind": "folder", "image_size": size, "listing": listing})


def open_checkpoint(role, path, args, device):
    """Samples of a checkpoint, made as they are asked for: image i depends on (seed, i) alone."""
    net, config = load_named(role, path, device, args.average)
    if config.get("reference"):
        raise UserError(f"{role} {path}: is a bridge; restore images with sample.py --reference and give their .npz")
    sampler, decode = choose_sampler(args, net, config, path), decoder(args.vae, config, device)
    if decode is None and net.channels not in (1, 3):
        raise UserError(f"{role} {path}: makes {net.channels} channels, images have 1 or 3")
    seed = args.seed if role == "SAMPLES" else 2 ** 63 - 1 - args.seed  # a seed that SAMPLES cannot have
    student, n = config.get("student"), limit(role, args) or 50000
    law = "balanced" if args.labels == "data" and not uneven_counts(config) else args.labels
    labels = choose_labels(args.labels, n, config, seed)
    guidance = {"cfg_interval": [0.0, 1.0], **(student or sampler._asdict())}
    record = {"kind": "checkpoint", "sha256": file_sha256(path), "interpolant": config["interpolant"],
              "sampler": "student" if student else sampler.solver, "steps": sampler.steps, "restart": sampler.restart,
              "diffusion": sampler.diffusion if sampler.solver == "sde" else None, "seed": seed, "labels": law,
              "cfg_scale": guidance["cfg_scale"], "cfg_interval": guidance["cfg_interval"], "vae": args.vae,
              "average": args.average,
              "image_size": config.get("latent", config["network"])["image_size"]}

    def read(rows):
        return generate(net, config, labels[rows], seed, rows, sampler, decode=decode)
    return Source(str(path), n, read, record)


def limit(role, args):
    """How many images of this side are asked for, None where nothing is said."""
    return role == "REFERENCE" and args.n_reference or args.n


def choose_some(source, n):
    """The source with n of its images at most, always the same. Neither the first, since folders are sorted by class,
    nor every k-th, since labels may come in turn. Stored statistics stay what they are."""
    if n is None or n >= source.n:
        return source
    chosen, record = np.sort(np.random.default_rng(0).choice(source.n, n, replace=False)), source.record
    return source._replace(n=n, read=lambda rows: source.read(chosen[rows]), record={**record, "chosen_of": source.n})


def open_source(role, name, args, device, size=None):
    """What SAMPLES or REFERENCE (the role) names on the command line. size: of data sets, without --image_size."""
    path, label = pathlib.Path(name), f"{role} {name}"
    if name in DATA_SETS:
        images = load_images(name, args.data_dir, args.image_size or size, say=say).images
        record = {"kind": "data set", "image_size": images.shape[1]}
        return choose_some(Source(name, len(images), lambda rows: images[rows], record), limit(role, args))
    if path.is_dir():
        return choose_some(open_folder(label, path, args.image_size), limit(role, args))
    if not path.is_file():
        raise UserError(f"{label}: no such file, folder or data set (data sets: {', '.join(DATA_SETS)})")
    if path.suffix.lower() in SUFFIXES:
        raise UserError(f"{label}: is one image; give a folder of them")
    if path.suffix.lower() != ".npz":
        return open_checkpoint(role, path, args, device)
    found, side = open_npz(label, path), args.image_size
    if side and found.read:
        found = found._replace(read=lambda rows, read=found.read: resize_images(read(rows), side),
                               record={**found.record, "image_size": side})
    return choose_some(found, limit(role, args))


def open_sides(args, device, swept=None):
    """-> {role: Source}. A data set takes the side of the checkpoint that it stands beside. swept: flags of SAMPLES."""
    names, sides, size = {"SAMPLES": args.samples, "REFERENCE": args.reference}, {}, None
    for role in sorted(filter(names.get, names), key=lambda role: names[role] in DATA_SETS):
        flags = swept or args if role == "SAMPLES" else args
        if "SAMPLES" in sides and sides["SAMPLES"].record["kind"] == "checkpoint":  # whose flags these are
            flags = argparse.Namespace(**{**vars(args), **PLAIN})
        sides[role] = in_turn(lambda: open_source(role, names[role], flags, device, size))
        if sides[role].record["kind"] == "checkpoint":
            size = sides[role].record["image_size"]
    return {role: sides[role] for role in names if role in sides}


# ---------------------------------------------------------------------------------------------------------------------
# One pass over the images

class Ruler(NamedTuple):
    """What measures images: Inception and the resize before it. Numbers of two rulers cannot be compared."""
    net: Any
    resize: str
    device: Any
    weights: Optional[str] = None
    sha256: Optional[str] = None


class Moments:
    """Sum of [1, f] [1, f]^T over features f (n,D), (D+1,D+1) in float64: memory does not grow with n."""

    def __init__(self, width, device):
        device = "cpu" if device.type == "mps" else device  # no float64 there
        self.sum = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)

    def add(self, features):
        f = F.pad(features.to(self.sum.device).double(), (1, 0), value=1.0)  # in this order: mps has no float64
        self.sum.addmm_(f.T, f)

    def statistics(self):
        """-> mu (D,), sigma (D,D) as float64 arrays, over all processes."""
        if dist.is_initialized():
            dist.all_reduce(self.sum)
        n, mu = self.sum[0, 0], self.sum[0, 1:] / self.sum[0, 0]
        sigma = (self.sum[1:, 1:] - n * torch.outer(mu, mu)) / (n - 1).clamp_min(1)
        return mu.cpu().numpy(), (0.5 * (sigma + sigma.T)).cpu().numpy()


@contextlib.contextmanager
def exact():
    """float32 in full, on a card too: a metric is not the place to save digits. Samples are made outside of it."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)


@torch.no_grad()
def measure(source, needs, ruler, batch, rank=0, world=1):
    """One pass over source -> dict of mu, sigma (FID), mu_s, sigma_s (sFID), features (n,2048), logits (n,1008),
    pixels (sha256 over the images) and sizes ({(H,W)} of this process's). needs: a subset of {"fid", "sfid",
    "features", "logits"}. Batches are dealt to the processes in turn; features, logits and pixels are there in the
    first process only."""
    widths = {"fid": POOL, "sfid": SPATIAL}
    moments = {name: Moments(widths[name], ruler.device) for name in STORED if name in needs}
    whole, kept, sizes = sorted(needs - moments.keys()), [], set()
    tell = progress(say if rank == 0 else lambda text: None, f"{source.name}: images")
    for start in range(rank * batch, source.n, world * batch):
        with alone():
            images = source.read(range(start, min(start + batch, source.n)))  # a card still measures those before
        hashes = [hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest() for image in images]
        alike = len({image.shape for image in images}) == 1
        sizes |= {image.shape[:2] for image in images}
        groups = (torch.from_numpy(np.stack(group)).to(ruler.device).permute(0, 3, 1, 2)
                  for group in ([images] if alike else [[image] for image in images]))
        with exact():
            x = torch.cat([inception_input(group, ruler.resize) for group in groups])  # (B,3,299,299)
            out = dict(zip(("features", "sfid", "logits"), ruler.net(x)))
        out["fid"] = out["features"]
        for name in moments:
            moments[name].add(out[name])
        kept.append((start, b"".join(hashes), *(out[name] for name in whole)))
        tell(min(start + world * batch, source.n), source.n)
    found = {key: value for name in moments for key, value in zip(STORED[name], moments[name].statistics())}
    found["sizes"] = sizes
    kept = [(start, hashes, *(value.cpu().numpy() for value in values)) for start, hashes, *values in kept]
    parts = [kept] * world
    if world > 1:
        dist.gather_object(kept, parts if rank == 0 else None)
    if rank == 0:
        _, hashes, *arrays = zip(*sorted(sum(parts, []), key=lambda row: row[0]))
        found.update(zip(whole, map(np.concatenate, arrays)), pixels=hashlib.sha256(b"".join(hashes)).hexdigest())
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The metrics

@np.errstate(over="ignore", invalid="ignore")  # what is not finite in the end is refused
def frechet(mu_a, sigma_a, mu_b, sigma_b):
    """|mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 (sigma_a sigma_b)^(1/2)), float64 (arXiv:1706.08500, eq. 6).

    sigma_a sigma_b has the eigenvalues of the symmetric R sigma_b R^T with sigma_a = R^T R: two symmetric
    decompositions, no matrix square root. Raises ValueError where a matrix is not finite or no covariance."""
    values, vectors = scipy.linalg.eigh(sigma_a, driver="evd")
    if values[0] < -1e-6 * max(values[-1], 1e-300):
        raise ValueError(f"a covariance has the negative eigenvalue {values[0]:.3g}")
    root = vectors[:, values > 0] * np.sqrt(values[values > 0])  # (D,r) = R^T
    values = scipy.linalg.eigh(root.T @ sigma_b @ root, eigvals_only=True, driver="evd")
    if len(values) and values[0] < -1e-6 * max(values[-1], 1e-300):
        raise ValueError(f"a product of covariances has the negative eigenvalue {values[0]:.3g}")
    d = mu_a - mu_b
    return float(d @ d + np.trace(sigma_a) + np.trace(sigma_b) - 2 * np.sqrt(values.clip(min=0)).sum())


def inception_score(logits, splits=10):
    """exp E KL(p(y|x) | p(y)) (arXiv:1606.03498) of logits (n,1008) -> mean and standard deviation over `splits` parts,
    dealt by a fixed shuffle so that images sorted by class do no harm."""
    part, scores = np.random.default_rng(0).permutation(len(logits)) * splits // len(logits), []
    for i in range(splits):
        logp = torch.from_numpy(logits[part == i]).double().log_softmax(1)
        mean = logp.exp().mean(0)
        scores.append(float(((logp.exp() * logp).sum(1).mean() - torch.xlogy(mean, mean).sum()).exp()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(a, b, subsets=100, size=1000, seed=0):
    """KID (arXiv:1801.01401): unbiased MMD^2 with the kernel (x.y / D + 1)^3 over random subsets of the features a
    (n,D) and b (m,D) -> mean and standard deviation over the subsets, and their size: all where there are fewer."""
    rng, results, size = np.random.default_rng(seed), [], min(size, len(a), len(b))
    for _ in range(subsets):
        x, y = (torch.from_numpy(f[rng.choice(len(f), size, replace=False)]).double() for f in (a, b))
        xx, yy, xy = ((u @ v.T / x.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        results.append(float((xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1)) - 2 * xy.mean()))
    return float(np.mean(results)), float(np.std(results)), size


def neighbour_radii(x, k=3, block=500):
    """Squared distance of each row of x (n,D) to its k-th nearest other row -> (n,). In float64: in float32 it is noise
    where rows are close."""
    x = x.double()
    nearest = [torch.cdist(rows, x).square().topk(k + 1, largest=False).values for rows in x.split(block)]
    return torch.cat(nearest)[:, k]  # number 0 is the row itself


def coverage(x, y, radii, block=500):
    """Share of the rows of x (n,D) that lie within the radius of some row of y (m,D)."""
    x, y = x.double(), y.double()
    slack = 1e-9 * y.square().sum(1).mean()  # far above float64's rounding: a row must lie within its own radius
    return sum(int((torch.cdist(rows, y).square() <= radii + slack).any(1).sum()) for rows in x.split(block)) / len(x)


def precision_recall(samples, reference, device="cpu", k=3):
    """Improved precision and recall (arXiv:1904.06991) of features (n,D), (m,D): the share of samples inside the
    reference's neighbourhoods, and of reference images inside the samples'."""
    device = "cpu" if torch.device(device).type == "mps" else device  # no float64 there
    x, y = (torch.from_numpy(f).to(device) for f in (samples, reference))
    return coverage(x, y, neighbour_radii(y, k)), coverage(y, x, neighbour_radii(x, k))


def compare(a, b, metrics, device):
    """What was found on SAMPLES and on REFERENCE, {} where there is none -> {metric: value}, all of them finite."""
    values = {}
    if a.get("sizes") and b.get("sizes") and a["sizes"] != b["sizes"]:
        one, two = ("x".join(map(str, min(side["sizes"]))) + " and more" * (len(side["sizes"]) > 1) for side in (a, b))
        say(f"note: SAMPLES are {one}, REFERENCE {two}: how they were resized counts; see --image_size")
    for metric in [m for m in metrics if m in STORED and b]:
        mean, covariance = STORED[metric]
        try:
            values[metric] = frechet(a[mean], a[covariance], b[mean], b[covariance])
        except ValueError as error:
            raise UserError(f"--metrics {metric}: {error}; look at the images, statistics and weights") from None
        for role, side in (("SAMPLES", a), ("REFERENCE", b)):
            rank = int(np.linalg.matrix_rank(side[covariance], hermitian=True))
            if rank < len(side[mean]):
                say(f"note: the covariance of {role} for {metric} is rank-poor: {rank} of {len(side[mean])}")
    if "is" in metrics:
        values["is"], values["is_std"] = inception_score(a["logits"])
    if "kid" in metrics:
        values["kid"], values["kid_std"], values["kid_subset"] = kernel_distance(a["features"], b["features"])
    if {"precision", "recall"} & set(metrics):
        values["precision"], values["recall"] = precision_recall(a["features"], b["features"], device)
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"--metrics {name}: {value} is not finite; look at the images, statistics and weights")
    return values


# ---------------------------------------------------------------------------------------------------------------------
# The command

def say(text):
    print(text, file=sys.stderr, flush=True)


def check_side(role, side, args):
    """What a pass over this side must find, nothing where its statistics are enough. Raises UserError where it cannot,
    or where there are too few images."""
    needs = set()
    for metric in args.metrics:
        (need, least), n, width = METRICS[metric], side.count(metric), {"fid": POOL, "sfid": SPATIAL}.get(metric, 0)
        if metric == "is" and role == "REFERENCE":
            continue
        if not side.stores(metric):
            if side.read is None or (metric in STORED and side.statistics):
                how = f", or statistics made by --metrics fid,{metric} --save_stats FILE.npz" * (metric in STORED)
                raise UserError(f"--metrics {metric}: {role} {side.name} does not hold what it takes; "
                                f"give the images themselves{how}")
            if n < least:
                raise UserError(f"{role} {side.name}: {n} image{'s' * (n != 1)}, {metric} needs at least {least}")
            needs.add(need)
        if n is not None and n < width // 2 and not args.allow_rank_poor:
            raise UserError(f"{role} {side.name}: {n} images for {width} features: the covariance is rank-poor, "
                            f"{metric} tells more of n; use at least {width // 2} (better 50000), or --allow_rank_poor")
    return needs


def check_rulers(sides, ruler):
    """Statistics that say with which weights and resize they were made must agree with this run's pass, if there is
    one, and with one another."""
    used = [("this run", {"weights_sha256": ruler.sha256, "resize": ruler.resize})] if ruler.net else []
    used += [(f"the statistics of {side.name}", side.record.get("made", {})) for side in sides.values()]
    for key, what in (("weights_sha256", "Inception weights"), ("resize", "--resize")):
        known = [(who, made[key]) for who, made in used if made.get(key)]
        for (one, a), (two, b) in zip(known, known[1:]):
            if a != b:
                raise UserError(f"{what}: {one} used {str(a)[:8]}, {two} used {str(b)[:8]}; they cannot be compared")


def conclude(args, sides, results, ruler, world):
    """Statistics and the record, metrics included, out of both passes; in the first process."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                "scipy": scipy.__version__, "pillow": PIL.__version__}
    about = {"weights": ruler.weights, "weights_sha256": ruler.sha256, "resize": ruler.resize if ruler.net else None,
             "versions": versions, "dtype": "float32, moments and distances float64", "device": str(ruler.device),
             "processes": world, "batch": args.batch, "commit": code_commit()}
    sources = describe_sides(args, sides)
    for role in sides:
        sources[role.lower()]["pixels_sha256"] = results[role].get("pixels")
    if args.save_stats:
        role = [*sides][-1]
        made = sides[role].record.get("made", {"source": sources[role.lower()]})  # stored ones stay what they were
        made = made if sides[role].statistics else {**about, **made}
        kept = {key: results[role][key] for key in sum(STORED.values(), ()) if key in results[role]}
        kept.update(n=np.array(sides[role].count("fid") or 0), record=np.array(json.dumps(made)))
        save_file(args.save_stats, lambda f: np.savez(f, **kept))
        say(f"wrote {args.save_stats}")
    values = compare(results["SAMPLES"], results.get("REFERENCE", {}), args.metrics, ruler.device)
    return {**values, "n": sources["samples"]["n"], **sources, **about}


def describe_sides(args, sides):
    return {role.lower(): {"path": side.name, **side.record, "n": side.count(args.metrics[0])}
            for role, side in sides.items()}


def report(args, record, sides):
    for metric in args.metrics:
        if metric in record:
            name, value, note = describe(metric, record, sides)
            print(f"{name} {value}" + f" ({note})" * bool(note), flush=True)
    if args.json:
        save_json(args.json, record)


def describe(metric, values, sides):
    """-> a metric's name, its value, and what keeps it from standing beside a published figure, "" if nothing does."""
    n, other = (sides[role].count(metric) if role in sides else None for role in ("SAMPLES", "REFERENCE"))
    name, note, digits = metric, "", 6 if metric == "kid" else 4
    if n is not None and n < 50000:
        name, note = f"{metric}@{n}", f"not comparable with {metric.upper().replace('SFID', 'sFID')}-50k"
    elif metric in STORED and other and other < 50000:
        note = f"reference of {other} images: not comparable with FID-50k"
    if metric == "kid" and values["kid_subset"] < 1000:
        note = f"subsets of {values['kid_subset']}, not 1000: not comparable with KID-50k"
    spread = f" +- {values[metric + '_std']:.{digits}f}" if metric + "_std" in values else ""
    return name, f"{values[metric]:.{digits}f}{spread}", note


# ---------------------------------------------------------------------------------------------------------------------
# Many settings of one checkpoint

def combine(parser, words):
    """The FLAG=A,B,... of --sweep -> [({flag: text}, all flags)] of every combination, each read as if it stood on the
    command line. Raises UserError."""
    table = {}
    for word in words:
        flag, _, values = word.partition("=")
        if flag not in (*SAMPLING, "n") or flag in table or not values:
            raise UserError(f"--sweep {word}: give FLAG=VALUE,VALUE,... once for each FLAG, which may be n, "
                            f"{', '.join(SAMPLING)}")
        table[flag] = values.split(",")
    found = []
    for chosen in itertools.product(*table.values()):
        more = [[f"--{flag}", *text.split()] if flag == "cfg_interval" else [f"--{flag}={text}"]
                for flag, text in zip(table, chosen)]
        try:
            found.append((dict(zip(table, chosen)), parser.parse_intermixed_args(sys.argv[1:] + sum(more, []))))
        except UserError as error:
            raise UserError(f"--sweep: {error}") from None
    return found


def settings_of(record):
    """What makes a record another measurement: both sides, all but their pixels, and the ruler; as JSON has it."""
    kept = {key: record.get(key) for key in ("samples", "reference", "weights_sha256", "resize")}
    for role in ("samples", "reference"):
        kept[role] = {key: value for key, value in (kept[role] or {}).items() if key != "pixels_sha256"}
    return json.loads(json.dumps(kept))


def read_sweep(path):
    """The records in a sweep's file, [] where there is none. Raises UserError for a file of anything else."""
    if not pathlib.Path(path).is_file():
        return []
    with reading(f"--json {path}: no record of --sweep", "; choose another file"):
        records = json.loads(pathlib.Path(path).read_text())["sweep"]
        if not all(isinstance(value, (int, float)) for r in records for value in map(r.get, METRICS.keys() & r.keys())):
            raise ValueError("metrics that are no numbers")
        return [r for r in records if settings_of(r)]


def sweep(args, combinations, sides, measured, ruler, rank, world):
    """Measure SAMPLES in every combination of --sweep that args.json does not hold yet, REFERENCE at most once; print
    the table. measured(role, side) is a pass over one side."""
    def open_samples(flags):
        return in_turn(lambda: open_source("SAMPLES", args.samples, flags, ruler.device))

    def kept(wanted):  # anew each time: another sweep may have added its own since
        return next((r for r in read_sweep(args.json) if settings_of(r) == wanted), {})

    for _, flags in combinations:  # a mistake in the last one is told before the first is measured
        check_side("SAMPLES", open_samples(flags), args)
    others, notes = None, []
    widths = [max(len(flag), *(len(chosen[flag]) for chosen, _ in combinations)) for flag in combinations[0][0]]
    widths += [24 if metric in ("is", "kid") else 12 for metric in args.metrics]

    def print_row(cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip(), flush=True)
    if rank == 0:
        print_row([*combinations[0][0], *args.metrics])
    for chosen, flags in combinations:
        sides = {**sides, "SAMPLES": open_samples(flags)}
        wanted = settings_of({**describe_sides(args, sides), "weights_sha256": ruler.sha256, "resize": ruler.resize})
        record = from_first(first_process(lambda: kept(wanted)))
        if not record.keys() >= {*args.metrics}:
            if others is None:
                others = {role: measured(role, side) for role, side in sides.items() if role != "SAMPLES"}
            results = {"SAMPLES": measured("SAMPLES", sides["SAMPLES"]), **others}

            def finish():
                found = conclude(args, sides, results, ruler, world)
                with locked(pathlib.Path(args.json).parent):
                    mine = {**kept(wanted), "flags": chosen, **found}  # and other metrics of the same
                    rest = [r for r in read_sweep(args.json) if settings_of(r) != wanted]
                    save_json(args.json, {"sweep": [*rest, mine]})
                return mine
            record = first_process(finish)
        if rank == 0:
            cells = [describe(metric, record, sides) for metric in args.metrics]
            print_row([*chosen.values(), *(value for _, value, _ in cells)])
            notes += [f"{name}: {note}" for name, _, note in cells if note]
    if rank == 0:
        print(*dict.fromkeys(notes), f"wrote {args.json}", sep="\n")


# ---------------------------------------------------------------------------------------------------------------------
# Flags and main

def metric_list(text):
    chosen = [one_of(METRICS)(name) for name in text.split(",")]
    return [name for name in METRICS if name in chosen]


def parse_flags():
    """-> the flags, the names of those given that are for checkpoints alone, and the combinations of --sweep."""
    parser = Parser(__doc__)
    add = parser.group("what is compared")
    add("samples", metavar="SAMPLES", help="what is judged")
    add("reference", metavar="REFERENCE", nargs="?", help="with what; optional with --save_stats or --metrics is")
    add("--image_size", type=number(int, 1), default=None, help="crop and resize real images to this side as training "
        "does (folders and .npz: as they are; data sets: the checkpoint's side, or their own)")
    add("--data_dir", default="data", help="where downloads are kept")
    add = parser.group("how, and what is kept")
    add("--metrics", type=metric_list, default="fid", help="comma-separated: " + ",".join(METRICS))
    add("--weights", default=None, help="pt_inception-2015-12-05-6726825d.pth; downloaded to --data_dir if not given")
    add("--resize", type=one_of(("tf1", "torch")), default="tf1", help="as ADM and torch-fidelity, or as pytorch-fid")
    add("--allow_rank_poor", action="store_true", help="compute FID from fewer than 1024 images, for trying things out")
    add("--save_stats", default=None, help="FILE.npz for the statistics of REFERENCE (of SAMPLES if there is none)")
    add("--json", default=None, help="FILE for the record of everything at full precision")
    add("--n_reference", type=number(int, 1), default=None, help="how many images of REFERENCE; --n is for both sides "
        "(all there are, by a fixed draw; 50000 of a checkpoint)")
    add("--sweep", nargs="+", default=None, metavar="FLAG=A,B", help="a table of SAMPLES, a checkpoint, in every "
        "combination of these values of sampling flags (cfg_interval='0 1,0.2 0.8'), beside one REFERENCE; the records "
        "are kept in --json (NAME_sweep.json beside NAME.pt), and what is there with the same settings is not computed "
        "again")
    add_sampling_flags(parser, batch=50, labels="data")
    args = parser.parse_intermixed_args()  # flags may stand between SAMPLES and REFERENCE
    combinations = combine(parser, args.sweep) if args.sweep else []
    if args.sweep:
        args.json = args.json or f"{os.path.splitext(args.samples)[0]}_sweep.json"
        if args.save_stats:
            raise UserError(f"--save_stats {args.save_stats}: is not for --sweep, leave one out")
    for flag, file, ending in (("--save_stats", args.save_stats, ".npz"), ("--json", args.json, "")):
        if file is not None:
            if pathlib.Path(file).is_dir() or not file.endswith(ending):
                raise UserError(f"{flag} {file}: give a file name" + f" ending in {ending}" * bool(ending))
            check_writable(flag, pathlib.Path(file).parent)
            check_other(flag, file, args.samples, args.reference, args.weights)
    if args.save_stats and not STORED.keys() & args.metrics:
        raise UserError(f"--save_stats {args.save_stats}: these --metrics have no statistics to keep, add fid or sfid")
    alone = {"is", *(STORED if args.save_stats else ())}
    if args.reference is None and not alone.issuperset(args.metrics):
        raise UserError(f"REFERENCE is missing: --metrics {','.join(args.metrics)} needs what to compare with, or, for "
                        "statistics of SAMPLES, fid and sfid with --save_stats FILE.npz")
    given = [name for name in SAMPLING if getattr(args, name) != parser.get_default(name)]
    return args, given, combinations


def main():
    args, sampling, combinations = parse_flags()
    rank, world, device = start_processes(args.device)
    sides = open_sides(args, device, combinations[0][1] if combinations else None)
    if sampling and not any(side.record["kind"] == "checkpoint" for side in sides.values()):
        raise UserError(f"--{sampling[0]} {getattr(args, sampling[0])}: is for samples of a checkpoint, which neither "
                        "side is; leave it out")
    if args.sweep and sides["SAMPLES"].record["kind"] != "checkpoint":
        raise UserError(f"--sweep {args.sweep[0]}: is for SAMPLES of a checkpoint, {args.samples} is none")
    if args.n_reference and not ("REFERENCE" in sides and sides["REFERENCE"].read):
        raise UserError(f"--n_reference {args.n_reference}: there are no images in REFERENCE to choose from; leave it "
                        "out")
    needs, ruler = {role: check_side(role, sides[role], args) for role in sides}, Ruler(None, args.resize, device)
    if any(needs.values()):
        weights, sha256 = in_turn(lambda: find_weights(args.weights, args.data_dir))
        ruler = Ruler(load_inception(weights, device), args.resize, device, weights, sha256)
    check_rulers(sides, ruler)

    def measured(role, side):
        found = measure(side, needs[role], ruler, args.batch, rank, world) if needs[role] else {}
        return {**side.statistics, **found}
    if combinations:
        return sweep(args, combinations, sides, measured, ruler, rank, world)
    results = {role: measured(role, sides[role]) for role in reversed(sides)}  # what may be broken before what is made
    first_process(lambda: report(args, conclude(args, sides, results, ruler, world), sides))


if __name__ == "__main__":
    command(main)
