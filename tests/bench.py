"""Timings, side by side in one process; absolute numbers are this machine's, ratios are what carries over.

    python tests/bench.py iteration     # one distillation iteration against the naive arrangement, and the forward units of both
    python tests/bench.py sampling      # time per image: teacher with 50 and 250 steps, one-step student
    python tests/bench.py antithetic    # variance of a velocity bridge's gradient with and without +-z pairs
    python tests/bench.py blocks        # forward and backward of SiT-S/2 against separate q, k, v and unfused attention
    python tests/bench.py plan --model SiT-XL/2 --side 32 --channels 4 --batch 128 --gpus 8      # memory and hours of each stage
    python tests/bench.py scale --side 32 --channels 4 --batch 64      # on a GPU: teacher step, distillation, samples of S/2, B/2, XL/2
    python tests/bench.py fid           # trace term, Inception passes and the whole command, against pytorch-fid where it is installed

A forward unit is one network pass over one batch; a backward pass costs two more when weights get gradients and one more when
only the input does.
"""
import argparse
import contextlib
import copy
import io
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import scipy
import scipy.linalg
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import distill  # noqa: E402
import fid  # noqa: E402
from distill import OBJECTIVES, generator_loss  # noqa: E402
from interpolants import FAMILIES  # noqa: E402
from model import SIZES, Autoencoder, SiT, build_model, ema_update, frozen_copy, guided, parse_name, save_checkpoint  # noqa: E402
from sample import degrade, generate, one_step, start_noise, start_processes, to_device  # noqa: E402
from train_teacher import CHUNK, draw_digits, make_optimizer, optimizer_step, peak_memory, precision, regression_loss  # noqa: E402

PATH = FAMILIES["linear"]


def random_teacher(folder, model, side, channels):
    """A checkpoint with random weights: the cost of a pass does not depend on them."""
    size, patch = parse_name(model)
    config = {"network": dict(size=size, patch=patch, image_size=side, channels=channels, num_classes=10), "model": model,
              "interpolant": "linear", "prediction": "velocity", "data": "none"}
    torch.manual_seed(0)
    net = build_model(config)
    for p in net.parameters():
        if p.requires_grad and p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02)
    path = pathlib.Path(folder, "teacher.pt")
    save_checkpoint(path, {"config": config, "ema": net.state_dict()})
    return path, net, config


@contextlib.contextmanager
def counted(count):
    """Adds the images that pass through any SiT to count[0]."""
    forward = SiT.forward

    def counting(self, x_t, t, y=None):
        count[0] += len(x_t)
        return forward(self, x_t, t, y)
    SiT.forward = counting
    try:
        yield
    finally:
        SiT.forward = forward


def ours(teacher, folder, args, *flags, device="cpu"):
    """Seconds per iteration of distill.py itself, between the two lines of its log: what comes before the first is warm-up."""
    out = pathlib.Path(folder, "ours")
    argv, sys.argv = sys.argv, ["distill.py", "--teacher_ckpt", str(teacher), "--batch", str(args.batch),
                                "--iters", str(2 * args.iterations), "--log_every", str(args.iterations), "--sample_every", "100000", "--device", device,
                                "--out", str(out), "--fresh", *map(str, flags)]
    log = out / "log.jsonl"
    log.unlink(missing_ok=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            distill.main()
    finally:
        sys.argv = argv
    times = [json.loads(line)["seconds"] for line in log.read_text().splitlines()]
    return [(times[1] - times[0]) / args.iterations]


def naive(net, args, objective, k_psi):
    """The arrangement this project does without: guidance inside the student, so that each of its passes is two, and the student
    run again on the same noise for every critic step."""
    student, critic, teacher = (frozen_copy(net) for _ in range(3))
    student.requires_grad_(True), critic.requires_grad_(True)
    optimizers = [torch.optim.Adam(n.parameters(), 1e-5, betas=(0.0, 0.999), fused=True) for n in (student, critic)]
    shape = (args.batch, net.channels, args.side, args.side)

    def sample(x1, y):
        return one_step(PATH, lambda x, t, y: guided(student, x, t, y, 2.0), "velocity", 0.714, start_noise(PATH, torch.full((len(x1),), 0.714), x1, x1), y)
    times = []
    for i in range(2 * args.iterations):
        began = time.perf_counter()
        start, y = torch.randn(shape), torch.randint(10, (args.batch,))
        for _ in range(k_psi):
            with torch.no_grad():
                x0 = sample(start, y)
            t = torch.rand(args.batch)
            regression_loss(critic, PATH, "velocity", x0, torch.randn(shape), None, t, y).mean().backward()
            optimizers[1].step()
            optimizers[1].zero_grad()
        x0 = sample(start, y)
        leaf = x0.detach().requires_grad_()
        loss, _ = generator_loss(PATH, "velocity", teacher, critic, leaf, torch.randn(shape), None, torch.rand(args.batch), y,
                                 **OBJECTIVES[objective])
        x0.backward(torch.autograd.grad(loss.mean(), leaf)[0])
        optimizers[0].step()
        optimizers[0].zero_grad()
        times.append(time.perf_counter() - began)
    return times[args.iterations:]


def iteration(args):
    with tempfile.TemporaryDirectory() as folder:
        teacher, net, _ = random_teacher(folder, args.model, args.side, args.channels)
        print(f"{args.model} on {args.side}x{args.side}x{args.channels}, batch {args.batch}, {args.rounds} rounds of "
              f"{args.iterations} iterations, {torch.get_num_threads()} threads; medians")
        for objective, k_psi, flags in (("cross", 5, ["--reuse_samples"]), ("cross", 5, []), ("cross", 1, []), ("sid", 1, [])):
            flags = ["--objective", objective, "--k_psi", k_psi, *flags]
            mine, other, ratios = [], [], []
            backward = 2 + 2 * k_psi + (2 if OBJECTIVES[objective]["grad"] == "full" else 0)
            units = []
            for _ in range(args.rounds):  # in turn: a slow moment of the machine meets both
                for times, run in ((mine, lambda: ours(teacher, folder, args, *flags)),
                                   (other, lambda: naive(net, args, objective, k_psi))):
                    count = [0]
                    with counted(count):
                        times.append(statistics.median(run()))
                    units.append(count[0] / args.batch / (2 * args.iterations))
                ratios.append(other[-1] / mine[-1])
            logged = 50 / args.batch / args.iterations  # ours also measures the student's spread for each line of its log
            name = f"{objective} k_psi {k_psi}{' --reuse_samples' * ('--reuse_samples' in flags)}"
            print(f"{name}: {units[0] - logged + backward:.0f} units, {1000 * statistics.median(mine):.0f} ms (and the log's "
                  f"{logged:.2f}); naive {units[1] + backward + 2:.0f} units, {1000 * statistics.median(other):.0f} ms; "
                  f"{statistics.median(ratios):.2f} times cheaper ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def sampling(args):
    with tempfile.TemporaryDirectory() as folder:
        _, net, config = random_teacher(folder, args.model, args.side, args.channels)
        net = net.eval().requires_grad_(False)
        student = {**config, "student": {"t_init": 0.714, "steps": 1, "cfg_scale": 1.0}}
        print(f"{args.model} on {args.side}x{args.side}x{args.channels}, batch {args.batch}, {torch.get_num_threads()} threads; "
              f"medians of {args.rounds}")
        results = {name: [] for name in ("student, 1 step", "teacher, 50 steps", "teacher, 250 steps", "teacher, 50 steps, guided")}
        for r in range(args.rounds + 1):
            for name, (c, steps, scale) in zip(results, ((student, 1, 1.0), (config, 50, 1.0), (config, 250, 1.0), (config, 50, 2.0))):
                began = time.perf_counter()
                generate(net, c, np.arange(args.batch) % 10, r, range(args.batch), steps, cfg_scale=scale)
                if r:  # the first round is warm-up
                    results[name].append((time.perf_counter() - began) / args.batch * 1000)
        for name, times in results.items():
            ratio = statistics.median(t / s for t, s in zip(times, results["student, 1 step"]))
            print(f"{name}: {statistics.median(times):.2f} ms an image, {ratio:.0f} times the student's")


def trace_term(args):
    """frechet() against scipy's square root of the product, as pytorch-fid takes it, on 2048-d covariances of 5,000 features."""
    rng, ratios = np.random.default_rng(0), []
    mix = rng.normal(size=(2048, 2048)) * np.geomspace(1, 1e-2, 2048)
    statistics = [(f.mean(0), np.cov(f, rowvar=False)) for f in (rng.normal(size=(5000, 2048)) @ mix + 1, rng.normal(size=(5000, 2048)) @ mix)]
    (mu_a, a), (mu_b, b) = statistics
    for _ in range(args.rounds):
        began = time.perf_counter()
        ours = fid.frechet(mu_a, a, mu_b, b)
        middle = time.perf_counter()
        root = scipy.linalg.sqrtm(a @ b)
        theirs = (mu_a - mu_b) @ (mu_a - mu_b) + np.trace(a) + np.trace(b) - 2 * np.trace(np.real(root))
        ratios.append((time.perf_counter() - middle) / (middle - began))
    print(f"trace term, 2048 dimensions: {middle - began:.1f} s, scipy {scipy.__version__} sqrtm {ratios[-1]:.1f} times as long "
          f"({min(ratios):.1f} to {max(ratios):.1f}); relative difference {abs(ours / theirs - 1):.1e}", flush=True)


def inception_passes(args, weights):
    """Images per second through both networks, in turn."""
    import pytorch_fid.inception as other
    other.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
    theirs, ours = other.InceptionV3([3]).eval(), fid.load_inception(weights)
    x = torch.randint(0, 256, (args.batch, 3, 32, 32), dtype=torch.uint8)
    ratios = []
    with torch.no_grad():
        for r in range(args.rounds + 1):
            began = time.perf_counter()
            ours(fid.inception_input(x, "torch"))
            middle = time.perf_counter()
            theirs(x.float() / 255)
            ratios += [(time.perf_counter() - middle) / (middle - began)] if r else []
    print(f"Inception: {args.batch / (middle - began):.1f} images a second, {statistics.median(ratios):.2f} times pytorch-fid's "
          f"({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def whole_command(args, weights, folder):
    """fid.py and python -m pytorch_fid on the same two folders of PNGs, each in a process of its own, in turn."""
    images, _ = draw_digits(2 * args.images, 32)
    rng = np.random.default_rng(0)
    for name, part in (("a", images[:args.images]), ("b", images[args.images:])):
        (folder / name).mkdir()
        for i, image in enumerate(part):
            noise = rng.normal(0, 10 if name == "b" else 5, (32, 32, 3))
            Image.fromarray(np.clip(image * [1.0, 0.8, 0.6] + noise, 0, 255).astype(np.uint8)).save(folder / name / f"{i:05d}.png")
    hub = folder / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    shutil.copy(weights, hub / fid.WEIGHTS[0].rsplit("/", 1)[1])
    commands = {"fid.py": [str(pathlib.Path(fid.__file__)), "a", "b", "--weights", str(weights), "--resize", "torch", "--json", "f.json"],
                "pytorch_fid": ["-m", "pytorch_fid", "a", "b", "--device", "cpu"]}
    seconds, values = {name: [] for name in commands}, {}
    for _ in range(args.rounds):
        for name, command in commands.items():
            began = time.perf_counter()
            done = subprocess.run([sys.executable, "-W", "ignore", *command], cwd=folder, capture_output=True, text=True, check=True,
                                  env={**os.environ, "TORCH_HOME": str(folder)})
            seconds[name].append(time.perf_counter() - began)
            values[name] = json.loads((folder / "f.json").read_text())["fid"] if name == "fid.py" else float(done.stdout.split()[-1])
    ours, theirs = (statistics.median(s) for s in seconds.values())
    print(f"whole command, {args.images} + {args.images} images of 32x32: {ours:.0f} s, pytorch-fid {theirs:.0f} s, {theirs / ours:.2f} "
          f"times as long; {values['fid.py']:.8f} and {values['pytorch_fid']:.8f}")


def fid_bench(args):
    from conftest import inception_weights
    print(f"batch {args.batch}, {args.rounds} rounds, {torch.get_num_threads()} threads")
    trace_term(args)
    with tempfile.TemporaryDirectory() as folder:
        weights = pathlib.Path(folder, "weights.pth")
        torch.save(inception_weights(), weights)
        try:
            inception_passes(args, weights)
        except ImportError:
            print("pytorch-fid is not installed: no comparison of passes and commands")
        else:
            whole_command(args, weights, pathlib.Path(folder))


def antithetic(args):
    """Variance of a velocity bridge's gradient: a batch of independent z against pairs of z and -z, and in the end at equal passes."""
    images, labels = draw_digits(args.batch * 40, 28)
    x0 = to_device(images, "cpu")
    x1 = to_device(degrade("lowres4", images), "cpu")
    size, patch = parse_name(args.model)
    torch.manual_seed(0)
    net = build_model({"network": dict(size=size, patch=patch, image_size=28, channels=1, num_classes=10, reference_channels=1)})
    path, optimizer = FAMILIES["bridge"], torch.optim.AdamW(net.parameters(), 1e-3)
    y = torch.from_numpy(labels)

    def gradient(seed, pairs):
        g = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(x0), (args.batch,), generator=g)
        z, t = torch.randn(args.batch, 1, 28, 28, generator=g), 1e-3 + 0.998 * torch.rand(args.batch, generator=g)
        if pairs:
            chosen, t, z = (v[::2].repeat_interleave(2, 0) for v in (chosen, t, z))
            z[1::2] *= -1
        optimizer.zero_grad()
        regression_loss(net, path, "velocity", x0[chosen], x1[chosen], z, t, y[chosen], True).mean().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    for trained in (0, args.iterations * 25):
        for step in range(trained):
            gradient(step, False)
            optimizer.step()
        variance = {}
        for pairs in (False, True):
            gradients = torch.stack([gradient(10 ** 6 + i, pairs) for i in range(40)])
            variance[pairs] = float(gradients.var(0).sum())
        print(f"after {trained} steps: variance of the gradient {variance[False]:.3g} with independent z, {variance[True]:.3g} with pairs "
              f"(same number of passes): {variance[False] / variance[True]:.2f} times less", flush=True)


class SeparateAttention(torch.nn.Module):
    """The same attention with three matrices and the softmax written out."""

    def __init__(self, other):
        super().__init__()
        width = other.proj.in_features
        self.heads, self.proj = other.heads, other.proj
        self.q, self.k, self.v = (torch.nn.Linear(width, width) for _ in range(3))
        for layer, w, b in zip((self.q, self.k, self.v), other.qkv.weight.data.chunk(3), other.qkv.bias.data.chunk(3)):
            layer.weight.data, layer.bias.data = w.clone(), b.clone()

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = (layer(x).view(B, T, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = ((q @ k.transpose(2, 3)) * (D // self.heads) ** -0.5).softmax(3)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, T, D))


def blocks(args):
    """Forward and backward of SiT-S/2 on 4x32x32 latents against the same blocks with separate matrices and unfused attention."""
    net = SiT("S", 2, 32, 4, 1000)
    for p in net.parameters():
        if p.requires_grad and p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02)
    other = copy.deepcopy(net)
    for block in other.blocks:
        block.attn = SeparateAttention(block.attn)
    batch = min(args.batch, 8)
    x, t, y = torch.randn(batch, 4, 32, 32), torch.rand(batch), torch.randint(1000, (batch,))
    times = {net: [], other: []}
    with torch.no_grad():
        difference = float((net(x, t, y) - other(x, t, y)).abs().max())
    for r in range(args.rounds + 1):
        for n in times:
            began = time.perf_counter()
            n(x, t, y).square().mean().backward()
            times[n] += [time.perf_counter() - began] if r else []
    ratios = [b / a for a, b in zip(times[net], times[other])]
    print(f"SiT-S/2 on 4x32x32, batch {batch}, forward and backward, {torch.get_num_threads()} threads: {batch / statistics.median(times[net]):.1f} "
          f"images a second; separate matrices and unfused attention {statistics.median(ratios):.2f} times as long ({min(ratios):.2f} to "
          f"{max(ratios):.2f}); outputs differ by {difference:.0e}")


def matrix_rate(device):
    """TFLOP/s of a bf16 product of two large matrices (float32 elsewhere than on CUDA)."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = [timed(lambda: a @ b, device) for _ in range(20)]
    return 2 * n ** 3 / statistics.median(times[5:]) / 1e12


def timed(action, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def teacher_step(model, args, device, compiled):
    """Seconds of one teacher step on random latents: bf16 autocast and torch.compile, or eager TF32. -> median, peak GiB."""
    size, patch = parse_name(model)
    net = SiT(size, patch, args.side, args.channels, args.classes).to(device)
    ema, optimizer = frozen_copy(net), make_optimizer(torch.optim.AdamW, net, 1e-4, device)
    torch.set_float32_matmul_precision("high")
    if compiled:
        net.compile()
    batch = [torch.randn(args.batch, args.channels, args.side, args.side, device=device) for _ in range(2)]
    t, y = torch.rand(args.batch, device=device), torch.randint(args.classes, (args.batch,), device=device)

    def step():
        with precision(device) if compiled else contextlib.nullcontext():
            loss = regression_loss(net, PATH, "velocity", *batch, None, t, y).mean()
            loss.backward()
        optimizer_step(optimizer, net, 1e-4, 1.0, wait=device.type != "cuda")
        ema_update(ema, net, 0.9999, 1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [timed(step, device) for _ in range(args.iterations + 3)]
    return statistics.median(times[3:]), peak_memory(device) / 2 ** 10


def scale(args):
    """What the accelerator makes of SiT on latents: teacher step, distillation iteration, one-step samples; the goals are XL/2's teacher
    step at 45 % of the card's matrix rate and 3 times eager TF32."""
    rank, world, device = start_processes("auto")
    rate = matrix_rate(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, matrix rate {rate:.1f} TFLOP/s, {args.channels}x{args.side}x{args.side}, batch {args.batch}")
    for model in args.models.split(","):
        size, patch = parse_name(model)
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            SiT(size, patch, args.side, args.channels, args.classes)(torch.empty(1, args.channels, args.side, args.side), torch.empty(1),
                                                                      torch.empty(1, dtype=torch.long))
        flops = 3 * counter.get_total_flops()
        eager, eager_peak = teacher_step(model, args, device, False)
        fast, peak = teacher_step(model, args, device, True)
        print(f"{model} teacher step: {args.batch / fast:.1f} images/s, {peak:.1f} GiB, {flops * args.batch / fast / rate / 1e12:.0%} of the matrix rate; "
              f"eager TF32 {fast and eager / fast:.2f} times as long, {eager_peak:.1f} GiB", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            teacher, net, config = random_teacher(folder, model, args.side, args.channels)
            for objective in ("cross", "gap"):
                seconds = ours(teacher, folder, args, "--objective", objective, "--k_psi", 5, *["--compile"] * (device.type == "cuda"), device=device.type)[0]
                print(f"{model} distillation iteration, {objective}, k_psi 5: {args.batch / seconds:.1f} images/s", flush=True)
            net = net.to(device).eval().requires_grad_(False)
            student = {**config, "student": {"times": [0.714], "steps": 1, "cfg_scale": 1.0}}
            times = [timed(lambda: generate(net, student, np.arange(args.batch) % 10, r, range(args.batch)), device) for r in range(4)]
            print(f"{model} one-step samples: {args.batch / statistics.median(times[1:]):.1f} images/s", flush=True)


def plan(args):
    """Memory and hours of each stage from counted parameters and FLOPs: nothing is measured but the arithmetic."""
    size, patch = parse_name(args.model)
    with torch.device("meta"):
        net = SiT(size, patch, args.side, args.channels, args.classes)
        inputs = torch.empty(1, args.channels, args.side, args.side), torch.empty(1), torch.empty(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            net(*inputs)
        autoencoder = Autoencoder(latents=args.channels)
        with FlopCounterMode(display=False) as encoding:
            autoencoder.encode(torch.empty(1, 3, autoencoder.factor * args.side, autoencoder.factor * args.side))
        with FlopCounterMode(display=False) as decoding:
            autoencoder.decode(inputs[0])
    weights, forward = sum(p.numel() for p in net.parameters()), counter.get_total_flops()
    encode, decode = (c.get_total_flops() / forward for c in (encoding, decoding))  # in units of a forward pass of the network
    converter = sum(p.numel() for p in autoencoder.parameters())
    # Its widest level at full size: input, hidden layer and output of a block, in float32.
    level = 3 * 4 * 128 * (autoencoder.factor * args.side) ** 2
    width, depth, _ = SIZES[size]
    tokens = (args.side // patch) ** 2
    # Bytes kept for a backward pass in bf16, for each token and channel: 34 a block without attention's matrix (arXiv:2205.05198,
    # section 4.1), 2 a block and those of one block if blocks are recomputed.
    kept, recomputed = 34 * tokens * width * depth, tokens * width * (2 * depth + 34)
    rate = args.gpus * args.tflops * 1e12 * args.mfu
    print(f"{args.model} on {args.side}x{args.side}x{args.channels}: {weights / 1e6:.1f} M parameters, {forward / 1e9:.1f} GFLOP a forward pass of one image; "
          f"{args.gpus} GPUs of {args.tflops:g} TFLOP/s at {100 * args.mfu:.0f} %")
    # name, images in all, forward units an image, networks in memory with moments, frozen ones, images a GPU at a time
    guided_units = 2 if args.cfg_scale not in (0, 1) else 1
    distill_units = (1 + 2) + args.k_psi * (1 + 2) + (args.k_psi - 1) + guided_units + 1
    rows = [(f"latents of {args.data_images:,} images and mirrors", args.data_images, 2 * encode, 0, 0, CHUNK),
            ("teacher", args.teacher_iters * args.teacher_batch, 3, 1, 1, args.teacher_batch / args.gpus),
            (f"distillation (cross, k_psi {args.k_psi})", args.iters * args.batch, distill_units, 2, 2, args.batch / args.gpus),
            ("50,000 teacher samples, 250 steps", 50000, 250 * guided_units + decode, 0, 1, 8), ("50,000 student samples", 50000, 1 + decode, 0, 1, 8)]
    print(f"{'stage':45}{'units':>7}{'hours':>9}{'GiB a GPU':>11}{'--shard':>9}{'--grad_checkpoint':>19}")
    for name, images, units, trained, frozen, per_gpu in rows:
        fixed = 4 * weights * (4 * trained + frozen)  # weights, gradients and two moments in float32; frozen: weights
        shard = fixed - 8 * weights * trained * (1 - 1 / args.gpus)
        if not trained:  # the autoencoder works here, on so many images at a time
            print(f"{name:45}{units:7.1f}{images * units * forward / rate / 3600:9.1f}{(fixed + 4 * converter + level * per_gpu) / 2 ** 30:11.1f}")
            continue
        held = per_gpu
        print(f"{name:45}{units:7.1f}{images * units * forward / rate / 3600:9.1f}{(fixed + kept * held) / 2 ** 30:11.1f}"
              f"{(shard + kept * held) / 2 ** 30:9.1f}{(fixed + recomputed * held) / 2 ** 30:19.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("iteration", "sampling", "fid", "antithetic", "blocks", "plan", "scale"))
    parser.add_argument("--model", default="SiT-XS/4")
    parser.add_argument("--side", type=int, default=28)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--images", type=int, default=2000, help="of each side in the whole fid command")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default="SiT-S/2,SiT-B/2,SiT-XL/2", help="networks of scale")
    group = parser.add_argument_group("plan (with --model SiT-XL/2 --side 32 --channels 4 --batch 128)")
    for name, kind, default in (("gpus", int, 8), ("tflops", float, 800.0), ("mfu", float, 0.4), ("classes", int, 1000), ("cfg_scale", float, 4.0),
                                ("k_psi", int, 5), ("iters", int, 200000), ("teacher_iters", int, 400000), ("teacher_batch", int, 256),
                                ("data_images", int, 1281167)):
        group.add_argument(f"--{name}", type=kind, default=default)
    args = parser.parse_args()
    {"iteration": iteration, "sampling": sampling, "fid": fid_bench, "antithetic": antithetic, "blocks": blocks, "plan": plan, "scale": scale}[args.what](args)


if __name__ == "__main__":
    main()
