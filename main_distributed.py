"""Trains S3D with MIL-NCE on narrated videos (Miech et al., CVPR 2020).

One process a GPU, or a few on the CPU; plain python, torchrun or SLURM: see README.md.
"""

import json
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
from video_loader import MAX_WORDS, HowTo100M, StepSampler
from youcook_loader import YouCook2


def main():
    args = get_args(__doc__)
    launch = distributed.plan_launch(args)
    check_inputs(args, launch)
    distributed.start(train, args, launch)


def check_inputs(args, launch):
    """Refuses, in the first second, what would fail in the first hour. Raises InputError."""
    if args.batch_size % launch.nproc_per_node:
        raise InputError(
            f"--batch_size {args.batch_size} cannot be shared by {launch.nproc_per_node} "
            "processes: give a multiple"
        )
    dataset = training_set(args, read_words(args))
    whole_batch = args.batch_size // launch.nproc_per_node * launch.world_size
    if whole_batch > len(dataset):
        raise InputError(
            f"--batch_size: a batch of {whole_batch} clips over all processes needs as many "
            f"videos, but {args.train_csv} lists {len(dataset)}"
        )
    if args.evaluate:
        validation_set(args, read_words(args))
    build_model(args)
    make_folder(log_path(args, "txt").parent, "log_root")
    make_folder(checkpoint_folder(args), "checkpoint_root")


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
        Tokenizer(words, MAX_WORDS),
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


def build_model(args):
    """The S3D that the flags describe, or the one of the weights to start from; on the CPU."""
    words = read_words(args)
    if args.pretrain_cnn_path:
        state = checkpoint.read_checkpoint(args.pretrain_cnn_path)["state_dict"]
        model = checkpoint.model_of(state, args.pretrain_cnn_path, args.token_to_word_path)
    else:
        if args.word2vec_path:
            check_file(args.word2vec_path, "word2vec_path")
        torch.manual_seed(args.seed)  # the same weights on every rank
        try:
            model = S3D(
                args.num_class,
                word2vec_path=args.word2vec_path,
                init=args.weight_init,
                token_to_word_path=args.token_to_word_path,
            )
        except ValueError as error:
            raise InputError(f"--word2vec_path: {error}") from None
    rows = model.text_module.word_embd.num_embeddings
    check_words_fit(words, rows, args.token_to_word_path)
    return model


def build_optimizer(args, model, first_step, total_steps):
    """The optimizer over what is trained, and the schedule, which moves at every step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained, "initial_lr": args.lr}]
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, args.lr)
    else:
        optimizer = torch.optim.SGD(groups, args.lr, momentum=args.momentum)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: lr_multiplier(step, args.warmup_steps, total_steps),
        last_epoch=first_step - 1,
    )
    return optimizer, scheduler


def train(args, process):
    """The whole training, as one process of it sees it."""
    first_rank = process.rank == 0
    json_file, folder = log_path(args, "jsonl"), checkpoint_folder(args)
    setup_logging(args.verbose and first_rank, log_path(args, "txt") if first_rank else None)
    torch.backends.cudnn.benchmark = bool(args.cudnn_benchmark)

    words = read_words(args)
    dataset = training_set(args, words)
    validation = validation_set(args, words) if args.evaluate else None
    batch_size = args.batch_size // process.nproc_per_node * process.world_size

    def steps_before(epoch):
        """Batches run on from epoch to epoch, so that each one visits every video once."""
        return epoch * len(dataset) // batch_size

    model = build_model(args)
    resumed = checkpoint.newest_checkpoint(folder) if args.resume else None
    first_epoch = args.start_epoch
    if resumed:
        content, path = resumed
        checkpoint.load_weights(model, content["state_dict"], path, "resume")
        first_epoch = content["epoch"]
        log.info("resumed from %s after epoch %d", path, first_epoch)
    model.to(process.device)
    optimizer, scheduler = build_optimizer(
        args, model, steps_before(first_epoch), steps_before(args.epochs)
    )
    if resumed:
        optimizer.load_state_dict(content["optimizer"])
        if content["scheduler"]["last_epoch"] == steps_before(first_epoch):
            scheduler.load_state_dict(content["scheduler"])
        else:
            log.warning(
                "the batch or the video list is not that of %s: the schedule goes on from step %d, "
                "where epoch %d ends now",
                *(path, steps_before(first_epoch), first_epoch),
            )
    network = model
    if process.world_size > 1:
        ids = [process.device] if process.device.type == "cuda" else None
        network = DistributedDataParallel(model, device_ids=ids)

    log.info(
        "%d videos, %d steps of %d clips, %d processes on %s",
        *(len(dataset), steps_before(args.epochs), batch_size, process.world_size, process.device),
    )
    batches = iter(
        DataLoader(
            dataset,
            batch_sampler=StepSampler(
                len(dataset),
                batch_size,
                steps_before(args.epochs),
                first_step=steps_before(first_epoch),
                seed=args.seed,
                rank=process.rank,
                world_size=process.world_size,
            ),
            num_workers=workers_of(args, process),
            pin_memory=args.pin_memory and process.device.type == "cuda",
        )
    )
    for epoch in range(first_epoch, args.epochs):
        network.train()
        steps = range(steps_before(epoch), steps_before(epoch + 1))
        for record in train_steps(
            args, steps, batches, batch_size, network, optimizer, scheduler, process.device
        ):
            record = {"epoch": epoch + 1, **record}
            log.info(
                "epoch {epoch}, step {step}: loss {loss:.4f}, lr {lr:.3g}, {clips_per_second:.1f} "
                "clips/s, {data_wait:.0%} of the time waiting for data".format(**record)
            )
            if first_rank:
                append_json(json_file, record)
        if first_rank:
            content = {
                "epoch": epoch + 1,
                "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()},
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
            }
            log.info("wrote %s", checkpoint.save_checkpoint(folder, content))
        if validation:
            if process.world_size > 1:  # each rank has its own running statistics: rank 0's count
                for buffer in model.buffers():
                    dist.broadcast(buffer, src=0)
            figures = evaluate_retrieval(
                model,
                validation,
                process.device,
                batch_size=args.batch_size_val,
                workers=workers_of(args, process),
                rank=process.rank,
                world_size=process.world_size,
            )
            log.info("epoch %d, YouCook2: %s", epoch + 1, figures)
            if first_rank:
                append_json(json_file, {"epoch": epoch + 1, **figures})


def train_steps(args, steps, batches, batch_size, network, optimizer, scheduler, device):
    """Runs these steps; yields, every n_display of them, what there is to show."""
    criterion = MILNCELoss()
    since, shown, waited = time.perf_counter(), steps.start, 0.0
    for step in steps:
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked

        video = to_device(batch["video"], device)
        text = batch["text"].to(device, non_blocking=True).view(-1, MAX_WORDS)
        loss = criterion(*network(video, text))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr = optimizer.param_groups[0]["lr"]
        scheduler.step()

        if (step + 1) % args.n_display == 0 or step + 1 == steps.stop:
            loss = loss.item()  # waits for the device: the time that follows is the steps' own
            elapsed = time.perf_counter() - since
            yield {
                "step": step + 1,
                "loss": loss,
                "lr": lr,
                "clips_per_second": (step + 1 - shown) * batch_size / elapsed,
                "data_wait": waited / elapsed,
            }
            since, shown, waited = time.perf_counter(), step + 1, 0.0


def workers_of(args, process):
    """This process's share of the node's data workers, one at least unless none are wanted."""
    return min(args.num_thread_reader, max(1, args.num_thread_reader // process.nproc_per_node))


def append_json(path, record):
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    run_script(main)
