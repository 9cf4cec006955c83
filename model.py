"""SiT, the Scalable Interpolant Transformer (arXiv:2401.08740; blocks from DiT, arXiv:2212.09748), guidance, averages,
and how a checkpoint becomes a network.

net(x_t, t, y, x1, r) takes x_t (B,C,H,W), t (B,) in [0, 1] with t = 0 data, labels y (B,) or None, x1 (B,C,H,W) where
it was built to see the reference of a bridge, and r (B,), the time that a flow map steps to, or None, and returns
(B,C,H,W) in the prediction units named by its checkpoint's configuration. State-dict names are those of the released
SiT and DiT weights.

A network of your own takes SiT's place in build_model. It is called as above, by position up to x1, and takes the
arguments x1 and r by these names where a bridge or a flow map needs them; `channels` and `num_classes` are read, a true
`reference_channels` says that it reads x1, `grad_checkpoint` is set; build_model checks these. A discriminator
(distill.py --gan_weight) reads `width` and calls it with middle=True for tokens (B,T,width), and a frozen teacher's
Linear and Conv2d outside `final_layer` are rounded to bf16 on a card.
"""
import copy
import inspect
import math
import pathlib
import re
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common.files import load_checkpoint, reading
from common.run import UserError

SIZES = {  # width, depth, heads: S to XL as published, the two smallest for CPUs
    "XXS": (64, 3, 2),
    "XS": (128, 4, 4),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


# ---------------------------------------------------------------------------------------------------------------------
# The network

def sincos_positions(width, side):
    """Fixed 2-D sin-cos position embedding of a side x side grid -> (1, side*side, width). Column index fills the
    first half."""
    frequency = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency  # (side, width/4)
    line = torch.cat([angle.sin(), angle.cos()], 1)  # (side, width/2)
    columns, rows = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], 2).reshape(1, side * side, width).float()


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        steps = torch.arange(128, dtype=torch.float32, device=t.device)
        frequency = torch.exp(-math.log(10000) / 128 * steps)
        angle = t.float()[:, None] * frequency  # (B,128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], 1))  # (B,D)


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
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = (u.transpose(1, 2) for u in qkv.unbind(2))  # (B,heads,T,D/heads); backwards one copy, not two
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)  # (B,heads,T,D/heads)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))  # (B,T,D)


class Block(nn.Module):
    """A transformer block whose norms are shifted, scaled and gated by the condition (AdaLN-Zero)."""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(  # (B,T,D) -> (B,T,4D) -> (B,T,D)
            fc1=nn.Linear(width, 4 * width), gelu=nn.GELU("tanh"), fc2=nn.Linear(4 * width, width)))
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
        # Never in bf16: data are a noise prediction divided by alpha, off by 0.08 near t = 1 if that rounds it.
        with torch.autocast(x.device.type, enabled=False):
            shift, scale = self.adaLN_modulation(c).chunk(2, 1)
            return self.linear(modulate(self.norm_final(x), shift, scale))  # (B,T,D) -> (B,T,p*p*C)


class SiT(nn.Module):
    """size: a key of SIZES. num_classes 0 is unconditional. time_scale multiplies t before its sinusoids. precondition
    is None or three lists, the network's c_in, c_skip and c_out on a uniform grid of t (interpolants.preconditioning).
    reference_channels: channels of x1 that are joined to x_t; with 0 a given x1 is ignored. second_time: a flow map's
    network, told t - r as well, which nothing depends on before it is trained. Released weights count
    time otherwise: reverse_time gives -net(x, 1 - t), and timesteps are the times at which a discrete network was at
    step 0, 1, 2, ..."""

    def __init__(self, size="S", patch=2, image_size=32, channels=4, num_classes=1000, qk_norm=False, time_scale=1000.0,
                 precondition=None, reference_channels=0, reverse_time=False, timesteps=None, second_time=False):
        super().__init__()
        width, depth, heads = SIZES[size]
        self.patch, self.channels, self.num_classes, self.time_scale = patch, channels, num_classes, time_scale
        self.grad_checkpoint = False  # set it to keep only the blocks' inputs for the backward pass
        self.width, self.reference_channels, self.reverse_time = width, reference_channels, reverse_time
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels + reference_channels, width, patch, patch)})
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, width)})  # null class last
        self.r_embedder = TimestepEmbedder(width) if second_time else None
        self.pos_embed = nn.Parameter(torch.empty(1, (image_size // patch) ** 2, width), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads, qk_norm) for _ in range(depth)])
        self.final_layer = FinalLayer(width, patch, channels)
        for name, table in (("scales", precondition), ("timesteps", timesteps)):  # (3,K), (K,)
            table = None if table is None else torch.tensor(table, dtype=torch.float32, device="cpu")
            self.register_buffer(name, table, persistent=False)
        if not self.pos_embed.is_meta:
            self.initialize()

    def initialize(self):
        self.pos_embed.copy_(sincos_positions(self.width, math.isqrt(self.pos_embed.shape[1])))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for weight in (self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        if self.r_embedder:  # zero: a flow map starts as its teacher
            nn.init.zeros_(self.r_embedder.mlp[2].weight)
        # DiT starts labels at 0.02 as well; behind zero gates that hides the class for hundreds of iterations.
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=1.0)
        # Zero gates make every block the identity at first, and a zero last layer makes the first prediction 0.
        for module in [block.adaLN_modulation[1] for block in self.blocks] + [self.final_layer.adaLN_modulation[1],
                                                                              self.final_layer.linear]:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, x_t, t, y=None, x1=None, r=None, middle=False):
        """r: None is 0 for a flow map, and all that others take. middle: stop after half of the blocks and return their
        tokens (B,T,D), for a discriminator's head."""
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
        # (B,T,D), T = (H/p)(W/p), in that order in memory too: sums keep it, and every norm would copy another
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2).contiguous() + self.pos_embed
        c = self.t_embedder(self.clock(t)) + self.y_embedder.embedding_table(y)  # (B,D)
        if self.r_embedder:
            c = c + self.r_embedder(10 * (t if r is None else t - r))
        for block in self.blocks[:len(self.blocks) // 2] if middle else self.blocks:
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False)  # (B,T,D)
            else:
                x = block(x, c)  # (B,T,D)
        if middle:
            return x
        x = self.final_layer(x.float(), c.float())  # (B,T,p*p*C)
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


def guided(net, scale, interval=(0.0, 1.0)):
    """Classifier-free guidance (arXiv:2207.12598) on all channels: null + scale (conditional - null), one concatenated
    pass -> a network with its guidance inside, called as net is. Scale 1 is the plain conditional network (no second
    pass), 0 the unconditional one. Outside the interval of t it is 1 (arXiv:2404.07724)."""
    num_classes = getattr(net, "module", net).num_classes  # the network may be wrapped for several processes
    if scale == 1 or num_classes == 0:
        return net
    everywhere = interval[0] <= 0 and interval[1] >= 1

    def call(x_t, t, y, *given):
        if y is None or scale == 0 and everywhere:
            return net(x_t, t, None, *given)
        y = torch.cat([y, torch.full_like(y, num_classes)])
        x_t, t, *given = (torch.cat([v, v]) for v in (x_t, t, *given))
        conditional, null = net(x_t, t, y, *given).chunk(2)
        result = null + scale * (conditional - null)
        if everywhere:
            return result
        inside = ((t >= interval[0]) & (t <= interval[1]))[:len(result)]
        return torch.where(inside.reshape(-1, *[1] * (x_t.ndim - 1)), result, conditional)
    return call


def parse_name(name):
    """'SiT-XL/2' -> ('XL', 2)."""
    match = re.fullmatch(r"SiT-([A-Z]+)/([1-9]\d*)", name)
    if not match or match[1] not in SIZES:
        raise UserError(f"--model {name}: unknown network, choose SiT-SIZE/PATCH with a size of {', '.join(SIZES)}, "
                        "such as SiT-S/2")
    return match[1], int(match[2])


# ---------------------------------------------------------------------------------------------------------------------
# Moving averages

def frozen_copy(net):
    """A copy that is never trained: for averages, teachers and references."""
    return copy.deepcopy(net).eval().requires_grad_(False)


def round_weights(net):
    """Under autocast, round once, in place, what it would round in every pass: it caches rounded copies only of
    weights that ask for gradients. This frozen one is for autocast from here on; the last layer is left out of both."""
    kind = next(net.parameters()).device.type
    for name, module in net.named_modules():
        rounds = isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith("final_layer")
        if rounds and torch.is_autocast_enabled(kind):
            for p in module.parameters():
                p.data = p.data.to(torch.get_autocast_dtype(kind))


@torch.no_grad()
def ema_update(ema, net, decay, step):
    """Put net (its weights after iteration `step`, counted from 1) into its average, in place. The weight of iteration
    i is proportional to decay^(step - i), as in Adam's bias correction: an average of what has been so far, without a
    trace of the weights it started from, whose decay acts as soon as a run is longer than 1 / (1 - decay); 1 is the
    plain mean."""
    share = 1 / step if decay == 1 else (1 - decay) / (1 - decay ** step)
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), share)


# ---------------------------------------------------------------------------------------------------------------------
# From a checkpoint to a network

LAYOUT = ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "y_embedder.embedding_table.weight", "pos_embed",
          "final_layer.linear.weight")  # of the released weights


def build_model(config):
    """config["network"] holds the arguments of SiT. Raises TypeError for a network that would not hear what it is
    told."""
    net, asked = SiT(**config["network"]), config["network"]
    heard = inspect.signature(net.forward).parameters  # by name: **kwargs would swallow a bridge's x1 without a word
    needs = ["x1"] * bool(asked.get("reference_channels")) + ["r"] * bool(asked.get("second_time"))
    missing = [f"argument {name}" for name in needs if name not in heard]
    missing += [f"attribute {name}" for name in ("channels", "num_classes", "reference_channels", "grad_checkpoint")
                if not hasattr(net, name)]
    if missing:
        raise TypeError(f"{type(net).__name__} lacks the {', '.join(missing)}: see the top of model.py")
    return net


def build_from(config, net):
    """A network of this configuration in training that begins as `net`, which may lack the second time: a flow map does
    not depend on it at first. In eval(): no dropout anywhere."""
    new = build_model(config).to(next(net.parameters()).device).eval()
    new.load_state_dict({**new.state_dict(), **net.state_dict()})
    return new


def choose_average(content, average, path):
    """A checkpoint's content -> its weights averaged with this decay, those of its first average where it is None."""
    if average is None:
        return content["ema"]
    with reading(f"{path}: its averages are unknown here"):
        table = dict(zip(content.get("decays", ()), [content["ema"], *content.get("other_averages", ())]))
    if average not in table:
        known = f"its averages have the decays {', '.join(map(str, table))}, choose one of them" if table else (
            "it holds one average alone, leave it out")
        raise UserError(f"{path}: --average {average}: {known}")
    return table[average]


def load_model(path, device="cpu", average=None):
    """A checkpoint of a trainer, or released weights -> (net, config): the averaged network, frozen, and its plain-dict
    configuration. average: the decay of one of a student's averages, None for the first. Raises UserError."""
    content = load_checkpoint(path)
    candidates = (content, content.get("ema"), content.get("model"))
    released = next((w for w in candidates if isinstance(w, dict) and set(LAYOUT) <= w.keys()), None)
    if "config" not in content and released is not None:
        content = read_released(released, path)
    if not {"config", "ema"} <= content.keys():
        raise UserError(f"{path}: not a checkpoint of this project (it has no configuration)")
    weights = choose_average(content, average, path)
    with reading(f"{path}: its configuration describes no network of this project"):
        side, patch, classes = (content["config"]["network"][name] for name in ("image_size", "patch", "num_classes"))
        if side % patch or min(side, patch) < 1 or classes < 0:
            raise ValueError(f"{classes} classes, images of {side} in patches of {patch}")
        net = build_checked(lambda: build_model(content["config"]), weights, path)
    return net.to(device).eval().requires_grad_(False), content["config"]


def read_released(state, path):
    """The published SiT (arXiv:2401.08740) and DiT (arXiv:2212.09748) weights -> {"config", "ema"} of this project.

    Both have one layout, whose sizes follow from its shapes; which of the two it is, the file's name must say. SiT
    counts time from noise to data on the linear path: our network returns -v(x, 1 - t). DiT predicts noise at 1000
    steps of the linear schedule, beta from 1e-4 to 0.02; each step is served at the time where the vp row has the same
    abar. Predicted variances are dropped."""
    name = pathlib.Path(path).name
    named = set(re.findall(r"(?<![a-z])[ds]it(?![a-z])", name.lower()))
    kind = {"dit": "DiT", "sit": "SiT"}[named.pop()] if len(named) == 1 else None
    if kind is None:
        raise UserError(f"{path}: released weights of SiT and DiT look alike; name the file after the one it is, such "
                        "as SiT-XL-2-256x256.pt")
    with reading(f"{path}: its shapes are not those of {kind}"):
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        size = next((size for size, row in SIZES.items() if row[:2] == (width, depth)), None)
        if size is None:
            raise UserError(f"{path}: {depth} blocks of width {width} are none of {', '.join(SIZES)}")
        side, state = patch * math.isqrt(state["pos_embed"].shape[1]), dict(state)
        for part in ("final_layer.linear.weight", "final_layer.linear.bias"):  # rows: (pixel of the patch, channel)
            state[part] = state[part].view(patch ** 2, -1, *state[part].shape[1:])[:, :channels].flatten(0, 1)
        num_classes = len(state["y_embedder.embedding_table.weight"]) - 1
    network = {"size": size, "patch": patch, "image_size": side, "channels": channels, "num_classes": num_classes,
               "time_scale": 1.0}
    config = {"network": network, "model": f"{kind}-{size}/{patch}", "data": "imagenet",
              "latent": {"autoencoder": None, "image_size": 8 * side}}
    if kind == "SiT":
        network["reverse_time"] = True
        return {"ema": state, "config": {**config, "interpolant": "linear", "prediction": "velocity"}}
    log_abar = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().log1p().cumsum(0)
    # The vp row has log abar = -(0.1 t + 9.95 t^2): solved for t.
    network["timesteps"] = ((-0.1 + (0.01 - 4 * 9.95 * log_abar).sqrt()) / (2 * 9.95)).tolist()
    return {"ema": state, "config": {**config, "interpolant": "vp", "prediction": "noise"}}


def load_weights(net, state, path, assign=False):
    try:
        net.load_state_dict(state, strict=True, assign=assign)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its weights do not fit its configuration "
                        f"({' '.join(str(error).split())[:300]})") from None


class Undrawn(torch.overrides.TorchFunctionMode):
    """normal_ does nothing: without memory there is nothing to fill, and torch would import its compiler to say so."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return kwargs["tensor"] if function is nn.init.normal_ else function(*args, **(kwargs or {}))


def build_checked(make, state, path):
    """make() with these weights. It is made without memory and then given them, if their shapes are right: sizes in a
    file may ask for any amount of it, and random numbers need not be drawn to be overwritten."""
    with torch.device("meta"), Undrawn():
        net = make()
    load_weights(net, state, path, assign=True)
    if not all(p.is_floating_point() for p in net.parameters()):
        raise ValueError("weights that are whole numbers")
    return net.float()
