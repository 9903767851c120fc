"""What the emulator raises."""


class Fault(Exception):
    """A kernel did what it must not.

    Attributes:
        kind: see README.md.
        file: of kernels/, or the kernel's name where its text is in no file.
        line: in that file; 0 where the fault has no line, as too large a threadgroup.
        message: what happened, to which memory, by which thread.
    """

    def __init__(self, kind: str, file: str, line: int, message: str):
        super().__init__(f"{file}:{line}: {kind}: {message}")
        self.kind, self.file, self.line, self.message = kind, file, line, message
