"""Documents from TensorFlow Datasets, read from array_record files without TensorFlow."""

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data.sources import Unit
from train.data.store import digest

_UNIT_BYTES = 16 << 20
# No "..", no folder but that of the configuration: TFDS makes paths of names.
_NAME = re.compile(r"\w+(/\w[\w+-]*(\.\w[\w+-]*)*)?(:\d+\.\d+\.\d+)?")
_PREFERRED = ("text", "content", "document")


@dataclass(frozen=True)
class TfdsUnit:
    """Records start..stop of the train split of a prepared data set."""

    directory: str
    feature: str
    start: int
    stop: int
    size: int

    def documents(self) -> Iterator[str]:
        tfds = _tfds()
        builder = tfds.builder_from_directory(self.directory)
        records = builder.as_data_source(
            "train", decoders={self.feature: tfds.decode.SkipDecoding()}
        )
        for index in range(self.start, self.stop):
            value = records[index][self.feature]
            yield value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class TfdsSource:
    """``tfds:NAME[/CONFIG][:VERSION][#FEATURE]``, its train split; documents are records.

    The data set is downloaded and prepared as TFDS does, under TFDS_DATA_DIR or
    ~/tensorflow_datasets, in the array_record format.
    """

    def __init__(self, name: str):
        name, _, feature = name.partition("#")
        tfds = _tfds()
        builder = _builder(tfds, name)
        # Chosen before the download, which may take hours.
        self._feature = feature or text_feature(name, builder.info.features)
        if self._feature not in builder.info.features:
            raise ValueError(
                f"tfds:{name} has no feature {self._feature!r}; it has "
                + _listed(builder.info.features)
            )
        _prepare(builder, name)
        if "train" not in builder.info.splits:
            splits = ", ".join(builder.info.splits) or "none"
            raise ValueError(f"tfds:{name} has no split named train (it has {splits})")
        self._split = builder.info.splits["train"]
        self._directory = str(builder.data_path)
        self.fingerprint = digest(
            builder.info.full_name, self._feature, self._split.shard_lengths, self._split.num_bytes
        )

    def units(self, cache_dir: Path, workers: int) -> list[Unit]:
        del cache_dir, workers
        count, size = self._split.num_examples, max(self._split.num_bytes, 1)
        step = max(1, count * _UNIT_BYTES // size)
        return [
            TfdsUnit(
                self._directory,
                self._feature,
                start,
                min(start + step, count),
                max(1, size * (min(start + step, count) - start) // count),
            )
            for start in range(0, count, step)
        ]


def read_records(name: str, splits: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    """All records of some splits of a data set, which is downloaded and prepared if need be.

    Args:
      name: NAME[/CONFIG][:VERSION] of TensorFlow Datasets.
      splits: such as ("train", "validation").

    Returns:
      By split a list of dicts of features: numpy numbers, text as bytes.

    Raises:
      ValueError: TFDS is not installed, or it knows no such data set or split.
      OSError: it could not be downloaded or prepared.
    """
    builder = _builder(_tfds(), name)
    _prepare(builder, name)
    if missing := [split for split in splits if split not in builder.info.splits]:
        there = ", ".join(builder.info.splits) or "none"
        raise ValueError(f"tfds:{name} has no split named {', '.join(missing)} (it has {there})")
    return {split: list(builder.as_data_source(split)) for split in splits}


def _prepare(builder: Any, name: str) -> None:
    try:
        builder.download_and_prepare(file_format="array_record")
    except OSError as error:
        raise OSError(
            error.errno,
            f"tfds:{name} could not be downloaded or prepared under {builder.data_path}: {error}",
        ) from error


def _builder(tfds: Any, name: str) -> Any:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"tfds:{name} is not the name of a data set: give NAME[/CONFIG][:VERSION], without paths"
        )
    try:
        return tfds.builder(name, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"tfds:{name} is not a data set that TFDS knows; see "
            "https://www.tensorflow.org/datasets/catalog/overview"
        ) from error
    except ValueError as error:
        raise ValueError(f"tfds:{name} cannot be opened: {error}") from error


def text_feature(name: str, features: Any) -> str:
    """The feature that holds the documents: the only text there is, or one named text.

    Raises:
      ValueError: none or several candidates, with all features listed.
    """
    tfds = _tfds()
    texts = [key for key, value in features.items() if isinstance(value, tfds.features.Text)]
    preferred = [key for key in _PREFERRED if key in texts]
    if preferred or len(texts) == 1:
        return (preferred or texts)[0]
    problem = "no text feature" if not texts else f"several text features ({', '.join(texts)})"
    raise ValueError(
        f"tfds:{name} has {problem}: name one as tfds:{name}#FEATURE. It has {_listed(features)}"
    )


def _listed(features: Any) -> str:
    return ", ".join(f"{key} ({type(value).__name__})" for key, value in features.items())


def _tfds() -> Any:
    try:
        tfds = importlib.import_module("tensorflow_datasets")
        importlib.import_module("array_record")
    except ImportError as error:
        raise ValueError(
            f"tfds: sources need {error.name}: pip install 'slope-jax[tfds]', or use docs or text:GLOB"
        ) from error
    # Registers data sets of text (glue, wikipedia, c4, ...); a bare import leaves them out.
    importlib.import_module("tensorflow_datasets.text")
    return tfds
