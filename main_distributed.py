"""Train S3D with MIL-NCE on narrated videos (Miech et al., CVPR 2020).

Runs one process per GPU, or a few on the CPU, under plain python, torchrun or SLURM: see
docs/cluster.md.
"""

from args import get_args

if __name__ == "__main__":  # --help should not wait for torch
    get_args(__doc__, "main_distributed")

import contextlib
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import s3dg
from annotations.youcook import youcook_table
from args import (
    ANNOTATIONS,
    check_decoder,
    check_file,
    check_packages,
    check_video_folder,
    clip_spec,
    evaluation_table,
    make_folder,
    retrieval_set,
)
from captions.readers import open_captions
from distributed.batch_memory import training_prefetch
from distributed.device import PRECISIONS, check_compiler, inference_amp, training_dtype
from distributed.launch import detect_launch, workers_per_rank
from distributed.process import start
from evaluation.features import video_features
from evaluation.retrieval import count_videos, retrieval_metrics, retrieval_scores
from s3dg import S3D, Tokenizer, fuse_for_inference
from training.checkpoint import (
    Progress,
    list_checkpoints,
    newest_checkpoint,
    save_checkpoint,
    set_aside,
    steps_before,
)
from training.log import BadSamples, MetricLogger, ThroughputMeter, read_records
from training.optimizer import build_optimizer, build_scheduler, resume_optimizer
from training.step import TrainingStep, distribute
from utils import InputError, input_error, log, run_script, setup_logging
from video_loader import TRAINING_WORDS, HowTo100M, StepSampler, read_video_list, training_batches
from youcook_loader import YouCook2


def main():
    args = get_args(__doc__, "main_distributed")
    launch = detect_launch(
        device=args.device,
        gpu=args.gpu,
        dist_url=args.dist_url,
        dist_file=args.dist_file,
        nproc_per_node=args.nproc_per_node,
        world_size=args.world_size,
        rank=args.rank,
    )
    if launch.spawn > 1:  # report input errors once, not per rank
        setup_logging(verbose=False)
        setup(args, launch, torch.device("cpu"), args.resume or launch.restarts > 0)
    start(
        partial(train, args),
        launch,
        device=args.device,
        gpu=args.gpu,
        backend=args.dist_backend,
        timeout=args.dist_timeout,
    )


@dataclass
class TrainState:
    """The state of a rank's training. `setup` builds it; `prepare_loop` adds the last four."""

    args: Namespace
    dataset: HowTo100M
    validation: YouCook2 | None
    model: S3D
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    progress: Progress
    batch_size: int  # clips per step, over all ranks and micro-batches
    total_steps: int
    first_step: int  # at which this process started
    resumed: dict  # the checkpoint that the run resumes from, or empty
    damaged: dict[Path, str]  # newer checkpoints that are damaged, and the proof

    step: TrainingStep = field(init=False)
    batches: Iterator[dict] = field(init=False)
    bad: BadSamples = field(init=False)
    logger: MetricLogger = field(init=False)

    def steps_before(self, epoch: int) -> int:
        return steps_before(epoch, len(self.dataset), self.batch_size)


def train(args, context):
    """Train as one rank of the run."""
    make_folder(args.log_root, "log_root")
    quiet = context.rank > 0
    setup_logging(args.verbose, log_path(args, "txt"), logging.ERROR if quiet else logging.INFO)
    torch.backends.cudnn.benchmark = bool(args.cudnn_benchmark)
    state = setup(args, context, context.device, args.resume or context.is_restarted())
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    log_start(state, context)
    check_ranks_agree(state, context)
    set_damaged_aside(state, context)
    context.mark_started()

    prepare_loop(state, context)
    progress = state.progress
    with contextlib.closing(state.batches), contextlib.closing(state.logger):
        if state.validation and lacks_validation(state, context):
            validate(state, context)
        for epoch in range(progress.epoch, args.epochs):
            first, last = state.steps_before(epoch), state.steps_before(epoch + 1)
            with state.logger.show_epoch(epoch + 1, progress.step - first, last - first):
                train_one_epoch(state, context, last)
            progress.epoch += 1
            progress.bad_in_epoch = 0
            save(state, context)
            if state.validation:
                validate(state, context)


def train_one_epoch(state, context, last_step):
    """Run the remaining steps of an epoch. After a signal, save a checkpoint and exit."""
    args, progress = state.args, state.progress
    state.step.network.train()
    meter = ThroughputMeter(context.device)
    while progress.step < last_step:
        context.enter_stage(f"waiting for the data of step {progress.step + 1}")
        meter.start_wait()
        micro_batches = [next(state.batches) for _ in range(args.accum_steps)]
        state.step.to_device.arrival = meter.end_wait()
        bad = [faults for batch in micro_batches for faults in batch["bad"]]
        # The ranks exchange these counts while they compute.
        wait_for_sums = context.start_sum(len(bad), context.signal is not None)

        loss = state.step(micro_batches)
        del micro_batches  # up to gigabytes, to be freed before the next step's arrive
        lr = state.scheduler.get_last_lr()[0]
        state.scheduler.step()
        progress.step += 1
        context.enter_stage(f"the counts of step {progress.step}")
        replaced, stop_requested = wait_for_sums()
        count_bad_samples(state, bad, replaced)
        meter.count_step(state.batch_size)
        state.logger.bar.update()

        too_many_bad = progress.bad_in_epoch > args.max_bad_fraction * len(state.dataset)
        save_due = args.checkpoint_every and progress.step % args.checkpoint_every == 0
        log_due = progress.step % args.n_display == 0 or progress.step == last_step
        if not (too_many_bad or save_due or log_due or stop_requested):
            continue  # without a device sync: the host may be some steps ahead
        context.enter_stage(f"the device to finish step {progress.step}")
        count_skipped_steps(state, context)
        state.bad.write()
        if too_many_bad:
            save(state, context, within_epoch=True)
            context.abort(
                f"--max_bad_fraction: {progress.bad_in_epoch} of the {len(state.dataset)} samples "
                f"of epoch {progress.epoch + 1} could not be read, a fraction above "
                f"{args.max_bad_fraction:g}; see {state.bad.path}"
            )
        if log_due:
            waited = sum(context.start_max(*meter.list_waits())()) / 1e6
            state.logger.log_training(progress, meter, waited, loss.item(), lr, state.total_steps)
            meter = meter.restart()
        if stop_requested or (save_due and progress.step < last_step):
            save(state, context, within_epoch=True)
        if stop_requested:
            stop(context)


def count_bad_samples(state, bad, replaced):
    """Count the samples of a step that were replaced.

    bad: this rank's, as training_batches yields them. replaced: their number on all ranks.
    """
    state.bad.add(chain.from_iterable(bad), replaced > 0)
    state.progress.bad_samples += replaced
    state.progress.bad_in_epoch += replaced


def count_skipped_steps(state, context):
    """Read the counts of skipped steps. Abort after max_bad_steps bad ones in a row."""
    progress, known = state.progress, state.progress.skipped_steps
    progress.skipped_steps, progress.skipped_in_row, most_in_row = state.step.skipped()
    if progress.skipped_steps > known and context.rank == 0:
        log.warning(
            "skipped %d of the steps up to %d: loss or gradient not finite (%d in a row so far)",
            *(progress.skipped_steps - known, progress.step, progress.skipped_in_row),
        )
    if most_in_row >= state.args.max_bad_steps:
        context.abort(
            f"--max_bad_steps: the loss or gradient of {most_in_row} steps in a row was not "
            f"finite, at or shortly before step {progress.step}; lower --lr or check the data. "
            f"The checkpoints in {checkpoint_folder(state.args)} have the weights from before"
        )


def save(state, context, within_epoch=False):
    """Have rank 0 write a checkpoint."""
    context.enter_stage("writing a checkpoint")
    if context.rank > 0:
        return
    content = {
        "epoch": state.progress.epoch,
        "state_dict": {f"module.{name}": v for name, v in state.model.state_dict().items()},
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "progress": state.progress.content(state.batch_size, len(state.dataset)),
    }
    if state.step.scaler.is_enabled():
        content["scaler"] = state.step.scaler.state_dict()
    number = state.progress.step if within_epoch else None
    resumed = state.resumed and (state.resumed["path"], state.first_step)
    if path := save_checkpoint(checkpoint_folder(state.args), content, number, resumed):
        log.info("wrote %s", path)


def stop(context):
    """Exit after a signal, once rank 0 has written its checkpoint."""
    context.enter_stage("the end, after a signal")
    signals = [name for name in context.gather(context.signal) if name]
    log.info("stopped by %s; start again to resume", signals[0])
    sys.exit(os.EX_TEMPFAIL)


class StopRequested(Exception):
    """A signal arrived during the validation."""


def validate(state, context):
    """Evaluate rank 0's model on YouCook2 retrieval. The ranks divide the videos among them."""
    context.enter_stage("validation")
    args = state.args

    def on_video():
        context.on_sample()
        if context.signal is not None:
            raise StopRequested

    if context.world_size > 1:
        for buffer in state.model.buffers():  # the running statistics of the ranks differ
            dist.broadcast(buffer, src=0)
    model = fuse_for_inference(state.model, PRECISIONS[inference_amp(args.amp)])
    try:
        videos = video_features(
            model,
            state.validation,
            context.device,
            batch_size=args.batch_size_val,
            workers=workers_per_rank(args.num_thread_reader, context.nproc_per_node),
            sample_timeout=args.sample_timeout,
            rank=context.rank,
            world_size=context.world_size,
            on_video=on_video,
        )
    except StopRequested:
        videos = None
    shards = context.gather(videos)
    if None in shards:  # nothing is lost: the checkpoint exists, and a resumed run validates it
        stop(context)
    videos = dict(sorted(item for shard in shards for item in shard.items()))
    with input_error("--eval_video_root"):
        scores = retrieval_scores(model, state.validation, videos, context.device)
    metrics = {**retrieval_metrics(scores), **count_videos(state.validation, videos)}
    state.logger.log_validation(state.progress, metrics)


def lacks_validation(state, context):
    """Check whether the run stopped between an epoch's checkpoint and its validation."""
    epoch = state.progress.epoch
    at_epoch_end = state.resumed and state.progress.step == state.steps_before(epoch)
    done = not at_epoch_end or any(
        "R1" in record and record["epoch"] == epoch
        for record in read_records(log_path(state.args, "jsonl"))
    )
    return not context.broadcast(done)


# --- setup: check all input, then build ----------------------------------------------------------


def setup(args, ranks, device, resume):
    """Read all input and build the TrainState.

    Rejects invalid input now instead of an hour into the run. `ranks` is a Launch or a RankContext.
    Raises InputError.
    """
    check_flags(args, ranks)
    batch_size = args.batch_size // ranks.nproc_per_node * ranks.world_size * args.accum_steps
    with input_error("--token_to_word_path"):
        words = s3dg.load_words(args.token_to_word_path)
    dataset = training_set(args, words)
    total_steps = steps_before(args.epochs, len(dataset), batch_size)
    if total_steps == 0:
        raise InputError(
            f"--batch_size: {args.epochs} epochs of the {len(dataset)} videos of {args.train_csv} "
            f"do not fill one batch of {batch_size}; give a smaller batch"
        )
    validation = None
    if args.evaluate:
        _, table = evaluation_table(args, youcook_table, ANNOTATIONS["youcook"])
        validation = retrieval_set(args, YouCook2, table, words)
    resumed, damaged = find_checkpoint(args, resume)
    model = build_model(args, words, resumed).to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last_3d)
    model.grad_checkpoint = args.grad_checkpoint
    if resumed:
        progress = Progress.resume(resumed, batch_size, len(dataset))
    else:
        first_step = steps_before(args.start_epoch, len(dataset), batch_size)
        progress = Progress(args.start_epoch, first_step)
    make_folders(args)
    optimizer = build_optimizer(
        model, args.optimizer, args.lr, momentum=args.momentum, fused=bool(args.fused_optimizer)
    )
    if resumed:
        with input_error(f"--resume: {resumed['path']}"):
            resume_optimizer(optimizer, resumed["optimizer"])
    scheduler = build_scheduler(optimizer, args.warmup_steps, total_steps, progress.step)
    return TrainState(
        args=args,
        dataset=dataset,
        validation=validation,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        progress=progress,
        batch_size=batch_size,
        total_steps=total_steps,
        first_step=progress.step,
        resumed=resumed,
        damaged=damaged,
    )


def check_flags(args, ranks):
    """Reject flags that contradict each other or this machine."""
    if args.batch_size % ranks.nproc_per_node:
        raise InputError(
            f"--batch_size {args.batch_size} cannot be divided among {ranks.nproc_per_node} "
            "processes; give a multiple of their number"
        )
    if args.compile:
        with input_error("--compile"):
            check_compiler()
        if args.grad_checkpoint:
            raise InputError("--compile and --grad_checkpoint cannot be combined; drop one")
    if args.sample_timeout >= args.dist_timeout:
        raise InputError(
            f"--sample_timeout {args.sample_timeout:g} is not below --dist_timeout "
            f"{args.dist_timeout:g}, so a slow sample would end the run; lower it"
        )
    if args.tensorboard:
        check_packages("--tensorboard", "tensorboard")
    check_decoder(args)


def checkpoint_folder(args):
    return Path(args.checkpoint_root, args.checkpoint_dir)


def log_path(args, kind):
    """Return the path of a log, <log_root>/<checkpoint_dir>.<kind>, by default train.<kind>."""
    return Path(args.log_root, f"{args.checkpoint_dir or 'train'}.{kind}")


def make_folders(args):
    make_folder(args.log_root, "log_root")
    make_folder(checkpoint_folder(args), "checkpoint_root")
    if args.tensorboard:
        make_folder(log_path(args, "tensorboard"), "tensorboard")


def training_set(args, words):
    with input_error("--train_csv"):
        names = read_video_list(args.train_csv)
    check_video_folder(args.video_path, "video_path")
    with input_error("--caption_root"):
        captions = open_captions(args.caption_root)
    dataset = HowTo100M(
        names,
        args.video_path,
        captions,
        Tokenizer(words, TRAINING_WORDS),
        clip_spec(args),
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


def find_checkpoint(args, resume):
    """Return the checkpoint to resume from, or an empty dict, and newer ones that are damaged."""
    folder, damaged = checkpoint_folder(args), {}
    if resume:
        with input_error("--resume"):
            resumed = newest_checkpoint(folder, damaged)
        if resumed:
            return resumed, damaged
    if args.start_epoch >= args.epochs:
        raise InputError(f"--start_epoch {args.start_epoch} is not below --epochs {args.epochs}")
    with input_error("--checkpoint_root"):
        others = list_checkpoints(folder)
    if others and not resume:
        raise InputError(
            f"--checkpoint_dir: {folder} holds the checkpoints of another run; give --resume to "
            "continue it, or another folder"
        )
    return {}, damaged


def build_model(args, words, resumed=None):
    """Build the S3D on the CPU, from a checkpoint, --pretrain_cnn_path or scratch."""
    torch.manual_seed(args.seed)  # the same new weights on every rank
    if resumed:
        with input_error("--resume"):
            model = S3D.from_state_dict(resumed["state_dict"], resumed["path"])
    elif args.pretrain_cnn_path:
        check_file(args.pretrain_cnn_path, "pretrain_cnn_path")
        # --word2vec_path is used only with torchvision's weights.
        with input_error("--pretrain_cnn_path, --word2vec_path"):
            model = s3dg.load_model(
                args.pretrain_cnn_path,
                num_classes=args.num_class,
                word2vec_path=args.word2vec_path,
            )
    else:
        if args.word2vec_path:
            check_file(args.word2vec_path, "word2vec_path")
        with input_error("--word2vec_path"):
            model = S3D(args.num_class, word2vec_path=args.word2vec_path, init=args.weight_init)
    with input_error("--num_frames, --video_size"):
        model.check_clip(args.num_frames, args.video_size)
    with input_error("--token_to_word_path"):
        rows = model.text_module.word_embd.num_embeddings
        s3dg.check_vocabulary(words, rows, args.token_to_word_path)
    return model


def log_start(state, context):
    log.info(
        "started by %s; %d videos, %d steps of %d clips",
        *(context, len(state.dataset), state.total_steps, state.batch_size),
    )
    log.info("captions of %s: %s", state.args.caption_root, state.dataset.captions.origin)
    if state.total_steps <= state.args.warmup_steps:
        log.warning(
            "--warmup_steps %d is not below the %d steps of this run: the learning rate never "
            "reaches --lr",
            *(state.args.warmup_steps, state.total_steps),
        )
    if state.resumed:
        log.info(
            "resumed from %s, after epoch %d, step %d",
            *(state.resumed["path"], state.progress.epoch, state.progress.step),
        )


def check_ranks_agree(state, context):
    """Abort unless all ranks start from the same state, which each has determined by itself."""
    own = {
        "checkpoint": state.resumed and state.resumed["path"].name,
        "epoch": state.progress.epoch,
        "step": state.progress.step,
        "videos": len(state.dataset),
        "batch": state.batch_size,
        "accum_steps": state.args.accum_steps,
        "amp": str(training_dtype(state.args.amp, context.device)),
        "steps": state.total_steps,
        "seed": state.dataset.seed,
    }
    starts = context.gather(own)
    for rank, other in enumerate(starts):
        if other != starts[0]:
            context.abort(
                f"--resume: rank {rank} starts from {other}, rank 0 from {starts[0]}: the nodes "
                "have different flags, processors (--amp) or files"
            )


def set_damaged_aside(state, context):
    """Rename the damaged checkpoints, on rank 0.

    Only after check_ranks_agree: a file that only one rank finds damaged may be intact.
    """
    error = None
    if context.rank == 0:
        try:
            with input_error("--resume"):
                set_aside(state.damaged)
        except InputError as rejected:
            error = str(rejected)
    if error := context.broadcast(error):
        context.abort(error)


def prepare_loop(state, context):
    """Build the rest of the TrainState: the step over all ranks, the batches and the logs."""
    args, progress = state.args, state.progress
    state.step = build_step(state, context)
    state.bad = BadSamples(log_path(args, "bad.csv"), context)
    sampler = StepSampler(  # of micro-batches, of which accum_steps in a row make a step
        len(state.dataset),
        state.batch_size // args.accum_steps,
        state.total_steps * args.accum_steps,
        first_step=progress.step * args.accum_steps,
        seed=args.seed,
        rank=context.rank,
        world_size=context.world_size,
    )
    workers = workers_per_rank(args.num_thread_reader, context.nproc_per_node)
    lend = args.accum_steps + 1  # those of a step, and the previous one, on its way to the GPU
    state.batches = training_batches(
        state.dataset,
        sampler,
        workers=workers,
        prefetch=training_prefetch(
            state.dataset.item_spec,
            sampler.share,
            workers,
            wanted=args.prefetch,
            # The next step's micro-batches are read while this step is computed.
            step=sampler.share * args.accum_steps,
            lend=lend,
            processes=context.nproc_per_node,
        ),
        lend=lend,
        timeout=args.sample_timeout,
        quarantined=state.bad.quarantined,
        pin_memory=context.device.type == "cuda",
        on_sample=context.on_sample,
    )
    state.logger = MetricLogger(
        log_path(args, "jsonl"),
        rank=context.rank,
        device=context.device,
        first_step=progress.step,
        tensorboard=log_path(args, "tensorboard") if args.tensorboard else None,
        show_bar=bool(args.verbose),
    )


def build_step(state, context):
    """Build the TrainingStep of this rank, connected to those of the other ranks."""
    args, network = state.args, state.model
    if args.compile:
        network.compile()
    if context.world_size > 1:
        # It is frozen: broadcast it once, and exclude it from DistributedDataParallel.
        dist.broadcast(network.text_module.word_embd.weight.data, src=0)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            network, ["text_module.word_embd.weight"]
        )
        network = distribute(network, context.device)
    dtype = training_dtype(args.amp, context.device)
    log.info("convolutions and matrix products in %s", str(dtype).removeprefix("torch."))
    skipped = state.progress.skipped_steps, state.progress.skipped_in_row
    step = TrainingStep(network, state.optimizer, dtype, context.enter_stage, skipped)
    if "scaler" in state.resumed:
        step.scaler.load_state_dict(state.resumed["scaler"])
    if context.world_size > 1:
        clips, side = args.batch_size // context.nproc_per_node, args.video_size
        captions = clips * args.num_candidates
        step.prime_ddp_buckets(
            {
                "video": torch.zeros(clips, 3, args.num_frames, side, side, dtype=torch.uint8),
                "text": torch.zeros(captions, TRAINING_WORDS, dtype=torch.int64),
            }
        )
    # They are as large as the model, and no longer needed.
    for name in ("state_dict", "optimizer", "scaler"):
        state.resumed.pop(name, None)
    return step


if __name__ == "__main__":
    run_script(main)
