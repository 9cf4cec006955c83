"""Weights of others: released SiT and DiT, Stable Diffusion's autoencoder; latents cached once."""
import argparse
import math
import pathlib
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.autoencoder import Autoencoder, load_autoencoder
from common.data import LATENT_SCALE, Images, load_images
from common.files import load_checkpoint, read_record, write_record
from conftest import SMALL
from interpolants import FAMILIES, Batch, Problem
from model import SiT, load_model
from test_runs import Life, same, unix


SAMPLE = ("sample", "--vae", "vae.bin", "--n", 2, "--device", "cpu", "--ckpt")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# SiT and DiT

def released(path, wrap=lambda state: state):
    """A checkpoint in the published layout: a small network of 8x8 latents whose last layer also predicts variances."""
    state = {name: value + 0.1 * draw(*value.shape, seed=i) if name != "pos_embed" else value
             for i, (name, value) in enumerate(SiT("XXS", 2, 8, 4, 10).state_dict().items())}
    state["final_layer.linear.weight"], state["final_layer.linear.bias"] = 0.1 * draw(32, 64), 0.1 * draw(32)
    torch.save(wrap(state), path)
    return state


def trained(state):
    """As the published code saves it: the average beside the raw weights, the optimizer and the flags."""
    return {"model": {k: v * 0 for k, v in state.items()}, "ema": state, "opt": {"lr": 1e-4},
            "args": argparse.Namespace(model="SiT", lr=1e-4, data=None)}


def published_forward(state, x, t, y, heads=2):
    """DiT's forward pass as its paper and code describe it, from the state dict; t as its sinusoids count it."""
    def linear(name, h):
        return h @ state[name + ".weight"].T + state[name + ".bias"]

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    p, side = 2, x.shape[2] // 2
    h = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=p)
    h = h.flatten(2).transpose(1, 2) + state["pos_embed"]
    angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], 1))))
    c = c + state["y_embedder.embedding_table.weight"][y]
    for i in range(3):
        b = f"blocks.{i}."
        sa, ca, ga, sm, cm, gm = linear(b + "adaLN_modulation.1", F.silu(c))[:, None].chunk(6, 2)
        q, k, v = linear(b + "attn.qkv", norm(h) * (1 + ca) + sa).chunk(3, 2)
        q, k, v = (u.view(*u.shape[:2], heads, -1).transpose(1, 2) for u in (q, k, v))
        attended = ((q @ k.transpose(2, 3)) / q.shape[-1] ** 0.5).softmax(3) @ v
        h = h + ga * linear(b + "attn.proj", attended.transpose(1, 2).flatten(2))
        h = h + gm * linear(b + "mlp.fc2", F.gelu(linear(b + "mlp.fc1", norm(h) * (1 + cm) + sm), approximate="tanh"))
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, 2)
    h = linear("final_layer.linear", norm(h) * (1 + scale) + shift)  # (B,T,p*p*2C)
    return torch.einsum("nhwpqc->nchpwq", h.view(len(x), side, side, p, p, -1)).reshape(len(x), -1, *x.shape[2:])


@pytest.mark.parametrize("wrap", [dict, trained])
def test_released_sit(wrap):
    """Time reversal and sigma dropping: our v(x, t) = -v_theirs(x, 1 - t)."""
    state = released("SiT-XXS-2-64x64.pt", wrap)
    net, config = load_model("SiT-XXS-2-64x64.pt")
    assert (config["model"], config["interpolant"], config["prediction"]) == ("SiT-XXS/2", "linear", "velocity")
    x, t, y = draw(4, 4, 8, 8), torch.tensor([0.05, 0.3, 0.7, 1.0]), torch.tensor([0, 3, 9, 10])
    theirs = published_forward(state, x, 1 - t, y)[:, :4]
    torch.testing.assert_close(net(x, t, y), -theirs, atol=1e-5, rtol=1e-5)
    # Their data prediction, x + (1 - t') v, is ours.
    ours = Problem(FAMILIES["linear"]).data(net, Batch(t=t, y=y, x_t=x))
    torch.testing.assert_close(ours, x + t.reshape(-1, 1, 1, 1) * theirs, atol=1e-5, rtol=1e-5)


def test_released_dit():
    """At the vp time with a discrete step's abar the network is asked for that step, and that abar makes the data."""
    state = released("DiT-XXS-2-64x64.pt")
    net, config = load_model("DiT-XXS-2-64x64.pt")
    assert (config["model"], config["interpolant"], config["prediction"]) == ("DiT-XXS/2", "vp", "noise")
    steps = torch.tensor([0, 37, 500, 999])
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[steps]
    path, x, t, y = FAMILIES["vp"], draw(4, 4, 8, 8), net.timesteps[steps], torch.tensor([0, 3, 9, 10])
    torch.testing.assert_close(path.alpha(t.double()) ** 2, abar, rtol=1e-5, atol=1e-8)
    eps, a = published_forward(state, x, steps.float(), y)[:, :4], abar.float().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(net(x, t, y), eps, atol=1e-5, rtol=1e-5)
    data, theirs = Problem(path, "noise").data(net, Batch(t=t, y=y, x_t=x)), (x - (1 - a).sqrt() * eps) / a.sqrt()
    torch.testing.assert_close(data[1:3], theirs[1:3], atol=1e-4, rtol=1e-4)
    between = net.timesteps[[37, 500]].lerp(net.timesteps[[38, 501]], 0.25)
    torch.testing.assert_close(net.clock(between), torch.tensor([37.25, 500.25]), atol=0.01, rtol=0)


@pytest.mark.parametrize("name, wrap, says", [
    *((name, dict, "name the file") for name in ("weights.pt", "conditional.pt", "SiT-or-DiT.pt")),
    ("SiT-b.pt", lambda s: {k: v for k, v in s.items() if k != "blocks.1.attn.qkv.bias"}, "blocks.1.attn.qkv.bias"),
    ("SiT-c.pt", lambda s: {**s, "blocks.9.attn.qkv.bias": torch.zeros(3)}, "10 blocks of width 64")])
def test_released_files_that_are_not(refused, name, wrap, says):
    released(name, wrap)
    refused("distill", "--teacher_ckpt", name, says=("--teacher_ckpt " + name, says))


@pytest.mark.parametrize("name", ["SiT-XXS-2-64x64.pt", "DiT-XXS-2-64x64.pt"])
def test_released_weights_are_sampled_and_distilled(run, name):
    """As they are: teacher samples with guidance, a student of them, and its samples, decoded to pixels."""
    released(name, trained)
    torch.save(small_autoencoder().state_dict(), "vae.bin")
    run(*SAMPLE, name, "--steps", 2, "--solver", "sde", "--cfg_scale", 2, "--out", "t.npz")
    run("distill", "--vae", "vae.bin", "--teacher_ckpt", name, "--cfg_scale", 2, *SMALL[2:], "--iters", 1)
    run(*SAMPLE, "out/student.pt", "--out", "s.npz")
    assert np.load("t.npz")["arr_0"].shape == np.load("s.npz")["arr_0"].shape == (2, 16, 16, 3)


# ---------------------------------------------------------------------------------------------------------------------
# The autoencoder

def small_autoencoder(seed=0):
    net = Autoencoder(3, 4, (32, 64), 1)
    for i, p in enumerate(net.parameters()):
        p.data = draw(*p.shape, seed=1000 * seed + i) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    return net.eval().requires_grad_(False)


# Numbers of diffusers' AutoencoderKL(latent_channels=4, block_out_channels=(32, 64), layers_per_block=1, two of
# DownEncoderBlock2D and of UpDecoderBlock2D) with the weights of small_autoencoder().
GOLDEN = {"mean": [0.13571, 0.01546, 0.07967, 0.13177, 0.07777, 0.15443],
          "log_variance": [0.21118, 0.20098, -0.0562, 0.22224, 0.1592, -0.04278],
          "image": [-0.12445, 0.11047, 0.14727, -0.08858, 0.10081, 0.13921]}


def test_the_autoencoder_equals_a_stored_run_of_diffusers():
    net, x, z = small_autoencoder(), draw(2, 3, 16, 24), draw(2, 4, 8, 12)
    found = dict(zip(GOLDEN, (*net.encode(x), net.decode(z))))
    for name, value in found.items():
        np.testing.assert_allclose(value.flatten()[::value.numel() // 6][:6], GOLDEN[name], atol=1e-4)


def test_files_of_the_autoencoder():
    """In a folder, and of an older kind, whose queries are 1x1 convolutions."""
    net, z, old = small_autoencoder(), draw(3, 4, 8, 8), {}
    for name, value in net.state_dict().items():
        value = value[:, :, None, None] if name.endswith("to_q.weight") else value
        for new, word in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{word}.")
        old[name] = value
    pathlib.Path("folder").mkdir()
    torch.save(net.state_dict(), "folder/diffusion_pytorch_model.bin")
    torch.save(old, "old.bin")
    for name in ("folder", "old.bin"):
        found, _ = load_autoencoder(name)
        assert found.factor == 2
        torch.testing.assert_close(found.decode(z, batch=2), net.decode(z), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make, says", [
    (lambda s: {k: v for k, v in s.items() if k != "quant_conv.bias"}, "quant_conv.bias"),
    (lambda s: {"a": torch.zeros(1)}, "not the KL autoencoder"), (None, "--vae is missing"),
    (lambda s: Autoencoder(3, 8, (32,), 1).state_dict(), "--vae x.bin: makes latents of 8 channels, here are 4")])
def test_wrong_autoencoders_are_refused(refused, make, says):
    released("SiT-x.pt")
    if make:
        torch.save(make(small_autoencoder().state_dict()), "x.bin")
    refused("sample", "--ckpt", "SiT-x.pt", "--device", "cpu", *(("--vae", "x.bin") if make else ()), says=says)


# ---------------------------------------------------------------------------------------------------------------------
# Latents once

FOLDER = ("--data", "images", "--vae", "vae.bin", "--image_size", 16)
TRAIN = ("train_teacher", "--model", "SiT-XXS/2", *SMALL[2:])


@pytest.fixture
def folder():
    """Twenty 16x16 images in two classes, and an autoencoder of half the side."""
    for name in "ab":
        pathlib.Path("images", name).mkdir(parents=True)
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3)).astype(np.uint8)):
        Image.fromarray(pixels).save(f"images/{'ab'[i % 2]}/{i:02d}.png")
    torch.save(small_autoencoder().state_dict(), "vae.bin")


def test_latents_are_cached_used_and_decoded(run, folder):
    """From a folder to samples in pixels: teacher and student on the cache, by the command that made it or by name."""
    run(*TRAIN, *FOLDER, "--cache_latents", "cache", "--iters", 1)
    run(*TRAIN, "--data", "cache", "--out", "again", "--iters", 1)
    run("distill", *SMALL[2:], "--data", "cache", "--gan_weight", 0.1, "--vae", "vae.bin", "--iters", 1)
    run(*SAMPLE, "out/student.pt", "--out", "s.npz")
    run("flow_map", *SMALL[2:], "--data", "cache", "--vae", "vae.bin", "--iters", 1)
    run(*SAMPLE, "out/flow_map.pt", "--steps", 2, "--out", "s.npz")
    assert same(*(load_checkpoint(pathlib.Path(out, "teacher.pt"))["ema"] for out in ("out", "again")))
    assert np.load("s.npz")["arr_0"].shape == (2, 16, 16, 3)
    data, vae = load_images("cache"), small_autoencoder()
    for row, name in ((0, "a/00"), (19, "b/19")):  # of the first chunk and of the last
        pixels = torch.from_numpy(np.array(Image.open(f"images/{name}.png"))).permute(2, 0, 1)[None].float() / 127.5 - 1
        for mirror, view in enumerate((pixels, pixels.flip(3))):
            mean, log_variance = vae.encode(view)
            np.testing.assert_allclose(data.images[row, mirror], torch.cat([mean, log_variance]), atol=1e-2)
    assert data.num_classes == 2 and list(data.labels) == [0] * 10 + [1] * 10


def test_latents_are_drawn_from_the_posterior_of_image_or_mirror():
    laws = np.array([[1, np.log(0.25)], [-1, np.log(4)]], np.float16)  # mean, log-variance: image, mirror image
    rows, chosen = laws[None, ..., None, None, None].repeat(2000, 0) + np.zeros((4, 8, 8), np.float16), np.arange(2000)
    data = Images(rows, chosen, (), {"count": 2000})
    x0 = data.x0(rows, chosen, slice(0, 2000), torch.device("cpu"), 0, 1) / LATENT_SCALE
    straight = x0.mean((1, 2, 3)) > 0
    assert float(straight.float().mean()) == pytest.approx(0.5, abs=0.05)
    for part, mean, std in ((x0[straight], 1, 0.5), (x0[~straight], -1, 2)):
        assert float(part.mean()) == pytest.approx(mean, abs=0.02) and float(part.std()) == pytest.approx(std, rel=0.02)


@unix
@pytest.mark.slow
def test_two_processes_cache_the_same_files_and_a_killed_run_goes_on(script, folder, tmp_path, monkeypatch):
    def flags(cache):
        return (*TRAIN[1:], "--data", tmp_path / "images", "--vae", tmp_path / "vae.bin", "--image_size", 16, "--iters",
                1, "--out", tmp_path / f"out {cache}", "--cache_latents", tmp_path / cache)

    def read(cache):
        return {file.name: file.read_bytes() for file in pathlib.Path(cache).iterdir()}
    assert script("train_teacher", *flags("one"))[0] == 0
    Life(tmp_path, "train_teacher", *flags("two"), world=2).end()
    encode, views = Autoencoder.encode, []

    def cut(self, x):  # between the first chunk of sixteen images, of two views, and the second
        views.append(x)
        if len(views) > 2:
            raise KeyboardInterrupt
        return encode(self, x)
    monkeypatch.setattr(Autoencoder, "encode", cut)
    assert script("train_teacher", *flags("cut"))[0] == 130 and list(np.load("cut/done.npy")) == [1, 0]
    monkeypatch.setattr(Autoencoder, "encode", encode)
    assert script("train_teacher", *flags("cut"))[0] == 0
    assert read("one") == read("two") == read("cut") and len(read("one")) == 4

    latents, done = (np.lib.format.open_memmap(f"cut/{name}.npy", "r+") for name in ("latents", "done"))
    latents[0], latents[18], done[1] = 7, 7, 0  # what is marked as done is not encoded again, what is not is
    latents.flush(), done.flush()
    assert script("train_teacher", *flags("cut"), "--fresh")[0] == 0
    found = np.load("cut/latents.npy")
    assert (found[0] == 7).all() and not (found[18] == 7).any()

    monkeypatch.setattr(Autoencoder, "encode", cut), views.clear()
    assert script("train_teacher", *flags("anew"))[0] == 130 and list(np.load("anew/done.npy")) == [1, 0]
    for file in pathlib.Path("images").rglob("*.png"):  # made anew, under the same names
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    monkeypatch.setattr(Autoencoder, "encode", encode)
    for cache in ("anew", "after"):
        assert script("train_teacher", *flags(cache))[0] == 0
    assert read("anew") == read("after")


def test_caches_that_do_not_fit(run, refused, folder):
    run(*TRAIN, *FOLDER, "--iters", 1, "--cache_latents", "cache")
    torch.save(small_autoencoder(1).state_dict(), "other.bin")
    shutil.copytree("cache", "part")
    write_record("part/record.json", {**read_record("cache/record.json"), "complete": False})
    shutil.copytree("images", "broken")
    pathlib.Path("broken/a/bad.png").write_bytes(b"nothing")
    cache = ("--cache_latents", "cache")
    shutil.copytree("images", "edited")
    image = sorted(pathlib.Path("edited").rglob("*.png"))[0]
    image.write_bytes(image.read_bytes()[:-12] + b"0" * 12)  # of the same size, and it can be read
    for flags, says in (
            ((*FOLDER, "--data", "edited", *cache), ("--cache_latents cache", "another contents")),
            ((*FOLDER, "--vae", "other.bin", *cache), ("--cache_latents cache", "another autoencoder")),
            ((*FOLDER, "--image_size", 8, *cache), ("--cache_latents cache", "another shape")),
            (("--data", "cache", "--vae", "other.bin"), ("--vae other.bin", "not the autoencoder")),
            ((*FOLDER[:4], *cache), "--image_size"),
            ((*FOLDER, "--image_size", 15, "--cache_latents", "c2"), ("--image_size 15", "multiple of 4")),
            (FOLDER, ("--vae vae.bin", "pixels")),
            ((*FOLDER, "--cache_latents", "images"), ("--cache_latents images", "other files")),
            ((*FOLDER, "--data", "broken", "--cache_latents", "c3"), "bad.png"),
            (("--data", "part"), "incomplete")):
        refused(*TRAIN, "--fresh", "--iters", 1, *flags, says=says)
    refused(*TRAIN, "--fresh", "--data", "cache", "--interpolant", "bridge", "--reference", "noise0.5",
            says=("--reference noise0.5", "bridges between latents"))
    refused("distill", *SMALL[2:], "--data", "images", "--gan_weight", 0.1, "--data_dir", "decoded",
            says=("--data images", "pixels", "makes latents"))
    assert not pathlib.Path("decoded").exists()  # refused before it decodes them
    shutil.copy(sorted(pathlib.Path("images").rglob("*.png"))[0], "broken/a/bad.png")  # mended, the encoding goes on
    run(*TRAIN, "--fresh", *FOLDER, "--iters", 1, "--data", "broken", "--cache_latents", "c3")
