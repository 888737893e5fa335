"""What can go wrong, as a tree.

CkaProbeError            something the caller can mend; the command line exits with 2
├── SpecError            a model, data set, layer selection or option that cannot be understood or found
├── CheckpointError      a checkpoint that cannot be read or does not fit its network
├── HubError             pretrained weights that cannot be fetched
├── DataError            images that cannot be read, or too few of them
├── NetworkError         a network that cannot run on the images, or runs differently from batch to batch
├── FeatureError         features for which a measure is undefined (non-finite, constant, too few examples)
├── TrainingError        a training that cannot go on, as its loss is not finite
├── OutOfMemoryError     the device is too small for the batch
├── OutputError          a place that cannot be written
└── OtherProcessError    another process of the same run failed first, and says why
"""


class CkaProbeError(Exception):
    """Base of every error that the user can mend. The message says what must hold, what came and what to do."""


class SpecError(CkaProbeError):
    """A model, data set, layer selection or option that cannot be understood or found."""


class CheckpointError(CkaProbeError):
    """A checkpoint that cannot be read, or does not fit its network."""


class HubError(CkaProbeError):
    """Pretrained weights that cannot be fetched."""


class DataError(CkaProbeError):
    """Images that cannot be read, or too few of them."""


class NetworkError(CkaProbeError):
    """A network that cannot run on the images, or runs differently from batch to batch."""


class FeatureError(CkaProbeError):
    """Features for which a measure is undefined: non-finite, constant, or of too few examples."""


class TrainingError(CkaProbeError):
    """A training that cannot go on, as its loss is not finite."""


class OutOfMemoryError(CkaProbeError):
    """The device is too small for the batch."""


class OutputError(CkaProbeError):
    """A place that cannot be written."""


class OtherProcessError(CkaProbeError):
    """Another process of the same run failed first, and says why."""
