"""UCF-101 for action recognition: short clips, 101 classes, three splits."""

import pandas as pd

from recognition_loader import Recognition


class UCF101(Recognition):
    """The clips of a table; see annotations.ucf.ucf_table. Items: see Recognition."""

    @staticmethod
    def classes(table: pd.DataFrame) -> pd.Series:
        return table["label"]
