"""The error for what the user can fix, those for a signal and for a GPU that failed, and what counts as which.

Nothing here imports torch.
"""

CONTROLS = {*range(32), *range(127, 160)} - {9, 10}  # could move the cursor, clear the screen, or worse
ORDERS = (0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))  # text in another order, or new lines
ESCAPED = {c: f"\\x{c:02x}" for c in CONTROLS} | {c: f"\\u{c:04x}" for c in ORDERS}
"""Characters that a file's name, a caption or metadata may have -> how they are printed."""

LONGEST = 4000
"""Characters of an error: a name in a file may have millions."""

OUT_OF_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""What an error says if GPU memory ran out. torch's allocator raises OutOfMemoryError. But cuBLAS, cuDNN, Triton, which
loads each kernel when it is first needed, and CUDA itself ask the driver for memory; if it has none left, they raise a
RuntimeError: "Triton Error [CUDA]: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate".
"""

GPU_FAILURES = ("CUDA error", "CUDA driver error", "[CUDA]", "CUBLAS_STATUS_", "CUDNN_STATUS_", "NVML_SUCCESS")
"""What an error says if a kernel, the driver or the GPU failed: that of PyTorch, Triton, cuBLAS or cuDNN, or of
PyTorch's allocator, which asks NVML for the free memory.
"""


class WrongRequest(ValueError):
    """A request that cannot be met. The message, one line, says what was expected, what was found and what to do.

    Every command prints it and exits with 2.
    """

    def __init__(self, message: str) -> None:
        line = one_line(message)
        super().__init__(line if len(line) <= LONGEST else f"{line[:3000]} ... {line[-500:]}")


class Stopped(KeyboardInterrupt):
    """A signal asked the program to end. Shells expect its number plus 128 as exit code."""

    def __init__(self, signal: int, message: str = "") -> None:
        super().__init__(message)
        self.exit_code = 128 + signal


class GPUFailure(RuntimeError):
    """The GPU failed. The message says what happened, what is saved and how to go on. Commands exit with 1."""


def is_gpu_failure(error: BaseException | None) -> bool:
    """Whether the GPU, its driver or a kernel failed, other than by running out of memory."""
    failed = isinstance(error, RuntimeError) and any(words in str(error) for words in GPU_FAILURES)
    return error is not None and (failed or type(error).__name__ == "AcceleratorError") and not is_out_of_memory(error)


def first_line(error: BaseException) -> str:
    """The first sentence of an error of torch, whose further lines are for programmers."""
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]


def one_line(text: str) -> str:
    """`text` with everything escaped that is not printed in its place on the same line."""
    return text.translate(ESCAPED | {10: "\\n"})


def is_out_of_memory(error: BaseException) -> bool:
    """Whether GPU memory ran out, in torch's allocator or outside it."""
    if from_allocator(error):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def from_allocator(error: BaseException) -> bool:
    """Whether `error` is torch.OutOfMemoryError."""
    return type(error).__name__ == "OutOfMemoryError"
