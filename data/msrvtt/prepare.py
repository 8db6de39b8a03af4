"""Make the table of an evaluation on MSR-VTT's 1k-A test list.

    python data/msrvtt/prepare.py --annotations MSRVTT_JSFUSION_test.csv
    python data/msrvtt/prepare.py --annotations test_videodatainfo.json --ids LIST

The first is the table of the JSFusion authors, which papers report on: 1,000 videos with one
sentence each. The second makes a table from the official annotations, for the videos in LIST: a
text file with one id per line, or a CSV file with a column video_id. A video's sentence is the one
in LIST's column sentence, if there is one. Otherwise it is the first one in the annotations, and
the metrics are not those of the JSFusion table. Without --ids, the table has all videos of the test
split.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from annotations.msrvtt import msrvtt_table, read_ids
from annotations.tables import write_table
from args import Parser, check_new_output
from utils import input_error, run_script


def main(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--annotations", required=True, help="the CSV file or the JSON")
    parser.add_argument("--ids", default="", help="the videos to take from a JSON file")
    parser.add_argument("--out", default="data/msrvtt_test.csv", help="(default %(default)s)")
    args = parser.parse_args(argv)
    check_new_output(args.out, "out")
    with input_error("--ids"):
        ids = read_ids(args.ids) if args.ids else None
    with input_error("--annotations"):
        table, notes = msrvtt_table(args.annotations, ids)
    with input_error("--out"):
        write_table(args.out, table)
    print(f"{args.out}: {len(table)} videos with a sentence each", *notes, sep="\n")


if __name__ == "__main__":
    run_script(main)
