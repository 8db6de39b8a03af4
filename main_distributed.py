"""Trains S3D with MIL-NCE on narrated videos (Miech et al., CVPR 2020).

One process a GPU, or a few on the CPU; plain python, torchrun or SLURM: see README.md.
"""

import contextlib
import importlib.util
import logging
import os
import sys
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from annotations.youcook import youcook_table
from args import get_args
from captions.readers import open_captions
from distributed.device import PRECISIONS, check_compiler, inference_amp, training_dtype
from distributed.launch import detect_launch, workers_per_rank
from distributed.process import start
from distributed.workers import prefetch_depth
from evaluation.retrieval import evaluate_retrieval, retrieval_set
from s3dg import S3D, Tokenizer, fuse_for_inference
from training import checkpoint
from training.log import BadSamples, MetricLogger, ThroughputMeter, log_path, read_records
from training.optimizer import build_optimizer
from training.step import BatchNormBuffers, TrainingStep
from utils import (
    InputError,
    check_clip_size,
    check_file,
    check_folder,
    check_words_fit,
    input_error,
    log,
    make_folder,
    read_words,
    run_script,
    setup_logging,
)
from video_decoder import ClipSpec
from video_loader import TRAINING_WORDS, HowTo100M, StepSampler, read_video_list, training_batches
from youcook_loader import YouCook2


def main():
    args = get_args(__doc__, "main_distributed")
    launch = detect_launch(args)
    if launch.spawn > 1:
        args.resume = args.resume or launch.restarts > 0
        setup_logging(verbose=False)
        setup(args, launch, torch.device("cpu"))  # what is wrong is said once, not by each
    start(train, args, launch)


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
class TrainState:
    """What a process trains with, all of it checked."""

    dataset: HowTo100M
    validation: YouCook2 | None
    model: S3D
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    progress: Progress
    batch_size: int  # clips of a step over all nodes and micro-batches
    total_steps: int
    resumed: Path | None  # the checkpoint, if any
    resumed_scaler: dict | None  # its float16 scaling, if it had one

    def steps_before(self, epoch):
        return steps_before(epoch, self.dataset, self.batch_size)


def setup(args, processes, device):
    """Reads all input and builds the TrainState; refuses, in the first seconds, what would fail in
    the first hour. `processes` is a Launch or a RankContext. Raises InputError.
    """
    if args.batch_size % processes.nproc_per_node:
        raise InputError(
            f"--batch_size {args.batch_size} cannot be shared by {processes.nproc_per_node} "
            "processes: give a multiple"
        )
    if args.compile:
        with input_error("--compile"):
            check_compiler()
        if args.grad_checkpoint:
            raise InputError("--compile and --grad_checkpoint exclude each other: drop one")
    if args.sample_timeout >= args.dist_timeout:
        raise InputError(
            f"--sample_timeout {args.sample_timeout:g} is not below --dist_timeout "
            f"{args.dist_timeout:g}: a slow sample would end the run"
        )
    micro_batch = args.batch_size // processes.nproc_per_node
    batch_size = micro_batch * processes.world_size * args.accum_steps
    words = read_words(args)
    dataset = training_set(args, words)
    total_steps = steps_before(args.epochs, dataset, batch_size)
    if total_steps == 0:
        raise InputError(
            f"--batch_size: {args.epochs} epochs of the {len(dataset)} videos of {args.train_csv} "
            f"do not fill one batch of {batch_size}"
        )
    validation = validation_set(args, words) if args.evaluate else None
    model, resumed = build_model(args, words)
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last_3d)
    model.grad_checkpoint = args.grad_checkpoint
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
    if args.tensorboard:
        if not importlib.util.find_spec("tensorboard"):
            raise InputError("--tensorboard: the package tensorboard is not here: pip install it")
        make_folder(log_path(args, "tensorboard"), "tensorboard")
    progress = first_progress(args, resumed, dataset, batch_size)
    optimizer, scheduler = build_optimizer(args, model, progress.step, total_steps, resumed)
    return TrainState(
        dataset=dataset,
        validation=validation,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        progress=progress,
        batch_size=batch_size,
        total_steps=total_steps,
        resumed=resumed and resumed["path"],
        resumed_scaler=resumed and resumed.get("scaler"),
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
    with input_error("--train_csv"):
        names = read_video_list(args.train_csv)
    check_folder(args.video_path, "video_path")
    with input_error("--caption_root"):
        captions = open_captions(args.caption_root)
    dataset = HowTo100M(
        names,
        args.video_path,
        captions,
        Tokenizer(words, TRAINING_WORDS),
        ClipSpec(args.num_frames, args.video_size, args.fps, args.decoder),
        crop_only=bool(args.crop_only),
        centercrop=bool(args.centercrop),
        random_flip=bool(args.random_flip),
        min_time=args.min_time,
        num_candidates=args.num_candidates,
        seed=args.seed,
    )
    with input_error("--video_path"):
        dataset.check_videos()
    with input_error("--caption_root"):
        dataset.check_captions()
    return dataset


def validation_set(args, words):
    return retrieval_set(
        args, YouCook2, youcook_table, args.eval_csv or "data/validation_youcook.csv", words
    )


def build_model(args, words):
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


def train(args, process):
    """The whole training, as one process of it sees it."""
    first_rank = process.rank == 0
    make_folder(log_path(args, "txt").parent, "log_root")
    level = logging.INFO if first_rank else logging.ERROR
    setup_logging(args.verbose, log_path(args, "txt"), level)
    torch.backends.cudnn.benchmark = bool(args.cudnn_benchmark)
    args.resume = args.resume or process.is_restarted()
    job = setup(args, process, process.device)
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
    check_ranks_agree(args, process, job)
    process.mark_started()
    step = training_step(args, process, job)
    bad = BadSamples(log_path(args, "bad.csv"), process)
    sampler = StepSampler(  # of micro-batches: accum_steps of them in a row are a step's
        len(job.dataset),
        job.batch_size // args.accum_steps,
        job.total_steps * args.accum_steps,
        first_step=progress.step * args.accum_steps,
        seed=args.seed,
        rank=process.rank,
        world_size=process.world_size,
    )
    workers = workers_per_rank(args, process)
    batches = training_batches(
        job.dataset,
        sampler,
        workers=workers,
        # The next step's micro-batches are read while this one's are computed.
        prefetch=max(args.accum_steps, prefetch_depth(sampler.share, workers)),
        timeout=args.sample_timeout,
        quarantined=bad.quarantined,
        pin_memory=process.device.type == "cuda",
        on_sample=process.on_sample,
    )
    reporter = MetricLogger(args, process, progress.step)
    with contextlib.closing(batches), contextlib.closing(reporter):
        if job.validation and lacks_validation(args, process, job):
            validate(args, process, job, reporter)
        for _ in range(progress.epoch, args.epochs):
            with reporter.epoch(job):
                train_epoch(args, process, job, step, batches, bad, reporter)
            progress.epoch += 1
            progress.bad_in_epoch = 0
            save(args, process, job, step)
            if job.validation:
                validate(args, process, job, reporter)


def check_ranks_agree(args, process, job):
    """Every rank finds for itself what it starts from: they have to have found the same."""
    own = {
        "checkpoint": job.resumed and job.resumed.name,
        "epoch": job.progress.epoch,
        "step": job.progress.step,
        "videos": len(job.dataset),
        "batch": job.batch_size,
        "accum_steps": args.accum_steps,
        "amp": str(training_dtype(args.amp, process.device)),
        "steps": job.total_steps,
        "seed": job.dataset.seed,
    }
    found = process.gather(own)
    for rank, its in enumerate(found):
        if its != found[0]:
            process.abort(
                f"--resume: rank {rank} starts from {its}, rank 0 from {found[0]}: the nodes "
                "have different flags, processors (--amp) or files"
            )


def training_step(args, process, job):
    """The TrainingStep of this process, joined with the other ranks'."""
    if args.compile:
        job.model.compile()
    network = job.model
    if process.world_size > 1:
        # Frozen: it travels once, and DistributedDataParallel is to leave it alone.
        dist.broadcast(network.text_module.word_embd.weight.data, src=0)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            network, ["text_module.word_embd.weight"]
        )
        ids = [process.device] if process.device.type == "cuda" else None
        # Running averages take no part in training: validation and checkpoints have rank 0's.
        network = DistributedDataParallel(network, device_ids=ids, forward_sync_buffers=False)
    dtype = training_dtype(args.amp, process.device)
    log.info("convolutions and matrix products in %s", str(dtype).removeprefix("torch."))
    skipped = job.progress.skipped_steps, job.progress.skipped_in_row
    step = TrainingStep(network, job.optimizer, dtype, process.enter_stage, skipped)
    if job.resumed_scaler:
        step.scaler.load_state_dict(job.resumed_scaler)
    if process.world_size > 1:
        prime_ddp_buckets(args, process, step)
    return step


def prime_ddp_buckets(args, process, step):
    """Takes DistributedDataParallel past its first backward pass, after which it lays gradients out
    anew and adds up the ranks in another order: so a resumed run has an uninterrupted one's bits.
    """
    clips, side = args.batch_size // process.nproc_per_node, args.video_size
    captions = clips * args.num_candidates
    batch = {
        "video": torch.zeros(clips, 3, args.num_frames, side, side, dtype=torch.uint8),
        "text": torch.zeros(captions, TRAINING_WORDS, dtype=torch.int64),
    }
    step.network.train()
    averages = BatchNormBuffers(step.network)
    before = averages.read()
    sum(embedding.sum() for embedding in step.embed(batch)).backward()
    step.network.zero_grad()
    averages.write(before)


def train_epoch(args, process, job, step, batches, bad, reporter):
    """Runs the steps that are left of an epoch. A signal ends the process, after a checkpoint."""
    progress, last_step = job.progress, job.steps_before(job.progress.epoch + 1)
    step.network.train()
    window = ThroughputMeter()
    unlisted = False  # whether any rank has found bad samples that the list does not have yet
    while progress.step < last_step:
        process.enter_stage(f"waiting for the data of step {progress.step + 1}")
        with window.waiting():
            micro_batches = [own_memory(args, next(batches)) for _ in range(args.accum_steps)]
            process.enter_stage(f"the start of step {progress.step + 1}")
            found = [
                fault for batch in micro_batches for fault in chain.from_iterable(batch["bad"])
            ]
            bad.found.extend(found)
            replaced = sum(len(batch["bad"]) for batch in micro_batches)
            # Waits for the slowest rank's data.
            signalled, replaced = process.sum(process.signal is not None, replaced)
        unlisted |= replaced > 0
        progress.bad_samples += replaced
        progress.bad_in_epoch += replaced

        loss = step(micro_batches)
        lr = job.scheduler.get_last_lr()[0]
        job.scheduler.step()
        progress.step += 1
        window.count(job.batch_size)
        reporter.bar.update()

        too_bad = progress.bad_in_epoch > args.max_bad_fraction * len(job.dataset)
        due = args.checkpoint_every and progress.step % args.checkpoint_every == 0
        shown = progress.step % args.n_display == 0 or progress.step == last_step
        if not (too_bad or due or shown or signalled):
            continue  # without a look at the device, which may be some way behind
        process.enter_stage(f"the device to finish step {progress.step}")
        count_skipped(args, process, progress, step)
        if unlisted:
            bad.write()
            unlisted = False
        if too_bad:
            save(args, process, job, step, within_epoch=True)
            process.abort(
                f"--max_bad_fraction: {progress.bad_in_epoch} samples of epoch "
                f"{progress.epoch + 1}, which has {len(job.dataset)}, could not be read, more than "
                f"{args.max_bad_fraction:g} of them: see {bad.path}"
            )
        if shown:
            reporter.show(job, window, loss.item(), lr)
            window = window.next()
        if signalled or (due and progress.step < last_step):
            save(args, process, job, step, within_epoch=True)
        if signalled:
            stop(process)


def own_memory(args, batch):
    """A batch that stays as it is when the next one is asked for (see sample_batches)."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    if args.accum_steps == 1 or all(tensor.is_pinned() for tensor in tensors.values()):
        return batch
    return {**batch, **{name: tensor.clone() for name, tensor in tensors.items()}}


def count_skipped(args, process, progress, step):
    """Takes over the step's counts; ends the run after max_bad_steps in a row."""
    known = progress.skipped_steps
    progress.skipped_steps, progress.skipped_in_row, most_in_row = step.skipped()
    if progress.skipped_steps > known and process.rank == 0:
        log.warning(
            "%d of the steps up to %d skipped: loss or gradient not finite (%d in a row now)",
            *(progress.skipped_steps - known, progress.step, progress.skipped_in_row),
        )
    if most_in_row >= args.max_bad_steps:
        process.abort(
            f"--max_bad_steps: {most_in_row} steps in a row, up to step {progress.step} or shortly "
            "before, had a loss or gradient that is not finite: lower --lr, or look at the data; "
            f"the checkpoints in {checkpoint_folder(args)} have the weights from before"
        )


def save(args, process, job, step, within_epoch=False):
    """Rank 0 writes a checkpoint."""
    process.enter_stage("writing a checkpoint")
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
    if step.scaler.is_enabled():
        content["scaler"] = step.scaler.state_dict()
    number = job.progress.step if within_epoch else None
    if path := checkpoint.save_checkpoint(checkpoint_folder(args), content, number):
        log.info("wrote %s", path)


def stop(process):
    """Ends a process after a signal, when rank 0 has written its checkpoint."""
    process.enter_stage("the end, after a signal")
    signals = [name for name in process.gather(process.signal) if name]
    log.info("stopped by %s: start again to go on from there", signals[0])
    sys.exit(os.EX_TEMPFAIL)


def validate(args, process, job, reporter):
    """Retrieval figures of the model as rank 0 has it; the ranks share the videos."""
    process.enter_stage("validation")

    def on_video():
        process.on_sample()
        return process.signal is not None

    if process.world_size > 1:
        for buffer in job.model.buffers():  # each rank has running statistics of its own
            dist.broadcast(buffer, src=0)
    figures = evaluate_retrieval(
        fuse_for_inference(job.model, PRECISIONS[inference_amp(args.amp)]),
        job.validation,
        process.device,
        batch_size=args.batch_size_val,
        workers=workers_per_rank(args, process),
        sample_timeout=args.sample_timeout,
        rank=process.rank,
        world_size=process.world_size,
        gather=process.gather,
        on_video=on_video,
    )
    if figures is None:  # nothing is lost: the checkpoint is written, and a restart validates
        stop(process)
    reporter.show_validation(job.progress, figures)


def lacks_validation(args, process, job):
    """Whether the run was ended between an epoch's checkpoint and its validation."""
    ended = job.resumed and job.progress.step == job.steps_before(job.progress.epoch)
    done = not ended or any(
        "R1" in record and record["epoch"] == job.progress.epoch
        for record in read_records(log_path(args, "jsonl"))
    )
    return not process.broadcast(done)


if __name__ == "__main__":
    run_script(main)
