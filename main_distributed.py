"""Trains S3D with MIL-NCE on narrated videos (Miech et al., CVPR 2020).

One process a GPU, or a few on the CPU; plain python, torchrun or SLURM: see README.md.
"""

import json
import logging
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import checkpoint
import distributed
from args import get_args
from evaluation import evaluate_retrieval, retrieval_set
from loss import MILNCELoss
from s3dg import S3D, Tokenizer
from utils import (
    InputError,
    check_clip_size,
    check_file,
    check_words_fit,
    log,
    lr_multiplier,
    make_folder,
    read_words,
    run_script,
    setup_logging,
    to_device,
)
from video_loader import TEXT_WORDS, HowTo100M, StepSampler
from youcook_loader import YouCook2


def main():
    args = get_args(__doc__)
    launch = distributed.plan_launch(args)
    check_inputs(args, launch)
    distributed.start(train, args, launch)


def check_inputs(args, launch):
    """Refuses, in the first seconds, what would fail in the first hour. Raises InputError."""
    if args.batch_size % launch.nproc_per_node:
        raise InputError(
            f"--batch_size {args.batch_size} cannot be shared by {launch.nproc_per_node} "
            "processes: give a multiple"
        )
    words = read_words(args)
    dataset = training_set(args, words)
    if steps_before(args.epochs, dataset, whole_batch(args, launch)) == 0:
        raise InputError(
            f"--batch_size: {args.epochs} epochs of the {len(dataset)} videos of {args.train_csv} "
            f"do not fill one batch of {whole_batch(args, launch)}"
        )
    if args.evaluate:
        validation_set(args, words)
    model, resumed = starting_point(args, words)
    build_optimizer(args, model, 0, 1, resumed)
    if not resumed and args.start_epoch >= args.epochs:
        raise InputError(f"--start_epoch {args.start_epoch} is not below --epochs {args.epochs}")
    folder = checkpoint_folder(args)
    if not args.resume and checkpoint.numbered(folder):
        raise InputError(
            f"--checkpoint_dir: {folder} holds the checkpoints of another run: give --resume to "
            "continue it, or another folder"
        )
    make_folder(log_path(args, "txt").parent, "log_root")
    make_folder(folder, "checkpoint_root")


def whole_batch(args, processes):
    """Clips of a step over all nodes; `processes` is a Launch or a Process."""
    return args.batch_size // processes.nproc_per_node * processes.world_size


def steps_before(epoch, dataset, batch_size):
    """Batches run on from epoch to epoch, so that each one visits every video once."""
    return epoch * len(dataset) // batch_size


def log_path(args, kind):
    """<log_root>/<checkpoint_dir>.txt, .jsonl; a run without a name of its own is `train`."""
    return Path(args.log_root, f"{args.checkpoint_dir or 'train'}.{kind}")


def checkpoint_folder(args):
    return Path(args.checkpoint_root, args.checkpoint_dir)


def training_set(args, words):
    return HowTo100M(
        args.train_csv,
        args.video_path,
        args.caption_root,
        Tokenizer(words, TEXT_WORDS),
        num_frames=args.num_frames,
        size=args.video_size,
        fps=args.fps,
        crop_only=bool(args.crop_only),
        centercrop=bool(args.centercrop),
        random_flip=bool(args.random_flip),
        min_time=args.min_time,
        num_candidates=args.num_candidates,
        seed=args.seed,
        decoder=args.decoder,
    )


def validation_set(args, words):
    return retrieval_set(args, YouCook2, "data/validation_youcook.csv", words)


def starting_point(args, words):
    """The S3D to start from, on the CPU, and the checkpoint that is resumed, or None.

    It is that of the newest checkpoint (--resume), of given weights (--pretrain_cnn_path), or the
    one that the flags describe.
    """
    resumed = checkpoint.newest_checkpoint(checkpoint_folder(args)) if args.resume else None
    if resumed:
        path, flag = resumed["path"], "resume"
        model = checkpoint.model_of(resumed["state_dict"], path, flag=flag)
    elif args.pretrain_cnn_path:
        model = checkpoint.load_model(args.pretrain_cnn_path)
    else:
        if args.word2vec_path:
            check_file(args.word2vec_path, "word2vec_path")
        torch.manual_seed(args.seed)  # the same weights on every rank
        try:
            model = S3D(args.num_class, word2vec_path=args.word2vec_path, init=args.weight_init)
        except ValueError as error:
            raise InputError(f"--word2vec_path: {error}") from None
    check_clip_size(args, model)
    rows = model.text_module.word_embd.num_embeddings
    check_words_fit(words, rows, args.token_to_word_path)
    return model, resumed


def build_optimizer(args, model, first_step, total_steps, resumed=None):
    """The optimizer over what is trained, and the schedule, which moves at every step.

    The schedule follows from the flags and the step alone; the optimizer goes on from `resumed`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(trained, args.lr)
    else:
        optimizer = torch.optim.SGD(trained, args.lr, momentum=args.momentum)
    if resumed:
        try:
            was_adam = "betas" in resumed["optimizer"]["param_groups"][0]
            if was_adam != (args.optimizer == "adam"):
                raise ValueError("it is of another --optimizer")
            optimizer.load_state_dict(resumed["optimizer"])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise InputError(f"--resume: {resumed['path']}: its optimizer: {error}") from None
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = args.lr
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: lr_multiplier(step, args.warmup_steps, total_steps),
        last_epoch=first_step - 1,
    )
    return optimizer, scheduler


def load_batches(args, process, dataset, first_step, total_steps):
    """An iterator over this rank's share of the batch of every step to come."""
    workers = workers_of(args, process)
    loader = DataLoader(
        dataset,
        batch_sampler=StepSampler(
            len(dataset),
            whole_batch(args, process),
            total_steps,
            first_step=first_step,
            seed=args.seed,
            rank=process.rank,
            world_size=process.world_size,
        ),
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # workers share the video list
        pin_memory=args.pin_memory and process.device.type == "cuda",
    )
    return iter(loader)


def train(args, process):
    """The whole training, as one process of it sees it."""
    first_rank = process.rank == 0
    level = logging.INFO if first_rank else logging.WARNING
    setup_logging(args.verbose, log_path(args, "txt"), level)
    torch.backends.cudnn.benchmark = bool(args.cudnn_benchmark)

    words = read_words(args)
    dataset = training_set(args, words)
    validation = validation_set(args, words) if args.evaluate else None
    batch_size = whole_batch(args, process)
    model, resumed = starting_point(args, words)
    model.to(process.device)
    first_epoch = resumed["epoch"] if resumed else args.start_epoch
    first_step = steps_before(first_epoch, dataset, batch_size)
    total_steps = steps_before(args.epochs, dataset, batch_size)
    optimizer, scheduler = build_optimizer(args, model, first_step, total_steps, resumed)
    log.info(
        "started by %s: %d processes on %s; %d videos, %d steps of %d clips",
        *(process.launcher, process.world_size, process.device.type),
        *(len(dataset), total_steps, batch_size),
    )
    if resumed:
        log.info("resumed from %s, after epoch %d", resumed["path"], first_epoch)
        if resumed["scheduler"].get("last_epoch") != first_step and first_rank:
            log.warning(
                "its batch or video list was another: the schedule goes on from step %d, where "
                "epoch %d ends now",
                *(first_step, first_epoch),
            )
    network = model
    if process.world_size > 1:
        ids = [process.device] if process.device.type == "cuda" else None
        network = DistributedDataParallel(model, device_ids=ids)

    batches = load_batches(args, process, dataset, first_step, total_steps)
    named = set()
    for epoch in range(first_epoch, args.epochs):
        network.train()
        ends = (steps_before(e, dataset, batch_size) for e in (epoch, epoch + 1))
        device, n_display = process.device, args.n_display
        steps = train_steps(
            range(*ends), batches, network, optimizer, scheduler, device, n_display, named
        )
        for record in steps:
            record["clips_per_second"] *= process.world_size
            record = {"epoch": epoch + 1, **record}
            log.info(
                "epoch {epoch}, step {step}: loss {loss:.4f}, lr {lr:.3g}, {clips_per_second:.1f} "
                "clips/s, {data_wait:.0%} of the time waiting for data".format(**record)
            )
            if first_rank:
                append_json(log_path(args, "jsonl"), record)
        if first_rank:
            content = {
                "epoch": epoch + 1,
                "state_dict": {f"module.{name}": v for name, v in model.state_dict().items()},
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
            }
            path = checkpoint.save_checkpoint(checkpoint_folder(args), content)
            log.info("wrote %s", path)
        if validation:
            figures = validate(args, process, model, validation)
            log.info("epoch %d, YouCook2: %s", epoch + 1, figures)
            if first_rank:
                append_json(log_path(args, "jsonl"), {"epoch": epoch + 1, **figures})


def validate(args, process, model, dataset):
    """Retrieval figures of the model as rank 0 has it; the ranks share the videos."""
    if process.world_size > 1:
        for buffer in model.buffers():  # each rank has running statistics of its own
            dist.broadcast(buffer, src=0)
    return evaluate_retrieval(
        model,
        dataset,
        process.device,
        batch_size=args.batch_size_val,
        workers=workers_of(args, process),
        rank=process.rank,
        world_size=process.world_size,
    )


def name_replaced(faults, named):
    """Warns of each video or caption file that a batch could not read, once in a run."""
    for fault in "\n".join(faults).splitlines():
        if fault and fault not in named:
            named.add(fault)
            log.warning("replaced an unreadable sample: %s", fault)


def train_steps(steps, batches, network, optimizer, scheduler, device, n_display, named):
    """Runs these steps; yields, every n_display of them, what there is to show of this rank."""
    criterion = MILNCELoss()
    since, clips, waited = time.perf_counter(), 0, 0.0
    for step in steps:
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        name_replaced(batch["replaced"], named)

        video = to_device(batch["video"], device)
        text = batch["text"].to(device, non_blocking=True).view(-1, TEXT_WORDS)
        loss = criterion(*network(video, text))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr = optimizer.param_groups[0]["lr"]
        scheduler.step()

        clips += len(video)
        if (step + 1) % n_display == 0 or step + 1 == steps.stop:
            loss = loss.item()  # waits for the device: the time that follows is the steps' own
            elapsed = time.perf_counter() - since
            yield {
                "step": step + 1,
                "loss": loss,
                "lr": lr,
                "clips_per_second": clips / elapsed,
                "data_wait": waited / elapsed,
            }
            since, clips, waited = time.perf_counter(), 0, 0.0


def workers_of(args, process):
    """This process's share of the node's data workers, one at least unless none are wanted."""
    return min(args.num_thread_reader, max(1, args.num_thread_reader // process.nproc_per_node))


def append_json(path, record):
    """Adds one line; a number that JSON does not know, such as a diverged loss, becomes null."""
    record = {name: value if math.isfinite(value) else None for name, value in record.items()}
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    run_script(main)
