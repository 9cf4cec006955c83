"""Timings, side by side in one process; absolute numbers are this machine's, ratios are what carries over.

    python tests/bench.py iteration     # one distillation iteration against the naive arrangement and sgemm's rate
    python tests/bench.py maps          # an iteration of each row of flow_map.py against one of distill.py
    python tests/bench.py sampling      # time per image: teacher with 50 and 250 steps, one-step student
    python tests/bench.py antithetic    # variance of a velocity bridge's gradient with and without +-z pairs
    python tests/bench.py limit         # samples of what a flow map of the teacher --ckpt is drawn to, by mu
    python tests/bench.py errors        # how far the data prediction of the teacher --ckpt is from --data, by noise
    python tests/bench.py blocks        # SiT-S/2, forward and backward, against separate q, k, v and unfused attention
    python tests/bench.py plan --model SiT-XL/2 --side 32 --channels 4 --batch 128     # memory, disk, hours of stages
    python tests/bench.py scale --side 32 --channels 4 --batch 64     # on a GPU: training and samples of S/2, B/2, XL/2
    python tests/bench.py fid           # trace term, Inception and the whole command, against pytorch-fid if installed

A forward unit is one network pass over one batch; a backward pass costs two more when weights get gradients and one
more when only the input does.
"""
import argparse
import contextlib
import copy
import gc
import io
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from statistics import median
from typing import NamedTuple
from unittest import mock

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import distill
import fid
import flow_map
from common.autoencoder import CHUNK, Autoencoder
from common.data import draw_digits, load_images
from common.files import save_checkpoint
from common.images import degrade, to_device, to_uint8
from common.run import command, frozen, peak_memory, precision, put_in_training, start_processes
from interpolants import (FAMILIES, Batch, Problem, Sampler, ddim, regression_loss, start_at, time_grid,
                          time_of_noise_ratio)
from model import Attention, SiT, build_model, ema_update, frozen_copy, guided, load_model, parse_name, round_weights
from sample import choose_labels, generate, image_noise, problem_of

PROBLEM = Problem(FAMILIES["linear"])
RATES = argparse.Namespace(shard=False, clip=1.0, warmup=0, decay_from=0)  # what an optimizer's step asks for


def timed(*actions, rounds=1, warm_up=1):
    """Seconds of each action, the card's among them, in turn, a row a round: a slow moment of the machine meets all."""
    rows = []
    for _ in range(warm_up + rounds):
        rows.append([])
        for action in actions:
            began = time.perf_counter()
            action()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            rows[-1].append(time.perf_counter() - began)
    return rows[warm_up:]


def times(pairs):
    """How much longer the second of each pair takes."""
    ratios = [b / a for a, b in pairs]
    return f"{median(ratios):.2f} times as long ({min(ratios):.2f} to {max(ratios):.2f})"


def heading(args, more=""):
    print(f"{args.model} on {args.side}x{args.side}x{args.channels}, batch {args.batch}, {torch.get_num_threads()} "
          f"threads; medians of {args.rounds} rounds{more}")


def flops(action):
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def forward_flops(model, side, channels, classes=10):
    """Of one network pass over one image."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):  # whose products are counted
        net, x_t = SiT(*parse_name(model), side, channels, classes), torch.empty(1, channels, side, side)
        return flops(lambda: net(x_t, torch.empty(1)))


def random_weights(net):
    """The cost of a pass does not depend on them."""
    torch.manual_seed(0)
    for p in net.parameters():
        if p.requires_grad and p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02)
    return net


def random_teacher(folder, model, side, channels):
    size, patch = parse_name(model)
    network = dict(size=size, patch=patch, image_size=side, channels=channels, num_classes=10)
    config = {"network": network, "model": model, "interpolant": "linear", "prediction": "velocity", "data": "none"}
    net, path = random_weights(build_model(config)), pathlib.Path(folder, "teacher.pt")
    save_checkpoint(path, {"config": config, "ema": net.state_dict()})
    return path, frozen_copy(net), config


# ---------------------------------------------------------------------------------------------------------------------
# An iteration of distillation, and samples

def run_trainer(script, teacher, *flags):
    """distill.py or flow_map.py itself -> its log."""
    out = pathlib.Path(teacher).parent / "ours"
    flags = ("--teacher_ckpt", teacher, "--out", out, "--fresh", "--sample_every", 0, *flags)
    argv, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, flags)]
    shutil.rmtree(out, ignore_errors=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            script.main()
    finally:
        sys.argv = argv
    return out / "log.jsonl"


def ours(teacher, args, *flags, device="cpu", script=distill):
    """Seconds per iteration, after as many of warm-up, and peak memory in MiB."""
    n = max(args.iterations, 1 + ("--compile" in flags))  # the one that compiles has no line
    flags = ("--batch", args.batch, "--device", device, *flags)
    log = run_trainer(script, teacher, *flags, "--iters", 2 * n, "--log_every", n)
    first, last = map(json.loads, log.read_text().splitlines())
    return (last["seconds"] - first["seconds"]) / n, last["memory_mib"]


def naive(net, batch, objective, k_psi):
    """-> an iteration of the arrangement this project does without: guidance inside the student, so that each of its
    passes is two, and the student run again on the same noise for every critic step."""
    G, psi = (put_in_training(frozen_copy(net).requires_grad_(True), torch.optim.Adam, 1e-5, RATES) for _ in range(2))
    side = net.patch * round(net.pos_embed.shape[1] ** 0.5)

    def noise():
        return torch.randn(batch, net.channels, side, side)

    def iterate():
        start = start_at(PROBLEM, Batch(x1=noise(), z=noise(), y=torch.randint(10, (batch,))), 0.714)
        for _ in range(k_psi):
            with torch.no_grad():
                x0 = PROBLEM.data(guided(G.net, 2.0), start)
            regression_loss(PROBLEM, psi.net, Batch(x0, noise(), t=torch.rand(batch), y=start.y)).mean().backward()
            psi.step(RATES, 0)
        x0 = PROBLEM.data(guided(G.net, 2.0), start)
        b = Batch(x0.detach().requires_grad_(), noise(), t=torch.rand(batch), y=start.y)
        loss, _ = distill.student_loss(PROBLEM, distill.OBJECTIVES[objective], net, psi.net, b)
        x0.backward(torch.autograd.grad(loss.mean(), b.x0)[0])
        G.step(RATES, 0)
    return iterate


def count_units(objective, k_psi, *flags):
    """Forward units of an iteration of distill.py, without what follows it (line, picture, checkpoint), and of the
    naive arrangement, from the operations of a small network."""
    flags = ("--objective", objective, "--k_psi", k_psi, "--batch", 2, "--device", "cpu", *flags, "--t_init", 0.7,
             "--t_min", 0.02, "--t_max", 0.98, "--iters", 1)
    with tempfile.TemporaryDirectory() as folder, mock.patch("common.run.Run.report", lambda *_: None):
        teacher, net, _ = random_teacher(folder, "SiT-XXS/2", 16, 1)
        unit = flops(lambda: net(torch.empty(2, 1, 16, 16), torch.empty(2)))
        return [round(flops(action) / unit) for action in (
            lambda: run_trainer(distill, teacher, *flags), naive(net, 2, objective, k_psi))]


def iteration(args):
    """The share of sgemm is of this machine's rate for large matrices in the same round."""
    heading(args, f" of {args.iterations} iterations" + ", compiled" * args.compile)
    a, b = torch.randn(2, 1024, 1024)
    for objective, k_psi, *flags in (("cross", 5, "--reuse_samples"), ("cross", 5), ("cross", 1), ("sid", 1)):
        pairs, rates, units = [], [], count_units(objective, k_psi, *flags)
        with tempfile.TemporaryDirectory() as folder:
            teacher, net, _ = random_teacher(folder, args.model, args.side, args.channels)
            for _ in range(args.rounds):
                rates.append(2 * 1024 ** 3 / median(row[0] for row in timed(lambda: a @ b, rounds=9)))
                mine, _ = ours(teacher, args, "--objective", objective, "--k_psi", k_psi, *flags,
                               *["--compile"] * args.compile)
                other = timed(naive(net, args.batch, objective, k_psi), rounds=args.iterations, warm_up=args.iterations)
                pairs.append((mine, median(seconds for seconds, in other)))
        mine, other = (1000 * median(column) for column in zip(*pairs))
        work = units[0] * args.batch * forward_flops(args.model, args.side, args.channels)
        share = median(work / seconds / rate for (seconds, _), rate in zip(pairs, rates))
        print(f"{' '.join([objective, 'k_psi', str(k_psi), *flags])}: {units[0]} units, {mine:.0f} ms, {share:.2f} of "
              f"sgemm's {median(rates) / 1e9:.1f} GFLOP/s; naive {units[1]} units, {other:.0f} ms, {times(pairs)}",
              flush=True)


def maps(args):
    """In units of a forward pass, and in time against sid's iteration of the same round."""
    data_free = [name for name, row in flow_map.ROWS.items() if row.times in flow_map.DATA_FREE]
    rows = {name: (flow_map, "--row", name) for name in flow_map.ROWS}
    rows |= {f"{name}, jvp": (flow_map, "--row", name, "--tangent", "jvp") for name in ("lagrange", "euler")}
    rows = {"sid": (distill, "--objective", "sid"), **rows}
    heading(args, f" of {args.iterations} iterations")
    with tempfile.TemporaryDirectory() as folder:
        data, found = pathlib.Path(folder, "data.npz"), {name: [] for name in rows}
        rng = np.random.default_rng(0)
        np.savez(data, images=rng.integers(0, 256, (1000, args.side, args.side, args.channels), dtype=np.uint8),
                 labels=np.arange(1000) % 10)
        rows = {name: (script, *flags, *["--data", data] * (script is flow_map and flags[1] not in data_free))
                for name, (script, *flags) in rows.items()}
        teacher, net, _ = random_teacher(folder, args.model, args.side, args.channels)
        for _ in range(args.rounds):
            for name, (script, *flags) in rows.items():
                found[name].append(ours(teacher, args, *flags, script=script)[0])
        x, t = torch.empty(4, args.channels, args.side, args.side), torch.empty(4)
        unit = flops(lambda: net(x, t))
        with mock.patch("common.run.Run.report", lambda *_: None):
            for name, (script, *flags) in rows.items():
                units = flops(lambda: run_trainer(script, teacher, *flags, "--batch", 4, "--iters", 1)) / unit
                print(f"{name}: {units:.1f} units, {1000 * median(found[name]):.0f} ms, "
                      f"{times(list(zip(found['sid'], found[name])))} as sid", flush=True)


def sampling(args):
    with tempfile.TemporaryDirectory() as folder:
        _, net, config = random_teacher(folder, args.model, args.side, args.channels)
    student = {**config, "student": {"times": [0.714], "steps": 1, "cfg_scale": 1.0}}
    heading(args)
    rows = {"student, 1 step": (student, Sampler()), "teacher, 50 steps": (config, Sampler(50)),
            "teacher, 250 steps": (config, Sampler(250)),
            "teacher, 50 steps, guided": (config, Sampler(50, cfg_scale=2.0))}
    y = np.arange(args.batch) % 10
    found = timed(*(lambda row=row: generate(net, row[0], y, 0, range(args.batch), row[1]) for row in rows.values()),
                  rounds=args.rounds)
    for i, name in enumerate(rows):
        print(f"{name}: {1000 * median(row[i] for row in found) / args.batch:.2f} ms an image, "
              f"{times([(row[0], row[i]) for row in found])} as the student")


def unroll(t, r, mu):
    """The times of the teacher's steps that lagrange's legs from t to r are made of, once the student's is made of such
    steps itself and so on: t - (1 - mu)^n (t - r), from where 2 % of the way is gone, then r."""
    most = math.ceil(math.log(0.02) / math.log(1 - mu))
    return [t - (1 - mu) ** k * (t - r) for k in range(most, -1, -1)]


@torch.no_grad()
def limit(args):
    """Samples of maps that have learnt all that `lagrange` asks of them, in several steps and of several mu, for a
    teacher that starts from noise."""
    net, config = load_model(args.ckpt)
    problem, n, batch = problem_of(config), args.images, args.batch
    y, x1 = torch.as_tensor(choose_labels("balanced", n, config)), image_noise(net, config, 1, range(n))()
    for mu, steps in ((0.3, 1), (0.3, 2), (0.3, 4), (0.1, 1)):
        grid, found = time_grid(problem, steps).tolist(), []
        times = grid[:1] + [s for t, r in zip(grid, grid[1:]) for s in unroll(t, r, mu)]
        for rows in torch.arange(n).split(batch):
            b = start_at(problem, Batch(x1=x1[rows], z=x1[rows], y=y[rows]), times[0])
            for r in times[1:]:
                r = torch.full_like(b.t, r)
                b = b._replace(x_t=ddim(problem, problem.data(net, b), b, r), t=r)
            found.append(to_uint8(b.x_t))
        path = pathlib.Path(args.ckpt).with_name(f"limit_{mu:g}_{steps}.npz")
        np.savez(path, images=np.concatenate(found), labels=y.numpy())
        print(f"wrote {path}: mu {mu:g}, {steps} steps", flush=True)


@torch.no_grad()
def errors(args):
    """The error of a teacher's data prediction (on a path from noise), root mean square a pixel in units of [-1, 1], on
    --images of --data with their labels, noised to s/alpha."""
    net, config = load_model(args.ckpt)
    problem, images = problem_of(config), load_images(args.data)
    x0, y = to_device(images.images[:args.images], "cpu"), torch.from_numpy(images.labels[:args.images])
    y = y if net.num_classes else 0 * y
    b = Batch(x0=x0, x1=torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), y=y)
    for ratio in (0.1, 0.3, 1.0, 2.5, 10.0, 50.0):
        t, squares = torch.full(y.shape, time_of_noise_ratio(problem, ratio)), []
        for rows in torch.arange(len(y)).split(args.batch):
            part, _ = problem.noised(b._replace(t=t).rows(rows))
            squares.append((problem.data(net, part) - part.x0).square().flatten())
        print(f"s/alpha {ratio:g}, t = {t[0]:.3f}: {torch.cat(squares).mean().sqrt():.3f}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# FID

def fid_bench(args):
    """On random covariances of 5,000 features, random weights and two folders of PNGs."""
    from conftest import inception_weights
    rng, values = np.random.default_rng(0), {}
    mix = rng.normal(size=(2048, 2048)) * np.geomspace(1, 1e-2, 2048)
    x, y = rng.normal(size=(5000, 2048)) @ mix + 1, rng.normal(size=(5000, 2048)) @ mix
    (mu_a, a), (mu_b, b) = ((f.mean(0), np.cov(f, rowvar=False)) for f in (x, y))

    def frechet():
        values["ours"] = fid.frechet(mu_a, a, mu_b, b)

    def square_root():  # of the product, as pytorch-fid takes it
        root = np.trace(np.real(scipy.linalg.sqrtm(a @ b)))
        values["theirs"] = (mu_a - mu_b) @ (mu_a - mu_b) + np.trace(a) + np.trace(b) - 2 * root
    found = timed(frechet, square_root, rounds=args.rounds, warm_up=0)
    print(f"trace term, 2048 dimensions, {torch.get_num_threads()} threads: {found[-1][0]:.1f} s, scipy "
          f"{scipy.__version__} sqrtm {times(found)}; ratio - 1 is {values['ours'] / values['theirs'] - 1:.0e}")
    try:
        import pytorch_fid.inception as other
    except ImportError:
        return print("pytorch-fid is not installed: no comparison of passes and commands")
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        weights = folder / "hub" / "checkpoints" / fid.WEIGHTS[0].rsplit("/", 1)[1]
        weights.parent.mkdir(parents=True)
        torch.save(inception_weights(), weights)
        other.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
        theirs, ours = other.InceptionV3([3]).eval(), fid.load_inception(weights)
        x = torch.randint(0, 256, (args.batch, 3, 32, 32), dtype=torch.uint8)
        with torch.no_grad():
            found = timed(lambda: ours(fid.inception_input(x, "torch")), lambda: theirs(x / 255), rounds=args.rounds)
        print(f"Inception: {args.batch / found[-1][0]:.1f} images a second, pytorch-fid {times(found)}", flush=True)
        for i, image in enumerate(draw_digits(2 * args.images, 32)[0]):
            half, std = ("a", 5) if i < args.images else ("b", 10)
            (folder / half).mkdir(exist_ok=True)
            pixels = np.clip(image * [1.0, 0.8, 0.6] + rng.normal(0, std, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / half / f"{i:05d}.png")

        def call(*words):  # each in a process of its own
            done = subprocess.run([sys.executable, "-W", "ignore", *words], cwd=folder, capture_output=True, text=True,
                                  check=True, env={**os.environ, "TORCH_HOME": str(folder)})
            values["theirs"] = done.stdout.split()[-1]
        ours = (fid.__file__, "a", "b", "--weights", str(weights), "--resize", "torch", "--json", "f.json")
        found = timed(lambda: call(*ours), lambda: call("-m", "pytorch_fid", "a", "b"), rounds=args.rounds, warm_up=0)
        print(f"whole command, {args.images} + {args.images} images of 32x32: {median(row[0] for row in found):.0f} s, "
              f"pytorch-fid {times(found)}; {json.loads((folder / 'f.json').read_text())['fid']:.8f} and "
              f"{values['theirs']}")


# ---------------------------------------------------------------------------------------------------------------------
# Choices

def antithetic(args):
    """Variance of a velocity bridge's gradient: a batch of independent z against pairs of z and -z, at equal passes."""
    images, labels = draw_digits(args.batch * 40, args.side)
    x0, x1, y = to_device(images, "cpu"), to_device(degrade("lowres4", images), "cpu"), torch.from_numpy(labels)
    torch.manual_seed(0)
    net = SiT(*parse_name(args.model), args.side, 1, 10, reference_channels=1)
    problem = Problem(FAMILIES["bridge"], sees_x1=True)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)

    def gradient(seed, pairs=False):
        g = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(x0), (args.batch,), generator=g)
        z = torch.randn(args.batch, 1, args.side, args.side, generator=g)
        t = 1e-3 + 0.998 * torch.rand(args.batch, generator=g)
        if pairs:
            chosen, t, z = (v[::2].repeat_interleave(2, 0) for v in (chosen, t, z))
            z[1::2] *= -1
        optimizer.zero_grad()
        regression_loss(problem, net, Batch(x0[chosen], x1[chosen], z, t, y[chosen])).mean().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    for trained in (0, args.iterations * 25):
        for step in range(trained):
            gradient(step)
            optimizer.step()
        one, two = (float(torch.stack([gradient(10 ** 6 + i, pairs) for i in range(40)]).var(0).sum())
                    for pairs in (False, True))
        print(f"after {trained} steps: variance of the gradient {one:.3g} with independent z, {two:.3g} with pairs: "
              f"{one / two:.2f} times less", flush=True)


class SeparateAttention(Attention):
    """The same attention with three matrices and the softmax written out."""

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = (torch.nn.functional.linear(x, w, b).view(B, T, self.heads, -1).transpose(1, 2)
                   for w, b in zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)))
        weights = ((q @ k.transpose(2, 3)) * (D // self.heads) ** -0.5).softmax(3)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, T, D))


def blocks(args):
    net = random_weights(SiT("S", 2, 32, 4, 1000))
    other, batch = copy.deepcopy(net), min(args.batch, 8)
    for block in other.blocks:
        block.attn.__class__ = SeparateAttention
    x, t, y = torch.randn(batch, 4, 32, 32), torch.rand(batch), torch.randint(1000, (batch,))
    with torch.no_grad():
        difference = float((net(x, t, y) - other(x, t, y)).abs().max())
    found = timed(*(lambda n=n: n(x, t, y).square().mean().backward() for n in (net, other)), rounds=args.rounds)
    print(f"SiT-S/2 on 4x32x32, batch {batch}, forward and backward, {torch.get_num_threads()} threads: "
          f"{batch / median(row[0] for row in found):.1f} images a second; separate matrices and unfused attention "
          f"{times(found)}; outputs differ by {difference:.0e}")


# ---------------------------------------------------------------------------------------------------------------------
# Scale

def teacher_step(args, model, device, compiled):
    """One teacher step on random latents in the trainers' precision -> median seconds, peak MiB."""
    net = SiT(*parse_name(model), args.side, args.channels, args.classes).to(device)
    ema, trained = frozen_copy(net), put_in_training(net, torch.optim.AdamW, 1e-4, RATES)
    if compiled:
        net.compile()
    x0, x1 = (torch.randn(args.batch, args.channels, args.side, args.side, device=device) for _ in range(2))
    y = torch.randint(args.classes, (args.batch,), device=device)
    b = Batch(x0, x1, t=torch.rand(args.batch, device=device), y=y)

    def step():
        with precision(device):
            loss = regression_loss(PROBLEM, net, b).mean()
        loss.backward()
        trained.step(RATES, 0)
        ema_update(ema, net, 0.9999, 1)
    return median(row[0] for row in timed(step, rounds=args.iterations, warm_up=3)), peak_memory(device)


def scale(args):
    """What the accelerator makes of SiT on latents: teacher steps and distillation, eager and (on a GPU) compiled in
    the same precision, and one-step samples; peak memory, and the share of the rate of large matrix products."""
    _, _, device = start_processes("auto")
    cuda = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    rate = 2 * n ** 3 / median(row[0] for row in timed(lambda: a @ b, rounds=15, warm_up=5))
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}, {dtype}, matrix rate "
          f"{rate / 1e12:.1f} TFLOP/s, {args.channels}x{args.side}x{args.side}, batch {args.batch}")
    print(f"{'':60}images/s    GiB  of the matrix rate")
    units = {objective: count_units(objective, 5)[0] for objective in ("cross", "gap")}
    for model in args.models.split(","):
        def row(what, units, measure):
            if cuda:
                torch._dynamo.reset()  # its cache is shared by all networks of the process
                gc.collect()  # compiled ones are cycles
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            seconds, peak = measure()
            share = units * args.batch * forward_flops(model, args.side, args.channels) / seconds / rate
            print(f"{f'{model} {what}':60}{args.batch / seconds:8.1f}{peak / 2 ** 10:7.1f}{share:20.0%}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            teacher, net, config = random_teacher(folder, model, args.side, args.channels)
            for way in ("eager", "compiled")[:1 + cuda]:
                row(f"teacher step, {way}", 3, lambda: teacher_step(args, model, device, way == "compiled"))
                for objective, number in units.items():
                    flags = ("--objective", objective, "--k_psi", 5, *["--compile"] * (way == "compiled"))
                    row(f"distillation, {objective}, k_psi 5, {way}", number,
                        lambda: ours(teacher, args, *flags, device=device.type))
        student = {**config, "student": {"times": [0.714], "steps": 1, "cfg_scale": 1.0}}
        net, y = net.to(device), np.arange(args.batch) % 10
        row("one-step samples", 1, lambda: (median(row[0] for row in timed(
            lambda: generate(net, student, y, 0, range(args.batch)), rounds=3)), peak_memory(device)))


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, as they come and go, and remembers their peak."""
    now = peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        known = {id(v.untyped_storage()) for v in tree_leaves((args, kwargs)) if torch.is_tensor(v)}
        out = op(*args, **(kwargs or {}))
        for storage in {id(v.untyped_storage()): v.untyped_storage() for v in tree_leaves(out) if torch.is_tensor(v)
                        and id(v.untyped_storage()) not in known}.values():
            self.now += storage.nbytes()
            weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, size):
        self.now -= size


def rehearse(act, *given):
    """act(*given) on tensors without memory -> what would have been alive at its peak, in bytes."""
    with FakeTensorMode(), Live() as live:
        act(*given)
    return live.peak


class Rehearsal(NamedTuple):
    """How a stage is rehearsed. rounded: in bf16 autocast; several: gradients stay, in the buckets of processes."""
    model: str
    side: int
    channels: int
    classes: int
    batch: int
    cfg_scale: float = 1.0
    rounded: bool = False
    several: bool = False
    recompute: bool = False

    def net(self, trained=False):
        """With gradients where they stay, and with its two moments."""
        net = SiT(*parse_name(self.model), self.side, self.channels, self.classes).eval()
        net.grad_checkpoint = self.recompute
        weights = [p for p in net.parameters() if p.requires_grad]
        for p in weights if trained and self.several else ():
            p.grad = torch.empty_like(p)
        net.moments = [torch.empty_like(p) for p in weights for _ in range(2 * trained)]
        return net.requires_grad_(trained)

    def precision(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.rounded)

    def rows(self):
        x0, x1, z = (torch.randn(self.batch, self.channels, self.side, self.side) for _ in range(3))
        return Batch(x0, x1, z, torch.rand(self.batch), torch.zeros(self.batch, dtype=torch.long))

    def step(self, net):
        net.zero_grad(set_to_none=not self.several)


def rehearse_teacher(how):
    net, _ = how.net(trained=True), how.net()
    with how.precision():
        regression_loss(PROBLEM, net, how.rows()).mean().backward()


def rehearse_distillation(how, objective):
    """The graphs of distill.py's iteration, which is what fills its memory: the student's lives through the critic's
    step, and through those of the guided teacher and the critic in its own."""
    G, psi, teacher, _ = how.net(trained=True), how.net(trained=True), how.net(), how.net()
    with how.precision():
        round_weights(teacher)
    start = start_at(PROBLEM, how.rows(), 0.714)
    with how.precision():
        x0 = PROBLEM.data(G, start)
    with how.precision():
        regression_loss(PROBLEM, psi, how.rows()._replace(x0=x0.detach())).mean().backward()
    how.step(psi)
    with how.precision(), frozen(psi):
        b, v_star = how.rows()._replace(x0=x0.detach().requires_grad_()), guided(teacher, how.cfg_scale)
        loss, _ = distill.student_loss(PROBLEM, distill.OBJECTIVES[objective], v_star, psi, b)
        x0.backward(torch.autograd.grad(loss.mean(), b.x0)[0])


def rehearse_samples(how):
    net, autoencoder, b = how.net(), Autoencoder(latents=how.channels).requires_grad_(False), how.rows()
    with torch.no_grad(), how.precision():
        guided(net, how.cfg_scale)(b.x0, b.t, b.y)
    autoencoder.decode(b.x0)


def rehearse_latents(side):
    Autoencoder().requires_grad_(False).encode(torch.randn(CHUNK, 3, side, side))


def plan(args):
    """Hours, memory and disk of each stage from counted parameters, FLOPs and a rehearsal on tensors without memory:
    nothing is measured but the arithmetic. The card's memory is that of tensors: its context and workspaces come on
    top."""
    forward = forward_flops(args.model, args.side, args.channels, args.classes)
    with torch.device("meta"):
        net, autoencoder = (SiT(*parse_name(args.model), args.side, args.channels, args.classes),
                            Autoencoder(latents=args.channels))
    weights, pixels = sum(p.numel() for p in net.parameters()), autoencoder.factor * args.side
    with torch.device("meta"):
        encode, decode = (flops(lambda: act(torch.empty(1, c, side, side))) / forward for act, c, side in (
            (autoencoder.encode, 3, pixels), (autoencoder.decode, args.channels, args.side)))  # in forward passes
    rate, images = args.gpus * args.tflops * 1e12 * args.mfu, 50000
    print(f"{args.model} on {args.side}x{args.side}x{args.channels}: {weights / 1e6:.1f} M parameters, "
          f"{forward / 1e9:.1f} GFLOP a forward pass of one image; {args.gpus} GPUs of {args.tflops:g} TFLOP/s at "
          f"{100 * args.mfu:.0f} %")
    guided_units = 2 if args.cfg_scale not in (0, 1) else 1
    distill_units = (1 + 2) + args.k_psi * (1 + 2) + (args.k_psi - 1) + guided_units + 1
    how = Rehearsal(args.model, args.side, args.channels, args.classes, 1, args.cfg_scale, True, args.gpus > 1)
    teacher_rows, rows = (max(1, n // args.gpus) for n in (args.teacher_batch, args.batch))
    # Files: weights, their average and two moments; of the distillation those of two networks and an average.
    copy = 4 * weights
    saves = args.iters // 1000  # of which the five newest and every tenth stay
    teacher_file, resume, kept = 4 * copy, 7 * copy, (min(saves, 5) + max(0, saves - 5) // 10) * copy
    pictures = images * 3 * pixels ** 2
    # A process reads its teacher's file whole; what a run goes on from is mapped, once for all, and checked so.
    loading = args.gpus * teacher_file
    latents = args.data_images * 2 * 2 * args.channels * args.side ** 2 * 2  # mirrors, mean and log-variance, float16
    # name, images, forward units an image, trained networks, bytes on the host and the disk, images a card, rehearsal
    table = [(f"latents of {args.data_images:,} images and mirrors", args.data_images, 2 * encode, 0, 0, latents, 0,
              lambda how: rehearse_latents(pixels)),
             ("teacher", args.teacher_iters * args.teacher_batch, 3, 1, teacher_file, 2 * teacher_file, teacher_rows,
              rehearse_teacher)]
    for name, more in (("cross", 0), ("sid", guided_units + 1)):
        table.append((f"distillation ({name}, k_psi {args.k_psi})", args.iters * args.batch, distill_units + more, 2,
                      max(loading, resume), 2 * resume + copy + kept, rows,
                      lambda how, name=name: rehearse_distillation(how, name)))
    table += [("50,000 teacher samples, 250 steps", images, 250 * guided_units + decode, 0, max(loading, 2 * pictures),
               pictures, 100, rehearse_samples),
              ("50,000 student samples", images, 1 + decode, 0, max(args.gpus * copy, 2 * pictures), pictures, 100,
               lambda how: rehearse_samples(how._replace(cfg_scale=1.0)))]
    print(f"{'stage':45}{'units':>7}{'hours':>9}{'GiB a GPU':>11}{'--shard':>9}{'--grad_checkpoint':>19}"
          f"{'host GiB':>10}{'disk GiB':>10}")
    for name, images, units, trained, host, disk, batch, act in table:
        columns = [rehearse(act, how._replace(batch=batch))]
        if trained:
            columns += [columns[0] - 2 * copy * trained * (1 - 1 / args.gpus),
                        rehearse(act, how._replace(batch=batch, recompute=True))]
        cells = [f"{value / 2 ** 30:.1f}" for value in columns] + [""] * (3 - len(columns))
        print(f"{name:45}{units:7.1f}{images * units * forward / rate / 3600:9.1f}"
              + "".join(f"{cell:>{space}}" for cell, space in zip(cells, (11, 9, 19)))
              + f"{host / 2 ** 30:10.1f}{disk / 2 ** 30:10.1f}", flush=True)


COMMANDS = {"iteration": iteration, "maps": maps, "sampling": sampling, "fid": fid_bench, "antithetic": antithetic,
            "blocks": blocks, "plan": plan, "scale": scale, "limit": limit, "errors": errors}
FLAGS = {"model": "SiT-XS/4", "side": 28, "channels": 1, "batch": 64, "iterations": 6, "rounds": 3,
         "images": 2000,  # of limit, errors, and of each side in the whole fid command
         "ckpt": "out/teacher.pt",  # of limit, errors
         "data": "digits",  # of errors
         "models": "SiT-S/2,SiT-B/2,SiT-XL/2",  # of scale
         "gpus": 8, "tflops": 800.0, "mfu": 0.4, "classes": 1000, "cfg_scale": 4.0, "k_psi": 5, "data_images": 1281167,
         "iters": 200000, "teacher_iters": 400000, "teacher_batch": 256}  # of plan


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    for name, default in FLAGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--compile", action="store_true", help="of `iteration`: distill.py runs compiled")
    args = parser.parse_args()
    COMMANDS[args.what](args)


if __name__ == "__main__":
    command(main)
