"""Products by grouped weights in torch: some panels at a time are unpacked, and multiplied while in the cache.

torch's own product of a row depends on how many rows come with it, up to 15 of them; so rows are filled up to a
multiple of 16, and how the outputs are cut does not depend on the rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo_kernels.grouped_packing import unpack_parts
from octavo_kernels.grouped_weight import GroupedWeight

_CHUNK_VALUES = 1 << 18  # weights unpacked at once: 1 MiB of fp32
_ROW_MULTIPLE = 16


def grouped_linear(x: Tensor, weight: GroupedWeight, bias: Tensor | None, out: Tensor) -> None:
    """Fill out with the product."""
    rows = F.pad(x.float(), (0, 0, 0, -len(x) % _ROW_MULTIPLE)).contiguous()
    for columns, values in unpack_parts(weight, _CHUNK_VALUES):
        product = F.linear(rows, values.contiguous())[: len(x)]
        out[:, columns] = product if bias is None else product + bias[columns]


def grouped_argmax(x: Tensor, weight: GroupedWeight, ids: Tensor, best: Tensor) -> None:
    """Fill ids and best from the whole product."""
    products = torch.empty((len(x), weight.out_features))
    grouped_linear(x, weight, None, products)
    torch.max(products, dim=-1, out=(best, ids))
