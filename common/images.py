"""Pixels in and out: decoding, uint8, pictures, and the degradations that restoration bridges start from."""
import io
import json
import logging
import math
import os
import pathlib
import warnings

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.files import check_archive, reading, save_file
from common.run import UserError

# About odd files Pillow warns and logs; what matters is whether they can be read.
warnings.filterwarnings("ignore", module="PIL")
logging.getLogger("PIL").addHandler(logging.NullHandler())

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM", "WEBP")  # whatever a file is named: none starts another program
TURNS = dict(zip(range(2, 9), (Image.Transpose[name] for name in (
    "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"))))
IMAGE_NAMES = (("x_train", "y_train"), ("images", "labels"), ("arr_0", "arr_1"))  # of images and labels in an .npz


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def image_files(label, folder):
    """Every image below the folder, in order. Raises UserError, which begins with label, where there is none."""
    def stop(error):  # a folder that cannot be listed is not one without images
        raise UserError(f"{label}: {error.filename} cannot be listed ({error.strerror}); mend its permissions or "
                        "move it away")

    def leads_back(path):  # into this folder, whose images would be read twice, or to one around it, without end
        target = path.resolve()
        return path.is_symlink() and (target.is_relative_to(root) or root.is_relative_to(target))

    found, seen, root = [], set(), pathlib.Path(folder).resolve()
    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        place = pathlib.Path(place)
        again = place.resolve() in seen  # links may form loops
        seen.add(place.resolve())
        folders[:] = sorted(f for f in folders if not again and f != "lost+found" and not f.startswith(".")
                            and not leads_back(place / f))
        found += [place / name for name in names if not again]
    files = sorted(f for f in found if f.suffix.lower() in SUFFIXES and f.is_file())
    if not files:
        raise UserError(f"{label}: no images in this folder (looked for {' '.join(sorted(SUFFIXES))})")
    return files


def image_header(path):
    """-> width, height, whether it is grey; None where the file cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return *image.size, image.mode.startswith(("1", "L", "I", "F")) and image.mode != "LAB"
    except Exception:  # a broken file can fail in any way; read_image says how
        return None


def turn_upright(image):
    """The picture as EXIF says that the camera was held. What else EXIF holds, and how much of it is broken, is of no
    matter here; Pillow's own exif_transpose reads it all."""
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(0x112))
    except Exception:  # broken EXIF can fail in any way
        turn = None
    return image if turn is None else image.transpose(turn)


def read_image(label, path, size=None):
    """Any image file -> (H,W,3) uint8, turned upright and, with size, centre-cropped and resized to a square. Grey,
    palette and CMYK are converted, 16 bits are scaled to 8. Raises UserError, which begins with label, for a broken
    file, or one of more pixels than Pillow opens."""
    with reading(f"{label}: {path}"), Image.open(path, formats=FORMATS) as image:
        image = turn_upright(image)
        if image.mode.startswith("I") or image.mode == "F":
            pixels = np.asarray(image, np.float64)
            if not np.isfinite(pixels).all():
                raise ValueError("pixels that are not finite")
            pixels = pixels * (255 / 65535 if image.mode.startswith("I") else 255 if pixels.max() <= 1 else 1)
            image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
        image = image.convert("RGB")
        return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS) if size else image)


def resize_images(images, size):
    """(N,H,W,C) uint8 of up to four channels, cropped and resized as files are -> (N,size,size,C)."""
    if images.shape[-1] in (2, 4):  # one by one: Pillow takes the last for the transparency of the others
        return np.concatenate([resize_images(channel, size) for channel in np.split(images, images.shape[-1], -1)], -1)
    fitted = (ImageOps.fit(as_pillow(image), (size, size), Image.Resampling.LANCZOS) for image in images)
    return np.stack([np.asarray(image).reshape(size, size, -1) for image in fitted])


def as_pillow(image):
    """(H,W,C) uint8 -> Pillow's image; more than four channels show the first three."""
    image = image[..., :3] if image.shape[-1] > 4 else image
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)


def read_npz(path, flag="--data", say=print):
    """The first of IMAGE_NAMES that is there, for a reference x1 before these -> images (N,H,W,C) uint8 and labels (N,)
    or None. Floats in [0, 1] or [-1, 1] become 0 to 255, which say tells."""
    label, names = f"{flag} {path}", (("x1", ""),) * (flag == "--reference") + IMAGE_NAMES
    with reading(label):
        check_archive(path)
        with np.load(path, allow_pickle=False) as npz:
            found = next((pair for pair in names if pair[0] in npz), None)
            if found is None:
                raise UserError(f"{label}: no images inside (looked for {', '.join(pair[0] for pair in names)}; found "
                                f"{', '.join(npz.files) or 'nothing'})")
            if found[1] not in npz:  # as of x1: the labels of its x0 are its own
                found = next(((found[0], y) for _, y in IMAGE_NAMES if y in npz and len(npz[y]) == len(npz[found[0]])),
                             found)
            images, labels = (npz[name] if name in npz else None for name in found)
        if images.dtype.kind == "f" and images.size and -1 <= images.min() and images.max() <= 1:  # NaN is neither
            low = -1 if images.min() < -0.1 else 0  # not where rounding or a resize left a little below 0
            say(f"{label}: {images.dtype} images in [{low}, 1] become 0 to 255")
            images = ((images.astype(np.float32) - low) * (255 / (1 - low))).round().clip(0, 255).astype(np.uint8)
        if images.dtype != np.uint8:
            raise UserError(f"{label}: {found[0]} is {images.dtype}, images must be uint8 (0 to 255), or floats in "
                            "[0, 1] or [-1, 1]")
        images = images[..., None] if images.ndim == 3 else images
        if images.ndim != 4 or 0 in images.shape or images.shape[3] > min(images.shape[1:3]):
            raise UserError(f"{label}: {found[0]} has shape {images.shape}, expected (N,H,W) or (N,H,W,C), "
                            "channels last")
        labels = labels[:, 0] if labels is not None and labels.shape == (len(images), 1) else labels
        if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0
                                   or labels.max() >= 1000000):
            raise UserError(f"{label}: {found[1]} must be {len(images)} whole numbers from 0 to 999999, found "
                            f"{labels.dtype} of shape {labels.shape}")
    return images, labels


def read_images(flag, path, side, channels, fit=False):
    """A file, a folder or an .npz, each image side x side, or with fit, cropped and resized to it as in training ->
    (n,side,side,channels) uint8, labels (n,) or None."""
    label, path, images = f"{flag} {path}", pathlib.Path(path), []
    if path.is_file() and path.suffix.lower() == ".npz":
        (found, labels), want = read_npz(path, flag), (side, side, channels)
        found = resize_images(found, side) if fit and found.shape[1:3] != want[:2] else found
        if found.shape[1:] != want:
            raise UserError(f"{label}: images of shape {found.shape[1:]}, the checkpoint works on {want}")
        return found, labels
    if not path.exists():
        raise UserError(f"{label}: no such file or folder")
    for file in [path] if path.is_file() else image_files(label, path):
        image = read_image(label, file, side if fit else None)
        if image.shape[:2] != (side, side) or channels not in (1, 3):
            raise UserError(f"{label}: {file} is {image.shape[1]}x{image.shape[0]}, the checkpoint works on "
                            f"{side}x{side}x{channels}")
        images.append(image if channels == 3 else np.asarray(Image.fromarray(image).convert("L"))[..., None])
    return np.stack(images), None


# ---------------------------------------------------------------------------------------------------------------------
# Between uint8 and networks

def send(x, device):
    """A tensor of the host on the device, by way of pinned memory: other copies to a card wait for all of its work."""
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)


def to_device(images, device):
    """(B,H,W,C) uint8 array or tensor -> (B,C,H,W) float32 in [-1, 1] on the device; floats, (B,C,H,W), as they are."""
    x = images if torch.is_tensor(images) else torch.from_numpy(np.ascontiguousarray(images))
    if x.is_floating_point():
        return send(x, device).float()
    return send(x, device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """(B,C,H,W) in [-1, 1] -> (B,H,W,C) uint8, rounded: the only place where pixels leave floating point."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def grid(images, columns, pixels):
    """(n,H,W,C) uint8 -> (H',W',3) uint8, row by row, each pixel repeated so that small images can be seen; more than
    three channels show the first three."""
    n, height, width, channels = images.shape
    images = images[..., :3] if channels >= 3 else np.repeat(images[..., :1], 3, -1)
    images = np.pad(images, ((0, -n % columns), (0, 2), (0, 2), (0, 0)), constant_values=255)  # two white between
    out = images.reshape(-1, columns, height + 2, width + 2, 3).swapaxes(1, 2)
    out = out.reshape(-1, columns * (width + 2), 3)[:-2, :-2]
    factor = max(1, pixels // max(out.shape[:2]))
    return out.repeat(factor, 0).repeat(factor, 1)


def square_grid(images, pixels=640):
    """At least ten images a row, about as many rows as columns."""
    return grid(images, min(len(images), max(10, math.ceil(len(images) ** 0.5))), pixels)


def stack_rows(rows, pixels=640, captions=(), columns=()):
    """A list of (n,H,W,C) uint8, each a row of the picture, with captions on their left and, as far as there is room,
    names above the columns."""
    picture, font = grid(np.concatenate(rows), len(rows[0]), pixels), ImageFont.load_default(13)
    left = max([math.ceil(font.getlength(text)) + 10 for text in captions], default=0)
    top, (height, width) = 18 * bool(columns), picture.shape[:2]
    canvas = Image.new("RGB", (left + width, top + height), "white")
    canvas.paste(Image.fromarray(picture), (left, top))
    draw = ImageDraw.Draw(canvas)
    for i, text in enumerate(captions):
        draw.text((left - 5, top + (i + 0.5) * height / len(rows)), text, "black", font, anchor="rm")
    for i, text in enumerate(columns):
        text = " ".join(text.split())  # names of folders may have line breaks
        while font.getlength(text) > width / len(rows[0]):
            text = text[:-1]
        draw.text((left + (i + 0.5) * width / len(rows[0]), top - 2), text, "black", font, anchor="mb")
    return np.asarray(canvas)


def save_picture(path, picture):
    """-> path"""
    save_file(path, lambda f: Image.fromarray(picture).save(f, format="PNG"))
    return path


def side_by_side(panels, captions):
    """Pictures of one height, each with its captions (a list of lines) under it -> one picture on white."""
    gap = max(14, panels[0].shape[1] // 30)
    font, line = ImageFont.load_default(gap), gap + gap // 3
    height, width = panels[0].shape[0], sum(p.shape[1] for p in panels) + gap * (len(panels) + 1)
    canvas = Image.new("RGB", (width, height + 2 * gap + line * max(map(len, captions))), "white")
    draw, left = ImageDraw.Draw(canvas), gap
    for panel, lines in zip(panels, captions):
        canvas.paste(Image.fromarray(panel), (left, gap))
        for i, text in enumerate(lines):
            draw.text((left + panel.shape[1] / 2, height + gap + gap // 2 + i * line), text, "black", font, anchor="ma")
        left += panel.shape[1] + gap
    return np.asarray(canvas)


COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")


def ticks(low, high, log):
    """Round numbers from low to high: on a log axis powers of ten, with other multiples where there are few of them."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for multiples in ((1,), (1, 2, 5), range(1, 10)):
            found = [v for k in powers for m in multiples if low <= (v := m * 10.0 ** k) <= high]
            if len(found) > 2:
                break
        return found
    step = 10.0 ** math.floor(math.log10(high - low))
    step *= next((m for m in (0.1, 0.2, 0.5) if high - low <= 8 * m * step), 1)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def draw_curves(series, x_label, y_label, log=("x", "y"), size=(800, 500)):
    """{name: (xs, ys)} -> (H,W,3) uint8: a line with its points for each name, axes with numbers, a legend on the
    right. Points that are not finite, or not above zero on a log axis, are left out."""
    scale = [math.log10 if axis in log else float for axis in "xy"]
    lines = {name: [p for p in zip(*points) if all(math.isfinite(v) and (v > 0 or axis not in log)
                                                   for v, axis in zip(p, "xy"))] for name, points in series.items()}
    values = [[p[i] for points in lines.values() for p in points] or [1.0] for i in (0, 1)]
    font, (width, height) = ImageFont.load_default(14), size
    ranges = []
    for i, found in enumerate(values):  # with a margin, so that no point lies on the frame
        low, high = scale[i](min(found)), scale[i](max(found))
        margin = 0.05 * (high - low) or 0.1 * max(abs(low), 1)
        ranges.append((low - margin, high + margin))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    right = max(draw.textlength(name, font) for name in [*lines, ""]) + 44
    box = (70, 30, width - right, height - 50)  # left, top, right, bottom

    def place(p):
        x, y = ((scale[i](v) - ranges[i][0]) / (ranges[i][1] - ranges[i][0]) for i, v in enumerate(p))
        return box[0] + x * (box[2] - box[0]), box[3] - y * (box[3] - box[1])

    for i, axis in enumerate("xy"):
        low, high = (10 ** v if axis in log else v for v in ranges[i])
        for value in ticks(low, high, axis in log):
            x, y = place((value, values[1][0]) if axis == "x" else (values[0][0], value))
            draw.line((x, box[1], x, box[3]) if axis == "x" else (box[0], y, box[2], y), "#e5e5e5")
            at, anchor = ((x, box[3] + 6), "mt") if axis == "x" else ((box[0] - 6, y), "rm")
            draw.text(at, f"{value:.6g}", "black", font, anchor=anchor)
    draw.rectangle(box, outline="black")
    draw.text(((box[0] + box[2]) / 2, height - 8), x_label, "black", font, anchor="mb")
    draw.text((8, 8), y_label, "black", font, anchor="lt")
    for i, (name, points) in enumerate(lines.items()):
        colour, at = COLOURS[i % len(COLOURS)], [place(p) for p in points]
        top = box[1] + 10 + 20 * i
        draw.line([(box[2] + 10, top), (box[2] + 30, top)], colour, 3)
        draw.text((box[2] + 36, top), name, "black", font, anchor="lm")
        draw.line(at, colour, 2)
        for x, y in at if len(at) < 30 else ():  # marks would hide a long curve
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
    return np.asarray(canvas)


def save_curves(out):
    """OUT/log.jsonl -> OUT/curves.png: a row for each job, of its losses, its gradients' norms and what it makes (D2,
    spread), against iterations."""
    try:
        lines = [json.loads(line) for line in pathlib.Path(out, "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return
    hidden, panels = {"step", "seconds", "images_per_second", "memory_mib", "skipped", "data_wait", "D2_first"}, []
    for job in dict.fromkeys(line["job"] for line in lines):
        mine = [line for line in lines if line["job"] == job]
        names = [k for k in dict.fromkeys(k for line in mine for k in line) if k not in hidden]
        for title, fits in (("losses", lambda k: "loss" in k), ("norms of gradients", lambda k: k.endswith("_norm")),
                            ("what it makes", lambda k: "loss" not in k and not k.endswith("_norm"))):
            curves = {k: tuple(zip(*[(line["step"], line[k]) for line in mine if isinstance(line.get(k), float)]))
                      for k in names if fits(k)}
            curves = {k: xy for k, xy in curves.items() if xy}
            values = [v for _, ys in curves.values() for v in ys]
            wide = values and min(values) > 0 and max(values) > 10 * min(values)
            panels.append(draw_curves(curves, "iteration", f"{job}: {title}", ("y",) if wide else (), (560, 300))
                          if curves else np.full((300, 560, 3), 255, np.uint8))
    if panels:
        save_picture(pathlib.Path(out, "curves.png"), grid(np.stack(panels), 3, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Degradations

def lowres4(image, rng):
    """4x4 boxes replaced by their mean."""
    height, width, channels = image.shape
    return image.reshape(height // 4, 4, width // 4, 4, channels).mean((1, 3)).repeat(4, 0).repeat(4, 1)


def inpaint(image, rng):
    """The central square of half the side filled with noise."""
    out, side = image.astype(np.float64), len(image)
    hole = slice(side // 4, side // 4 + side // 2)
    out[hole, hole] = 127.5 * (1 + rng.standard_normal(out[hole, hole].shape))
    return out


def jpeg10(image, rng):
    """Through JPEG at quality 10."""
    buffer = io.BytesIO()
    as_pillow(image).save(buffer, "JPEG", quality=10)
    return np.asarray(Image.open(buffer)).reshape(image.shape)


def noisy(image, rng):
    """Gaussian noise of half the range's half: x0 + 0.5 z in units of [-1, 1]."""
    return image + 0.5 * 127.5 * rng.standard_normal(image.shape)


DEGRADATIONS = {"lowres4": lowres4, "inpaint": inpaint, "jpeg10": jpeg10, "noise0.5": noisy}


def degrade(name, images, *key, first=0):
    """The reference x1 of a restoration bridge: images (n,H,W,C) uint8, rows from `first` on of a whole batch -> the
    same, degraded. Each depends on its row and the key, whole numbers, alone."""
    rows = [DEGRADATIONS[name](image, np.random.default_rng((*key, i))) for i, image in enumerate(images, first)]
    return np.stack(rows).round().clip(0, 255).astype(np.uint8)


def check_degradation(flag, name, side, channels):
    if name == "lowres4" and side % 4:
        raise UserError(f"{flag} lowres4: the image side {side} is not a multiple of 4")
    if name == "jpeg10" and channels not in (1, 3):
        raise UserError(f"{flag} jpeg10: JPEG has 1 or 3 channels, not {channels}")


def psnr(images, truth):
    """Mean over the images of 10 log10(255^2 / mean squared error), both (n,H,W,C) uint8."""
    error = ((images.astype(np.float64) - truth) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255 ** 2 / np.maximum(error, 1e-3))).mean())
