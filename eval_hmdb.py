"""Linear action recognition on HMDB-51: python eval_hmdb.py --pretrain_cnn_path FILE"""

from args import get_args
from evaluation import evaluate_hmdb, inference_model
from hmdb_loader import HMDB51
from utils import check_output, pick_device, report, run_script, setup_logging


def main():
    args = get_args(__doc__)
    setup_logging(args.verbose)
    device = pick_device(args)
    check_output(args.output)
    dataset = HMDB51(
        args.eval_csv or "data/hmdb51.csv",
        args.eval_video_root,
        num_frames=args.num_frames,
        size=args.video_size,
        num_windows=args.num_windows_test,
        decoder=args.decoder,
    )
    figures = evaluate_hmdb(
        inference_model(args, device),
        dataset,
        device,
        batch_size=args.batch_size_val,
        workers=args.num_thread_reader,
        sample_timeout=args.sample_timeout,
    )
    report("HMDB-51", figures, args.output)


if __name__ == "__main__":
    run_script(main)
