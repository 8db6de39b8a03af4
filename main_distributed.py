"""Trains S3D with MIL-NCE on narrated videos (Miech et al., CVPR 2020).

One process a GPU, or a few on the CPU; plain python, torchrun or SLURM: see README.md.
"""

import contextlib
import logging
import sys
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

import checkpoint
import distributed
from args import get_args
from evaluation import evaluate_retrieval, retrieval_set
from loss import MILNCELoss
from s3dg import S3D, Tokenizer
from training_log import BadSamples, Window, append_json, log_path, read_json, show
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
from video_loader import TEXT_WORDS, HowTo100M, StepSampler, training_batches
from youcook_loader import YouCook2


def main():
    args = get_args(__doc__)
    launch = distributed.plan_launch(args)
    if launch.spawn > 1:
        args.resume = args.resume or launch.restarts > 0
        setup_logging(verbose=False)
        prepare(args, launch, torch.device("cpu"))  # what is wrong is said once, not by each
    distributed.start(train, args, launch)


@dataclass
class Progress:
    """How far a run has come. Its checkpoints hold it, as "progress"."""

    epoch: int = 0  # finished ones
    step: int = 0
    bad_samples: int = 0  # places that another sample had to take
    bad_in_epoch: int = 0
    skipped_steps: int = 0  # for a loss or gradient that was not finite
    skipped_in_row: int = 0


@dataclass
class Job:
    """What a process trains with, all of it checked."""

    dataset: HowTo100M
    validation: YouCook2 | None
    model: S3D
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    progress: Progress
    batch_size: int  # clips of a step over all nodes
    total_steps: int
    resumed: Path | None  # the checkpoint, if any

    def steps_before(self, epoch):
        return steps_before(epoch, self.dataset, self.batch_size)


def prepare(args, processes, device):
    """Reads all input and builds the Job; refuses, in the first seconds, what would fail in the
    first hour. `processes` is a Launch or a Process. Raises InputError.
    """
    if args.batch_size % processes.nproc_per_node:
        raise InputError(
            f"--batch_size {args.batch_size} cannot be shared by {processes.nproc_per_node} "
            "processes: give a multiple"
        )
    if args.sample_timeout >= args.dist_timeout:
        raise InputError(
            f"--sample_timeout {args.sample_timeout:g} is not below --dist_timeout "
            f"{args.dist_timeout:g}: a slow sample would end the run"
        )
    batch_size = args.batch_size // processes.nproc_per_node * processes.world_size
    words = read_words(args)
    dataset = training_set(args, words)
    total_steps = steps_before(args.epochs, dataset, batch_size)
    if total_steps == 0:
        raise InputError(
            f"--batch_size: {args.epochs} epochs of the {len(dataset)} videos of {args.train_csv} "
            f"do not fill one batch of {batch_size}"
        )
    validation = validation_set(args, words) if args.evaluate else None
    model, resumed = starting_point(args, words)
    model.to(device)
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
    progress = first_progress(args, resumed, dataset, batch_size)
    optimizer, scheduler = build_optimizer(args, model, progress.step, total_steps, resumed)
    return Job(
        dataset=dataset,
        validation=validation,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        progress=progress,
        batch_size=batch_size,
        total_steps=total_steps,
        resumed=resumed and resumed["path"],
    )


def steps_before(epoch, dataset, batch_size):
    """Batches run on from epoch to epoch, so that each one visits every video once."""
    return epoch * len(dataset) // batch_size


def first_progress(args, resumed, dataset, batch_size):
    """Where to start. A checkpoint of another batch size is gone on from at the same video."""
    epoch = resumed["epoch"] if resumed else args.start_epoch
    step = steps_before(epoch, dataset, batch_size)
    if not resumed or resumed.get("progress", {}).get("videos") != len(dataset):
        return Progress(epoch, step)
    saved = dict(resumed["progress"])
    del saved["videos"]
    saved["step"] = max(step, saved.pop("clips") // batch_size)
    return Progress(**saved)


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


def train(args, process):
    """The whole training, as one process of it sees it."""
    first_rank = process.rank == 0
    make_folder(log_path(args, "txt").parent, "log_root")
    level = logging.INFO if first_rank else logging.ERROR
    setup_logging(args.verbose, log_path(args, "txt"), level)
    torch.backends.cudnn.benchmark = bool(args.cudnn_benchmark)
    args.resume = args.resume or process.is_restarted()
    job = prepare(args, process, process.device)
    log.setLevel(logging.INFO if first_rank else logging.WARNING)
    progress = job.progress
    log.info(
        "started by %s; %d videos, %d steps of %d clips",
        *(process, len(job.dataset), job.total_steps, job.batch_size),
    )
    if job.resumed:
        log.info(
            "resumed from %s, after epoch %d, step %d",
            *(job.resumed, progress.epoch, progress.step),
        )
    check_alike(process, job)
    process.begin()
    network = job.model
    if process.world_size > 1:
        ids = [process.device] if process.device.type == "cuda" else None
        network = DistributedDataParallel(job.model, device_ids=ids)
        settle(args, process, network)
    bad = BadSamples(log_path(args, "bad.csv"), process)
    sampler = StepSampler(
        len(job.dataset),
        job.batch_size,
        job.total_steps,
        first_step=progress.step,
        seed=args.seed,
        rank=process.rank,
        world_size=process.world_size,
    )
    batches = training_batches(
        job.dataset,
        sampler,
        workers=workers_of(args, process),
        timeout=args.sample_timeout,
        quarantined=bad.quarantined,
        pin_memory=args.pin_memory and process.device.type == "cuda",
        on_sample=process.on_sample,
    )
    with contextlib.closing(batches):
        if job.validation and lacks_validation(args, process, job):
            validate(args, process, job)
        for _ in range(progress.epoch, args.epochs):
            train_epoch(args, process, job, network, batches, bad)
            progress.epoch += 1
            progress.bad_in_epoch = 0
            save(args, process, job)
            if job.validation:
                validate(args, process, job)


def check_alike(process, job):
    """Every rank reads for itself what it starts from: they have to have read the same."""
    own = {
        "checkpoint": job.resumed and job.resumed.name,
        "epoch": job.progress.epoch,
        "step": job.progress.step,
        "videos": len(job.dataset),
        "batch": job.batch_size,
        "steps": job.total_steps,
        "seed": job.dataset.seed,
    }
    starts = process.gather(own)
    for rank, start in enumerate(starts):
        if start != starts[0]:
            process.refuse(
                f"--resume: rank {rank} starts from {start}, rank 0 from {starts[0]}: the nodes "
                "have different flags, or see different files"
            )


def settle(args, process, network):
    """Takes DistributedDataParallel past its first backward pass, after which it lays gradients out
    anew and adds up the ranks in another order: so a resumed run has an uninterrupted one's bits.
    """
    side = args.video_size
    video = torch.zeros(2, 3, args.num_frames, side, side, device=process.device)
    text = torch.zeros(2, TEXT_WORDS, dtype=torch.int64, device=process.device)
    restore_buffers = keep_buffers(network)
    sum(embedding.sum() for embedding in network(video, text)).backward()
    network.zero_grad()
    restore_buffers()


def keep_buffers(network):
    """A function that gives the buffers, BatchNorm's averages, the values that they have now."""
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]

    def restore():
        for buffer, before in buffers:
            buffer.copy_(before)

    return restore


def train_epoch(args, process, job, network, batches, bad):
    """Runs the steps that are left of an epoch. A signal ends the process, after a checkpoint."""
    progress, last_step = job.progress, job.steps_before(job.progress.epoch + 1)
    criterion = MILNCELoss()
    network.train()
    window = Window()
    unlisted = False  # whether any rank has found bad samples that the list does not have yet
    while progress.step < last_step:
        process.at(f"waiting for the data of step {progress.step + 1}")
        with window.waiting():
            batch = next(batches)
            process.at(f"the forward pass of step {progress.step + 1}")
            bad.found.extend(chain.from_iterable(batch["bad"]))
            # Waits for the slowest rank's data.
            signalled, replaced = process.sum(process.signal is not None, len(batch["bad"]))
        unlisted |= replaced > 0
        progress.bad_samples += replaced
        progress.bad_in_epoch += replaced

        video = to_device(batch["video"], process.device)
        text = batch["text"].to(process.device, non_blocking=True).view(-1, TEXT_WORDS)
        loss, applied = train_step(process.at, network, criterion, job.optimizer, video, text)
        lr = job.scheduler.get_last_lr()[0]
        job.scheduler.step()
        progress.step += 1
        window.count(len(video) * process.world_size)

        too_bad = progress.bad_in_epoch > args.max_bad_fraction * len(job.dataset)
        due = args.checkpoint_every and progress.step % args.checkpoint_every == 0
        shown = progress.step % args.n_display == 0 or progress.step == last_step
        if unlisted and (too_bad or due or shown or signalled or not applied):
            bad.write()
            unlisted = False
        if too_bad:
            save(args, process, job, within_epoch=True)
            process.refuse(
                f"--max_bad_fraction: {progress.bad_in_epoch} samples of epoch "
                f"{progress.epoch + 1}, which has {len(job.dataset)}, could not be read, more than "
                f"{args.max_bad_fraction:g} of them: see {bad.path}"
            )
        count_skipped(args, process, progress, applied, loss)
        if shown:
            show(args, process, job, window, loss.item(), lr)
            window = window.next()
        if signalled or (due and progress.step < last_step):
            save(args, process, job, within_epoch=True)
        if signalled:
            stop(process)


def train_step(at, network, criterion, optimizer, video, text):
    """One step; `at` is told how far it is. Returns the loss and whether the step was applied: not
    where the loss or the gradient is not finite, and then the model is as it was. These are the
    same on all ranks.
    """
    restore_buffers = keep_buffers(network)
    embeddings = network(video, text)
    at("the loss")
    loss = criterion(*embeddings)
    at("the backward pass")
    optimizer.zero_grad()
    loss.backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    finite = torch.isfinite(loss.detach() + get_total_norm(gradients)).item()
    if finite:
        optimizer.step()
    else:
        restore_buffers()
    return loss.detach(), finite


def count_skipped(args, process, progress, applied, loss):
    """Ends the run after max_bad_steps in a row."""
    if applied:
        progress.skipped_in_row = 0
        return
    progress.skipped_steps += 1
    progress.skipped_in_row += 1
    if process.rank == 0:
        log.warning(
            "step %d skipped: its loss is %g, its loss or gradient not finite (%d in a row)",
            *(progress.step, loss, progress.skipped_in_row),
        )
    if progress.skipped_in_row >= args.max_bad_steps:
        process.refuse(
            f"--max_bad_steps: {progress.skipped_in_row} steps in a row, up to step "
            f"{progress.step}, had a loss or gradient that is not finite: lower --lr, or look at "
            f"the data; the checkpoints in {checkpoint_folder(args)} have the weights from before"
        )


def save(args, process, job, within_epoch=False):
    """Rank 0 writes a checkpoint."""
    process.at("writing a checkpoint")
    if process.rank > 0:
        return
    clips = job.progress.step * job.batch_size
    content = {
        "epoch": job.progress.epoch,
        "state_dict": {f"module.{name}": v for name, v in job.model.state_dict().items()},
        "optimizer": job.optimizer.state_dict(),
        "scheduler": job.scheduler.state_dict(),
        "progress": {**asdict(job.progress), "clips": clips, "videos": len(job.dataset)},
    }
    step = job.progress.step if within_epoch else None
    if path := checkpoint.save_checkpoint(checkpoint_folder(args), content, step):
        log.info("wrote %s", path)


def stop(process):
    """Ends a process after a signal, when rank 0 has written its checkpoint."""
    process.at("the end, after a signal")
    signals = [name for name in process.gather(process.signal) if name]
    log.info("stopped by %s: start again to go on from there", signals[0])
    sys.exit(distributed.STOPPED)


def validate(args, process, job):
    """Retrieval figures of the model as rank 0 has it; the ranks share the videos."""
    process.at("validation")

    def on_video():
        process.on_sample()
        return process.signal is not None

    if process.world_size > 1:
        for buffer in job.model.buffers():  # each rank has running statistics of its own
            dist.broadcast(buffer, src=0)
    figures = evaluate_retrieval(
        job.model,
        job.validation,
        process.device,
        batch_size=args.batch_size_val,
        workers=workers_of(args, process),
        sample_timeout=args.sample_timeout,
        rank=process.rank,
        world_size=process.world_size,
        gather=process.gather,
        on_video=on_video,
    )
    if figures is None:  # nothing is lost: the checkpoint is written, and a restart validates
        stop(process)
    log.info("epoch %d, YouCook2: %s", job.progress.epoch, figures)
    if process.rank == 0:
        append_json(log_path(args, "jsonl"), {"epoch": job.progress.epoch, **figures})


def lacks_validation(args, process, job):
    """Whether the run was ended between an epoch's checkpoint and its validation."""
    ended = job.resumed and job.progress.step == job.steps_before(job.progress.epoch)
    done = not ended or any(
        "R1" in record and record["epoch"] == job.progress.epoch
        for record in read_json(log_path(args, "jsonl"))
    )
    return not process.broadcast(done)


def workers_of(args, process):
    """This process's share of the node's data workers, one at least unless none are wanted."""
    return min(args.num_thread_reader, max(1, args.num_thread_reader // process.nproc_per_node))


if __name__ == "__main__":
    run_script(main)
