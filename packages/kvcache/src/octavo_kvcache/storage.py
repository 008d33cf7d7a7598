"""KVStorage: the tensors that hold the keys and values of every layer, block by block."""

from collections.abc import Sequence

try:
    import torch

    import octavo_kernels
except ImportError as error:
    raise ImportError(
        f"KVStorage needs torch and octavo-kernels ({error}); install them with: pip install 'octavo-kvcache[torch]'"
    ) from error

from octavo_kvcache.block import NULL_BLOCK, BlockCopy
from octavo_kvcache.errors import InvalidArgument, UnsupportedSpec
from octavo_kvcache.spec import KVCacheSpec, group_specs


class KVStorage:
    """One tensor [num_blocks, 2, num_kv_heads, block_size, head_dim] per layer; index 0 of dimension 1 is K, 1 is V.

    Layers of different groups use one tensor together where their shapes allow it, since a block belongs to one group
    at a time: the k-th layer of each group lies in the same tensor.

    Memory is not initialised: unwritten slots hold anything, NaN included. On a CPU it comes in large pages where the
    system has them, and takes no physical memory until a block of the page is written. Null block 0 is zero.

    Args:
        specs: one per layer.
        num_blocks: blocks, null block 0 included.
        block_size: tokens per block.
        device: where the tensors live.

    Raises:
        InvalidArgument: no layer, fewer than 2 blocks, or a block size below 1.

    """

    def __init__(
        self, specs: Sequence[KVCacheSpec], num_blocks: int, block_size: int, *, device: torch.device | str = "cpu"
    ) -> None:
        if not specs or num_blocks < 2 or block_size < 1:
            raise InvalidArgument(
                "KVStorage needs at least 1 layer, 2 blocks (block 0 is the null block) and 1 token per block, "
                f"got {len(specs)} layers, {num_blocks} blocks, block_size {block_size}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = torch.device(device)
        self._tensors: list[torch.Tensor] = []
        self._tensor_of_layer: dict[int, torch.Tensor] = {}
        self._allocate(specs)

    @property
    def num_layers(self) -> int:
        return len(self._tensor_of_layer)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""
        return sum(tensor[0].numel() * tensor.element_size() for tensor in self._tensors)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and the values of a layer: two views [num_blocks, num_kv_heads, block_size, head_dim].

        Raises:
            IndexError: there is no such layer.

        """
        if index not in self._tensor_of_layer:
            raise IndexError(f"layer {index} does not exist; the storage has {self.num_layers} layers")
        tensor = self._tensor_of_layer[index]
        return tensor[:, 0], tensor[:, 1]

    def apply(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks in all layers, with the effect of one copy after the other.

        Raises:
            UnsupportedSpec: a tier other than "device".
            InvalidArgument: a block that is out of range, or the null block as a destination.

        """
        if not copies:
            return
        for copy in copies:
            self._check(copy)
        origins = _resolve(copies)
        src = torch.tensor(list(origins.values()), dtype=torch.int64, device=self.device)
        dst = torch.tensor(list(origins), dtype=torch.int64, device=self.device)
        octavo_kernels.copy_blocks(self._tensors, src, dst)  # reads everything before it writes anything

    def _check(self, copy: BlockCopy) -> None:
        if copy.src_tier != "device" or copy.dst_tier != "device":
            raise UnsupportedSpec(f"tiers must be 'device', got {copy.src_tier!r} to {copy.dst_tier!r}")
        if not 0 <= copy.src < self.num_blocks or not NULL_BLOCK < copy.dst < self.num_blocks:
            raise InvalidArgument(
                f"copy from block {copy.src} to {copy.dst} is out of range: src must be in [0, {self.num_blocks}), "
                f"dst in [1, {self.num_blocks})"
            )

    def _allocate(self, specs: Sequence[KVCacheSpec]) -> None:
        by_shape: dict[tuple[int, int, str], list[torch.Tensor]] = {}
        for group in group_specs(specs):
            spec = group.spec
            tensors = by_shape.setdefault((spec.num_kv_heads, spec.head_dim, spec.dtype), [])
            for position, layer in enumerate(group.layers):
                if position == len(tensors):
                    tensors.append(self._make_tensor(spec))
                self._tensor_of_layer[layer] = tensors[position]

    def _make_tensor(self, spec: KVCacheSpec) -> torch.Tensor:
        shape = (self.num_blocks, 2, spec.num_kv_heads, self.block_size, spec.head_dim)
        dtype = getattr(torch, spec.dtype)
        if self.device.type == "cpu":
            tensor = octavo_kernels.host_empty(shape, dtype)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=self.device)
        tensor[NULL_BLOCK].zero_()
        self._tensors.append(tensor)
        return tensor


def _resolve(copies: Sequence[BlockCopy]) -> dict[int, int]:
    """Find which block's old content each destination holds after one copy after the other."""
    origins: dict[int, int] = {}
    for copy in copies:
        origins[copy.dst] = origins.get(copy.src, copy.src)
    return origins
