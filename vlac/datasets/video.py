"""Videos of a dataset: one frame by its time without decoding the rest, and writing one frame by frame.

A frame is right when its time differs from the time asked for by less than LeRobot's tolerance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlac.datasets.pictures import MAX_PIXELS
from vlac.datasets.tables import need
from vlac.errors import DatasetError

NpArray = np.ndarray[Any, Any]

TOLERANCE = 1e-4
"""Seconds; LeRobotDataset's default tolerance_s."""
AHEAD = 32
"""Frames that are decoded and thrown away before a seek is the better way."""


@contextlib.contextmanager
def refusals(path: Path, what: str) -> Iterator[None]:
    """What ffmpeg raises on a broken file, as a DatasetError."""
    av = need("av")
    try:
        yield
    except (av.FFmpegError, OSError, ValueError, IndexError, EOFError, AttributeError, TypeError) as error:
        raise DatasetError(f"{path}: {what}: {error}") from None  # (a stream without a known codec lacks attributes)


class Video:
    """Frames of one .mp4 by time. Keeps the file open and goes on decoding when the next frame is a little ahead.

    Opened through a Python file and as MP4 only, so that ffmpeg follows no playlist, address or other file.
    """

    def __init__(self, path: Path) -> None:
        av = need("av")
        self.path = path
        with refusals(path, "it cannot be opened as MP4"):
            self._file = path.open("rb")
            try:
                self._container = av.open(self._file, format="mp4")
                self._stream = self._container.streams.video[0]
                self._base = float(self._stream.time_base)
                self._step = 1.0 / float(self._stream.average_rate or 30)
                size = self._stream.width * self._stream.height
            except BaseException:
                self._file.close()
                raise
        if size > MAX_PIXELS:
            self.close()
            raise DatasetError(
                f"{path}: frames of {self._stream.width}x{self._stream.height}, more than any camera has"
            )
        self._frames: Iterator[Any] = iter(())
        self._before: Any = None
        self._last: Any = None

    def frame(self, seconds: float, tolerance: float = TOLERANCE) -> NpArray:
        """uint8 [H, W, 3] RGB of the frame at `seconds`; DatasetError when none is that near."""
        with refusals(self.path, f"the frame at {seconds:.4f} s cannot be decoded"):
            nearest = self._nearest(seconds)
            if nearest is None or abs(self._time(nearest) - seconds) >= tolerance:
                found = "none" if nearest is None else f"the nearest is at {self._time(nearest):.4f} s"
                raise DatasetError(
                    f"{self.path}: no frame at {seconds:.4f} s (to {tolerance:.0e} s); {found}",
                    remedy="timestamps and video do not belong together; record or convert this episode again",
                )
            return np.asarray(nearest.to_ndarray(format="rgb24"))

    def _time(self, frame: Any) -> float:
        return float(frame.pts * self._base)

    def _nearest(self, seconds: float) -> Any:
        here = None if self._last is None else self._time(self._last)
        if here is None or not -self._step < seconds - here < AHEAD * self._step:
            self._seek(seconds)
            if self._last is not None and self._time(self._last) > seconds + self._step:
                self._seek(0.0)  # an index that lies: from the beginning, then
        while self._last is not None and self._time(self._last) < seconds:
            following = self._following()
            if following is None:
                break
            self._before, self._last = self._last, following
        near = [f for f in (self._before, self._last) if f is not None]
        return min(near, key=lambda f: abs(self._time(f) - seconds), default=None)

    def _seek(self, seconds: float) -> None:
        self._container.seek(max(0, round(seconds / self._base) - 1), backward=True, stream=self._stream)
        self._frames = self._container.decode(self._stream)
        self._before, self._last = None, self._following()

    def _following(self) -> Any:
        return next((f for f in self._frames if f.pts is not None), None)

    def close(self) -> None:
        self._before = self._last = None
        self._frames = iter(())
        self._container.close()
        self._file.close()


class VideoWriter:
    """Frames into an .mp4 (H.264, a key frame every second frame as LeRobot has it, so that any frame is near one);
    height and width are even."""

    def __init__(self, path: Path, fps: int, height: int, width: int) -> None:
        av = need("av")
        self._container = av.open(str(path), mode="w", format="mp4")
        options = {"g": "2", "crf": "18", "preset": "veryfast", "bf": "0"}
        self._stream = self._container.add_stream("libx264", rate=fps, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._frame_of = av.VideoFrame.from_ndarray

    def add(self, picture: NpArray) -> None:
        """uint8 [H, W, 3] RGB."""
        self._container.mux(self._stream.encode(self._frame_of(np.ascontiguousarray(picture), format="rgb24")))

    def close(self) -> None:
        """Ends the file; it is complete afterwards."""
        self._container.mux(self._stream.encode())
        self._container.close()

    def abandon(self) -> None:
        """Closes the file as it is; whoever calls removes it."""
        with contextlib.suppress(need("av").FFmpegError, ValueError):
            self._container.close()
