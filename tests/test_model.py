"""The network and its guidance."""
import itertools

import pytest
import torch

import model
from common.run import UserError
from interpolants import FAMILIES, preconditioning
from model import SIZES, SiT, guided, parse_name, sincos_positions


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
t_embedder.mlp.2.weight t_embedder.mlp.2.bias y_embedder.embedding_table.weight blocks.x.attn.qkv.weight
blocks.x.attn.qkv.bias blocks.x.attn.proj.weight blocks.x.attn.proj.bias blocks.x.mlp.fc1.weight blocks.x.mlp.fc1.bias
blocks.x.mlp.fc2.weight blocks.x.mlp.fc2.bias blocks.x.adaLN_modulation.1.weight blocks.x.adaLN_modulation.1.bias
final_layer.linear.weight final_layer.linear.bias final_layer.adaLN_modulation.1.weight
final_layer.adaLN_modulation.1.bias""".split()


def test_a_network_that_would_not_hear_x1_is_refused(monkeypatch):
    class Deaf(SiT):
        def forward(self, x_t, t, y=None, *rest, **more):
            return super().forward(x_t, t, y)
    config = {"network": dict(size="XXS", patch=2, image_size=8, channels=1, num_classes=2)}
    monkeypatch.setattr(model, "SiT", Deaf)
    model.build_model(config)
    for more, name in (({"reference_channels": 1}, "x1"), ({"second_time": True}, "r")):
        with pytest.raises(TypeError, match=f"Deaf lacks the argument {name}"):
            model.build_model({"network": {**config["network"], **more}})


def test_hacks_without_a_bias_are_initialised(monkeypatch):
    class Bare(model.Attention):
        def __init__(self, width, *rest):
            super().__init__(width, *rest)
            self.qkv = torch.nn.Linear(width, 3 * width, bias=False)
    monkeypatch.setattr(model, "Attention", Bare)
    assert SiT("XXS", 2, 8, 1, 2).blocks[0].attn.qkv.bias is None


def test_state_dict_names_are_those_of_the_released_weights():
    names = SiT(size="XXS", precondition=preconditioning(FAMILIES["ve"])).state_dict()
    assert set(names) == {name.replace(".x.", f".{i}.") for name in RELEASED for i in range(3)}


@pytest.mark.parametrize("size, row, millions", [
    ("S", (384, 12, 6), 33), ("B", (768, 12, 12), 130), ("L", (1024, 24, 16), 458), ("XL", (1152, 28, 16), 675)])
def test_sizes_are_the_published_ones(size, row, millions):
    """arXiv:2212.09748, table 4, counts a last layer of twice the channels (learned sigma)."""
    with torch.device("meta"):
        net = SiT(size, 2, 32, 8, 1000)
    count = sum(p.numel() for p in net.parameters() if p.requires_grad) - 4 * 4 * net.width
    assert SIZES[size] == row and round(count / 1e6) == pytest.approx(millions, abs=1)
    assert net.pos_embed.shape == (1, 256, net.width)


def test_names_of_models():
    assert parse_name("SiT-XL/2") == ("XL", 2) and parse_name("SiT-S/8") == ("S", 8)
    for name in ("SiT-H/2", "DiT-XL/2", "SiT-XL", "SiT-XL/0", "XL/2", ""):
        with pytest.raises(UserError, match="SiT-SIZE/PATCH"):
            parse_name(name)


@pytest.mark.parametrize("patch, side, channels, classes", [(2, 8, 1, 0), (4, 12, 3, 10), (7, 28, 4, 9), (1, 4, 6, 3)])
def test_any_square_size_channels_and_classes(patch, side, channels, classes):
    net = shaken(patch=patch, image_size=side, channels=channels, num_classes=classes)
    x, t = torch.randn(2, channels, side, side), torch.rand(2)
    assert net(x, t, torch.tensor([0, max(0, classes - 1)])).shape == x.shape
    torch.testing.assert_close(net(x, t), net(x, t, torch.full((2,), classes)))  # no label is the null class, the last


def test_patches_come_back_where_they_came_from():
    """With identity weights and no blocks the network is a copy: patch, channel and position order in agreement."""
    net = SiT("XXS", 2, 8, 3, 1)
    net.blocks = torch.nn.ModuleList()
    net.pos_embed.data.zero_(), net.x_embedder.proj.bias.data.zero_()
    for c, i, j in itertools.product(range(3), range(2), range(2)):
        net.x_embedder.proj.weight.data[(i * 2 + j) * 3 + c] = 0
        net.x_embedder.proj.weight.data[(i * 2 + j) * 3 + c, c, i, j] = 1
    net.final_layer.norm_final = torch.nn.Identity()
    net.final_layer.linear.weight.data.copy_(torch.eye(12, 64))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net(x, torch.rand(2), torch.zeros(2, dtype=torch.long)), x)


def test_a_new_network_predicts_zero_and_its_blocks_are_the_identity():
    net = SiT("XXS", 2, 8, 3, 5)
    assert net(torch.randn(2, 3, 8, 8), torch.rand(2)).abs().max() == 0
    h = torch.randn(2, 16, 64)
    torch.testing.assert_close(net.blocks[0](h, torch.randn(2, 64)), h)


def test_positions_are_the_published_formula():
    table = sincos_positions(64, 3).view(3, 3, 4, 16)  # row, column, (sin, cos of the column, of the row), frequency
    place, frequency = torch.arange(3.0), 10000 ** (-torch.arange(16) / 16)
    for row, column in itertools.product(range(3), range(3)):
        angles = [place[column] * frequency, place[row] * frequency]
        expected = torch.stack([f(angle) for angle in angles for f in (torch.sin, torch.cos)])
        torch.testing.assert_close(table[row, column], expected)


def test_tokens_are_in_order_in_memory():
    """Any other order lasts through the residual stream, and every norm copies it."""
    net, seen = shaken(), []
    for module in net.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_pre_hook(lambda module, given: seen.append(given[0].is_contiguous()))
    net(torch.randn(2, 3, 8, 8), torch.rand(2))
    assert seen == [True] * 7


def test_times_are_counted_as_in_every_checkpoint_so_far():
    net, seen = SiT("XXS", 2, 8, 1, 1, second_time=True), []
    for embedder in (net.t_embedder, net.r_embedder):
        embedder.register_forward_pre_hook(lambda _, given: seen.append(float(given[0])))
    x, t, r = torch.zeros(1, 1, 8, 8), torch.tensor([0.3]), torch.tensor([0.1])
    net(x, t, r=r), net(x, t)
    assert seen == pytest.approx([300, 2, 300, 3])


def test_queries_and_keys_are_normalised_when_asked():
    norms = {"blocks.0.attn.q_norm.weight", "blocks.0.attn.k_norm.bias"}
    assert norms <= shaken(qk_norm=True).state_dict().keys() and not norms & shaken().state_dict().keys()
    attn, x = shaken(qk_norm=True).blocks[0].attn, torch.randn(2, 5, 64)
    with torch.no_grad():
        attn.q_norm.bias.zero_(), attn.k_norm.bias.zero_()
        before = attn(x)
        attn.qkv.weight[:128] *= 3
        attn.qkv.bias[:128] *= 3
    torch.testing.assert_close(attn(x), before, rtol=1e-3, atol=1e-4)  # the size of queries and keys is of no account


def test_under_autocast_the_last_layer_stays_exact_and_rounded_weights_change_nothing():
    net, x, t, y = shaken(qk_norm=True), torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 3])
    net.requires_grad_(False)
    exact, seen, kept = net(x, t, y), [], {k: v.clone() for k, v in net.state_dict().items()}
    model.round_weights(net)  # nothing without autocast
    assert all(torch.equal(v, kept[k]) for k, v in net.state_dict().items())
    for module in (net.blocks[1].mlp.fc1, net.final_layer.linear):
        module.register_forward_hook(lambda module, given, out: seen.append((out.dtype, out, given[0])))
    with torch.autocast("cpu", torch.bfloat16):
        before = net(x, t, y)
        model.round_weights(net)
        assert torch.equal(before, net(x, t, y)) and before.dtype == torch.float32
    assert [dtype for dtype, *_ in seen] == 2 * [torch.bfloat16, torch.float32]
    last = net.final_layer.linear
    assert torch.equal(seen[1][1], torch.nn.functional.linear(seen[1][2], last.weight, last.bias))
    assert net.blocks[0].attn.qkv.weight.dtype == torch.bfloat16 and last.weight.dtype == torch.float32
    torch.testing.assert_close(before, exact, rtol=0.1, atol=0.02)
    assert not torch.equal(before, exact)


def test_preconditioning_is_applied_around_the_network():
    plain, wrapped = shaken(), shaken(precondition=preconditioning(FAMILIES["ve"]))
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0.0, 0.3, 1.0])
    sigma = FAMILIES["ve"].beta(t)[:, None, None, None]
    c_in = (sigma ** 2 + 0.25).rsqrt()
    c_skip, c_out = 0.25 * c_in ** 2, 0.5 * sigma * c_in
    torch.testing.assert_close(wrapped(x, t), c_skip * x + c_out * plain(c_in * x, t), rtol=1e-3, atol=1e-3)


def test_guidance_scales():
    net, calls = shaken(), []
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 3])
    conditional, unconditional = net(x, t, y), net(x, t)
    net.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    for scale, rows in ((1.0, 2), (0.0, 2), (2.5, 4), (0.5, 4)):
        expected = unconditional + scale * (conditional - unconditional)
        torch.testing.assert_close(guided(net, scale)(x, t, y), expected, rtol=1e-4, atol=1e-5)
        assert calls.pop() == rows and not calls  # one pass
    alone = shaken(num_classes=0)
    torch.testing.assert_close(guided(alone, 3.0)(x, t, y * 0), alone(x, t))  # nothing to guide with
    torch.testing.assert_close(guided(net, 3.0)(x, t, None), unconditional)  # both are the null class


def test_guidance_by_interval():
    net = shaken(reference_channels=3)
    x, x1 = torch.randn(2, 4, 3, 8, 8)
    t, y = torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0, 1, 2, 0])
    plain, strong = net(x, t, y, x1), guided(net, 3.0)(x, t, y, x1)
    part = guided(net, 3.0, (0.3, 0.7))(x, t, y, x1)
    torch.testing.assert_close(part[1:3], strong[1:3])
    torch.testing.assert_close(part[[0, 3]], plain[[0, 3]], rtol=1e-4, atol=1e-5)
    assert (part[1] - plain[1]).abs().max() > 1e-3
    none = guided(net, 0.0, (0.3, 0.7))(x, t, y, x1)
    torch.testing.assert_close(none[1:3], net(x, t, None, x1)[1:3], rtol=1e-4, atol=1e-5)


def test_an_average_holds_the_steps_so_far_and_its_decay_acts_from_the_start():
    """By its formula, without a trace of the weights it started from; decays differ within a run of a few steps."""
    nets, found = [torch.nn.Linear(3, 2) for _ in range(6)], []
    for decay in (0.9, 0.99, 0.9999, 1.0):
        average = model.frozen_copy(torch.nn.Linear(3, 2))
        for step, net in enumerate(nets, 1):
            model.ema_update(average, net, decay, step)
        weights = torch.tensor([decay ** (len(nets) - i) for i in range(1, len(nets) + 1)])
        expected = sum(w * net.weight for w, net in zip(weights / weights.sum(), nets))
        assert torch.allclose(average.weight, expected, atol=1e-5), decay
        found.append(average.weight.clone())
    assert not torch.allclose(found[0], found[1], atol=1e-4) and not torch.allclose(found[1], found[2], atol=1e-5)
