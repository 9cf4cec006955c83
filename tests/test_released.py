"""Weights of others: released SiT and DiT, Stable Diffusion's autoencoder, safetensors; latents cached once."""
import argparse
import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import ROOT, SMALL
from interpolants import FAMILIES, convert
from model import LATENT_SCALE, Autoencoder, SiT, UserError, load_autoencoder, load_checkpoint, load_model, load_safetensors
from train_teacher import load_images


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# SiT and DiT

def released(path, channels=4, learn_sigma=True, wrap=None):
    """A checkpoint in the published layout: a small network of 8x8 latents whose last layer also predicts variances."""
    net = SiT("XXS", 2, 8, channels, 10)
    state = {name: value + 0.1 * draw(*value.shape, seed=i) if name != "pos_embed" else value
             for i, (name, value) in enumerate(net.state_dict().items())}
    if learn_sigma:
        state["final_layer.linear.weight"], state["final_layer.linear.bias"] = 0.1 * draw(4 * 2 * channels, 64), 0.1 * draw(4 * 2 * channels)
    torch.save(wrap(state) if wrap else state, path)
    return state


def published_forward(state, x, t, y, heads=2):
    """DiT's forward pass as its paper and code describe it, written from the state dict; t as its sinusoids count it."""
    def linear(name, h):
        return h @ state[name + ".weight"].T + state[name + ".bias"]

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    p, side = 2, x.shape[2] // 2
    h = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=p).flatten(2).transpose(1, 2) + state["pos_embed"]
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


WRAPS = {"plain": None, "ema": lambda s: {"model": {k: v * 0 for k, v in s.items()}, "ema": s, "opt": {"lr": 1e-4},
                                          "args": argparse.Namespace(model="SiT", lr=1e-4, data=None)}}


@pytest.mark.parametrize("wrap", sorted(WRAPS))
def test_released_sit(tmp_path, wrap):
    """Time reversal and sigma dropping: our v(x, t) = -v_theirs(x, 1 - t)."""
    state = released(tmp_path / "SiT-XXS-2-64x64.pt", wrap=WRAPS[wrap])
    net, config = load_model(tmp_path / "SiT-XXS-2-64x64.pt")
    assert (config["model"], config["interpolant"], config["prediction"], net.num_classes) == ("SiT-XXS/2", "linear", "velocity", 10)
    x, t, y = draw(4, 4, 8, 8), torch.tensor([0.05, 0.3, 0.7, 1.0]), torch.tensor([0, 3, 9, 10])
    theirs = published_forward(state, x, 1 - t, y)[:, :4]
    torch.testing.assert_close(net(x, t, y), -theirs, atol=1e-5, rtol=1e-5)
    # Their data prediction, x + (1 - t') v, is ours.
    torch.testing.assert_close(convert(FAMILIES["linear"], net(x, t, y), "velocity", "data", x, t), x + t.reshape(-1, 1, 1, 1) * theirs,
                               atol=1e-5, rtol=1e-5)


def test_released_dit(tmp_path):
    """At the vp time with a discrete step's abar the network is asked for that step; noise converts to data with that abar."""
    state = released(tmp_path / "DiT-XXS-2-64x64.pt")
    net, config = load_model(tmp_path / "DiT-XXS-2-64x64.pt")
    assert (config["model"], config["interpolant"], config["prediction"]) == ("DiT-XXS/2", "vp", "noise")
    steps = torch.tensor([0, 37, 500, 999])
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[steps]
    t = net.timesteps[steps]
    path, x, y = FAMILIES["vp"], draw(4, 4, 8, 8), torch.tensor([0, 3, 9, 10])
    torch.testing.assert_close(path.alpha(t.double()) ** 2, abar, rtol=1e-5, atol=1e-8)
    eps = published_forward(state, x, steps.float(), y)[:, :4]
    torch.testing.assert_close(net(x, t, y), eps, atol=1e-5, rtol=1e-5)
    a = abar.float().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(convert(path, eps, "noise", "data", x, t)[1:3], ((x - (1 - a).sqrt() * eps) / a.sqrt())[1:3], atol=1e-4, rtol=1e-4)


def test_blocks_equal_timms():
    """timm's attention and MLP, which the published code is built of, with the same weights."""
    pytest.importorskip("timm")
    from timm.models.vision_transformer import Attention, Mlp
    block = SiT("XXS", 2, 8, 4, 10).blocks[0]
    theirs, mlp = Attention(64, num_heads=2, qkv_bias=True), Mlp(64, 256, act_layer=lambda: torch.nn.GELU(approximate="tanh"))
    theirs.load_state_dict(block.attn.state_dict())
    mlp.load_state_dict(block.mlp.state_dict())
    x = draw(2, 16, 64)
    torch.testing.assert_close(block.attn(x), theirs(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block.mlp(x), mlp(x), atol=1e-5, rtol=1e-5)


class Malice:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_released_files_that_are_not(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    released("SiT-a.pt", wrap=lambda s: {"ema": s, "args": argparse.Namespace(hook=Malice())})
    released("weights.pt")
    released("SiT-b.pt", wrap=lambda s: {k: v for k, v in s.items() if k != "blocks.1.attn.qkv.bias"})
    released("SiT-c.pt", wrap=lambda s: {**s, "blocks.9.attn.qkv.bias": torch.zeros(3)})
    for name, says in (("SiT-a.pt", "nothing was executed"), ("weights.pt", "name the file"), ("SiT-b.pt", "blocks.1.attn.qkv.bias"),
                       ("SiT-c.pt", "10 blocks of width 64")):
        refused("distill", "--teacher_ckpt", name, "--iters", 1, says=("--teacher_ckpt " + name, says))
    assert not pathlib.Path("executed").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The autoencoder and its files

def write_safetensors(path, tensors, change=None):
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, value in tensors.items():
        content = value.contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [len(body), len(body) + len(content)]}
        body += content
    if change:
        change(header)
    text = json.dumps(header).encode()
    pathlib.Path(path).write_bytes(len(text).to_bytes(8, "little") + text + body)


def small_autoencoder(seed=0):
    net = Autoencoder(3, 4, (32, 64), 1)
    for i, p in enumerate(net.parameters()):
        p.data = draw(*p.shape, seed=1000 * seed + i) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    return net.eval().requires_grad_(False)


# Some numbers of diffusers' AutoencoderKL with the weights of small_autoencoder(): mean, log-variance and decoded image.
GOLDEN = {"mean": [0.13571, 0.01546, 0.07967, 0.13177, 0.07777, 0.15443],
          "log_variance": [0.21118, 0.20098, -0.0562, 0.22224, 0.1592, -0.04278],
          "image": [-0.12445, 0.11047, 0.14727, -0.08858, 0.10081, 0.13921]}


def test_the_autoencoder_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    other = diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(32, 64), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2,
                                    up_block_types=("UpDecoderBlock2D",) * 2).eval()
    net = small_autoencoder()
    other.load_state_dict(net.state_dict())
    x, z = draw(2, 3, 16, 24), draw(2, 4, 8, 12)
    with torch.no_grad():
        law = other.encode(x).latent_dist
        image = other.decode(z / LATENT_SCALE).sample
    mean, log_variance = net.encode(x)
    for a, b in ((mean, law.mean), (log_variance, law.logvar), (net.decode(z), image)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_autoencoder_equals_a_stored_run_of_diffusers():
    net = small_autoencoder()
    mean, log_variance = net.encode(draw(2, 3, 16, 24))
    image = net.decode(draw(2, 4, 8, 12))
    for name, value in (("mean", mean), ("log_variance", log_variance), ("image", image)):
        np.testing.assert_allclose(value.flatten()[::value.numel() // 6][:6], GOLDEN[name], atol=1e-4)


def old_names(state):
    for new, old in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
        state = {k.replace(new, old): v[:, :, None, None] if new in k and v.ndim == 2 and new == ".to_q." else v for k, v in state.items()}
    return state


def test_files_of_the_autoencoder(tmp_path):
    net = small_autoencoder()
    (tmp_path / "folder").mkdir()
    write_safetensors(tmp_path / "folder" / "diffusion_pytorch_model.safetensors", net.state_dict())
    torch.save(net.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    write_safetensors(tmp_path / "old.safetensors", old_names(net.state_dict()))
    z = draw(3, 4, 8, 8)
    for name in ("folder", "diffusion_pytorch_model.bin", "old.safetensors"):
        found, _ = load_autoencoder(tmp_path / name)
        assert found.factor == 2
        torch.testing.assert_close(found.decode(z, batch=2), net.decode(z), atol=1e-5, rtol=1e-5)
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file
    tensors = {"a": draw(3, 2).bfloat16(), "b": torch.arange(5), "c": torch.zeros(0, 3), "d": torch.tensor(2.5, dtype=torch.float16)}
    save_file(tensors, tmp_path / "x.safetensors")
    for k, v in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(v, load_safetensors(tmp_path / "x.safetensors")[k])


def test_safetensors_that_lie(tmp_path):
    path, tensors = tmp_path / "x.safetensors", {"a": draw(3, 2), "b": draw(4)}

    def entry(**values):
        return lambda header: header["a"].update(values)
    lies = [entry(data_offsets=[0, 10 ** 9]), entry(data_offsets=[-8, 16]), entry(data_offsets=[24, 0]), entry(shape=[3, 3]), entry(shape=[-3, -2]),
            entry(shape=[10 ** 12, 10 ** 12]), entry(dtype="F99"), entry(data_offsets="all"), entry(data_offsets=[0.0, 24.0]), lambda h: h.update(a=3),
            lambda h: h.update(a={})]
    for change in lies:
        write_safetensors(path, tensors, change)
        with pytest.raises(UserError, match="not a safetensors file"):
            load_safetensors(path)
    write_safetensors(path, tensors)
    content = path.read_bytes()
    for cut in (0, 4, 8, 20, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(UserError, match="not a safetensors file"):
            load_safetensors(path)
    path.write_bytes((2 ** 62).to_bytes(8, "little") + content[8:])
    with pytest.raises(UserError, match="header claims"):
        load_safetensors(path)


def test_wrong_autoencoders_are_refused(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    released("SiT-x.pt")
    state = small_autoencoder().state_dict()
    torch.save({k: v for k, v in state.items() if k != "quant_conv.bias"}, "missing.bin")
    torch.save({"a": torch.zeros(1)}, "other.bin")
    torch.save(Autoencoder(3, 8, (32,), 1).state_dict(), "eight.bin")
    torch.save(state, "right.bin")
    sample = ("sample", "--ckpt", "SiT-x.pt", "--n", 2, "--steps", 2, "--out", "s.png", "--device", "cpu")
    for name, says in (("missing.bin", "missing quant_conv.bias"), ("other.bin", "not the KL autoencoder"), ("eight.bin", "8 channels, here are 4"),
                       ("none.bin", "no such file")):
        refused(*sample, "--vae", name, says=(name, says))
    refused(*sample, says="--vae is missing")


# ---------------------------------------------------------------------------------------------------------------------
# Latents once

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Forty 16x16 images in two classes, and an autoencoder of half the side."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(40):
        file = pathlib.Path("images", "ab"[i % 2], f"{i:02d}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(file)
    torch.save(small_autoencoder().state_dict(), "vae.bin")
    return "--data", "images", "--vae", "vae.bin", "--image_size", 16


CACHE = ("latents.npy", "labels.npy", "done.npy", "record.json")


def test_latents_are_cached_used_and_decoded(script, folder, tmp_path):
    """From a folder to samples in pixels: teacher and student on the cache, by the command that made it and by its name alone."""
    train = ("train_teacher", *SMALL[:1], "SiT-XXS/2", *SMALL[2:], "--iters", 2)
    code, out, err = script(*train, *folder, "--cache_latents", "cache", "--out", "out")
    assert code == 0 and "8x8x4" in out, err
    data = load_images("cache")
    vae, _ = load_autoencoder("vae.bin")
    first = np.asarray(Image.open("images/a/00.png"))
    pixels = torch.from_numpy(first.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    for mirror, view in enumerate((pixels, pixels.flip(3))):
        mean, log_variance = vae.encode(view)
        np.testing.assert_allclose(data.images[0, mirror, 0], mean[0], atol=2e-3)
        np.testing.assert_allclose(data.images[0, mirror, 1], log_variance[0], atol=2e-2)
    assert data.num_classes == 2 and list(data.labels) == [0] * 20 + [1] * 20
    chosen = np.arange(40)
    one = data.x0(data.images[chosen], chosen, slice(0, 40), torch.device("cpu"), 0, 1)
    torch.testing.assert_close(one[7:20], data.x0(data.images[chosen[7:20]], chosen, slice(7, 20), torch.device("cpu"), 0, 1))
    assert (one != data.x0(data.images[chosen], chosen, slice(0, 40), torch.device("cpu"), 0, 2)).all()
    code, _, err = script(*train, "--data", "cache", "--out", "again")
    assert code == 0, err
    state = [load_checkpoint(pathlib.Path(out, "teacher.pt"))["ema"] for out in ("out", "again")]
    assert all(torch.equal(state[0][k], state[1][k]) for k in state[0])
    code, _, err = script("distill", "--teacher_ckpt", "out/teacher.pt", "--data", "cache", "--gan_weight", 0.1, "--vae", "vae.bin", *SMALL[2:], "--iters", 2, "--out", "out")
    assert code == 0, err
    code, _, err = script("sample", "--ckpt", "out/student.pt", "--vae", "vae.bin", "--n", 4, "--out", "s.npz", "--device", "cpu")
    assert code == 0 and np.load("s.npz")["arr_0"].shape == (4, 16, 16, 3), err


def test_two_processes_cache_the_same_files_and_a_killed_run_goes_on(folder, monkeypatch):
    """Bit for bit where each process has as many threads: another number of them rounds sums otherwise."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    train = ("train_teacher.py", "--model", "SiT-XXS/2", *map(str, SMALL[2:]), "--iters", "1", *map(str, folder))
    command = [sys.executable, str(ROOT / "train_teacher.py"), *train[1:]]
    subprocess.run([*command, "--cache_latents", "one", "--out", "o1"], check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / train[0]), *train[1:],
                    "--cache_latents", "two", "--out", "o2"], check=True, capture_output=True)
    # Killed between the chunks: a stand-in for a long encoding that sleeps after the first chunk of sixteen images.
    slow = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r}); sys.argv = {["train_teacher.py", *train[1:], "--cache_latents", "cut", "--out", "o3"]!r}
import model, train_teacher
encode, count = model.Autoencoder.encode, [0]
def slowly(self, x):
    count[0] += 1
    if count[0] > 2:
        print("sleeping", flush=True); time.sleep(60)
    return encode(self, x)
model.Autoencoder.encode = slowly
train_teacher.main()
"""
    process = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE, text=True)
    assert "sleeping" in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(np.load("cut/done.npy")) == [1, 0, 0]
    subprocess.run([*command, "--cache_latents", "cut", "--out", "o3"], check=True, capture_output=True)
    for name in CACHE:
        content = {pathlib.Path(cache, name).read_bytes() for cache in ("one", "two", "cut")}
        assert len(content) == 1, name
    latents, done = (np.lib.format.open_memmap(f"cut/{name}.npy", "r+") for name in ("latents", "done"))
    latents[0], done[1] = 7, 0  # what is marked as done is not encoded again, what is not is
    latents[20] = 7
    latents.flush(), done.flush()
    subprocess.run([*command, "--fresh", "--cache_latents", "cut", "--out", "o3"], check=True, capture_output=True)
    found = np.load("cut/latents.npy")
    assert (found[0] == 7).all() and not (found[20] == 7).any()


def test_caches_that_do_not_fit(script, refused, folder):
    train = ("train_teacher", "--model", "SiT-XXS/2", *SMALL[2:], "--iters", 1, "--out", "out")
    assert script(*train, *folder, "--cache_latents", "cache")[0] == 0
    torch.save(small_autoencoder(1).state_dict(), "other.bin")
    train += ("--fresh",)
    refused(*train, *folder, "--vae", "other.bin", "--cache_latents", "cache", says=("--cache_latents cache", "another autoencoder"))
    refused(*train, *folder, "--image_size", 8, "--cache_latents", "cache", says=("--cache_latents cache", "another shape"))
    refused(*train, "--data", "cache", "--vae", "other.bin", says=("--vae other.bin", "not the autoencoder"))
    refused(*train, *folder[:4], "--cache_latents", "cache", says="--image_size")
    refused(*train, *folder, "--image_size", 15, "--cache_latents", "c2", says=("--image_size 15", "multiple of 2"))
    refused(*train, *folder[:2], "--image_size", 16, "--vae", "vae.bin", says=("--vae vae.bin", "pixels"))
    refused(*train, *folder, "--cache_latents", "images", says=("--cache_latents images", "other files"))
    pathlib.Path("images/a/bad.png").write_bytes(b"nothing")
    refused(*train, *folder, "--cache_latents", "c3", says="bad.png")
    record = json.loads(pathlib.Path("cache/record.json").read_text())
    pathlib.Path("cache/record.json").write_text(json.dumps({**record, "complete": False}))
    refused(*train, "--data", "cache", says="incomplete")


@pytest.mark.parametrize("name", ["SiT-XXS-2-64x64.pt", "DiT-XXS-2-64x64.pt"])
def test_released_weights_are_sampled_and_distilled(script, tmp_path, monkeypatch, name):
    """As they are: teacher samples with guidance, a student of them, and its samples, decoded to pixels."""
    monkeypatch.chdir(tmp_path)
    released(name, wrap=WRAPS["ema"])
    torch.save(small_autoencoder().state_dict(), "vae.bin")
    code, _, err = script("sample", "--ckpt", name, "--vae", "vae.bin", "--n", 3, "--steps", 4, "--solver", "sde", "--cfg_scale", 2, "--out", "t.npz", "--device", "cpu")
    assert code == 0 and np.load("t.npz")["arr_0"].shape == (3, 16, 16, 3), err
    code, _, err = script("distill", "--teacher_ckpt", name, "--vae", "vae.bin", "--cfg_scale", 2, *SMALL[2:], "--iters", 2)
    assert code == 0, err
    code, _, err = script("sample", "--ckpt", "out/student.pt", "--vae", "vae.bin", "--n", 3, "--out", "s.npz", "--device", "cpu")
    assert code == 0 and np.load("s.npz")["arr_0"].shape == (3, 16, 16, 3), err
