"""MSR-VTT's 1k-A test list to the evaluation's table.

    python data/msrvtt/prepare.py --annotations MSRVTT_JSFUSION_test.csv
    python data/msrvtt/prepare.py --annotations test_videodatainfo.json --ids LIST

The first is the table of the JSFusion authors, which papers report on: a sentence for each of 1,000
videos. The second makes one from the official annotations, of the videos that LIST names: a text
file with an id on each line, or a CSV file with a column video_id. A column sentence of LIST says
which sentence is a video's; otherwise it is the first that the annotations have of it, and the
figures are not those of the JSFusion table. Without --ids: all videos of the test split.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from annotations.msrvtt import msrvtt_table
from annotations.tables import write_table
from args import Parser
from utils import check_new_output, run_script


def main(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--annotations", required=True, help="the CSV file or the JSON")
    parser.add_argument("--ids", default="", help="of a JSON: the file that lists the videos")
    parser.add_argument("--out", default="data/msrvtt_test.csv", help="(default %(default)s)")
    args = parser.parse_args(argv)
    check_new_output(args.out, "out")
    table, notes = msrvtt_table(args.annotations, args.ids, "annotations")
    write_table(args.out, table, f"{len(table)} videos with a sentence each", notes)


if __name__ == "__main__":
    run_script(main)
