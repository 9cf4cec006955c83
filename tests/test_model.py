"""The network, its averages, its files."""
import functools
import hashlib
import http.server
import os
import pickle
import threading

import pytest
import torch

from interpolants import FAMILIES, preconditioning
from model import (SIZES, SiT, UserError, download, ema_update, frozen_copy, guided, load_checkpoint, load_model, parse_name,
                   save_checkpoint, sincos_positions)


def shaken(**options):
    """A small network whose zero-initialised parts are random, so that everything matters."""
    torch.manual_seed(0)
    net = SiT(**{**dict(size="XXS", patch=2, image_size=8, channels=3, num_classes=5), **options})
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.05)
    return net


# The released SiT-XL/2 and DiT-XL/2 hold these names; x is any block.
RELEASED = """pos_embed x_embedder.proj.weight x_embedder.proj.bias t_embedder.mlp.0.weight t_embedder.mlp.0.bias
t_embedder.mlp.2.weight t_embedder.mlp.2.bias y_embedder.embedding_table.weight blocks.x.attn.qkv.weight blocks.x.attn.qkv.bias
blocks.x.attn.proj.weight blocks.x.attn.proj.bias blocks.x.mlp.fc1.weight blocks.x.mlp.fc1.bias blocks.x.mlp.fc2.weight
blocks.x.mlp.fc2.bias blocks.x.adaLN_modulation.1.weight blocks.x.adaLN_modulation.1.bias final_layer.linear.weight
final_layer.linear.bias final_layer.adaLN_modulation.1.weight final_layer.adaLN_modulation.1.bias""".split()


def test_state_dict_names_are_those_of_the_released_weights():
    net = SiT(size="XXS", precondition=preconditioning(FAMILIES["ve"]))
    names = {name.replace(f"blocks.{i}.", "blocks.x.") for i in range(len(net.blocks)) for name in net.state_dict()
             if not name.startswith("blocks.") or name.startswith(f"blocks.{i}.")}
    assert names == set(RELEASED)


@pytest.mark.parametrize("size, millions", [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_parameter_counts_are_the_published_ones(size, millions):
    """arXiv:2212.09748, table 4, counts a last layer of twice the channels (learned sigma)."""
    with torch.device("meta"):
        net = SiT(size, 2, 32, 8, 1000)
    count = sum(p.numel() for p in net.parameters() if p.requires_grad) - 4 * 4 * net.x_embedder.proj.out_channels
    assert round(count / 1e6) == pytest.approx(millions, abs=1)
    width, depth, _ = SIZES[size]
    assert net.pos_embed.shape == (1, 256, width) and len(net.blocks) == depth
    tokens = 16 * width + width  # patches of 2x2x4 in
    embeddings = (256 * width + width + width * width + width) + 1001 * width
    block = 18 * width ** 2 + (3 + 1 + 4 + 1 + 6) * width
    last = width * 32 + 32 + 2 * width ** 2 + 2 * width
    assert count == tokens + embeddings + depth * block + last


def test_published_widths_depths_and_heads():
    assert {k: SIZES[k] for k in ("S", "B", "L", "XL")} == {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16),
                                                           "XL": (1152, 28, 16)}
    assert parse_name("SiT-XL/2") == ("XL", 2) and parse_name("SiT-S/8") == ("S", 8)
    for name in ("SiT-H/2", "DiT-XL/2", "SiT-XL", "SiT-XL/0", "XL/2", ""):
        with pytest.raises(UserError, match="SiT-SIZE/PATCH"):
            parse_name(name)


@pytest.mark.parametrize("patch, side, channels, classes", [(2, 8, 1, 0), (4, 12, 3, 10), (7, 28, 4, 1000), (1, 4, 6, 3)])
def test_any_square_size_channels_and_classes(patch, side, channels, classes):
    net = shaken(patch=patch, image_size=side, channels=channels, num_classes=classes)
    x, t = torch.randn(2, channels, side, side), torch.rand(2)
    y = torch.tensor([0, max(0, classes - 1)])
    assert net(x, t, y).shape == x.shape
    torch.testing.assert_close(net(x, t), net(x, t, torch.full((2,), classes)))  # no label is the null class, the last one


def test_patches_come_back_where_they_came_from():
    """With identity weights and no blocks the network is a copy: patch order, channel order and positions in agreement."""
    net = SiT("XXS", 2, 8, 3, 1)
    net.blocks = torch.nn.ModuleList()
    with torch.no_grad():
        net.pos_embed.zero_()
        net.x_embedder.proj.weight.zero_()
        net.x_embedder.proj.bias.zero_()
        for c in range(3):
            for i in range(2):
                for j in range(2):
                    net.x_embedder.proj.weight[(i * 2 + j) * 3 + c, c, i, j] = 1
        net.final_layer.norm_final = torch.nn.Identity()
        net.final_layer.linear.weight.copy_(torch.eye(12, 64))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net(x, torch.rand(2), torch.zeros(2, dtype=torch.long)), x)


def test_a_new_network_predicts_zero_and_its_blocks_are_the_identity():
    net = SiT("XXS", 2, 8, 3, 5)
    assert net(torch.randn(2, 3, 8, 8), torch.rand(2)).abs().max() == 0
    h = torch.randn(2, 16, 64)
    torch.testing.assert_close(net.blocks[0](h, torch.randn(2, 64)), h)


def test_positions_are_the_published_formula():
    table = sincos_positions(64, 3)
    assert table.shape == (1, 9, 64)
    for row in range(3):
        for column in range(3):
            for i in (0, 5, 15):
                frequency = 10000 ** (-i / 16)
                expected = [torch.tensor(v * frequency) for v in (column, column, row, row)]
                found = table[0, row * 3 + column, [i, 16 + i, 32 + i, 48 + i]]
                torch.testing.assert_close(found, torch.stack([f(v) for f, v in zip((torch.sin, torch.cos) * 2, expected)]).float())


def test_attention_and_qk_norm():
    net = shaken(qk_norm=True)
    assert {"blocks.0.attn.q_norm.weight", "blocks.0.attn.k_norm.bias"} <= net.state_dict().keys()
    attn, x = shaken().blocks[0].attn, torch.randn(2, 5, 64)
    q, k, v = attn.qkv(x).view(2, 5, 3, 2, 32).unbind(2)
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) / 32 ** 0.5).softmax(-1)
    by_hand = attn.proj(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(2, 5, 64))
    torch.testing.assert_close(attn(x), by_hand, rtol=1e-4, atol=1e-5)


def test_preconditioning_is_applied_around_the_network():
    table = preconditioning(FAMILIES["ve"])
    plain, wrapped = shaken(), shaken(precondition=table)
    wrapped.load_state_dict(plain.state_dict())
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0.0, 0.3, 1.0])
    sigma = FAMILIES["ve"].beta(t)[:, None, None, None]
    c_in, c_skip, c_out = (sigma ** 2 + 0.25).rsqrt(), 0.25 / (sigma ** 2 + 0.25), 0.5 * sigma * (sigma ** 2 + 0.25).rsqrt()
    torch.testing.assert_close(wrapped(x, t), c_skip * x + c_out * plain(c_in * x, t), rtol=1e-3, atol=1e-3)


def test_guidance_scales():
    net = shaken()
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 3])
    calls = []
    net.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    conditional, unconditional = net(x, t, y), net(x, t)
    calls.clear()
    torch.testing.assert_close(guided(net, x, t, y, 1.0), conditional)
    torch.testing.assert_close(guided(net, x, t, y, 0.0), unconditional)
    assert calls == [2, 2]
    torch.testing.assert_close(guided(net, x, t, y, 2.5), unconditional + 2.5 * (conditional - unconditional), rtol=1e-4, atol=1e-5)
    assert calls == [2, 2, 4]


def test_ema_warms_up_and_then_keeps_its_decay():
    net = shaken()
    ema = frozen_copy(net)
    before = ema.pos_embed.clone()
    with torch.no_grad():
        net.final_layer.linear.bias += 1.0
    start = ema.final_layer.linear.bias.clone()
    ema_update(ema, net, 0.9, 0)  # (1 + 0) / (10 + 0) = 0.1
    torch.testing.assert_close(ema.final_layer.linear.bias, start + 0.9)
    ema_update(ema, net, 0.9, 10 ** 6)
    torch.testing.assert_close(ema.final_layer.linear.bias, start + 0.91)
    torch.testing.assert_close(ema.pos_embed, before)
    assert not any(p.requires_grad for p in ema.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def small_checkpoint(path):
    net = shaken()
    config = {"network": dict(size="XXS", patch=2, image_size=8, channels=3, num_classes=5), "interpolant": "linear",
              "prediction": "velocity", "model": "SiT-XXS/2"}
    save_checkpoint(path, {"config": config, "ema": net.state_dict()})
    return net


def test_load_model_rebuilds_the_network_alone(tmp_path):
    net = small_checkpoint(tmp_path / "a.pt")
    again, config = load_model(tmp_path / "a.pt")
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    torch.testing.assert_close(again(x, t), net(x, t), rtol=0, atol=0)
    assert config["prediction"] == "velocity" and not again.training and not any(p.requires_grad for p in again.parameters())


def test_a_save_that_fails_leaves_the_last_good_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"step": 1})

    def fail(content, f):
        f.write(b"half")
        raise OSError("no space left on device")
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 1} and os.listdir(tmp_path) == ["a.pt"]


class Bomb:
    def __reduce__(self):
        return os.system, ("touch " + Bomb.mark,)


def test_bad_checkpoints_are_named_and_nothing_is_executed(tmp_path):
    good = tmp_path / "good.pt"
    small_checkpoint(good)
    content = good.read_bytes()
    Bomb.mark = str(tmp_path / "executed")
    cases = {"missing": None, "empty": b"", "text": b"<html>not found</html>", "half": content[:len(content) // 2],
             "short": content[:-1], "pickle": pickle.dumps(Bomb()), "plain": pickle.dumps([1, 2])}
    for name, data in cases.items():
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(UserError, match=name):
            load_model(path)
    torch.save({"config": {}, "ema": Bomb()}, tmp_path / "bomb")
    with pytest.raises(UserError, match="nothing was executed"):
        load_model(tmp_path / "bomb")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(UserError, match="no configuration"):
        load_model(tmp_path / "other")
    with pytest.raises(UserError, match="folder"):
        load_model(tmp_path)
    for i, config in enumerate(({}, 1, {"network": {"size": "XXL"}}, {"network": {"wings": 2}}, {"network": {"patch": 0}})):
        torch.save({"config": config, "ema": {}}, tmp_path / f"config{i}")
        with pytest.raises(UserError, match=f"config{i}"):
            load_model(tmp_path / f"config{i}")
    torch.save(torch.load(good, weights_only=True), tmp_path / "legacy", _use_new_zipfile_serialization=False)
    legacy = (tmp_path / "legacy").read_bytes()
    for length in range(0, len(legacy) // 2, max(1, len(legacy) // 100)):
        (tmp_path / "legacy").write_bytes(legacy[:length])
        with pytest.raises(UserError, match="legacy"):
            load_model(tmp_path / "legacy")
    state = load_checkpoint(good)
    del state["ema"]["pos_embed"]
    torch.save(state, tmp_path / "keys")
    with pytest.raises(UserError, match="pos_embed"):
        load_model(tmp_path / "keys")
    assert not os.path.exists(Bomb.mark)


# ---------------------------------------------------------------------------------------------------------------------
# Downloads, from a server in this process

@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()


def test_download_checks_before_it_renames(server, tmp_path):
    folder, address = server
    data = os.urandom(3 << 20)
    (folder / "w.bin").write_bytes(data)
    target, sha = tmp_path / "sub" / "w.bin", hashlib.sha256(data).hexdigest()
    assert download(address + "w.bin", target, sha, len(data)) == target and target.read_bytes() == data
    (folder / "w.bin").unlink()
    assert download(address + "w.bin", target, sha) == target  # found, checked, not fetched again
    for wrong in (dict(sha256="0" * 64), dict(sha256=sha, size=5)):
        with pytest.raises(UserError, match="w.bin"):
            download(address + "w.bin", target, **wrong)
    assert target.read_bytes() == data


def test_download_that_is_wrong_or_missing_leaves_nothing_and_says_where_to_put_it(server, tmp_path, monkeypatch):
    folder, address = server
    monkeypatch.setattr("model.PAUSES", ())
    (folder / "w.bin").write_bytes(b"<html>sorry</html>")
    target = tmp_path / "w.bin"
    for url in (address + "w.bin", address + "absent.bin", "http://127.0.0.1:1/w.bin"):
        with pytest.raises(UserError, match="put it at") as error:
            download(url, target, "0" * 64)
        assert str(target) in str(error.value)
        assert not target.exists() and not (tmp_path / "w.bin.part").exists()


