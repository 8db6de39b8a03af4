"""Convert YouCook2's official annotations to the evaluation's table.

    python data/youcook/prepare.py --annotations youcookii_annotations_trainval.json

The table has the segments of the validation videos, in the file's order. `task` is the recipe type.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from annotations.tables import write_table
from annotations.youcook import youcook_table
from args import Parser
from utils import check_new_output, input_error, run_script


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--annotations", required=True, help="the official JSON file")
    parser.add_argument(
        "--out", default="data/validation_youcook.csv", help="(default %(default)s)"
    )
    args = parser.parse_args(argv)
    check_new_output(args.out, "out")
    with input_error("--annotations"):
        table, notes = youcook_table(args.annotations)
    with input_error("--out"):
        write_table(args.out, table)
    summary = f"{len(table)} segments of {table['video_id'].nunique()} validation videos"
    print(f"{args.out}: {summary}", *notes, sep="\n")


if __name__ == "__main__":
    run_script(main)
