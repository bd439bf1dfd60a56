"""The exceptions that bitblas raises on purpose."""


class BitBLASError(Exception):
    """Base of every exception that bitblas raises on purpose."""


class ConfigError(BitBLASError, ValueError):
    """A configuration or an environment variable has a value that is not allowed."""


class UnsupportedError(BitBLASError, NotImplementedError):
    """A valid request which no rule can serve; the message lists each rule with its reason."""


class ArgumentError(BitBLASError, ValueError):
    """A call was given an argument of the wrong kind, shape, dtype, device or value."""


class ArtifactError(BitBLASError, RuntimeError):
    """The artifact store cannot be used: others may write it, or an artifact is not what it should be."""


class CheckpointError(BitBLASError, RuntimeError):
    """A folder of a model is damaged, of a kind that is not known, or cannot be written."""


class RemoteError(BitBLASError, RuntimeError):
    """Another machine, on which something was to be measured, cannot be reached or no longer answers."""


class BuildError(BitBLASError, RuntimeError):
    """A compiler or linker failed.

    Parameters
    ----------
    message : str
        What failed.
    command : str
        The command line, empty when no process was involved.
    output : str
        All that the command wrote to its standard output and standard error.
    """

    def __init__(self, message: str, command: str = "", output: str = "") -> None:
        super().__init__(message, command, output)  # as args, so that the exception survives pickling
        self.message = message
        self.command = command
        self.output = output

    def __str__(self) -> str:
        lines = [self.message]
        if self.command:
            lines.append(f"command: {self.command}")
        if self.output.strip():
            lines.append(f"output:\n{self.output.strip()}")
        return "\n".join(lines)
