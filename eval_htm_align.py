"""Zero-shot alignment of narrations on HTM-Align: python eval_htm_align.py --pretrain_cnn_path FILE

--eval_csv is the official htm_align.json. --feature_cache FILE stores the features. If FILE exists,
they are read from it, and no videos are needed.
"""

from args import get_args

if __name__ == "__main__":  # --help should not wait for torch
    get_args(__doc__, "eval_htm_align")

from annotations.htm_align import htm_align_sentences
from args import ANNOTATIONS, check_decoder, check_evaluation_outputs, evaluation_table
from distributed.device import pick_device
from evaluation.feature_file import log_left_out
from evaluation.features import embed_texts
from evaluation.localization import candidate_seconds, htm_align_results, place_sentences
from evaluation.report import htm_align_data
from evaluation_script import (
    localization_set,
    report_page,
    report_results,
    second_features,
    text_video_model,
)
from htm_align_loader import HTMAlign
from retrieval_loader import RETRIEVAL_WORDS
from s3dg import Tokenizer
from utils import input_error, run_script, setup_logging


def main() -> None:
    args = get_args(__doc__, "eval_htm_align")
    setup_logging(args.verbose)
    with input_error("--device, --gpu"):
        device = pick_device(args.device, args.gpu)
    check_evaluation_outputs(args)
    check_decoder(args)

    # The sentences of each video, alignable and not.
    json_file, annotations = evaluation_table(args, htm_align_sentences, ANNOTATIONS["htm_align"])
    dataset = localization_set(args, HTMAlign, annotations)

    # The model, and the vocabulary that belongs to its weights.
    model, words, weights = text_video_model(args, device)
    tokenizer = Tokenizer(words, RETRIEVAL_WORDS)

    # The embedding of the window around each second of a video [T, 512].
    found = second_features(args, model, weights, device, dataset)
    log_left_out(found.left_out)
    narrations = {name: dataset.sentences[name] for name in found.features}

    # A sentence is placed at the second with the largest dot product, once among all seconds and
    # once among those near its idle neighbours. The largest dot product is also the score by which
    # AUC separates alignable sentences from the others.
    placed, placed_64 = [], []
    for name, seconds in found.features.items():
        sentences = narrations[name]
        texts = embed_texts(model, tokenizer, [sentence.text for sentence in sentences], device)
        scores = texts @ seconds.T
        candidates = candidate_seconds(sentences, len(seconds))
        placed.append(place_sentences(scores, sentences))
        placed_64.append(place_sentences(scores, sentences, candidates))
    results = htm_align_results(list(narrations.values()), placed, placed_64, len(found.left_out))
    report_results(args, "HTM-Align", results, weights)
    if args.html_report:
        data = htm_align_data(narrations, found, placed, placed_64)
        flags = {"fps": args.fps}
        report_page(args, "HTM-Align", results, weights, data, table=json_file, **flags)


if __name__ == "__main__":
    run_script(main)
