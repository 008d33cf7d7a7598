"""magnitude_factors: what an adapter's magnitudes multiply a product by (DoRA, arXiv 2402.09353, equation 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo_engine.adapters.weights import AdapterWeights
from octavo_engine.layers.linear import Linear

_CHUNK = 128


@torch.inference_mode()
def magnitude_factors(linear: Linear, weights: AdapterWeights, prefix: str) -> dict[str, Tensor]:
    """Return, by the names of a linear's shards that have magnitudes, magnitude / norm of a row of W + scale * B A.

    The weight is read as products by unit vectors, some columns at a time, so that it may be held in any form; sums are
    in float64. A row of zeros, whose product is 0 whatever it is multiplied by, gets 1.

    Args:
        linear: whose weight the adapter changes.
        weights: the adapter.
        prefix: what the names of the linear's shards begin with.

    Returns:
        [rows of the shard] fp32 on the host, by shard.
    """
    adapted = {
        shard.name: module
        for shard in linear.shards
        if (module := weights.modules.get(prefix + shard.name)) is not None and module.magnitude is not None
    }
    if not adapted:
        return {}
    squares = {name: torch.zeros(len(module.b), dtype=torch.float64) for name, module in adapted.items()}
    for first in range(0, linear.in_features, _CHUNK):
        end = min(first + _CHUNK, linear.in_features)
        columns = torch.split(linear.columns(first, end).cpu(), [shard.num_rows for shard in linear.shards], dim=1)
        for shard, own in zip(linear.shards, columns, strict=True):
            if (module := adapted.get(shard.name)) is not None:
                added = module.a[:, first:end].float().T @ module.b.float().T
                squares[shard.name] += torch.add(own, added, alpha=module.scale).double().square().sum(dim=0)
    factors = {}
    for name, module in adapted.items():
        assert module.magnitude is not None
        norms = linear.total(squares[name].to(linear.device)).cpu().sqrt()
        factors[name] = torch.where(norms > 0, module.magnitude.double() / norms, 1.0).float()
    return factors
