"""Recorded demonstrations: LeRobotDataset v3 and v2 folders read without LeRobot, and v3 folders written crash-safe.

`open_dataset(path)` gives frames by number, lazily; `Writer` records episodes that LeRobot loads. Needs pyarrow, and av
where pictures are videos (`pip install 'vlac-compiler[datasets]'`).
"""

from vlac.datasets.layout import Episode, Feature
from vlac.datasets.reader import Dataset, Frame, open_dataset
from vlac.datasets.writer import Writer

__all__ = ["Dataset", "Episode", "Feature", "Frame", "Writer", "open_dataset"]
