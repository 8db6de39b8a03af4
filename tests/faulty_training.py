"""Run main_distributed.py with the faults that the environment variable FAULTS lists as JSON.

crash, hang: part of the name of a video. Decoding it crashes or hangs the worker.
nan: [rank, first step, last step]. The rank's clips are NaN in these steps.
stuck: [rank, step]. The rank hangs at this step.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
FAULTS = json.loads(os.environ["FAULTS"])

import torch.distributed as dist  # noqa: E402

import main_distributed  # noqa: E402
import video_loader  # noqa: E402
from training import step as training_step  # noqa: E402


def decode_clip(path, *args, **settings):
    if FAULTS.get("crash", "no such name") in str(path):
        os.kill(os.getpid(), signal.SIGSEGV)
    if FAULTS.get("hang", "no such name") in str(path):
        time.sleep(1000)
    return real_decode_clip(path, *args, **settings)


def do_step(step, batches):
    global steps
    steps += 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    nan_rank, first, last = FAULTS.get("nan", (None, 0, 0))
    if rank == nan_rank and first <= steps <= last:
        batches = [{**batch, "video": batch["video"] * float("nan")} for batch in batches]
    if FAULTS.get("stuck") == [rank, steps]:
        time.sleep(1000)
    return real_do_step(step, batches)


steps = 0
real_decode_clip, video_loader.decode_clip = video_loader.decode_clip, decode_clip
real_do_step, training_step.TrainingStep.__call__ = training_step.TrainingStep.__call__, do_step

if __name__ == "__main__":
    main_distributed.run_script(main_distributed.main)
