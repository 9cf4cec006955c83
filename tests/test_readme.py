"""The commands of README and docs run with flags appended that make them tiny; links, files and tests that they name
exist."""
import pathlib
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import common.data
from common.data import draw_digits
from common.files import load_checkpoint, save_checkpoint
from common.run import UserError
from conftest import ROOT
from sample import choose_labels
from test_fid import stand_in
from test_released import released, small_autoencoder

README = (ROOT / "README.md").read_text()
PAGES = ["docs/imagenet.md", "README.md", "docs/results.md", "docs/evaluation.md"]  # each finds what it needs
SCRIPTS = {path.name for pattern in ("*.py", "tests/score.py") for path in ROOT.glob(pattern)}


def commands(text):
    """Every call of one of our scripts in a page's bash blocks, in order: (script, flags)."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("#")[0].split("&&"):
                words = shlex.split(part)
                at = next((i for i, word in enumerate(words) if word.split("/")[-1] in SCRIPTS), None)
                if at is not None:
                    found.append((words[at].split("/")[-1][:-3], words[at + 1:]))
    return found


TRAINS = ["--iters", "1", "--batch", "8", "--device", "cpu", "--fresh"]
TINY = {"sample": ["--samples", "10", "--device", "cpu"], "fid": ["--device", "cpu", "--weights", "weights.pth"],
        "score": []}  # the others train


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the commands expect a reader to have: MNIST, folders of images, an autoencoder, released weights; all
    small. And fid.py with a network of 12 features."""
    def noise(*shape):
        return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    monkeypatch.chdir(tmp_path)
    np.savez("mnist_test.npz", images=noise(20, 28, 28), labels=np.arange(20) % 10)
    np.savez("mnist.npz", x_train=noise(100, 28, 28), y_train=np.arange(100) % 10)
    stand_in(monkeypatch.setattr)
    pathlib.Path("weights.pth").write_bytes(b"any")
    pixels = noise(1000, 4, 4, 3)
    np.savez("VIRTUAL_imagenet256_labeled.npz", arr_0=pixels, mu=np.ones(12), sigma=np.eye(12), mu_s=np.ones(6),
             sigma_s=np.eye(6))
    for name in ("imagenet/train", "cifar10/train", "photos"):
        for i in range(12):
            file = pathlib.Path(name, "ab"[i % 2], f"{i}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise(16, 16, 3)).save(file)
    pathlib.Path("sd-vae-ft-ema").mkdir()
    torch.save(small_autoencoder().state_dict(), "sd-vae-ft-ema/diffusion_pytorch_model.bin")
    released("SiT-XL-2-256x256.pt")
    monkeypatch.setattr(common.data, "read_idx_set", lambda name, data_dir: (pixels[..., :1], np.arange(1000) % 10))
    monkeypatch.setattr(common.data, "draw_digits", lambda n=40, size=24, seed=0: draw_digits(40, size, seed))


@pytest.mark.slow
def test_commands_run_at_tiny_size(run, folder):
    """One page after the other in one folder, as a reader would, so that each command finds what those above it have
    written. What is run: every command of these scripts, its flags as written, followed by those of TINY, which win;
    without torchrun, --compile (test_runs compiles) and the shell around it; every network as an XXS one."""
    ran = []
    for page in PAGES:
        for name, flags in commands((ROOT / page).read_text()):
            if name == "train_teacher" and "--model" not in flags:
                flags = [*flags, "--model", "SiT-XXS/4"]
            flags = [re.sub(r"^SiT-\w+/", "SiT-XXS/", word) for word in flags if word != "--compile"]
            steps = ["--steps", "2"] if name == "sample" and "--steps" in flags else []
            sampled = name == "fid" and flags[0].endswith(".pt")
            few = ["--samples", "1000" if "kid" in " ".join(flags) else "20"] if sampled else []
            side = ["--image_size", "16"] if "--image_size" in flags else []
            run(name, *flags, *TINY.get(name, TRAINS), *steps, *few, *side)
            ran.append(name)
    assert {"train_teacher", "distill", "sample", "score"} <= set(ran) and len(ran) >= 40


def test_the_lines_of_python(small_teacher, tmp_path, monkeypatch):
    """On a student of five classes, whose names and numbers give the same images, as on the command line."""
    monkeypatch.chdir(tmp_path)
    state, names, found = load_checkpoint(small_teacher), ["zero", "one", "two", "three", "four"], {}
    config = {**state["config"], "classes": names, "student": {"times": [0.7], "cfg_scale": 1.0}}
    config["network"] = {**config["network"], "num_classes": 5}
    weights, key = dict(state["ema"]), "y_embedder.embedding_table.weight"
    weights[key] = torch.randn(6, weights[key].shape[1], generator=torch.Generator().manual_seed(0))
    save_checkpoint("out/student.pt", {"config": config, "ema": weights})
    block, = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(block, found)
    net, config, images, generate = (found[name] for name in ("net", "config", "images", "generate"))
    assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8
    np.testing.assert_array_equal(images, generate(net, config, ["three", "one", 4]))
    np.testing.assert_array_equal(images, generate(net, config, np.array([3, 1, 4]), 0, range(3)))
    assert (images != generate(net, config, [3, 1, 4], seed=1)).any()
    with torch.inference_mode():
        np.testing.assert_array_equal(images, generate(net, config, [3, 1, 4]))
    assert choose_labels("three,1", 3, config).tolist() == [3, 1, 3]
    with pytest.raises(UserError, match="labels: this checkpoint has no class ten, only zero, one, two"):
        generate(net, config, ["ten"])
    with pytest.raises(UserError, match="x1 is missing: a bridge .lowres4. starts from images"):
        generate(net, {**config, "reference": "lowres4"}, [3])
    with pytest.raises(UserError, match="x1: 3 images to start from for 1 asked for"):
        generate(net, {**config, "reference": "lowres4"}, [3], x1=images)


def test_both_first_commands_are_complete():
    """On a machine with only Python: environment, requirements, work."""
    for marker in ("first", "tests"):
        block = re.search(rf"<!-- {marker} -->\s*```bash\n(.*?)```", README, re.S)[1]
        assert "python3 -m venv" in block and "pip install -r requirements.txt" in block
        assert len(block.replace("\\\n", " ").strip().splitlines()) == 1


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))])
def test_what_a_page_names_exists(page):
    text = (ROOT / page).read_text()
    for path in re.findall(r"\]\(([\w/.-]+)(?:#[\w-]+)?\)", text):
        assert (ROOT / page).parent.joinpath(path).exists(), path
    tests = "\n".join(p.read_text() for p in ROOT.glob("tests/test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    for module, name in re.findall(r"`((?:common\.)?[a-z_]+)\.(?!py`)([a-z_]+)`", text):
        file = ROOT / (module.replace(".", "/") + ".py")
        assert not file.exists() or re.search(rf"(def {name}\(|^{name} =)", file.read_text(), re.M), f"{module}.{name}"


def test_the_project_speaks_of_itself_alone():
    files = [p for pattern in ("*.md", "*.py", "*/*.md", "*/*.py") for p in ROOT.glob(pattern)]
    for path in files:
        text = path.read_text()
        for word in ("/wo" + "rk/", "/tm" + "p/w", ".lib" + "rary", "sha" + "red/"):
            assert word not in text, (path, word)


def test_the_house():
    """Arrows point upwards only, lines end at 120 columns."""
    order = ["interpolants", "common.run", "common.files", "common.images", "common.data", "model",
             "common.autoencoder", "sample", "train_teacher", "flow_map", "distill", "fid"]
    stages = {"train_teacher", "flow_map", "distill", "fid"}
    for path in (*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("tests/*.py")):
        assert max(map(len, path.read_text().splitlines()), default=0) <= 120, path
    for place, module in enumerate(order):
        text = (ROOT / (module.replace(".", "/") + ".py")).read_text()
        for name in re.findall(r"^\s*(?:from|import) ([\w.]+)", text, re.M):
            allowed = name not in stages or (module, name) == ("distill", "flow_map")  # the trajectory loss
            assert name not in order or order.index(name) < place and allowed, f"{module} imports {name}"
