"""Train a teacher: regress a SiT on the velocity, data, noise or score of any interpolant.

    python train_teacher.py                                    # procedural digits on whatever device there is
    python train_teacher.py --data mnist --interpolant vp --iters 6000 --out out/mnist_vp
    torchrun --nproc_per_node=8 train_teacher.py --data FOLDER --image_size 64 --model SiT-B/4 --batch 256

Writes OUT/teacher.pt (everything: the same command again goes on from it), OUT/log.jsonl and OUT/samples_XXXXXXX.png.
"""
import time

import numpy as np
import torch

from common.autoencoder import cache_latents, check_autoencoder, load_autoencoder
from common.data import Stream, holds_latents, load_images, load_pairs, load_reference
from common.files import load_checkpoint, save_checkpoint
from common.images import DEGRADATIONS, save_curves, save_picture, stack_rows
from common.run import (Parser, Run, UserError, add_run_flags, check_idle, code_commit, command, generator, in_turn,
                        number, one_of, put_in_training)
from interpolants import FAMILIES, PREDICTIONS, Batch, Problem, Sampler, family, preconditioning, regression_loss
from model import build_model, ema_update, frozen_copy, load_weights, parse_name
from sample import choose_labels, column_names, generate, problem_of


def draw_batch(stream, step, images, label_dropout, antithetic):
    """Images of a step (Batch of x0, y and, on bridges, x1) with fresh noise and times, some labels replaced by the
    null class; all functions of (seed, step, row of the whole batch). antithetic: rows 2i and 2i + 1 share all but
    the sign of z."""
    b = stream.draw(step, "teacher")
    drop = torch.rand(stream.batch, generator=generator(stream.seed, step, "dropout", device=stream.device),
                      device=stream.device)[stream.part]
    x1 = b.x1 if images.x1 is None else images.x1
    b = b._replace(x0=images.x0, x1=x1, y=torch.where(drop < label_dropout, stream.num_classes, images.y))
    if antithetic:
        b = Batch(*(v if v is None else v[::2].repeat_interleave(2, 0) for v in b))
        b.z[1::2] *= -1
    return b


# ---------------------------------------------------------------------------------------------------------------------
# The command

def parse_flags():
    parser = Parser(__doc__)
    add = parser.group("data")
    add("--data", default="digits", help="digits, mnist, fashion_mnist, cifar10, a .npz file or a folder of images")
    add("--pairs", default=None, help="FILE.npz of sample.py --pairs, in the place of --data: images and the noise "
        "that a teacher made them from (ReFlow)")
    add("--data_dir", default="data", help="where downloads and decoded folders are kept")
    add("--image_size", type=number(int, 1), default=None, help="side in pixels (the data's own)")
    add("--skip_broken", action="store_true", help="leave out images of a folder that cannot be read")
    add("--flip", action="store_true", help="mirror half of the images of each batch (latents always are), with what "
        "a paired bridge starts from")
    add("--unconditional", action="store_true", help="ignore labels")
    add("--vae", default=None, help="autoencoder of latents: diffusers' diffusion_pytorch_model.safetensors or .bin, "
        "or its folder")
    add("--cache_latents", default=None, help="DIR: encode --data once with --vae, both mirrors, and train on the "
        "latents; later --data DIR")
    add = parser.group("network and path")
    add("--model", default="SiT-XS/4", help="SiT-SIZE/PATCH with a size of XXS, XS, S, B, L, XL")
    add("--qk_norm", action="store_true", help="normalise queries and keys")
    add("--interpolant", type=one_of(FAMILIES), default="linear", help=", ".join(FAMILIES))
    add("--prediction", type=one_of((*PREDICTIONS, "edm")), default=None, help="velocity, data, noise, score or edm "
        "(data by EDM's preconditioning, on ve); without it data for sizes XXS and XS, else the interpolant's own")
    add("--reference", default=None, help="what a bridge starts from: " + ", ".join(DEGRADATIONS) + " (the data, "
        "degraded), an .npz with x1 (paired images), another data set (unpaired), or noise")
    add("--gamma_scale", type=number(float, 0, open_low=True), default=1.0, help="s in a bridge's gamma = s sqrt(t (1 "
        "- t))")
    add = parser.group("the loss")
    add("--label_dropout", type=number(float, 0, 1), default=0.1, help="share of labels replaced by the null class, "
        "for guidance")
    add("--antithetic", action="store_true", help="bridges: every pair of images of a batch is one image with z and "
        "with -z")
    add("--ema", type=number(float, 0, 1), default=0.99, help="decay of the averaged weights")
    add("--weight_decay", type=number(float, 0), default=0.0, help="AdamW's decay")
    add_run_flags(parser, iters=1200, lr=3e-3, warmup=100, decay_from=500, log_every=20, sample_every=1000)
    args, defaults = parser.parse_args(), vars(parser.parse_args([]))
    check_flags(args, defaults)
    return args, defaults


def check_flags(args, defaults):
    _, patch = parse_name(args.model)
    noisy = FAMILIES[args.interpolant].noisy
    if args.pairs and (noisy or args.vae or args.image_size or args.unconditional or args.flip
                       or args.data != defaults["data"]):
        raise UserError(f"--pairs {args.pairs}: has its own images, labels and noise; leave --data, --image_size, "
                        "--vae, --unconditional, --flip, bridges and other paths with gamma out")
    args.data = args.pairs or args.data
    if args.cache_latents and args.skip_broken:
        raise UserError("--skip_broken: --cache_latents encodes every image; leave it out, mend or overwrite broken "
                        "ones")
    if args.cache_latents and not (args.vae and args.image_size):
        raise UserError(f"--cache_latents {args.cache_latents}: needs --vae and --image_size, the side in pixels")
    latent = args.cache_latents or holds_latents(args.data)
    if args.vae and not latent:
        raise UserError(f"--vae {args.vae}: --data {args.data} are pixels; add --cache_latents DIR, which encodes "
                        "them, or leave --vae out")
    if latent and args.reference not in (None, "noise"):
        raise UserError(f"--reference {args.reference}: bridges between latents are not there yet; use pixels")
    if args.image_size and not args.vae and args.image_size % patch:
        raise UserError(f"--image_size {args.image_size}: not a multiple of the patch size {patch} of --model "
                        f"{args.model}")
    if noisy and args.reference is None:
        raise UserError(f"--interpolant {args.interpolant}: needs --reference, what it starts from ("
                        f"{', '.join(DEGRADATIONS)}, paired.npz, another data set, or noise)")
    check_idle(args, defaults, [(flag, "--interpolant bridge", noisy) for flag in (
        "reference", "gamma_scale", "antithetic")])
    known = ("data", "edm") if FAMILIES[args.interpolant].scale_input else PREDICTIONS
    if args.prediction not in (None, *known):
        raise UserError(f"--prediction {args.prediction}: --interpolant {args.interpolant} has {', '.join(known)}")


def open_data(args, run):
    """-> Images, Reference or None, and the autoencoder or None. The first process downloads, decodes or encodes; the
    others find the result."""
    if args.pairs:
        return in_turn(lambda: load_pairs(args.pairs, args.interpolant, run.say)), None, None
    autoencoder, sha256 = load_autoencoder(args.vae, run.device) if args.vae else (None, None)
    _, patch = parse_name(args.model)
    if args.cache_latents:
        whole = autoencoder.factor * patch
        if args.image_size % whole:
            raise UserError(f"--image_size {args.image_size}: not a multiple of {whole}, by which --vae and the "
                            f"patches of --model {args.model} reduce it")
        data = cache_latents(args, autoencoder, sha256, run)
    else:
        data = in_turn(lambda: load_images(args.data, args.data_dir, args.image_size, args.seed, args.skip_broken,
                                           run.say))
    data = data._replace(labels=np.zeros_like(data.labels), classes=()) if args.unconditional else data
    data = data._replace(flip=args.flip and not data.latent)
    check_autoencoder(args.vae, autoencoder, sha256, data.latent, data.channels)
    if data.side % patch:
        raise UserError(f"--model {args.model}: its patch does not divide the {data.side}x{data.side} "
                        + ("latents; " if data.latent else f"images; add --image_size "
                           f"{max(patch, data.side // patch * patch)} or ") + "choose another patch")
    if args.reference in (None, "noise"):
        return data, None, autoencoder
    reference = in_turn(lambda: load_reference(args.reference, data.images, args.data_dir, run.say, args.skip_broken))
    if reference.kind == "unpaired" and args.prediction not in (None, "data"):
        raise UserError(f"--prediction {args.prediction}: an unpaired bridge is sampled by its posterior, which needs "
                        "the data prediction; leave it out")
    return data, reference, autoencoder


def choose_problem(args, state, sees_x1):
    """What the networks of --interpolant predict: as in the run that goes on, else --prediction, else data where the
    network is small (docs/findings.md), else the row's."""
    if state:  # its flags are these; what they mean may have changed: data on ve was once EDM's
        return problem_of(state["config"])
    path, small = family(args.interpolant, args.gamma_scale), parse_name(args.model)[0] in ("XXS", "XS")
    chosen = args.prediction or ("data" if small else path.predict)
    return Problem(path, "data" if chosen == "edm" else chosen, sees_x1, chosen == "edm")


def configure(args, problem, data, reference):
    """What a checkpoint has to say for others to rebuild, sample and distill its network."""
    size, patch = parse_name(args.model)
    network = {"size": size, "patch": patch, "image_size": data.side, "channels": data.channels,
               "num_classes": data.num_classes, "qk_norm": args.qk_norm,
               "precondition": preconditioning(problem.path, problem.edm) if problem.edm or problem.path.scale_input
               else None,
               "reference_channels": data.channels if reference and reference.kind != "unpaired" else 0}
    config = {"network": network, "model": args.model, "interpolant": args.interpolant,
              "prediction": problem.prediction, "data": args.cache_latents or args.data, "flip": data.flip,
              "pairs": args.pairs is not None, "null_class": not data.num_classes or args.label_dropout > 0,
              "reference": reference and reference.kind, "reference_source": reference and args.reference}
    if data.classes:
        counts = np.bincount(data.labels, minlength=data.num_classes)
        config.update(classes=list(data.classes), class_counts=counts.tolist())
    if data.latent:
        config["latent"] = {"autoencoder": data.latent["autoencoder"], "image_size": data.latent["image_size"]}
    if problem.path.noisy:
        config["gamma_scale"] = args.gamma_scale
    return config


def main():
    args, defaults = parse_flags()
    run = Run(args, defaults, "teacher")
    whole = 2 * run.world * args.accum
    if args.antithetic and args.batch % whole:
        raise UserError(f"--batch {args.batch}: --antithetic needs whole pairs in each process and piece; "
                        f"{max(whole, args.batch // whole * whole)} does")
    state = run.resume("teacher.pt", load_checkpoint, ("config", "model", "ema", "optimizer"))
    data, reference, autoencoder = open_data(args, run)
    made_with = {"data": data.fingerprint(), "reference": reference and reference.fingerprint()}
    run.check_same(made_with, state)
    problem = choose_problem(args, state, reference is not None)
    config, device = configure(args, problem, data, reference), run.device

    torch.manual_seed(args.seed)
    net = build_model(config).to(device)
    net.grad_checkpoint = args.grad_checkpoint
    ema, v = frozen_copy(net), put_in_training(net, torch.optim.AdamW, args.lr, args, weight_decay=args.weight_decay)
    step = 0
    if state:
        for one, key in ((net, "model"), (ema, "ema")):
            load_weights(one, state[key], run.out / "teacher.pt")
        v.load_moments(state["optimizer"])
        step, state = state["step"], None  # what was read is let go of
    if args.compile:
        net.compile()
    stream = Stream(args.seed, args.batch, run.part, device, (data.channels, data.side, data.side), data.num_classes,
                    (1e-3, 1 - 1e-3), data, reference)
    run.begin(step)
    what = "teacher" + " by EDM's preconditioning" * problem.edm
    run.introduce(what, config, data, {"network": net}, {"average": ema})

    def save(step):
        moments = v.moments()
        if run.rank == 0:
            save_checkpoint(run.out / "teacher.pt", {
                "config": config, "flags": vars(args), "step": step, "commit": code_commit(), **made_with,
                "model": net.state_dict(), "ema": ema.state_dict(), "optimizer": moments})

    def picture(step):
        save_curves(run.out)
        return draw_picture(run.out / f"samples_{step:07d}.png", ema, config, stream, autoencoder)

    batches = stream.epochs(step, args.antithetic)
    while step < args.iters:
        waited = time.perf_counter()
        images = next(batches)
        run.add(data_wait=time.perf_counter() - waited)
        b = draw_batch(stream, step, images, args.label_dropout, args.antithetic)
        for rows in run.pieces(v):
            loss = regression_loss(problem, v.wrapped, b.rows(rows)).mean()
            (loss / args.accum).backward()
            run.add(loss=loss)
        run.descend(step, grad_norm=v)
        step += 1
        ema_update(ema, net, args.ema, step)
        run.report(step, save, picture)


def draw_picture(path, net, config, stream, autoencoder):
    """Ten rows of samples by 25 steps; on bridges rows of what goes in, what comes out, and the data -> path."""
    if stream.reference:
        rows, x1, y = stream.pictured(20)
        images = generate(net, config, y, stream.seed, rows, Sampler(25), x1)
        rows = [x1, images, stream.data.images[rows]]
        return save_picture(path, stack_rows(rows, 640, ("from", "sample", "data")))
    n = 10 * (stream.num_classes if 0 < stream.num_classes <= 10 else 10)
    y, decode = choose_labels("balanced", n, config), autoencoder and autoencoder.decode
    images = generate(net, config, y, stream.seed, range(n), Sampler(25), decode=decode)
    return save_picture(path, stack_rows(np.split(images, 10), 640, (), column_names(config, y[:n // 10])))


if __name__ == "__main__":
    command(main)
