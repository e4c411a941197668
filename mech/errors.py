"""The exceptions of the toolkit: one root, few below it.

Every message says what is wrong, where it is and what to do about it. The command line turns
`InputError` into exit code 2 and everything else below `MechError` into exit code 1.
"""


class MechError(Exception):
    """Root of every error that the toolkit raises on purpose."""


class InputError(MechError):
    """What the user gave cannot be used: a key, a file, a name, a shape."""


class FileFormatError(InputError):
    """A file exists and is not what it should be: truncated, altered, of another version or model."""


class NotHereError(InputError):
    """Something that has a name, but is not on this machine and could not, or should not, be fetched."""


class GuardError(MechError):
    """A check on our own work failed (a hook that never fired, an adapter that is not active)."""


class MissingDependencyError(MechError):
    """An optional library is needed and not installed; the message names the extra to install."""
