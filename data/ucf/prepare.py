"""Convert UCF-101's official lists (classInd.txt, trainlist0K.txt, testlist0K.txt) to a table.

python data/ucf/prepare.py --annotations ucfTrainTestlist
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from annotations.clips import describe_clips
from annotations.tables import write_table
from annotations.ucf import ucf_table
from args import Parser, check_new_output
from utils import input_error, run_script


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--annotations", required=True, help="the folder of the official lists")
    parser.add_argument("--out", default="data/ucf101.csv", help="(default %(default)s)")
    args = parser.parse_args(argv)
    check_new_output(args.out, "out")
    with input_error("--annotations"):
        table, _ = ucf_table(args.annotations)
    with input_error("--out"):
        write_table(args.out, table)
    print(f"{args.out}: " + "\n".join(describe_clips(table)))


if __name__ == "__main__":
    run_script(main)
