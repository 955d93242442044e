"""A model's tensors as numbers to compute with, each read from its file when it is asked for.

Files hold them in 16 or 32 bits, or in 8 (e4m3 or e5m2): plainly, or with a scale in fp32, as ComfyUI writes them:
`<layer>.scale_weight` with the marker `scaled_fp8`, or `<layer>.weight_scale`. The weight is then value * scale.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fluxq.formats.files import Checkpoint, listed, refuse

SCALES = ("scale_weight", "weight_scale")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class StoredWeights:
    """The tensors that `names` lists (name -> key of `checkpoint`), given on `device` in `dtype`.

    Raises WrongRequest, before any is read, for a tensor that is of no floating-point type, an 8-bit tensor without a
    scale where others have one, and a scale of a type or shape that does not fit.
    """

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str], device: torch.device, dtype: torch.dtype):
        self._checkpoint, self._names, self._device, self._dtype = checkpoint, names, device, dtype
        self._scales = _scales(checkpoint, names)

    def read(self, name: str) -> Tensor:
        key = self._names[name]
        tensor = self._checkpoint.get(key).to(self._device)
        if scale := self._scales.get(key):
            tensor = scaled(tensor, self._checkpoint.get(scale).to(self._device))
        return tensor.to(self._dtype)

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """The rows of a matrix at `indices` (n,). Raises WrongRequest if it has fewer."""
        key = self._names[name]
        if (count := self._checkpoint.shape(key)[0]) <= int(indices.max()):
            what = f"has {count:,} rows in {key}, but the tokenizer gives the number {int(indices.max()):,}"
            refuse(self._checkpoint.path, what, "use the tokenizer that belongs to it")
        tensor = self._checkpoint.rows(key, indices.tolist()).to(self._device)
        if scale := self._scales.get(key):
            factors = self._checkpoint.get(scale)
            tensor = scaled(tensor, (factors if factors.numel() == 1 else factors[indices]).to(self._device))
        return tensor.to(self._dtype)


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """The (N, K) fp32 matrix that fp8 values and their scale, () or (1,), (N,), (N, 1) or (N, blocks, 1), stand for."""
    values = weight.float()
    if scale.ndim == 3:
        return values.unflatten(1, (scale.shape[1], -1)).mul_(scale.float()).flatten(1)
    return values.mul_(scale.float().reshape((-1, 1) if scale.numel() > 1 else ()))


def _scales(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, str]:
    """weight's key -> its scale's key, once every tensor of `names` is found to be readable."""
    scales = {
        key: scale
        for key in names.values()
        for leaf in SCALES
        if (scale := f"{key.removesuffix('.weight')}.{leaf}") in checkpoint.keys()
    }
    marked = any(f"{key.removesuffix(name)}scaled_fp8" in checkpoint.keys() for name, key in names.items())
    unreadable, lacking, wrong = [], [], []
    for key in names.values():
        dtype = checkpoint.dtype(key)
        if dtype not in (FP8 if key in scales else FLOATS + FP8):
            unreadable.append(f"{key} is {str(dtype).removeprefix('torch.')}")
        elif dtype in FP8 and (marked or scales) and key not in scales:
            lacking.append(key)
        elif key in scales and not _fits(checkpoint, key, scales[key]):
            wrong.append(f"{scales[key]} is {checkpoint.shape(scales[key])} for {checkpoint.shape(key)}")
    if problems := listed(of_a_type_that_fluxq_does_not_read=unreadable, without_a_scale=lacking, wrong_scale=wrong):
        refuse(checkpoint.path, f"has weights that cannot be read: {problems}", "give a 16-bit version")
    return scales


def _fits(checkpoint: Checkpoint, key: str, scale: str) -> bool:
    shape, weight = checkpoint.shape(scale), checkpoint.shape(key)
    if checkpoint.dtype(scale) not in FLOATS:
        return False
    if shape in ((), (1,)):
        return True
    rows_fit = len(weight) == 2 and shape[:1] == weight[:1]
    return rows_fit and (
        shape[1:] in ((), (1,)) or (len(shape) == 3 and shape[2] == 1 and shape[1] > 0 and weight[1] % shape[1] == 0)
    )
