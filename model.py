"""SiT, the Scalable Interpolant Transformer (arXiv:2401.08740; blocks from DiT, arXiv:2212.09748), and its state on disk.

net(x_t, t, y, x1) takes x_t (B,C,H,W), t (B,) in [0, 1] with t = 0 data, labels y (B,) or None, and x1 (B,C,H,W) where it was
built to see the reference of a bridge, and returns (B,C,H,W) in the prediction units named by its checkpoint's configuration. State-dict names are those of the released SiT and DiT weights.
"""
import copy
import hashlib
import math
import os
import pathlib
import pickle
import re
import tempfile
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

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
    reference_channels: channels of x1 that are joined to x_t; with 0 a given x1 is ignored."""

    def __init__(self, size="S", patch=2, image_size=32, channels=4, num_classes=1000, qk_norm=False, time_scale=1000.0,
                 precondition=None, reference_channels=0):
        super().__init__()
        width, depth, heads = SIZES[size]
        if image_size % patch:
            raise UserError(f"image size {image_size} is not a multiple of the patch size {patch}: "
                            f"use {image_size // patch * patch or patch} or another patch")
        self.patch, self.channels, self.num_classes, self.time_scale = patch, channels, num_classes, time_scale
        self.width, self.reference_channels = width, reference_channels
        self.x_embedder = PatchEmbed(channels + reference_channels, patch, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.pos_embed = nn.Parameter(sincos_positions(width, image_size // patch), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads, qk_norm) for _ in range(depth)])
        self.final_layer = FinalLayer(width, patch, channels)
        scales = None if precondition is None else torch.tensor(precondition, dtype=torch.float32)  # (3,K)
        self.register_buffer("scales", scales, persistent=False)
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
        c = self.t_embedder(self.time_scale * t) + self.y_embedder(y)  # (B,D)
        for block in self.blocks[:len(self.blocks) // 2] if middle else self.blocks:
            x = block(x, c)  # (B,T,D)
        if middle:
            return x
        x = self.final_layer(x, c).float()  # (B,T,p*p*C)
        x = x.view(B, H // p, W // p, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)
        return x if self.scales is None else c_skip * x_t + c_out * x

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

def save_checkpoint(path, content):
    """Write beside the target, flush to disk, then replace: the last good file is whole until the new one is."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=path.name + ".", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are for the owner alone
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def load_checkpoint(path):
    """-> dict on the CPU. Raises UserError for a file that is missing, cut off, no checkpoint, or a pickle with code in it."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file" if not path.exists() else f"{path}: is a folder, not a checkpoint")
    with open(path, "rb") as f:
        if f.read(100).lstrip().startswith(b"<"):
            raise UserError(f"{path}: is a web page, not a checkpoint: a download that went wrong, fetch it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: what matters is whether it loads
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = "GLOBAL" in str(error) or "Unsupported class" in str(error) or "operand" in str(error)
        raise UserError(f"{path}: holds Python objects, not just weights; refused, nothing was executed" if unsafe
                        else f"{path}: not a checkpoint") from None
    except Exception:  # a damaged file can fail in any way
        raise UserError(f"{path}: not a checkpoint, or cut off before its end") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint of this project")
    return content


def load_model(path, device="cpu"):
    """A checkpoint of either trainer -> (net, config): the averaged network, frozen, and its plain-dict configuration."""
    content = load_checkpoint(path)
    if not {"config", "ema"} <= content.keys():
        raise UserError(f"{path}: not a checkpoint of this project (it has no configuration)")
    try:
        net = build_model(content["config"])
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path}: its configuration describes no network of this project ({type(error).__name__}: {error})") from None
    load_weights(net, content["ema"], path)
    return net.to(device).eval().requires_grad_(False), content["config"]


def load_weights(net, state, path):
    try:
        net.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: its weights do not fit its configuration ({reason})") from None


def fingerprint(net):
    """sha256 of the weights: tells whether two files hold the same network."""
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def build_model(config):
    """config["network"] holds the arguments of SiT."""
    return SiT(**config["network"])


# ---------------------------------------------------------------------------------------------------------------------
# Downloads

def download(url, path, sha256, size=None):
    """Fetch url to path unless it is there already, through path.part, checked before it is renamed. -> path.

    Raises UserError with the place where a copy made by hand is looked for.
    """
    path = pathlib.Path(path)
    if path.is_file():
        check_file(path, sha256, size, f"; delete it and it is fetched again from {url}")
        return path
    import requests
    by_hand = f"fetch it by other means and put it at {path.resolve()}"
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with requests.get(url, stream=True, timeout=30) as response, open(part, "wb") as f:
            response.raise_for_status()
            for block in response.iter_content(1 << 20):
                f.write(block)
    except requests.RequestException as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{url}: download failed ({type(error).__name__}): {by_hand}") from None
    try:
        check_file(part, sha256, size, f" from {url}, deleted; {by_hand}")
    except UserError:
        part.unlink()
        raise
    os.replace(part, path)
    return path


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
