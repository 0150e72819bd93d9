"""What can go wrong around a sweep, one sentence each: the call, the value, the rule, the remedy."""


class SweepError(OSError):
    """Any trouble of a sweep; an OSError, so that programs which report trouble with files in a sentence report this too."""


class BadPoint(SweepError, ValueError):
    """A point or an axis that cannot be stored, hashed and sorted."""


class CannotWrite(SweepError):
    """The folder, or the disk below it, does not take the file."""


class BadStore(SweepError):
    """The file in the folder is no readable store of this version of ufm; it is left as it is."""


class SecondWriter(SweepError):
    """Another sweep is writing to this folder."""


class WorkerLost(SweepError):
    """A worker process died; all that was finished is stored."""
