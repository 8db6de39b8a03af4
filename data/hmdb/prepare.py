"""Convert HMDB-51's official split files (<class>_test_split<k>.txt) to the evaluation's table.

python data/hmdb/prepare.py --annotations testTrainMulti_7030_splits
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from annotations.clips import describe_clips
from annotations.hmdb import hmdb_table
from annotations.tables import write_table
from args import Parser, check_new_output
from utils import input_error, run_script


def main(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--annotations", required=True, help="the folder of the split files")
    parser.add_argument("--out", default="data/hmdb51.csv", help="(default %(default)s)")
    args = parser.parse_args(argv)
    check_new_output(args.out, "out")
    with input_error("--annotations"):
        table, _ = hmdb_table(args.annotations)
    with input_error("--out"):
        write_table(args.out, table)
    print(f"{args.out}: " + "\n".join(describe_clips(table)))


if __name__ == "__main__":
    run_script(main)
