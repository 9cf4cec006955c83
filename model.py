"""SiT, the Scalable Interpolant Transformer (arXiv:2401.08740; blocks from DiT, arXiv:2212.09748), and its state on disk.

net(x_t, t, y, x1) takes x_t (B,C,H,W), t (B,) in [0, 1] with t = 0 data, labels y (B,) or None, and x1 (B,C,H,W) where it was
built to see the reference of a bridge, and returns (B,C,H,W) in the prediction units named by its checkpoint's configuration. State-dict names are those of the released SiT and DiT weights.
"""
import argparse
import contextlib
import copy
import datetime
import hashlib
import json
import math
import os
import pathlib
import pickle
import re
import sys
import tempfile
import time
import warnings
import zipfile

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

SIZES = {  # width, depth, heads: S to XL as published, the two smallest for CPUs
    "XXS": (64, 3, 2),
    "XS": (128, 4, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


class UserError(Exception):
    """A mistake of the user's, or of a file given by the user. The scripts print it as one line and exit with code 2: the first
    process does, unless another one met it alone (everywhere = False)."""
    everywhere = True


# ---------------------------------------------------------------------------------------------------------------------
# The network

def sincos_positions(width, side):
    """Fixed 2-D sin-cos position embedding of a side x side grid -> (1, side*side, width). Column index fills the first half."""
    frequency = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency  # (side, width/4)
    line = torch.cat([angle.sin(), angle.cos()], 1)  # (side, width/2)
    columns, rows = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], 2).reshape(1, side * side, width).float()


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PatchEmbed(nn.Module):
    def __init__(self, channels, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (B,C,H,W) -> (B,T,D)


class TimestepEmbedder(nn.Module):
    def __init__(self, width, frequencies=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.half = frequencies // 2

    def forward(self, t):
        frequency = torch.exp(-math.log(10000) / self.half * torch.arange(self.half, dtype=torch.float32, device=t.device))
        angle = t.float()[:, None] * frequency  # (B,128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], 1))  # (B,D)


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)  # the null class comes last

    def forward(self, y):
        return self.embedding_table(y)  # (B,) -> (B,D)


class Attention(nn.Module):
    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each (B,heads,T,D/heads)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)  # (B,heads,T,D/heads)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))  # (B,T,D)


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # (B,T,D) -> (B,T,4D) -> (B,T,D)


class Block(nn.Module):
    """A transformer block whose norms are shifted, scaled and gated by the condition (AdaLN-Zero)."""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, 1)  # each (B,D)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))  # (B,T,D)
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))  # (B,T,D)


class FinalLayer(nn.Module):
    def __init__(self, width, patch, channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, 1)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (B,T,D) -> (B,T,p*p*C)


class SiT(nn.Module):
    """size: a key of SIZES. num_classes 0 is unconditional. time_scale multiplies t before its sinusoids. precondition is
    None or three lists, the network's c_in, c_skip and c_out on a uniform grid of t (interpolants.preconditioning).
    reference_channels: channels of x1 that are joined to x_t; with 0 a given x1 is ignored. Released weights count time otherwise:
    reverse_time gives -net(x, 1 - t), and timesteps are the times at which a discrete network was at step 0, 1, 2, ..."""

    def __init__(self, size="S", patch=2, image_size=32, channels=4, num_classes=1000, qk_norm=False, time_scale=1000.0,
                 precondition=None, reference_channels=0, reverse_time=False, timesteps=None):
        super().__init__()
        width, depth, heads = SIZES[size]
        for name, value, least in (("patch", patch, 1), ("image_size", image_size, 1), ("channels", channels, 1), ("num_classes", num_classes, 0),
                                   ("reference_channels", reference_channels, 0), ("time_scale", time_scale, 1e-6)):
            if not isinstance(value, (int, float) if name == "time_scale" else int) or not least <= value <= 1e9:
                raise ValueError(f"{name} {value!r:.40}")
        if image_size % patch:
            raise UserError(f"image size {image_size} is not a multiple of the patch size {patch}: "
                            f"use {image_size // patch * patch or patch} or another patch")
        self.patch, self.channels, self.num_classes, self.time_scale = patch, channels, num_classes, time_scale
        self.grad_checkpoint = False  # set it to keep only the blocks' inputs for the backward pass
        self.width, self.reference_channels, self.reverse_time = width, reference_channels, reverse_time
        self.x_embedder = PatchEmbed(channels + reference_channels, patch, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.pos_embed = nn.Parameter(sincos_positions(width, image_size // patch), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads, qk_norm) for _ in range(depth)])
        self.final_layer = FinalLayer(width, patch, channels)
        scales, timesteps = (None if table is None else torch.tensor(table, dtype=torch.float32, device="cpu") for table in (precondition, timesteps))
        for name, table, rows in (("precondition", scales, (3,)), ("timesteps", timesteps, ())):  # (3,K), (K,)
            if table is not None and (table.shape[:-1] != rows or table.ndim == 0 or table.shape[-1] < 2 or not table.isfinite().all()):
                raise ValueError(f"{name} of shape {tuple(table.shape)}, or not finite")
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("timesteps", timesteps, persistent=False)
        self.initialize()

    def initialize(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                nn.init.zeros_(module.bias)
        for weight in (self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        # DiT starts labels at 0.02 as well; behind zero gates that hides the class for hundreds of iterations.
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=1.0)
        # Zero gates make every block the identity at first, and a zero last layer makes the first prediction 0.
        for module in [block.adaLN_modulation[1] for block in self.blocks] + [self.final_layer.adaLN_modulation[1],
                                                                              self.final_layer.linear]:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, x_t, t, y=None, x1=None, middle=False):
        """middle: stop after half of the blocks and return their tokens (B,T,D), for a discriminator's head."""
        B, C, H, W = x_t.shape
        p = self.patch
        if y is None:
            y = torch.full((B,), self.num_classes, dtype=torch.long, device=x_t.device)
        x = x_t
        if self.scales is not None:
            c_in, c_skip, c_out = self.lookup(t)
            x = c_in * x
        if self.reference_channels:
            x = torch.cat([x, x1], 1)  # (B,C+C,H,W)
        x = self.x_embedder(x) + self.pos_embed  # (B,T,D), T = (H/p)(W/p)
        c = self.t_embedder(self.clock(t)) + self.y_embedder(y)  # (B,D)
        for block in self.blocks[:len(self.blocks) // 2] if middle else self.blocks:
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False)  # (B,T,D)
            else:
                x = block(x, c)  # (B,T,D)
        if middle:
            return x
        x = self.final_layer(x, c).float()  # (B,T,p*p*C)
        x = x.view(B, H // p, W // p, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)
        x = -x if self.reverse_time else x
        return x if self.scales is None else c_skip * x_t + c_out * x

    def clock(self, t):
        """t (B,) as the sinusoids count it."""
        if self.timesteps is not None:  # a discrete network between its steps
            i = torch.searchsorted(self.timesteps, t.float().contiguous()).clamp(1, len(self.timesteps) - 1)
            low, high = self.timesteps[i - 1], self.timesteps[i]
            return (i - 1 + (t - low) / (high - low)).clamp(0, len(self.timesteps) - 1)
        return self.time_scale * (1 - t if self.reverse_time else t)

    def lookup(self, t):
        """c_in, c_skip, c_out at t, each (B,1,1,1), by linear interpolation of the table."""
        u = t.clamp(0, 1) * (self.scales.shape[1] - 1)
        i = u.floor().long().clamp(max=self.scales.shape[1] - 2)
        return torch.lerp(self.scales[:, i], self.scales[:, i + 1], u - i)[..., None, None, None].unbind(0)


def guided(net, x_t, t, y, scale, x1=None, interval=(0.0, 1.0)):
    """Classifier-free guidance (arXiv:2207.12598) on all channels: null + scale (conditional - null), one concatenated pass.
    scale 1 is the plain conditional network (no second pass), 0 the unconditional one. Outside the interval of t it is 1
    (arXiv:2404.07724)."""
    given = () if x1 is None else (x1,)
    num_classes = getattr(net, "module", net).num_classes  # the network may be wrapped for several processes
    if scale == 1 or num_classes == 0:
        return net(x_t, t, y, *given)
    everywhere = interval[0] <= 0 and interval[1] >= 1
    if scale == 0 and everywhere:
        return net(x_t, t, None, *given)
    null = torch.full_like(y, num_classes)
    twice = [torch.cat([v, v]) for v in given]
    conditional, unconditional = net(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([y, null]), *twice).chunk(2)
    result = unconditional + scale * (conditional - unconditional)
    if everywhere:
        return result
    inside = (t >= interval[0]) & (t <= interval[1])
    return torch.where(inside.reshape(-1, *[1] * (x_t.ndim - 1)), result, conditional)


def parse_name(name):
    """'SiT-XL/2' -> ('XL', 2)."""
    match = re.fullmatch(r"SiT-([A-Z]+)/([1-9]\d*)", name)
    if not match or match[1] not in SIZES:
        raise UserError(f"--model {name}: unknown network, choose SiT-SIZE/PATCH with a size of {', '.join(SIZES)}, such as SiT-S/2")
    return match[1], int(match[2])


# ---------------------------------------------------------------------------------------------------------------------
# Moving averages

def frozen_copy(net):
    """A copy that is never trained: for averages, teachers and references."""
    return copy.deepcopy(net).eval().requires_grad_(False)


@torch.no_grad()
def ema_update(ema, net, decay, step):
    """ema <- decay ema + (1 - decay) net, in place. The decay warms up with the step, so early averages are not noise."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: plain dicts of tensors, numbers, strings and lists

def checksum(content):
    """sha256 over a nested dict's or list's keys, values and tensors: notices a flipped bit that still loads."""
    digest = hashlib.sha256()

    def add(value):
        if torch.is_tensor(value):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, dict):
            for key, inner in value.items():
                digest.update(repr(key).encode())
                add(inner)
        elif isinstance(value, (list, tuple)):
            digest.update(f"{len(value)}".encode())
            for inner in value:
                add(inner)
        else:
            digest.update(repr(value).encode())
    add(content)
    return digest.hexdigest()


def not_finite(content, name=""):
    """The name of the first tensor in a nested dict or list that holds a NaN or an infinity, None where there is none."""
    if torch.is_tensor(content):
        return None if not content.is_floating_point() or bool(content.isfinite().all()) else name
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, (list, tuple)) else ()
    return next(filter(None, (not_finite(value, f"{name}.{key}".lstrip(".")) for key, value in items)), None)


def save_checkpoint(path, content):
    """Write beside the target, flush to disk, then replace: the last good file is whole until the new one is. A checksum goes with it.
    Raises UserError, with nothing written, if a number is not finite."""
    sick = not_finite(content)
    if sick:
        raise UserError(f"iteration {content.get('step')}: {sick} is not finite; {path} is untouched: run the same command again, with a lower --lr "
                        "if this comes back")
    path, content = pathlib.Path(path), {**content, "checksum": checksum(content)}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=path.name + ".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            try:
                torch.save(content, f)
            except RuntimeError as error:  # how its archive writer ends after the disk's own error
                raise error.__context__ if isinstance(error.__context__, OSError) else error
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are for the owner alone
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def check_tensors(content):
    """ValueError where a tensor claims more than was read for it, or is of no plain kind, or a structure unfolds without end: a small file
    could ask for any amount of memory or time."""
    level, count = [content], 0
    for _ in range(100):
        deeper = []
        for value in level:
            if torch.is_tensor(value):
                if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_nested or (
                        value.nbytes > value.untyped_storage().nbytes()):
                    raise ValueError(f"a tensor of shape {tuple(value.shape)} has no numbers of its own")
            elif isinstance(value, (dict, list, tuple)):
                count += len(value)
                if count > 1_000_000:
                    raise ValueError("more than a million values")
                deeper += value.values() if isinstance(value, dict) else value
        if not deeper:
            return
        level = deeper
    raise ValueError("more than 100 levels")


def load_checkpoint(path):
    """-> dict on the CPU. Raises UserError for a file that is missing, cut off, no checkpoint, or a pickle with code in it."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file" if not path.exists() else f"{path}: is a folder, not a checkpoint" if path.is_dir() else
                        f"{path}: is no file")
    with open(path, "rb") as f:
        if f.read(100).lstrip().startswith(b"<"):
            raise UserError(f"{path}: is a web page, not a checkpoint: a download that went wrong, fetch it again")
    archive = None
    try:
        if zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:  # torch never compresses
                raise ValueError("it unpacks to more than its size")
            if any(member.external_attr & 16 for member in archive.infolist()):  # the mark of a folder, which torch reads as zeros
                raise ValueError("a folder where a file should be")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: what matters is whether it loads
            # Released training checkpoints hold their flags in a Namespace: a bag of values, the one class that is let in.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
        check_tensors(content)
        promised = content.pop("checksum", None) if isinstance(content, dict) else None
        found = checksum(content) if promised is not None else None
        if promised is None and archive and archive.testzip():  # other people's files have no checksum, but a CRC for each member
            raise ValueError("a wrong CRC")
    except pickle.UnpicklingError as error:
        unsafe = "GLOBAL" in str(error) or "Unsupported class" in str(error) or "operand" in str(error)
        raise UserError(f"{path}: holds Python objects, not just weights; refused, nothing was executed" if unsafe
                        else f"{path}: not a checkpoint") from None
    except Exception as error:  # a damaged file can fail in any way
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise UserError(f"{path}: there is not enough memory to read it") from None
        raise UserError(f"{path}: not a checkpoint, or cut off before its end, or damaged") from None
    finally:
        if archive:
            archive.close()
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint of this project")
    if promised != found:
        raise UserError(f"{path}: damaged: its content does not match its checksum; use another copy, or start over with --fresh")
    return content


def load_model(path, device="cpu"):
    """A checkpoint of either trainer -> (net, config): the averaged network, frozen, and its plain-dict configuration."""
    content = load_checkpoint(path)
    released = next((w for w in (content, content.get("ema"), content.get("model")) if isinstance(w, dict) and set(LAYOUT) <= w.keys()), None)
    if "config" not in content and released is not None:
        content = read_released(released, path)
    if not {"config", "ema"} <= content.keys():
        raise UserError(f"{path}: not a checkpoint of this project (it has no configuration)")
    try:
        network = content["config"]["network"]
        if not {"channels", "num_classes"} <= network.keys() or network["image_size"] % network["patch"]:
            raise ValueError("sizes that are missing, or do not divide")
        net = build_checked(lambda: build_model(content["config"]), content["ema"], path)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path}: its configuration describes no network of this project ({type(error).__name__}: {error!s:.200})") from None
    return net.to(device).eval().requires_grad_(False), content["config"]


LAYOUT = ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "y_embedder.embedding_table.weight", "pos_embed", "final_layer.linear.weight")


def read_released(state, path):
    """The published SiT (arXiv:2401.08740) and DiT (arXiv:2212.09748) weights -> {"config", "ema"} of this project.

    Both have one layout, whose sizes follow from its shapes; which of the two it is, the file's name must say. SiT counts time from
    noise to data on the linear path: our network returns -v(x, 1 - t). DiT predicts noise at 1000 steps of the linear schedule, beta from
    1e-4 to 0.02; each step is served at the time where the vp row has the same abar. Predicted variances are dropped."""
    name = pathlib.Path(path).name
    family = "DiT" if "dit" in name.lower() else "SiT" if "sit" in name.lower() else None
    if family is None:
        raise UserError(f"{path}: released weights of SiT and DiT look alike; name the file after the one it is, such as SiT-XL-2-256x256.pt")
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        size = next((size for size, row in SIZES.items() if row[:2] == (width, depth)), None)
        if size is None:
            raise UserError(f"{path}: {depth} blocks of width {width} are none of {', '.join(SIZES)}")
        side = patch * math.isqrt(state["pos_embed"].shape[1])
        state = dict(state)
        for kind in ("weight", "bias"):
            value = state[f"final_layer.linear.{kind}"]  # rows are ordered (pixel of the patch, channel)
            state[f"final_layer.linear.{kind}"] = value.view(patch ** 2, -1, *value.shape[1:])[:, :channels].flatten(0, 1)
        num_classes = len(state["y_embedder.embedding_table.weight"]) - 1
    except (ValueError, RuntimeError, KeyError, AttributeError, IndexError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path}: its shapes are not those of {family} ({error})") from None
    network = {"size": size, "patch": patch, "image_size": side, "channels": channels, "num_classes": num_classes, "time_scale": 1.0}
    if family == "SiT":
        network["reverse_time"] = True
    else:
        log_abar = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().log1p().cumsum(0)
        # The vp row has log abar = -(0.1 t + 9.95 t^2): solved for t.
        network["timesteps"] = ((-0.1 + (0.01 - 4 * 9.95 * log_abar).sqrt()) / (2 * 9.95)).tolist()
    return {"ema": state, "config": {"network": network, "model": f"{family}-{size}/{patch}", "data": "imagenet",
                                     "latent": {"autoencoder": None, "image_size": 8 * side},
                                     **({"interpolant": "linear", "prediction": "velocity"} if family == "SiT" else
                                        {"interpolant": "vp", "prediction": "noise"})}}


def load_weights(net, state, path, assign=False):
    try:
        net.load_state_dict(state, strict=True, assign=assign)
    except (RuntimeError, TypeError, AttributeError) as error:
        keys = state.keys() if isinstance(state, dict) else ()
        missing, extra = (next(iter(sorted(names, key=str)), None) for names in (net.state_dict().keys() - keys, keys - net.state_dict().keys()))
        reason = (f"missing {missing or 'nothing'}, unexpected {extra or 'nothing'}" if missing or extra else
                  str(error).splitlines()[-1].strip()[:200])
        raise UserError(f"{path}: its weights do not fit its configuration ({reason})") from None


def build_checked(make, state, path):
    """make() with these weights. It is made without memory and then given them, if their shapes are right: sizes in a file may ask for any
    amount of it, and random numbers need not be drawn to be overwritten."""
    with torch.device("meta"):
        net = make()
    load_weights(net, state, path, assign=True)
    if not all(p.is_floating_point() for p in net.parameters()):
        raise ValueError("weights that are whole numbers")
    return net.float()


def build_model(config):
    """config["network"] holds the arguments of SiT."""
    return SiT(**config["network"])


# ---------------------------------------------------------------------------------------------------------------------
# Safetensors: 8 bytes of length, a JSON header, raw tensors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def load_safetensors(path):
    """-> dict of tensors on the CPU. Every length and offset of the header is checked against the file before it is used: tensors lie
    side by side from the first byte to the last, as the format demands."""
    size = pathlib.Path(path).stat().st_size

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("its header has a name twice")
        return dict(pairs)
    try:
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= min(size - 8, 10_000_000):
                raise ValueError(f"its header claims {length} bytes of {size}")
            header = json.loads(f.read(length), object_pairs_hook=unique)
            header.pop("__metadata__", None)
            tensors, end = {}, 0
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                start, stop = entry["data_offsets"]
                shape, dtype = entry["shape"], DTYPES[entry["dtype"]]
                numbers = math.prod(shape) * dtype.itemsize if all(isinstance(n, int) and n >= 0 for n in shape) else -1
                if start != end or stop - start != numbers or not isinstance(stop, int) or stop > size - 8 - length:
                    raise ValueError(f"{name} claims bytes {start} to {stop} of {size - 8 - length} for {entry['dtype']} of shape {shape}")
                tensors[name] = torch.frombuffer(bytearray(f.read(numbers) or b"\0"), dtype=torch.uint8)[:numbers].view(dtype).view(shape)
                end = stop
            if end != size - 8 - length:
                raise ValueError(f"{size - 8 - length - end} bytes are nobody's")
    except OSError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        reason = error if type(error) is ValueError else f"{type(error).__name__} {error}"
        raise UserError(f"{path}: not a safetensors file, or cut off ({str(reason)[:200]})") from None
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# The latent autoencoder: Stable Diffusion's KL autoencoder (arXiv:2112.10752), names as in diffusers

LATENT_SCALE = 0.18215  # makes its latents of about unit size


class Resnet(nn.Module):
    def __init__(self, inputs, width, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inputs, eps=1e-6), nn.Conv2d(inputs, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, width, eps=1e-6), nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, width, 1) if inputs != width else None

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class PixelAttention(nn.Module):
    """One head over all positions."""

    def __init__(self, width, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B,HW,C)
        h = F.scaled_dot_product_attention(*(layer(h)[:, None] for layer in (self.to_q, self.to_k, self.to_v)))[:, 0]
        return x + self.to_out[0](h).transpose(1, 2).view(B, C, H, W)


class Middle(nn.Module):
    def __init__(self, width, groups):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(width, width, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([PixelAttention(width, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """Resnets at one resolution, then half the side (down), twice the side (up) or nothing."""

    def __init__(self, inputs, width, layers, groups, scale=None):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(inputs if i == 0 else width, width, groups) for i in range(layers)])
        self.scale = scale
        if scale:
            conv = nn.Conv2d(width, width, 3, 2 if scale == "down" else 1, padding=0 if scale == "down" else 1)
            setattr(self, f"{scale}samplers", nn.ModuleList([nn.ModuleDict({"conv": conv})]))

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        if self.scale == "down":
            return self.downsamplers[0]["conv"](F.pad(x, (0, 1, 0, 1)))  # padded on the right and below only
        return self.upsamplers[0]["conv"](F.interpolate(x, scale_factor=2.0)) if self.scale == "up" else x


class Encoder(nn.Module):
    def __init__(self, channels, latents, widths, layers, groups):
        super().__init__()
        inputs, last = [widths[0], *widths], len(widths) - 1
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList([Level(inputs[i], w, layers, groups, "down" if i < last else None) for i, w in enumerate(widths)])
        self.mid_block = Middle(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latents, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, channels, latents, widths, layers, groups):
        super().__init__()
        widths = widths[::-1]
        inputs, last = [widths[0], *widths], len(widths) - 1
        self.conv_in = nn.Conv2d(latents, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups)
        self.up_blocks = nn.ModuleList([Level(inputs[i], w, layers + 1, groups, "up" if i < last else None) for i, w in enumerate(widths)])
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """encode: images (B,C,H,W) in [-1, 1] -> mean and log-variance of the latents (B,c,H/f,W/f), unscaled. decode: latents of unit size
    (times LATENT_SCALE, as networks see them) -> images (B,C,H,W), a few at a time, so that memory does not grow with B."""

    def __init__(self, channels=3, latents=4, widths=(128, 256, 512, 512), layers=2, groups=32):
        super().__init__()
        self.latents, self.factor = latents, 2 ** (len(widths) - 1)
        self.encoder = Encoder(channels, latents, widths, layers, groups)
        self.decoder = Decoder(channels, latents, widths, layers, groups)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1), nn.Conv2d(latents, latents, 1)

    @torch.no_grad()
    def encode(self, x):
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    @torch.no_grad()
    def decode(self, z, batch=8):
        return torch.cat([self.decoder(self.post_quant_conv(part / LATENT_SCALE)) for part in z.split(batch)])


def load_autoencoder(path, device="cpu"):
    """diffusers' diffusion_pytorch_model.safetensors or .bin (or the folder that holds one) -> (Autoencoder, frozen; sha256 of the file).
    Sizes are read from the shapes. Older files name the attention query, key, value and proj_attn."""
    path = pathlib.Path(path)
    if path.is_dir():
        names = [f"diffusion_pytorch_model{suffix}" for suffix in (".safetensors", ".bin")]
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
    if not path.is_file():
        raise UserError(f"{path}: no such file; download {path.name} of an autoencoder such as stabilityai/sd-vae-ft-ema and name it here")
    state = load_safetensors(path) if path.suffix == ".safetensors" else load_checkpoint(path)
    renamed = {}
    try:
        for name, value in state.items():
            if ".attentions." in name:
                for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
                    name = name.replace(f".{old}.", f".{new}.")
                if name.endswith("weight") and torch.is_tensor(value) and value.ndim == 4:
                    value = value[:, :, 0, 0]  # a 1x1 convolution
            renamed[name] = value.float() if torch.is_tensor(value) and value.is_floating_point() else value
        count = {kind: 1 + max(int(n.split(".")[i]) for n in renamed if n.startswith(prefix)) for kind, prefix, i in (
            ("levels", "encoder.down_blocks.", 2), ("layers", "encoder.down_blocks.0.resnets.", 4))}
        if max(count.values()) > 16:
            raise ValueError(f"{count['levels']} levels of {count['layers']} layers")
        widths = tuple(len(renamed[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"]) for i in range(count["levels"]))
        channels, latents = renamed["encoder.conv_in.weight"].shape[1], renamed["post_quant_conv.weight"].shape[1]
        if 0 in (channels, latents, *widths):
            raise ValueError(f"a width of 0 among {channels}, {latents}, {widths}")
        groups = 32 if all(w % 32 == 0 for w in widths) else math.gcd(*widths)
        net = build_checked(lambda: Autoencoder(channels, latents, widths, count["layers"], groups), renamed, path)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path}: not the KL autoencoder of Stable Diffusion ({type(error).__name__} {error})") from None
    return net.to(device).eval().requires_grad_(False), file_sha256(path)


# ---------------------------------------------------------------------------------------------------------------------
# Downloads

TIMEOUT = 30  # seconds without a byte after which a server has stalled
PAUSES = (1, 2, 4, 8)  # seconds before the next attempt; one more attempt than pauses, counted anew whenever one got further
REDIRECTS = 10
PROGRESS = 5  # seconds between lines
BLOCK = 1 << 14  # small: the block that a stall interrupts is lost


def download(url, path, sha256, size=None):
    """Fetch url to path unless it is there already, through path.part, checked before it is renamed. -> path.

    A transfer that breaks, stalls or was killed goes on where it stopped; of several processes one fetches and the others wait.
    Raises UserError with the place where a copy made by hand is looked for.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        part = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock_part(part):
            try:
                if not path.is_file():  # else the process that was waited for has brought it
                    fetch_checked(url, part, sha256, size, f"fetch it by other means and put it at {path.resolve()}")
                    os.replace(part, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    if not part.stat().st_size:
                        part.unlink()
    check_file(path, sha256, size, f"; delete it and it is fetched again from {url}")
    return path


def lock_part(part):
    """-> part, open and locked until it is closed. The lock is the system's, so none is left by a crash."""
    try:
        import fcntl
    except ImportError:  # Windows, which could not rename a file that is open either
        return contextlib.nullcontext()
    said = False
    while True:
        file = open(part, "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not said:
                said = True
                note(f"{part.stem}: another process is fetching it, waiting for that")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems have no locks
            pass
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                return file
        file.close()  # it was renamed or deleted by the process that held it


def fetch_checked(url, part, sha256, size, by_hand):
    """url -> part, complete and right. One put together from several answers may mix two versions of the file: if it is wrong it is
    fetched once more from its beginning."""
    for last in (False, True):
        pieced = fetch(url, part, size, by_hand)
        try:
            return check_file(part, sha256, size, f" from {url}, deleted; {by_hand}")
        except UserError:
            os.truncate(part, 0)  # and no more than that: the lock is on it
            if last or not pieced:
                raise
        note(f"{part.stem}: the parts make no whole, starting over")


def fetch(url, part, size, by_hand):
    """Ask until part is complete -> whether it was put together from several answers. Faults that may pass are met with another attempt."""
    import requests
    import urllib3
    failures = most = 0
    while True:
        try:
            return ask(url, part, size) > 0
        except (ValueError, requests.TooManyRedirects) as error:  # among them what requests says to addresses and headers it cannot read
            raise UserError(f"{url}: {error}; {by_hand}") from None
        except (ConnectionError, requests.RequestException, urllib3.exceptions.HTTPError) as error:
            reason = str(error) if type(error) is ConnectionError else type(error).__name__
        reached = part.stat().st_size
        failures, most = (1, reached) if reached > most else (failures + 1, most)
        if failures > len(PAUSES):
            kept = "what has arrived is kept and the same command goes on from there, or " if reached else ""
            raise UserError(f"{url}: download failed ({reason}, {failures} attempts): {kept}{by_hand}")
        note(f"{part.stem}: {reason}, next attempt in {PAUSES[failures - 1]} s")
        time.sleep(PAUSES[failures - 1])


def ask(url, part, size):
    """One request for what part lacks -> how many bytes were kept of what was there. Raises ConnectionError or an error of the libraries
    where another attempt may help, and ValueError where none would."""
    import requests
    with requests.Session() as session, open(part, "ab") as f:
        session.max_redirects = REDIRECTS
        kept = f.tell()
        if size is not None and kept >= size:
            return kept
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={kept}-"} if kept else {})}
        with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            start, total = judge(response, size)
            if start not in (0, kept):
                f.truncate(0)
                raise ConnectionError("cannot go on where it stopped, starting over")
            f.truncate(start)
            receive(response.raw, f, start, total, size, part.stem)
    return start


def judge(response, size):
    """-> (where in the file the content of this answer begins, or None; length of the whole file in bytes, or None)."""
    code = response.status_code
    if code >= 500 or code == 429:
        raise ConnectionError(f"HTTP {code}")
    if code == 416:  # nothing at or beyond what part has
        return None, size
    if code not in (200, 206):
        raise ValueError(f"HTTP {code}")
    if response.headers.get("Content-Type", "").lower().startswith("text/html"):
        raise ValueError("is a web page, not the file")
    start, total = 0, response.raw.length_remaining
    if code == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        start, total = (int(span[1]), None if span[2] == "*" else int(span[2])) if span else (None, None)
    if size is not None and total not in (None, size):
        raise ValueError(f"offers {total} bytes where {size} were expected")
    return start, total if size is None else size


def receive(stream, f, done, total, size, name):
    """Append the content of an answer to f, which holds done bytes; stop where it exceeds size, as it may have no end."""
    stream.enforce_content_length = False  # the lengths are compared below, where nothing of a last block is lost
    start, began = done, time.monotonic()
    shown = began
    for block in stream.stream(BLOCK, decode_content=False):  # bytes as they are in the file, even one labelled as gzip
        if not done and block.lstrip().startswith(b"<"):
            raise ValueError("is a web page, not the file")
        f.write(block)
        done += len(block)
        if size is not None and done > size:
            return
        if (now := time.monotonic()) - shown > PROGRESS:
            shown = now
            note(f"{name}: {done / 2**20:.1f} MiB" if total is None else f"{name}: {done / 2**20:.1f} of {total / 2**20:.1f} MiB, time left "
                 f"{datetime.timedelta(seconds=round((now - began) / (done - start) * (total - done)))}")
    if total is not None and done < total:
        raise ConnectionError(f"cut off after {done} of {total} bytes")


def note(text):
    print(text, file=sys.stderr, flush=True)


def check_file(path, sha256, size, advice=""):
    """Raise UserError unless the file has this size (bytes, where given) and sha256."""
    found = path.stat().st_size
    if size is not None and found != size:
        raise UserError(f"{path}: {found} bytes where {size} were expected{advice}")
    found = file_sha256(path)
    if found != sha256:
        raise UserError(f"{path}: wrong sha256 {found[:16]}…, expected {sha256[:16]}…{advice}")


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
