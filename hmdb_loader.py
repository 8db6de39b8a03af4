"""HMDB-51 for action recognition: short clips, 51 classes, three splits."""

import pandas as pd

from annotations.hmdb import SUFFIX
from recognition_loader import Recognition


class HMDB51(Recognition):
    """The clips of a table; see annotations.hmdb.hmdb_table. Items: see Recognition."""

    @staticmethod
    def classes(table: pd.DataFrame) -> pd.Series:
        return table["label"].str.removesuffix(SUFFIX)
