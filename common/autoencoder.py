"""The latent autoencoder: Stable Diffusion's KL autoencoder (arXiv:2112.10752), names as in diffusers, and the cache
of latents."""
import concurrent.futures
import hashlib
import math
import os
import pathlib
import zlib
from collections import OrderedDict

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common.data import LATENT_SCALE, list_folder, load_images, read_latents
from common.files import describe_files, file_sha256, load_checkpoint, read_record, reading, write_record
from common.images import read_image, to_device
from common.run import UserError, alone, check_writable, first_process, in_turn, progress, wait_for_all, writing
from model import build_checked


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
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B,HW,C)
        h = F.scaled_dot_product_attention(*(layer(h)[:, None] for layer in (self.to_q, self.to_k, self.to_v)))[:, 0]
        return x + self.to_out(h).transpose(1, 2).view(B, C, H, W)


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
        self.scale = scale
        self.resnets = nn.Sequential(*(Resnet(width if i else inputs, width, groups) for i in range(layers)))
        if scale:
            conv = nn.Conv2d(width, width, 3, 2 if scale == "down" else 1, padding=0 if scale == "down" else 1)
            setattr(self, f"{scale}samplers", nn.ModuleList([nn.ModuleDict({"conv": conv})]))

    def forward(self, x):
        x = self.resnets(x)
        if self.scale == "down":
            return self.downsamplers[0]["conv"](F.pad(x, (0, 1, 0, 1)))  # padded on the right and below only
        return self.upsamplers[0]["conv"](F.interpolate(x, scale_factor=2.0)) if self.scale == "up" else x


def stack_levels(widths, layers, groups, scale):
    """A level for each width, of which all but the last scale."""
    inputs, scales = [widths[0], *widths], [scale] * (len(widths) - 1) + [None]
    return nn.Sequential(*(Level(*sizes, layers, groups, scaling) for *sizes, scaling in zip(inputs, widths, scales)))


class Autoencoder(nn.Module):
    """encode: images (B,C,H,W) in [-1, 1] -> mean and log-variance of the latents (B,c,H/f,W/f), unscaled. decode:
    latents of unit size (times LATENT_SCALE, as networks see them) -> images (B,C,H,W), a few at a time, so that
    memory does not grow with B."""

    def __init__(self, channels=3, latents=4, widths=(128, 256, 512, 512), layers=2, groups=32):
        super().__init__()
        self.latents, self.factor = latents, 2 ** (len(widths) - 1)
        first, last = widths[0], widths[-1]
        self.encoder = nn.Sequential(OrderedDict(
            conv_in=nn.Conv2d(channels, first, 3, padding=1), down_blocks=stack_levels(widths, layers, groups, "down"),
            mid_block=Middle(last, groups), conv_norm_out=nn.GroupNorm(groups, last, eps=1e-6), silu=nn.SiLU(),
            conv_out=nn.Conv2d(last, 2 * latents, 3, padding=1)))
        self.decoder = nn.Sequential(OrderedDict(
            conv_in=nn.Conv2d(latents, last, 3, padding=1), mid_block=Middle(last, groups),
            up_blocks=stack_levels(widths[::-1], layers + 1, groups, "up"),
            conv_norm_out=nn.GroupNorm(groups, first, eps=1e-6), silu=nn.SiLU(),
            conv_out=nn.Conv2d(first, channels, 3, padding=1)))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1), nn.Conv2d(latents, latents, 1)

    @torch.no_grad()
    def encode(self, x):
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    @torch.no_grad()
    def decode(self, z, batch=8):
        return torch.cat([self.decoder(self.post_quant_conv(part / LATENT_SCALE)) for part in z.split(batch)])


def load_autoencoder(path, device="cpu"):
    """diffusers' diffusion_pytorch_model.safetensors or .bin (or the folder that holds one) -> (Autoencoder, frozen;
    sha256 of the file). Sizes are read from the shapes. Older files name the attention query, key, value and
    proj_attn."""
    path = pathlib.Path(path)
    if path.is_dir():
        names = [f"diffusion_pytorch_model{suffix}" for suffix in (".safetensors", ".bin")]
        path = next((path / name for name in names if (path / name).is_file()), path / names[0])
    if not path.is_file():
        raise UserError(f"--vae {path}: no such file; download diffusion_pytorch_model.safetensors of an autoencoder "
                        "such as stabilityai/sd-vae-ft-ema and name it here")
    state, renamed = load_checkpoint(path), {}
    with reading(f"{path}: not the KL autoencoder of Stable Diffusion"):
        for name, value in state.items():
            if ".attentions." in name:
                for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
                    name = name.replace(f".{old}.", f".{new}.")
                if name.endswith("weight") and value.ndim == 4:
                    value = value[:, :, 0, 0]  # a 1x1 convolution
            renamed[name] = value
        levels, layers = (1 + max(int(n.split(".")[i]) for n in renamed if n.startswith(prefix)) for prefix, i in (
            ("encoder.down_blocks.", 2), ("encoder.down_blocks.0.resnets.", 4)))
        if max(levels, layers) > 16:
            raise ValueError(f"{levels} levels of {layers} layers")
        widths = tuple(len(renamed[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"]) for i in range(levels))
        channels, latents = renamed["encoder.conv_in.weight"].shape[1], renamed["post_quant_conv.weight"].shape[1]
        groups = 32 if all(w % 32 == 0 for w in widths) else math.gcd(*widths)
        net = build_checked(lambda: Autoencoder(channels, latents, widths, layers, groups), renamed, path)
    return net.to(device).eval().requires_grad_(False), file_sha256(path)


def check_autoencoder(name, autoencoder, sha256, latent, channels):
    """--vae against the latents of a checkpoint or a cache: latent is their record, None for pixels; channels are
    theirs."""
    if name and not latent:
        raise UserError(f"--vae {name}: these are pixels, not latents; leave it out")
    if name and autoencoder.latents != channels:
        raise UserError(f"--vae {name}: makes latents of {autoencoder.latents} channels, here are {channels}")
    if name and latent.get("autoencoder") not in (None, sha256):
        raise UserError(f"--vae {name}: is not the autoencoder that the latents were made with ({sha256[:8]}…, not "
                        f"{latent['autoencoder'][:8]}…)")


def decoder(name, config, device, needed=True):
    """--vae of a checkpoint -> what turns its output into pixels, None where it makes pixels itself or, unless needed,
    none is named."""
    if config.get("latent") and name is None and needed:
        raise UserError("--vae is missing: this checkpoint makes latents; give the autoencoder that decodes them "
                        "(diffusion_pytorch_model.safetensors)")
    autoencoder, sha256 = load_autoencoder(name, device) if name else (None, None)
    check_autoencoder(name, autoencoder, sha256, config.get("latent"), config["network"]["channels"])
    return autoencoder.decode if autoencoder else None


# ---------------------------------------------------------------------------------------------------------------------
# The cache of latents

CHUNK = 16  # images encoded at a time and marked as done together: the file does not depend on who encodes them


def put(path, offset, content):
    """Bytes into a file's midst, and onto the disk. (Not through a map, where machines that share a folder would write
    back each other's pages.)"""
    with writing(path), open(path, "r+b") as f:
        f.seek(offset)
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def cache_latents(args, autoencoder, sha256, run):
    """Encode --data, a folder or any other, once, into --cache_latents -> Images with latents. The folder gets
    latents.npy, labels.npy, done.npy (a byte for each chunk, set once it is written) and record.json. Processes take
    chunks in turn; a run cut off goes on with the chunks that are left."""
    data, size, directory = args.data, args.image_size, pathlib.Path(args.cache_latents)
    flag, side, c = f"--cache_latents {directory}", size // autoencoder.factor, autoencoder.latents
    if pathlib.Path(data).is_dir():
        files, labels, classes = list_folder(data)
        stats = describe_files(files, data)
        listing = repr([(name, length) for name, length, _ in stats]).encode()
        n, some = len(files), np.unique(np.linspace(0, len(files) - 1, 64).astype(int))
        contents = "".join(file_sha256(files[i]) for i in some)

        def read(i):
            with alone():
                return read_image(f"--data {data}", files[i], size)
    else:
        images, labels, classes, *_ = in_turn(lambda: load_images(data, args.data_dir, size, args.seed, say=run.say))
        if images.shape[3] not in (1, 3):
            raise UserError(f"--data {data}: {images.shape[3]} channels, an autoencoder reads 1 or 3")
        n, contents, listing, stats = len(images), "", images.tobytes(), ()

        def read(i):
            return np.repeat(images[i], 3 // images.shape[3], -1)
    labels = np.zeros(n, np.int64) if labels is None else labels
    shape, chunks = (n, 2, 2, c, side, side), (n + CHUNK - 1) // CHUNK
    record = {"count": n, "shape": list(shape), "dtype": "float16", "source": str(data), "crop": "centre",
              "listing": hashlib.sha256(listing).hexdigest(), "image_size": size, "autoencoder": sha256,
              "contents": hashlib.sha256(contents.encode()).hexdigest(), "num_classes": len(classes),
              "labels": hashlib.sha256(labels.tobytes()).hexdigest()}

    def parts():  # which files each chunk is of, until all is done: where they have changed by then, it is made anew
        return [zlib.crc32(repr(stats[k * CHUNK:(k + 1) * CHUNK]).encode()) for k in range(chunks)]

    def write(complete):  # with names, which are not compared: older folders have none
        write_record(directory / "record.json", {**record, "classes": list(classes), "complete": complete,
                                                 **({} if complete else {"parts": parts()})})

    def begin():  # once, by the first process
        check_writable("--cache_latents", directory)
        if (directory / "record.json").exists():
            if not (made := read_record(directory / "record.json")):
                raise UserError(f"{flag}: its record.json is damaged, or of an older version; delete the folder and "
                                "start again")
            made = {"contents": record["contents"], **made}  # not in older folders
            if contents and not made.get("complete"):  # what could not be read has been mended since
                made.update({key: record[key] for key in ("listing", "contents")})
            changed = next((key for key in record if key != "source" and made.get(key) != record[key]), None)
            if changed:
                raise UserError(f"{flag}: was made with another {changed} ({str(made.get(changed))[:40]}, here "
                                f"{str(record[changed])[:40]}); choose another folder")
            if not made.get("complete"):
                with reading(flag, "; delete the folder and start again"):
                    marks = np.load(directory / "done.npy", mmap_mode="r+")
                for k, (was, now) in enumerate(zip(made.get("parts", ()), parts())):
                    marks[k] *= was == now
                marks.flush()
                write(complete=False)
            return
        if any(directory.iterdir()):
            raise UserError(f"{flag}: holds other files; choose another folder")
        check_writable("--cache_latents", directory, 2 * math.prod(shape))
        np.lib.format.open_memmap(directory / "latents.npy", "w+", np.float16, shape).flush()
        np.lib.format.open_memmap(directory / "done.npy", "w+", np.uint8, (chunks,)).flush()
        np.save(directory / "labels.npy", labels)
        write(complete=False)

    first_process(begin)
    with reading(flag, "; delete the folder and start again"):
        latents, done = (np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("latents", "done"))
    todo, tell = [k for k in range(run.rank, chunks, run.world) if not done[k]], progress(run.say, "encoding")
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as workers:
        for turn, k in enumerate(todo, 1):
            rows = range(k * CHUNK, min((k + 1) * CHUNK, n))
            x = to_device(np.stack(list(workers.map(read, rows))), run.device)  # (b,3,H,W)
            codes = [torch.stack(autoencoder.encode(view), 1) for view in (x, x.flip(3))]  # (b,2,c,h,w) each
            codes = torch.stack(codes, 1).cpu().numpy().astype(np.float16)
            put(directory / "latents.npy", latents.offset + rows.start * latents[0].nbytes, codes.tobytes())
            put(directory / "done.npy", done.offset + k, b"\1")
            tell(turn, len(todo))
    wait_for_all()
    first_process(lambda: write(complete=True))
    return read_latents(directory)
