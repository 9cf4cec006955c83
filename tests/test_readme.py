"""The README's commands run as they are written, with flags appended that make them tiny; its links and flags exist."""
import pathlib
import re
import shlex

import numpy as np
import pytest
from PIL import Image

import fid
import train_teacher
from conftest import ROOT
from test_fid import StandIn
from test_released import released, small_autoencoder, write_safetensors
from train_teacher import draw_digits

README = (ROOT / "README.md").read_text()


def commands():
    """Every call of one of our scripts in the README's bash blocks, in order: (script, flags)."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("#")[0].split("&&"):
                words = shlex.split(part)
                script = next((w for w in words if w in ("train_teacher.py", "distill.py", "sample.py", "fid.py")), None)
                if script:
                    found.append((script[:-3], words[words.index(script) + 1:]))
    return found


TINY = {"train_teacher": ["--iters", "1", "--batch", "8", "--device", "cpu", "--fresh"],
        "distill": ["--iters", "1", "--batch", "8", "--device", "cpu", "--fresh"],
        "sample": ["--samples", "10", "--device", "cpu"],
        "fid": ["--device", "cpu", "--weights", "weights.pth"]}


def test_commands_run_as_written_at_tiny_size(script, tmp_path, monkeypatch):
    """One after the other in an empty folder, as a reader would, so that each finds what those above it have written."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("mnist_test.npz", images=rng.integers(0, 256, (20, 28, 28)).astype(np.uint8), labels=np.arange(20) % 10)
    np.savez("mnist.npz", x_train=rng.integers(0, 256, (50, 28, 28)).astype(np.uint8), y_train=np.arange(50) % 10)
    # fid.py with a network of 12 features; MNIST and ADM's reference batch as small files of the same layout.
    monkeypatch.setattr(fid, "load_inception", lambda path, device: StandIn())
    monkeypatch.setattr(fid, "POOL", 12)
    monkeypatch.setattr(fid, "SPATIAL", 6)
    pathlib.Path("weights.pth").write_bytes(b"any")
    pixels = rng.integers(0, 256, (1000, 4, 4, 3)).astype(np.uint8)
    np.savez("VIRTUAL_imagenet256_labeled.npz", arr_0=pixels, mu=np.ones(12), sigma=np.eye(12), mu_s=np.ones(6), sigma_s=np.eye(6))
    # A small ImageNet, CIFAR-10, an autoencoder and released weights of its layout.
    for folder in ("imagenet", "cifar10"):
        for i in range(12):
            file = pathlib.Path(folder, "train", "ab"[i % 2], f"{i}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(file)
    pathlib.Path("sd-vae-ft-ema").mkdir()
    write_safetensors("sd-vae-ft-ema/diffusion_pytorch_model.safetensors", small_autoencoder().state_dict())
    released("SiT-XL-2-256x256.pt")
    monkeypatch.setattr(train_teacher, "read_idx_set", lambda name, data_dir: (pixels[..., :1], np.arange(1000) % 10))
    monkeypatch.setattr(train_teacher, "draw_digits", lambda n=40, size=24, seed=0: draw_digits(40, size, seed))
    ran = []
    for name, flags in commands():
        flags = ["SiT-XXS/2" if word == "SiT-XL/2" else word for word in flags]
        if "FOLDER" in flags:
            continue
        steps = ["--steps", "2"] if name == "sample" and "--steps" in flags else []
        few = ["--samples", "1000" if "kid" in " ".join(flags) else "20"] if name == "fid" and flags[0].endswith(".pt") else []
        side = ["--image_size", "16"] if "--image_size" in flags else []
        flags = [flag for flag in flags if flag != "--compile"]  # minutes of compiling each; test_runs has a run of its own
        code, _, err = script(name, *flags, *TINY[name], *steps, *few, *side)
        assert code == 0, (name, flags, err)
        ran.append(name)
    assert {"train_teacher", "distill", "sample", "fid"} == set(ran) and len(ran) >= 10


def test_both_first_commands_are_complete():
    """On a machine with only Python: environment, requirements, work."""
    for marker in ("first", "tests"):
        block = re.search(rf"<!-- {marker} -->\s*```bash\n(.*?)```", README, re.S)[1]
        assert "python3 -m venv" in block and "pip install -r requirements.txt" in block
        assert len(block.replace("\\\n", " ").strip().splitlines()) == 1


def test_files_named_in_the_readme_exist():
    for path in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", ["train_teacher", "distill", "sample", "fid"])
def test_the_table_of_flags_is_complete(script, name):
    _, stdout, _ = script(name, "--help")
    for flag in set(re.findall(r"^  (--\w+)", stdout, re.M)):
        assert f"`{flag}`" in README, f"{flag} of {name}.py"


def test_the_project_speaks_of_itself_alone():
    for path in [ROOT / "README.md", *ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        text = path.read_text()
        for word in ("/wo" + "rk/", "/tm" + "p/w", ".lib" + "rary", "sha" + "red/"):
            assert word not in text, (path, word)
